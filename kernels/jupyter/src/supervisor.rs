//! Between evcxr and the process that runs the cells.
//!
//! evcxr reads the markers that a cell prints when it panics or returns early with `?`, and tells nobody. So
//! this process takes evcxr's place at the other end of the cells' pipes: it turns what they print into
//! [`Event`]s, one JSON object a line, which evcxr passes on as ordinary output, and hands evcxr only the
//! markers that it acts on. It also keeps the order of text and rich outputs, of which evcxr keeps one a MIME
//! type, and text without a newline at the end, which would run into evcxr's own markers.

use std::hash::BuildHasher;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

use libloading::Library;
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, killpg, sigaction};
use nix::unistd::{Pid, setpgid};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::processes;

/// Set by evcxr for the process that it starts to run cells.
const EVCXR_IS_RUNTIME: &str = "EVCXR_IS_RUNTIME";
/// Set by us for the process that runs them in truth: the line by which it says that a cell has ended. No cell knows it.
const WORKER: &str = "QLORA_NB_WORKER";

const EXECUTION_COMPLETE: &str = "EVCXR_EXECUTION_COMPLETE";
const PANIC: &str = "EVCXR_PANIC_NOTIFICATION";
const USER_ERROR: &str = "EVCXR_ERROR_OCCURRED";
const VARIABLE_CHANGED_TYPE: &str = "EVCXR_VARIABLE_CHANGED_TYPE:";
const INPUT_REQUEST: &str = "EVCXR_INPUT_REQUEST";
const BEGIN_CONTENT: &str = "EVCXR_BEGIN_CONTENT ";
const END_CONTENT: &str = "EVCXR_END_CONTENT";
/// Begins a line in which the library's `display` module asks for what evcxr does not know: a display that can be
/// updated, an update, clearing. JSON follows.
const DISPLAY: &str = "EVCXR_QLORA_NB ";
/// Tells the library that such lines are understood.
const DISPLAY_IS_UNDERSTOOD: &str = "QLORA_NB_DISPLAY";
/// Stands for a colon in a prompt, which evcxr would take for the prompt's end.
pub const COLON: char = '\u{2}';
/// What every marker begins with; a text that may still become a marker is held back.
const MARKER: &str = "EVCXR_";

/// How much of what is printed between two cells is kept.
const LATE_BYTES: usize = 1 << 16;
/// How often it is looked after whether the worker lives.
const DEATH_MS: u16 = 500;

/// Begins a line that carries an [`Event`]; no text can forge it, for text travels inside events.
const EVENT: char = '\u{1}';

/// What a cell did, in the order in which it did it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    Stdout(String),
    Stderr(String),
    /// One representation of a rich output.
    Content {
        mime: String,
        data: String,
    },
    /// What the library shows, in the words of its display protocol.
    Display(Value),
    /// A panic ended the cell; its message was the last thing on stderr.
    Panic,
    /// An `Err` left the cell through `?`; its text was the last thing on stderr.
    UserError,
    /// The process is gone, and all variables with it.
    Died(String),
}

impl Event {
    fn to_line(&self) -> String {
        // evcxr looks for its markers also inside a line.
        format!("{EVENT}{}\n", json!(self)).replace(MARKER, "EVCXR\\u005f")
    }

    /// The event in a line of evcxr's output; None for a line that is none.
    pub fn from_line(line: &str) -> Option<Event> {
        serde_json::from_str(line.strip_prefix(EVENT)?).ok()
    }
}

/// A session makes this file in evcxr's folder once evcxr has started. Before that evcxr runs a line of its own, and
/// waits for somebody to read what it shows, while nobody can.
pub const STARTED: &str = "started";

pub fn is_asked_for() -> bool {
    std::env::var_os(EVCXR_IS_RUNTIME).is_some() && std::env::var_os(WORKER).is_none()
}

/// The line by which a worker, if this process is one, says that a cell has ended.
pub fn is_worker() -> Option<String> {
    std::env::var(WORKER).ok()
}

