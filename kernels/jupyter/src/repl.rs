//! The session in a terminal: history, lines that go on, completion, and displays that overwrite themselves.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{CompletionType, Config, Editor, Helper};

use crate::assistance::Assistance;
use crate::highlight;
use crate::layout::{self, Layout};
use crate::outputs::{Client, Output, Update};
use crate::scope::Names;
use crate::session::{Controls, Session};
use crate::syntax::{self, Completeness};

const HELP: &str = "\
Rust, one cell at a time; a cell that is not whole goes on in the next line.
  use qlora_nb::prelude::*;   the library
  :vars                       variables and their types
  :help                       all of evcxr's commands
  :quit, Ctrl-D               leave
  Ctrl-C                      asks the running cell to stop; again, a second later, kills it and all variables";

pub fn run(layout: &Layout) -> Result<()> {
    let folder = std::env::current_dir().context("the current folder is gone")?;
    println!("qlora-nb {}. Ctrl-D leaves, :help helps.", env!("CARGO_PKG_VERSION"));
    let assistance = Assistance::new(layout);
    let session = Arc::new(Session::start(layout, assistance.api.clone(), &folder)?);
    session.controls().interrupt_on_ctrl_c()?;
    let config = Config::builder().auto_add_history(true).completion_type(CompletionType::List).build();
    let mut editor: Editor<Assistant, _> = Editor::with_config(config).context("the terminal cannot be used")?;
    editor.set_helper(Some(Assistant { assistance, names: session.names(), session: session.clone() }));
    let history = layout::data_home().context("HOME is not set")?.join("qlora-nb/repl_history");
    // None yet, the first time.
    let _ = editor.load_history(&history);
    loop {
        match editor.readline("> ") {
            Ok(code) if [":quit", ":q", ":exit"].contains(&code.trim()) => break,
            Ok(code) => {
                if code.trim() == ":help" {
                    println!("{HELP}\n");
                }
                if code.trim().is_empty() {
                    continue;
                }
                session.forget_interrupts();
                let mut terminal = Terminal { controls: Some(session.controls()), ..Terminal::default() };
                session.execute(&code, None, &mut terminal);
                terminal.finish();
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error).context("cannot read from the terminal"),
        }
    }
    let saved = history.parent().map(std::fs::create_dir_all).transpose().map_err(ReadlineError::Io);
    if let Err(error) = saved.and_then(|_| editor.save_history(&history)) {
        eprintln!("the history is not kept: cannot write {}: {error}", history.display());
    }
    drop(editor);
    if let Ok(session) = Arc::try_unwrap(session) {
        session.close();
    }
    Ok(())
}

/// What a terminal shows of a cell.
#[derive(Default)]
struct Terminal {
    controls: Option<Controls>,
    /// The display on the last line, which an update overwrites.
    live: Option<(String, String)>,
}

impl Terminal {
    /// Leaves a live display as it is, and goes on below it.
    fn finish(&mut self) {
        if self.live.take().is_some() {
            println!("");
        }
    }

    fn live(&mut self, id: &str, text: &str) {
        let is_open = self.live.as_ref().is_some_and(|(open, _)| open == id);
        let line = text.lines().next().unwrap_or_default();
        if std::io::stdout().is_terminal() {
            if !is_open {
                self.finish();
            }
            print!("\r\u{1b}[2K{line}");
            let _ = std::io::stdout().flush();
            self.live = Some((id.to_owned(), line.to_owned()));
        }
    }
}

impl Client for Terminal {
    fn show(&mut self, update: Update) {
        let plain = |data: &[(String, String)]| {
            let text = data.iter().find(|(mime, _)| mime == "text/plain").map(|(_, text)| text.clone());
            text.unwrap_or_else(|| data.first().map_or(String::new(), |(mime, _)| format!("[{mime}]")))
        };
        match update {
            Update::Add(Output::Display { data, id: Some(id), .. }) | Update::Replace { id, data, .. }
                if plain(&data).lines().count() <= 1 =>
            {
                self.live(&id, &plain(&data));
            }
            Update::Add(output) => {
                self.finish();
                match output {
                    Output::Stream { name: "stderr", text } => drop(write!(std::io::stderr(), "{text}")),
                    Output::Stream { text, .. } => drop(write!(std::io::stdout(), "{text}")),
                    Output::Display { data, .. } => println!("{}", plain(&data)),
                    Output::Error { name, traceback, .. } => {
                        let lines = highlight::traceback(&name, &traceback.join("\n"));
                        lines.iter().for_each(|line| eprintln!("{line}"));
                    }
                }
                let _ = std::io::stdout().flush();
            }
            // A terminal keeps what it has shown.
            Update::Replace { .. } | Update::Clear { .. } => {}
        }
    }

    fn ask(&mut self, prompt: &str, is_password: bool) -> bool {
        self.finish();
        print!("{prompt} ");
        let _ = std::io::stdout().flush();
        let Some(controls) = self.controls.clone() else { return false };
        let echo = is_password.then(Echo::off);
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = std::io::stdin().read_line(&mut line);
            drop(echo);
            controls.answer(line.trim_end_matches(['\r', '\n']).to_owned());
        });
        true
    }
}

/// While it lives, the terminal does not show what is typed.
struct Echo(Termios);

impl Echo {
    fn off() -> Option<Echo> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &silent).ok()?;
        Some(Echo(before))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
        println!("");
    }
}

struct Assistant {
    assistance: Assistance,
    names: Arc<Mutex<Names>>,
    session: Arc<Session>,
}

impl Helper for Assistant {}

impl Hinter for Assistant {
    type Hint = String;
}

impl Highlighter for Assistant {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        Cow::Owned(format!("\u{1b}[1;34m{prompt}\u{1b}[0m"))
    }
}

impl Validator for Assistant {
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(match syntax::is_complete(context.input()) {
            Completeness::Incomplete { .. } => ValidationResult::Incomplete,
            // The compiler says better than we why it is not valid.
            Completeness::Complete | Completeness::Invalid => ValidationResult::Valid(None),
        })
    }
}

impl Completer for Assistant {
    type Candidate = String;

    fn complete(&self, line: &str, at: usize, _: &rustyline::Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let names = self.names.lock().map(|names| names.clone()).unwrap_or_default();
        let ask = |expression: &str| self.session.type_of(expression);
        let found = self.assistance.matches(line, at, &names, &ask);
        Ok((found.start, found.matches.into_iter().map(|m| m.text).collect()))
    }
}
