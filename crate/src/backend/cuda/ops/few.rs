//! Linear layers for the few rows of decoding.

use candle_core::{DType, Tensor};

use super::{
    super::{
        Gpu, KernelArg, address, of,
        quant::{AbsmaxArgs, values},
        told::gemv_4bit_mma::{ALONG, FIXED, LONG, SHORT, WARPS},
        uninit,
    },
    name,
    product::Product,
};
use crate::{
    backend::{
        operands::{Lora, Norm, Weight},
        run::Run,
    },
    error::Result,
    quantized::QuantType,
};

/// Rows that are few enough for the kernels that read the weight once and multiply as they read.
const FEW: usize = 8;
/// Places of the queue of `gemv_4bit_mma`.
const DEPTH: usize = 4;
/// Shared memory that a processor keeps of each of its blocks.
const RESERVED: usize = 1 << 10;
/// Shared memory that the other kernels have besides x.
const MARGIN: usize = 4 << 10;
/// Numbers of an adapter's A x that the kernel makes itself.
const MAX_U: usize = 64;

/// Whether `gemv.cu` serves: few rows, nothing to be kept for a backward, aligned rows.
pub fn serves(linear: &Product, x: &Tensor, run: &Run) -> Result<bool> {
    let (m, k) = x.dims2()?;
    let room = of(x.device())?.shared_per_block - MARGIN;
    let fits = m <= FEW && k % 8 == 0 && m * k * x.dtype().size_in_bytes() <= room;
    let dropped = linear.lora.is_some_and(|l| l.dropout > 0.0) && run.dropout_key.is_some();
    let stored = match &linear.frozen.weight {
        Weight::Quantized(q) => q.state().quant_type != QuantType::Int8 && linear.dtype(x.dtype()) == x.dtype(),
        Weight::Dense(w) => w.dtype() == x.dtype(),
    };
    Ok(fits && stored && !dropped && run.saved.is_none())
}

/// How `gemv_4bit_mma` shares out its work.
struct Plan {
    blocks: usize,
    /// Tiles of a block, at most.
    own: usize,
    /// Places of each warp's queue.
    places: usize,
    shared: usize,
    /// How maxima lie in the queue.
    once_a_row: bool,
    /// It makes the adapter's A x.
    makes_u: bool,
}

impl Plan {
    /// `None`: the kernel does not serve.
    fn new(gpu: &Gpu, linear: &Product, x: &Tensor) -> Result<Option<Self>> {
        let ((m, k), (n, _)) = (x.dims2()?, linear.frozen.weight.dims2()?);
        let Weight::Quantized(q) = &linear.frozen.weight else { return Ok(None) };
        if x.dtype() == DType::F32 || k % 64 != 0 || q.state().blocksize % 64 != 0 {
            return Ok(None);
        }
        // Sixteen rows of the weight are a tile; as few a block of threads as keep every processor busy.
        let tiles = n.div_ceil(16);
        let mut own = tiles.div_ceil(gpu.processors);
        let rank = linear.lora.map_or(0, Lora::rank);
        let once_a_row =
            q.state().state2.as_ref().is_some_and(|second| {
                k % (4 * 64) == 0 && q.state().blocksize == 64 && second.blocksize.is_multiple_of(4)
            });
        let piece = if once_a_row { SHORT } else { LONG };
        let bytes = |own: usize, places: usize| {
            FIXED + places * WARPS * piece + m * (k + 8) * 2 + own * 16 * (WARPS * m + rank) * 4
        };
        let mut places = DEPTH.min(own * k.div_ceil(ALONG));
        while bytes(own, places) > gpu.shared_per_block {
            match (own, places) {
                (1, 1) => return Ok(None),
                (own_now, 1) => own = own_now.div_ceil(2),
                _ => places -= 1,
            }
        }
        // Of places beyond the first two, only as many as leave the next kernel's block its half.
        let half = (gpu.shared_per_block + RESERVED) / 2 - RESERVED;
        while places > 2 && bytes(own, 2) <= half && bytes(own, places) > half {
            places -= 1;
        }
        let makes_u = linear.lora.is_some() && m * rank <= MAX_U;
        Ok(Some(Self { blocks: tiles.div_ceil(own), own, places, shared: bytes(own, places), once_a_row, makes_u }))
    }
}

