//! `qlora-nb`: runs Rust notebooks against the qlora-nb library, without Python and without a browser.
//!
//! The same binary plays four parts, and reads top to bottom in this order:
//!
//! 1. [`install`] links the library as one dylib and writes where cells find it ([`layout`]), the [`kernelspec`], and
//!    an index of the library ([`api`]) for completion and inspection ([`complete`]);
//! 2. [`runner`] takes a [`notebook`] cell by cell through a [`session`], which loses no variable ([`keep`]);
//! 3. [`supervisor`] is the process that evcxr believes to run the cells. It starts the one that does, and
//!    reports what evcxr hides: panics, `Err` through `?`, a death;
//! 4. [`types`] stands before rustc and asks it for the types of a cell's variables.

// Completion and inspection wait for the kernel, which calls them.
#[allow(dead_code)]
mod api;
#[allow(dead_code)]
mod complete;
mod diagnostics;
mod doctor;
#[allow(dead_code)]
mod inspect;
mod install;
mod keep;
mod kernelspec;
mod layout;
mod notebook;
mod runner;
#[allow(dead_code)]
mod scope;
mod session;
#[allow(dead_code)]
mod std_names;
mod supervisor;
mod types;
mod uninstall;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::layout::Target;

const USAGE: &str = "\
qlora-nb: Rust notebooks against the qlora-nb library

usage:
  qlora-nb install [--user | --sys-prefix | --prefix DIR] [--source DIR]
      build the library, link it as a dylib for this rustc, lay it out for notebooks, and tell Jupyter
      of the kernel; what is there already and still fits stays
  qlora-nb uninstall [--user | --sys-prefix | --prefix DIR]
      remove what install wrote, and nothing else
  qlora-nb run NOTEBOOK [-o OUT.ipynb] [--timeout SECONDS] [--prefix DIR]
      execute a notebook cell by cell and write the outputs into it (or into OUT.ipynb);
      the first failing cell ends the run with exit status 1
  qlora-nb doctor [--prefix DIR]
      say what is missing or does not match, and the remedy

  --user            install for this user (the default): $XDG_DATA_HOME/qlora-nb or ~/.local/share/qlora-nb
  --sys-prefix      install into the active Python environment: share/qlora-nb in it
  --prefix DIR      install: into DIR/share/qlora-nb; otherwise: use what is there, or DIR itself
                    (without a flag $QLORA_NB_PREFIX names the installation's own folder)
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
    let mut prefix: Option<PathBuf> = None;
    let mut target = Target::Unsaid;
    let mut source = None;
    let mut output = None;
    let mut timeout = Duration::from_secs(3600);
    let mut words = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value\n\n{USAGE}"));
        match arg.as_str() {
            "--prefix" => prefix = Some(PathBuf::from(value()?)),
            "--user" => target = Target::User,
            "--sys-prefix" => target = Target::SysPrefix,
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
    if let Some(prefix) = &prefix {
        if target != Target::Unsaid {
            bail!("--prefix, --user and --sys-prefix exclude each other");
        }
        target = Target::Prefix(prefix.clone());
    }
    let prefix = || layout::find(prefix.as_deref()).map(|layout| layout.prefix);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["install"] => install::install(&target, source.as_deref()).map(|()| ExitCode::SUCCESS),
        ["uninstall"] => uninstall::uninstall(&target).map(|()| ExitCode::SUCCESS),
        ["run", notebook] => runner::run(notebook.as_ref(), output.as_deref(), timeout, &prefix()?),
        ["doctor"] => doctor::doctor(&prefix()?),
        [] => bail!("no command\n\n{USAGE}"),
        other => bail!("cannot make sense of `{}`\n\n{USAGE}", other.join(" ")),
    }
}
