//! Layer normalization over the last dimension (Ba et al., arXiv:1607.06450).

use candle_core::{DType, Device, Tensor};

use super::{
    cpu::{F32View, math},
    only_cpu,
    run::Run,
};
use crate::error::Result;

/// y = (x - mean) / sqrt(var + eps) * weight + bias, over rows of `[M, C]`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `[C]`, in the checkpoint's dtype.
    pub weight: Tensor,
    /// `[C]`, in the checkpoint's dtype.
    pub bias: Tensor,
    pub eps: f64,
    /// The same in f32, in which it is computed.
    pub(super) wide: (Tensor, Tensor),
}

impl LayerNorm {
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        let wide = (weight.to_dtype(DType::F32)?, bias.to_dtype(DType::F32)?);
        Ok(Self { weight, bias, eps, wide })
    }

    /// `[M, C]` to `[M, C]`; saves x and each row's mean and 1/std.
    pub fn forward(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::norm_forward(x, &self.wide.0, Some(&self.wide.1), self.eps, run);
        }
        only_cpu("layer_norm", x.device())?;
        let (m, c) = x.dims2()?;
        let mut y = vec![0f32; m * c];
        let mut stats = vec![0f32; m * 2];
        {
            let (x, w, b) = (F32View::new(x)?, F32View::new(&self.wide.0)?, F32View::new(&self.wide.1)?);
            for ((x, y), stats) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(stats.chunks_exact_mut(2)) {
                (stats[0], stats[1]) = math::layer_norm_row(x, &w, &b, self.eps as f32, y);
            }
        }
        if run.saved.is_some() {
            run.save(x);
            run.save(&Tensor::from_vec(stats, (m, 2), &Device::Cpu)?);
        }
        Ok(Tensor::from_vec(y, (m, c), &Device::Cpu)?)
    }

    /// dy to dx, plus `residual`: the gradient that reaches x past the norm.
    pub fn backward(&self, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return super::cuda::norm_backward(dy, &self.wide.0, true, residual, run);
        }
        let (m, c) = dy.dims2()?;
        let (stats, x) = (run.take()?, run.take()?);
        let mut dx = match residual {
            Some(r) => F32View::new(r)?.to_vec(),
            None => vec![0f32; m * c],
        };
        let (x, stats, dy) = (F32View::new(&x)?, F32View::new(&stats)?, F32View::new(dy)?);
        let w = F32View::new(&self.wide.0)?;
        let rows = dx.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(dy.chunks_exact(c)).zip(stats.chunks_exact(2));
        for (((dx, x), dy), s) in rows {
            math::layer_norm_backward_row(x, &w, dy, s[0], s[1], dx);
        }
        Ok(Tensor::from_vec(dx, (m, c), &Device::Cpu)?)
    }
}
