//! A check of tokenizer.json before `tokenizers` reads it.
//!
//! The tokens of a Unigram model become a tree as deep as the longest of them is long, and what frees the tree calls itself
//! as deep: a token of some thousand bytes would use up the stack.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// In bytes. SentencePiece makes tokens of at most a few dozen.
const LONGEST: usize = 1024;

#[derive(Deserialize)]
struct File {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    vocab: Longest,
}

/// The length of the longest token in a list of (token, score); 0 for the vocabularies of other models, which are maps.
struct Longest(usize);

impl<'de> Deserialize<'de> for Longest {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Tokens)
    }
}

struct Tokens;

impl<'de> Visitor<'de> for Tokens {
    type Value = Longest;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a vocabulary")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<Longest, A::Error> {
        let mut longest = 0;
        while let Some((token, _)) = tokens.next_element::<(String, IgnoredAny)>()? {
            longest = longest.max(token.len());
        }
        Ok(Longest(longest))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut tokens: A) -> Result<Longest, A::Error> {
        while tokens.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Longest(0))
    }
}

/// Refuses a token that is too long. What is no tokenizer.json at all is left to the reader's own words.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    match serde_json::from_slice(json) {
        Ok(File { model: Model { vocab: Longest(n) } }) if n > LONGEST => {
            Err(format!("a token of model.vocab has {n} bytes; expected at most {LONGEST}"))
        }
        _ => Ok(()),
    }
}