/// Runs cells, in place of evcxr's own runtime: that takes any line of a cell for the end of it, knows no path with a space,
/// and shows a stack that overflowed as its own backtrace.
pub fn work(done: &str) -> ! {
    // SAFETY: the only thread so far. What a cell starts is no worker, and may not read evcxr's commands.
    unsafe {
        std::env::remove_var(EVCXR_IS_RUNTIME);
        std::env::remove_var(WORKER);
        libc::fcntl(libc::STDIN_FILENO, libc::F_SETFD, libc::FD_CLOEXEC);
    }
    // A request to stop, which the library's long calls honour while they run, and which means nothing to other code. (To
    // ignore it would have the children of cells ignore it, too.)
    on_sigint(nothing);
    let mut store = std::ptr::null_mut();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        // Any other line is the answer to a question that a cell did not wait for.
        let Some((library, name)) = line.strip_prefix("LOAD_AND_RUN ").and_then(|line| line.rsplit_once(' ')) else {
            continue;
        };
        store = load_and_run(library, name, store).unwrap_or_else(|error| {
            eprintln!("qlora-nb: cannot load the compiled cell {library}: {error}");
            std::process::exit(1);
        });
        println!("{done}");
    }
    std::process::exit(0);
}

/// Runs a compiled cell on the store of variables, and returns the store. The library stays for good: variables may need
/// its code.
fn load_and_run(library: &str, name: &str, store: *mut c_void) -> Result<*mut c_void, libloading::Error> {
    // SAFETY: evcxr compiled the library, and names a function of this type.
    unsafe {
        let library = ManuallyDrop::new(Library::new(library)?);
        let cell = library.get::<extern "C" fn(*mut c_void) -> *mut c_void>(name.as_bytes())?;
        Ok(cell(store))
    }
}

extern "C" fn nothing(_: c_int) {}

/// The process that [`forward`] tells of a SIGINT, with what cells have started.
static WORKER_ID: AtomicI32 = AtomicI32::new(0);

extern "C" fn forward(_: c_int) {
    let worker = WORKER_ID.load(SeqCst);
    if worker > 0 {
        // One of the few functions that a signal handler may call.
        let _ = killpg(Pid::from_raw(worker), Signal::SIGINT);
    }
}

fn on_sigint(handler: extern "C" fn(c_int)) {
    // A read that the signal meets goes on instead of failing.
    let action = SigAction::new(SigHandler::Handler(handler), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: both handlers do only what a signal handler may.
    let _ = unsafe { sigaction(Signal::SIGINT, &action) };
}

/// Starts the worker and carries what it prints until it ends.
pub fn run() -> ! {
    // A Ctrl-C in the terminal is for the session, which passes it on as it sees fit; and when the session dies, so do we.
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    let _ = set_pdeathsig(Signal::SIGKILL);
    on_sigint(forward);
    let id = std::collections::hash_map::RandomState::new().hash_one(0);
    let done = format!("{EXECUTION_COMPLETE} {id}");
    let code = match start_worker(&done).and_then(|mut worker| carry(&mut worker, done)) {
        Ok(status) => status.code().unwrap_or(1),
        Err(error) => {
            eprintln!("qlora-nb: the process for the cells: {error}");
            1
        }
    };
    std::process::exit(code);
}

fn start_worker(done: &str) -> std::io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    // A backtrace through generated code tells a notebook's reader nothing; whoever wants one sets it in a cell.
    command.env(WORKER, done).env(DISPLAY_IS_UNDERSTOOD, "1").env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    // evcxr can only kill us.
    processes::end_together(&mut command, Signal::SIGKILL);
    command.spawn()
}

