//! What a pass that learns keeps, seen in one.

use candle_core::Tensor;

use crate::backend::run::Saved;

/// What a block needs for each token of a pass that learns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// Bytes that wait for their backward.
    pub saved: usize,
    /// Activations that exist for a while, at the widest point of the backward.
    pub working: usize,
}

impl Needs {
    /// Tokens of the pass that shows it: as many rows as every device pads to.
    pub const TOKENS: usize = 64;

    /// Of what a pass of [`Needs::TOKENS`] saved. A tensor that two operations save is there once.
    pub fn of(saved: &Saved, working: usize) -> Self {
        let mut tensors: Vec<&Tensor> = saved.iter().map(|(_, tensor)| tensor).collect();
        tensors.sort_by_key(|t| format!("{:?}", t.id()));
        tensors.dedup_by_key(|t| t.id());
        let bytes: usize = tensors.iter().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum();
        Self { saved: bytes / Self::TOKENS, working }
    }
}
