//! LoRA's thin products: u = A dropout(x), y = scaling B u, and their gradients.

use candle_core::{DType, Tensor};

use super::{
    super::{
        Gpu, KernelArg, address,
        told::lora::{GRAD_COLUMNS, MAX_BANDS, TILE_COLUMNS, TILE_ROWS, UP_MMA_ROWS, UP_ROWS},
        uninit,
    },
    inputs, name,
};
use crate::{
    backend::{operands::Lora, run::Run},
    error::Result,
};

const INPUT: &str = "lora: input";
/// A dropout(x).
const DOWN: &str = "lora: A x";

/// Saves x and u = A dropout(x) `[M, r]`, and gives u.
pub fn forward_down(gpu: &Gpu, lora: &Lora, x: &Tensor, run: &mut Run) -> Result<Tensor> {
    let ((m, k), rank) = (x.dims2()?, lora.rank());
    let u = uninit(gpu, (m, rank), DType::F32)?;
    let (x_at, a, u_at) = (address(x)?, address(lora.a.value())?, address(&u)?);
    let (m_arg, k_arg, r) = (m as i32, k as i32, rank as i32);
    let (key, id, p) = lora.dropout_args(run)?;
    let args: [&dyn KernelArg; 9] = [&x_at, &a, &u_at, &m_arg, &k_arg, &r, &key, &id, &p];
    gpu.launch(&name("lora_down", x.dtype())?, (m.div_ceil(DOWN_ROWS), 1, 1), 512, 0, &args)?;
    run.save(INPUT, x);
    run.save(DOWN, &u);
    Ok(u)
}

/// y = scaling B u, or what it is and that.
pub fn forward_up(gpu: &Gpu, lora: &Lora, u: &Tensor, y: &Tensor, add: bool) -> Result<()> {
    let ((m, rank), n) = (u.dims2()?, y.dims()[1]);
    let (u_at, b, y_at, alpha) = (address(u)?, address(lora.b.value())?, address(y)?, lora.scaling as f32);
    let c = if add { y_at } else { 0 };
    let (m_arg, n_arg, r) = (m as i32, n as i32, rank as i32);
    let args: [&dyn KernelArg; 8] = [&u_at, &b, &c, &y_at, &alpha, &m_arg, &n_arg, &r];
    gpu.launch(&name("lora_up", y.dtype())?, (up_blocks(m, n, y.dtype()), 1, 1), 256, 0, &args)
}

/// Takes what [`forward_down`] saved; adds to the adapter's gradients and, where dx is given, makes it the adapter's
/// part: dropout(scaling dy B A).
pub fn backward(gpu: &Gpu, lora: &Lora, dy: &Tensor, dx: Option<&Tensor>, run: &mut Run) -> Result<()> {
    let (u, x) = (run.take(DOWN)?, run.take(INPUT)?);
    let ((m, n), rank, scale) = (dy.dims2()?, lora.rank(), inputs(run)?.grad_scale());
    let du = uninit(gpu, (m, rank), DType::F32)?;
    let (dy_at, b, du_at, u_at, grad) =
        (address(dy)?, address(lora.b.value())?, address(&du)?, address(&u)?, address(lora.b.grad())?);
    // On the tensor cores dy is read once, a tile a block: what the tiles have of du and of the gradient, and how many
    // bands of rows there are.
    let (wide, tall, bands) = match dy.dtype() {
        DType::F32 => (0, 0, 0),
        _ => (n.div_ceil(TILE_COLUMNS), m.div_ceil(TILE_ROWS), m.div_ceil(TILE_ROWS).min(MAX_BANDS)),
    };
    let du_parts = uninit(gpu, (tall * wide * TILE_ROWS * rank).max(1), DType::F32)?;
    let grad_parts = uninit(gpu, (bands * (n * rank).next_multiple_of(4)).max(1), DType::F32)?;
    let (du_parts_at, grad_parts_at) = (address(&du_parts)?, address(&grad_parts)?);
    let (downs, grads) = (m.div_ceil(DOWN_ROWS), n.div_ceil(GRAD_COLUMNS));
    let (alpha, m_arg, n_arg, r, grads_arg) = (lora.scaling as f32, m as i32, n as i32, rank as i32, grads as i32);
    let args: [&dyn KernelArg; 13] = [
        &dy_at,
        &b,
        &du_at,
        &u_at,
        &grad,
        &du_parts_at,
        &grad_parts_at,
        &scale,
        &alpha,
        &m_arg,
        &n_arg,
        &r,
        &grads_arg,
    ];
    let (grid, threads) = if bands > 0 { ((wide, bands, 1), 256) } else { ((grads + downs, 1, 1), 512) };
    gpu.launch(&name("lora_backward_b", dy.dtype())?, grid, threads, 0, &args)?;

    let (k, grad_b) = (x.dims()[1], grad);
    let (x_at, a, grad) = (address(&x)?, address(lora.a.value())?, address(lora.a.grad())?);
    let dx_at = dx.map(address).transpose()?.unwrap_or(0);
    let grads = k.div_ceil(GRAD_COLUMNS);
    let size = if bands > 0 { n * rank } else { 0 };
    let adds = size.div_ceil(4 * 256);
    let ups = if dx.is_some() { up_blocks(m, k, x.dtype()) } else { 0 };
    let (k_arg, grads_arg, adds_arg, bands_arg, size_arg) =
        (k as i32, grads as i32, adds as i32, bands as i32, size as i32);
    let (key, id, p) = lora.dropout_args(run)?;
    let args: [&dyn KernelArg; 18] = [
        &x_at,
        &a,
        &dx_at,
        &du_at,
        &grad,
        &grad_b,
        &grad_parts_at,
        &scale,
        &m_arg,
        &k_arg,
        &r,
        &grads_arg,
        &adds_arg,
        &bands_arg,
        &size_arg,
        &key,
        &id,
        &p,
    ];
    gpu.launch(&name("lora_backward_a", x.dtype())?, (grads + adds + ups, 1, 1), 256, 0, &args)
}

/// Blocks of 256 that make a matrix: 32 columns of 32 rows a warp on the tensor cores, else eight of sixteen a thread.
fn up_blocks(m: usize, n: usize, dtype: DType) -> usize {
    match dtype {
        DType::F32 => (n.div_ceil(8) * m.div_ceil(UP_ROWS)).div_ceil(256),
        _ => (n.div_ceil(32) * m.div_ceil(UP_MMA_ROWS)).div_ceil(8),
    }
}

impl Lora {
    /// Address of the key of the dropout masks (0: nothing is dropped), the layer's own, the probability.
    fn dropout_args(&self, run: &Run) -> Result<(u64, u64, f64)> {
        let active = run.dropout_key.is_some() && self.dropout > 0.0;
        Ok((if active { inputs(run)?.dropout_key() } else { 0 }, self.id, self.dropout))
    }
}

/// Rows of a block that makes u.
const DOWN_ROWS: usize = 8;
