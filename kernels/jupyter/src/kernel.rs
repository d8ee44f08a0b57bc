//! The Jupyter kernel: protocol 5.3 over ZeroMQ, around one [`Session`].
//!
//! Three threads share the work. The main one speaks with the sockets and answers at once what needs no cell (what
//! kernel this is, whether code is complete, history, interrupts, also while a cell runs). The executor runs cells one
//! after the other. A helper thread answers completions and inspections, which may have to ask rustc.
//!
//! After a failure, and after an interrupt, the cells that are queued are aborted: whoever runs all cells does not
//! want the rest of them to work on what is not there.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use chrono::SubsecRound;
use jupyter_protocol::messaging::{JupyterMessage, JupyterMessageContent, UnknownMessage};
use jupyter_zmq_client as jupyter;
use jupyter_zmq_client::{ConnectionInfo, RawMessage};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use zeromq::{SocketRecv, SocketSend};

use crate::assistance::Assistance;
use crate::layout::Layout;
use crate::outputs::{Client, Output, Update, error};
use crate::session::{Controls, Ending, Failure, FailureKind, Names, Options, Session};
use crate::{highlight, history::History, syntax};

/// How long text on stderr waits for a panic that may follow, and a rich output for the end of the cell.
pub const HOLD: Duration = Duration::from_millis(40);
/// How long a client that asks whether we are ready waits for the session at most.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked after whether the process that started us still lives.
const PARENT_CHECK: Duration = Duration::from_secs(1);