fn carry(worker: &mut Child, done: String) -> std::io::Result<ExitStatus> {
    WORKER_ID.store(worker.id() as i32, SeqCst);
    let (Some(mut out), Some(mut err)) = (worker.stdout.take(), worker.stderr.take()) else {
        return worker.wait();
    };
    let mut commands = worker.stdin.take();
    let started = std::env::var_os("EVCXR_TMPDIR").is_some_and(|folder| Path::new(&folder).join(STARTED).exists());
    let mut relay = Relay { done, mute: !started, ..Default::default() };
    let mut buffer = vec![0; 1 << 16];
    let (mut out_open, mut err_open) = (true, true);
    while out_open || err_open {
        let stdin = std::io::stdin();
        let pipes = [(out_open, out.as_fd()), (err_open, err.as_fd()), (commands.is_some(), stdin.as_fd())];
        let look = if relay.reading.is_possible() { Reading::LOOK_MS } else { DEATH_MS };
        let ready = readable(&pipes.map(|(is_open, pipe)| is_open.then_some(pipe)), look.into())?;
        if ready[2] {
            let n = std::io::stdin().read(&mut buffer)?;
            relay.reading.bytes_came();
            relay.push_late();
            // A worker that died between two cells is noticed by its pipes.
            let is_written = commands.as_mut().is_some_and(|pipe| pipe.write_all(&buffer[..n]).is_ok());
            if n == 0 || !is_written {
                commands = None;
            }
        }
        let mut text = None;
        if ready[0] {
            let n = out.read(&mut buffer)?;
            out_open = n > 0;
            text = Some(buffer[..n].to_vec());
        }
        // Whatever a cell wrote to stderr before a marker on stdout is in the pipe by now; it must precede the marker,
        // for a panic's message is there.
        while err_open && readable(&[Some(err.as_fd())], PollTimeout::ZERO)?[0] {
            let n = err.read(&mut buffer)?;
            err_open = n > 0;
            relay.stderr(&buffer[..n]);
        }
        relay.stdout(&text.unwrap_or_default());
        if !ready.contains(&true) && relay.reading.is_noticed(worker.id()) {
            relay.marker(None, &format!("{INPUT_REQUEST}:"));
        }
        relay.send()?;
        // What the worker started and left behind may keep its pipes open.
        if !ready.contains(&true) && worker.try_wait()?.is_some() {
            break;
        }
    }
    let status = worker.wait()?;
    relay.finish(&death(status));
    relay.send()?;
    Ok(status)
}

/// Notices a cell that reads its stdin as any program would, without the marker that asks for input. It would wait for
/// ever, or read evcxr's next command; so it is asked for in its name.
#[derive(Default)]
struct Reading {
    is_running: bool,
    /// Input is on its way.
    is_asked: bool,
    /// How often in a row it was seen to wait.
    seen: u32,
}

impl Reading {
    const LOOK_MS: u16 = 100;

    fn is_possible(&self) -> bool {
        self.is_running && !self.is_asked
    }

    /// From evcxr: a command to run a cell, or the line that a running one asked for.
    fn bytes_came(&mut self) {
        self.is_running = true;
        self.is_asked = false;
        self.seen = 0;
    }

    /// Whether the worker waits for input, at the second look: a cell that has just begun waits for nothing.
    fn is_noticed(&mut self, worker: u32) -> bool {
        self.seen = if self.is_possible() && reads_stdin(worker) { self.seen + 1 } else { 0 };
        self.seen >= 2
    }
}

/// Whether a thread of the process is in read(0). Where the kernel does not tell, no.
fn reads_stdin(process: u32) -> bool {
    let read = format!("{} 0x0 ", libc::SYS_read);
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let mut calls = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("syscall")).ok());
    calls.any(|call| call.starts_with(&read))
}

/// Which of some pipes has something to read or was closed; None is passed over.
fn readable(pipes: &[Option<BorrowedFd>], timeout: PollTimeout) -> std::io::Result<Vec<bool>> {
    let open = pipes.iter().flatten();
    let mut polled: Vec<PollFd> = open.map(|pipe| PollFd::new(*pipe, PollFlags::POLLIN)).collect();
    while let Err(error) = poll(&mut polled, timeout) {
        if error != Errno::EINTR {
            return Err(error.into());
        }
    }
    let mut ready = polled.iter().map(|pipe| pipe.any() != Some(false));
    Ok(pipes.iter().map(|pipe| pipe.is_some() && ready.next() == Some(true)).collect())
}

fn death(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGABRT), _) => "it aborted (SIGABRT)".into(),
        (Some(libc::SIGSEGV), _) => {
            "it touched memory that is not its own, or the stack of a thread overflowed (SIGSEGV)".into()
        }
        (Some(libc::SIGKILL), _) => "it was killed (SIGKILL; the kernel does so when memory runs out)".into(),
        (Some(signal), _) => format!("signal {signal} ended it"),
        (None, code) => format!("it exited with status {}", code.unwrap_or(-1)),
    }
}

