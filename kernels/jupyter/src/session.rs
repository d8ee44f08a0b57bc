//! One run of cells that share variables: evcxr, told the truth.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, Sender, bounded, never, select, unbounded};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::api::Api;
use crate::diagnostics::{Failure, FailureKind};
use crate::engine::{self, Handle, Request, prepare_environment};
use crate::layout::Layout;
use crate::outputs::{self, Client, Forms, Outputs, Recorder, Reply, Update};
use crate::scope::Names;
use crate::{processes, syntax};

/// How long evcxr may take to notice that its process was killed; it may be waiting for a compiler.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Interrupts that follow each other faster are one: a double click costs nobody the variables.
const DOUBLE_CLICK: Duration = Duration::from_secs(1);
/// When a cell that was asked to stop and goes on is mentioned.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the compilers and the cell are told of an interrupt, until the cell ends.
const REMIND: Duration = Duration::from_millis(30);
/// How the names of sessions' folders begin.
const PREFIX: &str = "qlora-nb-session-";

pub struct Session {
    engine: Handle,
    wishes: Receiver<Wish>,
    controls: Controls,
    /// evcxr's crate and build folder; ours, so that it can be asked where evcxr cannot.
    folder: tempfile::TempDir,
    _claim: File,
}

/// A folder for evcxr, and the lock on it that goes with its process. Those that killed processes left behind have no lock
/// any more, and are removed; not new ones, which may be about to get theirs.
fn folder(place: &Path) -> io::Result<(tempfile::TempDir, File)> {
    let is_left = |path: &Path| -> io::Result<bool> {
        let age = fs::metadata(path)?.modified()?.elapsed().unwrap_or_default();
        Ok(age > Duration::from_secs(60) && File::open(path)?.try_lock().is_ok())
    };
    for entry in fs::read_dir(place)?.flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        // Other users' cannot be opened, or not removed.
        if is_ours && is_left(&entry.path()).unwrap_or(false) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    // What cells are made of and print is their user's alone.
    let mode = fs::Permissions::from_mode(0o700);
    let folder = tempfile::Builder::new().prefix(PREFIX).permissions(mode).tempdir_in(place)?;
    let claim = File::open(folder.path())?;
    claim.try_lock()?;
    Ok((folder, claim))
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

    /// Has Ctrl-C ask the running cell to stop, instead of ending this process.
    pub fn interrupt_on_ctrl_c(self) -> Result<()> {
        processes::on_signal(Signal::SIGINT, move || self.interrupt()).context("cannot listen for Ctrl-C")
    }

    /// The line that a cell asked for.
    pub fn answer(&self, line: String) {
        let _ = self.answers.send(line);
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

impl Session {
    /// Starts evcxr for cells that run in `working_dir`. `api` is the index of the layout's library.
    pub fn start(layout: &Layout, api: Arc<Api>, working_dir: &Path) -> Result<Session> {
        let toolchain = layout.check()?;
        let (folder, claim) = folder(&std::env::temp_dir()).context("cannot make a folder in /tmp")?;
        prepare_environment(layout, &toolchain, folder.path())?;
        std::env::set_current_dir(working_dir)
            .with_context(|| format!("cannot work in the notebook's folder {}", working_dir.display()))?;
        let engine = engine::start(folder.path(), api)?;
        let (wish, wishes) = unbounded();
        let controls = Controls { wishes: wish, answers: engine.answers.clone() };
        Ok(Session { engine, wishes, controls, folder, _claim: claim })
    }

    pub fn controls(&self) -> Controls {
        self.controls.clone()
    }

    /// What the cells so far defined; can be asked while a cell runs.
    pub fn names(&self) -> Arc<Mutex<Names>> {
        self.engine.names.clone()
    }

    /// Forgets interrupts that came while nothing ran.
    pub fn forget_interrupts(&self) {
        self.wishes.try_iter().for_each(drop);
    }

    /// Runs a cell and shows the client what it does, the failure included. The cell's process is killed after the
    /// timeout.
    pub fn execute(&self, code: &str, timeout: Option<Duration>, client: &mut dyn Client) -> Ending {
        // A mark that some editors put before a text.
        let code = code.trim_start_matches('\u{feff}');
        if syntax::is_too_deep(code) {
            let message = "the cell nests too deep".to_owned();
            let details = format!("{message}\nremedy: give parts of it names, by `let`");
            let failure = Failure { kind: FailureKind::Compile, message, details };
            client.show(Update::Add(outputs::error(&failure)));
            return Ending { failure: Some(failure), ..Ending::default() };
        }
        let mut outputs = Outputs::new(client, syntax::ends_in_expression(code));
        if syntax::has_changing_static(code) {
            outputs.hint("a static begins anew in each cell: keep what changes in a variable\n");
        }
        let (reply, interrupted) = self.wait_for(Request::Execute(code.to_owned()), timeout, &mut outputs);
        self.engine.stopping.store(false, SeqCst);
        let mut failure = outputs.finish(code, &reply);
        if let Some(failure) = &mut failure {
            if interrupted && failure.kind == FailureKind::Error {
                failure.kind = FailureKind::Interrupted;
            }
            if let FailureKind::Panic | FailureKind::Error | FailureKind::Interrupted = failure.kind {
                let lost = self.restore(reply.lost);
                if !lost.is_empty() {
                    failure.details += &format!("\nlost, because the cell had consumed it: {}", lost.join(", "));
                }
            }
            client.show(Update::Add(outputs::error(failure)));
        }
        Ending { failure, typed: reply.typed, interrupted }
    }

    /// Gives back the variables that a failed cell was about to replace. Of those that it `lost`, returns the ones that
    /// stay lost.
    fn restore(&self, mut lost: Vec<String>) -> Vec<String> {
        self.wait_for(Request::Restore, None, &mut Outputs::new(&mut Recorder::default(), false));
        if let Ok(names) = self.engine.names.lock() {
            lost.retain(|name| !names.has_variable(name));
        }
        lost
    }

    /// The type of an expression of the variables that there are; None if it has none, or if evcxr is busy.
    pub fn type_of(&self, expression: &str) -> Option<String> {
        let (answer, answered) = bounded(1);
        self.engine.requests.send_timeout(Request::TypeOf(expression.to_owned(), answer), Duration::ZERO).ok()?;
        answered.recv().ok()?
    }

    /// Has evcxr do something and passes on what cells do meanwhile. Returns also whether it was interrupted.
    fn wait_for(&self, request: Request, timeout: Option<Duration>, outputs: &mut Outputs) -> (Reply, bool) {
        // Giving variables back is not to be interrupted.
        let wishes = if let Request::Execute(_) = request { &self.wishes } else { &never() };
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut wait = Wait { session: self, outputs, deadline, interrupt: None, end: None };
        let reply = self.engine.requests.send(request).ok().and_then(|()| wait.until_reply(wishes));
        let mut reply = reply.unwrap_or_else(|| Reply {
            result: Err(Failure::new(FailureKind::Died, "evcxr itself stopped", "evcxr itself stopped")),
            compiled: String::new(),
            lost: Vec::new(),
            typed: None,
        });
        self.engine.events.try_iter().for_each(|line| wait.outputs.line(&line));
        // An answer to nobody's question would be the answer to the next.
        self.engine.questions.try_iter().for_each(drop);
        reply.result = wait.judge(reply.result, timeout);
        (reply, wait.interrupt.is_some())
    }

    /// Kills the cells' process, what cells have started, and compilers, for which evcxr may be waiting.
    fn kill(&self) {
        processes::kill_descendants(&[]);
    }

    /// Removes what the session left in /tmp. It does not wait for evcxr, which may wait for a compiler.
    pub fn close(self) {
        self.kill();
        let _ = self.folder.close();
    }
}

/// Why the cells' process was killed.
enum End {
    OutOfTime,
    Killed,
}

/// A request, while evcxr works on it.
struct Wait<'a, 'b> {
    session: &'a Session,
    outputs: &'a mut Outputs<'b>,
    /// When the cell is killed; once it was, when evcxr is given up.
    deadline: Option<Instant>,
    interrupt: Option<Interrupt>,
    end: Option<End>,
}

impl Wait<'_, '_> {
    /// Sees to all that happens until evcxr replies; None if it does not.
    fn until_reply(&mut self, wishes: &Receiver<Wish>) -> Option<Reply> {
        let session = self.session;
        loop {
            let remind = self.interrupt.as_ref().map(|_| Instant::now() + REMIND);
            let next = [self.deadline, self.outputs.deadline(), remind].into_iter().flatten().min();
            let tick = next.map_or_else(never, crossbeam_channel::at);
            select! {
                recv(session.engine.events) -> line => self.outputs.line(&line.ok()?),
                recv(session.engine.replies) -> reply => return reply.ok(),
                recv(session.engine.questions) -> question => if let Ok((prompt, is_password)) = question {
                    self.on_question(&prompt, is_password);
                },
                recv(wishes) -> wish => if let Ok(wish) = wish {
                    self.on_wish(wish);
                },
                recv(tick) -> _ => {}
            }
            self.outputs.release_old();
            if let Some(interrupt) = &mut self.interrupt
                && self.end.is_none()
                && interrupt.pursue(&session.engine.process, self.outputs)
            {
                self.kill(End::Killed);
            }
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                if self.end.is_some() {
                    return None;
                }
                self.kill(End::OutOfTime);
            }
        }
    }

    /// The cell reads a line of input.
    fn on_question(&mut self, prompt: &str, is_password: bool) {
        if self.interrupt.is_some() {
            self.session.controls.answer(String::new());
        } else if !self.outputs.ask(prompt, is_password) {
            self.outputs.remark(&format!("nobody can answer {prompt:?} here: the cell gets an empty line\n"));
            self.session.controls.answer(String::new());
        }
    }

    fn on_wish(&mut self, wish: Wish) {
        match (wish, &mut self.interrupt) {
            (Wish::End, _) => self.kill(End::Killed),
            (Wish::Stop, Some(interrupt)) => interrupt.again = true,
            (Wish::Stop, None) => {
                self.session.engine.stopping.store(true, SeqCst);
                // A cell that waits for a line gets an empty one.
                self.session.controls.answer(String::new());
                self.interrupt = Some(Interrupt::new());
            }
        }
    }

    fn kill(&mut self, end: End) {
        self.end = Some(end);
        self.deadline = Some(Instant::now() + KILL_TIMEOUT);
        self.session.kill();
    }

    /// What came of the cell, where it was interrupted or killed: evcxr only knows that it failed.
    fn judge(&self, result: Result<Forms, Failure>, timeout: Option<Duration>) -> Result<Forms, Failure> {
        let (kind, message, details) = match (&self.end, &result) {
            (Some(End::OutOfTime), _) => {
                let message = format!(
                    "not finished after {} s, so its process was killed",
                    timeout.unwrap_or_default().as_secs_f64()
                );
                (FailureKind::Timeout, message, "; all variables are gone\nremedy: --timeout SECONDS")
            }
            (Some(End::Killed), Err(_)) => {
                let message = "interrupted again, so its process was killed".to_owned();
                (FailureKind::Killed, message, "; all variables are gone")
            }
            (None, Err(failure)) if self.interrupt.is_some() && failure.kind == FailureKind::Compile => {
                let message = "interrupted while it was compiled".to_owned();
                (FailureKind::Interrupted, message, ": nothing ran, nothing is lost")
            }
            _ => return result,
        };
        Err(Failure::new(kind, &message, &format!("{message}{details}")))
    }
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

    /// Kills compilers and tells the cell. Returns whether the cell's process is to be killed: it was asked again.
    fn pursue(&mut self, process: &Mutex<Child>, outputs: &mut Outputs) -> bool {
        // Held by evcxr while it waits for a process that is dead already.
        let Ok(process) = process.try_lock() else { return false };
        let id = process.id() as i32;
        if processes::kill_descendants(&[id]) {
            return false;
        }
        if self.again && self.since.elapsed() >= DOUBLE_CLICK {
            return true;
        }
        // Our own child, which evcxr has not waited for while we hold the lock.
        let _ = kill(Pid::from_raw(id), Signal::SIGINT);
        if !self.remarked && self.since.elapsed() >= PATIENCE {
            self.remarked = true;
            outputs.hint(
                "the cell was asked to stop and has not stopped yet; \
                 interrupt again to kill its process, which loses all variables\n",
            );
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn what_a_killed_session_left_is_removed() {
        let place = tempfile::tempdir().expect("a folder");
        let make = |name: &str, age: u64| {
            let path = place.path().join(name);
            fs::create_dir_all(path.join("inside")).expect("made");
            let file = File::open(&path).expect("opened");
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("dated");
            file
        };
        let of_others = "another-program";
        drop((make("qlora-nb-session-left", 100), make("qlora-nb-session-new", 0), make(of_others, 100)));
        let alive = make("qlora-nb-session-alive", 100);
        alive.try_lock().expect("locked");
        let (own, _claim) = super::folder(place.path()).expect("a folder of its own");
        let mut names: Vec<_> =
            fs::read_dir(place.path()).expect("read").map(|entry| entry.expect("read").file_name()).collect();
        names.sort();
        let own = own.path().file_name().expect("a name").to_owned();
        names.retain(|name| *name != own);
        assert_eq!(names, [of_others, "qlora-nb-session-alive", "qlora-nb-session-new"]);
    }
}
