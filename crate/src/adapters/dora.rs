//! DoRA (arXiv:2402.09353): LoRA that learns the length of every row of the weight apart from its direction.
//!
//! W' = W + scaling * B A; y = m / n * (W' x) + bias, with m (the magnitude) learned and n the lengths of the rows of W',
//! which PEFT's `DoraLinearLayer` computes anew at each pass and takes for constants on the way back.

use candle_core::{D, DType, Tensor};

use super::LoraAdapter;
use crate::{
    backend::{
        operands::{Around, Frozen, Input, Lora, Weight},
        param::Param,
        run::Run,
    },
    display::module_tree::ModuleNode,
    error::Result,
    layers::Adapter,
};

const PRODUCT: &str = "dora: W' x";
const NORMS: &str = "dora: lengths of the rows of W'";

/// A low-rank update and a magnitude a row on a linear layer.
#[derive(Clone)]
pub struct DoraAdapter {
    pub lora: Lora,
    /// `[out]`, f32.
    pub magnitude: Param,
    /// `[out]`, f32: the squared lengths of the rows of W.
    weight_norms2: Tensor,
}

impl DoraAdapter {
    /// The magnitude, called `name`, starts with the lengths of the rows of W, as PEFT's does while B is zero.
    pub fn new(lora: Lora, weight: &Weight, name: String) -> Result<Self> {
        let weight = weight.dequantize()?.to_dtype(DType::F32)?;
        let weight_norms2 = weight.sqr()?.sum(D::Minus1)?; // (out)
        Ok(Self { magnitude: Param::new(name, &weight_norms2.sqrt()?)?, lora, weight_norms2 })
    }
}

impl Adapter for DoraAdapter {
    fn parameters(&self) -> Vec<(&'static str, &Param)> {
        vec![("lora_A", &self.lora.a), ("lora_B", &self.lora.b), ("lora_magnitude_vector", &self.magnitude)]
    }

    fn forward(&self, frozen: &Frozen, x: &Input, around: &Around, run: &mut Run) -> Result<Tensor> {
        let backend = run.backend;
        let unbiased = Frozen { bias: None, ..frozen.clone() };
        let z = backend.linear(&unbiased, Some(&self.lora), x, &Around::default(), run)?; // (M, out)
        let norms = backend.dora_norms(&unbiased, &self.lora, &self.weight_norms2, z.dtype(), run)?; // (out)
        run.save(PRODUCT, &z);
        run.save(NORMS, &norms);
        let scale = [self.magnitude.value(), &norms];
        let y = backend.scale_columns(&z, scale, frozen.bias.as_ref(), around.residual)?; // (M, out)
        if around.gelu { backend.gelu(&y, run) } else { Ok(y) }
    }

    fn remember(&self, frozen: &Frozen, x: &Tensor, run: &mut Run) -> Result<()> {
        // The product is what the backward wants, so there is nothing to spare.
        self.forward(frozen, &x.into(), &Around::default(), run).map(drop)
    }

    fn backward(&self, frozen: &Frozen, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        let (norms, z) = (run.take(NORMS)?, run.take(PRODUCT)?);
        let dz = run.backend.scale_columns_backward(dy, &z, &self.magnitude, &norms, run)?; // (M, out)
        run.backend.linear_backward(frozen, Some(&self.lora), &dz, need_dx, run)
    }

    fn merge(&self, weight: &Tensor) -> Result<Tensor> {
        let merged = LoraAdapter(self.lora.clone()).merge(weight)?;
        let scale = (self.magnitude.value() / merged.sqr()?.sum(D::Minus1)?.sqrt()?)?;
        Ok(merged.broadcast_mul(&scale.unsqueeze(1)?)?)
    }

    fn module_tree(&self, name: &str, base: ModuleNode) -> ModuleNode {
        let layer = ModuleNode::leaf(name, "lora.dora.DoraLinearLayer()");
        let mut tree = LoraAdapter(self.lora.clone()).module_tree(name, base);
        if let Some(vector) = tree.children.iter_mut().find(|child| child.name == "lora_magnitude_vector") {
            *vector = ModuleNode::new("lora_magnitude_vector", "ModuleDict", vec![layer]);
        }
        tree
    }
}
