//! Linear layers: any weight, with or without an adapter.
//!
//! The base weight is frozen: its gradient is never computed, and its backward is the one product dx = dy W. An
//! [`Adapter`] can stand on any of them, so a model's file knows nothing of adapters.

use std::sync::Arc;

use candle_core::Tensor;

use super::adapters::Adapters;
use crate::{
    backend::{
        self, Tokens, internal,
        operands::{Around, Frozen, Input, Weight},
        param::Param,
        run::{Run, Saved},
        sequences::Sequences,
    },
    display::module_tree::ModuleNode,
    error::Result,
};

/// What learns on a linear layer. Implementations: [`LoraAdapter`](crate::peft::LoraAdapter), [`DoraAdapter`](crate::peft::DoraAdapter).
pub trait Adapter: Send + Sync {
    /// What learns, under PEFT's names (`lora_A.default.weight` in the model, `lora_A.weight` in a file: here `lora_A`),
    /// in PEFT's order.
    fn parameters(&self) -> Vec<(&'static str, &Param)>;

    /// The layer's output with the adapter's part, and what stands around it; saves what [`Adapter::backward`] takes.
    fn forward(&self, frozen: &Frozen, x: &Input, around: &Around, run: &mut Run) -> Result<Tensor>;

    /// Saves what [`Adapter::forward`] saves, without its result: for a block that is computed again on the way back.
    fn remember(&self, frozen: &Frozen, x: &Tensor, run: &mut Run) -> Result<()>;

    /// dy to dx; adds to the gradients of the parameters.
    fn backward(&self, frozen: &Frozen, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>>;

    /// The weight `[out, in]` (f32) with the adapter added into it, f32.
    fn merge(&self, weight: &Tensor) -> Result<Tensor>;

    /// Whether a weight of its own, in f32, takes the place of the layer's: products take it in the dtype of the activations.
    fn replaces_weight(&self) -> bool {
        false
    }

    /// The layer as PEFT prints it with this adapter, called `name`; `base` is how it prints without.
    fn module_tree(&self, name: &str, base: ModuleNode) -> ModuleNode;
}

/// y = x W^T + bias, with what the active adapter makes of it; x `[M, in]`, y `[M, out]`. Cloning shares everything.
#[derive(Clone)]
pub struct Linear {
    /// The module's path in the model: `transformer.h.0.mlp.dense_4h_to_h`.
    pub name: String,
    pub frozen: Frozen,
    adapters: Adapters<Arc<dyn Adapter>>,
}

impl Linear {
    pub fn new(name: impl Into<String>, weight: Weight, bias: Option<Tensor>) -> Self {
        Self { name: name.into(), frozen: Frozen { weight, bias, compute_dtype: None }, adapters: Adapters::default() }
    }

    /// The same layer with one more adapter on it, which is not active yet; the weight is shared.
    pub fn with_adapter(&self, name: &str, adapter: Arc<dyn Adapter>) -> Self {
        let mut adapted = self.clone();
        adapted.adapters.push(name, adapter);
        adapted
    }

    /// The same layer with the adapter of that name active; none, if it has none of that name.
    pub fn with_active(&self, name: Option<&str>) -> Self {
        let mut changed = self.clone();
        changed.adapters.activate(name);
        changed
    }

    /// The same layer as it was before any adapter.
    pub fn without_adapters(&self) -> Self {
        Self { adapters: Adapters::default(), ..self.clone() }
    }

    /// The adapters by name.
    pub fn adapters(&self) -> &[(String, Arc<dyn Adapter>)] {
        self.adapters.all()
    }

    /// Whether PEFT would wrap the layer in two ways at once, as an adapter's layer and as one of `modules_to_save`.
    pub(crate) fn has_mixed_adapters(&self) -> bool {
        self.adapters().windows(2).any(|pair| pair[0].1.replaces_weight() != pair[1].1.replaces_weight())
    }

    /// The adapter that is applied and learns.
    pub fn adapter(&self) -> Option<&dyn Adapter> {
        self.adapters.active().map(|adapter| &**adapter)
    }

    /// The frozen weight.
    pub fn weight(&self) -> &Weight {
        &self.frozen.weight
    }

    /// The same layer with another frozen weight, `[out, in]` as before: quantized in another way, say.
    pub fn with_weight(&self, weight: Weight) -> Self {
        let mut changed = self.clone();
        changed.frozen.weight = weight;
        changed
    }

    /// What learns, with its name in the layer.
    pub fn trainable(&self) -> Vec<(&'static str, &Param)> {
        self.adapter().map(|adapter| adapter.parameters()).unwrap_or_default()
    }

    /// y.
    pub fn forward<'a>(&self, x: impl Into<Input<'a>>, run: &mut Run) -> Result<Tensor> {
        self.forward_around(&x.into(), &Around::default(), run)
    }

    /// y + `residual` `[M, out]`.
    pub fn forward_onto(&self, x: &Tensor, residual: &Tensor, run: &mut Run) -> Result<Tensor> {
        self.forward_around(&x.into(), &Around { residual: Some(residual), ..Around::default() }, run)
    }

    /// gelu(y), without y in memory where that pays.
    pub fn forward_gelu<'a>(&self, x: impl Into<Input<'a>>, run: &mut Run) -> Result<Tensor> {
        self.forward_around(&x.into(), &Around { gelu: true, ..Around::default() }, run)
    }

