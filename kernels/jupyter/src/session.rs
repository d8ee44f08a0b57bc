//! One run of cells that share variables: evcxr, told the truth.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use crossbeam_channel::{Receiver, Sender, bounded, select};
use evcxr::CommandContext;

use crate::diagnostics;
use crate::install::{self, Layout};
use crate::keep::{self, Replaced};
use crate::notebook::Output;
use crate::supervisor::{self, Event};
use crate::types::{self, Binding, Question};

const PLAIN: &str = "text/plain";
/// How long evcxr may take to compile its first line.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// How long evcxr may take to notice that its process was killed; it may be waiting for a compiler.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

pub struct Session {
    requests: Sender<Request>,
    replies: Receiver<Reply>,
    events: Receiver<String>,
    process: Arc<Mutex<Child>>,
    /// evcxr's crate and build folder; ours, so that it can be asked where evcxr cannot.
    folder: tempfile::TempDir,
}

enum Request {
    Execute(String),
    /// Give the variables back that the last cell, which failed, was about to replace.
    Restore,
}

/// What evcxr said of a cell.
struct Reply {
    result: Result<HashMap<String, String>, Failure>,
    /// The source that was compiled last, in which panics name their lines.
    compiled: String,
}

/// Why a cell failed.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    pub kind: FailureKind,
    /// In one line.
    pub message: String,
    /// In full, for people.
    pub details: String,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FailureKind {
    Compile,
    Panic,
    Error,
    Died,
    Timeout,
}

impl FailureKind {
    pub fn name(self) -> &'static str {
        match self {
            FailureKind::Compile => "CompileError",
            FailureKind::Panic => "Panic",
            FailureKind::Error => "Error",
            FailureKind::Died => "ProcessDied",
            FailureKind::Timeout => "Timeout",
        }
    }
}

pub struct CellResult {
    /// In order; a failure is the last of them.
    pub outputs: Vec<Output>,
    pub failure: Option<Failure>,
}

impl Session {
    /// Starts evcxr for cells that run in `working_dir`.
    pub fn start(layout: &Layout, working_dir: &Path) -> Result<Session> {
        layout.check()?;
        let folder = tempfile::Builder::new().prefix("qlora-nb-").tempdir().context("cannot make a folder in /tmp")?;
        prepare_environment(layout, folder.path())?;
        std::env::set_current_dir(working_dir)
            .with_context(|| format!("cannot work in the notebook's folder {}", working_dir.display()))?;
        let (requests, requested) = bounded::<Request>(0);
        let (reply, replies) = bounded(1);
        let (started, start) = bounded(1);
        let path = folder.path().to_owned();
        std::thread::spawn(move || serve(&path, &started, &requested, &reply));
        let (process, events) = match start.recv_timeout(START_TIMEOUT) {
            Ok(started) => started?,
            Err(_) => bail!("evcxr has not started after {} s", START_TIMEOUT.as_secs()),
        };
        Ok(Session { requests, replies, events, process, folder })
    }

    pub fn execute(&self, code: &str, timeout: Duration) -> CellResult {
        let mut events = Vec::new();
        let reply = self.wait_for(Request::Execute(code.to_owned()), timeout, &mut events);
        let is_result = types::ends_in_expression(code);
        let result = CellOutputs { is_result, ..Default::default() }.finish(code, &events, reply);
        if let Some(Failure { kind: FailureKind::Panic | FailureKind::Error, .. }) = result.failure {
            self.wait_for(Request::Restore, timeout, &mut Vec::new());
        }
        result
    }

