//! Causal multi-head attention over packed sequences, with or without ALiBi.
//!
//! Scores, softmax and their gradients exist a block of queries at a time (the idea of
//! FlashAttention, arXiv:2205.14135); the backward computes the probabilities again from the
//! saved projection, which is all that is kept.

use candle_core::{Device, Tensor};

use super::{
    cpu::{
        F32View,
        attention::{self as cpu, Head, Operand},
    },
    only_cpu,
    run::Run,
};
use crate::error::Result;

/// Where the heads of one kind lie in a row of the fused projection.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// First element of head 0.
    pub offset: usize,
    /// Elements from one head to the next.
    pub stride: usize,
}

impl Place {
    pub fn at(&self, head: usize) -> usize {
        self.offset + head * self.stride
    }
}

/// Where queries, keys and values lie in a row of the fused projection.
#[derive(Clone, Copy, Debug)]
pub struct HeadLayout {
    pub heads: usize,
    /// Fewer than `heads`: grouped queries, `heads / kv_heads` of them share a key.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub q: Place,
    pub k: Place,
    pub v: Place,
    /// Elements of a row.
    pub row: usize,
}

impl HeadLayout {
    /// BLOOM's: (heads, 3, head_dim), q, k and v side by side for each head.
    pub fn interleaved(heads: usize, head_dim: usize) -> Self {
        let place = |i: usize| Place { offset: i * head_dim, stride: 3 * head_dim };
        Self { heads, kv_heads: heads, head_dim, q: place(0), k: place(1), v: place(2), row: 3 * heads * head_dim }
    }

    /// All queries, then all keys, then all values.
    pub fn grouped(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let place = |heads: usize| Place { offset: heads * head_dim, stride: head_dim };
        let (q, k, v) = (place(0), place(heads), place(heads + kv_heads));
        Self { heads, kv_heads, head_dim, q, k, v, row: (heads + 2 * kv_heads) * head_dim }
    }
}

/// The attention of one block: how the heads lie, and their ALiBi slopes (empty: none).
#[derive(Clone, Debug)]
pub struct Attention {
    pub layout: HeadLayout,
    pub slopes: Vec<f32>,
}

impl Attention {
    /// `projected` `[M, row]` to `[M, heads * head_dim]`; saves `projected`.
    pub fn forward(&self, projected: &Tensor, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if projected.device().is_cuda() {
            return super::cuda::attention_forward(self, projected, run);
        }
        only_cpu("attention", projected.device())?;
        run.save(projected);
        let width = self.layout.heads * self.layout.head_dim;
        let view = F32View::new(projected)?;
        let mut out = vec![0f32; run.sequences.num_tokens() * width];
        match &run.cache {
            None => {
                let (heads, places) = self.heads(&view, run);
                cpu::forward(&heads, &places, &mut out, width);
            }
            Some(cache) => {
                cache.append_cpu(run.block, run.sequences, &self.layout, &view)?;
                let (keys, values) = cache.block(run.block);
                let (keys, values) = (F32View::new(keys)?, F32View::new(values)?);
                let (mut heads, places) = self.heads(&view, run);
                let kv_width = self.layout.kv_heads * self.layout.head_dim;
                for (i, head) in heads.iter_mut().enumerate() {
                    let (sequence, h) = (i / self.layout.heads, i % self.layout.heads);
                    let h = h * self.layout.kv_heads / self.layout.heads;
                    let offset = sequence * cache.capacity() * kv_width + h * self.layout.head_dim;
                    head.keys = cache.lengths()[sequence] + head.queries;
                    head.k = Operand { data: &keys, offset, row: kv_width };
                    head.v = Operand { data: &values, offset, row: kv_width };
                }
                cpu::forward(&heads, &places, &mut out, width);
            }
        }
        Ok(Tensor::from_vec(out, (run.sequences.num_tokens(), width), &Device::Cpu)?)
    }

    /// dy `[M, heads * head_dim]` to the gradient of `projected`.
    pub fn backward(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return super::cuda::attention_backward(self, dy, run);
        }
        let projected = run.take()?;
        let (view, dy) = (F32View::new(&projected)?, F32View::new(dy)?);
        let (heads, places) = self.heads(&view, run);
        let mut grad = vec![0f32; view.len()];
        let group = self.layout.heads / self.layout.kv_heads;
        cpu::backward(&heads, &places, &dy, self.layout.heads * self.layout.head_dim, &mut grad, group);
        Ok(Tensor::from_vec(grad, projected.dims(), &Device::Cpu)?)
    }

    /// Every head of every sequence, heads innermost, and where its output rows begin.
    fn heads<'a>(&self, projected: &'a [f32], run: &Run) -> (Vec<Head<'a>>, Vec<usize>) {
        let l = &self.layout;
        let mut heads = Vec::with_capacity(run.sequences.len() * l.heads);
        let mut places = Vec::with_capacity(heads.capacity());
        for range in run.sequences.ranges() {
            for h in 0..l.heads {
                let operand = |place: &Place, h: usize| Operand {
                    data: projected,
                    offset: range.start * l.row + place.at(h),
                    row: l.row,
                };
                let kv = h * l.kv_heads / l.heads;
                heads.push(Head {
                    q: operand(&l.q, h),
                    k: operand(&l.k, kv),
                    v: operand(&l.v, kv),
                    queries: range.len(),
                    keys: range.len(),
                    head_dim: l.head_dim,
                    slope: self.slopes.get(h).copied().unwrap_or(0.0),
                    scale: 1.0 / (l.head_dim as f32).sqrt(),
                });
                places.push((range.start * l.heads + h) * l.head_dim);
            }
        }
        (heads, places)
    }
}

/// ALiBi's slopes (arXiv:2108.12409, as transformers' `build_alibi_tensor` has them): a
/// geometric sequence for a power of two of heads; otherwise the largest power of two
/// below, then every other slope of the next.
///
/// ```
/// use qlora_nb::layers::attention::alibi_slopes;
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
