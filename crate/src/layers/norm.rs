//! Layer and RMS normalization.

use candle_core::Tensor;

use crate::{
    backend::{
        operands::{Norm, Normed},
        run::Run,
    },
    error::Result,
};

impl Norm {
    /// `[M, C]` to `[M, C]`.
    pub fn forward(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.backend.norm(self, x, run)
    }

    /// dy to dx, plus `residual`: the gradient that reaches x past the norm.
    pub fn backward(&self, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        run.backend.norm_backward(self, dy, residual, run)
    }

    /// The norm of x, made when it is first asked for.
    pub fn of<'a>(&'a self, x: &'a Tensor) -> Normed<'a> {
        Normed::new(self, x)
    }

    /// The parameters under their names in the module.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
        let bias = self.bias.as_ref().map(|bias| ("bias", bias));
        [("weight", &self.weight)].into_iter().chain(bias).collect()
    }
}
