//! One step over slices, each element by itself: each is read and written once.

use super::{At, Optim};
use crate::{backend::cpu::simd::simd, quantized::DynamicMap};

/// One step of an optimizer that updates each element by itself, from `N` moments (at most 2).
///
/// On a GPU the kernel gets it as it lies in memory: `repr(C)`, with the fields of the kernel's struct.
pub(super) trait Elementwise<const N: usize>: Copy + Send + Sync + 'static {
    /// The moments, and their names in a 32-bit state. In 8 bits moment `k`, from 1, is `state<k>` and `absmax<k>`.
    const MOMENTS: [Moment; N];

    /// The kernel of `backend/cuda/kernels/adamw.cu`.
    const KERNEL: &'static str;

    fn new(optim: Optim, at: &At, is_8bit: bool) -> Self;

    /// Updates the weights and the moments. It must be `inline(always)`, so that it is compiled for each kind of
    /// processor.
    fn run(&self, slices: Slices<'_, N>);
}

/// Neighbouring elements: weights, gradients and moments, all of one length.
pub(super) struct Slices<'a, const N: usize> {
    pub p: &'a mut [f32],
    pub g: &'a [f32],
    pub moments: [&'a mut [f32]; N],
}

/// What such steps have in common.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Scalars {
    pub grad_scale: f32,
    /// A decoupled decay: weights are multiplied with it first.
    pub decay: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
}

impl Scalars {
    pub fn new(at: &At) -> Self {
        let (beta1, beta2) = at.hyperparameters.betas;
        Self {
            grad_scale: at.grad_scale,
            decay: (1.0 - at.lr * at.hyperparameters.weight_decay) as f32,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
        }
    }
}

pub(super) struct Moment {
    pub name: &'static str,
    /// False for what is never negative.
    pub is_signed: bool,
}

impl Moment {
    /// Of its 8-bit codes.
    pub fn map(&self) -> &'static DynamicMap {
        if self.is_signed { DynamicMap::signed() } else { DynamicMap::unsigned() }
    }
}

/// The loop of [`Elementwise::run`]: `update` makes a weight and its moments of these and the gradient.
#[inline(always)]
pub(super) fn each<const N: usize>(slices: Slices<'_, N>, update: impl Fn(f32, f32, [f32; N]) -> (f32, [f32; N])) {
    let Slices { p, g, moments } = slices;
    let n = p.len();
    // Known to be of one length, they need no check inside the loop.
    let (g, mut moments) = (&g[..n], moments.map(|m| &mut m[..n]));
    for i in 0..n {
        let (value, new) = update(p[i], g[i], moments.each_ref().map(|m| m[i]));
        p[i] = value;
        moments.iter_mut().zip(new).for_each(|(m, new)| m[i] = new);
    }
}

simd! {
    /// [`Elementwise::run`] with the instructions of this level; the bits are the same.
    pub(super) fn run[S: Elementwise<N>, const N: usize](level: Level, step: &S, slices: Slices<'_, N>) {
        step.run(slices);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{backend::cpu::simd, optim::Hyperparameters};

    /// For the tests of the optimizers.
    pub fn every_level_gives_the_same_bits<S: Elementwise<N>, const N: usize>(optim: Optim, is_8bit: bool) {
        let value = |i: usize, k: usize| ((i * 7919 + k * 104_729) % 1009) as f32 / 504.5 - 1.0;
        let run = |level| {
            let of = |k: usize| (0..77).map(|i| value(i, k)).collect::<Vec<f32>>();
            let (mut p, g) = (of(0), of(1));
            let mut moments: [Vec<f32>; N] = std::array::from_fn(|k| match S::MOMENTS[k].is_signed {
                true => of(2 + k),
                false => of(2 + k).iter().map(|v| v * v).collect(),
            });
            for t in 1..4 {
                let hyperparameters = Hyperparameters { weight_decay: 0.1, ..Default::default() };
                let step = S::new(optim, &At { hyperparameters, t, lr: 1e-2, grad_scale: 0.7 }, is_8bit);
                let moments = moments.each_mut().map(|m| &mut m[..]);
                super::run(level, &step, Slices { p: &mut p, g: &g, moments });
            }
            moments.into_iter().chain([p]).flatten().map(f32::to_bits).collect::<Vec<u32>>()
        };
        for level in simd::available() {
            assert_eq!(run(level), run(simd::Level::Scalar), "{optim} {level:?}");
        }
    }
}
