//! The output head and the loss together, a few rows at a time.
//!
//! The logits of a long batch over a large vocabulary are the biggest tensor of a training step (1024 tokens x 46145
//! words: 180 MiB in f32, and as much again for their gradient), and only rows with a label need them. So the rows with a
//! label are taken in chunks, whose logits, loss and gradient exist one after another.

use candle_core::Tensor;

use super::Linear;
use crate::{
    backend::{
        dropout,
        run::{Run, Saved},
    },
    error::Result,
};

/// Adds the cross-entropies of the rows of `hidden` `[M, C]` that have a label to the run's loss and, with `learn`, gives
/// the gradient of their sum, times the run's scale, by `hidden`; `None` where nothing has a label. The head's adapter,
/// if it has one, gets its gradient too.
pub fn head_and_loss(hidden: &Tensor, head: &Linear, learn: bool, run: &mut Run) -> Result<Option<Tensor>> {
    let backend = run.backend;
    let (vocab, _) = head.weight().dims2()?;
    let (labelled, step) = (backend.num_labelled(run), backend.logit_rows(vocab));
    let key = run.dropout_key;
    let mut grads = Vec::new();
    for (chunk, begin) in (0..labelled).step_by(step).enumerate() {
        run.check_stop()?;
        let range = begin..labelled.min(begin + step);
        let x = backend.labelled_rows(hidden, range.clone(), run)?; // (chunk, C)
        // A mask of its own for each chunk.
        run.dropout_key = key.map(|key| dropout::mix(key ^ chunk as u64)).filter(|_| learn);
        let dx = run.with_saved(learn.then(Saved::default), |run| {
            let logits = head.forward_logits(&x, run)?; // (chunk, vocab)
            match backend.cross_entropy(logits, vocab, range, learn, run)? {
                Some(dlogits) => head.backward(&dlogits, true, run),
                None => Ok(None),
            }
        })?;
        run.dropout_key = key;
        grads.extend(dx);
    }
    if grads.is_empty() {
        return Ok(None);
    }
    backend.unlabelled_rows(grads, run).map(Some)
}
