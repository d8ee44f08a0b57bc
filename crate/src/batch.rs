//! What a training or evaluation step takes: rows of equal length as tensors.

use candle_core::{DType, Device, Tensor};

use crate::{
    backend::sequences::IGNORE_INDEX,
    error::{Error, Result},
};

/// Rows padded to one length. All tensors are `[B, T]` and on one device.
#[derive(Clone, Debug)]
pub struct Batch {
    /// u32.
    pub input_ids: Tensor,
    /// u32; 1 for a real token, 0 for padding.
    pub attention_mask: Tensor,
    /// i64, unshifted; -100 is left out of the loss.
    pub labels: Tensor,
    num_label_tokens: usize,
}

impl Batch {
    /// Checks shapes and dtypes, and counts the labels.
    pub fn new(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Result<Self> {
        let expected = input_ids.dims().to_vec();
        for (name, tensor, dtype) in [
            ("input_ids", &input_ids, DType::U32),
            ("attention_mask", &attention_mask, DType::U32),
            ("labels", &labels, DType::I64),
        ] {
            if tensor.dtype() != dtype {
                let got = format!("{:?}", tensor.dtype());
                return Err(Error::argument(name, got, &format!("dtype {dtype:?}"), "convert it with to_dtype"));
            }
            if tensor.rank() != 2 || tensor.dims() != expected {
                let remedy = "give input_ids, attention_mask and labels the one shape [batch, length]";
                return Err(Error::shape(name, None, &expected, tensor.dims(), remedy));
            }
        }
        // The model predicts position t + 1 at t: a label without a real token before it (the first
        // of a row, padded or not) is never asked for.
        let counted = |(labels, mask): (&Vec<i64>, &Vec<u32>)| {
            labels.iter().skip(1).zip(mask).filter(|(label, mask)| **label != IGNORE_INDEX && **mask != 0).count()
        };
        let num_label_tokens =
            labels.to_vec2::<i64>()?.iter().zip(&attention_mask.to_vec2::<u32>()?).map(counted).sum();
        Ok(Self { input_ids, attention_mask, labels, num_label_tokens })
    }

    /// The number of labels that enter the loss, `labels[:, 1:] != -100` after a real token: what
    /// the sum of the token losses is divided by.
    pub fn num_label_tokens(&self) -> usize {
        self.num_label_tokens
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.input_ids.dims().first().copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The padded length of the rows.
    pub fn seq_len(&self) -> usize {
        self.input_ids.dims().get(1).copied().unwrap_or(0)
    }

    /// The same batch on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            input_ids: self.input_ids.to_device(device)?,
            attention_mask: self.attention_mask.to_device(device)?,
            labels: self.labels.to_device(device)?,
            num_label_tokens: self.num_label_tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(labels: &[[i64; 3]]) -> Result<Batch> {
        let ids = Tensor::ones((labels.len(), 3), DType::U32, &Device::Cpu)?;
        Batch::new(ids.clone(), ids, Tensor::from_vec(labels.concat(), (labels.len(), 3), &Device::Cpu)?)
    }

    #[test]
    fn the_first_label_of_a_row_is_not_counted() {
        assert_eq!(batch(&[[7, 8, 9], [5, -100, 6]]).unwrap().num_label_tokens(), 3);
        assert_eq!(batch(&[[7, -100, -100]]).unwrap().num_label_tokens(), 0);
    }

    #[test]
    fn shapes_and_dtypes_are_checked() {
        let ids = Tensor::ones((2, 3), DType::U32, &Device::Cpu).unwrap();
        let labels = Tensor::ones((2, 4), DType::I64, &Device::Cpu).unwrap();
        let error = Batch::new(ids.clone(), ids.clone(), labels).unwrap_err();
        assert!(matches!(error, Error::Shape { ref name, .. } if name == "labels"), "{error}");
        let error = Batch::new(ids.clone(), ids.clone(), ids).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { ref name, .. } if name == "labels"), "{error}");
    }
}
