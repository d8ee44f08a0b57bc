//! The lines in which two texts differ, for people: `-` as stored, `+` as it is now, a little around them.

use std::time::{Duration, Instant};

use similar::algorithms::{Capture, Replace, myers};
use similar::{DiffOp, group_diff_ops};

/// Lines shown before and after a difference.
const CONTEXT: usize = 2;
/// What is longer is cut: a page of HTML, a picture.
const MAX_LINES: usize = 40;
const MAX_CHARS: usize = 160;
/// Texts that take longer are not aligned any further, only shown one after the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// A line that is equal to another if the texts' reader takes them for the same. That is no equivalence: of three numbers
/// the first and the last may be too far apart. So the algorithm must be one that only compares stored lines with new ones.
struct Line<'a> {
    text: &'a str,
    same: &'a dyn Fn(&str, &str) -> bool,
}

impl PartialEq for Line<'_> {
    fn eq(&self, other: &Line) -> bool {
        (self.same)(self.text, other.text)
    }
}

/// No lines, if all lines are the `same`.
pub fn lines(stored: &[&str], now: &[&str], same: &dyn Fn(&str, &str) -> bool) -> Vec<String> {
    let old: Vec<Line> = stored.iter().map(|text| Line { text, same }).collect();
    let new: Vec<Line> = now.iter().map(|text| Line { text, same }).collect();
    let mut steps = Replace::new(Capture::new());
    let deadline = Instant::now() + PATIENCE;
    // Its errors are the hook's, which has none.
    let _ = myers::diff_deadline_raw(&mut steps, &old, 0..old.len(), &new, 0..new.len(), Some(deadline));
    let mut shown = Vec::new();
    for group in group_diff_ops(steps.into_inner().into_ops(), CONTEXT) {
        // Lines are left out between two groups, and before the first one if it begins later.
        if !shown.is_empty() || group.first().is_some_and(|step| step.new_range().start > 0) {
            shown.push(" ...".to_owned());
        }
        group.iter().for_each(|step| show(step, stored, now, &mut shown));
    }
    if shown.len() > MAX_LINES {
        let more = shown.len() - MAX_LINES;
        shown.truncate(MAX_LINES);
        shown.push(format!(" ... and {more} more lines"));
    }
    shown
}

fn show(step: &DiffOp, stored: &[&str], now: &[&str], shown: &mut Vec<String>) {
    let (old, new) = (&stored[step.old_range()], &now[step.new_range()]);
    if let DiffOp::Equal { .. } = step {
        shown.extend(new.iter().map(|line| format!(" {}", cut(line, 0))));
        return;
    }
    // Where a line begins to differ (in characters) from the one that it became, if one stands for the other.
    let place = |i: usize| match (old.get(i), new.get(i)) {
        (Some(old), Some(new)) => old.chars().zip(new.chars()).take_while(|(a, b)| a == b).count(),
        _ => 0,
    };
    shown.extend(old.iter().enumerate().map(|(i, line)| format!("-{}", cut(line, place(i)))));
    shown.extend(new.iter().enumerate().map(|(i, line)| format!("+{}", cut(line, place(i)))));
}

/// A window of a long line that shows what is at `at`. Control characters are made visible.
fn cut(line: &str, at: usize) -> String {
    let visible = |c: char| if c.is_control() && c != '\t' { c.escape_default().to_string() } else { c.to_string() };
    let length = line.chars().count();
    if length <= MAX_CHARS {
        return line.chars().map(visible).collect();
    }
    let begin = at.saturating_sub(MAX_CHARS / 3).min(length - MAX_CHARS);
    let window: String = line.chars().skip(begin).take(MAX_CHARS).map(visible).collect();
    let before = if begin > 0 { "..." } else { "" };
    let after = if begin + MAX_CHARS < length { "..." } else { "" };
    format!("{before}{window}{after}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diff(stored: &str, now: &str) -> Vec<String> {
        let (stored, now): (Vec<_>, Vec<_>) = (stored.lines().collect(), now.lines().collect());
        lines(&stored, &now, &|a, b| a == b)
    }

    #[test]
    fn shows_changes_with_a_little_around_them() {
        assert_eq!(diff("a\nb\nc", "a\nb\nc"), [""; 0]);
        assert_eq!(diff("a\nb\nc", "a\nX\nc"), [" a", "-b", "+X", " c"]);
        assert_eq!(diff("", "new"), ["+new"]);
        assert_eq!(diff("1\n2\n3\n4\n5\n6\n7\n8\n9", "1\n2\n3\n4\n5\n6\n7\n9"), [" ...", " 6", " 7", "-8", " 9"]);
        let far = diff("x\n1\n2\n3\n4\n5\n6\ny", "X\n1\n2\n3\n4\n5\n6\nY");
        assert_eq!(far, ["-x", "+X", " 1", " 2", " ...", " 5", " 6", "-y", "+Y"]);
    }

    #[test]
    fn is_short_whatever_the_texts() {
        let (a, b) = ("a".repeat(50_000) + "1" + &"b".repeat(50_000), "a".repeat(50_000) + "2" + &"b".repeat(50_000));
        let shown = diff(&a, &b);
        assert_eq!(shown.len(), 2);
        assert!(shown.iter().all(|line| line.len() < 200), "{shown:?}");
        assert!(shown[0].contains("a1b") && shown[1].contains("a2b"), "{shown:?}");
        let many = diff(&"old\n".repeat(3000), &"new\n".repeat(3000));
        assert_eq!(many.len(), MAX_LINES + 1);
        assert_eq!(many.last().map(String::as_str), Some(" ... and 5960 more lines"));
        assert_eq!(diff("\u{1b}[31mred", "red"), ["-\\u{1b}[31mred", "+red"]);
    }
}
