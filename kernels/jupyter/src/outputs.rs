//! From the [`Event`]s of a cell to what its reader sees, while the cell runs.
//!
//! A [`Client`] (the Jupyter protocol, a terminal, a notebook file) is shown [`Update`]s. Two kinds of events are held
//! back for a moment, until it is known what they are: text on stderr, which may be the message of a panic that comes
//! next, and a rich output, which may be the value of the cell's last expression.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::diagnostics::{self, Failure, FailureKind};
use crate::supervisor::Event;

const PLAIN: &str = "text/plain";
/// How long text on stderr waits for a panic that may follow, and a rich output for the end of the cell, where somebody
/// watches.
const HOLD: Duration = Duration::from_millis(40);

/// Stands on stderr before the text of an error that leaves a cell through `?`, to part it from what the cell itself wrote
/// there before. No text has it: Unicode keeps it for such uses.
const ERROR_BEGINS: char = '\u{fdd0}';

/// Has evcxr write [`ERROR_BEGINS`]. Its code for `?` is `eprintln!("{}", error)`, and what a crate defines itself goes
/// before the standard library's. A cell that writes such a line writes the mark, too: it is taken out again.
pub const PRELUDE: &str = r#"#[allow(unused_macros)]
macro_rules! eprintln {
    ("{}", $error:ident) => { ::std::eprintln!("\u{fdd0}{}", $error) };
    ($($anything:tt)*) => { ::std::eprintln!($($anything)*) };
}"#;
/// What [`PRELUDE`] defines.
pub const PRELUDE_DEFINES: &str = "eprintln";

/// One output of a cell, as notebooks store it.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    Stream {
        name: &'static str,
        text: String,
    },
    /// Representations of one thing, by MIME type; `is_result` if it is the value of the last expression.
    Display {
        data: Vec<(String, String)>,
        is_result: bool,
        /// The name by which a later update finds it.
        id: Option<String>,
        metadata: Value,
    },
    Error {
        name: String,
        message: String,
        traceback: Vec<String>,
    },
}

impl Output {
    /// Whether nothing is left of it: text that streamed and then became the cell's value.
    pub fn is_blank(&self) -> bool {
        matches!(self, Output::Display { data, is_result: false, .. } if data.iter().all(|(_, data)| data.is_empty()))
    }

    /// Its name and its fields, which notebooks and messages share but for the form of text.
    pub fn to_json(&self, count: impl Into<Value>, text: Form) -> (&'static str, Value) {
        match self {
            Output::Stream { name, text: shown } => ("stream", json!({ "name": name, "text": text(shown) })),
            Output::Display { data, is_result: true, metadata, .. } => {
                let data = bundle(data, text);
                ("execute_result", json!({ "execution_count": count.into(), "data": data, "metadata": metadata }))
            }
            Output::Display { data, metadata, .. } => {
                ("display_data", json!({ "data": bundle(data, text), "metadata": metadata }))
            }
            Output::Error { name, message, traceback } => {
                ("error", json!({ "ename": name, "evalue": message, "traceback": traceback }))
            }
        }
    }
}

/// How text is written: in one piece in messages, as a list of lines in notebooks.
pub type Form = fn(&str) -> Value;

pub fn in_one_piece(text: &str) -> Value {
    json!(text)
}

/// Representations as a MIME bundle. JSON types hold JSON; images other than SVG hold base64 in one string; all else is
/// text.
pub fn bundle(data: &[(String, String)], text: Form) -> Value {
    let one = |(mime, data): &(String, String)| {
        let is_json = mime == "application/json" || mime.ends_with("+json");
        let json = is_json.then(|| serde_json::from_str(data).unwrap_or_else(|_| json!(data)));
        let is_text = mime.starts_with("text/") || mime == "image/svg+xml" || mime == "application/javascript";
        (mime.clone(), json.unwrap_or_else(|| if is_text { text(data) } else { json!(data) }))
    };
    Value::Object(data.iter().map(one).collect())
}

/// What changes on a reader's screen.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Something new, below what is there. Text of one stream may come in many pieces.
    Add(Output),
    /// A display has new representations, wherever it is.
    Replace { id: String, data: Vec<(String, String)>, metadata: Value },
    /// The cell's outputs go; with `wait`, when the next one comes.
    Clear { wait: bool },
}

/// Who watches a cell.
pub trait Client {
    fn show(&mut self, update: Update);
    /// How long something is held back until it is known what it is; None: as long as it takes.
    fn patience(&self) -> Option<Duration> {
        Some(HOLD)
    }
    /// Asks for a line of text, which [`crate::session::Controls::answer`] brings; false if there is nobody to ask.
    fn ask(&mut self, prompt: &str, is_password: bool) -> bool;
}

