//! The rows with a label, and the cross-entropy of their logits.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use candle_core::{Device, Tensor};

use super::{
    super::{Losses, run::Run, sequences::IGNORE_INDEX, slices},
    Cpu, F32View, math, team,
};
use crate::error::Result;

/// Logits that exist at a time: 32 MiB of f32.
const CHUNK: usize = 1 << 23;
/// Rows of them at least: the head's weight is read, widened and packed anew for each chunk.
const ROWS: usize = 128;

/// The rows with a label.
fn labelled<'a>(run: &Run<'a>) -> impl Iterator<Item = usize> + 'a {
    run.targets.iter().enumerate().filter(|(_, target)| **target != IGNORE_INDEX).map(|(row, _)| row)
}

fn rows_of(range: &Range<usize>, run: &Run) -> Vec<usize> {
    labelled(run).skip(range.start).take(range.len()).collect()
}

impl Losses for Cpu {
    fn logit_rows(&self, vocab_size: usize) -> usize {
        (CHUNK / vocab_size).max(ROWS)
    }

    fn num_labelled(&self, run: &Run) -> usize {
        labelled(run).count()
    }

    fn labelled_rows(&self, x: &Tensor, range: Range<usize>, run: &Run) -> Result<Tensor> {
        let (_, c) = x.dims2()?;
        let view = F32View::new(x)?;
        let mut out = Vec::with_capacity(range.len() * c);
        rows_of(&range, run).into_iter().for_each(|i| out.extend_from_slice(&view[i * c..(i + 1) * c]));
        Ok(Tensor::from_vec(out, (range.len(), c), &Device::Cpu)?)
    }

    /// In place: the logits become their gradient.
    fn cross_entropy(
        &self,
        logits: Tensor,
        vocab: usize,
        range: Range<usize>,
        learn: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>> {
        let rows = rows_of(&range, run);
        let (targets, scale) = (run.targets, run.grad_scale);
        let losses: Vec<AtomicU64> = rows.iter().map(|_| AtomicU64::new(0)).collect();
        slices::modify_f32(&logits, &mut |logits| {
            team::chunks(logits, vocab, |range, row| {
                let (i, loss) = (range.start / vocab, &losses[range.start / vocab]);
                let target = targets[rows[i]] as usize;
                let logit = row[target];
                let (max, sum) = math::softmax(row);
                let value = f64::from(max) - f64::from(logit) + f64::from(sum).ln();
                loss.store(value.to_bits(), Ordering::Relaxed);
                if learn {
                    row[target] -= 1.0;
                    row.iter_mut().for_each(|p| *p *= scale as f32);
                }
            });
        })?;
        run.loss_sum += losses.into_iter().map(|loss| f64::from_bits(loss.into_inner())).sum::<f64>();
        Ok(learn.then_some(logits))
    }

    fn unlabelled_rows(&self, chunks: Vec<Tensor>, run: &Run) -> Result<Tensor> {
        let c = chunks.first().map_or(Ok(0), |chunk| chunk.dims2().map(|(_, c)| c))?;
        let m = run.targets.len();
        let mut out = vec![0f32; m * c];
        let mut rows = labelled(run);
        for chunk in chunks {
            for (from, i) in F32View::new(&chunk)?.chunks_exact(c).zip(&mut rows) {
                out[i * c..(i + 1) * c].copy_from_slice(from);
            }
        }
        Ok(Tensor::from_vec(out, (m, c), &Device::Cpu)?)
    }
}
