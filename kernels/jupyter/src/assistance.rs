//! Completion and inspection in the words of the Jupyter protocol, which counts in characters and not in bytes.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::api::Api;
use crate::complete::{self, Completions};
use crate::layout::{API, Layout};
use crate::scope::{Names, Scope};
use crate::{inspect, own};

/// What is known of the library.
pub struct Assistance {
    pub api: Arc<Api>,
}

/// Tells the type of an expression.
pub type Ask<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Assistance {
    pub fn new(layout: &Layout) -> Assistance {
        Assistance { api: Arc::new(Api::load(&layout.at(API))) }
    }

    fn scope<'a>(&'a self, names: &'a Names, ask: Ask<'a>) -> Scope<'a> {
        Scope { api: &self.api, variables: &names.variables, items: &names.items, ask }
    }

    /// The names of earlier cells, and those that this one defines.
    fn with_own(names: &Names, code: &str) -> Names {
        let mut names = names.clone();
        own::learn(&mut names.items, code);
        names
    }

    /// Where the completed word begins, in bytes, and what may stand there.
    pub fn matches(&self, code: &str, at: usize, names: &Names, ask: Ask) -> Completions {
        complete::complete(&self.scope(&Self::with_own(names, code), ask), code, at)
    }

    /// The content of a `complete_reply`.
    pub fn complete(&self, code: &str, cursor: usize, names: &Names, ask: Ask) -> Value {
        let found = self.matches(code, byte_offset(code, cursor), names, ask);
        let (start, end) = (character(code, found.start), character(code, found.end));
        let typed = |m: &complete::Match| json!({ "text": m.text, "type": m.kind, "signature": m.signature, "start": start, "end": end });
        json!({
            "status": "ok",
            "matches": found.matches.iter().map(|m| &m.text).collect::<Vec<_>>(),
            "cursor_start": start,
            "cursor_end": end,
            "metadata": { "_jupyter_types_experimental": found.matches.iter().map(typed).collect::<Vec<_>>() },
        })
    }

    /// The content of an `inspect_reply`.
    pub fn inspect(&self, code: &str, cursor: usize, names: &Names, ask: Ask) -> Value {
        let found = inspect::inspect(&self.scope(&Self::with_own(names, code), ask), code, byte_offset(code, cursor));
        let data = found.as_ref().map_or(
            json!({}),
            |found| json!({ "text/plain": found.plain, "text/markdown": found.markdown, "text/html": found.html }),
        );
        json!({ "status": "ok", "found": found.is_some(), "data": data, "metadata": {} })
    }
}

/// The byte at which a character begins; the end for what lies beyond it.
fn byte_offset(code: &str, character: usize) -> usize {
    code.char_indices().nth(character).map_or(code.len(), |(byte, _)| byte)
}

fn character(code: &str, byte: usize) -> usize {
    code[..byte].chars().count()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn characters_are_counted_and_not_bytes() {
        let api = Arc::new(Api::load(Path::new("/nowhere")));
        let names = Names { variables: vec![("model".into(), "u8".into())], items: Vec::new() };
        let reply = Assistance { api }.complete("\"诗\"; mod", 8, &names, &|_| None);
        assert_eq!((reply["cursor_start"].as_u64(), reply["cursor_end"].as_u64()), (Some(5), Some(8)));
        assert_eq!(reply["matches"][0], "model");
        assert_eq!((byte_offset("诗a", 1), byte_offset("诗a", 9), character("诗a", 3)), (3, 4, 1));
    }
}