/// Collects a cell's outputs as they are once the cell has ended.
#[derive(Default)]
pub struct Recorder {
    pub outputs: Vec<Output>,
    /// Updates of displays that an earlier cell showed.
    pub of_earlier_cells: Vec<Update>,
    clear_next: bool,
}

impl Recorder {
    /// Goes on with a cell that was recorded before.
    pub fn of(outputs: Vec<Output>) -> Recorder {
        Recorder { outputs, ..Recorder::default() }
    }
}

impl Client for Recorder {
    fn show(&mut self, update: Update) {
        match update {
            Update::Clear { wait } => {
                self.clear_next = wait;
                if !wait {
                    self.outputs.clear();
                }
            }
            Update::Add(output) => {
                if std::mem::take(&mut self.clear_next) {
                    self.outputs.clear();
                }
                match (output, self.outputs.last_mut()) {
                    (Output::Stream { name, text }, Some(Output::Stream { name: last, text: before }))
                        if *last == name =>
                    {
                        *before = as_a_terminal_shows(&(std::mem::take(before) + &text));
                    }
                    (Output::Stream { name, text }, _) => {
                        self.outputs.push(Output::Stream { name, text: as_a_terminal_shows(&text) });
                    }
                    (output, _) => self.outputs.push(output),
                }
            }
            Update::Replace { ref id, ref data, ref metadata } => {
                let mut found = false;
                for output in &mut self.outputs {
                    if let Output::Display { id: Some(own), data: old, metadata: old_metadata, .. } = output
                        && own == id
                    {
                        old.clone_from(data);
                        old_metadata.clone_from(metadata);
                        found = true;
                    }
                }
                if !found {
                    self.of_earlier_cells.push(update);
                }
            }
        }
    }

    fn patience(&self) -> Option<Duration> {
        None
    }

    fn ask(&mut self, _: &str, _: bool) -> bool {
        false
    }
}

/// A carriage return takes the line back, as for progress bars; what was overwritten is not kept. A return at the very
/// end stays, for more may come.
fn as_a_terminal_shows(text: &str) -> String {
    let shown = text.split_inclusive('\n').map(|line| {
        let body = line.trim_end_matches(['\r', '\n']);
        let end = if line.ends_with('\n') { "\n" } else { &line[body.len()..] };
        format!("{}{end}", body.rsplit('\r').next().unwrap_or(body))
    });
    shown.collect()
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

/// Outputs of evcxr's own commands, by MIME type.
pub type Forms = HashMap<String, String>;

/// Turns the events of one cell into updates.
pub struct Outputs<'a> {
    client: &'a mut dyn Client,
    is_result: bool,
    held: Option<Held>,
    death: Option<String>,
    failed: Option<FailureKind>,
    /// What was shown of stderr last, with nothing else since: on a busy machine a message may come so long before its
    /// marker that it was not held back.
    last_stderr: String,
    /// The message of a panic or an error, taken from stderr.
    said: String,
}

struct Held {
    what: What,
    since: Instant,
}

enum What {
    Stderr(String),
    Content(Vec<(String, String)>),
}

impl<'a> Outputs<'a> {
    /// `is_result`: whether the cell ends in an expression.
    pub fn new(client: &'a mut dyn Client, is_result: bool) -> Outputs<'a> {
        Outputs {
            client,
            is_result,
            held: None,
            death: None,
            failed: None,
            last_stderr: String::new(),
            said: String::new(),
        }
    }

    /// When [`Outputs::release_old`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        Some(self.held.as_ref()?.since + self.client.patience()?)
    }

