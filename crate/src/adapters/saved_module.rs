//! A linear layer that learns whole, beside LoRA on others: PEFT's `modules_to_save`.
//!
//! What learns is a copy of the weight in f32; products take it in the dtype of the activations. (PEFT keeps the copy in
//! the dtype of the original, so that with f16 weights small updates are lost.)

use candle_core::{DType, Tensor};

use crate::{
    backend::{
        operands::{Around, Frozen, Input, Weight},
        param::Param,
        run::Run,
    },
    display::module_tree::ModuleNode,
    error::Result,
    layers::Adapter,
};

const INPUT: &str = "saved module: input";

/// A copy of a linear layer's weight, in its place.
#[derive(Clone)]
pub struct SavedModule {
    /// `[out, in]`, f32.
    pub weight: Param,
}

impl SavedModule {
    /// What the base's layer is with the copy in place of its weight.
    fn layer(&self, frozen: &Frozen, activations: DType, run: &Run) -> Result<Frozen> {
        let weight = Weight::Dense(run.backend.cast_weight(&self.weight, activations)?);
        Ok(Frozen { weight, ..frozen.clone() })
    }
}

impl Adapter for SavedModule {
    fn parameters(&self) -> Vec<(&'static str, &Param)> {
        vec![("modules_to_save", &self.weight)]
    }

    fn forward(&self, frozen: &Frozen, x: &Input, around: &Around, run: &mut Run) -> Result<Tensor> {
        let x = x.tensor(run)?;
        run.save(INPUT, x);
        let layer = self.layer(frozen, x.dtype(), run)?;
        run.backend.linear(&layer, None, &x.into(), around, run)
    }

    fn remember(&self, _frozen: &Frozen, x: &Tensor, run: &mut Run) -> Result<()> {
        run.save(INPUT, x);
        Ok(())
    }

    fn backward(&self, frozen: &Frozen, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        let x = run.take(INPUT)?;
        run.backend.weight_backward(&x, dy, &self.weight, run)?;
        let layer = self.layer(frozen, dy.dtype(), run)?;
        run.backend.linear_backward(&layer, None, dy, need_dx, run)
    }

    fn merge(&self, _weight: &Tensor) -> Result<Tensor> {
        Ok(self.weight.value().copy()?)
    }

    fn replaces_weight(&self) -> bool {
        true
    }

    fn module_tree(&self, name: &str, base: ModuleNode) -> ModuleNode {
        ModuleNode::saved_module(base, name)
    }
}
