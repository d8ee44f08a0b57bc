//! The output head and the loss.

use candle_core::{DType, Tensor};

use super::{
    super::{
        linear::{Linear, Weight},
        run::Run,
    },
    few, inputs, internal,
    linear::{adapted_backward, linear_to},
    name, rows,
};
use crate::{
    cuda::{self, KernelArg, address, uninit},
    error::Result,
};

/// Rows of logits that exist at a time.
const CHUNK_ROWS: usize = super::super::cross_entropy::GPU_CHUNK_ROWS;

/// The head's weight with as many rows as its memory has: those of a padded table are zeros, and a
/// product of a round size is faster.
fn head_rows(weight: &Weight) -> Result<usize> {
    let (n, k) = weight.dims2()?;
    match weight {
        Weight::Dense(t) => Ok((cuda::alloc(t)?.1 / k).min(n.next_multiple_of(64))),
        Weight::Quantized(_) => Ok(n),
    }
}

/// Logits in f32, `[rows, padded vocabulary]`.
pub fn head_logits(head: &Linear, x: &Tensor, run: &mut Run) -> Result<Tensor> {
    if few::serves(head, x, run)? && matches!(head.weight, Weight::Dense(_)) {
        return few::forward(head, x, DType::F32, &few::Around::default());
    }
    let n = head_rows(&head.weight)?;
    if head.lora.is_some() && head.weight.dims2()?.0 != n {
        return Err(internal("an adapter on a padded head"));
    }
    linear_to(head, x, None, (n, DType::F32), run)
}

/// The loss of the labelled rows of `hidden` (their sum to `loss`, f64 on the device) and, with
/// `learn` and any label at all, the gradient of `loss_scale` times it by `hidden`.
pub fn head_and_loss(hidden: &Tensor, head: &Linear, learn: bool, loss: u64, run: &Run) -> Result<Option<Tensor>> {
    let gpu = cuda::of(hidden.device())?;
    let inputs = inputs(run)?;
    let ((m, c), dtype, labels) = (hidden.dims2()?, hidden.dtype(), inputs.shape.labels);
    let (vocab, _) = head.weight.dims2()?;
    let losses = uninit(&gpu, labels.max(1), DType::F32)?;
    let losses_at = address(&losses)?;
    let labelled = rows(hidden, inputs.label_rows(), labels)?;
    let grads = learn.then(|| uninit(&gpu, (labels, c), dtype)).transpose()?;
    for begin in (0..labels).step_by(CHUNK_ROWS) {
        let count = CHUNK_ROWS.min(labels - begin);
        let x = labelled.narrow(0, begin, count)?;
        let mut chunk = Run {
            inputs: run.inputs,
            weights: run.weights,
            dropout_key: run.dropout_key,
            saved: learn.then(Default::default),
            ..Run::inference(run.sequences)
        };
        let logits = head_logits(head, &x, &mut chunk)?;
        let ld = logits.dims()[1];
        let dlogits = learn.then(|| uninit(&gpu, (count, ld), dtype)).transpose()?;
        let at = |base: u64, width: usize| base + (begin * width) as u64;
        let (logits_at, targets, chunk_losses) = (address(&logits)?, at(inputs.targets(), 4), at(losses_at, 4));
        let (grad_at, scale) = (dlogits.as_ref().map(address).transpose()?.unwrap_or(0), inputs.loss_scale());
        let (vocab_arg, ld_arg) = (vocab as i32, ld as i32);
        let args: [&dyn KernelArg; 7] = [&logits_at, &targets, &chunk_losses, &grad_at, &scale, &vocab_arg, &ld_arg];
        gpu.launch(&name("cross_entropy", dtype)?, (count, 1, 1), 1024, 0, &args)?;
        drop(logits);
        let (Some(dlogits), Some(grads)) = (dlogits, &grads) else { continue };
        adapted_backward(&gpu, head, &dlogits, Some(&grads.narrow(0, begin, count)?), &mut chunk)?;
    }
    let n = labels as i32;
    gpu.launch("sum_f64", (1, 1, 1), 256, 0, &[&losses_at, &loss, &n])?;
    match grads {
        Some(grads) if labels > 0 => rows(&grads, inputs.slots(), m).map(Some),
        _ => Ok(None),
    }
}
