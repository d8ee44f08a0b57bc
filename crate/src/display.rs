//! Everything that the library shows, and the only module that prints.
//!
//! Results go to stdout; progress and notices go to stderr, so that a program's output can
//! be piped. Inside a notebook cell both become the cell's output.
//!
//! Output goes to one of three places, and each value has a form for each of them:
//! - our own kernel and runner: outputs in several forms (HTML, SVG, plain text) that change while
//!   the cell runs ([`Live`], [`Progress`], the loss curve, text as it is generated);
//! - stock evcxr_jupyter: the same forms at the end of a cell, whole lines before;
//! - a terminal or a log: plain text, a bar that overwrites itself, or whole lines.
//!
//! [`Html`] and [`Svg`] are values that a notebook shows when they end a cell, and in its middle
//! by `.show()`.
mod bar;
pub mod format;
#[cfg(test)]
mod gallery;
mod input;
mod live;
mod memory;
pub mod module_tree;
pub mod plot;
mod progress;
mod protocol;
mod rich;
pub(crate) mod theme;

use std::{
    collections::BTreeSet,
    io::{self, IsTerminal, Write},
};

use parking_lot::Mutex;

pub use input::{input, input_password};
pub(crate) use live::Pace;
pub use live::{Live, clear};
pub use memory::{MemoryReport, MemoryTerm};
pub use plot::{BarChart, Plot, Series, line_chart};
pub use progress::Progress;
#[cfg(test)]
pub(crate) use protocol::capture;
pub(crate) use rich::shown_by_forms;
pub use rich::{Forms, Html, Svg, emit, emit_value};

/// Prints one line of a result to stdout.
pub fn line(text: &str) {
    // A closed pipe (`| head`) is the reader's choice and no reason to stop training.
    let _ = writeln!(io::stdout(), "{text}");
}

/// Prints part of a line at once: text as it is generated.
pub fn stream(text: &str) {
    let mut out = io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Tells the user something that is no error but that they would want to know, such as an
/// argument that this device makes unnecessary. One line, on stderr.
pub fn notice(text: &str) {
    error_line(&format!("note: {text}"));
}

/// Like [`notice`], for what is probably a mistake.
pub fn warning(text: &str) {
    error_line(&format!("warning: {text}"));
}

/// In one piece: stderr is not buffered, and a front end would show parts of a line between lines of stdout.
fn error_line(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// [`notice`], but a text that this process has shown already is not shown again.
pub fn notice_once(text: &str) {
    once(text, notice);
}

/// [`warning`], but once a process: a cell that is run again does not repeat it.
pub fn warning_once(text: &str) {
    once(text, warning);
}

fn once(text: &str, show: fn(&str)) {
    static SHOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let is_new = SHOWN.lock().insert(text.into());
    if is_new {
        show(text);
    }
}

/// Whether somebody sees the output as it comes: at a terminal, or in a notebook's cell.
pub fn interactive() -> bool {
    io::stdout().is_terminal() || in_cell()
}

/// Whether this is a notebook's cell, of our kernel or of stock evcxr.
fn in_cell() -> bool {
    // evcxr sets the variable in the process that runs the cells.
    protocol::is_spoken() || std::env::var_os("EVCXR_IS_RUNTIME").is_some()
}

/// Whether progress is drawn as a bar that overwrites itself.
fn live_terminal() -> bool {
    io::stderr().is_terminal()
}
