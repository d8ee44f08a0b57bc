//! One run of cells that share variables: evcxr, told the truth.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use crossbeam_channel::{Receiver, Sender, bounded, never, select, unbounded};
use evcxr::CommandContext;

use crate::api::Api;
use crate::diagnostics;
use crate::keep::{self, Replaced};
use crate::layout::{self, Layout};
use crate::outputs::{self, Client, Forms, Outputs, Update};
use crate::plain::{self, Mark};
use crate::processes;
use crate::scope::Scope;
use crate::supervisor::{self, Event};
use crate::types::{self, Binding, Question};

/// How long evcxr may take to compile its first line.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// How long evcxr may take to notice that its process was killed; it may be waiting for a compiler.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Interrupts that follow each other faster are one: a double click costs nobody the variables.
const DOUBLE_CLICK: Duration = Duration::from_secs(1);
/// When a cell that was asked to stop and goes on is mentioned.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the compilers and the cell are told of an interrupt, until the cell ends.
const REMIND: Duration = Duration::from_millis(30);

pub struct Session {
    requests: Sender<Request>,
    replies: Receiver<Reply>,
    events: Receiver<String>,
    questions: Receiver<(String, bool)>,
    wishes: Receiver<Wish>,
    controls: Controls,
    process: Arc<Mutex<Child>>,
    /// Raised while the running cell is being interrupted.
    stopping: Arc<AtomicBool>,
    names: Arc<Mutex<Names>>,
    /// evcxr's crate and build folder; ours, so that it can be asked where evcxr cannot.
    folder: tempfile::TempDir,
}

/// What may be done to a session while it runs a cell, from any thread.
#[derive(Clone)]
pub struct Controls {
    wishes: Sender<Wish>,
    answers: Sender<String>,
}

enum Wish {
    Stop,
    End,
}

impl Controls {
    /// Asks the running cell to stop: a compiler is killed, a training or a generation returns what it has. A cell
    /// that is asked again, a second later or more, loses its process and all variables.
    pub fn interrupt(&self) {
        let _ = self.wishes.send(Wish::Stop);
    }

    /// Kills the process of the running cell at once.
    pub fn kill(&self) {
        let _ = self.wishes.send(Wish::End);
    }

    /// The line that a cell asked for.
    pub fn answer(&self, line: String) {
        let _ = self.answers.send(line);
    }
}

/// What earlier cells defined.
#[derive(Clone, Default)]
pub struct Names {
    /// Variables and their types.
    pub variables: Vec<(String, String)>,
    pub items: Vec<String>,
}

enum Request {
    Execute(String),
    /// Give the variables back that the last cell, which failed, was about to replace.
    Restore,
    /// The type of an expression.
    TypeOf(String, Sender<Option<String>>),
}

/// What evcxr said of a cell.
pub struct Reply {
    pub result: Result<Forms, Failure>,
    /// The source that was compiled last, in which panics name their lines.
    pub compiled: String,
    /// Variables that were there before the cell and are not any more.
    pub lost: Vec<String>,
    /// The cell with the types of its variables written out.
    pub typed: Option<String>,
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
    Interrupted,
    /// Interrupted with the loss of its process.
    Killed,
    Died,
    Timeout,
}

impl FailureKind {
    pub fn name(self) -> &'static str {
        match self {
            FailureKind::Compile => "CompileError",
            FailureKind::Panic => "Panic",
            FailureKind::Error => "Error",
            FailureKind::Interrupted | FailureKind::Killed => "Interrupted",
            FailureKind::Died => "ProcessDied",
            FailureKind::Timeout => "Timeout",
        }
    }
}

impl Failure {
    pub fn new(kind: FailureKind, message: &str, details: &str) -> Failure {
        Failure { kind, message: message.to_owned(), details: details.to_owned() }
    }
}

/// How a cell ended.
#[derive(Default)]
pub struct Ending {
    pub failure: Option<Failure>,
    /// The cell with the types of its variables written out; None if there is nothing to write.
    pub typed: Option<String>,
    /// Whether somebody asked it to stop; it may have ended well all the same, with what it had.
    pub interrupted: bool,
}

