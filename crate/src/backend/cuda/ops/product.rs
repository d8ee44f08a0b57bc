//! What a product is told of its layer.

use candle_core::DType;

use crate::backend::operands::{Frozen, Lora, Weight};

/// A linear layer, with the low-rank part of its adapter.
pub struct Product<'a> {
    pub frozen: &'a Frozen,
    pub lora: Option<&'a Lora>,
}

impl Product<'_> {
    /// The dtype that it is made in, of activations in `activations`: bitsandbytes' `compute_dtype` for a quantized
    /// weight.
    pub fn dtype(&self, activations: DType) -> DType {
        match &self.frozen.weight {
            Weight::Quantized(_) => self.frozen.compute_dtype.unwrap_or(activations),
            Weight::Dense(_) => activations,
        }
    }
}
