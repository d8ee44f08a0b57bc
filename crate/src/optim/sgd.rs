//! SGD as transformers' Trainer makes it for `optim="sgd"`: `torch.optim.SGD` without momentum.
//!
//! ```text
//! p -= lr * (g + weight_decay * p)
//! ```
//!
//! Within an ulp of the reference, whose sums and products are fused.

use candle_core::Tensor;

use super::{At, Part};
use crate::error::Result;

pub(super) fn parts(_: &[usize]) -> Vec<Part> {
    Vec::new()
}

pub(super) fn step(at: &At, p: &Tensor, g: &Tensor, _: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
    let update = (g + (p * at.hyperparameters.weight_decay)?)?;
    Ok(((p - (update * at.lr)?)?, Vec::new()))
}
