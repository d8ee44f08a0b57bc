//! Linear layers for the few rows of decoding.

use candle_core::{DType, Tensor};

use super::{
    super::{
        linear::{Linear, Lora, Weight},
        run::Run,
    },
    MAX_SHARED, name,
};
use crate::{
    cuda::{self, Gpu, KernelArg, address, uninit},
    error::Result,
    quant::{AbsmaxArgs, QuantType, values},
};

/// Rows that are few enough for the kernels that read the weight once and multiply as they read.
const FEW: usize = 8;
/// Warps of a block of `gemv_4bit_mma`.
const WARPS: usize = 16;
/// Shared memory of a block beside which one of the next kernel finds room.
const HALF_SHARED: usize = 112 << 10;

/// Whether `gemv.cu` serves: few rows, nothing to be kept for a backward, aligned rows.
pub fn serves(linear: &Linear, x: &Tensor, run: &Run) -> Result<bool> {
    let (m, k) = x.dims2()?;
    let fits = m <= FEW && k % 8 == 0 && m * k * x.dtype().size_in_bytes() <= MAX_SHARED;
    let dropped = linear.lora.as_ref().is_some_and(|l| l.dropout > 0.0) && run.dropout_key.is_some();
    let stored = match &linear.weight {
        Weight::Quantized(q) => q.state().quant_type != QuantType::Int8,
        Weight::Dense(w) => w.dtype() == x.dtype(),
    };
    Ok(fits && stored && !dropped && run.saved.is_none())
}

/// The layer's output, plus `c`, through gelu when asked, in dtype `out`: x's, or f32 for a weight that is not quantized.
pub fn forward(linear: &Linear, x: &Tensor, c: Option<&Tensor>, out: DType, gelu: bool) -> Result<Tensor> {
    let gpu = &*cuda::of(x.device())?;
    let ((m, k), dtype) = (x.dims2()?, x.dtype());
    let (n, _) = linear.weight.dims2()?;
    let y = uninit(gpu, (m, n), out)?;
    // Sixteen rows of the weight at a time a block, and a block a processor, so that the next kernel's find room too.
    let tiles = n.div_ceil(16);
    let blocks_mma = tiles.min(gpu.processors);
    let shared_mma = (32 << 10) + m * (k + 8) * 2 + (2 * WARPS + tiles.div_ceil(blocks_mma)) * 16 * m * 4;
    let on_tensor_cores = match &linear.weight {
        Weight::Quantized(q) => {
            dtype != DType::F32 && k % 64 == 0 && q.state().blocksize % 64 == 0 && shared_mma <= MAX_SHARED
        }
        Weight::Dense(_) => false,
    };
    // Where A fits into its shared memory, that kernel makes u itself.
    let inside =
        |lora: &&Lora| on_tensor_cores && m * lora.rank() <= 64 && shared_mma + lora.rank() * k * 4 <= HALF_SHARED;
    let lora_inside = linear.lora.as_ref().filter(inside);
    let u = match &linear.lora {
        Some(lora) if lora_inside.is_none() => Some(down(gpu, lora, x)?),
        _ => None,
    };
    let (x_at, y_at) = (address(x)?, address(&y)?);
    let (m_arg, n_arg, k_arg) = (m as i32, n as i32, k as i32);
    let bias = linear.bias.as_ref().map(address).transpose()?.unwrap_or(0);
    let u_at = u.as_ref().map(address).transpose()?.unwrap_or(0);
    let (b, alpha, rank) = match &linear.lora {
        None => (0, 0f32, 0i32),
        Some(lora) => (address(lora.b.value())?, lora.scaling as f32, lora.rank() as i32),
    };
    let (c_at, gelu) = (c.map(address).transpose()?.unwrap_or(0), i32::from(gelu));
    let epilogue: [&dyn KernelArg; 7] = [&bias, &u_at, &b, &alpha, &rank, &c_at, &gelu];
    // Eight warps a block, a row of the weight each.
    let (blocks, shared) = (n.div_ceil(8), m * k * dtype.size_in_bytes());
    let rows = if m == 1 { 1 } else { 8 };
    match &linear.weight {
        Weight::Quantized(q) => {
            let (w, a, code) = (address(q.packed())?, AbsmaxArgs::new(q.state())?, values(q.state().quant_type));
            let absmax: [&dyn KernelArg; 6] = [&a.at, &a.absmax2, &a.code2, &a.offset, &a.log_block, &a.log_block2];
            let operands: [&dyn KernelArg; 2] = [&x_at, &w];
            let shape: [&dyn KernelArg; 5] = [&code, &y_at, &m_arg, &n_arg, &k_arg];
            let args = [&operands[..], &absmax, &shape, &epilogue].concat();
            if on_tensor_cores {
                let lora_a = lora_inside.map(|lora| address(lora.a.value())).transpose()?.unwrap_or(0);
                let bytes = shared_mma + lora_inside.map_or(0, |lora| lora.rank() * k * 4);
                let args = [&args[..], &[&lora_a as &dyn KernelArg]].concat();
                gpu.launch(&name("gemv_4bit_mma", dtype)?, (blocks_mma, 1, 1), 32 * WARPS, bytes, &args)?;
            } else {
                // As many blocks as run at once: a warp takes several rows.
                let blocks = blocks.min(3 * gpu.processors);
                gpu.launch(&format!("{}_{rows}", name("gemv_4bit", dtype)?), (blocks, 1, 1), 256, shared, &args)?;
            }
        }
        Weight::Dense(w) => {
            let w = address(w)?;
            let operands: [&dyn KernelArg; 6] = [&x_at, &w, &y_at, &m_arg, &n_arg, &k_arg];
            let args = [&operands[..], &epilogue].concat();
            let kernel = if out == dtype { "gemv" } else { "gemv_logits" };
            gpu.launch(&format!("{}_{rows}", name(kernel, dtype)?), (blocks, 1, 1), 256, shared, &args)?;
        }
    }
    Ok(y)
}

/// u = A x, f32.
fn down(gpu: &Gpu, lora: &Lora, x: &Tensor) -> Result<Tensor> {
    let ((m, k), r) = (x.dims2()?, lora.rank());
    let u = uninit(gpu, (m, r), DType::F32)?;
    let (x_at, a, u_at, k_arg, r_arg) = (address(x)?, address(lora.a.value())?, address(&u)?, k as i32, r as i32);
    let args: [&dyn KernelArg; 5] = [&x_at, &a, &u_at, &k_arg, &r_arg];
    gpu.launch(&name("down_few", x.dtype())?, (m, r, 1), 256, 0, &args)?;
    Ok(u)
}