/// How a cell is run.
pub struct Options {
    /// The cell's process is killed after so long.
    pub timeout: Option<Duration>,
    /// How long text on stderr and rich outputs wait for what may follow: see [`Outputs`].
    pub hold: Option<Duration>,
}

impl Session {
    /// Starts evcxr for cells that run in `working_dir`. `api` is the index of the layout's library.
    pub fn start(layout: &Layout, api: Arc<Api>, working_dir: &Path) -> Result<Session> {
        layout.check()?;
        let folder = tempfile::Builder::new().prefix("qlora-nb-").tempdir().context("cannot make a folder in /tmp")?;
        prepare_environment(layout, folder.path())?;
        std::env::set_current_dir(working_dir)
            .with_context(|| format!("cannot work in the notebook's folder {}", working_dir.display()))?;
        let (requests, requested) = bounded::<Request>(0);
        let (reply, replies) = bounded(1);
        let (started, start) = bounded(1);
        let (ask, questions) = unbounded();
        let (answers, answered) = unbounded();
        let (wish, wishes) = unbounded();
        let stopping = Arc::new(AtomicBool::new(false));
        let names = Arc::new(Mutex::new(Names::default()));
        let evcxr = Evcxr {
            folder: folder.path().to_owned(),
            question: Question::new(folder.path()),
            mark: Mark::new(folder.path()),
            replaced: Vec::new(),
            typed: None,
            api,
            must_set_up_process: true,
            stopping: stopping.clone(),
            names: names.clone(),
            ask,
            answered,
        };
        std::thread::spawn(move || evcxr.serve(&started, &requested, &reply));
        let (process, events) = match start.recv_timeout(START_TIMEOUT) {
            Ok(started) => started?,
            Err(_) => bail!("evcxr has not started after {} s", START_TIMEOUT.as_secs()),
        };
        let controls = Controls { wishes: wish, answers };
        Ok(Session { requests, replies, events, questions, wishes, controls, process, stopping, names, folder })
    }

    pub fn controls(&self) -> Controls {
        self.controls.clone()
    }

    /// What the cells so far defined; can be asked while a cell runs.
    pub fn names(&self) -> Arc<Mutex<Names>> {
        self.names.clone()
    }

    /// Forgets interrupts that came while nothing ran.
    pub fn forget_interrupts(&self) {
        while self.wishes.try_recv().is_ok() {}
    }

    /// Runs a cell and shows the client what it does, the failure included.
    pub fn execute(&self, code: &str, options: &Options, client: &mut dyn Client) -> Ending {
        let mut outputs = Outputs::new(client, types::ends_in_expression(code), options.hold);
        let (reply, interrupted) = self.wait_for(Request::Execute(code.to_owned()), options.timeout, &mut outputs);
        self.stopping.store(false, SeqCst);
        let (lost, typed) = (reply.lost.clone(), reply.typed.clone());
        let mut failure = outputs.finish(code, reply);
        if let Some(failure) = &mut failure {
            if interrupted && failure.kind == FailureKind::Error {
                failure.kind = FailureKind::Interrupted;
            }
            if let FailureKind::Panic | FailureKind::Error | FailureKind::Interrupted = failure.kind {
                self.wait_for(
                    Request::Restore,
                    None,
                    &mut Outputs::new(&mut outputs::Recorder::default(), false, None),
                );
                let kept = self.names.lock().map(|names| names.variables.clone()).unwrap_or_default();
                let lost: Vec<_> = lost.into_iter().filter(|name| !kept.iter().any(|(kept, _)| kept == name)).collect();
                if !lost.is_empty() {
                    failure.details += &format!("\nlost, because the cell had consumed it: {}", lost.join(", "));
                }
            }
            client.show(Update::Add(outputs::error(failure)));
        }
        Ending { failure, typed, interrupted }
    }