    /// Shows what has been held back long enough.
    pub fn release_old(&mut self) {
        if self.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            self.release();
        }
    }

    pub fn ask(&mut self, prompt: &str, is_password: bool) -> bool {
        self.release();
        self.client.ask(prompt, is_password)
    }

    /// A remark of the session itself.
    pub fn remark(&mut self, text: &str) {
        self.release();
        self.stream("stderr", text.to_owned());
    }

    /// A remark for whoever watches, which no notebook keeps.
    pub fn hint(&mut self, text: &str) {
        if self.client.patience().is_some() {
            self.remark(text);
        }
    }

    /// Takes a line of what evcxr passes on.
    pub fn line(&mut self, line: &str) {
        Event::from_line(line).into_iter().for_each(|event| self.event(event));
    }

    pub fn event(&mut self, event: Event) {
        match event {
            Event::Stderr(text) => match &mut self.held {
                Some(Held { what: What::Stderr(before), .. }) => before.push_str(&text),
                _ => self.hold(What::Stderr(text)),
            },
            Event::Content { mime, data } => self.content(mime, data),
            Event::Stdout(text) => {
                // Text without a newline, from before a failure, comes with its marker: behind its message.
                if !self.held_text().is_some_and(tells_of_a_failure) {
                    self.release();
                }
                self.stream("stdout", text);
            }
            Event::Display(operation) => {
                self.release();
                self.operation(&operation);
            }
            Event::Panic => self.fail(FailureKind::Panic),
            Event::UserError => self.fail(FailureKind::Error),
            Event::Died(how) => {
                self.release();
                self.death = Some(how);
            }
        }
    }

    /// Shows the rest, and the failure if there is one.
    pub fn finish(mut self, code: &str, reply: &Reply) -> Option<Failure> {
        if let Ok(more) = &reply.result {
            let mut more: Vec<_> = more.iter().collect();
            more.sort();
            more.into_iter().for_each(|(mime, data)| self.content(mime.clone(), data.clone()));
        }
        // evcxr tells of a process that died between two cells in the process's own last words.
        let last_words = reply.result.as_ref().err().filter(|failure| failure.kind == FailureKind::Died);
        last_words.iter().flat_map(|failure| failure.details.lines()).for_each(|line| self.line(line));
        self.release_last(self.is_result && self.failed.is_none() && reply.result.is_ok());
        match (self.failed, &reply.result) {
            (Some(FailureKind::Panic), _) => Some(diagnostics::panic(&self.said, code, &reply.compiled)),
            (Some(kind), _) => {
                let said = self.said.trim();
                Some(Failure::new(kind, said.lines().next().unwrap_or("an Err left the cell through `?`"), said))
            }
            (None, Err(failure)) => {
                let mut failure = failure.clone();
                if failure.kind == FailureKind::Died {
                    let how = self.death.as_deref().unwrap_or("it cannot say why");
                    failure.message = format!("the process that runs the cells died: {how}");
                    failure.details = format!("{}\nall variables are gone", failure.message);
                }
                Some(failure)
            }
            (None, Ok(_)) => None,
        }
    }

    fn held_text(&self) -> Option<&str> {
        match &self.held.as_ref()?.what {
            What::Stderr(text) => Some(text),
            What::Content(_) => None,
        }
    }

    fn stream(&mut self, name: &'static str, mut text: String) {
        if name == "stderr" {
            self.last_stderr.clone_from(&text);
            text.retain(|c| c != ERROR_BEGINS);
        } else if !text.is_empty() && !tells_of_a_failure(&self.last_stderr) {
            self.last_stderr.clear();
        }
        if !text.is_empty() {
            self.client.show(Update::Add(Output::Stream { name, text }));
        }
    }

    fn hold(&mut self, what: What) {
        self.release();
        self.held = Some(Held { what, since: Instant::now() });
    }

    fn release(&mut self) {
        self.release_last(false);
    }

    fn release_last(&mut self, is_result: bool) {
        match self.held.take().map(|held| held.what) {
            Some(What::Stderr(text)) => self.stream("stderr", text),
            Some(What::Content(data)) => {
                self.client.show(Update::Add(Output::Display { data, is_result, id: None, metadata: json!({}) }));
            }
            None => {}
        }
    }

    /// A marker on stdout: what stood last on stderr, where the cell left it, is the failure's message.
    fn fail(&mut self, kind: FailureKind) {
        self.failed = Some(kind);
        let begin = |text: &str| match kind {
            FailureKind::Panic => text.rfind("\nthread '").unwrap_or(0),
            _ => text.rfind(ERROR_BEGINS).unwrap_or(0),
        };
        match self.held.take().map(|held| held.what) {
            Some(What::Stderr(mut text)) => {
                self.said = text.split_off(begin(&text));
                self.stream("stderr", text);
            }
            Some(what) => {
                self.hold(what);
                self.release();
            }
            None => {
                let mut text = std::mem::take(&mut self.last_stderr);
                self.said = text.split_off(begin(&text));
            }
        }
        self.said.retain(|c| c != ERROR_BEGINS);
    }

    /// Representations that follow each other are of one thing, until a MIME type comes again, or up to the plain text
    /// if that stands last. (evcxr's protocol does not say where a thing ends.)
    fn content(&mut self, mime: String, data: String) {
        // The value of a statement without a semicolon, such as a loop.
        if mime == PLAIN && data == "()" {
            return;
        }
        let goes_with = |data: &[(String, String)]| {
            let closed = data.len() > 1 && data.last().is_some_and(|(last, _)| last == PLAIN);
            !closed && data.iter().all(|(earlier, _)| *earlier != mime)
        };
        match &mut self.held {
            Some(Held { what: What::Content(held), .. }) if goes_with(held) => held.push((mime, data)),
            _ => self.hold(What::Content(vec![(mime, data)])),
        }
    }

    fn operation(&mut self, operation: &Value) {
        let data = || -> Vec<(String, String)> {
            let forms = operation["data"].as_object().into_iter().flatten();
            forms.filter_map(|(mime, data)| Some((mime.clone(), data.as_str()?.to_owned()))).collect()
        };
        let metadata = if operation["metadata"].is_object() { operation["metadata"].clone() } else { json!({}) };
        let id = operation["id"].as_str().map(str::to_owned);
        match (operation["op"].as_str(), id) {
            (Some("display"), id) => {
                let output = Output::Display { data: data(), is_result: false, id, metadata };
                self.client.show(Update::Add(output));
            }
            (Some("update"), Some(id)) => self.client.show(Update::Replace { id, data: data(), metadata }),
            (Some("clear"), _) => self.client.show(Update::Clear { wait: operation["wait"] == json!(true) }),
            // A newer library than this kernel.
            _ => self.stream("stderr", format!("qlora-nb: a display that this kernel does not know: {operation}\n")),
        }
    }
}

