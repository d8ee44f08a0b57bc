//! The lines in which two texts differ, for people: `-` as stored, `+` as it is now, a little around them.

/// Lines shown before and after a difference.
const CONTEXT: usize = 2;
/// What is longer is cut: a page of HTML, a picture.
const MAX_LINES: usize = 40;
const MAX_CHARS: usize = 160;
/// Texts whose table of common lines would be larger are not aligned, only shown one after the other.
const MAX_TABLE: usize = 4_000_000;

#[derive(Clone, Copy)]
enum Step {
    Same(usize),
    Stored(usize),
    Now(usize),
}

/// No lines, if all lines are the `same`.
pub fn lines(stored: &[&str], now: &[&str], same: &dyn Fn(&str, &str) -> bool) -> Vec<String> {
    let steps = align(stored, now, same);
    let is_change = |step: &Step| !matches!(step, Step::Same(_));
    let mut shown = Vec::new();
    let mut last = None;
    for (i, step) in steps.iter().enumerate() {
        let around = &steps[i.saturating_sub(CONTEXT)..(i + CONTEXT + 1).min(steps.len())];
        if !around.iter().any(is_change) {
            continue;
        }
        if last.map_or(i > 0, |last| last + 1 < i) {
            shown.push(" ...".to_owned());
        }
        last = Some(i);
        shown.push(match *step {
            Step::Same(line) => format!(" {}", cut(now[line], 0)),
            Step::Stored(line) => format!("-{}", cut(stored[line], partner(&steps, i, stored, now))),
            Step::Now(line) => format!("+{}", cut(now[line], partner(&steps, i, stored, now))),
        });
    }
    if shown.len() > MAX_LINES {
        let more = shown.len() - MAX_LINES;
        shown.truncate(MAX_LINES);
        shown.push(format!(" ... and {more} more lines"));
    }
    shown
}

/// The longest common subsequence, after what both begin and end with.
fn align(stored: &[&str], now: &[&str], same: &dyn Fn(&str, &str) -> bool) -> Vec<Step> {
    let begin = stored.iter().zip(now).take_while(|(a, b)| same(a, b)).count();
    let rests = stored[begin..].iter().rev().zip(now[begin..].iter().rev());
    let end = rests.take_while(|(a, b)| same(a, b)).count();
    let (rows, columns) = (stored.len() - begin - end, now.len() - begin - end);
    let mut steps: Vec<Step> = (0..begin).map(Step::Same).collect();
    let (mut row, mut column) = (0, 0);
    if rows.saturating_mul(columns) <= MAX_TABLE {
        // common[r][c]: how many lines the rests from r and from c on have in common
        let mut common = vec![vec![0u32; columns + 1]; rows + 1];
        for r in (0..rows).rev() {
            for c in (0..columns).rev() {
                common[r][c] = match same(stored[begin + r], now[begin + c]) {
                    true => common[r + 1][c + 1] + 1,
                    false => common[r + 1][c].max(common[r][c + 1]),
                };
            }
        }
        while row < rows && column < columns {
            if same(stored[begin + row], now[begin + column]) {
                steps.push(Step::Same(begin + column));
                (row, column) = (row + 1, column + 1);
            } else if common[row + 1][column] >= common[row][column + 1] {
                steps.push(Step::Stored(begin + row));
                row += 1;
            } else {
                steps.push(Step::Now(begin + column));
                column += 1;
            }
        }
    }
    steps.extend((begin + row..begin + rows).map(Step::Stored));
    steps.extend((begin + column..now.len() - end).map(Step::Now));
    steps.extend((now.len() - end..now.len()).map(Step::Same));
    steps
}

/// Where a changed line begins to differ (in characters) from the line that it became, if one stands for the other.
fn partner(steps: &[Step], i: usize, stored: &[&str], now: &[&str]) -> usize {
    let begin = steps[..i].iter().rposition(|step| matches!(step, Step::Same(_))).map_or(0, |i| i + 1);
    let end = steps[i..].iter().position(|step| matches!(step, Step::Same(_))).map_or(steps.len(), |n| i + n);
    let run = &steps[begin..end];
    let old: Vec<usize> =
        run.iter().filter_map(|s| if let Step::Stored(line) = s { Some(*line) } else { None }).collect();
    let new: Vec<usize> = run.iter().filter_map(|s| if let Step::Now(line) = s { Some(*line) } else { None }).collect();
    let place = match steps[i] {
        Step::Stored(line) => old.iter().position(|l| *l == line),
        Step::Now(line) => new.iter().position(|l| *l == line),
        Step::Same(_) => None,
    };
    let Some((old, new)) = place.and_then(|n| Some((old.get(n)?, new.get(n)?))) else { return 0 };
    stored[*old].chars().zip(now[*new].chars()).take_while(|(a, b)| a == b).count()
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
