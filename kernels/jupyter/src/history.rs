//! What was executed, for clients that ask: consoles, and JupyterLab's history search.

use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};

/// What is asked for, in the protocol's words.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Request {
    /// `tail`, `search`, or a range for anything else.
    hist_access_type: String,
    output: bool,
    session: Option<i32>,
    start: Option<i32>,
    stop: Option<i32>,
    n: Option<i32>,
    pattern: Option<String>,
    unique: bool,
}

/// One cell.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub line: i32,
    pub input: String,
    pub output: String,
}

#[derive(Default)]
pub struct History {
    entries: Vec<Entry>,
}

impl History {
    pub fn add(&mut self, line: i32, input: &str, output: &str) {
        self.entries.push(Entry { line, input: input.to_owned(), output: output.to_owned() });
    }

    /// The content of a `history_reply`.
    pub fn answer(&self, asked: &Request) -> Value {
        let entries = match asked.hist_access_type.as_str() {
            "tail" => self.tail(asked.n.unwrap_or(i32::MAX)),
            "search" => self.search(asked.pattern.as_deref().unwrap_or("*"), asked.unique, asked.n.unwrap_or(0)),
            _ => self.range(asked.session.unwrap_or(0), asked.start.unwrap_or(0), asked.stop.unwrap_or(0)),
        };
        // Of session 0, the one that is running: nothing is kept beyond it.
        let line = |Entry { line, input, output }: &Entry| match asked.output {
            true => json!([0, line, [input, output]]),
            false => json!([0, line, input]),
        };
        json!({ "status": "ok", "history": entries.into_iter().map(line).collect::<Vec<_>>() })
    }

    /// The last `n`.
    pub fn tail(&self, n: i32) -> Vec<&Entry> {
        let n = usize::try_from(n).unwrap_or(0);
        self.entries.iter().skip(self.entries.len().saturating_sub(n)).collect()
    }

    /// Lines `start` up to `stop`, which is not one of them; 0 or less as `stop` means the end.
    pub fn range(&self, session: i32, start: i32, stop: i32) -> Vec<&Entry> {
        let of_range = |entry: &&Entry| entry.line >= start && (stop <= 0 || entry.line < stop);
        // A session of the past, which is counted from -1 back, is not there.
        self.entries.iter().filter(|_| session == 0).filter(of_range).collect()
    }

    /// The last `n` that match a pattern in which `*` and `?` stand for any text and any character; `n` of 0 or less
    /// means all.
    pub fn search(&self, pattern: &str, unique: bool, n: i32) -> Vec<&Entry> {
        let regex = regex::escape(pattern).replace(r"\*", ".*").replace(r"\?", ".");
        // A pattern of megabytes is none.
        let Ok(regex) = Regex::new(&format!("(?s)^{regex}$")) else { return Vec::new() };
        let mut found: Vec<&Entry> = Vec::new();
        for entry in self.entries.iter().rev() {
            let is_old = unique && found.iter().any(|other| other.input == entry.input);
            if !is_old && regex.is_match(&entry.input) {
                found.push(entry);
            }
        }
        if let Ok(n @ 1..) = usize::try_from(n) {
            found.truncate(n);
        }
        found.reverse();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(entries: Vec<&Entry>) -> Vec<i32> {
        entries.into_iter().map(|entry| entry.line).collect()
    }

    #[test]
    fn finds_what_was_asked_for() {
        let mut history = History::default();
        for (line, input) in [(1, "let a = 1;"), (2, "a + 1"), (3, "let b = 2;"), (4, "a + 1")] {
            history.add(line, input, "");
        }
        assert_eq!(lines(history.tail(2)), [3, 4]);
        assert_eq!(lines(history.tail(9)), [1, 2, 3, 4]);
        assert_eq!(lines(history.range(0, 2, 4)), [2, 3]);
        assert_eq!(lines(history.range(0, 3, 0)), [3, 4]);
        assert!(lines(history.range(-1, 0, 9)).is_empty());
        assert_eq!(lines(history.search("let*", false, 0)), [1, 3]);
        assert_eq!(lines(history.search("a ? 1", false, 0)), [2, 4]);
        assert_eq!(lines(history.search("a*", true, 0)), [4]);
        assert_eq!(lines(history.search("*", false, 1)), [4]);
        assert!(lines(history.search("let", false, 0)).is_empty());
    }
}
