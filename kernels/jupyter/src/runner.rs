//! Executes a notebook from top to bottom and writes what its cells showed.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::install::Layout;
use crate::notebook::Notebook;
use crate::outputs::{Client, Output, Recorder, Update, error};
use crate::session::{Failure, FailureKind, Options, Session};

pub fn run(path: &Path, output: Option<&Path>, timeout: Duration, prefix: &Path) -> Result<ExitCode> {
    let begin = Instant::now();
    let mut notebook = Notebook::read(path)?;
    // Cells run in the notebook's folder, so paths are made absolute before that.
    let path = path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?;
    let output = output.map_or_else(|| Ok(path.clone()), std::path::absolute)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let session = Session::start(&Layout::new(prefix), folder)?;
    crate::repl::interrupt_on_ctrl_c(session.controls());
    println!("ready    {:>7.2} s", begin.elapsed().as_secs_f64());

    notebook.clear_outputs();
    let cells = notebook.code_cells();
    let mut failed = None;
    let options = Options { timeout: Some(timeout), hold: None };
    let mut shown = Displays::default();
    for (n, cell) in cells.iter().enumerate() {
        let source = notebook.source(*cell);
        let must_fail = notebook.must_fail(*cell);
        let step = Instant::now();
        let mut recorder = Recorder::default();
        let ending = session.execute(&source, &options, &mut recorder);
        let failure = judge(ending.failure, must_fail, &mut recorder);
        notebook.set_outputs(*cell, n + 1, &recorder.outputs);
        shown.record(&mut notebook, *cell, n + 1, recorder);
        let state = if failure.is_some() { "FAILED" } else { "ok" };
        let place = format!("{}/{}", n + 1, cells.len());
        println!("{place:>8} {:>7.2} s  {state:<6}  {}", step.elapsed().as_secs_f64(), first_line(&source));
        let interrupted = ending.interrupted.then(|| Failure::new(FailureKind::Interrupted, "interrupted", "interrupted"));
        if let Some(failure) = failure.or(interrupted) {
            failed = Some((n + 1, source, failure));
            break;
        }
    }
    session.close();
    notebook.write(&output)?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(match failed {
        None => {
            println!("{} cells in {seconds:.1} s -> {}", cells.len(), output.display());
            ExitCode::SUCCESS
        }
        Some((number, source, failure)) => {
            eprintln!("\ncell {number} of {} failed: {}\n", path.display(), failure.kind.name());
            eprintln!("{}\n\n{}\n", indented(&source), indented(&failure.details));
            eprintln!("{} of {} cells were run in {seconds:.1} s -> {}", number, cells.len(), output.display());
            ExitCode::FAILURE
        }
    })
}

/// Displays of the cells so far that a later cell may update.
#[derive(Default)]
struct Displays(Vec<(usize, usize, Vec<Output>)>);

impl Displays {
    fn record(&mut self, notebook: &mut Notebook, cell: usize, count: usize, recorder: Recorder) {
        for update in &recorder.of_earlier_cells {
            for (cell, count, outputs) in &mut self.0 {
                let mut earlier = Recorder { outputs: std::mem::take(outputs), ..Default::default() };
                earlier.show(update.clone());
                *outputs = earlier.outputs;
                notebook.set_outputs(*cell, *count, outputs);
            }
        }
        if recorder.outputs.iter().any(|output| matches!(output, Output::Display { id: Some(_), .. })) {
            self.0.push((cell, count, recorder.outputs));
        }
    }
}

/// A cell that is tagged to fail has passed if it failed, unless it took the session with it.
fn judge(failure: Option<Failure>, must_fail: bool, recorder: &mut Recorder) -> Option<Failure> {
    match failure {
        Some(failure) if must_fail && failure.kind != FailureKind::Timeout => None,
        None if must_fail => {
            let message = "the cell is tagged raises-exception, but did not fail";
            let failure = Failure::new(FailureKind::Error, message, message);
            recorder.show(Update::Add(error(&failure)));
            Some(failure)
        }
        failure => failure,
    }
}

/// The first line of a cell that is not a comment, cut to fit a terminal.
fn first_line(source: &str) -> String {
    let mut lines = source.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"));
    let line = lines.next().unwrap_or_default();
    let cut: String = line.chars().take(60).collect();
    if cut.len() < line.len() { cut + "..." } else { cut }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
