//! Completion and inspection in the words of the Jupyter protocol.

use std::path::Path;

use serde_json::{Value, json};

use crate::session::Names;

pub struct Assistance;

impl Assistance {
    pub fn new(_prefix: &Path) -> Assistance {
        Assistance
    }

    /// Where the completed word begins, in bytes, and what may stand there.
    pub fn matches(&self, code: &str, at: usize, names: &Names, _ask: &dyn Fn(&str) -> Option<String>) -> (usize, Vec<String>) {
        let before = &code[..at];
        let start = before.rfind(|c: char| !c.is_alphanumeric() && c != '_').map_or(0, |at| at + 1);
        let all = names.variables.iter().map(|(name, _)| name).chain(&names.items);
        (start, all.filter(|name| name.starts_with(&before[start..])).cloned().collect())
    }

    pub fn complete(&self, code: &str, cursor: usize, names: &Names, _ask: &dyn Fn(&str) -> Option<String>) -> Value {
        let before: String = code.chars().take(cursor).collect();
        let start = before.rfind(|c: char| !c.is_alphanumeric() && c != '_').map_or(0, |at| at + 1);
        let prefix = &before[start..];
        let all = names.variables.iter().map(|(name, _)| name).chain(&names.items);
        let matches: Vec<&String> = all.filter(|name| name.starts_with(prefix)).collect();
        json!({ "status": "ok", "matches": matches, "metadata": {},
                "cursor_start": before[..start].chars().count(), "cursor_end": cursor })
    }

    pub fn inspect(&self, _code: &str, _cursor: usize, _names: &Names, _ask: &dyn Fn(&str) -> Option<String>) -> Value {
        json!({ "status": "ok", "found": false, "data": {}, "metadata": {} })
    }
}
