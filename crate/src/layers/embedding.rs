//! The table of token embeddings.

use candle_core::{DType, Device, Tensor};

use super::only_cpu;
use crate::error::Result;

/// `[vocab, C]`, in the checkpoint's dtype.
#[derive(Clone, Debug)]
pub struct Embedding {
    pub weight: Tensor,
}

impl Embedding {
    /// The rows of `ids` as f32 `[M, C]`. The ids were checked against the table's size.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        only_cpu("embedding", self.weight.device())?;
        let ids = Tensor::new(ids, &Device::Cpu)?;
        Ok(self.weight.index_select(&ids, 0)?.to_dtype(DType::F32)?)
    }
}
