//! Progress of a long call: a bar in a terminal and in a cell of our kernel, whole lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use super::{
    Live,
    bar::{Bar, Stage},
    error_line,
    live::Pace,
};
use crate::interrupt;

/// In a log: the first line comes late, so that a quick call says nothing, and each later one
/// after twice the time, up to half a minute.
const FIRST_LINE: Duration = Duration::from_secs(3);
const LONGEST_SILENCE: Duration = Duration::from_secs(30);
/// In a cell: a call as quick as this shows no bar; a longer one moves its bar so often.
const FIRST_BAR: Duration = Duration::from_millis(300);
const BARS_PER_SECOND: u32 = 10;

/// How far a long call has come, with the rate and the time left. In a cell the last state stays.
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
    place: Place,
    state: Mutex<State>,
}

/// Where progress is shown.
#[derive(Debug)]
enum Place {
    Nowhere,
    Terminal(ProgressBar),
    Lines,
    Cell,
}

#[derive(Debug)]
struct State {
    bar: Bar,
    started: Instant,
    lines: usize,
    next_line: Duration,
    silence: Duration,
    live: Option<Live>,
    pace: Pace,
}

impl State {
    /// Whether the next line is due, which is then taken as printed.
    fn line_is_due(&mut self, elapsed: Duration) -> bool {
        let due = elapsed >= self.next_line;
        if due {
            self.lines += 1;
            self.silence = (self.silence * 2).min(LONGEST_SILENCE);
            self.next_line = elapsed + self.silence;
        }
        due
    }

    /// The bar as it stands now.
    fn bar(&mut self) -> &Bar {
        self.bar.elapsed = self.started.elapsed();
        &self.bar
    }

    fn draw_in_cell(&mut self) {
        let bar = self.bar();
        let forms = [("text/html", bar.html()), ("text/plain", bar.text())];
        match &self.live {
            Some(live) => live.update(&forms),
            None => self.live = Some(Live::show(&forms, true)),
        }
    }
}

impl Progress {
    /// `what` names the call ("Map"), `unit` what is counted ("rows").
    pub fn new(what: &str, total: usize, unit: &'static str) -> Self {
        Self::starting_at(what, 0, total, unit)
    }

    /// Progress of a call that goes on where an earlier one stopped.
    pub fn starting_at(what: &str, first: usize, total: usize, unit: &'static str) -> Self {
        let place = if Live::is_possible() {
            Place::Cell
        } else if super::live_terminal() {
            Place::Terminal(terminal_bar(first, total))
        } else {
            Place::Lines
        };
        Self::at(place, what, first, total, unit)
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        Self::at(Place::Nowhere, "", 0, 0, "")
    }

    fn at(place: Place, what: &str, first: usize, total: usize, unit: &'static str) -> Self {
        let (message, elapsed, stage) = (String::new(), Duration::ZERO, Stage::Running);
        let state = State {
            bar: Bar { what: what.into(), unit, first, done: first, total, elapsed, message, stage },
            started: Instant::now(),
            lines: 0,
            next_line: FIRST_LINE,
            silence: FIRST_LINE,
            live: None,
            pace: Pace::per_second(BARS_PER_SECOND),
        };
        Self { place, state: Mutex::new(state) }
    }

    /// Counts `n` more as done.
    pub fn inc(&self, n: usize) {
        self.change(|state| state.bar.done += n);
    }

    /// Sets how much is done, and what else is worth a look ("loss 2.10, 1,234 tokens/s").
    pub fn set(&self, done: usize, message: impl Into<String>) {
        self.change(|state| {
            state.bar.done = done;
            state.bar.message = message.into();
        });
    }

    /// Moves the clock on while one step takes long.
    pub fn tick(&self) {
        self.change(|_| {});
    }

    /// Shows the bar of a cell now, before an output that belongs beneath it.
    pub fn show(&self) {
        let mut state = self.state.lock();
        if matches!(self.place, Place::Cell) && state.live.is_none() {
            state.draw_in_cell();
        }
    }

    /// Prints a whole line, above the bar where there is one. In a cell the bar says it all.
    pub fn line(&self, text: &str) {
        match &self.place {
            Place::Nowhere | Place::Cell => {}
            Place::Terminal(bar) => bar.suspend(|| error_line(text)),
            Place::Lines => error_line(text),
        }
    }

    /// The call is over. The bar of a terminal goes; where lines were printed there is a last one.
    pub fn finish(&self) {
        self.end(Stage::Finished);
    }

    /// Like [`finish`](Self::finish), when the user stopped the call; what is shown says so.
    pub fn interrupted(&self) {
        self.end(Stage::Interrupted);
    }

