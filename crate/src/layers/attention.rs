//! Causal multi-head attention over packed sequences, and where positions come from: ALiBi or RoPE.
//!
//! Scores, softmax and their gradients exist a block of queries at a time (the idea of FlashAttention,
//! arXiv:2205.14135); the backward computes the probabilities again from the saved projection.

use candle_core::Tensor;

use crate::{
    backend::{
        operands::{Attention, HeadLayout, Rope},
        run::Run,
    },
    error::Result,
};

impl Attention {
    /// `projected` `[M, row]` to `[M, heads * head_dim]`.
    pub fn forward(&self, projected: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.backend.attention(self, projected, run)
    }

    /// dy `[M, heads * head_dim]` to the gradient of `projected`.
    pub fn backward(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.backend.attention_backward(self, dy, run)
    }
}

impl Rope {
    /// q `[M, heads * head_dim]`, k and v `[M, kv_heads * head_dim]` side by side in rows of `layout`, q and k turned to
    /// their positions.
    pub fn join(&self, qkv: [&Tensor; 3], layout: &HeadLayout, run: &Run) -> Result<Tensor> {
        run.backend.rope(self, qkv, layout, run)
    }

    /// The gradient of what [`Rope::join`] gave to those of q, k and v: turned back.
    pub fn split(&self, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
        run.backend.rope_backward(self, d, layout, run)
    }
}

/// ALiBi's slopes (arXiv:2108.12409, as transformers' `build_alibi_tensor` has them): a
/// geometric sequence for a power of two of heads; otherwise the largest power of two
/// below, then every other slope of the next.
///
/// ```
/// use qlora_nb::internals::layers::alibi_slopes;
/// assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
/// ```
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    // The base is rounded to f32, and so is each power: as PyTorch's pow has them.
    let slopes = |n: usize, step: usize, count: usize| {
        let base = 2f64.powf(-(2f64.powf(-((n as f64).log2() - 3.0)))) as f32;
        (0..count).map(move |i| f64::from(base).powi((1 + i * step) as i32) as f32).collect::<Vec<f32>>()
    };
    let power = if heads == 0 { return Vec::new() } else { 1 << heads.ilog2() };
    let mut all = slopes(power, 1, power);
    all.extend(slopes(2 * power, 2, heads - power));
    all
}
