//! Progress of a long call: a bar in a terminal, whole lines elsewhere.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::{duration, rate, thousands};

/// In a log or a notebook: the first line comes late, so that a quick call says nothing, and
/// each later one after twice the time, up to half a minute.
const FIRST_LINE: Duration = Duration::from_secs(3);
const LONGEST_SILENCE: Duration = Duration::from_secs(30);

/// How far a long call has come, with the rate and the time left.
///
/// ```
/// use qlora_nb::display::Progress;
/// let progress = Progress::new("Map", 3, "rows");
/// for _ in 0..3 {
///     progress.inc(1);
/// }
/// progress.finish();
/// ```
#[derive(Debug)]
pub struct Progress {
    what: String,
    unit: &'static str,
    total: usize,
    bar: Option<ProgressBar>,
    silent: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Where this call began: a resumed one does not count what was done before.
    first: usize,
    done: usize,
    started: Instant,
    next_line: Duration,
    silence: Duration,
    lines: usize,
    message: String,
}

impl Progress {
    /// `what` names the call ("Map"), `unit` what is counted ("rows").
    pub fn new(what: &str, total: usize, unit: &'static str) -> Self {
        Self::starting_at(what, 0, total, unit)
    }

    /// Progress of a call that goes on where an earlier one stopped.
    pub fn starting_at(what: &str, first: usize, total: usize, unit: &'static str) -> Self {
        let bar = super::live_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
            // The template is a constant; were it wrong, indicatif's own style is good enough.
            if let Ok(style) = ProgressStyle::with_template("{wide_bar:.cyan} {msg}") {
                bar.set_style(style.progress_chars("━━╌"));
            }
            bar.set_position(first as u64);
            bar
        });
        let mut progress = Self::with(what, first, total, unit, false);
        progress.bar = bar;
        progress
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        Self::with("", 0, 0, "", true)
    }

    fn with(what: &str, first: usize, total: usize, unit: &'static str, silent: bool) -> Self {
        let state = State {
            first,
            done: first,
            started: Instant::now(),
            next_line: FIRST_LINE,
            silence: FIRST_LINE,
            lines: 0,
            message: String::new(),
        };
        Self { what: what.into(), unit, total, bar: None, silent, state: Mutex::new(state) }
    }

    /// Counts `n` more as done.
    pub fn inc(&self, n: usize) {
        self.update(|state| state.done += n);
    }

    /// Sets how much is done, and what else is worth a look ("loss 2.10, 1,234 tokens/s").
    pub fn set(&self, done: usize, message: impl Into<String>) {
        self.update(|state| {
            state.done = done;
            state.message = message.into();
        });
    }

    /// Prints a whole line, above the bar where there is one.
    pub fn line(&self, text: &str) {
        match &self.bar {
            _ if self.silent => {}
            Some(bar) => bar.suspend(|| eprintln_quietly(text)),
            None => eprintln_quietly(text),
        }
    }

    /// Takes the bar away; where lines were printed, prints the last one.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let state = self.state();
        if state.lines > 0 {
            eprintln_quietly(&self.describe(&state));
        }
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        if self.silent {
            return;
        }
        let mut state = self.state();
        change(&mut state);
        if let Some(bar) = &self.bar {
            bar.set_position(state.done as u64);
            bar.set_message(self.describe(&state));
        } else if state.started.elapsed() >= state.next_line && state.done < self.total {
            state.lines += 1;
            state.silence = (state.silence * 2).min(LONGEST_SILENCE);
            state.next_line = state.started.elapsed() + state.silence;
            eprintln_quietly(&self.describe(&state));
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// `Map: 1,000 of 5,000 rows, 1,234 rows/s, 0:03 left`.
    fn describe(&self, state: &State) -> String {
        let elapsed = state.started.elapsed();
        let per_second = (state.done - state.first.min(state.done)) as f64 / elapsed.as_secs_f64().max(1e-9);
        let left = self.total.saturating_sub(state.done) as f64 / per_second;
        let time = match Duration::try_from_secs_f64(left) {
            _ if state.done >= self.total => format!("in {}", duration(elapsed)),
            Ok(left) => format!("{} left", duration(left)),
            Err(_) => "? left".into(),
        };
        let (what, unit) = (&self.what, self.unit);
        let (done, total) = (thousands(state.done), thousands(self.total));
        let comma = if state.message.is_empty() { "" } else { ", " };
        format!("{what}: {done} of {total} {unit}{comma}{}, {} {unit}/s, {time}", state.message, rate(per_second))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn eprintln_quietly(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(first: usize, done: usize, total: usize, seconds: u64, message: &str) -> String {
        let progress = Progress::with("Training", first, total, "steps", false);
        let mut state = progress.state();
        state.done = done;
        state.message = message.into();
        state.started = Instant::now() - Duration::from_secs(seconds);
        progress.describe(&state)
    }

    #[test]
    fn a_line_says_rate_and_time_left() {
        let line = described(0, 100, 400, 50, "loss 2.10, 1,234 tokens/s");
        assert_eq!(line, "Training: 100 of 400 steps, loss 2.10, 1,234 tokens/s, 2.00 steps/s, 2:30 left");
        assert_eq!(described(0, 400, 400, 50, ""), "Training: 400 of 400 steps, 8.00 steps/s, in 0:50");
        assert_eq!(described(0, 0, 400, 5, ""), "Training: 0 of 400 steps, 0.00 steps/s, ? left");
    }

    #[test]
    fn a_resumed_call_counts_its_own_work_only() {
        assert_eq!(described(300, 350, 400, 50, ""), "Training: 350 of 400 steps, 1.00 steps/s, 0:50 left");
    }

    #[test]
    fn a_quick_call_says_nothing_and_a_slow_one_ever_more_rarely() {
        let progress = Progress::with("Map", 0, 1_000, "rows", false);
        progress.inc(10);
        assert_eq!(progress.state().lines, 0);
        let mut at = Vec::new();
        for second in 1..120 {
            progress.state().started = Instant::now() - Duration::from_secs(second);
            let before = progress.state().lines;
            progress.inc(1);
            if progress.state().lines > before {
                at.push(second);
            }
        }
        assert_eq!(at, [3, 10, 23, 48, 79, 110]);
    }
}