/// Whether a text on stderr contains what Rust says of a panic, or the text of an error.
fn tells_of_a_failure(text: &str) -> bool {
    text.contains(ERROR_BEGINS) || text.find("\nthread '").is_some_and(|at| text[at..].contains(" panicked at "))
}

/// A cell's failure as an output.
pub fn error(failure: &Failure) -> Output {
    Output::Error {
        name: failure.kind.name().to_owned(),
        message: failure.message.clone(),
        traceback: failure.details.lines().map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(events: &[Event], result: Result<Forms, Failure>) -> (Vec<Output>, Option<Failure>) {
        let mut recorder = Recorder::default();
        let mut outputs = Outputs::new(&mut recorder, true);
        events.iter().for_each(|event| outputs.event(event.clone()));
        let reply = Reply { result, compiled: "one\nassert!(x == 2);\n".into(), lost: Vec::new(), typed: None };
        let failure = outputs.finish("let x = 1;\nassert!(x == 2);", &reply);
        (recorder.outputs, failure)
    }

    fn content(mime: &str, data: &str) -> Event {
        Event::Content { mime: mime.into(), data: data.into() }
    }

    fn forms(forms: &[(&str, &str)]) -> Vec<(String, String)> {
        forms.iter().map(|(mime, data)| (mime.to_string(), data.to_string())).collect()
    }

    fn display(representations: &[(&str, &str)], is_result: bool) -> Output {
        Output::Display { data: forms(representations), is_result, id: None, metadata: json!({}) }
    }

    fn stderr(text: &str) -> Output {
        Output::Stream { name: "stderr", text: text.into() }
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
            stderr("warned\n"),
            display(&[("text/plain", "5")], true),
        ];
        assert_eq!(outputs(&events, Ok(Forms::new())), (expected.into(), None));
    }

    #[test]
    fn a_panic_is_a_failure_though_evcxr_says_ok() {
        let message = "\nthread 'main' (7) panicked at src/lib.rs:2:1:\nassertion failed: x == 2\nnote: run with X\n";
        let events = [Event::Stderr("warned\n".into()), Event::Stderr(message.into()), Event::Panic];
        let (outputs, failure) = outputs(&events, Ok(Forms::new()));
        let failure = failure.expect("a failure");
        assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Panic, "assertion failed: x == 2"));
        assert_eq!(failure.details, "panicked at line 2: assert!(x == 2);\nassertion failed: x == 2");
        assert_eq!(outputs, [stderr("warned\n")]);
    }

    #[test]
    fn a_panic_after_text_without_a_newline_keeps_its_message() {
        let message = "\nthread 'main' (7) panicked at src/lib.rs:2:1:\non purpose\n";
        let events = [Event::Stderr(message.into()), Event::Stdout("unfinished".into()), Event::Panic];
        let (outputs, failure) = outputs(&events, Ok(Forms::new()));
        assert_eq!(failure.expect("a failure").message, "on purpose");
        assert_eq!(outputs, [Output::Stream { name: "stdout", text: "unfinished".into() }]);
    }

    #[test]
    fn an_error_through_a_question_mark_is_a_failure_though_evcxr_says_ok() {
        let events = [Event::Stdout("x\n".into()), Event::Stderr("no such file\nremedy\n".into()), Event::UserError];
        let (_, failure) = outputs(&events, Ok(Forms::new()));
        let failure = failure.expect("a failure");
        assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Error, "no such file"));
        assert_eq!(failure.details, "no such file\nremedy");
    }

    #[test]
    fn what_a_cell_wrote_before_its_error_is_no_part_of_the_error() {
        let failing = |events: &[Event]| {
            let (outputs, failure) = outputs(events, Ok(Forms::new()));
            (outputs, failure.map(|failure| (failure.message, failure.details)))
        };
        let error = || Some(("no such file".to_owned(), "no such file\nremedy".to_owned()));
        let text = "note: slow\n\u{fdd0}Value(1)\n\u{fdd0}no such file\nremedy\n";
        let expected = (vec![stderr("note: slow\nValue(1)\n")], error());
        assert_eq!(failing(&[Event::Stderr(text.into()), Event::UserError]), expected);
        let stdout = Output::Stream { name: "stdout", text: "unfinished".into() };
        let events = [Event::Stderr("\u{fdd0}no such file\nremedy\n".into()), Event::Stdout("unfinished".into())];
        assert_eq!(failing(&[events.as_slice(), &[Event::UserError]].concat()), (vec![stdout], error()));
    }

    #[test]
    fn a_death_says_how() {
        let died = Failure::new(FailureKind::Died, "terminated", "terminated");
        let (_, failure) = outputs(&[Event::Died("it aborted".into())], Err(died));
        assert_eq!(failure.expect("a failure").message, "the process that runs the cells died: it aborted");
    }

    #[test]
    fn a_progress_bar_leaves_its_last_state() {
        assert_eq!(as_a_terminal_shows("a\rbc\r\nd\n1/2\r2/2"), "bc\nd\n2/2");
        let pieces = ["1 of 2\r", "2 of 2", "\r", "done\n"].map(|text| Event::Stdout(text.into()));
        let expected = Output::Stream { name: "stdout", text: "done\n".into() };
        assert_eq!(outputs(&pieces, Ok(Forms::new())).0, [expected]);
    }

    #[test]
    fn a_display_is_updated_where_it_stands_and_cleared_when_the_next_comes() {
        let op = |op: &str, text: &str| {
            Event::Display(json!({ "op": op, "id": "bar", "data": { PLAIN: text }, "metadata": { "a": 1 } }))
        };
        let bar = |text: &str| Output::Display {
            data: forms(&[(PLAIN, text)]),
            is_result: false,
            id: Some("bar".into()),
            metadata: json!({ "a": 1 }),
        };
        let stdout = |text: &str| Event::Stdout(text.into());
        let shown = |events: &[Event]| outputs(events, Ok(Forms::new())).0;
        let text = Output::Stream { name: "stdout", text: "x\n".into() };
        assert_eq!(shown(&[op("display", "1"), stdout("x\n"), op("update", "2")]), [bar("2"), text.clone()]);
        let clear = |wait: bool| Event::Display(json!({ "op": "clear", "wait": wait }));
        assert_eq!(shown(&[op("display", "1"), clear(true)]), [bar("1")]);
        assert_eq!(shown(&[op("display", "1"), clear(true), stdout("x\n")]), [text]);
        assert_eq!(shown(&[op("display", "1"), clear(false)]), []);
    }

    /// A client who does not wait.
    struct Hasty(Recorder);

    impl Client for Hasty {
        fn show(&mut self, update: Update) {
            self.0.show(update);
        }

        fn patience(&self) -> Option<Duration> {
            Some(Duration::ZERO)
        }

        fn ask(&mut self, _: &str, _: bool) -> bool {
            false
        }
    }

    #[test]
    fn what_is_held_back_is_shown_in_time() {
        let mut hasty = Hasty(Recorder::default());
        let mut outputs = Outputs::new(&mut hasty, true);
        assert_eq!(outputs.deadline(), None);
        outputs.event(Event::Stderr("note\n".into()));
        assert!(outputs.deadline().is_some());
        outputs.release_old();
        outputs.event(Event::UserError);
        let reply = Reply { result: Ok(Forms::new()), compiled: String::new(), lost: Vec::new(), typed: None };
        // Shown already, and the message all the same.
        assert_eq!(outputs.finish("", &reply).map(|failure| failure.message), Some("note".into()));
        assert_eq!(hasty.0.outputs, [stderr("note\n")]);
    }
}
