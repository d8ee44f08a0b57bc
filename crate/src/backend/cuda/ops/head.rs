//! The rows with a label, and the cross-entropy of their logits.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::{
    super::{KernelArg, address, of, uninit},
    card, concat_rows, inputs, name, rows,
};
use crate::{
    backend::{operands::Weight, run::Run},
    error::Result,
};

/// Rows of logits that exist at a time.
pub const CHUNK_ROWS: usize = 256;

/// Rows of a head's weight, those of its memory included: a padded table has rows of zeros behind its own, and a product
/// of a round size is faster.
pub fn head_rows(weight: &Weight) -> Result<usize> {
    let (n, k) = weight.dims2()?;
    match weight {
        Weight::Dense(t) => Ok((super::super::alloc(t)?.1 / k).min(n.next_multiple_of(64))),
        Weight::Quantized(_) => Ok(n),
    }
}

pub fn labelled_rows(x: &Tensor, range: Range<usize>, run: &Run) -> Result<Tensor> {
    rows(x, inputs(run)?.label_rows() + 4 * range.start as u64, range.len())
}

/// The losses go to the run's own place for them, `range` of it; gives the gradient of the logits in the dtype of the
/// activations.
pub fn cross_entropy(
    logits: &Tensor,
    vocab: usize,
    range: Range<usize>,
    learn: bool,
    run: &Run,
) -> Result<Option<Tensor>> {
    let (gpu, card) = (of(logits.device())?, card(run)?);
    let (count, ld) = logits.dims2()?;
    let dtype = card.activations;
    let dlogits = learn.then(|| uninit(gpu, (count, ld), dtype)).transpose()?;
    let at = |base: u64| base + 4 * range.start as u64;
    let (logits_at, targets, losses) = (address(logits)?, at(card.inputs.targets()), at(address(card.losses)?));
    let (grad_at, scale) = (dlogits.as_ref().map(address).transpose()?.unwrap_or(0), card.inputs.loss_scale());
    let (vocab, ld) = (vocab as i32, ld as i32);
    let args: [&dyn KernelArg; 7] = [&logits_at, &targets, &losses, &grad_at, &scale, &vocab, &ld];
    gpu.launch(&name("cross_entropy", dtype)?, (count, 1, 1), 1024, 0, &args)?;
    Ok(dlogits)
}

pub fn unlabelled_rows(chunks: &[Tensor], run: &Run) -> Result<Tensor> {
    let inputs = inputs(run)?;
    rows(&concat_rows(chunks)?, inputs.slots(), inputs.shape.rows)
}

/// The place of the losses of a pass: one a row with a label.
pub fn losses(gpu: &super::super::Gpu, labels: usize) -> Result<Tensor> {
    uninit(gpu, labels.max(1), DType::F32)
}