/// Turns bytes into lines for evcxr: events, and the markers that it waits for.
#[derive(Default)]
struct Relay {
    /// The line by which the worker says that a cell has ended.
    done: String,
    /// Bytes of stdout's last line, not sent yet.
    line: Vec<u8>,
    /// A rich output that has begun: its MIME type and the lines so far.
    content: Option<(String, String)>,
    /// Text of stdout, decoded, to be sent as one event.
    text: String,
    /// Bytes of an unfinished character at the end of stderr.
    stderr_rest: Vec<u8>,
    /// Text of stderr, to be sent before the next thing on stdout that is not text.
    errors: String,
    /// Whether events are dropped, up to the end of evcxr's first cell.
    mute: bool,
    reading: Reading,
    /// The end of what was printed since the last cell ended.
    late: String,
    lines: String,
}

impl Relay {
    fn stdout(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                self.stdout_line(line.strip_suffix('\n').unwrap_or(&line));
            }
        }
        if self.content.is_none() {
            let keep = possible_marker(&self.line);
            let rest = self.line.split_off(keep);
            let text = std::mem::replace(&mut self.line, rest);
            self.text.push_str(&decode(text, &mut self.line));
        }
        self.flush_text();
    }

    fn stdout_line(&mut self, line: &str) {
        if let Some((mime, mut data)) = self.content.take() {
            let is_cut = self.ends_in_marker(line).is_some();
            if line == END_CONTENT || is_cut {
                // A failure inside a display cuts the output short; what there is of it is kept.
                data.pop();
                self.event(Event::Content { mime, data });
                if is_cut {
                    self.stdout_line(line);
                }
            } else {
                data.push_str(line);
                data.push('\n');
                self.content = Some((mime, data));
            }
        } else if let Some((before, marker, event)) = self.ends_in_marker(line) {
            self.text.push_str(before);
            self.marker(event, marker);
        } else if let Some((before, mime)) = line.split_once(BEGIN_CONTENT).filter(|(_, mime)| is_mime(mime.trim())) {
            self.text.push_str(before);
            self.flush_text();
            self.content = Some((mime.trim().to_owned(), String::new()));
        } else if let Some((before, operation)) = display(line) {
            self.text.push_str(before);
            self.event(Event::Display(operation));
        } else if let Some(at) = line.find(VARIABLE_CHANGED_TYPE) {
            self.text.push_str(&line[..at]);
            self.marker(None, &line[at..]);
        } else if let Some(at) = line.find(INPUT_REQUEST) {
            self.text.push_str(&line[..at]);
            let (request, prompt) = line[at..].split_once(':').unwrap_or((&line[at..], ""));
            self.marker(None, &format!("{request}:{}", prompt.replace(':', &COLON.to_string())));
        } else {
            self.text.push_str(line);
            self.text.push('\n');
        }
    }

    fn stderr(&mut self, bytes: &[u8]) {
        self.stderr_rest.extend_from_slice(bytes);
        let all = std::mem::take(&mut self.stderr_rest);
        self.errors.push_str(&decode(all, &mut self.stderr_rest));
    }

    fn finish(&mut self, death: &str) {
        let rest = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        self.text.push_str(&rest);
        if let Some((mime, data)) = self.content.take() {
            self.event(Event::Content { mime, data });
        }
        self.event(Event::Died(death.to_owned()));
    }

    fn marker(&mut self, event: Option<Event>, line: &str) {
        self.flush_text();
        if let Some(event) = event {
            self.event(event);
        }
        if line == EXECUTION_COMPLETE {
            self.mute = false;
            self.reading = Reading::default();
        } else if line.starts_with(INPUT_REQUEST) {
            self.reading.is_asked = true;
        }
        self.lines.push_str(line);
        self.lines.push('\n');
    }

    /// What stands before a marker at the end of a line, the marker, and what it means to the cell's reader.
    fn ends_in_marker<'a>(&self, line: &'a str) -> Option<(&'a str, &'static str, Option<Event>)> {
        let panic = (PANIC, PANIC, Some(Event::Panic));
        let error = (USER_ERROR, USER_ERROR, Some(Event::UserError));
        let markers = [(self.done.as_str(), EXECUTION_COMPLETE, None), panic, error];
        markers.into_iter().find_map(|(end, marker, event)| Some((line.strip_suffix(end)?, marker, event)))
    }

    fn event(&mut self, event: Event) {
        self.flush_text();
        self.push(event);
    }

    fn flush_text(&mut self) {
        if !self.text.is_empty() {
            let text = std::mem::take(&mut self.text);
            self.push(Event::Stdout(text));
        }
        if !self.errors.is_empty() {
            let text = std::mem::take(&mut self.errors);
            self.push(Event::Stderr(text));
        }
    }

    fn push(&mut self, event: Event) {
        match event {
            _ if self.mute => {}
            Event::Stdout(text) | Event::Stderr(text) if !self.reading.is_running => {
                self.late.push_str(&text);
                let excess = self.late.len().saturating_sub(LATE_BYTES);
                self.late.drain(..self.late.ceil_char_boundary(excess));
            }
            event => self.lines.push_str(&event.to_line()),
        }
    }

    /// Shows what threads printed when no cell ran, and evcxr did not listen: at the head of the next cell, which did not
    /// print it.
    fn push_late(&mut self) {
        if !self.late.is_empty() {
            let text = std::mem::take(&mut self.late);
            self.push(Event::Stdout(format!("[a thread of an earlier cell, before this one began]\n{text}")));
        }
    }

    fn send(&mut self) -> std::io::Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(std::mem::take(&mut self.lines).as_bytes())?;
        stdout.flush()
    }
}

