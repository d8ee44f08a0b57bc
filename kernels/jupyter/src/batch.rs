//! Runs notebooks, each in a process of its own, as many at once as memory and cores allow: `qlora-nb run`.
//!
//! A process of its own gives each notebook its own working folder, and one that crashes, hangs or is killed for its
//! memory takes no other with it. What it showed until then is kept.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use crossbeam_channel::{Sender, unbounded};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use walkdir::{DirEntry, WalkDir};

use crate::check;
use crate::diagnostics::Failure;
use crate::layout::{Installation, Layout};
use crate::notebook::Notebook;
use crate::processes;
use crate::runner::{CellRun, Report};

/// The command with which this binary starts itself for one notebook; for nobody else.
pub const CELLS: &str = "cells";

/// What a notebook is taken to need if it does not say: a session with rust-analyzer, rustc, and a small model.
const USUAL_MIB: u64 = 1536;

/// How notebooks are run, alike for `run` and `test`.
#[derive(clap::Args)]
pub struct Options {
    /// Notebooks, and folders, which stand for all *.ipynb in them
    #[arg(required = true, value_name = "NOTEBOOK")]
    pub notebooks: Vec<PathBuf>,
    #[command(flatten)]
    cell: CellOptions,
    /// Run at most so many notebooks at once [default: the number of cores]
    #[arg(long, value_name = "N", value_parser = positive)]
    jobs: Option<u64>,
    /// Let notebooks that run at once need so much together [default: what is available]
    ///
    /// One needs 1536, or the "qlora_nb": {"memory_mib": N} of its metadata.
    #[arg(long = "memory", value_name = "MIB", value_parser = positive)]
    memory_mib: Option<u64>,
}

/// How one notebook is run.
#[derive(clap::Args)]
pub struct CellOptions {
    /// Give up on a cell after so long
    #[arg(long, value_name = "SECONDS", default_value = "3600", value_parser = seconds)]
    pub timeout: Duration,
    #[command(flatten)]
    pub installation: Installation,
}

#[derive(clap::Args)]
pub struct RunOptions {
    #[command(flatten)]
    options: Options,
    /// Write the executed notebook to OUT: a file, or a folder for several [default: into the notebook itself]
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// Name the types of variables in the executed notebook, for stock evcxr_jupyter
    #[arg(long)]
    write_types: bool,
}

fn positive(text: &str) -> Result<u64> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.with_context(|| format!("expected a positive integer, got {text:?}"))
}

fn seconds(text: &str) -> Result<Duration> {
    let seconds = text.parse().ok().filter(|seconds| (1e-3..=1e9).contains(seconds));
    let seconds = seconds.with_context(|| format!("expected seconds, got {text:?}: from 0.001 to 1e9"))?;
    Ok(Duration::from_secs_f64(seconds))
}

/// A notebook that is to be run.
pub struct Job {
    pub path: PathBuf,
    pub notebook: Notebook,
    /// Positions of its code cells; people count them from 1.
    pub cells: Vec<usize>,
    memory_mib: u64,
}

pub enum Said {
    Report(Report),
    Done {
        /// Why the process broke down, if it did.
        broken: Option<String>,
        seconds: f64,
    },
}

impl Job {
    fn read(path: &Path) -> Result<Job> {
        let notebook = Notebook::read(path)?;
        let memory_mib = check::memory_mib(&notebook).with_context(|| path.display().to_string())?;
        let cells = notebook.code_cells();
        Ok(Job { path: path.to_owned(), notebook, cells, memory_mib: memory_mib.unwrap_or(USUAL_MIB) })
    }

    /// Reads all that is named, folders with all that is in them. Nothing runs if one is no notebook.
    pub fn all(named: &[PathBuf]) -> Result<Vec<Job>> {
        let mut paths = Vec::new();
        for path in named {
            if path.is_dir() {
                let inside = notebooks_in(path)?;
                if inside.is_empty() {
                    bail!("there is no notebook (*.ipynb) in the folder {}", path.display());
                }
                paths.extend(inside);
            } else {
                paths.push(path.to_owned());
            }
        }
        let mut known = HashMap::new();
        paths.retain(|path| known.insert(path.canonicalize().unwrap_or(path.clone()), ()).is_none());
        every(paths.iter().map(|path| Job::read(path)))
    }

