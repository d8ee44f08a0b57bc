//! Lion as bitsandbytes does it (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675).
//!
//! ```text
//! p *= 1 - lr * weight_decay
//! p -= lr * sign(beta1 * m + (1 - beta1) * g)
//! m  = beta2 * m + (1 - beta2) * g
//! ```
//!
//! Bit-equal to bitsandbytes 0.50 on the CPU, in 8 bits where that takes the nearest code, as its CUDA kernels do. There
//! is no bias correction, and the sign of 0 is 0: what has no gradient from the start does not move.

use super::{At, Elementwise, Moment, Optim, Scalars, Slices, each};

/// One step.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Step {
    /// Not 0: the direction's second product and sum are one operation, as in the reference for 32-bit states.
    fused_direction: i32,
    scalars: Scalars,
    lr: f32,
}

impl Elementwise<1> for Step {
    const MOMENTS: [Moment; 1] = [Moment { name: "state1", is_signed: true }];
    const KERNEL: &'static str = "lion";

    fn new(_: Optim, at: &At, is_8bit: bool) -> Self {
        Self { fused_direction: i32::from(!is_8bit), scalars: Scalars::new(at), lr: at.lr as f32 }
    }

    #[inline(always)]
    fn run(&self, slices: Slices<'_, 1>) {
        let s = self.scalars;
        each(slices, |p, g, [m]| {
            let g = g * s.grad_scale;
            let direction = match self.fused_direction {
                0 => m * s.beta1 + g * s.one_minus_beta1,
                _ => g.mul_add(s.one_minus_beta1, m * s.beta1),
            };
            // Not f32::signum, which is 1 for 0.
            let sign = f32::from(direction > 0.0) - f32::from(direction < 0.0);
            (p * s.decay - self.lr * sign, [g.mul_add(s.one_minus_beta2, m * s.beta2)])
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::kernel::tests::every_level_gives_the_same_bits;

    #[test]
    fn every_processor_gives_the_same_bits() {
        for is_8bit in [false, true] {
            every_level_gives_the_same_bits::<Step, 1>(Optim::Lion8bit, is_8bit);
        }
    }
}