/// `text/html`, and not what a text says behind the marker's name.
fn is_mime(text: &str) -> bool {
    text.matches('/').count() == 1 && !text.contains(|c: char| c.is_whitespace() || c == '`')
}

/// The operation that a line of the display protocol asks for, and the text before it; None if it is mere text.
fn display(line: &str) -> Option<(&str, Value)> {
    let (before, json) = line.split_once(DISPLAY)?;
    let operation = serde_json::from_str::<Value>(json).ok()?;
    operation["op"].is_string().then_some((before, operation))
}

/// Decodes UTF-8, leaving an unfinished character's bytes in front of `rest`.
fn decode(bytes: Vec<u8>, rest: &mut Vec<u8>) -> String {
    let end = match std::str::from_utf8(&bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    };
    rest.splice(0..0, bytes[end..].iter().copied());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Where a marker begins, or may begin, in an unfinished line.
fn possible_marker(line: &[u8]) -> usize {
    let marker = MARKER.as_bytes();
    let begins = |at: &usize| {
        let tail = &line[*at..];
        tail.starts_with(marker) || marker.starts_with(tail)
    };
    (0..line.len()).find(begins).unwrap_or(line.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What evcxr would be sent for these chunks of stdout: events, and markers as bare strings.
    fn relayed(chunks: &[&str]) -> Vec<Result<Event, String>> {
        let mut relay = running();
        for chunk in chunks {
            relay.stdout(chunk.as_bytes());
        }
        relay.lines.lines().map(|line| Event::from_line(line).ok_or(line.to_owned())).collect()
    }

    const DONE: &str = "EVCXR_EXECUTION_COMPLETE 7";

    fn running() -> Relay {
        let reading = Reading { is_running: true, ..Reading::default() };
        Relay { done: DONE.into(), reading, ..Relay::default() }
    }

    fn text(s: &str) -> Result<Event, String> {
        Ok(Event::Stdout(s.to_owned()))
    }

    fn marker(s: &str) -> Result<Event, String> {
        Err(s.to_owned())
    }

    #[test]
    fn text_without_a_newline_does_not_hide_a_marker() {
        assert_eq!(relayed(&["a\nbEVCXR_EXECUTION_COMPLETE 7\n"]), [text("a\nb"), marker(EXECUTION_COMPLETE)]);
        assert_eq!(relayed(&["bEVCXR_PANIC", "_NOTIFICATION\n"])[1..], [Ok(Event::Panic), marker(PANIC)]);
        assert_eq!(relayed(&["EVCXR_ERROR_OCCURRED\n"]), [Ok(Event::UserError), marker(USER_ERROR)]);
    }

    #[test]
    fn an_unfinished_line_is_sent_at_once() {
        assert_eq!(relayed(&["step 1", "\rstep 2"]), [text("step 1"), text("\rstep 2")]);
        assert_eq!(relayed(&["EV", "ERY\n"]), [text("EVERY\n")]);
    }

    #[test]
    fn a_character_cut_in_two_is_put_together() {
        let mut relay = running();
        let bytes = "诗\n".as_bytes();
        relay.stdout(&bytes[..1]);
        relay.stdout(&bytes[1..]);
        relay.stderr(&bytes[..2]);
        relay.stderr(&bytes[2..]);
        relay.stdout(b"");
        let events: Vec<_> = relay.lines.lines().filter_map(Event::from_line).collect();
        assert_eq!(events, [Event::Stdout("诗\n".into()), Event::Stderr("诗\n".into())]);
    }

    #[test]
    fn every_rich_output_is_kept_in_order() {
        let html = |data: &str| Ok(Event::Content { mime: "text/html".into(), data: data.into() });
        let chunks = ["xEVCXR_BEGIN_CONTENT text/html\n<b>\n", "1</b>\nEVCXR_END_CONTENT\ny\n"];
        let again = ["EVCXR_BEGIN_CONTENT text/html\n2\nEVCXR_END_CONTENT\n"];
        let chunks = [chunks.as_slice(), again.as_slice()].concat();
        assert_eq!(relayed(&chunks), [text("x"), html("<b>\n1</b>"), text("y\n"), html("2")]);
    }

    #[test]
    fn a_message_stands_between_text_and_marker() {
        let mut relay = running();
        relay.stderr(b"panicked");
        relay.stdout(b"shown\nEVCXR_PANIC_NOTIFICATION\n");
        let events: Vec<_> = relay.lines.lines().filter_map(Event::from_line).collect();
        assert_eq!(events, [Event::Stdout("shown\n".into()), Event::Stderr("panicked".into()), Event::Panic]);
    }

    #[test]
    fn the_display_protocol_is_taken_out_of_the_text() {
        let operation = json!({ "op": "update", "id": "1", "data": { "text/plain": "诗" } });
        let chunks = [format!("tail of a line{DISPLAY}{operation}\n"), format!("{DISPLAY}no json\n")];
        let expected = [text("tail of a line"), Ok(Event::Display(operation)), text("EVCXR_QLORA_NB no json\n")];
        assert_eq!(relayed(&chunks.each_ref().map(String::as_str)), expected);
        assert_eq!(relayed(&["EVCXR_INPUT_REQUEST:a: b\n"]), [marker("EVCXR_INPUT_REQUEST:a\u{2} b")]);
    }

    #[test]
    fn what_is_printed_between_two_cells_is_called_so() {
        let mut relay = running();
        relay.stdout(format!("{DONE}\n").as_bytes());
        relay.stdout("诗".repeat(LATE_BYTES).as_bytes());
        relay.stdout(b"tick\n");
        assert_eq!(relay.lines, format!("{EXECUTION_COMPLETE}\n"));
        relay.reading.bytes_came();
        relay.push_late();
        let Some(Event::Stdout(late)) = relay.lines.lines().last().and_then(Event::from_line) else {
            panic!("no text")
        };
        assert!(late.starts_with("[a thread of") && late.ends_with("诗tick\n") && late.len() < LATE_BYTES + 100);
    }

    #[test]
    fn text_cannot_pass_for_an_event() {
        for words in ["EVCXR_EXECUTION_COMPLETE\n", "begin with EVCXR_BEGIN_CONTENT and a / mark\n"] {
            assert_eq!(relayed(&[words]), [text(words)]);
        }
        let html = Ok(Event::Content { mime: "text/html".into(), data: "never ended".into() });
        let cut = format!("EVCXR_BEGIN_CONTENT text/html\nnever ended\n{DONE}\n");
        assert_eq!(relayed(&[&cut]), [html, marker(EXECUTION_COMPLETE)]);
        let forged = Event::Panic.to_line();
        assert_eq!(relayed(&[&forged]), [text(&forged)]);
    }
}
