//! The output head and the loss together, a few rows at a time.
//!
//! The logits of a long batch over a large vocabulary are the biggest tensor of a training
//! step (1024 tokens × 46145 words: 180 MiB in f32, and as much again for their gradient),
//! and only rows with a label need them. So the rows with a label are taken in chunks:
//! logits, loss and gradient of a chunk share one buffer of at most [`CHUNK`] elements.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{
    cpu::{F32View, math},
    linear::Linear,
    param::modify_f32,
    run::Run,
    sequences::{IGNORE_INDEX, Sequences},
};
use crate::error::Result;

/// Logits that exist at a time: 16 MiB of f32.
pub const CHUNK: usize = 1 << 22;

/// Rows of logits that exist at a time on a GPU.
pub const GPU_CHUNK_ROWS: usize = 256;

/// Rows of logits that exist at a time on the CPU.
pub fn chunk_rows(vocab_size: usize) -> usize {
    (CHUNK / vocab_size).max(16)
}

/// Sum of the cross-entropies of the rows of `hidden` `[M, C]` whose target is not -100, how
/// many they are and, when `grad_scale` is given, the gradient of `grad_scale * sum` by
/// `hidden`. The head's adapter, if it has one, gets its gradient too.
pub fn head_and_loss(
    hidden: &Tensor,
    head: &Linear,
    targets: &[i64],
    grad_scale: Option<f64>,
    dropout_key: Option<u64>,
) -> Result<(f64, usize, Option<Tensor>)> {
    let (m, c) = hidden.dims2()?;
    let (vocab, _) = head.weight.dims2()?;
    let labelled: Vec<usize> = (0..m).filter(|&i| targets[i] != IGNORE_INDEX).collect();
    let mut grad = grad_scale.map(|_| vec![0f32; m * c]);
    let mut sum = 0f64;
    let view = F32View::new(hidden)?;
    for (chunk, rows) in labelled.chunks(chunk_rows(vocab)).enumerate() {
        let mut x = Vec::with_capacity(rows.len() * c);
        rows.iter().for_each(|&i| x.extend_from_slice(&view[i * c..(i + 1) * c]));
        let x = Tensor::from_vec(x, (rows.len(), c), &Device::Cpu)?;
        let sequences = Sequences::new([rows.len()]);
        let mut run = match grad_scale {
            // A mask of its own for each chunk.
            Some(_) => Run::training(&sequences, dropout_key.map(|k| super::dropout::mix(k ^ chunk as u64))),
            None => Run::inference(&sequences),
        };
        let logits = head.forward(&x, None, &mut run)?;
        let mut losses = vec![0f64; rows.len()];
        modify_f32(&logits, |logits| {
            logits.par_chunks_exact_mut(vocab).zip(&mut losses).zip(rows).for_each(|((row, loss), &i)| {
                let target = targets[i] as usize;
                let logit = row[target];
                let (max, sum) = math::softmax(row);
                *loss = f64::from(max) - f64::from(logit) + f64::from(sum).ln();
                if let Some(scale) = grad_scale {
                    row[target] -= 1.0;
                    row.iter_mut().for_each(|p| *p *= scale as f32);
                }
            });
        })?;
        sum += losses.iter().sum::<f64>();
        if let Some(grad) = &mut grad
            && let Some(dx) = head.backward(&logits, true, &mut run)?
        {
            let dx = F32View::new(&dx)?;
            for (from, &i) in dx.chunks_exact(c).zip(rows) {
                grad[i * c..(i + 1) * c].copy_from_slice(from);
            }
        }
    }
    let grad = grad.map(|g| Tensor::from_vec(g, (m, c), &Device::Cpu)).transpose()?;
    Ok((sum, labelled.len(), grad))
}
