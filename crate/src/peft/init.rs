//! First values of an adapter: the numbers that PEFT gives after `torch.manual_seed(seed)`. (The
//! gaussian start has PEFT's distribution, not its numbers.)
//!
//! PEFT makes each adapter from two `nn.Linear`s, which fill themselves with random numbers,
//! and then fills A again; the draws that are thrown away are made here too, so that every
//! layer's A is the reference's.

use candle_core::{Device, Tensor};
use rand_mt::Mt;

use super::config::InitLoraWeights;
use crate::error::Result;

/// Draws adapters one after another from one stream of random numbers.
pub struct LoraInit {
    rng: Mt,
    kind: InitLoraWeights,
}

impl LoraInit {
    pub fn new(seed: u64, kind: InitLoraWeights) -> Self {
        // PyTorch's CPU generator keeps the low 32 bits of its seed.
        Self { rng: Mt::new(seed as u32), kind }
    }

    /// A `[r, input]` and B `[out, r]` of the next adapter.
    pub fn next(&mut self, r: usize, input: usize, out: usize) -> Result<(Tensor, Tensor)> {
        // The constructors of the two nn.Linears.
        let a = self.kaiming_uniform(r * input, input);
        let b = self.kaiming_uniform(out * r, r);
        let zeros = vec![0f32; out * r];
        let (a, b) = match self.kind {
            InitLoraWeights::Default => (self.kaiming_uniform(r * input, input), zeros),
            InitLoraWeights::Gaussian => (self.normal(r * input, 1.0 / r as f32), zeros),
            InitLoraWeights::Random => (a, b),
        };
        Ok((Tensor::from_vec(a, (r, input), &Device::Cpu)?, Tensor::from_vec(b, (out, r), &Device::Cpu)?))
    }

    /// `torch.rand`: 24 bits of each draw.
    fn uniform(&mut self) -> f32 {
        (self.rng.next_u32() & 0xff_ffff) as f32 / (1u32 << 24) as f32
    }

    /// `kaiming_uniform_(a = sqrt 5)`: uniform in ±1/sqrt(fan_in).
    fn kaiming_uniform(&mut self, count: usize, fan_in: usize) -> Vec<f32> {
        // PyTorch's steps, in f64: gain of leaky_relu, standard deviation, bound.
        let gain = (2.0 / (1.0 + 5f64.sqrt().powi(2))).sqrt();
        let bound = 3f64.sqrt() * (gain / (fan_in as f64).sqrt());
        let (from, to) = (-bound as f32, bound as f32);
        // Rounded once: PyTorch's build fuses the two.
        (0..count).map(|_| self.uniform().mul_add(to - from, from)).collect()
    }

    /// Normal numbers by Box and Muller, cosines and sines in turn.
    fn normal(&mut self, count: usize, std: f32) -> Vec<f32> {
        let mut out = Vec::with_capacity(count + 1);
        while out.len() < count {
            let (u, v) = (1.0 - self.uniform(), self.uniform());
            let radius = (-2.0 * u.ln()).sqrt() * std;
            let angle = std::f32::consts::TAU * v;
            out.extend([radius * angle.cos(), radius * angle.sin()]);
        }
        out.truncate(count);
        out
    }
}
