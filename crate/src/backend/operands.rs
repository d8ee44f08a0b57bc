//! What operations are told: weights, norms, how heads lie. Plain data, cheap to clone; the operations are those of
//! [`Backend`](super::Backend).

use std::{
    cell::OnceCell,
    sync::{Arc, RwLock},
};

use candle_core::{DType, Tensor};

use super::{param::Param, run::Run};
use crate::{error::Result, quantized::QuantizedTensor};

/// A frozen weight `[out, in]`, as it is stored.
#[derive(Clone)]
pub enum Weight {
    /// f32, f16 or bf16.
    Dense(Tensor),
    /// Packed codes and their statistics.
    Quantized(QuantizedTensor),
}

impl Weight {
    /// `[out, in]`.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        Ok(match self {
            Self::Dense(t) => t.dims2()?,
            Self::Quantized(q) => (q.shape()[0], q.shape()[1]),
        })
    }

    /// The weight in the dtype that it was quantized from.
    pub fn dequantize(&self) -> Result<Tensor> {
        match self {
            Self::Dense(t) => Ok(t.clone()),
            Self::Quantized(q) => super::of(q.device())?.dequantize(q),
        }
    }

    /// Bytes that the weight takes, statistics included.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Dense(t) => t.elem_count() * t.dtype().size_in_bytes(),
            Self::Quantized(q) => q.num_bytes(),
        }
    }

    /// The quantized weight, if it is one.
    pub fn quantized(&self) -> Option<&QuantizedTensor> {
        if let Self::Quantized(q) = self { Some(q) } else { None }
    }
}

/// What does not learn of a linear layer.
#[derive(Clone)]
pub struct Frozen {
    pub weight: Weight,
    /// `[out]`, in the checkpoint's dtype.
    pub bias: Option<Tensor>,
    /// The dtype of products with a quantized weight, bitsandbytes' `bnb_4bit_compute_dtype`; `None`: that of the
    /// activations. A CPU computes in f32, or in BF16 if it is that.
    pub compute_dtype: Option<DType>,
}

impl Frozen {
    /// Bytes of the weight as a product reads it; 0 for one that is read as it is stored.
    pub fn dequantized_bytes(&self, activations: DType) -> usize {
        let elements = self.weight.quantized().map_or(0, |q| q.shape().iter().product());
        elements * self.compute_dtype.unwrap_or(activations).size_in_bytes()
    }
}

/// A low-rank update: y += scaling * B A dropout(x).
#[derive(Clone)]
pub struct Lora {
    /// `[r, in]`, f32.
    pub a: Param,
    /// `[out, r]`, f32.
    pub b: Param,
    /// alpha / r, or alpha / sqrt(r) under rsLoRA.
    pub scaling: f64,
    /// Probability that an element of x is dropped in training.
    pub dropout: f64,
    /// Distinguishes the dropout masks of the layers of one pass.
    pub id: u64,
}

impl Lora {
    /// The rank r.
    pub fn rank(&self) -> usize {
        self.a.value().dims()[0]
    }
}

/// What stands around a linear layer's product, for a device that does both at once.
#[derive(Clone, Copy, Default)]
pub struct Around<'a> {
    /// `[M, out]`, is added.
    pub residual: Option<&'a Tensor>,
    /// The result goes through gelu; saves what that saves.
    pub gelu: bool,
    /// The result is in f32, and may be wider than the weight has rows: that of an output head whose table is padded.
    pub logits: bool,
}

/// What a linear layer reads.
pub enum Input<'a> {
    Plain(&'a Tensor),
    Normed(&'a Normed<'a>),
}

impl<'a> Input<'a> {
    /// `[M, in]`; saves what the norm saves, if it is made here.
    pub fn tensor(&self, run: &mut Run) -> Result<&Tensor> {
        match self {
            Self::Plain(x) => Ok(x),
            Self::Normed(normed) => normed.tensor(run),
        }
    }
}

impl<'a> From<&'a Tensor> for Input<'a> {
    fn from(x: &'a Tensor) -> Self {
        Self::Plain(x)
    }
}

impl<'a> From<&'a Normed<'a>> for Input<'a> {
    fn from(normed: &'a Normed<'a>) -> Self {
        Self::Normed(normed)
    }
}

