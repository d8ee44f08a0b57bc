//! Step 6, first half: rows of different lengths become one batch.

use candle_core::{Device, Tensor};

pub use crate::batch::Batch;
use crate::{
    error::{Result, ensure},
    features::{Features, IGNORE_INDEX},
    tokenizer::{PaddingSide, Tokenizer},
};

/// Pads `input_ids`, `attention_mask` and `labels` to the longest row, on the tokenizer's side.
///
/// ```
/// use qlora_nb::{collator::DataCollatorForSeq2Seq, tokenizer::PaddingSide};
/// let collator = DataCollatorForSeq2Seq {
///     padding_side: PaddingSide::Left,
///     pad_token_id: Some(3),
///     pad_to_multiple_of: Some(8),
///     label_pad_token_id: -100,
/// };
/// # let _ = collator;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataCollatorForSeq2Seq {
    pub padding_side: PaddingSide,
    /// None when the tokenizer has no padding token; rows of one length need none.
    pub pad_token_id: Option<u32>,
    /// Rounds the length of a batch up; 8 suits tensor cores.
    pub pad_to_multiple_of: Option<usize>,
    /// -100 keeps the padding out of the loss.
    pub label_pad_token_id: i64,
}

impl DataCollatorForSeq2Seq {
    /// The padding of `tokenizer`; labels padded with -100.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self {
            padding_side: tokenizer.padding_side(),
            pad_token_id: tokenizer.pad_token_id(),
            pad_to_multiple_of: None,
            label_pad_token_id: IGNORE_INDEX,
        }
    }

    /// A batch on the CPU: `[B, T]` with T the longest row, rounded up to `pad_to_multiple_of`.
    ///
    /// # Errors
    /// [`EmptySequence`](crate::error::Error::EmptySequence) and
    /// [`UnequalLengths`](crate::error::Error::UnequalLengths), with the row's number in `rows`;
    /// [`InvalidArgument`](crate::error::Error::InvalidArgument) for no rows, and for padding without a padding token.
    pub fn collate(&self, rows: &[&Features]) -> Result<Batch> {
        let remedy = "check the batch size and the dataset";
        ensure(!rows.is_empty(), "rows", "none", "at least one row", remedy)?;
        rows.iter().enumerate().try_for_each(|(i, row)| row.check(i))?;
        let multiple = self.pad_to_multiple_of.unwrap_or(1);
        ensure(multiple > 0, "pad_to_multiple_of", multiple, "at least 1", "use 8, or None")?;
        let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let length = longest.next_multiple_of(multiple);
        let can_pad = self.pad_token_id.is_some() || rows.iter().all(|row| row.len() == length);
        let remedy = "give the tokenizer one: tokenizer.with_pad_token(\"<pad>\")";
        ensure(can_pad, "pad_token", "none", "a padding token: the rows differ in length", remedy)?;
        let shape = (rows.len(), length); // (B, T)
        let input_ids =
            self.padded(rows.iter().map(|row| row.input_ids.as_slice()), length, self.pad_token_id.unwrap_or(0));
        let attention_mask = self.padded(rows.iter().map(|row| row.attention_mask.as_slice()), length, 0);
        let labels = self.padded(rows.iter().map(|row| row.labels.as_slice()), length, self.label_pad_token_id);
        Batch::new(
            Tensor::from_vec(input_ids, shape, &Device::Cpu)?,
            Tensor::from_vec(attention_mask, shape, &Device::Cpu)?,
            Tensor::from_vec(labels, shape, &Device::Cpu)?,
        )
    }

    fn padded<'a, T: Copy + 'a>(&self, rows: impl Iterator<Item = &'a [T]>, length: usize, pad: T) -> Vec<T> {
        rows.flat_map(|row| self.padding_side.pad(row, length, pad)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn collator(padding_side: PaddingSide) -> DataCollatorForSeq2Seq {
        DataCollatorForSeq2Seq {
            padding_side,
            pad_token_id: Some(3),
            pad_to_multiple_of: None,
            label_pad_token_id: -100,
        }
    }

    fn row(ids: &[u32]) -> Features {
        Features {
            input_ids: ids.to_vec(),
            attention_mask: vec![1; ids.len()],
            labels: ids.iter().map(|&id| i64::from(id)).collect(),
        }
    }

    #[test]
    fn rows_are_padded_on_the_tokenizers_side() {
        let (a, b) = (row(&[5, 6, 7]), row(&[8]));
        let batch = collator(PaddingSide::Left).collate(&[&a, &b]).unwrap();
        assert_eq!(batch.input_ids.to_vec2::<u32>().unwrap(), [[5, 6, 7], [3, 3, 8]]);
        assert_eq!(batch.attention_mask.to_vec2::<u32>().unwrap(), [[1, 1, 1], [0, 0, 1]]);
        assert_eq!(batch.labels.to_vec2::<i64>().unwrap(), [[5, 6, 7], [-100, -100, 8]]);
        assert_eq!(batch.num_label_tokens(), 2);
        let right = DataCollatorForSeq2Seq { pad_to_multiple_of: Some(4), ..collator(PaddingSide::Right) };
        let batch = right.collate(&[&a, &b]).unwrap();
        assert_eq!(batch.input_ids.to_vec2::<u32>().unwrap(), [[5, 6, 7, 3], [8, 3, 3, 3]]);
        assert_eq!(batch.labels.to_vec2::<i64>().unwrap(), [[5, 6, 7, -100], [8, -100, -100, -100]]);
    }

    #[test]
    fn what_cannot_be_a_batch_is_refused() {
        let left = collator(PaddingSide::Left);
        let whole = row(&[1, 2]);
        assert!(matches!(left.collate(&[&whole, &row(&[])]).unwrap_err(), Error::EmptySequence { row: 1 }));
        let uneven = Features { labels: vec![1], ..whole.clone() };
        let error = left.collate(&[&uneven]).unwrap_err();
        assert!(matches!(error, Error::UnequalLengths { field: "labels", expected: 2, got: 1, .. }), "{error}");
        assert!(left.collate(&[]).is_err());
        let unpadded = DataCollatorForSeq2Seq { pad_token_id: None, ..left };
        assert!(unpadded.collate(&[&whole, &whole]).is_ok());
        assert!(unpadded.collate(&[&whole, &row(&[1])]).unwrap_err().to_string().contains("with_pad_token"));
    }
}