    /// y in f32, as an output head's: a GPU may have padding behind its columns.
    pub fn forward_logits(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        self.forward_around(&x.into(), &Around { logits: true, ..Around::default() }, run)
    }

    fn forward_around(&self, x: &Input, around: &Around, run: &mut Run) -> Result<Tensor> {
        match self.adapter() {
            None => run.backend.linear(&self.frozen, None, x, around, run),
            Some(adapter) => adapter.forward(&self.frozen, x, around, run),
        }
    }

    /// Saves what the forward saves, without its result.
    pub fn remember(&self, x: &Tensor, run: &mut Run) -> Result<()> {
        self.adapter().map_or(Ok(()), |adapter| adapter.remember(&self.frozen, x, run))
    }

    /// dy to dx; adds to the adapter's gradients. With `need_dx` false (nothing below learns) dx is not computed.
    pub fn backward(&self, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        match self.adapter() {
            None => run.backend.linear_backward(&self.frozen, None, dy, need_dx, run),
            Some(adapter) => adapter.backward(&self.frozen, dy, need_dx, run),
        }
    }

    /// The layer alone, for a look inside: y of x `[M, in]` and, of the gradient dy `[M, out]` that the layers above would
    /// hand down, dx; adds to the adapter's gradients.
    pub fn forward_backward(&self, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let (m, _) = x.dims2()?;
        let (ids, sequences) = (vec![0; m], Sequences::new([m]));
        let mut done = None;
        backend::of(x.device())?.pass(&Tokens { ids: &ids, targets: &[], sequences: &sequences }, &mut |run| {
            run.saved = Some(Saved::default());
            let y = self.forward(x, run)?;
            done = Some((y, self.backward_through(dy, run)?));
            Ok(())
        })?;
        done.ok_or_else(|| internal("a pass without a result"))
    }

    /// [`Linear::backward`] inside a block, where dx is always needed.
    pub fn backward_through(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        self.backward(dy, true, run)?.ok_or_else(|| internal(format!("{} gave no gradient", self.name)))
    }

    /// The layer as PyTorch prints it.
    pub fn module_tree(&self, name: &str) -> ModuleNode {
        let (out, input) = self.weight().dims2().unwrap_or_default();
        let class = if self.weight().quantized().is_some() { "Linear4bit" } else { "Linear" };
        let base = ModuleNode::linear(name, class, input, out, self.frozen.bias.is_some());
        let trees = self.adapters().iter().map(|(name, adapter)| adapter.module_tree(name, base.clone()));
        trees.reduce(ModuleNode::merged).unwrap_or(base)
    }
}
