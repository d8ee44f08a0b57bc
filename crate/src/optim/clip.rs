//! Gradient clipping by the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_`.

use crate::{
    backend::{self, param::Param},
    error::Result,
};

/// The norm of all gradients, and what to multiply them with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradNorm {
    /// The L2 norm before clipping; NaN or infinite when a gradient is.
    pub total: f64,
    /// `max_norm / (total + 1e-6)`, at most 1. NaN or 0 when `total` is not finite: such
    /// gradients must not be applied.
    pub scale: f32,
}

impl GradNorm {
    pub fn is_finite(&self) -> bool {
        self.total.is_finite()
    }
}

/// Measures the gradients and says by how much to scale them so that their norm is at most
/// `max_norm` (infinity: never scale). The gradients stay as they are: [`Optimizer::step`](super::Optimizer::step)
/// takes the scale, which saves a pass over them.
pub fn clip_grad_norm(params: &[Param], max_norm: f64) -> Result<GradNorm> {
    let mut sum = 0.0;
    let mut rest: Vec<&Param> = params.iter().collect();
    while let Some(first) = rest.first() {
        let device = first.grad().device();
        let (here, elsewhere): (Vec<_>, Vec<_>) = rest.into_iter().partition(|p| p.grad().device().same_device(device));
        let backend = backend::of(device)?;
        let _one = backend.lock();
        sum += backend.sum_of_squares(&here)?;
        rest = elsewhere;
    }
    let total = sum.sqrt();
    // In f32, and by a reciprocal, as torch divides a number by a tensor.
    let scale = 1.0 / (total as f32 + 1e-6) * max_norm as f32;
    // f32::min would turn a NaN into 1, and so hide it.
    Ok(GradNorm { total, scale: if scale > 1.0 { 1.0 } else { scale } })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::backend::param::modify_f32;

    fn with_grad(grad: &[f32]) -> Param {
        let p = Param::new("w", &Tensor::zeros(grad.len(), candle_core::DType::F32, &Device::Cpu).unwrap()).unwrap();
        modify_f32(p.grad(), |g| g.copy_from_slice(grad)).unwrap();
        p
    }

    #[test]
    fn a_norm_above_the_limit_is_scaled_to_it() {
        let params = [with_grad(&[3.0; 16]), with_grad(&[0.0, -5.0])];
        let norm = clip_grad_norm(&params, 1.0).unwrap();
        assert_eq!(norm.total, 13.0);
        assert!((f64::from(norm.scale) - 1.0 / 13.0).abs() < 1e-7);
        assert_eq!(clip_grad_norm(&params, 20.0).unwrap().scale, 1.0);
        assert_eq!(clip_grad_norm(&params, f64::INFINITY).unwrap().scale, 1.0);
    }

    #[test]
    fn a_gradient_that_is_not_finite_shows() {
        let nan = clip_grad_norm(&[with_grad(&[1.0, f32::NAN])], 1.0).unwrap();
        assert!(!nan.is_finite() && nan.scale.is_nan());
        let infinite = clip_grad_norm(&[with_grad(&[f32::NEG_INFINITY])], 1.0).unwrap();
        assert!(!infinite.is_finite() && infinite.scale == 0.0);
    }
}
