//! AdamW as torch and as bitsandbytes do it (Loshchilov and Hutter, arXiv:1711.05101).
//!
//! Fused multiply-adds stand where torch's vectorized CPU kernels have them, and nowhere else;
//! scalars are computed in f64 and rounded to f32 at the operation, as torch does.

use std::ops::{Deref, DerefMut};

use super::{At, Elementwise, Hyperparameters, Moment, Optim, Optimizer, Scalars, Slices, each};
use crate::{backend::param::Param, error::Result};

/// AdamW over a list of parameters, which it changes in place; its methods are those of [`Optimizer`].
///
/// ```
/// use qlora_nb::{candle_core::{Device, Tensor}, optim::{AdamW, Optim}, peft::Param};
/// let params = [Param::new("w", &Tensor::new(&[1f32, -1.0], &Device::Cpu)?)?];
/// let mut adamw = AdamW::new(Optim::AdamWTorch, &params, (0.9, 0.999), 1e-8, 0.1)?;
/// adamw.step(1e-3, 1.0)?;
/// assert_eq!(params[0].value().to_vec1::<f32>()?, [0.9999, -0.9999], "no gradient, so only the decay");
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
pub struct AdamW(Box<dyn Optimizer>);

impl AdamW {
    /// `betas` in [0, 1), `eps` and `weight_decay` at least 0. The decay is decoupled
    /// (`p *= 1 - lr * weight_decay`) and comes before the update.
    ///
    /// # Errors
    /// Those of [`new`](super::new), and [`Error::Unsupported`](crate::error::Error::Unsupported) for an `optim` that
    /// is not AdamW.
    pub fn new(optim: Optim, params: &[Param], betas: (f64, f64), eps: f64, weight_decay: f64) -> Result<Self> {
        if optim.family() != "adamw" {
            return Err(Optim::unsupported("optim of AdamW", optim.as_str(), "adamw"));
        }
        Ok(Self(super::new(optim, params, &Hyperparameters { betas, eps, weight_decay })?))
    }
}

impl Deref for AdamW {
    type Target = dyn Optimizer;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl DerefMut for AdamW {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut *self.0
    }
}

/// One step.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Step {
    average: Average,
    /// Not 0: the update's product and sum are one operation.
    fused_update: i32,
    scalars: Scalars,
    /// `sqrt(v)` is divided by this (1 where the rule folds it into the step size).
    correction2: f32,
    eps: f32,
    /// Negative.
    step_size: f32,
}

/// How the first moment is computed.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
enum Average {
    /// torch's lerp.
    Lerp,
    /// torch's lerp for a weight of at least a half.
    LerpFromEnd,
    /// bitsandbytes.
    Sum,
}

impl Elementwise<2> for Step {
    const MOMENTS: [Moment; 2] =
        [Moment { name: "exp_avg", is_signed: true }, Moment { name: "exp_avg_sq", is_signed: false }];
    const KERNEL: &'static str = "adamw";

    /// Three arithmetics, which differ in the last bits: torch's, and bitsandbytes' for 32-bit and for 8-bit states.
    /// Decay comes before the update, as on bitsandbytes' CPU backend (its CUDA kernels decay after it).
    fn new(optim: Optim, at: &At, is_8bit: bool) -> Self {
        let (scalars, is_torch) = (Scalars::new(at), optim == Optim::AdamWTorch);
        let Hyperparameters { betas: (beta1, beta2), eps, .. } = at.hyperparameters;
        let correction1 = 1.0 - beta1.powf(at.t as f64);
        let correction2 = (1.0 - beta2.powf(at.t as f64)).sqrt();
        let average = match is_torch {
            true if scalars.one_minus_beta1 < 0.5 => Average::Lerp,
            true => Average::LerpFromEnd,
            false => Average::Sum,
        };
        let (step_size, eps, divisor) = match is_torch || is_8bit {
            true => (-(at.lr / correction1), eps, correction2),
            false => (-at.lr * correction2 / correction1, eps * correction2, 1.0),
        };
        let fused_update = i32::from(!is_torch && !is_8bit);
        let (correction2, eps, step_size) = (divisor as f32, eps as f32, step_size as f32);
        Self { average, fused_update, scalars, correction2, eps, step_size }
    }

    #[inline(always)]
    fn run(&self, slices: Slices<'_, 2>) {
        let Scalars { beta1, one_minus_beta1: weight, .. } = self.scalars;
        // A loop for each, so that none has to choose inside.
        match self.average {
            Average::Lerp => self.each(slices, |m, g| weight.mul_add(g - m, m)),
            Average::LerpFromEnd => self.each(slices, |m, g| (weight - 1.0).mul_add(g - m, g)),
            Average::Sum => self.each(slices, |m, g| g.mul_add(weight, m * beta1)),
        }
    }
}

impl Step {
    #[inline(always)]
    fn each(self, slices: Slices<'_, 2>, average: impl Fn(f32, f32) -> f32) {
        let s = self.scalars;
        each(slices, |p, g, [m, v]| {
            let g = g * s.grad_scale;
            let m = average(m, g);
            let v = (s.one_minus_beta2 * g).mul_add(g, v * s.beta2);
            let denominator = v.sqrt() / self.correction2 + self.eps;
            let decayed = p * s.decay;
            let p = match self.fused_update {
                0 => decayed + self.step_size * m / denominator,
                _ => (m / denominator).mul_add(self.step_size, decayed),
            };
            (p, [m, v])
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::kernel::tests::every_level_gives_the_same_bits;

    #[test]
    fn every_processor_gives_the_same_bits() {
        for (optim, is_8bit) in [(Optim::AdamWTorch, false), (Optim::AdamW8bit, false), (Optim::AdamW8bit, true)] {
            every_level_gives_the_same_bits::<Step, 2>(optim, is_8bit);
        }
    }
}
