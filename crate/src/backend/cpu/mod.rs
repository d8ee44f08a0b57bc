//! The CPU's operations: plain functions on slices, f32 throughout.
//!
//! A CPU has no fast f16 arithmetic, so whatever dtype the weights are stored in, they
//! are widened to f32 a tile at a time (values unchanged) and everything is computed in
//! f32: at least as exact as the reference's f16, and faster here.

mod activation;
mod attention;
mod dequantize;
mod dora;
mod linear;
mod loss;
pub(crate) mod math;
pub mod matmul;
mod norm;
mod quantize;
mod rope;
pub(crate) mod simd;
mod slices;

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard},
};

use candle_core::{DType, Device, Tensor};

use super::{
    Backend, DeviceReader, Draw, Learning, Next, Tokens, Work,
    kv_cache::KvCache,
    operands::{Around, Attention, Frozen, HeadLayout, Input, Lora, Norm, Rope},
    param::Param,
    run::{Run, Saved},
};
use crate::{
    error::Result,
    quantized::{BlockwiseState, QuantState, QuantType, QuantizedTensor},
};

#[cfg(test)]
pub(crate) use dequantize::dequantize_at;
pub use dequantize::dequantize_range;
#[cfg(test)]
pub(crate) use quantize::encode_block_at;
pub(crate) use quantize::quantize_4bit_read;
pub use slices::{F32View, SharedMut};

/// The CPU: its activations are f32 whatever the model is stored in.
pub struct Cpu;

/// A pass reads parameters while it waits for rayon's threads, which may run anybody's work meanwhile: nobody may change
/// them then.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Tokens of a pass with a cache that runs as one of rayon's threads. Its products take some ten microseconds each: a
/// thread of another kind would go to sleep at each, and be woken when it is done. A larger pass stays on the caller's
/// thread, because a thread's heap keeps what was freed, and rayon's choice of a thread may differ each time.
const SHORT_PASS: usize = 16;