    /// How a cell failed, for people.
    pub fn failure(&self, cell: usize, failure: &Failure) -> String {
        let (number, path, kind) = (self.number(cell), self.path.display(), failure.kind.name());
        let (source, details) = (indented(&self.notebook.source(cell)), indented(&failure.details));
        format!("\ncell {number} of {path} failed: {kind}\n\n{source}\n\n{details}\n")
    }

    /// Writes the notebook, executed. What somebody saved meanwhile stays: then it goes beside it.
    pub fn write(&self, executed: &Notebook, target: &Path) -> Result<()> {
        let is_own = target.canonicalize().ok() == self.path.canonicalize().ok();
        if !is_own || Notebook::read(&self.path).is_ok_and(|now| now == self.notebook) {
            return executed.write(target);
        }
        let (path, beside) = (self.path.display(), target.with_extension("executed.ipynb"));
        executed.write(&beside)?;
        bail!("{path} was changed while it ran, so it is not rewritten\nits outputs are in {}", beside.display())
    }

    /// A cell as people count it.
    pub fn number(&self, cell: usize) -> usize {
        self.cells.iter().position(|other| *other == cell).map_or(0, |i| i + 1)
    }
}

/// All that went well, or all that is wrong.
pub fn every<T>(results: impl Iterator<Item = Result<T>>) -> Result<Vec<T>> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => good.push(value),
            Err(error) => bad.push(format!("{error:#}")),
        }
    }
    if bad.is_empty() { Ok(good) } else { bail!("{}", bad.join("\n")) }
}

fn notebooks_in(folder: &Path) -> Result<Vec<PathBuf>> {
    // A link to a folder is not followed, for it may lead back.
    let entries = WalkDir::new(folder).sort_by_file_name().into_iter();
    // Jupyter's own copies of what was once saved, and whatever else is hidden.
    let is_hidden = |entry: &DirEntry| entry.depth() > 0 && entry.file_name().as_encoded_bytes().starts_with(b".");
    let entries = entries.filter_entry(|entry| !is_hidden(entry));
    let entries = entries.collect::<Result<Vec<_>, _>>();
    let entries = entries.with_context(|| format!("cannot read the folder {}", folder.display()))?;
    let files = entries.into_iter().filter(|entry| !entry.file_type().is_dir()).map(DirEntry::into_path);
    Ok(files.filter(|path| path.extension().is_some_and(|extension| extension == "ipynb")).collect())
}

/// Runs the jobs and tells `each` what they say, as it comes, until all are done.
pub fn run_all(jobs: &[Job], options: &Options, mut each: impl FnMut(usize, Said)) -> Result<()> {
    let layout = options.cell.installation.layout()?;
    layout.check()?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let at_once = options.jobs.map_or(cores, |jobs| usize::try_from(jobs).unwrap_or(usize::MAX));
    let memory = options.memory_mib.or_else(available_mib).unwrap_or(u64::MAX);
    let mut waiting: Vec<usize> = (0..jobs.len()).collect();
    let mut running: Vec<(usize, Option<Pid>)> = Vec::new();
    let (say, said) = unbounded();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let say = say.clone();
        processes::on_signal(signal, move || drop(say.send(Err(signal)))).context("cannot listen for signals")?;
    }
    while !waiting.is_empty() || !running.is_empty() {
        let needed: u64 = running.iter().map(|(job, _)| jobs[*job].memory_mib).sum();
        let fits = |job: &usize| running.is_empty() || needed.saturating_add(jobs[*job].memory_mib) <= memory;
        if running.len() < at_once
            && let Some(next) = waiting.iter().position(fits)
        {
            let job = waiting.remove(next);
            running.push((job, start(job, &jobs[job].path, &layout, options.cell.timeout, say.clone())));
            continue;
        }
        // Never without an answer, for `say` is alive.
        match said.recv()? {
            Ok((job, said)) => {
                if matches!(said, Said::Done { .. }) {
                    running.retain(|(other, _)| *other != job);
                }
                each(job, said);
            }
            // The processes that run cells stop, and what they have is written.
            Err(signal) => {
                eprintln!("\ncells are asked to stop; Ctrl-C once more, a second later, kills their processes");
                running.iter().filter_map(|(_, id)| *id).for_each(|id| _ = kill(id, signal));
                let done = || Said::Done { broken: Some("interrupted before it began".to_owned()), seconds: 0.0 };
                waiting.drain(..).for_each(|job| each(job, done()));
            }
        }
    }
    Ok(())
}

