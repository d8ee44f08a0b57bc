//! Runs cells for the Jupyter kernel, one after the other, on a thread of its own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use jupyter_protocol::messaging::JupyterMessage;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use crate::assistance::Assistance;
use crate::diagnostics::{Failure, FailureKind};
use crate::layout::Layout;
use crate::messages::{Channel, message, parsed, refusal, reply_to};
use crate::outputs::{self, Client, Output, Recorder, Update, error};
use crate::scope::Names;
use crate::session::{Controls, Ending, Session};
use crate::{highlight, history::History};

/// How long a client that asks whether we are ready waits for the session at most.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// What the threads share.
pub struct Shared {
    pub iopub: UnboundedSender<JupyterMessage>,
    pub shell: UnboundedSender<JupyterMessage>,
    pub stdin: UnboundedSender<JupyterMessage>,
    pub history: Mutex<History>,
    /// Those of the session, once there is one.
    pub session: Mutex<Option<(Controls, Arc<Mutex<Names>>)>>,
    pub assistance: Assistance,
    /// The release of the rustc that builds the cells.
    pub rust: String,
    /// Whether the session has started, or has failed to.
    started: Mutex<bool>,
    on_start: Condvar,
}

impl Shared {
    pub fn new(iopub: UnboundedSender<JupyterMessage>, shell: &Channel, stdin: &Channel, layout: &Layout) -> Shared {
        Shared {
            iopub,
            shell: shell.answers.clone(),
            stdin: stdin.answers.clone(),
            history: Mutex::default(),
            session: Mutex::default(),
            assistance: Assistance::new(layout),
            rust: layout.release(),
            started: Mutex::new(false),
            on_start: Condvar::new(),
        }
    }

    /// Does something to the session, if there is one.
    pub fn control(&self, act: impl FnOnce(&Controls)) {
        if let Some((controls, _)) = &*lock(&self.session) {
            act(controls);
        }
    }

    /// What earlier cells defined.
    pub fn names(&self) -> Names {
        lock(&self.session).as_ref().map(|(_, names)| lock(names).clone()).unwrap_or_default()
    }

    pub fn wait_until_started(&self) {
        let started = lock(&self.started);
        let _ = self.on_start.wait_timeout_while(started, START_PATIENCE, |started| !*started);
    }

    pub fn has_started(&self) {
        *lock(&self.started) = true;
        self.on_start.notify_all();
    }

    pub fn publish(&self, msg_type: &str, content: Value, parent: &JupyterMessage) {
        let mut message = message(msg_type, content, Some(parent));
        message.zmq_identities = vec![msg_type.as_bytes().to_vec().into()];
        let _ = self.iopub.send(message);
    }

    pub fn status(&self, state: &str, parent: &JupyterMessage) {
        self.publish("status", json!({ "execution_state": state }), parent);
    }

    /// Works out an answer and sends it, busy meanwhile.
    pub fn answer(&self, request: &JupyterMessage, content: impl FnOnce() -> Value) {
        self.status("busy", request);
        self.reply(request, content());
        self.status("idle", request);
    }