    /// Has evcxr do something and collects what cells do meanwhile.
    fn wait_for(&self, request: Request, timeout: Duration, events: &mut Vec<Event>) -> Reply {
        let gone = || Reply {
            result: Err(Failure::new(FailureKind::Died, "evcxr itself stopped", "evcxr itself stopped")),
            compiled: String::new(),
        };
        if self.requests.send(request).is_err() {
            return gone();
        }
        let mut deadline = Instant::now() + timeout;
        let mut out_of_time = false;
        let reply = loop {
            select! {
                recv(self.events) -> line => match line {
                    Ok(line) => events.extend(Event::from_line(&line)),
                    Err(_) => break gone(),
                },
                recv(self.replies) -> reply => break reply.unwrap_or_else(|_| gone()),
                default(deadline.saturating_duration_since(Instant::now())) => {
                    if out_of_time {
                        break gone();
                    }
                    out_of_time = true;
                    deadline = Instant::now() + KILL_TIMEOUT;
                    if let Ok(mut process) = self.process.lock() {
                        let _ = process.kill();
                    }
                }
            }
        };
        while let Ok(line) = self.events.try_recv() {
            events.extend(Event::from_line(&line));
        }
        if out_of_time {
            let message = format!("not finished after {} s, so its process was killed", timeout.as_secs_f64());
            let details = format!("{message}; all variables are gone\nremedy: --timeout SECONDS");
            return Reply { result: Err(Failure::new(FailureKind::Timeout, &message, &details)), ..reply };
        }
        reply
    }

    /// Removes what the session left in /tmp. It does not wait for evcxr, which may wait for a compiler.
    pub fn close(self) {
        if let Ok(mut process) = self.process.lock() {
            let _ = process.kill();
        }
        let _ = self.folder.close();
    }
}

/// evcxr and the cells learn all this from the environment.
fn prepare_environment(layout: &Layout, folder: &Path) -> Result<()> {
    // rust-analyzer, inside evcxr, needs no standard library here, for rustc infers the types. Left alone it would
    // read all of its sources, and download them where they are missing.
    let no_std = folder.join("no-std");
    std::fs::create_dir_all(no_std.join("core"))?;
    let before = |first: PathBuf, name: &str| {
        let rest = std::env::var_os(name);
        std::env::join_paths([first].into_iter().chain(rest.iter().flat_map(std::env::split_paths)))
    };
    let libraries = before(layout.prefix.join("lib"), "LD_LIBRARY_PATH")?;
    // Past rustup's proxies, which cost more time than compiling a small cell.
    let path = before(install::sysroot()?.join("bin"), "PATH")?;
    // SAFETY: called before the session's first thread is started.
    unsafe {
        std::env::set_var("EVCXR_TMPDIR", folder);
        std::env::set_var("EVCXR_CONFIG_DIR", layout.evcxr_config());
        std::env::set_var("RUST_SRC_PATH", no_std);
        std::env::set_var("LD_LIBRARY_PATH", libraries);
        std::env::set_var("PATH", path);
        // Cells are no part of the build that may have started us.
        for name in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_INCREMENTAL"] {
            std::env::remove_var(name);
        }
    }
    Ok(())
}

type Started = Result<(Arc<Mutex<Child>>, Receiver<String>)>;