    fn end(&self, stage: Stage) {
        let mut state = self.state.lock();
        if state.bar.stage != Stage::Running {
            return;
        }
        state.bar.stage = stage;
        match &self.place {
            Place::Terminal(bar) => bar.finish_and_clear(),
            Place::Lines if state.lines > 0 => error_line(&state.bar().text()),
            Place::Cell if state.live.is_some() => state.draw_in_cell(),
            Place::Nowhere | Place::Lines | Place::Cell => {}
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        let elapsed = state.started.elapsed();
        match &self.place {
            Place::Terminal(bar) => {
                bar.set_position(state.bar.done as u64);
                bar.set_message(state.bar().text());
            }
            Place::Lines if state.bar.done < state.bar.total && state.line_is_due(elapsed) => {
                error_line(&state.bar().text());
            }
            Place::Cell if elapsed >= FIRST_BAR && state.pace.is_due() => state.draw_in_cell(),
            Place::Nowhere | Place::Lines | Place::Cell => {}
        }
    }
}

/// A call that ends without saying so was ended by an interrupt or an error.
impl Drop for Progress {
    fn drop(&mut self) {
        self.end(if interrupt::requested() { Stage::Interrupted } else { Stage::Stopped });
    }
}

fn terminal_bar(first: usize, total: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
    // The template is a constant; were it wrong, indicatif's own style is good enough.
    if let Ok(style) = ProgressStyle::with_template("{wide_bar:.cyan} {msg}") {
        bar.set_style(style.progress_chars("━━╌"));
    }
    bar.set_position(first as u64);
    bar
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{super::protocol::capture, *};

    #[test]
    fn a_quick_call_says_nothing_and_a_slow_one_ever_more_rarely() {
        let progress = Progress::at(Place::Lines, "Map", 0, 1_000, "rows");
        let mut state = progress.state.lock();
        let mut due = |tenths: u64| state.line_is_due(Duration::from_millis(100 * tenths));
        let at: Vec<u64> = (0..1200).filter(|tenths| due(*tenths)).collect();
        assert_eq!(at, [30, 90, 210, 450, 750, 1050]);
        assert_eq!(state.lines, 6);
    }

    /// What a cell shows of a call that has run for so many seconds.
    fn shown(seconds: u64, call: impl FnOnce(&Progress)) -> Vec<Value> {
        let ((), sent) = capture::messages(|| {
            let progress = Progress::new("Training", 200, "steps");
            progress.state.lock().started -= Duration::from_secs(seconds);
            call(&progress);
        });
        sent
    }

    fn text(message: &Value) -> &str {
        message["data"]["text/plain"].as_str().unwrap()
    }

    #[test]
    fn a_cell_shows_one_bar_that_keeps_its_last_state() {
        let sent = shown(21, |progress| {
            progress.set(57, "loss 2.10");
            // Too soon for another drawing, but the last one must come.
            progress.set(200, "loss 1.50");
            progress.finish();
        });
        assert_eq!(sent.len(), 2, "{sent:?}");
        assert_eq!((&sent[0]["op"], &sent[1]["op"]), (&"display".into(), &"update".into()));
        assert_eq!(sent[0]["id"], sent[1]["id"]);
        assert!(text(&sent[0]).starts_with("Training: 57 of 200 steps, loss 2.10, "), "{sent:?}");
        assert!(text(&sent[1]).starts_with("Training: 200 of 200 steps in 0:21, loss 1.50"), "{sent:?}");
        assert!(sent.iter().all(|m| m["metadata"]["qlora_nb"]["volatile"] == true));
        assert!(sent.iter().all(|m| m["data"]["text/html"].as_str().unwrap().contains("progressbar")));
    }

    #[test]
    fn a_quick_call_in_a_cell_shows_nothing() {
        let sent = shown(0, |progress| {
            // A machine may be so slow that this takes long; the clock is set back again.
            progress.state.lock().started = Instant::now() + Duration::from_secs(100);
            progress.set(200, "");
            progress.line("a line");
            progress.finish();
        });
        assert_eq!(sent, [] as [Value; 0]);
    }

    #[test]
    fn a_bar_says_that_its_call_was_stopped() {
        let sent = shown(9, |progress| {
            progress.set(57, "");
            progress.interrupted();
        });
        assert!(text(&sent[1]).starts_with("Training: interrupted at 57 of 200 steps after 0:09"), "{sent:?}");
        // An error leaves the call without a word.
        let sent = shown(9, |progress| progress.set(57, ""));
        assert!(text(&sent[1]).starts_with("Training: stopped at 57 of 200 steps"), "{sent:?}");
        assert_eq!(sent.len(), 2);
    }
}
