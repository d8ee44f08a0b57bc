//! `qlora-nb`: runs Rust notebooks against the qlora-nb library, without Python and without a browser.
//!
//! The same binary plays four parts:
//!
//! 1. [`install`] links the library as one dylib and writes where cells find it ([`layout`]), Jupyter's [`kernelspec`],
//!    and an index of the library ([`api`]) for completion and inspection;
//! 2. a [`session`] runs cells and loses no variable, and says what they show while they run ([`outputs`]): to Jupyter
//!    ([`kernel`]), to a terminal ([`repl`]), or to a notebook file: [`batch`] runs notebooks, and [`testing`] holds them
//!    to what they promise, each in a process of its own ([`runner`]);
//! 3. [`supervisor`] is the process that evcxr believes to run the cells. It starts the one that does, and reports what
//!    evcxr hides: panics, `Err` through `?`, a death;
//! 4. [`wrapper`] stands before rustc: it asks it for the types of a cell's variables ([`types`]), and has it not optimise
//!    where nothing is to be gained ([`plain`]).
//!
//! The modules in the order in which they can be read: each uses those before it, and none behind it.
//!
//! - the machine: [`files`], [`processes`], [`highlight`];
//! - what is installed: [`layout`], [`kernelspec`], [`api`], [`install`], [`uninstall`], [`doctor`];
//! - the text of a cell: [`syntax`], [`std_names`], [`scope`], [`own`], [`complete`], [`inspect`], [`assistance`], [`plain`];
//! - rustc: [`types`], [`wrapper`];
//! - a session: [`supervisor`], [`diagnostics`], [`outputs`], [`keep`], [`engine`], [`session`];
//! - who talks to it: [`history`], [`messages`], [`executor`], [`kernel`], [`repl`];
//! - notebook files: [`notebook`], [`runner`], [`diff`], [`check`], [`junit`], [`batch`], [`testing`];
//! - its readers on damaged input, in tests alone: `fuzz`.

/// In place of the standard library's, which panic where nobody reads: `qlora-nb run | head` still writes the notebook.
macro_rules! println {
    ($($text:tt)*) => { crate::files::say(&mut std::io::stdout(), format_args!($($text)*)) };
}
macro_rules! eprintln {
    ($($text:tt)*) => { crate::files::say(&mut std::io::stderr(), format_args!($($text)*)) };
}

mod files;
mod highlight;
mod processes;

mod api;
mod doctor;
mod install;
mod kernelspec;
mod layout;
mod uninstall;

mod assistance;
mod complete;
mod inspect;
mod own;
mod plain;
mod scope;
mod std_names;
mod syntax;

mod types;
mod wrapper;

mod diagnostics;
mod engine;
mod keep;
mod outputs;
mod session;
mod supervisor;

mod executor;
mod history;
mod kernel;
mod messages;
mod repl;

mod batch;
mod check;
mod diff;
mod junit;
mod notebook;
mod runner;
mod testing;

#[cfg(test)]
mod fuzz;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};

use crate::layout::{Installation, Target};

#[derive(Parser)]
#[command(name = "qlora-nb", version, about = "Rust notebooks against the qlora-nb library")]
#[command(after_help = "Exit status 1: a cell failed or differs. 2: wrong usage, or unreadable input.")]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the library, lay it out for notebooks, and tell Jupyter of the kernel
    ///
    /// Links the library as a dylib for this rustc. What is there already and still fits stays.
    Install(install::Options),
    /// Remove what install wrote, and nothing else
    Uninstall(Target),
    /// Execute notebooks cell by cell and write the outputs into them
    ///
    /// A failing cell ends its notebook, and the exit status is 1.
    Run(batch::RunOptions),
    /// Execute notebooks and compare the outputs with those stored, which stay as they are
    ///
    /// The exit status is 1 if any cell fails or differs from what its notebook promises.
    Test(testing::TestOptions),
    /// Cells in a terminal, with history, completion and progress bars
    Repl(Installation),
    /// Serve a Jupyter client, which writes the connection file and starts this
    Kernel {
        connection_file: PathBuf,
        #[command(flatten)]
        installation: Installation,
    },
    /// Say what is missing or does not match, and the remedy
    Doctor(Installation),
    /// Copy the notebooks that came with an installation by pip, their data and their model to a new folder
    Notebooks {
        folder: PathBuf,
        #[command(flatten)]
        installation: Installation,
    },
    /// Print what makes a shell complete this command line: eval "$(qlora-nb completions bash)"
    Completions { shell: clap_complete::Shell },
    /// How `run` and `test` start this binary for one notebook
    #[command(name = batch::CELLS, hide = true)]
    Cells {
        notebook: PathBuf,
        #[command(flatten)]
        options: batch::CellOptions,
    },
}

fn main() -> ExitCode {
    // The order matters: evcxr starts this binary for the cells, cargo starts it for rustc.
    if supervisor::is_asked_for() {
        supervisor::run();
    }
    if wrapper::is_asked_for() {
        return wrapper::stand_before_rustc();
    }
    if let Some(done) = supervisor::is_worker() {
        supervisor::work(&done);
    }
    evcxr::runtime_hook();

    match obey(CommandLine::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qlora-nb: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn obey(command: Command) -> Result<ExitCode> {
    match command {
        Command::Install(options) => install::install(&options)?,
        Command::Uninstall(target) => uninstall::uninstall(&target)?,
        Command::Run(options) => return batch::run(&options),
        Command::Test(options) => return testing::test(&options),
        Command::Repl(installation) => repl::run(&installation.layout()?)?,
        Command::Kernel { connection_file, installation } => kernel::run(&connection_file, &installation.layout()?)?,
        Command::Notebooks { folder, installation } => installation.layout()?.copy_notebooks(&folder)?,
        Command::Doctor(installation) => return doctor::doctor(&installation.layout()?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut CommandLine::command(), "qlora-nb", &mut script);
            std::io::stdout().write_all(&script).context("nobody reads the completions")?;
        }
        Command::Cells { notebook, options } => {
            runner::run_cells(&notebook, options.timeout, &options.installation.layout()?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        CommandLine::command().debug_assert();
    }

    /// No module uses one that stands behind it in this file's documentation, tests aside.
    #[test]
    fn modules_stand_in_one_order() {
        let own = include_str!("main.rs");
        let list = own.lines().filter_map(|line| line.strip_prefix("//! - "));
        let order: Vec<&str> = list.flat_map(|line| line.split('`').skip(1).step_by(2)).collect();
        let declared = own.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
        assert!(declared.clone().all(|module| order.contains(&module)), "a module without a place in {order:?}");
        assert_eq!(declared.count(), order.len());
        for (place, module) in order.iter().enumerate() {
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("src/{module}.rs"));
            let text = std::fs::read_to_string(path).expect("a module's file");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
            for used in code.split("crate::").skip(1) {
                // A path, or the paths of a `use`.
                let used = used.split([';', '(', '!']).next().unwrap_or_default();
                let mut words = used.split(|c: char| !c.is_alphanumeric() && c != '_');
                let later = words.find(|word| order[place + 1..].contains(word));
                assert_eq!(later, None, "{module} uses it, which stands before it");
            }
        }
    }
}
