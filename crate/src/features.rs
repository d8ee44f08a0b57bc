//! What a model is fed: token ids, which of them are real, and what to predict.

use std::cell::Cell;

use crate::error::{Error, Result};

pub use crate::backend::sequences::IGNORE_INDEX;

/// What a tokenizer makes of one text: `input_ids` and `attention_mask`, one entry a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    pub input_ids: Vec<u32>,
    /// 1 for a real token, 0 for padding.
    pub attention_mask: Vec<u32>,
}

impl Encoding {
    /// The number of tokens, padding included.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }
}

/// One training row: three fields with one entry a token.
///
/// ```
/// use qlora_nb::tokenizer::{Encoding, Features};
/// let prompt = Encoding { input_ids: vec![5, 6], attention_mask: vec![1, 1] };
/// let answer = Encoding { input_ids: vec![7, 8, 2], attention_mask: vec![1, 1, 1] };
/// let features = Features::supervised(&prompt, &answer, 4);
/// assert_eq!(features.input_ids, [5, 6, 7, 8]);
/// assert_eq!(features.labels, [-100, -100, 7, 8]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features {
    pub input_ids: Vec<u32>,
    /// 1 for a real token, 0 for padding.
    pub attention_mask: Vec<u32>,
    /// The token to predict at each position, unshifted (the model shifts); -100 is left out of the loss.
    pub labels: Vec<i64>,
}

impl Features {
    /// Prompt and answer as one sequence that teaches the answer only: labels are -100 on the
    /// prompt. Everything after `max_length` tokens is cut off; [`map`](crate::dataset::Dataset::map)
    /// counts the rows that lost something and says so.
    pub fn supervised(prompt: &Encoding, answer: &Encoding, max_length: usize) -> Self {
        let mut input_ids = [prompt.input_ids.as_slice(), &answer.input_ids].concat();
        let mut attention_mask = [prompt.attention_mask.as_slice(), &answer.attention_mask].concat();
        let mut labels = vec![IGNORE_INDEX; prompt.len()];
        labels.extend(answer.input_ids.iter().map(|&id| i64::from(id)));
        if input_ids.len() > max_length {
            WAS_CUT.set(true);
            input_ids.truncate(max_length);
            attention_mask.truncate(max_length);
            labels.truncate(max_length);
        }
        Self { input_ids, attention_mask, labels }
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// Whether any token is predicted: a label that is not -100 after the first position.
    pub fn has_labels(&self) -> bool {
        self.labels.iter().skip(1).any(|&label| label != IGNORE_INDEX)
    }

    /// Refuses a row without tokens or with fields of different lengths.
    pub fn check(&self, row: usize) -> Result<()> {
        if self.input_ids.is_empty() {
            return Err(Error::EmptySequence { row });
        }
        for (field, got) in [("attention_mask", self.attention_mask.len()), ("labels", self.labels.len())] {
            if got != self.len() {
                return Err(Error::UnequalLengths { row, field, expected: self.len(), got });
            }
        }
        if self.attention_mask.iter().all(|&real| real == 0) {
            return Err(Error::EmptySequence { row });
        }
        Ok(())
    }
}

thread_local! {
    /// `Features` is a plain struct that users fill in by hand and their own functions return, so that a row was cut can
    /// be no field of it and no second value beside it.
    static WAS_CUT: Cell<bool> = const { Cell::new(false) };
}

/// What `make` gives, and whether [`Features::supervised`] cut a row in it.
pub(crate) fn noting_cuts<T>(make: impl FnOnce() -> T) -> (T, bool) {
    WAS_CUT.set(false);
    let made = make();
    (made, WAS_CUT.get())
}