/// A norm over the last dimension: with a bias it is layer normalization (arXiv:1607.06450), without one RMS
/// normalization (arXiv:1910.07467).
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[C]`, in the checkpoint's dtype.
    pub weight: Tensor,
    /// `[C]`, in the checkpoint's dtype.
    pub bias: Option<Tensor>,
    /// What keeps a row's variance from 0.
    pub eps: f64,
    /// Weight and bias in f32, in which it is computed.
    pub(super) wide: (Tensor, Option<Tensor>),
}

impl Norm {
    pub fn new(weight: Tensor, bias: Option<Tensor>, eps: f64) -> Result<Self> {
        let wide_bias = bias.as_ref().map(|b| b.to_dtype(DType::F32)).transpose()?;
        let wide = (weight.to_dtype(DType::F32)?, wide_bias);
        Ok(Self { weight, bias, eps, wide })
    }

    /// C.
    pub fn width(&self) -> usize {
        self.weight.elem_count()
    }
}

/// The norm of an x `[M, C]` for the layers that read it. It is made when it is first asked for: where few rows are
/// decoded on a GPU, a linear layer makes it as it reads x.
pub struct Normed<'a> {
    norm: &'a Norm,
    x: &'a Tensor,
    y: OnceCell<Tensor>,
}

impl<'a> Normed<'a> {
    pub fn new(norm: &'a Norm, x: &'a Tensor) -> Self {
        Self { norm, x, y: OnceCell::new() }
    }

    /// The norm's output `[M, C]`; saves what its backward takes, once.
    pub fn tensor(&self, run: &mut Run) -> Result<&Tensor> {
        if let Some(y) = self.y.get() {
            return Ok(y);
        }
        let y = run.backend.norm(self.norm, self.x, run)?;
        Ok(self.y.get_or_init(|| y))
    }

    /// The norm and x, unless the norm is made already.
    pub fn unmade(&self) -> Option<(&'a Norm, &'a Tensor)> {
        if self.y.get().is_none() { Some((self.norm, self.x)) } else { None }
    }
}

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

    /// Elements of a row of queries.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of a row of keys.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Causal attention of one block.
#[derive(Clone, Debug)]
pub struct Attention {
    pub layout: HeadLayout,
    /// ALiBi's slopes (arXiv:2108.12409), one a head; empty: none.
    pub slopes: Vec<f32>,
    /// A query sees so many keys, its own the last of them (Mistral's sliding window); `None`: all before it.
    pub window: Option<usize>,
}

/// The angles of rotary position embedding (RoPE, arXiv:2104.09864) by position: pairs of elements of a query or key,
/// i and i + head_dim / 2, are turned by an angle that grows with the position, so that a score depends on the
/// distance. Cloning shares the table, which grows as longer texts come.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Radians a position, for each of the head_dim / 2 pairs.
    pub(super) inv_freq: Arc<[f32]>,
    /// For each position head_dim / 2 cosines, then as many sines.
    table: Arc<RwLock<Arc<[f32]>>>,
}

impl Rope {
    pub fn new(inv_freq: Vec<f32>) -> Self {
        Self { inv_freq: inv_freq.into(), table: Arc::default() }
    }

    /// The frequencies of the plain form: `theta^(-2i / head_dim)`, rounded as PyTorch rounds them.
    pub fn frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
        let power = |i: usize| theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32;
        (0..head_dim / 2).map(|i| 1.0 / power(i)).collect()
    }

    /// Cosines and sines of the positions 0 .. `positions` at least: for each position
    /// head_dim / 2 cosines, then as many sines.
    pub fn table(&self, positions: usize) -> Arc<[f32]> {
        let needed = positions * 2 * self.inv_freq.len();
        let held = self.table.read().unwrap_or_else(|e| e.into_inner()).clone();
        if held.len() >= needed {
            return held;
        }
        let mut table = Vec::with_capacity(positions.next_power_of_two() * 2 * self.inv_freq.len());
        for position in 0..positions.next_power_of_two() {
            let angles = || self.inv_freq.iter().map(|f| position as f32 * f);
            table.extend(angles().map(f32::cos));
            table.extend(angles().map(f32::sin));
        }
        let table: Arc<[f32]> = table.into();
        *self.table.write().unwrap_or_else(|e| e.into_inner()) = table.clone();
        table
    }
}