    /// The type of an expression of the variables that there are; None if it has none, or if evcxr is busy.
    pub fn type_of(&self, expression: &str) -> Option<String> {
        let (answer, answered) = bounded(1);
        self.requests.send_timeout(Request::TypeOf(expression.to_owned(), answer), Duration::ZERO).ok()?;
        answered.recv().ok()?
    }

    /// Has evcxr do something and passes on what cells do meanwhile. Returns also whether it was interrupted.
    fn wait_for(&self, request: Request, timeout: Option<Duration>, outputs: &mut Outputs) -> (Reply, bool) {
        // Giving variables back is not to be interrupted.
        let wishes = if let Request::Execute(_) = request { &self.wishes } else { &never() };
        let gone = || Reply {
            result: Err(Failure::new(FailureKind::Died, "evcxr itself stopped", "evcxr itself stopped")),
            compiled: String::new(),
            lost: Vec::new(),
            typed: None,
        };
        if self.requests.send(request).is_err() {
            return (gone(), false);
        }
        let begin = Instant::now();
        let mut deadline = timeout.map(|timeout| begin + timeout);
        let mut end = None;
        let mut interrupt: Option<Interrupt> = None;
        let reply = loop {
            let remind = interrupt.as_ref().map(|_| Instant::now() + REMIND);
            let next = [deadline, outputs.deadline(), remind].into_iter().flatten().min();
            let tick = next.map_or_else(never, crossbeam_channel::at);
            select! {
                recv(self.events) -> line => match line {
                    Ok(line) => Event::from_line(&line).into_iter().for_each(|event| outputs.event(event)),
                    Err(_) => break gone(),
                },
                recv(self.replies) -> reply => break reply.unwrap_or_else(|_| gone()),
                recv(self.questions) -> question => if let Ok((prompt, is_password)) = question {
                    if interrupt.is_some() {
                        self.controls.answer(String::new());
                    } else if !outputs.ask(&prompt, is_password) {
                        outputs.remark(&format!("nobody can answer {prompt:?} here: the cell gets an empty line\n"));
                        self.controls.answer(String::new());
                    }
                },
                recv(wishes) -> wish => match (wish, &mut interrupt) {
                    (Ok(Wish::End), _) => {
                        end = Some(End::Killed);
                        deadline = Some(Instant::now() + KILL_TIMEOUT);
                        self.kill();
                    }
                    (_, Some(interrupt)) => interrupt.again = true,
                    (_, None) => {
                        self.stopping.store(true, SeqCst);
                        // A cell that waits for a line gets an empty one.
                        self.controls.answer(String::new());
                        interrupt = Some(Interrupt::new());
                    }
                },
                recv(tick) -> _ => {}
            }
            outputs.release_old();
            if let Some(interrupt) = &mut interrupt
                && end.is_none()
                && interrupt.pursue(&self.process, outputs)
            {
                end = Some(End::Killed);
                deadline = Some(Instant::now() + KILL_TIMEOUT);
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                if end.is_some() {
                    break gone();
                }
                end = Some(End::OutOfTime);
                deadline = Some(Instant::now() + KILL_TIMEOUT);
                self.kill();
            }
        };
        while let Ok(line) = self.events.try_recv() {
            Event::from_line(&line).into_iter().for_each(|event| outputs.event(event));
        }
        // An answer to nobody's question would be the answer to the next.
        while self.questions.try_recv().is_ok() {}
        let failure = match (end, &reply.result) {
            (Some(End::OutOfTime), _) => {
                let seconds = timeout.unwrap_or_default().as_secs_f64();
                let message = format!("not finished after {seconds} s, so its process was killed");
                let details = format!("{message}; all variables are gone\nremedy: --timeout SECONDS");
                Failure::new(FailureKind::Timeout, &message, &details)
            }
            (Some(End::Killed), Err(_)) => {
                let message = "interrupted again, so its process was killed";
                Failure::new(FailureKind::Killed, message, &format!("{message}; all variables are gone"))
            }
            (None, Err(failure)) if interrupt.is_some() && failure.kind == FailureKind::Compile => {
                let message = "interrupted while it was compiled";
                Failure::new(FailureKind::Interrupted, message, &format!("{message}: nothing ran, nothing is lost"))
            }
            _ => return (reply, interrupt.is_some()),
        };
        (Reply { result: Err(failure), ..reply }, interrupt.is_some())
    }

