//! How a progress bar looks, as a line of text and as HTML.

use std::time::Duration;

use super::{
    format::{duration, escape_html, rate, thousands},
    theme::{BLUE, FAINT, GREEN, ORANGE, RED, TEXT, TRACK},
};

/// Where a long call stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Running,
    /// It came back, though perhaps before all was done: the user asked for less.
    Finished,
    Interrupted,
    /// An error ended it.
    Stopped,
}

/// One state of a bar.
#[derive(Debug)]
pub(super) struct Bar {
    pub what: String,
    pub unit: &'static str,
    /// Where this call began: a resumed one does not count what was done before.
    pub first: usize,
    pub done: usize,
    pub total: usize,
    pub elapsed: Duration,
    pub message: String,
    pub stage: Stage,
}

impl Bar {
    /// `Map: 1,000 of 5,000 rows, 1,234 rows/s, 0:03 left`.
    pub fn text(&self) -> String {
        let comma = if self.message.is_empty() { "" } else { ", " };
        format!("{}: {}{comma}{}, {}", self.what, self.counts(), self.message, self.pace())
    }

    /// The same with a bar, for a light and for a dark page.
    pub fn html(&self) -> String {
        let color = match self.stage {
            Stage::Running => BLUE,
            Stage::Finished => GREEN,
            Stage::Interrupted => ORANGE,
            Stage::Stopped => RED,
        };
        let percent =
            if self.total == 0 { 100.0 } else { 100.0 * self.done.min(self.total) as f64 / self.total as f64 };
        let message = match self.message.as_str() {
            "" => String::new(),
            message => format!("<div style=\"{FAINT}\">{}</div>", escape_html(message)),
        };
        let (what, counts) = (escape_html(&self.what), escape_html(&self.counts()));
        format!(
            "<div style=\"{TEXT};max-width:640px;padding:.25em 0\">\
             <div style=\"display:flex;justify-content:space-between;gap:1em;font-variant-numeric:tabular-nums\">\
             <span><b>{what}</b>&ensp;{counts}</span><span style=\"{FAINT}\">{}</span></div>\
             <div role=\"progressbar\" aria-label=\"{what}\" aria-valuemin=\"0\" aria-valuemax=\"{}\" \
             aria-valuenow=\"{}\" style=\"{TRACK};height:8px;margin:4px 0\">\
             <div style=\"width:{percent:.1}%;height:100%;background:{color}\"></div></div>{message}</div>",
            self.pace(),
            self.total,
            self.done,
        )
    }

    /// `57 of 200 steps`, with how it ended if it did.
    fn counts(&self) -> String {
        let counts = format!("{} of {} {}", thousands(self.done), thousands(self.total), self.unit);
        let time = duration(self.elapsed);
        match self.stage {
            Stage::Running => counts,
            Stage::Finished => format!("{counts} in {time}"),
            Stage::Interrupted => format!("interrupted at {counts} after {time}"),
            Stage::Stopped => format!("stopped at {counts} after {time}"),
        }
    }

    fn per_second(&self) -> f64 {
        self.done.saturating_sub(self.first) as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// `2.00 steps/s`, and while it runs the time left.
    fn pace(&self) -> String {
        let speed = format!("{} {}/s", rate(self.per_second()), self.unit);
        if self.stage != Stage::Running {
            return speed;
        }
        let left = self.total.saturating_sub(self.done) as f64 / self.per_second();
        let left = Duration::try_from_secs_f64(left).map_or("?".into(), duration);
        format!("{speed}, {left} left")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(first: usize, done: usize, seconds: u64, stage: Stage) -> Bar {
        let elapsed = Duration::from_secs(seconds);
        let (what, message) = ("Training".into(), "loss 2.10".into());
        Bar { what, unit: "steps", first, done, total: 400, elapsed, message, stage }
    }

    #[test]
    fn a_line_says_rate_and_time_left_and_then_how_it_ended() {
        for (bar, expected) in [
            (bar(0, 100, 50, Stage::Running), "Training: 100 of 400 steps, loss 2.10, 2.00 steps/s, 2:30 left"),
            (bar(0, 400, 50, Stage::Finished), "Training: 400 of 400 steps in 0:50, loss 2.10, 8.00 steps/s"),
            (
                bar(0, 57, 19, Stage::Interrupted),
                "Training: interrupted at 57 of 400 steps after 0:19, loss 2.10, 3.00 steps/s",
            ),
            (
                bar(0, 57, 19, Stage::Stopped),
                "Training: stopped at 57 of 400 steps after 0:19, loss 2.10, 3.00 steps/s",
            ),
            (
                Bar { message: String::new(), ..bar(0, 0, 5, Stage::Running) },
                "Training: 0 of 400 steps, 0.00 steps/s, ? left",
            ),
            // A resumed call counts its own work only.
            (
                Bar { message: String::new(), ..bar(300, 350, 50, Stage::Running) },
                "Training: 350 of 400 steps, 1.00 steps/s, 0:50 left",
            ),
        ] {
            assert_eq!(bar.text(), expected);
        }
    }

    #[test]
    fn the_html_form_has_the_same_numbers_and_the_stage_as_colour() {
        let html = bar(0, 100, 50, Stage::Running).html();
        for part in ["<b>Training</b>", "100 of 400 steps", "2.00 steps/s, 2:30 left", "loss 2.10", "width:25.0%", BLUE]
        {
            assert!(html.contains(part), "{part} is missing from {html}");
        }
        assert!(bar(0, 400, 50, Stage::Finished).html().contains(GREEN));
        assert!(bar(0, 57, 50, Stage::Interrupted).html().contains(ORANGE));
        assert!(bar(0, 57, 50, Stage::Stopped).html().contains(RED));
        assert!(!html.contains("<script") && !html.contains("<style"));
        assert_eq!(html.matches("<div").count(), html.matches("</div>").count());
        let odd = Bar { what: "<b>".into(), message: "a < b".into(), total: 0, ..bar(0, 0, 0, Stage::Running) }.html();
        assert!(odd.contains("&lt;b&gt;") && odd.contains("a &lt; b") && odd.contains("width:100.0%"), "{odd}");
    }
}
