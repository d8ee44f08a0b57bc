//! Decoding while tokens arrive.

use super::Tokenizer;
use crate::error::Result;

/// Turns tokens into text as they come. A byte-level token may hold a part of a character (one
/// Chinese character is up to three tokens), so text is held back until it is whole.
///
/// All that `push` and `finish` give, put together, is what `decode` gives for the same tokens.
#[derive(Clone)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    ids: Vec<u32>,
    /// Where decoding starts: a token or two back, because how a token is written may depend on
    /// those before it (a leading space).
    context: usize,
    /// Everything before this token has been given out.
    given: usize,
}

impl DecodeStream {
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: tokenizer.clone(), skip_special_tokens: true, ids: Vec::new(), context: 0, given: 0 }
    }

    /// Writes special tokens out too.
    pub fn keep_special_tokens(mut self) -> Self {
        self.skip_special_tokens = false;
        self
    }

    /// Takes a token; gives the text that is now whole, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        self.give(false)
    }

    /// The rest: bytes that never became a character, as U+FFFD.
    pub fn finish(&mut self) -> Result<Option<String>> {
        self.give(true)
    }

    fn give(&mut self, unfinished_too: bool) -> Result<Option<String>> {
        let (before, all) = (self.text(self.given)?, self.text(self.ids.len())?);
        // U+FFFD stands for bytes that are not yet a character.
        if all.len() <= before.len() || all.ends_with('\u{fffd}') && !unfinished_too {
            return Ok(None);
        }
        self.context = self.given;
        self.given = self.ids.len();
        Ok(all.get(before.len()..).map(String::from))
    }

    fn text(&self, end: usize) -> Result<String> {
        self.tokenizer.decode(&self.ids[self.context..end], self.skip_special_tokens)
    }
}