    pub fn reply(&self, request: &JupyterMessage, content: Value) {
        let _ = self.shell.send(reply_to(request, content));
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Cells, as clients send them.
#[derive(Deserialize)]
pub struct ExecuteRequest {
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

impl ExecuteRequest {
    /// Whether the cell gets a number of its own and a place in the history.
    fn is_kept(&self) -> bool {
        self.store_history && !self.silent
    }
}

fn yes() -> bool {
    true
}

/// What the executor's thread does next.
pub enum Job {
    Execute(Box<JupyterMessage>),
    TypeOf(String, Sender<Option<String>>),
    Stop,
}

/// Runs cells, one after the other.
pub struct Executor {
    shared: Arc<Shared>,
    layout: Layout,
    session: Option<Session>,
    count: i32,
    waiting: VecDeque<Job>,
}

impl Executor {
    pub fn new(shared: Arc<Shared>, layout: Layout) -> Executor {
        Executor { shared, layout, session: None, count: 0, waiting: VecDeque::new() }
    }

    pub fn run(mut self, queue: &Receiver<Job>) {
        // The first cell will find the session ready, or else say why it is not.
        let _ = self.start();
        self.shared.has_started();
        while let Some(job) = self.waiting.pop_front().or_else(|| queue.recv().ok()) {
            match job {
                Job::Stop => break,
                Job::TypeOf(expression, answer) => {
                    let ty = self.session.as_ref().and_then(|session| session.type_of(&expression));
                    let _ = answer.send(ty);
                }
                Job::Execute(request) => match parsed(&request) {
                    Ok(asked) => self.execute(&request, &asked, queue),
                    Err(error) => self.shared.answer(&request, || refusal(&error)),
                },
            }
        }
        if let Some(session) = self.session.take() {
            session.close();
        }
    }

    fn start(&mut self) -> Result<()> {
        let folder = std::env::current_dir().context("the notebook's folder is gone")?;
        let session = Session::start(&self.layout, self.shared.assistance.api.clone(), &folder)?;
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
        if asked.is_kept() {
            self.count += 1;
        }
        if !asked.silent {
            let content = json!({ "code": asked.code, "execution_count": self.count });
            self.shared.publish("execute_input", content, request);
        }
        let ending = self.run_cell(request, asked);
        let mut content = match &ending.failure {
            None => json!({ "status": "ok", "payload": [], "user_expressions": self.user_expressions(asked) }),
            Some(failure) => {
                let (name, details) = (failure.kind.name(), &failure.details);
                json!({ "status": "error", "ename": name, "evalue": failure.message, "user_expressions": {},
                        "traceback": highlight::traceback(name, details) })
            }
        };
        content["execution_count"] = json!(self.count);
        // Whoever learns of the failure and then sends a cell means it: so this is what was sent before.
        let aborted = match asked.stop_on_error && (ending.failure.is_some() || ending.interrupted) {
            true => self.waiting_cells(queue),
            false => Vec::new(),
        };
        self.shared.reply(request, content);
        self.shared.status("idle", request);
        for request in aborted {
            self.shared.answer(&request, || json!({ "status": "aborted" }));
        }
    }

    fn run_cell(&mut self, request: &JupyterMessage, asked: &ExecuteRequest) -> Ending {
        let shared = self.shared.clone();
        let mut client = Frontend { shared: &shared, request, asked, count: self.count, result: String::new() };
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
        let ending = session.execute(&asked.code, None, &mut client);
        if asked.is_kept() {
            lock(&self.shared.history).add(self.count, &asked.code, &client.result);
        }
        ending
    }

    fn user_expressions(&self, asked: &ExecuteRequest) -> Value {
        let mut values = serde_json::Map::new();
        for (name, expression) in asked.user_expressions.iter().flatten() {
            let Some(session) = &self.session else { continue };
            let mut recorder = Recorder::default();
            let ending = session.execute(expression, None, &mut recorder);
            let value = match ending.failure {
                Some(failure) => json!({ "status": "error", "ename": failure.kind.name(), "evalue": failure.message,
                                         "traceback": [failure.details] }),
                None => {
                    let shown = recorder.outputs.iter().rev().find_map(|output| match output {
                        Output::Display { data, .. } => Some(outputs::bundle(data, outputs::in_one_piece)),
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

/// The reader of one cell, at the other end of the sockets.
struct Frontend<'a> {
    shared: &'a Shared,
    request: &'a JupyterMessage,
    asked: &'a ExecuteRequest,
    count: i32,
    /// The text of the cell's value, for the history.
    result: String,
}

impl Client for Frontend<'_> {
    fn show(&mut self, update: Update) {
        if self.asked.silent {
            return;
        }
        let (msg_type, content) = match update {
            Update::Add(output) => {
                let (kind, mut content) = output.to_json(self.count, outputs::in_one_piece);
                match output {
                    Output::Display { data, is_result: true, .. } => {
                        let plain = data.into_iter().find(|(mime, _)| mime == "text/plain");
                        self.result = plain.map_or(String::new(), |(_, text)| text);
                    }
                    Output::Display { id: Some(id), .. } => content["transient"] = json!({ "display_id": id }),
                    Output::Error { name, traceback, .. } => {
                        content["traceback"] = json!(highlight::traceback(&name, &traceback.join("\n")));
                    }
                    _ => {}
                }
                (kind, content)
            }
            Update::Replace { id, data, metadata } => {
                let data = outputs::bundle(&data, outputs::in_one_piece);
                let transient = json!({ "display_id": id });
                ("update_display_data", json!({ "data": data, "metadata": metadata, "transient": transient }))
            }
            Update::Clear { wait } => ("clear_output", json!({ "wait": wait })),
        };
        self.shared.publish(msg_type, content, self.request);
    }

    fn ask(&mut self, prompt: &str, is_password: bool) -> bool {
        if self.asked.allow_stdin {
            let content = json!({ "prompt": prompt, "password": is_password });
            let _ = self.shared.stdin.send(message("input_request", content, Some(self.request)));
        }
        self.asked.allow_stdin
    }
}
