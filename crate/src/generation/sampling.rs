//! Choosing a token from processed logits.

use super::processors::Scratch;
use crate::backend::{
    cpu::math::{max_of, sum_f64},
    dropout::mix,
};

/// A stream of random numbers: SplitMix64. One draw a token, so that what a sequence becomes
/// depends on its seed and its own logits, not on the batch that it is in.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The stream number `stream` of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        // The seed is mixed before the stream is added, or neighbouring seeds would share streams.
        Self(mix((mix(seed) ^ stream.wrapping_mul(GAMMA)).wrapping_sub(GAMMA)))
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        let draw = mix(self.0);
        self.0 = self.0.wrapping_add(GAMMA);
        (draw >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// SplitMix64's step, which `mix` adds to its argument.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The most likely token; of equal ones the first.
pub fn greedy(logits: &[f32]) -> u32 {
    let max = max_of(logits);
    logits.iter().position(|x| *x == max).unwrap_or(0) as u32
}

/// The token at `u` (in [0, 1)) of the cumulative softmax, in the order of ids.
pub fn sample(logits: &[f32], u: f64, scratch: &mut Scratch) -> u32 {
    const BLOCK: usize = 256;
    scratch.softmax(logits);
    let sum = |probabilities: &[f32]| sum_f64(probabilities, |p| p);
    let Scratch { ids, values: probabilities, .. } = scratch;
    let mut rest = u * probabilities.chunks(BLOCK).map(sum).sum::<f64>();
    for (ids, block) in ids.chunks(BLOCK).zip(probabilities.chunks(BLOCK)) {
        let mass = sum(block);
        if rest >= mass {
            rest -= mass;
            continue;
        }
        for (id, p) in ids.iter().zip(block) {
            rest -= f64::from(*p);
            if rest < 0.0 {
                return *id;
            }
        }
    }
    // Rounding left a crumb behind the last one.
    ids.last().copied().unwrap_or(0)
}