/// What the system can give without swapping; None where it does not say.
fn available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib / 1024)
}

/// Starts a notebook's process, and returns its id if it lives.
fn start(
    job: usize,
    path: &Path,
    layout: &Layout,
    timeout: Duration,
    say: Sender<Result<(usize, Said), Signal>>,
) -> Option<Pid> {
    let mut command = Command::new(std::env::current_exe().unwrap_or("qlora-nb".into()));
    command.arg(CELLS).arg(path).arg("--prefix").arg(&layout.prefix);
    command.arg("--timeout").arg(timeout.as_secs_f64().to_string());
    // A Ctrl-C in the terminal is for us, who pass it on.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    processes::end_together(&mut command, Signal::SIGTERM);
    let begin = Instant::now();
    let process = command.spawn();
    let id = process.as_ref().ok().map(|process| Pid::from_raw(process.id() as i32));
    thread::spawn(move || {
        let broken = match process {
            Ok(process) => listen(process, |report| drop(say.send(Ok((job, Said::Report(report)))))),
            Err(error) => Some(format!("cannot start a process for the notebook: {error}")),
        };
        let _ = say.send(Ok((job, Said::Done { broken, seconds: begin.elapsed().as_secs_f64() })));
    });
    id
}

/// Passes on what the process says until it ends, and returns why it broke down, if it did.
fn listen(mut process: Child, mut each: impl FnMut(Report)) -> Option<String> {
    let stderr = process.stderr.take();
    let stderr = thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.map(|mut stderr| stderr.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).trim().to_owned()
    });
    let mut has_ended = false;
    for line in process.stdout.take().map(|stdout| BufReader::new(stdout).lines()).into_iter().flatten() {
        // Anything else on the pipe is no report: evcxr's, or a library's.
        match line.ok().and_then(|line| serde_json::from_str(&line).ok()) {
            Some(Report::Ended) => has_ended = true,
            report => report.into_iter().for_each(&mut each),
        }
    }
    let status = process.wait();
    let stderr = stderr.join().unwrap_or_default();
    match status {
        Ok(status) if status.success() && has_ended => None,
        Ok(status) if status.code() == Some(2) => Some(stderr.trim_start_matches("qlora-nb: ").to_owned()),
        Ok(status) => Some(format!("the notebook's process stopped: {status}\n{stderr}").trim_end().to_owned()),
        Err(error) => Some(format!("the notebook's process is lost: {error}")),
    }
}

/// One line a cell.
pub struct Progress<'a> {
    pub jobs: &'a [Job],
}

impl Progress<'_> {
    pub fn ready(&self, job: usize, seconds: f64) {
        println!("{}ready    {seconds:>7.2} s", self.name(job));
    }

    pub fn cell(&self, job: usize, cell: usize, seconds: f64, state: impl Display) {
        let Job { notebook, cells, .. } = &self.jobs[job];
        let place = format!("{}/{}", self.jobs[job].number(cell), cells.len());
        let source = first_line(&notebook.source(cell));
        println!("{}{place:>8} {seconds:>7.2} s  {state:<7}  {source}", self.name(job));
    }

    /// Needed only where lines of several notebooks mix.
    fn name(&self, job: usize) -> String {
        let name = |job: &Job| job.path.display().to_string();
        let width = self.jobs.iter().map(|job| name(job).chars().count()).max().unwrap_or(0);
        if self.jobs.len() == 1 { String::new() } else { format!("{:<width$}  ", name(&self.jobs[job])) }
    }
}

