//! The two kinds of norm, for a place that may have either.

use candle_core::Tensor;

use super::{layer_norm::LayerNorm, rms_norm::RmsNorm, run::Run};
use crate::error::Result;

/// A norm over the last dimension of `[M, C]`.
#[derive(Clone, Debug)]
pub enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    /// `[M, C]` to `[M, C]`; saves what [`Norm::backward`] takes.
    pub fn forward(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x, run),
            Self::Rms(norm) => norm.forward(x, run),
        }
    }

    /// dy to dx, plus `residual`: the gradient that reaches x past the norm.
    pub fn backward(&self, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.backward(dy, residual, run),
            Self::Rms(norm) => norm.backward(dy, residual, run),
        }
    }

    /// The parameters under their names in the module.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Layer(norm) => vec![("weight", &norm.weight), ("bias", &norm.bias)],
            Self::Rms(norm) => vec![("weight", &norm.weight)],
        }
    }

    /// What keeps a row's variance from 0.
    pub fn eps(&self) -> f64 {
        match self {
            Self::Layer(norm) => norm.eps,
            Self::Rms(norm) => norm.eps,
        }
    }
}
