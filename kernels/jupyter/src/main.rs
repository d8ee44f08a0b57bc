//! `qlora-nb`: runs Rust notebooks against the qlora-nb library, without Python and without a browser.
//!
//! The same binary plays four parts, and reads top to bottom in this order:
//!
//! 1. [`install`] links the library as one dylib and writes where cells find it;
//! 2. [`runner`] takes a [`notebook`] cell by cell through a [`session`], which loses no variable ([`keep`]);
//! 3. [`supervisor`] is the process that evcxr believes to run the cells. It starts the one that does, and
//!    reports what evcxr hides: panics, `Err` through `?`, a death;
//! 4. [`types`] stands before rustc and asks it for the types of a cell's variables.

mod assistance;
mod diagnostics;
mod doctor;
mod highlight;
mod history;
mod install;
mod keep;
mod kernel;
mod notebook;
mod outputs;
mod processes;
mod repl;
mod runner;
mod session;
mod supervisor;
mod syntax;
mod types;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
qlora-nb: Rust notebooks against the qlora-nb library

usage:
  qlora-nb install [--prefix DIR] [--source DIR]
      build the library, link it as a dylib for this rustc, and lay it out for notebooks
  qlora-nb run NOTEBOOK [-o OUT.ipynb] [--timeout SECONDS] [--prefix DIR]
      execute a notebook cell by cell and write the outputs into it (or into OUT.ipynb);
      the first failing cell ends the run with exit status 1
  qlora-nb repl
      the same in a terminal
  qlora-nb kernel CONNECTION_FILE
      serve a Jupyter client, which writes that file and starts this
  qlora-nb doctor [--prefix DIR]
      say what is missing or does not match, and the remedy

  --prefix DIR      where the library is laid out for notebooks
                    (default: $QLORA_NB_PREFIX, else $XDG_DATA_HOME/qlora-nb, else ~/.local/share/qlora-nb)
  --source DIR      the qlora-nb sources (default: where this binary was built)
  --timeout SECONDS give up on a cell after so long (default: 3600)
";

fn main() -> ExitCode {
    // The order matters: evcxr starts this binary for the cells, cargo starts it for rustc.
    if supervisor::is_asked_for() {
        supervisor::run();
    }
    if types::is_asked_for() {
        return types::stand_before_rustc();
    }
    supervisor::prepare_worker();
    evcxr::runtime_hook();

    match command_line(std::env::args().skip(1).collect()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qlora-nb: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn command_line(args: Vec<String>) -> Result<ExitCode> {
    let mut prefix = None;
    let mut source = None;
    let mut output = None;
    let mut timeout = Duration::from_secs(3600);
    let mut words = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value\n\n{USAGE}"));
        match arg.as_str() {
            "--prefix" => prefix = Some(PathBuf::from(value()?)),
            "--source" => source = Some(PathBuf::from(value()?)),
            "-o" | "--output" => output = Some(PathBuf::from(value()?)),
            "--timeout" => {
                let text = value()?;
                let seconds = text.parse::<f64>().ok().filter(|s| *s > 0.0 && s.is_finite());
                let seconds = seconds.with_context(|| format!("--timeout: expected seconds, got {text:?}"))?;
                timeout = Duration::from_secs_f64(seconds);
            }
            "-h" | "--help" => {
                print!("{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            "-V" | "--version" => {
                println!("qlora-nb {}", env!("CARGO_PKG_VERSION"));
                return Ok(ExitCode::SUCCESS);
            }
            flag if flag.starts_with('-') => bail!("unknown option {flag}\n\n{USAGE}"),
            _ => words.push(arg),
        }
    }
    let prefix = match prefix {
        Some(dir) => std::path::absolute(dir)?,
        None => install::default_prefix()?,
    };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["install"] => install::install(&prefix, source.as_deref()).map(|()| ExitCode::SUCCESS),
        ["run", notebook] => runner::run(notebook.as_ref(), output.as_deref(), timeout, &prefix),
        ["kernel", connection_file] => kernel::run(connection_file.as_ref(), &prefix),
        ["repl"] => repl::run(&prefix),
        ["doctor"] => doctor::doctor(&prefix),
        [] => bail!("no command\n\n{USAGE}"),
        other => bail!("cannot make sense of `{}`\n\n{USAGE}", other.join(" ")),
    }
}