    /// Kills the cells' process, and compilers, for which evcxr may be waiting.
    fn kill(&self) {
        if let Ok(mut process) = self.process.lock() {
            processes::kill_compilers(&[process.id() as i32]);
            let _ = process.kill();
        }
    }

    /// Removes what the session left in /tmp. It does not wait for evcxr, which may wait for a compiler.
    pub fn close(self) {
        self.kill();
        let _ = self.folder.close();
    }
}

enum End {
    OutOfTime,
    Killed,
}

/// An interrupt from the moment it comes to the cell's end. The cell may be before, in or behind the call that honours
/// it, so it is repeated: a request that comes a moment too early must not be lost.
struct Interrupt {
    since: Instant,
    again: bool,
    remarked: bool,
}

impl Interrupt {
    fn new() -> Interrupt {
        Interrupt { since: Instant::now(), again: false, remarked: false }
    }

    /// Kills compilers and tells the cell; kills the cell's process, and returns true, if that was asked for.
    fn pursue(&mut self, process: &Mutex<Child>, outputs: &mut Outputs) -> bool {
        // Held by evcxr while it waits for a process that is dead already.
        let Ok(mut process) = process.try_lock() else { return false };
        let id = process.id() as i32;
        if processes::kill_compilers(&[id]) {
            return false;
        }
        if self.again && self.since.elapsed() >= DOUBLE_CLICK {
            let _ = process.kill();
            return true;
        }
        // SAFETY: a signal to our own child, which evcxr has not waited for while we hold the lock.
        unsafe { libc::kill(id, libc::SIGINT) };
        if !self.remarked && self.since.elapsed() >= PATIENCE {
            self.remarked = true;
            outputs.remark(
                "the cell was asked to stop and has not stopped yet; \
                 interrupt again to kill its process, which loses all variables\n",
            );
        }
        false
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
    let path = before(layout::sysroot()?.join("bin"), "PATH")?;
    // cargo locks its home though cells need nothing from it; where that cannot be written, another does as well.
    let home = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let is_writable = |home: PathBuf| tempfile::tempfile_in(home).is_ok();
    let own_home = (!home.is_some_and(is_writable)).then(|| folder.join("cargo"));
    // SAFETY: called before the session's first thread is started.
    unsafe {
        if let Some(home) = own_home {
            std::env::set_var("CARGO_HOME", home);
        }
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

/// What the thread in which evcxr lives works with.
struct Evcxr {
    folder: PathBuf,
    question: Question,
    mark: Mark,
    replaced: Vec<Replaced>,
    typed: Option<String>,
    /// What the library's functions return.
    api: Arc<Api>,
    /// Whether the process for the cells is a new one.
    must_set_up_process: bool,
    stopping: Arc<AtomicBool>,
    names: Arc<Mutex<Names>>,
    ask: Sender<(String, bool)>,
    answered: Receiver<String>,
}

/// Brings text to the reader that a cell printed without a newline, which would stay in Rust's buffer.
/// (It must not begin with a colon, as evcxr's commands do.)
const FLUSH: &str = "let _ = ::std::thread::spawn(|| loop {
    ::std::thread::sleep(::std::time::Duration::from_millis(50));
    let _ = ::std::io::Write::flush(&mut ::std::io::stdout());
});";

impl Evcxr {
    fn serve(mut self, started: &Sender<Started>, requests: &Receiver<Request>, replies: &Sender<Reply>) {
        let (mut context, outputs) = match self.start() {
            Ok(evcxr) => evcxr,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        // Nothing writes to evcxr's own stderr channel, for the supervisor sends all as events.
        let _ = started.send(Ok((context.process_handle(), outputs.stdout)));
        for request in requests {
            let before: Vec<String> = context.variables_and_types().map(|(name, _)| name.to_owned()).collect();
            let result = match request {
                Request::Execute(code) => self.execute(&mut context, &code),
                Request::Restore => {
                    // One that could not be cloned is not there to be restored.
                    let replaced = std::mem::take(&mut self.replaced);
                    self.mark.set(true);
                    replaced.iter().for_each(|variable| drop(context.execute(&variable.restore())));
                    Ok(Forms::new())
                }
                Request::TypeOf(expression, answer) => {
                    let _ = answer.send(self.type_of(&mut context, &expression));
                    continue;
                }
            };
            self.must_set_up_process |= matches!(&result, Err(failure) if failure.kind == FailureKind::Died);
            let now = names(&context);
            let is_lost = |name: &String| !now.variables.iter().any(|(kept, _)| kept == name);
            let lost = before.into_iter().filter(is_lost).collect();
            if let Ok(mut names) = self.names.lock() {
                *names = now;
            }
            let reply =
                Reply { result, compiled: context.last_source().unwrap_or_default(), lost, typed: self.typed.take() };
            if replies.send(reply).is_err() {
                return;
            }
        }
    }

    fn start(&mut self) -> Result<(CommandContext, evcxr::EvalContextOutputs)> {
        let (mut context, outputs) = CommandContext::new().map_err(|e| anyhow::anyhow!("evcxr does not start: {e}"))?;
        std::fs::write(self.folder.join(supervisor::STARTED), "")?;
        let wrapper: PathBuf = std::env::current_exe()?;
        let setup = [
            ":load_config --quiet".to_owned(),
            format!(":build_env RUSTC_WRAPPER={}", wrapper.display()),
            format!(":build_env {}={}", types::ASK_IN, self.folder.display()),
            // evcxr learns from a failed compile that a cell may use `?`: let it learn that once, and here.
            format!("{FLUSH} Ok::<(), String>(())?;"),
            keep::PRELUDE.to_owned(),
            outputs::PRELUDE.to_owned(),
        ];
        self.mark.set(true);
        for command in setup {
            context.execute(&command).map_err(|e| anyhow::anyhow!("evcxr refuses {command:?}: {e}"))?;
        }
        self.must_set_up_process = false;
        Ok((context, outputs))
    }

    /// Compiles and runs one cell. What it shows comes as events; returned are outputs of evcxr's own commands.
    fn execute(&mut self, context: &mut CommandContext, code: &str) -> Result<Forms, Failure> {
        if std::mem::take(&mut self.must_set_up_process) {
            self.mark.set(true);
            context.execute(FLUSH).map_err(|error| diagnostics::failure(&error, FLUSH))?;
        }
        // Answers that came too late belong to nobody.
        while self.answered.try_recv().is_ok() {}
        let bindings = types::bindings(code);
        self.replaced = replaced_by(&bindings, context);
        // Types that the index tells cost nothing; rustc has to be asked for the others, which takes as long as
        // compiling a small cell.
        let (told, is_plain) = self.seen(context, code, &bindings);
        self.mark.set(is_plain);
        let was_told = told.is_some();
        let mut prepared = prepare(context, &self.question, code, &bindings, &self.replaced, told)?;
        let (ask, answered) = (&self.ask, &self.answered);
        let mut callbacks = evcxr::EvalCallbacks {
            input_reader: &|request| {
                let prompt = request.prompt.replace(supervisor::COLON, ":");
                let _ = ask.send((prompt, request.is_password));
                answered.recv().unwrap_or_default()
            },
        };
        let mut result = context.execute_with_callbacks(&prepared.code, &mut callbacks);
        let is_refused = |result: &Result<evcxr::EvalOutputs, evcxr::Error>| {
            matches!(result, Err(evcxr::Error::CompilationErrors(_))) && !self.stopping.load(SeqCst)
        };
        if is_refused(&result) && was_told {
            prepared = prepare(context, &self.question, code, &bindings, &self.replaced, None)?;
            result = context.execute_with_callbacks(&prepared.code, &mut callbacks);
        }
        if is_refused(&result) && prepared.code != code {
            // The cell as it was written makes for better messages. That it could compile after all is no harm.
            result = context.execute_with_callbacks(code, &mut callbacks);
        }
        self.typed = prepared.typed;
        result.map(|outputs| outputs.content_by_mime_type).map_err(|error| diagnostics::failure(&error, code))
    }

    /// What can be told of a cell without compiling it: the types of all its variables, if it does not write them and
    /// the index tells them all; and whether it is [`plain`].
    fn seen(
        &self,
        context: &CommandContext,
        code: &str,
        bindings: &[Binding],
    ) -> (Option<HashMap<String, String>>, bool) {
        let Names { variables, items } = names(context);
        let scope = Scope { api: &self.api, variables: &variables, items: &items, ask: &|_| None };
        let is_plain = plain::is_plain(&scope, code);
        if bindings.iter().all(|variable| variable.is_typed) {
            return (None, is_plain);
        }
        let told = scope.variables_of(code);
        let are_all = bindings.iter().all(|variable| variable.is_typed || told.contains_key(&variable.name));
        (are_all.then_some(told), is_plain)
    }

    /// The type of an expression, as rustc writes it.
    fn type_of(&self, context: &mut CommandContext, expression: &str) -> Option<String> {
        const NAME: &str = "qlora_nb_asked";
        let code = format!("let {NAME} = {expression};");
        let answer = self.question.ask(|| drop(context.check(&code))).ok()??;
        answer.types.get(NAME).cloned()
    }
}

fn names(context: &CommandContext) -> Names {
    let variables = context.variables_and_types().map(|(name, ty)| (name.to_owned(), ty.to_owned()));
    let items = context.defined_item_names();
    let items = items.filter(|name| ![keep::PRELUDE_DEFINES, outputs::PRELUDE_DEFINES].contains(name));
    Names { variables: variables.collect(), items: items.map(str::to_owned).collect() }
}

/// The cell with what it needs to be honest: types, old values kept, and a flush.
fn prepare(
    context: &mut CommandContext,
    question: &Question,
    code: &str,
    bindings: &[Binding],
    replaced: &[Replaced],
    told: Option<HashMap<String, String>>,
) -> Result<Prepared, Failure> {
    let mut prepared = code.to_owned();
    let mut typed = None;
    if let Some(told) = told {
        prepared = types::annotate(code, bindings, &told);
        typed = Some(types::with_types(code, bindings, &told));
    } else if bindings.iter().any(|variable| !variable.is_typed) {
        let answer = question.ask(|| drop(context.check(code)));
        let answer =
            answer.map_err(|e| Failure::new(FailureKind::Compile, "cannot ask rustc for types", &e.to_string()))?;
        // A cell with errors goes to evcxr as it is, which reports them.
        let Some(answer) = answer.filter(|answer| !answer.has_errors) else {
            return Ok(Prepared { code: prepared, typed });
        };
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
        typed = Some(types::with_types(code, bindings, &answer.types));
    }
    let keep: String = replaced.iter().map(Replaced::keep).collect();
    prepared.insert_str(types::rust_begins(code), &keep);
    if !types::ends_in_expression(code) {
        // Text without a newline would otherwise stay in the cell's buffer until a later cell prints one.
        prepared.push_str("\nlet _ = ::std::io::Write::flush(&mut ::std::io::stdout());");
    }
    Ok(Prepared { code: prepared, typed })
}

struct Prepared {
    /// For evcxr.
    code: String,
    /// For people.
    typed: Option<String>,
}

fn replaced_by(bindings: &[Binding], context: &CommandContext) -> Vec<Replaced> {
    let known = context.variables_and_types();
    let replaced = known.filter(|(name, _)| bindings.iter().any(|variable| variable.name == *name));
    replaced.map(|(name, ty)| Replaced { name: name.to_owned(), ty: ty.to_owned() }).collect()
}
