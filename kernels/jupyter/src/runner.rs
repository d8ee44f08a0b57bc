//! Executes a notebook from top to bottom, in a process of its own ([`crate::batch`] started it), and reports.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::install::Layout;
use crate::notebook::{Notebook, Output};
use crate::session::{CellResult, Failure, FailureKind, Session};

/// What the process says, one JSON object a line. Cells are named by their position in the notebook.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    Ready { seconds: f64 },
    Skipped { cell: usize },
    Cell(CellRun),
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
    pub failure: Option<CellFailure>,
}

#[derive(Serialize, Deserialize)]
pub struct CellFailure {
    pub kind: String,
    pub message: String,
    pub details: String,
}

/// Executes cells until one fails. The notebook's file is left alone.
pub fn run_cells(path: &Path, timeout: Duration, prefix: &Path) -> Result<()> {
    let begin = Instant::now();
    let notebook = Notebook::read(path)?;
    // Cells run in the notebook's folder.
    let path = path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?;
    let session = Session::start(&Layout::new(prefix), path.parent().unwrap_or(Path::new("/")))?;
    report(&Report::Ready { seconds: begin.elapsed().as_secs_f64() })?;
    let mut count = 0;
    for cell in notebook.code_cells() {
        if notebook.is_skipped(cell) {
            report(&Report::Skipped { cell })?;
            continue;
        }
        count += 1;
        let step = Instant::now();
        let result = judge(session.execute(&notebook.source(cell), timeout), notebook.must_fail(cell));
        let seconds = step.elapsed().as_secs_f64();
        let outputs = result.outputs.iter().map(|output| output.to_json(count)).collect();
        let failure = result.failure.map(|failure| CellFailure {
            kind: failure.kind.name().to_owned(),
            message: failure.message,
            details: failure.details,
        });
        let is_last = failure.is_some();
        report(&Report::Cell(CellRun { cell, count, seconds, outputs, failure }))?;
        if is_last {
            break;
        }
    }
    session.close();
    Ok(())
}

fn report(report: &Report) -> Result<()> {
    let line = serde_json::to_string(report)? + "\n";
    std::io::stdout().write_all(line.as_bytes()).context("whoever started this process does not listen")
}

/// A cell that is tagged to fail has passed if it failed, unless it took the session with it.
fn judge(mut result: CellResult, must_fail: bool) -> CellResult {
    match &result.failure {
        Some(failure) if must_fail && failure.kind != FailureKind::Timeout => result.failure = None,
        None if must_fail => {
            let message = "the cell is tagged raises-exception, but did not fail";
            result.failure = Some(Failure::new(FailureKind::Error, message, message));
            result.outputs.push(Output::Error {
                name: FailureKind::Error.name().to_owned(),
                message: message.to_owned(),
                traceback: vec![message.to_owned()],
            });
        }
        _ => {}
    }
    result
}