impl Backend for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn activations(&self, _dtype: DType) -> DType {
        DType::F32
    }

    fn pass(&self, tokens: &Tokens, work: Work) -> Result<f64> {
        let _one = self.lock();
        let mut run = Run::new(&Cpu, tokens);
        work(&mut run)?;
        Ok(run.loss_sum)
    }

    fn learn(&self, learning: &Learning, work: Work) -> Result<f64> {
        let _one = self.lock();
        let mut run = Run::new(&Cpu, &learning.tokens);
        (run.saved, run.dropout_key) = (Some(Saved::default()), Some(learning.dropout_key));
        run.grad_scale = learning.grad_scale;
        work(&mut run)?;
        Ok(run.loss_sum)
    }

    fn next_tokens(
        &self,
        tokens: &Tokens,
        _vocab_size: usize,
        cache: &mut KvCache,
        _draws: &[Draw],
        logits: &mut (dyn FnMut(&mut Run) -> Result<Tensor> + Send),
    ) -> Result<Next> {
        let _one = self.lock();
        let mut pass = || {
            let mut run = Run::new(&Cpu, tokens);
            run.cache = Some(cache);
            logits(&mut run).map(Next::Logits)
        };
        if tokens.ids.len() <= SHORT_PASS { rayon::scope(|_| pass()) } else { pass() }
    }

    fn embed(&self, table: &Tensor, run: &Run) -> Result<Tensor> {
        let ids = Tensor::new(run.ids, &Device::Cpu)?;
        Ok(table.index_select(&ids, 0)?.to_dtype(DType::F32)?)
    }

    fn last_rows(&self, x: &Tensor, run: &Run) -> Result<Tensor> {
        if run.sequences.len() == run.ids.len() {
            return Ok(x.clone());
        }
        Ok(x.index_select(&Tensor::new(run.sequences.last_rows(), &Device::Cpu)?, 0)?)
    }

    fn to_host(&self, x: &Tensor, _columns: usize, _run: &Run) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok((a + b)?)
    }

    fn norm(&self, norm: &Norm, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        norm::forward(norm, x, run)
    }

    fn norm_backward(&self, norm: &Norm, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        norm::backward(norm, dy, residual, run)
    }

    fn linear(
        &self,
        frozen: &Frozen,
        lora: Option<&Lora>,
        x: &Input,
        around: &Around,
        run: &mut Run,
    ) -> Result<Tensor> {
        linear::forward(frozen, lora, x, around, run)
    }

    fn remember_lora(&self, _lora: &Lora, x: &Tensor, run: &mut Run) -> Result<()> {
        run.save(linear::LORA_INPUT, x);
        Ok(())
    }

    fn linear_backward(
        &self,
        frozen: &Frozen,
        lora: Option<&Lora>,
        dy: &Tensor,
        need_dx: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>> {
        linear::backward(frozen, lora, dy, need_dx, run)
    }

    fn dora_norms(
        &self,
        frozen: &Frozen,
        lora: &Lora,
        weight_norms2: &Tensor,
        _dtype: DType,
        run: &mut Run,
    ) -> Result<Tensor> {
        dora::norms(frozen, lora, weight_norms2, run)
    }

    fn scale_columns(
        &self,
        z: &Tensor,
        magnitude_and_norms: [&Tensor; 2],
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        dora::scale_columns(z, magnitude_and_norms, bias, residual)
    }

    fn scale_columns_backward(
        &self,
        dy: &Tensor,
        z: &Tensor,
        magnitude: &Param,
        norms: &Tensor,
        _run: &Run,
    ) -> Result<Tensor> {
        dora::scale_columns_backward(dy, z, magnitude, norms)
    }

    fn gelu(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        activation::gelu(x, run)
    }

    fn gelu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        activation::gelu_backward(dy, run)
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor> {
        activation::swiglu(gate, up, run)
    }

    fn swiglu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
        activation::swiglu_backward(dy, run)
    }

    fn rope(&self, rope: &Rope, qkv: [&Tensor; 3], layout: &HeadLayout, run: &Run) -> Result<Tensor> {
        rope::join(rope, qkv, layout, run)
    }

    fn rope_backward(&self, rope: &Rope, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
        rope::split(rope, d, layout, run)
    }

    fn attention(&self, attention: &Attention, projected: &Tensor, run: &mut Run) -> Result<Tensor> {
        attention::forward(attention, projected, run)
    }

    fn attention_backward(&self, attention: &Attention, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        attention::backward(attention, dy, run)
    }

    fn logit_rows(&self, vocab_size: usize) -> usize {
        loss::chunk_rows(vocab_size)
    }

    fn num_labelled(&self, run: &Run) -> usize {
        loss::labelled(run).count()
    }

    fn labelled_rows(&self, x: &Tensor, range: Range<usize>, run: &Run) -> Result<Tensor> {
        loss::labelled_rows(x, range, run)
    }

    fn cross_entropy(
        &self,
        logits: Tensor,
        vocab_size: usize,
        range: Range<usize>,
        learn: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>> {
        loss::cross_entropy(logits, vocab_size, range, learn, run)
    }

    fn unlabelled_rows(&self, chunks: Vec<Tensor>, run: &Run) -> Result<Tensor> {
        loss::unlabelled_rows(chunks, run)
    }

    fn fill_zero(&self, tensor: &Tensor) -> Result<()> {
        slices::modify_f32(tensor, &mut |data| data.fill(0.0))
    }

    fn read_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        f(&F32View::new(tensor)?);
        Ok(())
    }

    fn modify_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&mut [f32])) -> Result<()> {
        slices::modify_f32(tensor, f)
    }

    fn sum_of_squares(&self, params: &[&Param]) -> Result<f64> {
        params.iter().try_fold(0.0, |sum, p| Ok(sum + math::sum_of_squares(&F32View::new(p.grad())?)))
    }

    fn quantize(
        &self,
        weight: &Tensor,
        quant_type: QuantType,
        blocksize: usize,
        compress_statistics: bool,
    ) -> Result<(Tensor, QuantState)> {
        quantize::quantize(weight, quant_type, blocksize, compress_statistics)
    }

    fn dequantize(&self, weight: &QuantizedTensor) -> Result<Tensor> {
        dequantize::dequantize(weight)
    }

    fn quantize_blockwise(&self, x: &Tensor, blocksize: usize) -> Result<(Tensor, BlockwiseState)> {
        quantize::quantize_blockwise(x, blocksize)
    }

    fn dequantize_blockwise(&self, q: &Tensor, state: &BlockwiseState) -> Result<Tensor> {
        quantize::dequantize_blockwise(q, state)
    }

    fn reader(&self) -> Result<Option<Box<dyn DeviceReader>>> {
        Ok(None)
    }

    fn row_padding(&self) -> usize {
        1
    }

    fn num_bytes(&self, tensor: &Tensor) -> usize {
        tensor.elem_count() * tensor.dtype().size_in_bytes()
    }

    fn available_bytes(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    fn kept_bytes(&self, _largest_dequantized: usize, _gradients: usize) -> Vec<(&'static str, usize)> {
        Vec::new()
    }
}
