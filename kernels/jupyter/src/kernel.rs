//! The Jupyter kernel: protocol 5.3 over ZeroMQ, around one [`Session`].
//!
//! Three threads share the work. The main one speaks with the sockets and answers at once what needs no cell (what
//! kernel this is, whether code is complete, history, interrupts, also while a cell runs). The executor runs cells one
//! after the other. A helper thread answers completions and inspections, which may have to ask rustc.
//!
//! After a failure, and after an interrupt, the cells that are queued are aborted: whoever runs all cells does not
//! want the rest of them to work on what is not there.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use jupyter_protocol::messaging::{CompleteRequest, IsCompleteRequest, JupyterMessage};
use jupyter_zmq_client::{Connection, ConnectionInfo};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use zeromq::{PubSocket, RepSocket, SocketRecv, SocketSend};

use crate::executor::{Executor, Job, Shared, lock};
use crate::layout::Layout;
use crate::messages::{self, Channel, content, message, parsed, refusal, reply_to};
use crate::session::Controls;
use crate::syntax;

/// How often it is looked after whether the process that started us still lives.
const PARENT_CHECK: Duration = Duration::from_secs(1);

/// Serves one Jupyter client after the other until it is told to shut down.
pub fn run(connection_file: &Path, layout: &Layout) -> Result<()> {
    let info = messages::read_connection_file(connection_file)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(serve(&info, layout));
    // A task may be waiting for a socket.
    runtime.shutdown_background();
    outcome
}

async fn serve(info: &ConnectionInfo, layout: &Layout) -> Result<()> {
    let heartbeat = messages::listen(info, "heartbeat", info.hb_port, &info.hb_url()).await?;
    let iopub: Connection<PubSocket> = messages::listen(info, "iopub", info.iopub_port, &info.iopub_url()).await?;
    let shell = Channel::listen(info, "shell", info.shell_port, &info.shell_url()).await?;
    let mut control = Channel::listen(info, "control", info.control_port, &info.control_url()).await?;
    let stdin = Channel::listen(info, "stdin", info.stdin_port, &info.stdin_url()).await?;
    let (publish, queue) = unbounded_channel();
    let published = tokio::spawn(messages::send_all(iopub, queue));
    tokio::spawn(beat(heartbeat));

    let shared = Arc::new(Shared::new(publish, &shell, &stdin, layout));
    let (jobs, queue) = channel();
    let executor = Executor::new(shared.clone(), layout.clone());
    let executor = std::thread::spawn(move || executor.run(&queue));
    let _ = shared.iopub.send(message("status", json!({ "execution_state": "starting" }), None));
    answer_until_end(&shared, &jobs, shell, &mut control, stdin).await?;

    // Ends the executor, and with it the session and what it left in /tmp; a running cell dies.
    let _ = jobs.send(Job::Stop);
    shared.control(Controls::kill);
    let deadline = Instant::now() + Duration::from_secs(5);
    while !executor.is_finished() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // What has been said still reaches the client.
    drop(control.answers);
    let _ = tokio::time::timeout(Duration::from_secs(1), control.sending).await;
    drop(shared);
    let _ = tokio::time::timeout(Duration::from_millis(200), published).await;
    Ok(())
}

/// Sends back what clients send to see whether we live.
async fn beat(mut heartbeat: Connection<RepSocket>) {
    while let Ok(beat) = heartbeat.socket.recv().await {
        let _ = heartbeat.socket.send(beat).await;
    }
}

/// Answers requests until a client or a signal ends the kernel, or the process that started it is gone.
async fn answer_until_end(
    shared: &Arc<Shared>,
    jobs: &Sender<Job>,
    mut shell: Channel,
    control: &mut Channel,
    mut stdin: Channel,
) -> Result<()> {
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut parent_check = tokio::time::interval(PARENT_CHECK);
    let parent = std::os::unix::process::parent_id();
    loop {
        tokio::select! {
            Some(request) = shell.requests.recv() => on_shell(shared, jobs, request),
            Some(request) = control.requests.recv() => {
                if on_control(shared, &control.answers, jobs, request) {
                    return Ok(());
                }
            }
            Some(reply) = stdin.requests.recv() => {
                if let Some(line) = content(&reply)["value"].as_str() {
                    shared.control(|controls| controls.answer(line.to_owned()));
                }
            }
            _ = interrupted.recv() => shared.control(Controls::interrupt),
            _ = terminated.recv() => return Ok(()),
            _ = parent_check.tick() => if std::os::unix::process::parent_id() != parent { return Ok(()) },
        }
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
                shared.answer(&request, || kernel_info(&shared.rust));
            });
            return;
        }
        "is_complete_request" => parsed(&request).map(|IsCompleteRequest { code }| json!(syntax::is_complete(&code))),
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
    shared.answer(&request, || answer.unwrap_or_else(|error| refusal(&error)));
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
            shared.control(Controls::interrupt);
            json!({ "status": "ok" })
        }
        "shutdown_request" => {
            is_end = true;
            json!({ "status": "ok", "restart": content(&request)["restart"] == json!(true) })
        }
        "kernel_info_request" => kernel_info(&shared.rust),
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

fn kernel_info(rust: &str) -> Value {
    let version = env!("CARGO_PKG_VERSION");
    json!({
        "status": "ok",
        "protocol_version": "5.3",
        "implementation": "qlora-nb",
        "implementation_version": version,
        "banner": format!("qlora-nb {version}: QLoRA fine-tuning in Rust. First cell: use qlora_nb::prelude::*;"),
        "language_info": {
            "name": "rust",
            "version": rust,
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

/// Completion and inspection, on a thread of their own.
fn assist(shared: &Shared, jobs: &Sender<Job>, request: &JupyterMessage) {
    let names = shared.names();
    let ask = |expression: &str| {
        let (answer, answered) = channel();
        jobs.send(Job::TypeOf(expression.to_owned(), answer)).ok()?;
        // A cell that runs is not waited for: better a poorer answer than a late one.
        answered.recv_timeout(Duration::from_millis(1500)).ok()?
    };
    shared.answer(request, || match parsed(request) {
        Ok(CompleteRequest { code, cursor_pos }) if request.header.msg_type == "complete_request" => {
            shared.assistance.complete(&code, cursor_pos, &names, &ask)
        }
        Ok(CompleteRequest { code, cursor_pos }) => shared.assistance.inspect(&code, cursor_pos, &names, &ask),
        Err(error) => refusal(&error),
    });
}
