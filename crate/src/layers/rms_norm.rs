//! Root-mean-square normalization over the last dimension (arXiv:1910.07467).

use candle_core::{DType, Device, Tensor};

use super::{
    cpu::{F32View, math},
    only_cpu,
    run::Run,
};
use crate::error::Result;

/// y = x / sqrt(mean(x^2) + eps) * weight, over rows of `[M, C]`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[C]`, in the checkpoint's dtype.
    pub weight: Tensor,
    pub eps: f64,
    /// The same in f32, in which it is computed.
    pub(super) wide: Tensor,
}

impl RmsNorm {
    pub fn new(weight: Tensor, eps: f64) -> Result<Self> {
        let wide = weight.to_dtype(DType::F32)?;
        Ok(Self { weight, eps, wide })
    }

    /// `[M, C]` to `[M, C]`; saves x and each row's 1 / rms.
    pub fn forward(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::norm_forward(x, &self.wide, None, self.eps, run);
        }
        only_cpu("rms_norm", x.device())?;
        let (m, c) = x.dims2()?;
        let mut y = vec![0f32; m * c];
        let mut inverse = vec![0f32; m];
        {
            let (x, w) = (F32View::new(x)?, F32View::new(&self.wide)?);
            for ((x, y), inverse) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(&mut inverse) {
                *inverse = math::rms_norm_row(x, &w, self.eps as f32, y);
            }
        }
        if run.saved.is_some() {
            run.save(x);
            run.save(&Tensor::from_vec(inverse, m, &Device::Cpu)?);
        }
        Ok(Tensor::from_vec(y, (m, c), &Device::Cpu)?)
    }

    /// dy to dx, plus `residual`: the gradient that reaches x past the norm.
    pub fn backward(&self, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return super::cuda::norm_backward(dy, &self.wide, false, residual, run);
        }
        let (m, c) = dy.dims2()?;
        let (inverse, x) = (run.take()?, run.take()?);
        let mut dx = match residual {
            Some(r) => F32View::new(r)?.to_vec(),
            None => vec![0f32; m * c],
        };
        let (x, inverse, dy) = (F32View::new(&x)?, F32View::new(&inverse)?, F32View::new(dy)?);
        let w = F32View::new(&self.wide)?;
        let rows = dx.chunks_exact_mut(c).zip(x.chunks_exact(c)).zip(dy.chunks_exact(c)).zip(&*inverse);
        for (((dx, x), dy), &inverse) in rows {
            math::rms_norm_backward_row(x, &w, dy, inverse, dx);
        }
        Ok(Tensor::from_vec(dx, (m, c), &Device::Cpu)?)
    }
}