/// The first line of a cell that is not a comment, cut to fit a terminal.
pub fn first_line(source: &str) -> String {
    let mut lines = source.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//"));
    let line = lines.next().unwrap_or_default();
    let cut: String = line.chars().take(60).collect();
    if cut.len() < line.len() { cut + "..." } else { cut }
}

/// Executes notebooks and writes what their cells showed.
pub fn run(RunOptions { options, output, write_types }: &RunOptions) -> Result<ExitCode> {
    let jobs = Job::all(&options.notebooks)?;
    let targets = targets(&jobs, output.as_deref())?;
    let progress = Progress { jobs: &jobs };
    let mut notebooks: Vec<Notebook> = jobs.iter().map(|job| job.notebook.clone()).collect();
    notebooks.iter_mut().for_each(Notebook::clear_outputs);
    let mut ran = vec![0; jobs.len()];
    let mut failed: Vec<Option<(usize, Failure)>> = jobs.iter().map(|_| None).collect();
    let mut all_well = true;
    let mut unwritten = Vec::new();
    run_all(&jobs, options, |i, said| match said {
        Said::Report(Report::Ready { seconds }) => progress.ready(i, seconds),
        Said::Report(Report::Skipped { cell }) => progress.cell(i, cell, 0.0, "skipped"),
        Said::Report(Report::Cell(CellRun { cell, count, seconds, outputs, failure, typed })) => {
            progress.cell(i, cell, seconds, if failure.is_some() { "FAILED" } else { "ok" });
            notebooks[i].set_outputs(cell, count, outputs);
            if let Some(source) = typed.filter(|_| *write_types) {
                notebooks[i].set_source(cell, &source);
            }
            ran[i] = count;
            failed[i] = failure.map(|failure| (cell, failure));
        }
        Said::Report(Report::Changed { cell, outputs }) => notebooks[i].replace_outputs(cell, outputs),
        Said::Report(Report::Ended) => {}
        Said::Done { broken, seconds } => {
            let path = jobs[i].path.display();
            let of = if jobs.len() == 1 { String::new() } else { format!("{path}: ") };
            let mut target = targets[i].display().to_string();
            if broken.is_some() && ran[i] == 0 {
                // Nothing ran, so what is stored still holds.
                target = "not written".to_owned();
            } else if let Err(error) = jobs[i].write(&notebooks[i], &targets[i]) {
                target = "not written".to_owned();
                unwritten.push(format!("{error:#}"));
            }
            all_well &= broken.is_none() && failed[i].is_none();
            if let Some((cell, failure)) = &failed[i] {
                eprintln!("{}", jobs[i].failure(*cell, failure));
            }
            if let Some(broken) = &broken {
                eprintln!("\n{path}: {broken}\n");
            }
            println!("{of}{} of {} cells in {seconds:.1} s -> {target}", ran[i], jobs[i].cells.len());
        }
    })?;
    if !unwritten.is_empty() {
        bail!("{}", unwritten.join("\n"));
    }
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where the executed notebooks go: where they came from, or into `output`, a folder if they are several.
fn targets(jobs: &[Job], output: Option<&Path>) -> Result<Vec<PathBuf>> {
    let Some(output) = output else { return Ok(jobs.iter().map(|job| job.path.clone()).collect()) };
    if jobs.len() == 1 && !output.is_dir() {
        return Ok(vec![output.to_owned()]);
    }
    if output.is_file() {
        bail!("-o {}: expected a folder for {} notebooks, got a file", output.display(), jobs.len());
    }
    let mut targets: Vec<PathBuf> = Vec::new();
    for job in jobs {
        let target = output.join(job.path.file_name().context("a notebook without a name")?);
        if targets.contains(&target) {
            bail!("two of the notebooks would be written to {}\nremedy: run them one by one", target.display());
        }
        targets.push(target);
    }
    Ok(targets)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
