//! The two kinds of norm, for a place that may have either.

use std::cell::OnceCell;

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

    /// C.
    pub fn width(&self) -> usize {
        match self {
            Self::Layer(norm) => norm.weight.elem_count(),
            Self::Rms(norm) => norm.weight.elem_count(),
        }
    }

    /// Weight and bias (`None`: RMS) in f32, in which it is computed.
    #[cfg(feature = "cuda")]
    pub(super) fn wide(&self) -> (&Tensor, Option<&Tensor>) {
        match self {
            Self::Layer(norm) => (&norm.wide.0, Some(&norm.wide.1)),
            Self::Rms(norm) => (&norm.wide, None),
        }
    }

    /// The norm of x, made when it is first asked for.
    pub fn of<'a>(&'a self, x: &'a Tensor) -> Normed<'a> {
        Normed { norm: self, x, y: OnceCell::new() }
    }
}

/// The norm of an x `[M, C]` for the layers that read it. It is made when it is first asked for: where few rows are
/// decoded on a GPU, a linear layer makes it as it reads x.
pub struct Normed<'a> {
    norm: &'a Norm,
    x: &'a Tensor,
    y: OnceCell<Tensor>,
}

impl<'a> Normed<'a> {
    /// The norm's output `[M, C]`; saves what its backward takes, once.
    pub fn tensor(&self, run: &mut Run) -> Result<&Tensor> {
        if let Some(y) = self.y.get() {
            return Ok(y);
        }
        let y = self.norm.forward(self.x, run)?;
        Ok(self.y.get_or_init(|| y))
    }

    /// The norm and x, unless the norm is made already.
    #[cfg(feature = "cuda")]
    pub(super) fn before(&self) -> Option<(&'a Norm, &'a Tensor)> {
        if self.y.get().is_none() { Some((self.norm, self.x)) } else { None }
    }
}
