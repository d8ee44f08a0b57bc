//! Why a cell failed: compiler messages and panics in the words and lines of the cell, not of the source that evcxr
//! made of it.

use evcxr::{CompilationError, Error};
use serde::{Deserialize, Serialize};

use crate::syntax;

/// Why a cell failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// In one line.
    pub message: String,
    /// In full, for people.
    pub details: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
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

pub fn failure(error: &Error, code: &str) -> Failure {
    match error {
        Error::CompilationErrors(errors) => compile_errors(errors, code),
        Error::SubprocessTerminated(how) => Failure::new(FailureKind::Died, how, how),
        Error::TypeRedefinedVariablesLost(names) => {
            let message =
                format!("a type was defined anew, and the variables of the old one are lost: {}", names.join(", "));
            Failure::new(FailureKind::Compile, &message, &message)
        }
        Error::Message(text) => {
            let text = text.trim();
            Failure::new(FailureKind::Compile, text.lines().next().unwrap_or_default(), text)
        }
    }
}

fn compile_errors(errors: &[CompilationError], code: &str) -> Failure {
    let is_error = |error: &&CompilationError| error.level().starts_with("error");
    let mut rendered: Vec<String> = errors.iter().filter(is_error).map(|error| render(error, code)).collect();
    rendered.dedup();
    let first = errors.iter().find(is_error).or(errors.first());
    let mut message = first.map_or_else(|| "the cell does not compile".to_owned(), headline);
    let has_place = |error: &CompilationError| error.spanned_messages().iter().any(|spanned| spanned.span.is_some());
    if let Some((error, at)) = syntax::error(code).filter(|_| !errors.iter().any(has_place)) {
        // rustc tells of the code that evcxr puts around a cell.
        let number = code[..at].lines().count().max(1);
        message = format!("error: {}", error.to_lowercase());
        rendered = vec![format!("{message}\n{number:>4} | {}", code.lines().nth(number - 1).unwrap_or_default())];
    }
    let message = message.lines().next().unwrap_or_default().to_owned();
    if rendered.is_empty() {
        rendered.extend(errors.iter().map(|error| render(error, code)));
    }
    Failure::new(FailureKind::Compile, &message, &rendered.join("\n\n"))
}

fn headline(error: &CompilationError) -> String {
    match error.code() {
        Some(code) => format!("error[{code}]: {}", error.message()),
        None => format!("error: {}", error.message()),
    }
}

/// A message in the manner of rustc, with the cell's own line numbers.
fn render(error: &CompilationError, code: &str) -> String {
    let mut out = headline(error);
    let mut shown_line = 0;
    for spanned in error.spanned_messages() {
        // Imports have no place in the cell: evcxr takes them apart.
        let Some(span) = &spanned.span else {
            if !spanned.label.is_empty() {
                out.push_str(&format!("\n     = {}", spanned.label));
            }
            continue;
        };
        let Some(line) = span.start_line.checked_sub(1).and_then(|i| code.lines().nth(i)) else { continue };
        if span.start_line != shown_line {
            out.push_str(&format!("\n{:>4} | {line}", span.start_line));
            shown_line = span.start_line;
        }
        let start = span.start_column.saturating_sub(1);
        let end =
            if span.end_line == span.start_line { span.end_column.saturating_sub(1) } else { line.chars().count() };
        let marks = if spanned.is_primary { "^" } else { "-" }.repeat(end.saturating_sub(start).max(1));
        let indent: String = line.chars().take(start).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        out.push_str(format!("\n     | {indent}{marks} {}", spanned.label).trim_end());
    }
    for help in error.help() {
        // What is to stand there, if it is a line of its own.
        let (help, code) = help.split_once("\n\n").unwrap_or((&help, ""));
        let code = if code.is_empty() || code.contains('\n') { String::new() } else { format!(": `{}`", code.trim()) };
        out.push_str(&format!("\nhelp: {help}{code}"));
    }
    if code.trim_start().starts_with(['%', '?']) {
        out.push_str("\nhelp: these are no IPython cells: `:help` lists the commands, of which `:timing` shows times");
    }
    if let Some(hint) = error.evcxr_extra_hint() {
        out.push_str(&format!("\nnote: {hint}"));
    }
    out
}

/// A panic's message as Rust prints it, without the thread, and with the cell's line for the generated one.
pub fn panic(said: &str, code: &str, compiled: &str) -> Failure {
    let (first, rest) = said.trim().split_once('\n').unwrap_or((said.trim(), ""));
    let message = rest.split("\nnote: run with").next().unwrap_or_default().trim_end();
    let place = first.split_once("panicked at ").map_or("", |(_, place)| place.trim_end_matches(':'));
    let place = cell_line(place, code, compiled).unwrap_or(place.to_owned());
    let headline = message.lines().next().filter(|line| !line.is_empty()).unwrap_or("a panic without a message");
    Failure::new(FailureKind::Panic, headline, format!("panicked at {place}\n{message}").trim_end())
}

/// The cell's line for `src/lib.rs:LINE:COLUMN` in the source that evcxr compiled.
fn cell_line(place: &str, code: &str, compiled: &str) -> Option<String> {
    let number = place.strip_prefix("src/lib.rs:")?.split(':').next()?.parse::<usize>().ok()?;
    let line = compiled.lines().nth(number.checked_sub(1)?)?.trim();
    if line.is_empty() {
        return None;
    }
    // evcxr puts each statement on a line of its own, and a variable's type stands behind it.
    let is_it = |own: &str| !own.trim().is_empty() && (line.starts_with(own.trim()) || own.contains(line));
    // The cell stands behind what earlier ones defined, so of lines that are equal it is the one that is so from the end.
    let behind = compiled.lines().skip(number).filter(|other| other.trim() == line).count();
    let found: Vec<_> = code.lines().enumerate().filter(|(_, own)| is_it(own)).collect();
    let own = found.iter().rev().nth(behind).or(found.first());
    Some(match own {
        Some((i, own)) => format!("line {}: {}", i + 1, own.trim()),
        None => format!("a line of an earlier cell: {line}"),
    })
}