/// The thread in which evcxr lives.
fn serve(folder: &Path, started: &Sender<Started>, requests: &Receiver<Request>, replies: &Sender<Reply>) {
    let (mut context, outputs) = match start_evcxr(folder) {
        Ok(evcxr) => evcxr,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    // Nothing writes to evcxr's own stderr channel, for the supervisor sends all as events.
    let _ = started.send(Ok((context.process_handle(), outputs.stdout)));
    let question = Question::new(folder);
    let mut replaced = Vec::new();
    for request in requests {
        let result = match request {
            Request::Execute(code) => execute(&mut context, &question, &code, &mut replaced),
            Request::Restore => {
                // One that could not be cloned is not there to be restored.
                replaced.drain(..).for_each(|variable: Replaced| drop(context.execute(&variable.restore())));
                Ok(HashMap::new())
            }
        };
        let reply = Reply { result, compiled: context.last_source().unwrap_or_default() };
        if replies.send(reply).is_err() {
            return;
        }
    }
}

fn start_evcxr(folder: &Path) -> Result<(CommandContext, evcxr::EvalContextOutputs)> {
    let (mut context, outputs) = CommandContext::new().map_err(|e| anyhow::anyhow!("evcxr does not start: {e}"))?;
    std::fs::write(folder.join(supervisor::STARTED), "")?;
    let wrapper: PathBuf = std::env::current_exe()?;
    let setup = [
        ":load_config --quiet".to_owned(),
        format!(":build_env RUSTC_WRAPPER={}", wrapper.display()),
        format!(":build_env {}={}", types::ASK_IN, folder.display()),
        // evcxr learns from a failed compile that a cell may use `?`: let it learn that once, and here.
        "Ok::<(), String>(())?;".to_owned(),
        keep::PRELUDE.to_owned(),
    ];
    for command in setup {
        context.execute(&command).map_err(|e| anyhow::anyhow!("evcxr refuses {command:?}: {e}"))?;
    }
    Ok((context, outputs))
}

/// Compiles and runs one cell. What it shows comes as events; returned are outputs of evcxr's own commands.
fn execute(
    context: &mut CommandContext,
    question: &Question,
    code: &str,
    replaced: &mut Vec<Replaced>,
) -> Result<HashMap<String, String>, Failure> {
    let bindings = types::bindings(code);
    *replaced = replaced_by(&bindings, context);
    let prepared = prepare(context, question, code, &bindings, replaced)?;
    let result = match context.execute(&prepared) {
        // The cell as it was written makes for better messages. That it could compile after all is no harm.
        Err(evcxr::Error::CompilationErrors(_)) => context.execute(code),
        result => result,
    };
    result.map(|outputs| outputs.content_by_mime_type).map_err(|error| diagnostics::failure(&error, code))
}

/// The cell with what it needs to be honest: types, old values kept, and a flush.
fn prepare(
    context: &mut CommandContext,
    question: &Question,
    code: &str,
    bindings: &[Binding],
    replaced: &[Replaced],
) -> Result<String, Failure> {
    let mut prepared = code.to_owned();
    if bindings.iter().any(|variable| !variable.is_typed) {
        let answer = question.ask(|| drop(context.check(code)));
        let answer =
            answer.map_err(|e| Failure::new(FailureKind::Compile, "cannot ask rustc for types", &e.to_string()))?;
        // A cell with errors goes to evcxr as it is, which reports them.
        let Some(answer) = answer.filter(|answer| !answer.has_errors) else { return Ok(prepared) };
        let unnamed = bindings.iter().find_map(|variable| {
            let ty = answer.types.get(&variable.name)?;
            Some((&variable.name, types::for_people(ty), types::unnameable(ty)?))
        });
        if let Some((name, ty, reason)) = unnamed {
            let message = format!("the variable `{name}` cannot be kept for later cells: its type is `{ty}`");
            let details = format!(
                "{message}\n{reason}\nor wrap the lines that need `{name}` in {{ }}, so that it ends with them"
            );
            return Err(Failure::new(FailureKind::Compile, &message, &details));
        }
        prepared = types::annotate(code, bindings, &answer.types);
    }
    let keep: String = replaced.iter().map(Replaced::keep).collect();
    prepared.insert_str(types::rust_begins(code), &keep);
    if !types::ends_in_expression(code) {
        // Text without a newline would otherwise stay in the cell's buffer until a later cell prints one.
        prepared.push_str("\nlet _ = ::std::io::Write::flush(&mut ::std::io::stdout());");
    }
    Ok(prepared)
}

fn replaced_by(bindings: &[Binding], context: &CommandContext) -> Vec<Replaced> {
    let known = context.variables_and_types();
    let replaced = known.filter(|(name, _)| bindings.iter().any(|variable| variable.name == *name));
    replaced.map(|(name, ty)| Replaced { name: name.to_owned(), ty: ty.to_owned() }).collect()
}

/// Turns events into a cell's outputs.
#[derive(Default)]
struct CellOutputs {
    is_result: bool,
    outputs: Vec<Output>,
    /// What the cell last wrote to stderr, without anything on stdout in between: where a failure's message is.
    last_stderr: String,
    stdout_since: bool,
    death: Option<String>,
    failed: Option<FailureKind>,
}

impl CellOutputs {
    fn finish(mut self, code: &str, events: &[Event], reply: Reply) -> CellResult {
        for event in events {
            self.event(event);
        }
        for (mime, data) in reply.result.as_ref().ok().into_iter().flatten() {
            self.content(mime, data);
        }
        self.mark_result();
        let failure = match (self.failed, reply.result) {
            (Some(kind), _) => Some(self.take_message(kind, code, &reply.compiled)),
            (None, Err(mut failure)) => {
                if let (FailureKind::Died, Some(how)) = (failure.kind, &self.death) {
                    failure.message = format!("the process that runs the cells died: {how}");
                    failure.details = format!("{}\nall variables are gone", failure.message);
                }
                Some(failure)
            }
            (None, Ok(_)) => None,
        };
        if let Some(failure) = &failure {
            self.outputs.push(Output::Error {
                name: failure.kind.name().to_owned(),
                message: failure.message.clone(),
                traceback: failure.details.lines().map(str::to_owned).collect(),
            });
        }
        for output in &mut self.outputs {
            if let Output::Stream { text, .. } = output {
                *text = as_a_terminal_shows(text);
            }
        }
        CellResult { outputs: self.outputs, failure }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Stdout(text) => {
                self.stdout_since = true;
                self.stream("stdout", text);
            }
            Event::Stderr(text) => {
                if std::mem::take(&mut self.stdout_since) {
                    self.last_stderr.clear();
                }
                self.last_stderr.push_str(text);
                self.stream("stderr", text);
            }
            Event::Content { mime, data } => self.content(mime, data),
            Event::Panic => self.failed = Some(FailureKind::Panic),
            Event::UserError => self.failed = Some(FailureKind::Error),
            Event::Died(how) => self.death = Some(how.clone()),
        }
    }

    fn stream(&mut self, name: &'static str, more: &str) {
        match self.outputs.last_mut() {
            Some(Output::Stream { name: last, text }) if *last == name => text.push_str(more),
            _ => self.outputs.push(Output::Stream { name, text: more.to_owned() }),
        }
    }

    /// Representations that follow each other are of one thing, until a MIME type comes again, or up to the plain text
    /// if that stands last. (evcxr's protocol does not say where a thing ends.)
    fn content(&mut self, mime: &str, data: &str) {
        // The value of a statement without a semicolon, such as a loop.
        if mime == PLAIN && data == "()" {
            return;
        }
        let representation = (mime.to_owned(), data.to_owned());
        let goes_with = |data: &[(String, String)]| {
            let closed = data.len() > 1 && data.last().is_some_and(|(last, _)| last == PLAIN);
            !closed && data.iter().all(|(earlier, _)| earlier != mime)
        };
        match self.outputs.last_mut() {
            Some(Output::Display { data, .. }) if goes_with(data) => data.push(representation),
            _ => self.outputs.push(Output::Display { data: vec![representation], is_result: false }),
        }
    }

    fn mark_result(&mut self) {
        if let Some(Output::Display { is_result, .. }) = self.outputs.last_mut() {
            *is_result = self.is_result && self.failed.is_none();
        }
    }

    /// Moves a failure's message from stderr, where the cell left it, to the failure.
    fn take_message(&mut self, kind: FailureKind, code: &str, compiled: &str) -> Failure {
        let at = match kind {
            FailureKind::Panic => self.last_stderr.rfind("\nthread '").unwrap_or(0),
            _ => 0,
        };
        let said = self.last_stderr.split_off(at);
        let is_stderr = |output: &Output| matches!(output, Output::Stream { name: "stderr", .. });
        if let Some(i) = self.outputs.iter().rposition(is_stderr)
            && let Output::Stream { text, .. } = &mut self.outputs[i]
        {
            text.truncate(text.len().saturating_sub(said.len()));
            if text.is_empty() {
                self.outputs.remove(i);
            }
        }
        match kind {
            FailureKind::Panic => diagnostics::panic(&said, code, compiled),
            _ => {
                let said = said.trim();
                Failure::new(kind, said.lines().next().unwrap_or("an Err left the cell through `?`"), said)
            }
        }
    }
}

