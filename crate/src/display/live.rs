//! An output that changes while the cell runs.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::protocol;

/// One output of a cell that can be replaced, wherever it stands. Only our kernel can do that:
/// elsewhere nothing is shown, and the caller prints lines instead ([`Live::is_possible`]).
///
/// ```
/// use qlora_nb::display::Live;
/// let live = Live::show(&[("text/html", "<b>0</b>"), ("text/plain", "0")], false);
/// for i in 1..=3 {
///     live.update(&[("text/html", format!("<b>{i}</b>")), ("text/plain", i.to_string())]);
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// None where nothing can be replaced.
    id: Option<String>,
    volatile: bool,
}

impl Live {
    /// Shows the forms, `(mime type, content)`. `volatile` says that two runs of the same cells
    /// show different things (times, rates), so that `qlora-nb test` does not compare them.
    pub fn show<S: AsRef<str>>(forms: &[(&str, S)], volatile: bool) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        if !protocol::is_spoken() {
            return Self { id: None, volatile };
        }
        // The kernel outlives the process that runs the cells: the number alone would come again.
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        protocol::output("display", Some(&id), forms, volatile);
        Self { id: Some(id), volatile }
    }

    /// Replaces what is shown.
    pub fn update<S: AsRef<str>>(&self, forms: &[(&str, S)]) {
        if let Some(id) = &self.id {
            protocol::output("update", Some(id), forms, self.volatile);
        }
    }

    /// Leaves the output empty.
    pub fn blank(&self) {
        self.update(&[("text/html", ""), ("text/plain", "")]);
    }

    /// Whether outputs can change here.
    pub fn is_possible() -> bool {
        protocol::is_spoken()
    }
}

/// Empties the output of the running cell; with `wait` not before the next output, so that
/// nothing flickers. Does nothing but under our kernel.
pub fn clear(wait: bool) {
    if protocol::is_spoken() {
        protocol::clear(wait);
    }
}

/// Says when something that changes often may be drawn again.
#[derive(Debug)]
pub(crate) struct Pace {
    every: Duration,
    last: Option<Instant>,
}

impl Pace {
    pub(crate) fn per_second(times: u32) -> Self {
        Self { every: Duration::from_secs(1) / times, last: None }
    }

    /// True at first, then at most so many times a second.
    pub(crate) fn is_due(&mut self) -> bool {
        let due = self.last.is_none_or(|last| last.elapsed() >= self.every);
        if due {
            self.last = Some(Instant::now());
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::{super::protocol::capture, *};

    #[test]
    fn an_update_goes_to_its_own_output() {
        let (_, sent) = capture::messages(|| {
            let a = Live::show(&[("text/plain", "a")], true);
            let b = Live::show(&[("text/plain", "b")], false);
            a.update(&[("text/plain", "c")]);
            b.blank();
            clear(false);
        });
        let ops: Vec<_> = sent.iter().map(|m| m["op"].as_str().unwrap()).collect();
        assert_eq!(ops, ["display", "display", "update", "update", "clear"]);
        assert_ne!(sent[0]["id"], sent[1]["id"]);
        assert_eq!((&sent[2]["id"], &sent[3]["id"]), (&sent[0]["id"], &sent[1]["id"]));
        assert_eq!(sent[2]["metadata"]["qlora_nb"]["volatile"], true, "an update replaces the metadata, too");
        assert_eq!(sent[3]["data"]["text/html"], "");
    }

    #[test]
    fn elsewhere_nothing_is_shown() {
        let live = Live::show(&[("text/plain", "a")], false);
        live.update(&[("text/plain", "b")]);
        assert_eq!(live.id, None);
        assert!(!Live::is_possible());
    }

    #[test]
    fn a_pace_lets_the_first_through_and_not_the_second() {
        let mut pace = Pace { every: Duration::MAX, last: None };
        assert!(pace.is_due());
        assert!(!pace.is_due());
    }
}
