//! `qlora-nb`: runs Rust notebooks against the qlora-nb library, without Python and without a browser.
//!
//! The same binary plays four parts, and reads top to bottom in this order:
//!
//! 1. [`install`] links the library as one dylib and writes where cells find it;
//! 2. [`batch`] runs notebooks, and [`testing`] holds them to what they promise ([`check`], [`diff`], [`junit`]): each
//!    in a process in which [`runner`] takes a [`notebook`] cell by cell through a [`session`], which loses no
//!    variable ([`keep`]);
//! 3. [`supervisor`] is the process that evcxr believes to run the cells. It starts the one that does, and
//!    reports what evcxr hides: panics, `Err` through `?`, a death;
//! 4. [`types`] stands before rustc and asks it for the types of a cell's variables.

mod assistance;
mod batch;
mod check;
mod diagnostics;
mod diff;
mod doctor;
mod highlight;
mod history;
mod install;
mod junit;
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
mod testing;
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
  qlora-nb run NOTEBOOK... [-o OUT] [options]
      execute notebooks cell by cell and write the outputs into them (or into OUT: a file, or a
      folder for several); a failing cell ends its notebook, and the exit status is 1
  qlora-nb test NOTEBOOK... [--update] [--junit FILE] [options]
      execute notebooks and compare the outputs with those stored, which stay as they are;
      the exit status is 1 if any cell fails or differs from what its notebook promises
  qlora-nb repl
      cells in a terminal, with history, completion and progress bars
  qlora-nb kernel CONNECTION_FILE
      serve a Jupyter client, which writes that file and starts this
  qlora-nb doctor [--prefix DIR]
      say what is missing or does not match, and the remedy

  --prefix DIR      where the library is laid out for notebooks
                    (default: $QLORA_NB_PREFIX, else $XDG_DATA_HOME/qlora-nb, else ~/.local/share/qlora-nb)
  --source DIR      the qlora-nb sources (default: where this binary was built)
  --timeout SECONDS give up on a cell after so long (default: 3600)
  --jobs N          run at most so many notebooks at once (default: the number of cores)
  --memory MIB      let notebooks that run at once need so much together (default: what is available);
                    one needs 1536, or the \"qlora_nb\": {\"memory_mib\": N} of its metadata
  --update          rewrite outputs that differ, in notebooks in which no cell failed
  --junit FILE      write the results as JUnit XML
  A notebook may be a folder: all *.ipynb in it. Exit status 2: wrong usage, or unreadable input.
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
    let (mut jobs, mut memory_mib) = (None, None);
    let mut test = testing::TestOptions { junit: None, update: false };
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
            "--jobs" => jobs = Some(usize::try_from(positive(&arg, &value()?)?)?),
            "--memory" => memory_mib = Some(positive(&arg, &value()?)?),
            "--junit" => test.junit = Some(PathBuf::from(value()?)),
            "--update" => test.update = true,
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
    let options = batch::Options { timeout, prefix: prefix.clone(), jobs, memory_mib };
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["install"] => install::install(&prefix, source.as_deref()).map(|()| ExitCode::SUCCESS),
        ["run", notebooks @ ..] if !notebooks.is_empty() => batch::run(notebooks, output.as_deref(), &options),
        ["test", ..] if output.is_some() => {
            bail!("test writes no other notebook\nremedy: --update, or qlora-nb run -o")
        }
        ["test", notebooks @ ..] if !notebooks.is_empty() => testing::test(notebooks, &test, &options),
        [batch::CELLS, notebook] => runner::run_cells(notebook.as_ref(), timeout, &prefix).map(|()| ExitCode::SUCCESS),
        ["kernel", connection_file] => kernel::run(connection_file.as_ref(), &prefix),
        ["repl"] => repl::run(&prefix),
        ["doctor"] => doctor::doctor(&prefix),
        [] => bail!("no command\n\n{USAGE}"),
        other => bail!("cannot make sense of `{}`\n\n{USAGE}", other.join(" ")),
    }
}

fn positive(option: &str, text: &str) -> Result<u64> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.with_context(|| format!("{option}: expected a positive integer, got {text:?}"))
}
