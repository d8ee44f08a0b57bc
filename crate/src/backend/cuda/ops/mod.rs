//! The GPU's side of the layers: the same operations, by the kernels of `../kernels`.
//!
//! Activations and their gradients are in the model's dtype, sums and statistics in f32, adapters
//! and their gradients in f32.

mod activation;
mod attention;
mod dora;
mod few;
mod head;
mod linear;
mod lora;
mod norm;
mod product;
mod rope;
mod saved_modules;
mod sum;
mod weights;

use candle_core::{DType, Tensor};

use super::{Inputs, KernelArg, OnCard, address, copy_on_card, dtype_suffix, of, uninit};
use crate::{
    backend::{internal, run::Run},
    error::Result,
};

pub use activation::{gelu_backward, gelu_forward, swiglu_backward, swiglu_forward};
pub use attention::{attention_backward, attention_forward};
pub use dora::{dora_norms, scale_columns, scale_columns_backward};
pub use head::{CHUNK_ROWS, cross_entropy, labelled_rows, losses, unlabelled_rows};
pub use linear::{linear_backward, linear_forward};
pub(super) use lora::forward_down as lora_down;
pub use norm::{norm_backward, norm_forward};
pub use product::Product;
pub use rope::{rope_join, rope_split};
pub use saved_modules::{cast_weight, embed_backward, weight_backward};
pub use sum::add;
use sum::converted;
pub use weights::{Order, Weights};

fn name(kernel: &str, dtype: DType) -> Result<String> {
    Ok(format!("{kernel}_{}", dtype_suffix(dtype)?))
}

fn card<'a>(run: &Run<'a>) -> Result<OnCard<'a>> {
    run.card.ok_or_else(|| internal("a pass on the GPU without its inputs"))
}

fn inputs<'a>(run: &Run<'a>) -> Result<&'a Inputs> {
    Ok(card(run)?.inputs)
}

/// Threads for a row of `c` numbers, eight a thread.
fn row_threads(c: usize) -> usize {
    (c / 8).next_multiple_of(32).clamp(32, 256)
}

/// Rows of `table` `[.., C]` by `count` indices at an address; a negative index gives zeros.
pub(super) fn rows(table: &Tensor, index: u64, count: usize) -> Result<Tensor> {
    let gpu = of(table.device())?;
    let c = table.dims()[1];
    let out = uninit(gpu, (count, c), table.dtype())?;
    let (table_at, out_at, c_arg) = (address(table)?, address(&out)?, c as i32);
    if count > 0 {
        let args: [&dyn KernelArg; 4] = [&table_at, &index, &out_at, &c_arg];
        gpu.launch(&name("rows", table.dtype())?, (count, 1, 1), row_threads(c), 0, &args)?;
    }
    Ok(out)
}

/// The token of each of the inputs' draws to `chosen` i32 `[draws]`, from logits f32 `[rows, vocab]`; -1 where the host
/// must look. `to_inputs`: it also becomes the inputs' id of the draw's number, for a pass that goes on with it.
pub fn sample(logits: &Tensor, inputs: &Inputs, chosen: &Tensor, to_inputs: bool) -> Result<()> {
    let gpu = of(logits.device())?;
    let (logits_at, draws, chosen_at) = (address(logits)?, inputs.draws(), address(chosen)?);
    let (ids, vocab) = (if to_inputs { inputs.ids() } else { 0 }, logits.dims()[1] as i32);
    gpu.launch("sample", (inputs.shape.draws, 1, 1), 1024, 0, &[&logits_at, &draws, &chosen_at, &ids, &vocab])
}

/// The first columns of `from` `[m, wide]` to `to` `[m, narrow]`, both f32.
pub(super) fn copy_rows(from: &Tensor, to: &Tensor) -> Result<()> {
    let gpu = of(from.device())?;
    let ((m, wide), narrow) = (from.dims2()?, to.dims()[1]);
    let (from_at, to_at, wide, narrow_arg) = (address(from)?, address(to)?, wide as i32, narrow as i32);
    gpu.launch("copy_columns", (narrow.div_ceil(1024), m, 1), 256, 0, &[&from_at, &to_at, &wide, &narrow_arg])
}

/// Matrices of one width, one below the other.
fn concat_rows(parts: &[Tensor]) -> Result<Tensor> {
    if let [one] = parts {
        return Ok(one.clone());
    }
    let first = parts.first().ok_or_else(|| internal("no rows to put together"))?;
    let ((_, c), dtype, gpu) = (first.dims2()?, first.dtype(), of(first.device())?);
    let rows = parts.iter().map(|part| part.dims()[0]).sum::<usize>();
    let out = uninit(gpu, (rows, c), dtype)?;
    let mut to = address(&out)?;
    for part in parts {
        let bytes = part.elem_count() * dtype.size_in_bytes();
        copy_on_card(gpu, address(part)?, to, bytes)?;
        to += bytes as u64;
    }
    Ok(out)
}

/// Rows of a table of embeddings by the run's ids, in the dtype of the activations.
pub fn embed(table: &Tensor, activations: DType, run: &Run) -> Result<Tensor> {
    let inputs = inputs(run)?;
    let x = rows(table, inputs.ids(), inputs.shape.rows)?;
    converted(of(table.device())?, &x, activations)
}