/// What stands around a product.
#[derive(Default)]
pub struct Around<'a> {
    /// What x goes through first.
    pub norm: Option<&'a Norm>,
    /// Is added.
    pub c: Option<&'a Tensor>,
    pub gelu: bool,
}

/// Whether [`forward`] takes a norm too.
pub fn takes_norm(linear: &Product, x: &Tensor, run: &Run) -> Result<bool> {
    Ok(serves(linear, x, run)?
        && Plan::new(of(x.device())?, linear, x)?.is_some_and(|plan| {
            // What makes u outside has no normed x.
            linear.lora.is_none() || plan.makes_u
        }))
}

/// The layer's output with what stands around it, in dtype `out`: x's, or f32 for a weight that is not quantized.
pub fn forward(linear: &Product, x: &Tensor, out: DType, around: &Around) -> Result<Tensor> {
    let gpu = of(x.device())?;
    let ((m, k), dtype) = (x.dims2()?, x.dtype());
    let (n, _) = linear.frozen.weight.dims2()?;
    let y = uninit(gpu, (m, n), out)?;
    let plan = Plan::new(gpu, linear, x)?;
    let u = match linear.lora {
        Some(lora) if !plan.as_ref().is_some_and(|plan| plan.makes_u) => Some(down(gpu, lora, x)?),
        _ => None,
    };
    let (x_at, y_at) = (address(x)?, address(&y)?);
    let (m_arg, n_arg, k_arg) = (m as i32, n as i32, k as i32);
    let at = |t: Option<&Tensor>| t.map_or(Ok(0), address);
    let (bias, u_at, c_at) = (at(linear.frozen.bias.as_ref())?, at(u.as_ref())?, at(around.c)?);
    let (b, alpha, rank) = match linear.lora {
        None => (0, 0f32, 0i32),
        Some(lora) => (address(lora.b.value())?, lora.scaling as f32, lora.rank() as i32),
    };
    let gelu = i32::from(around.gelu);
    let epilogue: [&dyn KernelArg; 7] = [&bias, &u_at, &b, &alpha, &rank, &c_at, &gelu];
    // Eight warps a block, a row of the weight each.
    let (blocks, shared) = (n.div_ceil(8), m * k * dtype.size_in_bytes());
    let rows = if m == 1 { 1 } else { 8 };
    match &linear.frozen.weight {
        Weight::Quantized(q) => {
            let (w, a, code) = (address(q.packed())?, AbsmaxArgs::new(q.state())?, values(q.state().quant_type));
            let absmax: [&dyn KernelArg; 6] = [&a.at, &a.absmax2, &a.code2, &a.offset, &a.log_block, &a.log_block2];
            let operands: [&dyn KernelArg; 2] = [&x_at, &w];
            let shape: [&dyn KernelArg; 5] = [&code, &y_at, &m_arg, &n_arg, &k_arg];
            let args = [&operands[..], &absmax, &shape, &epilogue].concat();
            if let Some(plan) = plan {
                let lora_a = at(linear.lora.filter(|_| plan.makes_u).map(|lora| lora.a.value()))?;
                let wide = around.norm.map(|norm| &norm.wide);
                let norm_w = at(wide.map(|(weight, _)| weight))?;
                let norm_b = at(wide.and_then(|(_, bias)| bias.as_ref()))?;
                let eps = around.norm.map_or(0.0, |norm| norm.eps) as f32;
                let (own, places, once_a_row) = (plan.own as i32, plan.places as i32, i32::from(plan.once_a_row));
                let before: [&dyn KernelArg; 7] = [&lora_a, &norm_w, &norm_b, &eps, &own, &places, &once_a_row];
                let args = [&args[..], &before].concat();
                gpu.launch(&name("gemv_4bit_mma", dtype)?, (plan.blocks, 1, 1), 32 * WARPS, plan.shared, &args)?;
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
