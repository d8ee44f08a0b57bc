//! What the layers share during one pass.

use candle_core::Tensor;

use super::{kv_cache::KvCache, sequences::Sequences};
use crate::error::Result;

/// One pass over a batch: which tokens belong together, and what is kept.
pub struct Run<'a> {
    /// Where each sequence begins in the packed rows.
    pub sequences: &'a Sequences,
    /// `Some`: layers push what their backward needs.
    pub saved: Option<Saved>,
    /// Names the dropout masks of this pass; `None`: no dropout.
    pub dropout_key: Option<u64>,
    /// `Some`: keys and values are appended to the cache and attention reads from there.
    pub cache: Option<&'a mut KvCache>,
    /// The block that runs, for the cache.
    pub block: usize,
    /// What the batch is on the GPU; `None` on the CPU.
    #[cfg(feature = "cuda")]
    pub inputs: Option<&'a crate::cuda::Inputs>,
    /// On the GPU, how a pass that is repeated comes by its quantized weights.
    #[cfg(feature = "cuda")]
    pub weights: Option<&'a super::cuda::Weights>,
}

impl<'a> Run<'a> {
    /// A pass that keeps nothing.
    pub fn inference(sequences: &'a Sequences) -> Self {
        Self {
            sequences,
            saved: None,
            dropout_key: None,
            cache: None,
            block: 0,
            #[cfg(feature = "cuda")]
            inputs: None,
            #[cfg(feature = "cuda")]
            weights: None,
        }
    }

    /// A pass that keeps what the backward needs.
    pub fn training(sequences: &'a Sequences, dropout_key: Option<u64>) -> Self {
        Self { saved: Some(Saved::default()), dropout_key, ..Self::inference(sequences) }
    }

    /// Keeps `tensor` for the backward, if there will be one.
    pub fn save(&mut self, tensor: &Tensor) {
        if let Some(saved) = &mut self.saved {
            saved.stack.push(tensor.clone());
        }
    }

    /// The tensor that was saved last and not yet taken.
    pub fn take(&mut self) -> Result<Tensor> {
        let top = self.saved.as_mut().and_then(|s| s.stack.pop());
        top.ok_or_else(|| candle_core::Error::Msg("backward without a matching forward".into()).bt().into())
    }
}

/// The stack of activations between a forward and its backward.
#[derive(Default)]
pub struct Saved {
    stack: Vec<Tensor>,
}
