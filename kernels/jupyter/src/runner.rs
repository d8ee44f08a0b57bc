//! Executes a notebook from top to bottom, in a process of its own ([`crate::batch`] started it), and reports.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::api::Api;
use crate::diagnostics::{Failure, FailureKind};
use crate::layout::{API, Layout};
use crate::notebook::{self, Notebook};
use crate::outputs::{Client, Output, Recorder, Update, error};
use crate::processes;
use crate::session::{Ending, Session};

/// What the process says, one JSON object a line. Cells are named by their position in the notebook.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    Ready {
        seconds: f64,
    },
    Skipped {
        cell: usize,
    },
    Cell(CellRun),
    /// A later cell changed what this one shows.
    Changed {
        cell: usize,
        outputs: Vec<Value>,
    },
    /// It has come to its end, wherever that was.
    Ended,
}

#[derive(Serialize, Deserialize)]
pub struct CellRun {
    pub cell: usize,
    /// How many cells were executed so far, with this one.
    pub count: usize,
    pub seconds: f64,
    /// As nbformat has them.
    pub outputs: Vec<Value>,
    /// The cell failed, or should have and did not.
    pub failure: Option<Failure>,
    /// Its source with the types of its variables written out.
    pub typed: Option<String>,
}

/// Executes cells until one fails. The notebook's file is left alone.
pub fn run_cells(path: &Path, timeout: Duration, layout: &Layout) -> Result<()> {
    let begin = Instant::now();
    let notebook = Notebook::read(path)?;
    // Cells run in the notebook's folder.
    let path = path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?;
    let api = Arc::new(Api::load(&layout.at(API)));
    let session = Session::start(layout, api, path.parent().unwrap_or(Path::new("/")))?;
    report(&Report::Ready { seconds: begin.elapsed().as_secs_f64() })?;
    session.controls().interrupt_on_ctrl_c()?;
    let controls = session.controls();
    // The cell fails, and what there is of it is reported.
    processes::on_signal(Signal::SIGTERM, move || controls.kill())?;
    let mut displays = Displays::default();
    let mut count = 0;
    for cell in notebook.code_cells() {
        if notebook.is_skipped(cell) {
            report(&Report::Skipped { cell })?;
            continue;
        }
        count += 1;
        let step = Instant::now();
        let mut recorder = Recorder::default();
        let mut ending = session.execute(&notebook.source(cell), Some(timeout), &mut recorder);
        let typed = ending.typed.take();
        let failure = judge(ending, notebook.must_fail(cell), &mut recorder);
        let seconds = step.elapsed().as_secs_f64();
        recorder.outputs.retain(|output| !output.is_blank());
        let outputs = recorder.outputs.iter().map(|output| notebook::output(output, count)).collect();
        let is_last = failure.is_some();
        report(&Report::Cell(CellRun { cell, count, seconds, outputs, failure, typed }))?;
        for (cell, outputs) in displays.record(cell, count, recorder) {
            report(&Report::Changed { cell, outputs })?;
        }
        if is_last {
            break;
        }
    }
    session.close();
    report(&Report::Ended)
}

fn report(report: &Report) -> Result<()> {
    let line = serde_json::to_string(report)? + "\n";
    std::io::stdout().write_all(line.as_bytes()).context("whoever started this process does not listen")
}

/// Displays of the cells so far that a later cell may update.
#[derive(Default)]
struct Displays(Vec<(usize, usize, Vec<Output>)>);

impl Displays {
    /// Applies what a cell changed in earlier ones, and returns those.
    fn record(&mut self, cell: usize, count: usize, recorder: Recorder) -> Vec<(usize, Vec<Value>)> {
        let mut changed = Vec::new();
        for (cell, count, outputs) in &mut self.0 {
            let before = outputs.clone();
            let mut earlier = Recorder::of(std::mem::take(outputs));
            recorder.of_earlier_cells.iter().for_each(|update| earlier.show(update.clone()));
            *outputs = earlier.outputs;
            if *outputs != before {
                changed.push((*cell, outputs.iter().map(|output| notebook::output(output, *count)).collect()));
            }
        }
        if recorder.outputs.iter().any(|output| matches!(output, Output::Display { id: Some(_), .. })) {
            self.0.push((cell, count, recorder.outputs));
        }
        changed
    }
}

/// A cell that is tagged to fail has passed if it failed, unless it took the session with it.
fn judge(ending: Ending, must_fail: bool, recorder: &mut Recorder) -> Option<Failure> {
    match ending.failure {
        Some(failure) if must_fail && ![FailureKind::Timeout, FailureKind::Killed].contains(&failure.kind) => None,
        None if must_fail && !ending.interrupted => {
            let message = "the cell is tagged raises-exception, but did not fail";
            let failure = Failure::new(FailureKind::Error, message, message);
            recorder.show(Update::Add(error(&failure)));
            Some(failure)
        }
        // Whoever interrupts a run does not want the rest of it.
        None if ending.interrupted => Some(Failure::new(FailureKind::Interrupted, "interrupted", "interrupted")),
        failure => failure,
    }
}
