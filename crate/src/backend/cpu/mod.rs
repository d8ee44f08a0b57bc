//! The CPU's operations: plain functions on slices, f32 throughout.
//!
//! A CPU has no fast f16 arithmetic, so whatever dtype the weights are stored in, they
//! are widened to f32 a tile at a time (values unchanged) and everything is computed in
//! f32: at least as exact as the reference's f16, and faster here.

mod activation;
mod attention;
mod dequantize;
mod dora;
mod dots;
mod linear;
mod loss;
pub(crate) mod math;
pub mod matmul;
mod memory;
mod norm;
mod pack;
mod quantize;
mod rope;
mod saved_modules;
pub(crate) mod simd;
pub(crate) mod team;
mod tile;
mod weight;

use std::sync::Once;

use candle_core::{DType, Device, Tensor};
use parking_lot::{ReentrantMutex, ReentrantMutexGuard};

use super::{
    DeviceReader, Draw, Learning, Memory, Next, Parameters, Passes, Rows, Tokens, Work,
    kv_cache::KvCache,
    optimizer::{Part, States},
    param::Param,
    run::{Run, Saved},
};
use crate::error::Result;

pub use super::slices::{F32View, SharedMut};
#[cfg(test)]
pub(crate) use dequantize::dequantize_at;
pub use dequantize::dequantize_range;
pub(crate) use memory::bytes_of;
#[cfg(test)]
pub(crate) use quantize::encode_block_at;
pub(crate) use quantize::quantize_4bit_read;

/// The CPU: its activations are f32 whatever the model is stored in.
pub struct Cpu;

/// A pass reads parameters: nobody may change them meanwhile.
static ONE_AT_A_TIME: ReentrantMutex<()> = ReentrantMutex::new(());

impl Passes for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn is_cpu(&self) -> bool {
        true
    }

    fn lock(&self) -> ReentrantMutexGuard<'_, ()> {
        ONE_AT_A_TIME.lock()
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
        static KEEP: Once = Once::new();
        KEEP.call_once(memory::keep_freed);
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
        let mut run = Run::new(&Cpu, tokens);
        run.cache = Some(cache);
        logits(&mut run).map(Next::Logits)
    }
}

impl Rows for Cpu {
    fn embed(&self, table: &Tensor, _activations: DType, run: &Run) -> Result<Tensor> {
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
        let (x, y) = (F32View::new(a)?, F32View::new(b)?);
        let mut out = vec![0f32; x.len()];
        team::chunks(&mut out, 1 << 13, |range, out| math::add(&x[range.clone()], &y[range], out));
        Ok(Tensor::from_vec(out, a.dims(), &Device::Cpu)?)
    }
}

impl Parameters for Cpu {
    fn fill_zero(&self, tensor: &Tensor) -> Result<()> {
        super::slices::modify_f32(tensor, &mut |data| data.fill(0.0))
    }

    fn read_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        f(&F32View::new(tensor)?);
        Ok(())
    }

    fn modify_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&mut [f32])) -> Result<()> {
        super::slices::modify_f32(tensor, f)
    }

    fn sum_of_squares(&self, params: &[&Param]) -> Result<f64> {
        // In f64, so that the norm does not depend on how the gradients are cut into tensors.
        let squares = |grad: &[f32]| math::sum_f64(grad, |v| v * v);
        params.iter().try_fold(0.0, |sum, p| Ok(sum + squares(&F32View::new(p.grad())?)))
    }

    fn optimizer_states(&self, _: &[Param], _: Vec<Vec<Part>>, _: usize, _: bool) -> Result<Option<Box<dyn States>>> {
        Ok(None)
    }
}

impl Memory for Cpu {
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
        Ok(memory::available())
    }

    fn kept_bytes(&self, _largest_dequantized: usize, _gradients: usize) -> Vec<(&'static str, usize)> {
        Vec::new()
    }
}