/// Serves one Jupyter client after the other until it is told to shut down.
pub fn run(connection_file: &Path, prefix: &Path) -> Result<ExitCode> {
    let info = read_connection_file(connection_file)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(serve(&info, prefix));
    // A task may be waiting for a socket.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

fn read_connection_file(path: &Path) -> Result<ConnectionInfo> {
    let shown = path.display();
    let remedy = "remedy: Jupyter writes this file and starts the kernel with it: jupyter lab, or \
                  jupyter console --kernel qlora-nb";
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the connection file {shown}\n{remedy}"))?;
    let info: ConnectionInfo = serde_json::from_str(&text)
        .with_context(|| format!("{shown} is not a connection file, a JSON object with ip, ports and key\n{remedy}"))?;
    if info.signature_scheme != "hmac-sha256" {
        bail!(
            "{shown} wants the signature scheme {:?}, and only hmac-sha256 is known\n{remedy}",
            info.signature_scheme
        );
    }
    Ok(info)
}

/// What the threads share.
struct Shared {
    iopub: UnboundedSender<JupyterMessage>,
    shell: UnboundedSender<JupyterMessage>,
    stdin: UnboundedSender<JupyterMessage>,
    history: Mutex<History>,
    /// Those of the session, once there is one.
    session: Mutex<Option<(Controls, Arc<Mutex<Names>>)>>,
    assistance: Assistance,
    /// Whether the session has started, or has failed to.
    started: Mutex<bool>,
    on_start: Condvar,
}

impl Shared {
    fn wait_until_started(&self) {
        let started = lock(&self.started);
        let _ = self.on_start.wait_timeout_while(started, START_PATIENCE, |started| !*started);
    }

    fn has_started(&self) {
        *lock(&self.started) = true;
        self.on_start.notify_all();
    }

    fn publish(&self, msg_type: &str, content: Value, parent: &JupyterMessage) {
        let mut message = message(msg_type, content, Some(parent));
        message.zmq_identities = vec![msg_type.as_bytes().to_vec().into()];
        let _ = self.iopub.send(message);
    }

    fn status(&self, state: &str, parent: &JupyterMessage) {
        self.publish("status", json!({ "execution_state": state }), parent);
    }

    fn reply(&self, request: &JupyterMessage, content: Value) {
        let _ = self.shell.send(reply_to(request, content));
    }
}

/// Contents are kept as JSON: a message with a field less than the protocol wants is not worth dropping.
fn message(msg_type: &str, content: Value, parent: Option<&JupyterMessage>) -> JupyterMessage {
    let content = UnknownMessage { msg_type: msg_type.to_owned(), content };
    let mut message = JupyterMessage::new(JupyterMessageContent::UnknownMessage(content), parent);
    message.header.username = "qlora-nb".to_owned();
    // jupyter_client takes a date with nanoseconds for no date.
    message.header.date = message.header.date.trunc_subsecs(6);
    message
}

fn reply_to(request: &JupyterMessage, content: Value) -> JupyterMessage {
    message(&request.header.msg_type.replace("_request", "_reply"), content, Some(request))
}

fn content(message: &JupyterMessage) -> &Value {
    match &message.content {
        JupyterMessageContent::UnknownMessage(message) => &message.content,
        _ => &Value::Null,
    }
}

/// The content as the type that the request's name promises.
fn parsed<T: for<'a> Deserialize<'a>>(message: &JupyterMessage) -> Result<T> {
    T::deserialize(content(message)).with_context(|| format!("a malformed {}", message.header.msg_type))
}

fn received(parts: zeromq::ZmqMessage, connection: &jupyter::RouterRecvConnection) -> Result<JupyterMessage> {
    let raw = RawMessage::from_multipart(parts, &connection.mac)?;
    // from_multipart sees to it that there are these four.
    let [header, _, metadata, content] = [0, 1, 2, 3].map(|i| &raw.jparts[i]);
    let header: jupyter_protocol::messaging::Header = serde_json::from_slice(header)?;
    let content = UnknownMessage { msg_type: header.msg_type.clone(), content: serde_json::from_slice(content)? };
    let mut message = JupyterMessage::new(JupyterMessageContent::UnknownMessage(content), None);
    message.header = header;
    message.metadata = serde_json::from_slice(metadata)?;
    message.zmq_identities = raw.zmq_identities;
    Ok(message)
}

/// Cells, as clients send them.
#[derive(Deserialize)]
struct ExecuteRequest {
    code: String,
    #[serde(default)]
    silent: bool,
    #[serde(default = "yes")]
    store_history: bool,
    #[serde(default)]
    user_expressions: Option<BTreeMap<String, String>>,
    #[serde(default)]
    allow_stdin: bool,
    #[serde(default = "yes")]
    stop_on_error: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct Cursor {
    code: String,
    cursor_pos: usize,
}

#[derive(Deserialize)]
struct Code {
    code: String,
}

async fn serve(info: &ConnectionInfo, prefix: &Path) -> Result<()> {
    let id = session_id(info);
    let cannot = |channel: &str, port: u16| {
        let remedy = "remedy: start it from Jupyter, which chooses free ports; another kernel may be using this one";
        format!("cannot listen at {} port {port}, the {channel} channel of the connection file\n{remedy}", info.ip)
    };
    let heartbeat = jupyter::create_kernel_heartbeat_connection(info).await;
    let mut heartbeat = heartbeat.with_context(|| cannot("heartbeat", info.hb_port))?.socket;
    let iopub = jupyter::create_kernel_iopub_connection(info, &id).await;
    let mut iopub = iopub.with_context(|| cannot("iopub", info.iopub_port))?;
    let shell = jupyter::create_kernel_shell_connection(info, &id).await;
    let shell = shell.with_context(|| cannot("shell", info.shell_port))?;
    let control = jupyter::create_kernel_control_connection(info, &id).await;
    let control = control.with_context(|| cannot("control", info.control_port))?;
    let stdin = jupyter::create_kernel_stdin_connection(info, &id).await;
    let stdin = stdin.with_context(|| cannot("stdin", info.stdin_port))?;

    let (iopub_sender, mut iopub_queue) = unbounded_channel();
    let (shell_sender, shell_queue) = unbounded_channel();
    let (control_sender, control_queue) = unbounded_channel();
    let (stdin_sender, stdin_queue) = unbounded_channel();
    let shared = Arc::new(Shared {
        iopub: iopub_sender,
        shell: shell_sender,
        stdin: stdin_sender,
        history: Mutex::default(),
        session: Mutex::default(),
        assistance: Assistance::new(prefix),
        started: Mutex::new(false),
        on_start: Condvar::new(),
    });

    tokio::spawn(async move {
        while let Ok(beat) = heartbeat.recv().await {
            let _ = heartbeat.send(beat).await;
        }
    });
    let published = tokio::spawn(async move {
        while let Some(message) = iopub_queue.recv().await {
            if let Err(error) = iopub.send(message).await {
                complain(&error);
            }
        }
    });
    let (shell_send, shell_receive) = shell.split();
    let (control_send, control_receive) = control.split();
    let (stdin_send, stdin_receive) = stdin.split();
    let (received, mut shell_requests) = unbounded_channel();
    tokio::spawn(read_all(shell_receive, received));
    let (received, mut control_requests) = unbounded_channel();
    tokio::spawn(read_all(control_receive, received));
    let (received, mut stdin_replies) = unbounded_channel();
    tokio::spawn(read_all(stdin_receive, received));
    tokio::spawn(send_all(shell_send, shell_queue));
    let controlled = tokio::spawn(send_all(control_send, control_queue));
    tokio::spawn(send_all(stdin_send, stdin_queue));

    let (jobs, queue) = channel();
    let executor = {
        let (shared, prefix) = (shared.clone(), prefix.to_owned());
        std::thread::spawn(move || Executor::new(shared, prefix).run(&queue))
    };
    let _ = shared.iopub.send(message("status", json!({ "execution_state": "starting" }), None));

    let mut interrupted = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut parent_check = tokio::time::interval(PARENT_CHECK);
    let parent = std::os::unix::process::parent_id();
    loop {
        tokio::select! {
            Some(request) = shell_requests.recv() => on_shell(&shared, &jobs, request),
            Some(request) = control_requests.recv() => {
                if on_control(&shared, &control_sender, &jobs, request) {
                    break;
                }
            }
            Some(reply) = stdin_replies.recv() => {
                if let Some(line) = content(&reply)["value"].as_str()
                    && let Some((controls, _)) = &*lock(&shared.session)
                {
                    controls.answer(line.to_owned());
                }
            }
            _ = interrupted.recv() => interrupt(&shared),
            _ = terminated.recv() => break,
            _ = parent_check.tick() => if std::os::unix::process::parent_id() != parent { break },
        }
    }
    // Ends the executor, and with it the session and what it left in /tmp; a running cell dies.
    let _ = jobs.send(Job::Stop);
    if let Some((controls, _)) = &*lock(&shared.session) {
        controls.kill();
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while !executor.is_finished() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(control_sender);
    let _ = tokio::time::timeout(Duration::from_secs(1), controlled).await;
    drop(shared);
    let _ = tokio::time::timeout(Duration::from_millis(200), published).await;
    Ok(())
}

/// Names this kernel in the messages that it sends; no other process on this machine has both numbers.
fn session_id(info: &ConnectionInfo) -> String {
    format!("qlora-nb-{}-{}", std::process::id(), info.shell_port)
}

/// A message that cannot be read or sent concerns nobody but its sender; the kernel goes on. The server's log shows it.
fn complain(error: &dyn std::fmt::Display) {
    eprintln!("qlora-nb: a message was dropped: {error}");
}

async fn send_all(mut socket: jupyter::RouterSendConnection, mut queue: UnboundedReceiver<JupyterMessage>) {
    while let Some(message) = queue.recv().await {
        if let Err(error) = socket.send(message).await {
            complain(&error);
        }
    }
}

async fn read_all(mut socket: jupyter::RouterRecvConnection, queue: UnboundedSender<JupyterMessage>) {
    loop {
        match socket.socket.recv().await {
            Ok(parts) => match received(parts, &socket) {
                Ok(message) => {
                    if queue.send(message).is_err() {
                        return;
                    }
                }
                Err(error) => complain(&error),
            },
            Err(error) => {
                complain(&error);
                // So that a socket that is broken for good does not keep a core busy.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn interrupt(shared: &Shared) {
    if let Some((controls, _)) = &*lock(&shared.session) {
        controls.interrupt();
    }
}

/// Answers a request on the shell channel, or hands it to whoever can.
fn on_shell(shared: &Arc<Shared>, jobs: &Sender<Job>, request: JupyterMessage) {
    let answer = match request.header.msg_type.as_str() {
        "execute_request" => {
            let _ = jobs.send(Job::Execute(Box::new(request)));
            return;
        }
        "complete_request" | "inspect_request" => {
            let (shared, jobs) = (shared.clone(), jobs.clone());
            std::thread::spawn(move || assist(&shared, &jobs, &request));
            return;
        }
        // Clients take the answer for readiness, so it waits for the session: the first cell then runs at once.
        "kernel_info_request" => {
            let shared = shared.clone();
            std::thread::spawn(move || {
                shared.wait_until_started();
                shared.status("busy", &request);
                shared.reply(&request, kernel_info());
                shared.status("idle", &request);
            });
            return;
        }
        "is_complete_request" => parsed(&request).map(|Code { code }| syntax::is_complete(&code).to_json()),
        "history_request" => parsed(&request).map(|asked| lock(&shared.history).answer(&asked)),
        "comm_info_request" => Ok(json!({ "status": "ok", "comms": {} })),
        // Nobody here opens comms, so an opened one is closed again, as the protocol wants it.
        "comm_open" => {
            let comm_id = &content(&request)["comm_id"];
            shared.publish("comm_close", json!({ "comm_id": comm_id, "data": {} }), &request);
            return;
        }
        _ => return,
    };
    shared.status("busy", &request);
    shared.reply(&request, answer.unwrap_or_else(|error| refusal(&error)));
    shared.status("idle", &request);
}

/// The answer to a request that makes no sense.
fn refusal(error: &anyhow::Error) -> Value {
    let message = format!("{error:#}");
    json!({ "status": "error", "ename": "ProtocolError", "evalue": message, "traceback": [message] })
}

/// Returns whether the kernel is to end.
fn on_control(
    shared: &Shared,
    control: &UnboundedSender<JupyterMessage>,
    jobs: &Sender<Job>,
    request: JupyterMessage,
) -> bool {
    let mut is_end = false;
    let content = match request.header.msg_type.as_str() {
        "interrupt_request" => {
            interrupt(shared);
            json!({ "status": "ok" })
        }
        "shutdown_request" => {
            is_end = true;
            json!({ "status": "ok", "restart": content(&request)["restart"] == json!(true) })
        }
        "kernel_info_request" => kernel_info(),
        // Clients that do not know better execute here too.
        "execute_request" => {
            let _ = jobs.send(Job::Execute(Box::new(request)));
            return false;
        }
        _ => return false,
    };
    shared.status("busy", &request);
    let reply = reply_to(&request, content);
    if is_end {
        let mut told = reply.clone();
        told.zmq_identities = vec!["shutdown_reply".into()];
        let _ = shared.iopub.send(told);
    }
    let _ = control.send(reply);
    shared.status("idle", &request);
    is_end
}

fn kernel_info() -> Value {
    let version = env!("CARGO_PKG_VERSION");
    json!({
        "status": "ok",
        "protocol_version": "5.3",
        "implementation": "qlora-nb",
        "implementation_version": version,
        "banner": format!("qlora-nb {version}: QLoRA fine-tuning in Rust. First cell: use qlora_nb::prelude::*;"),
        "language_info": {
            "name": "rust",
            "version": rustc_release(),
            "mimetype": "text/rust",
            "file_extension": ".rs",
            "pygments_lexer": "rust",
            "codemirror_mode": "rust",
            "nbconvert_exporter": "script",
        },
        "help_links": [
            { "text": "The Rust book", "url": "https://doc.rust-lang.org/book/" },
            { "text": "evcxr's commands", "url": "https://github.com/evcxr/evcxr/blob/main/COMMON.md" },
        ],
        "debugger": false,
        "supported_features": [],
    })
}

/// `1.95.0`, asked once: the kernel's rustc does not change under it.
fn rustc_release() -> &'static str {
    static RELEASE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    RELEASE.get_or_init(|| {
        let version = crate::layout::rustc_version().unwrap_or_default();
        let release = version.lines().find_map(|line| line.strip_prefix("release: "));
        release.unwrap_or("unknown").to_owned()
    })
}

/// Completion and inspection, on a thread of their own.
fn assist(shared: &Shared, jobs: &Sender<Job>, request: &JupyterMessage) {
    let names = lock(&shared.session).as_ref().map(|(_, names)| lock(names).clone()).unwrap_or_default();
    let ask = |expression: &str| {
        let (answer, answered) = channel();
        jobs.send(Job::TypeOf(expression.to_owned(), answer)).ok()?;
        // A cell that runs is not waited for: better a poorer answer than a late one.
        answered.recv_timeout(Duration::from_millis(1500)).ok()?
    };
    shared.status("busy", request);
    let content = match parsed(request) {
        Ok(Cursor { code, cursor_pos }) if request.header.msg_type == "complete_request" => {
            shared.assistance.complete(&code, cursor_pos, &names, &ask)
        }
        Ok(Cursor { code, cursor_pos }) => shared.assistance.inspect(&code, cursor_pos, &names, &ask),
        Err(error) => refusal(&error),
    };
    shared.reply(request, content);
    shared.status("idle", request);
}

/// What the executor's thread does next.
enum Job {
    Execute(Box<JupyterMessage>),
    TypeOf(String, Sender<Option<String>>),
    Stop,
}

/// Runs cells, one after the other.
struct Executor {
    shared: Arc<Shared>,
    prefix: PathBuf,
    session: Option<Session>,
    count: i32,
    waiting: VecDeque<Job>,
}

impl Executor {
    fn new(shared: Arc<Shared>, prefix: PathBuf) -> Executor {
        Executor { shared, prefix, session: None, count: 0, waiting: VecDeque::new() }
    }

    fn run(mut self, queue: &Receiver<Job>) {
        // The first cell will find the session ready, or else say why it is not.
        let _ = self.start();
        self.shared.has_started();
        loop {
            let job = match self.waiting.pop_front() {
                Some(job) => job,
                None => match queue.recv() {
                    Ok(job) => job,
                    Err(_) => break,
                },
            };
            match job {
                Job::Stop => break,
                Job::TypeOf(expression, answer) => {
                    let ty = self.session.as_ref().and_then(|session| session.type_of(&expression));
                    let _ = answer.send(ty);
                }
                Job::Execute(request) => match parsed(&request) {
                    Ok(asked) => self.execute(&request, &asked, queue),
                    Err(error) => self.shared.reply(&request, refusal(&error)),
                },
            }
        }
        if let Some(session) = self.session.take() {
            session.close();
        }
    }

    fn start(&mut self) -> Result<()> {
        let folder = std::env::current_dir().context("the notebook's folder is gone")?;
        let session = Session::start(&Layout::new(&self.prefix), self.shared.assistance.api.clone(), &folder)?;
        *lock(&self.shared.session) = Some((session.controls(), session.names()));
        self.session = Some(session);
        Ok(())
    }

    /// Runs a cell and answers; aborts the cells behind it if it failed.
    fn execute(&mut self, request: &JupyterMessage, asked: &ExecuteRequest, queue: &Receiver<Job>) {
        if let Some(session) = &self.session {
            session.forget_interrupts();
        }
        self.shared.status("busy", request);
        let keep = asked.store_history && !asked.silent;
        if keep {
            self.count += 1;
        }
        if !asked.silent {
            let content = json!({ "code": asked.code, "execution_count": self.count });
            self.shared.publish("execute_input", content, request);
        }
        let ending = self.run_cell(request, asked);
        let mut content = match &ending.failure {
            None => json!({ "status": "ok", "payload": [] }),
            Some(failure) => {
                let (name, details) = (failure.kind.name(), &failure.details);
                json!({ "status": "error", "ename": name, "evalue": failure.message,
                        "traceback": highlight::traceback(name, details) })
            }
        };
        let is_failure = ending.failure.is_some();
        content["execution_count"] = json!(self.count);
        content["user_expressions"] = match ending.failure {
            None => self.user_expressions(asked),
            Some(_) => json!({}),
        };
        // Whoever learns of the failure and then sends a cell means it: so this is what was sent before.
        let aborted = match asked.stop_on_error && (is_failure || ending.interrupted) {
            true => self.waiting_cells(queue),
            false => Vec::new(),
        };
        self.shared.reply(request, content);
        self.shared.status("idle", request);
        for request in aborted {
            self.shared.status("busy", &request);
            self.shared.reply(&request, json!({ "status": "aborted" }));
            self.shared.status("idle", &request);
        }
    }

    fn run_cell(&mut self, request: &JupyterMessage, asked: &ExecuteRequest) -> Ending {
        let shared = self.shared.clone();
        let mut client = Frontend {
            shared: &shared,
            request,
            count: self.count,
            silent: asked.silent,
            allow_stdin: asked.allow_stdin,
            result: String::new(),
        };
        if asked.code.trim().is_empty() {
            return Ending::default();
        }
        if self.session.is_none()
            && let Err(why) = self.start()
        {
            let message = format!("{why:#}");
            let headline = message.lines().next().unwrap_or_default();
            let failure = Failure::new(FailureKind::Died, headline, &message);
            client.show(Update::Add(error(&failure)));
            return Ending { failure: Some(failure), ..Ending::default() };
        }
        let Some(session) = &self.session else { return Ending::default() };
        let ending = session.execute(&asked.code, &Options { timeout: None, hold: Some(HOLD) }, &mut client);
        let result = std::mem::take(&mut client.result);
        if asked.store_history && !asked.silent {
            lock(&self.shared.history).add(self.count, &asked.code, &result);
        }
        ending
    }

    fn user_expressions(&self, asked: &ExecuteRequest) -> Value {
        let mut values = serde_json::Map::new();
        for (name, expression) in asked.user_expressions.iter().flatten() {
            let Some(session) = &self.session else { continue };
            let mut recorder = crate::outputs::Recorder::default();
            let ending = session.execute(expression, &Options { timeout: None, hold: None }, &mut recorder);
            let value = match ending.failure {
                Some(failure) => json!({ "status": "error", "ename": failure.kind.name(), "evalue": failure.message,
                                         "traceback": [failure.details] }),
                None => {
                    let shown = recorder.outputs.iter().rev().find_map(|output| match output {
                        Output::Display { data, .. } => Some(bundle(data)),
                        _ => None,
                    });
                    json!({ "status": "ok", "data": shown.unwrap_or(json!({ "text/plain": "" })), "metadata": {} })
                }
            };
            values.insert(name.clone(), value);
        }
        Value::Object(values)
    }

    /// Takes the cells that wait out of the queue; other jobs stay.
    fn waiting_cells(&mut self, queue: &Receiver<Job>) -> Vec<JupyterMessage> {
        let mut cells = Vec::new();
        while let Ok(job) = queue.try_recv() {
            match job {
                Job::Execute(request) => cells.push(*request),
                job => self.waiting.push_back(job),
            }
        }
        cells
    }
}

/// Representations as a message carries them.
fn bundle(data: &[(String, String)]) -> Value {
    let one = |(mime, data): &(String, String)| {
        let is_json = mime == "application/json" || mime.ends_with("+json");
        let value = is_json.then(|| serde_json::from_str(data).ok()).flatten();
        (mime.clone(), value.unwrap_or_else(|| json!(data)))
    };
    Value::Object(data.iter().map(one).collect())
}

/// The reader of one cell, at the other end of the sockets.
struct Frontend<'a> {
    shared: &'a Shared,
    request: &'a JupyterMessage,
    count: i32,
    silent: bool,
    allow_stdin: bool,
    /// The text of the cell's value, for the history.
    result: String,
}

impl Client for Frontend<'_> {
    fn show(&mut self, update: Update) {
        if self.silent {
            return;
        }
        let (msg_type, content) = match update {
            Update::Add(Output::Stream { name, text }) => ("stream", json!({ "name": name, "text": text })),
            Update::Add(Output::Display { data, is_result, id, metadata }) => {
                if is_result && let Some((_, text)) = data.iter().find(|(mime, _)| mime == "text/plain") {
                    self.result.clone_from(text);
                }
                let mut content = json!({ "data": bundle(&data), "metadata": metadata });
                if let Some(id) = id {
                    content["transient"] = json!({ "display_id": id });
                }
                match is_result {
                    true => {
                        content["execution_count"] = json!(self.count);
                        ("execute_result", content)
                    }
                    false => ("display_data", content),
                }
            }
            Update::Add(Output::Error { name, message, traceback }) => {
                let traceback = highlight::traceback(&name, &traceback.join("\n"));
                ("error", json!({ "ename": name, "evalue": message, "traceback": traceback }))
            }
            Update::Replace { id, data, metadata } => {
                let transient = json!({ "display_id": id });
                let content = json!({ "data": bundle(&data), "metadata": metadata, "transient": transient });
                ("update_display_data", content)
            }
            Update::Clear { wait } => ("clear_output", json!({ "wait": wait })),
        };
        self.shared.publish(msg_type, content, self.request);
    }

    fn ask(&mut self, prompt: &str, is_password: bool) -> bool {
        if self.allow_stdin {
            let content = json!({ "prompt": prompt, "password": is_password });
            let _ = self.shared.stdin.send(message("input_request", content, Some(self.request)));
        }
        self.allow_stdin
    }
}
