//! `qlora-nb test`: notebooks are tests, and what they show is what they promise ([`check`] has the terms).

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use quick_junit::{TestCaseStatus, TestSuite};
use serde_json::Value;

use crate::batch::{self, Job, Progress, Said};
use crate::check::{self, Terms};
use crate::diagnostics::Failure;
use crate::files;
use crate::junit::{self, Case};
use crate::runner::{CellRun, Report};

#[derive(clap::Args)]
pub struct TestOptions {
    #[command(flatten)]
    options: batch::Options,
    /// Write the results as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Rewrite outputs that differ, in notebooks in which no cell failed
    #[arg(long)]
    update: bool,
    // There is no such option; whoever looks for it learns where it is.
    #[arg(short, long, hide = true)]
    output: Option<PathBuf>,
}

/// A notebook and what became of its cells.
struct Tested {
    cells: Vec<Cell>,
    broken: Option<String>,
    seconds: f64,
}

struct Cell {
    terms: Terms,
    state: State,
    /// What it showed, and when in the order of execution.
    now: Option<(usize, Vec<Value>)>,
    seconds: f64,
}

enum State {
    NotReached,
    Skipped,
    Passed,
    /// The difference, for people.
    Differs(Vec<String>),
    Failed(Failure),
}

pub fn test(test: &TestOptions) -> Result<ExitCode> {
    if test.output.is_some() {
        bail!("test writes no other notebook\nremedy: --update, or qlora-nb run -o")
    }
    let jobs = Job::all(&test.options.notebooks)?;
    let mut tested = batch::every(jobs.iter().map(Tested::before))?;
    if let Some(folder) = test.junit.as_deref().and_then(Path::parent) {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    let progress = Progress { jobs: &jobs };
    let mut wrong = Vec::new();
    batch::run_all(&jobs, &test.options, |i, said| match said {
        Said::Report(Report::Ready { seconds }) => progress.ready(i, seconds),
        Said::Report(Report::Skipped { cell }) => {
            tested[i].cells[jobs[i].number(cell) - 1].state = State::Skipped;
            progress.cell(i, cell, 0.0, "skipped");
        }
        Said::Report(Report::Cell(run)) => {
            let (cell, seconds) = (run.cell, run.seconds);
            let state = tested[i].take(&jobs[i], run).word();
            progress.cell(i, cell, seconds, state);
        }
        Said::Report(Report::Changed { cell, outputs }) => tested[i].change(&jobs[i], cell, outputs),
        Said::Report(Report::Ended) => {}
        Said::Done { broken, seconds } => {
            (tested[i].broken, tested[i].seconds) = (broken, seconds);
            show(&tested[i].findings(&jobs[i]));
            if test.update && tested[i].failures() == 0 {
                match tested[i].update(&jobs[i]) {
                    Ok(0) => {}
                    Ok(n) => println!("{}: outputs of {n} cells rewritten", jobs[i].path.display()),
                    Err(error) => wrong.push(format!("{error:#}")),
                }
            } else if test.update {
                println!("{}: not rewritten, for not all of it ran well", jobs[i].path.display());
            }
        }
    })?;
    if let Some(path) = &test.junit {
        let xml = junit::xml(tested.iter().zip(&jobs).map(|(tested, job)| tested.suite(job)).collect())?;
        files::write(path, xml.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    for (tested, job) in tested.iter().zip(&jobs) {
        if jobs.len() > 1 && tested.differences() + tested.failures() > 0 {
            println!("not as promised: {}", job.path.display());
        }
    }
    println!("{}", summary(&tested));
    let differences = if test.update { 0 } else { tested.iter().map(Tested::differences).sum() };
    let failures: usize = tested.iter().map(Tested::failures).sum();
    Ok(if differences + failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Tested {
    fn before(job: &Job) -> Result<Tested> {
        let cell = |cell: &usize| {
            let terms = Terms::of(&job.notebook, *cell);
            let terms = terms.with_context(|| format!("cell {} of {}", job.number(*cell), job.path.display()))?;
            Ok(Cell { terms, state: State::NotReached, now: None, seconds: 0.0 })
        };
        Ok(Tested { cells: batch::every(job.cells.iter().map(cell))?, broken: None, seconds: 0.0 })
    }

    fn take(&mut self, job: &Job, run: CellRun) -> &State {
        let cell = &mut self.cells[job.number(run.cell) - 1];
        let difference = || check::difference(job.notebook.outputs(run.cell), &run.outputs, &cell.terms);
        cell.state = match run.failure {
            Some(failure) => State::Failed(failure),
            None => match difference() {
                lines if lines.is_empty() => State::Passed,
                lines => State::Differs(lines),
            },
        };
        cell.now = Some((run.count, run.outputs));
        cell.seconds = run.seconds;
        &cell.state
    }

    /// A later cell changed what this one shows.
    fn change(&mut self, job: &Job, cell: usize, outputs: Vec<Value>) {
        let number = job.number(cell) - 1;
        if let Some((count, _)) = self.cells[number].now
            && !matches!(self.cells[number].state, State::Failed(_))
        {
            let seconds = self.cells[number].seconds;
            self.take(job, CellRun { cell, count, seconds, outputs, failure: None, typed: None });
        }
    }

    fn differences(&self) -> usize {
        self.cells.iter().filter(|cell| matches!(cell.state, State::Differs(_))).count()
    }

    /// Failed cells, and a process that broke down.
    fn failures(&self) -> usize {
        let failed = self.cells.iter().filter(|cell| matches!(cell.state, State::Failed(_))).count();
        failed + usize::from(self.broken.is_some())
    }

    fn findings(&self, job: &Job) -> String {
        let path = job.path.display();
        let mut text = String::new();
        let is_bare = self.is_bare(job);
        if is_bare && self.differences() > 0 {
            let n = self.differences();
            let _ = writeln!(text, "\n{path} has no stored outputs, and {n} of its cells now show something");
            let _ = writeln!(text, "remedy: qlora-nb test --update {path}\n");
        }
        for (n, (cell, position)) in self.cells.iter().zip(&job.cells).enumerate() {
            let _ = match &cell.state {
                State::Differs(lines) if !is_bare => {
                    writeln!(text, "\ncell {} of {path} differs\n{}\n", n + 1, lines.join("\n"))
                }
                State::Failed(failure) => writeln!(text, "{}", job.failure(*position, failure)),
                _ => Ok(()),
            };
        }
        if let Some(broken) = &self.broken {
            let _ = writeln!(text, "\n{path}: {broken}\n");
        }
        text
    }

    /// Whether the notebook has no outputs at all.
    fn is_bare(&self, job: &Job) -> bool {
        job.cells.iter().all(|cell| job.notebook.outputs(*cell).is_empty())
    }

    /// Rewrites outputs that differ beyond the terms, or that are missing, and the counts; returns how many cells'.
    /// All else stays as it is, so that a difference in git shows what changed.
    fn update(&self, job: &Job) -> Result<usize> {
        let mut notebook = job.notebook.clone();
        let mut rewritten = 0;
        for (cell, position) in self.cells.iter().zip(&job.cells) {
            let Some((count, outputs)) = &cell.now else { continue };
            let is_missing = notebook.outputs(*position).is_empty() && !outputs.is_empty();
            if matches!(cell.state, State::Differs(_)) || is_missing {
                notebook.set_outputs(*position, *count, outputs.clone());
                rewritten += 1;
            }
            notebook.set_count(*position, *count);
        }
        if notebook == job.notebook {
            return Ok(0);
        }
        job.write(&notebook, &job.path)?;
        Ok(rewritten)
    }

    fn suite(&self, job: &Job) -> TestSuite {
        let mut cases: Vec<Case> = Vec::new();
        for (n, (cell, position)) in self.cells.iter().zip(&job.cells).enumerate() {
            let name = format!("cell {}: {}", n + 1, batch::first_line(&job.notebook.source(*position)));
            cases.push(Case { name, seconds: cell.seconds, status: cell.state.status() });
        }
        if let Some(why) = &self.broken {
            cases.push(Case { name: "the notebook's process".into(), seconds: 0.0, status: junit::broken(why) });
        }
        junit::suite(&job.path.display().to_string(), self.seconds, cases)
    }
}

impl State {
    fn word(&self) -> &'static str {
        match self {
            State::NotReached => "",
            State::Skipped => "skipped",
            State::Passed => "ok",
            State::Differs(_) => "DIFFERS",
            State::Failed(_) => "FAILED",
        }
    }

    fn status(&self) -> TestCaseStatus {
        match self {
            State::Passed => TestCaseStatus::success(),
            State::Skipped => junit::skipped("tagged skip"),
            State::NotReached => junit::skipped("not reached"),
            State::Differs(lines) => junit::failed("Difference", "not what is stored", &lines.join("\n")),
            State::Failed(Failure { kind, message, details }) => junit::failed(kind.name(), message, details),
        }
    }
}

fn summary(tested: &[Tested]) -> String {
    let cells = || tested.iter().flat_map(|tested| &tested.cells);
    let count = |is: fn(&State) -> bool| cells().filter(|cell| is(&cell.state)).count();
    let plural = if tested.len() == 1 { "" } else { "s" };
    let mut text = format!("{} notebook{plural}, {} cells: ", tested.len(), cells().count());
    let _ = write!(text, "{} ok", count(|state| matches!(state, State::Passed)));
    let rest = [
        (count(|state| matches!(state, State::Skipped)), "skipped"),
        (count(|state| matches!(state, State::Differs(_))), "differ"),
        (count(|state| matches!(state, State::Failed(_))), "failed"),
        (count(|state| matches!(state, State::NotReached)), "not reached"),
        (tested.iter().filter(|tested| tested.broken.is_some()).count(), "broke down"),
    ];
    for (n, what) in rest.into_iter().filter(|(n, _)| *n > 0) {
        let _ = write!(text, ", {n} {what}");
    }
    text
}

/// Prints findings, the lines of differences in colour where a person looks.
fn show(text: &str) {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let in_colour = std::io::stdout().is_terminal() && !no_colour;
    for line in text.lines() {
        match line.chars().next() {
            Some('-') if in_colour => println!("\u{1b}[31m{line}\u{1b}[0m"),
            Some('+') if in_colour => println!("\u{1b}[32m{line}\u{1b}[0m"),
            _ => println!("{line}"),
        }
    }
}