impl Failure {
    pub fn new(kind: FailureKind, message: &str, details: &str) -> Failure {
        Failure { kind, message: message.to_owned(), details: details.to_owned() }
    }
}

/// A carriage return takes the line back, as for progress bars; what was overwritten is not kept.
fn as_a_terminal_shows(text: &str) -> String {
    let mut shown = String::new();
    for line in text.split_inclusive('\n') {
        let (line, newline) = line.strip_suffix('\n').map_or((line, ""), |line| (line, "\n"));
        let line = line.trim_end_matches('\r');
        shown.push_str(line.rsplit('\r').next().unwrap_or(line));
        shown.push_str(newline);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(events: &[Event], result: Result<HashMap<String, String>, Failure>) -> CellResult {
        let reply = Reply { result, compiled: "one\nassert!(x == 2);\n".into() };
        CellOutputs { is_result: true, ..Default::default() }.finish("let x = 1;\nassert!(x == 2);", events, reply)
    }

    fn content(mime: &str, data: &str) -> Event {
        Event::Content { mime: mime.into(), data: data.into() }
    }

    fn display(representations: &[(&str, &str)], is_result: bool) -> Output {
        let data = representations.iter().map(|(mime, data)| (mime.to_string(), data.to_string())).collect();
        Output::Display { data, is_result }
    }

    #[test]
    fn keeps_the_order_and_groups_representations() {
        let events = [
            Event::Stdout("a".into()),
            Event::Stdout("b\n".into()),
            content("text/html", "1"),
            content("text/plain", "1"),
            content("image/svg+xml", "2"),
            content("text/plain", "2"),
            content("text/plain", "3"),
            content("text/html", "3"),
            content("text/html", "4"),
            Event::Stderr("warned\n".into()),
            content("text/plain", "()"),
            content("text/plain", "5"),
        ];
        let expected = [
            Output::Stream { name: "stdout", text: "ab\n".into() },
            display(&[("text/html", "1"), ("text/plain", "1")], false),
            display(&[("image/svg+xml", "2"), ("text/plain", "2")], false),
            display(&[("text/plain", "3"), ("text/html", "3")], false),
            display(&[("text/html", "4")], false),
            Output::Stream { name: "stderr", text: "warned\n".into() },
            display(&[("text/plain", "5")], true),
        ];
        let result = outputs(&events, Ok(HashMap::new()));
        assert_eq!(result.outputs, expected);
        assert_eq!(result.failure, None);
    }

    #[test]
    fn a_panic_is_a_failure_though_evcxr_says_ok() {
        let message = "\nthread 'main' (7) panicked at src/lib.rs:2:1:\nassertion failed: x == 2\nnote: run with X\n";
        let events = [Event::Stderr("warned\n".into()), Event::Stderr(message.into()), Event::Panic];
        let result = outputs(&events, Ok(HashMap::new()));
        let failure = result.failure.expect("a failure");
        assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Panic, "assertion failed: x == 2"));
        assert_eq!(failure.details, "panicked at line 2: assert!(x == 2);\nassertion failed: x == 2");
        assert_eq!(result.outputs[0], Output::Stream { name: "stderr", text: "warned\n".into() });
        assert_eq!(result.outputs.len(), 2);
    }

    #[test]
    fn an_error_through_a_question_mark_is_a_failure_though_evcxr_says_ok() {
        let events = [Event::Stdout("x\n".into()), Event::Stderr("no such file\nremedy\n".into()), Event::UserError];
        let failure = outputs(&events, Ok(HashMap::new())).failure.expect("a failure");
        assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Error, "no such file"));
        assert_eq!(failure.details, "no such file\nremedy");
    }

    #[test]
    fn a_death_says_how() {
        let died = Failure::new(FailureKind::Died, "terminated", "terminated");
        let failure = outputs(&[Event::Died("it aborted".into())], Err(died)).failure.expect("a failure");
        assert_eq!(failure.message, "the process that runs the cells died: it aborted");
    }

    #[test]
    fn a_progress_bar_leaves_its_last_state() {
        assert_eq!(as_a_terminal_shows("a\rbc\r\nd\n1/2\r2/2"), "bc\nd\n2/2");
    }
}
