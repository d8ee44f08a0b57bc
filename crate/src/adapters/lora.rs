//! LoRA (arXiv:2106.09685): y = W x + scaling * B A dropout(x).

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    backend::{
        operands::{Around, Frozen, Input, Lora},
        param::Param,
        run::Run,
    },
    display::module_tree::ModuleNode,
    error::Result,
    layers::{Adapter, Linear},
};

/// A low-rank update on a linear layer, as PEFT's `lora.Linear`.
#[derive(Clone)]
pub struct LoraAdapter(pub Lora);

impl Linear {
    /// The same layer with one adapter, which is active; the weight is shared.
    pub fn with_lora(&self, lora: Lora) -> Self {
        self.without_adapters().with_adapter("default", Arc::new(LoraAdapter(lora))).with_active(Some("default"))
    }
}

impl Adapter for LoraAdapter {
    fn parameters(&self) -> Vec<(&'static str, &Param)> {
        vec![("lora_A", &self.0.a), ("lora_B", &self.0.b)]
    }

    fn forward(&self, frozen: &Frozen, x: &Input, around: &Around, run: &mut Run) -> Result<Tensor> {
        run.backend.linear(frozen, Some(&self.0), x, around, run)
    }

    fn remember(&self, _frozen: &Frozen, x: &Tensor, run: &mut Run) -> Result<()> {
        run.backend.remember_lora(&self.0, x, run)
    }

    fn backward(&self, frozen: &Frozen, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        run.backend.linear_backward(frozen, Some(&self.0), dy, need_dx, run)
    }

    fn merge(&self, weight: &Tensor) -> Result<Tensor> {
        let update = (self.0.b.value().matmul(self.0.a.value())? * self.0.scaling)?;
        Ok((weight + update)?)
    }

    fn module_tree(&self, name: &str, base: ModuleNode) -> ModuleNode {
        let (r, input) = self.0.a.value().dims2().unwrap_or_default();
        let out = self.0.b.value().dims().first().copied().unwrap_or_default();
        ModuleNode::lora_linear(base, name, input, out, r, self.0.dropout)
    }
}
