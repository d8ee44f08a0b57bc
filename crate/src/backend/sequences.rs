//! From a padded batch to packed rows, and back.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::{Tokens, slices::F32View};
use crate::error::{Error, Result};

/// The label that the loss ignores.
pub const IGNORE_INDEX: i64 = -100;

/// Where each sequence begins and ends in the packed rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequences {
    starts: Vec<usize>,
}

impl Sequences {
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut starts = vec![0];
        for length in lengths {
            starts.push(starts[starts.len() - 1] + length);
        }
        Self { starts }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Packed rows in all.
    pub fn num_tokens(&self) -> usize {
        self.starts[self.len()]
    }

    /// The last row of each sequence.
    pub fn last_rows(&self) -> Vec<u32> {
        self.ranges().map(|r| r.end as u32 - 1).collect()
    }

    /// The packed rows of each sequence.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.starts.windows(2).map(|w| w[0]..w[1])
    }
}

/// The real tokens of a padded batch `[B, T]`, row after row.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Token ids, `[M]`.
    pub ids: Vec<u32>,
    /// For each token the label of the NEXT position of its row, or -100.
    ///
    /// A label whose preceding position is padding has nothing to be predicted from and
    /// is left out. (transformers predicts it from the padding's own hidden state.)
    pub targets: Vec<i64>,
    /// The sequences, one a row of the batch.
    pub sequences: Sequences,
    /// (row, column) of each token in the batch.
    pub places: Vec<(usize, usize)>,
    shape: (usize, usize),
}

impl Packed {
    /// Packs `input_ids` (`[B, T]`, any integer dtype). `attention_mask` (1: a real token)
    /// and `labels` (-100: ignored) have the same shape; without a mask every token is real.
    pub fn new(
        input_ids: &Tensor,
        attention_mask: Option<&Tensor>,
        labels: Option<&Tensor>,
        vocab_size: usize,
    ) -> Result<Self> {
        let (b, t) = match input_ids.dims() {
            &[b, t] => (b, t),
            other => return Err(wrong_shape("input_ids", &[1, other.iter().product()], other)),
        };
        let ids = integers("input_ids", input_ids, (b, t))?;
        let mask = attention_mask.map(|m| integers("attention_mask", m, (b, t))).transpose()?;
        let labels = labels.map(|l| integers("labels", l, (b, t))).transpose()?;
        let mut packed = Self {
            ids: Vec::with_capacity(b * t),
            targets: Vec::with_capacity(b * t),
            sequences: Sequences::new([]),
            places: Vec::with_capacity(b * t),
            shape: (b, t),
        };
        let mut lengths = Vec::with_capacity(b);
        for row in 0..b {
            let before = packed.ids.len();
            for position in 0..t {
                let at = row * t + position;
                if mask.as_ref().is_some_and(|m| m[at] == 0) {
                    continue;
                }
                let id = ids[at];
                if id < 0 || id as usize >= vocab_size {
                    return Err(Error::TokenId { row, position, id, vocab_size });
                }
                let next = if position + 1 < t { labels.as_ref().map(|l| l[at + 1]) } else { None };
                let target = next.unwrap_or(IGNORE_INDEX);
                if target != IGNORE_INDEX && (target < 0 || target as usize >= vocab_size) {
                    return Err(Error::TokenId { row, position: position + 1, id: target, vocab_size });
                }
                packed.ids.push(id as u32);
                packed.targets.push(target);
                packed.places.push((row, position));
            }
            if packed.ids.len() == before {
                return Err(Error::EmptySequence { row });
            }
            lengths.push(packed.ids.len() - before);
        }
        packed.sequences = Sequences::new(lengths);
        Ok(packed)
    }

    /// The tokens as a pass takes them.
    pub fn tokens(&self) -> Tokens<'_> {
        Tokens { ids: &self.ids, targets: &self.targets, sequences: &self.sequences }
    }

    /// How many rows have a label.
    pub fn num_label_tokens(&self) -> usize {
        self.targets.iter().filter(|t| **t != IGNORE_INDEX).count()
    }

    /// Packed rows `[M, C]` as `[B, T, C]`; zeros where the batch has padding.
    pub fn unpack(&self, x: &Tensor) -> Result<Tensor> {
        let (_, width) = x.dims2()?;
        let (b, t) = self.shape;
        let x = F32View::new(x)?;
        let mut out = vec![0f32; b * t * width];
        for (row, &(i, j)) in x.chunks_exact(width).zip(&self.places) {
            out[(i * t + j) * width..][..width].copy_from_slice(row);
        }
        Ok(Tensor::from_vec(out, (b, t, width), &Device::Cpu)?)
    }
}

fn integers(name: &str, tensor: &Tensor, (b, t): (usize, usize)) -> Result<Vec<i64>> {
    if tensor.dims() != [b, t] {
        return Err(wrong_shape(name, &[b, t], tensor.dims()));
    }
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?)
}

fn wrong_shape(name: &str, expected: &[usize], got: &[usize]) -> Error {
    Error::shape(name, None, expected, got, "give input_ids, attention_mask and labels one shape, [batch, length]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_left_out_and_labels_are_shifted() -> Result<()> {
        let ids = Tensor::new(&[[9u32, 1, 2], [3, 4, 9]], &Device::Cpu)?;
        let mask = Tensor::new(&[[0u32, 1, 1], [1, 1, 0]], &Device::Cpu)?;
        let labels = Tensor::new(&[[-100i64, 1, 2], [3, 4, -100]], &Device::Cpu)?;
        let packed = Packed::new(&ids, Some(&mask), Some(&labels), 9)?;
        assert_eq!(packed.ids, [1, 2, 3, 4]);
        assert_eq!(packed.targets, [2, -100, 4, -100]);
        assert_eq!(packed.sequences.ranges().collect::<Vec<_>>(), [0..2, 2..4]);
        let back = packed.unpack(&Tensor::new(&[[1f32], [2.], [3.], [4.]], &Device::Cpu)?)?;
        assert_eq!(back.flatten_all()?.to_vec1::<f32>()?, [0., 1., 2., 3., 4., 0.]);
        assert!(matches!(Packed::new(&ids, None, None, 9), Err(Error::TokenId { row: 0, position: 0, id: 9, .. })));
        Ok(())
    }

    #[test]
    fn a_row_of_padding_alone_is_named() -> Result<()> {
        let ids = Tensor::new(&[[1u32], [2]], &Device::Cpu)?;
        let mask = Tensor::new(&[[1u32], [0]], &Device::Cpu)?;
        assert!(matches!(Packed::new(&ids, Some(&mask), None, 9), Err(Error::EmptySequence { row: 1 })));
        Ok(())
    }
}
