//! One AdamW step over slices: each element is read and written once.
//!
//! Fused multiply-adds stand where torch's vectorized CPU kernels have them, and nowhere else;
//! scalars are computed in f64 and rounded to f32 at the operation, as torch does.

use crate::backend::cpu::simd::Level;

/// The three arithmetics; they differ in the last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// torch.optim.AdamW.
    Torch,
    /// bitsandbytes, 32-bit states. Decay comes before the update, as on its CPU backend (its
    /// CUDA kernel decays after it).
    Bnb32,
    /// bitsandbytes, 8-bit states (decay before, as above).
    Bnb8,
}

/// The scalars of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(super) rule: Rule,
    pub(super) grad_scale: f32,
    pub(super) decay: f32,
    pub(super) beta1: f32,
    pub(super) one_minus_beta1: f32,
    pub(super) beta2: f32,
    pub(super) one_minus_beta2: f32,
    /// `sqrt(v)` is divided by this (1 where the rule folds it into the step size).
    pub(super) correction2: f32,
    pub(super) eps: f32,
    /// Negative.
    pub(super) step_size: f32,
}

impl Step {
    /// `t` counts from 1.
    pub fn new(
        rule: Rule,
        lr: f64,
        (beta1, beta2): (f64, f64),
        eps: f64,
        weight_decay: f64,
        t: u64,
        grad_scale: f32,
    ) -> Self {
        let t = t as f64;
        let correction1 = 1.0 - beta1.powf(t);
        let correction2 = (1.0 - beta2.powf(t)).sqrt();
        let (step_size, eps, divisor) = match rule {
            Rule::Torch | Rule::Bnb8 => (-(lr / correction1), eps, correction2),
            Rule::Bnb32 => (-lr * correction2 / correction1, eps * correction2, 1.0),
        };
        Self {
            rule,
            grad_scale,
            decay: (1.0 - lr * weight_decay) as f32,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            correction2: divisor as f32,
            eps: eps as f32,
            step_size: step_size as f32,
        }
    }

    /// Updates the weights `p` and the moments `m`, `v` with the gradients `g`; all of one length.
    pub fn run(&self, level: Level, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level was detected on this processor.
            Level::Avx512 => unsafe { run_avx512(self, p, g, m, v) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { run_avx2(self, p, g, m, v) },
            Level::Scalar => run_portable(self, p, g, m, v),
        }
    }
}

// One source, compiled for three kinds of processor: the loop vectorizes itself.

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,fma")]
fn run_avx512(step: &Step, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    run_portable(step, p, g, m, v);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(step: &Step, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    run_portable(step, p, g, m, v);
}

#[inline(always)]
fn run_portable(step: &Step, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let s = *step;
    match s.rule {
        Rule::Torch if s.one_minus_beta1 < 0.5 => each(s, p, g, m, v, |s, m, g| s.one_minus_beta1.mul_add(g - m, m)),
        // The other end of torch's lerp.
        Rule::Torch => each(s, p, g, m, v, |s, m, g| (s.one_minus_beta1 - 1.0).mul_add(g - m, g)),
        Rule::Bnb32 | Rule::Bnb8 => each(s, p, g, m, v, |s, m, g| g.mul_add(s.one_minus_beta1, m * s.beta1)),
    }
}

#[inline(always)]
fn each(s: Step, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], moment: impl Fn(&Step, f32, f32) -> f32) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * s.grad_scale;
        *m = moment(&s, *m, g);
        *v = (s.one_minus_beta2 * g).mul_add(g, *v * s.beta2);
        let denominator = v.sqrt() / s.correction2 + s.eps;
        let decayed = *p * s.decay;
        *p = match s.rule {
            Rule::Torch | Rule::Bnb8 => decayed + s.step_size * *m / denominator,
            Rule::Bnb32 => (*m / denominator).mul_add(s.step_size, decayed),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd;

    #[test]
    fn every_level_gives_the_same_bits() {
        let value = |i: usize, k: usize| ((i * 7919 + k * 104_729) % 1009) as f32 / 504.5 - 1.0;
        for rule in [Rule::Torch, Rule::Bnb32, Rule::Bnb8] {
            let run = |level| {
                let of = |k: usize| (0..77).map(|i| value(i, k)).collect::<Vec<f32>>();
                let (mut p, g, mut m) = (of(0), of(1), of(2));
                let mut v: Vec<f32> = of(3).iter().map(|v| v * v).collect();
                for t in 1..4 {
                    let step = Step::new(rule, 1e-2, (0.9, 0.999), 1e-8, 0.1, t, 0.7);
                    step.run(level, &mut p, &g, &mut m, &mut v);
                }
                [p, m, v].map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<u32>>())
            };
            for level in simd::available() {
                assert_eq!(run(level), run(simd::Level::Scalar), "{rule:?} {level:?}");
            }
        }
    }
}
