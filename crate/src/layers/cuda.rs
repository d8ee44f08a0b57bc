//! The GPU's side of the layers: the same operations, by the kernels of `kernels/cuda`.
//!
//! Activations and their gradients are in the model's dtype, sums and statistics in f32, adapters
//! and their gradients in f32.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::{
    attention::{Attention, HeadLayout, Place},
    kv_cache::KvCache,
    linear::{Linear, Lora, Weight},
    run::Run,
};
use crate::{
    cuda::{self, Gemm, Gpu, Inputs, KernelArg, Operand, address, dtype_suffix, uninit, zeros},
    error::Result,
    quant::{AbsmaxArgs, QuantType, dequantize_into, dequantize_transposed_into, transposes, values},
};

fn name(kernel: &str, dtype: DType) -> Result<String> {
    Ok(format!("{kernel}_{}", dtype_suffix(dtype)?))
}

fn internal(what: &str) -> crate::error::Error {
    candle_core::Error::Msg(what.into()).bt().into()
}

fn inputs<'a>(run: &Run<'a>) -> Result<&'a Inputs> {
    run.inputs.ok_or_else(|| internal("a pass on the GPU without its inputs"))
}

// ------------------------------------------------------------------------------------------ norms

/// Threads for a row of `c` numbers, eight a thread.
fn row_threads(c: usize) -> usize {
    (c / 8).next_multiple_of(32).clamp(32, 256)
}

/// `bias` None: RMS normalization.
pub fn norm_forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(x.device())?;
    let (m, c) = x.dims2()?;
    let y = uninit(&gpu, (m, c), x.dtype())?;
    let stats = run.saved.is_some().then(|| uninit(&gpu, (m, 2), DType::F32)).transpose()?;
    let stats_at = stats.as_ref().map(address).transpose()?.unwrap_or(0);
    let (x_at, w, y_at) = (address(x)?, address(weight)?, address(&y)?);
    let (c_arg, eps) = (c as i32, eps as f32);
    let (grid, block) = ((m, 1, 1), row_threads(c));
    match bias {
        Some(b) => {
            let b = address(b)?;
            let args: [&dyn KernelArg; 7] = [&x_at, &w, &b, &y_at, &stats_at, &c_arg, &eps];
            gpu.launch(&name("layer_norm", x.dtype())?, grid, block, 0, &args)?;
        }
        None => {
            let args: [&dyn KernelArg; 6] = [&x_at, &w, &y_at, &stats_at, &c_arg, &eps];
            gpu.launch(&name("rms_norm", x.dtype())?, grid, block, 0, &args)?;
        }
    }
    if let Some(stats) = stats {
        run.save(x);
        run.save(&stats);
    }
    Ok(y)
}

/// `center`: layer normalization; otherwise RMS.
pub fn norm_backward(
    dy: &Tensor,
    weight: &Tensor,
    center: bool,
    residual: Option<&Tensor>,
    run: &mut Run,
) -> Result<Tensor> {
    let gpu = cuda::of(dy.device())?;
    let (m, c) = dy.dims2()?;
    let (stats, x) = (run.take()?, run.take()?);
    let dx = uninit(&gpu, (m, c), dy.dtype())?;
    let residual = residual.map(address).transpose()?.unwrap_or(0);
    let (dy_at, x_at, w, s, dx_at) = (address(dy)?, address(&x)?, address(weight)?, address(&stats)?, address(&dx)?);
    let c_arg = c as i32;
    let args: [&dyn KernelArg; 7] = [&dy_at, &x_at, &w, &s, &residual, &dx_at, &c_arg];
    let kernel = if center { "layer_norm_backward" } else { "rms_norm_backward" };
    gpu.launch(&name(kernel, dy.dtype())?, (m, 1, 1), row_threads(c), 0, &args)?;
    Ok(dx)
}

// ------------------------------------------------------------------------------------------- gelu

fn elementwise_grid(n: usize) -> Result<(usize, usize, usize)> {
    if n % 8 == 0 { Ok((n.div_ceil(8 * 256), 1, 1)) } else { Err(internal("elements: not a multiple of 8")) }
}

pub fn gelu_forward(x: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(x.device())?;
    run.save(x);
    let y = uninit(&gpu, x.dims(), x.dtype())?;
    let (x_at, y_at, n) = (address(x)?, address(&y)?, x.elem_count() as i64);
    gpu.launch(&name("gelu", x.dtype())?, elementwise_grid(x.elem_count())?, 256, 0, &[&x_at, &y_at, &n])?;
    Ok(y)
}

pub fn gelu_backward(dy: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(dy.device())?;
    let x = run.take()?;
    let dx = uninit(&gpu, dy.dims(), dy.dtype())?;
    let (dy_at, x_at, dx_at, n) = (address(dy)?, address(&x)?, address(&dx)?, dy.elem_count() as i64);
    let args: [&dyn KernelArg; 4] = [&dy_at, &x_at, &dx_at, &n];
    gpu.launch(&name("gelu_backward", dy.dtype())?, elementwise_grid(dy.elem_count())?, 256, 0, &args)?;
    Ok(dx)
}

pub fn swiglu_forward(gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(gate.device())?;
    run.save(gate);
    run.save(up);
    let y = uninit(&gpu, gate.dims(), gate.dtype())?;
    let (gate_at, up_at, y_at, n) = (address(gate)?, address(up)?, address(&y)?, gate.elem_count() as i64);
    let args: [&dyn KernelArg; 4] = [&gate_at, &up_at, &y_at, &n];
    gpu.launch(&name("swiglu", gate.dtype())?, elementwise_grid(gate.elem_count())?, 256, 0, &args)?;
    Ok(y)
}

pub fn swiglu_backward(dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
    let gpu = cuda::of(dy.device())?;
    let (up, gate) = (run.take()?, run.take()?);
    let (dgate, dup) = (uninit(&gpu, dy.dims(), dy.dtype())?, uninit(&gpu, dy.dims(), dy.dtype())?);
    let (dy_at, gate_at, up_at) = (address(dy)?, address(&gate)?, address(&up)?);
    let (dgate_at, dup_at, n) = (address(&dgate)?, address(&dup)?, dy.elem_count() as i64);
    let args: [&dyn KernelArg; 6] = [&dy_at, &gate_at, &up_at, &dgate_at, &dup_at, &n];
    gpu.launch(&name("swiglu_backward", dy.dtype())?, elementwise_grid(dy.elem_count())?, 256, 0, &args)?;
    Ok((dgate, dup))
}

// ------------------------------------------------------------------------------------------- rope

pub fn rope_join(
    inv_freq: &[f32],
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &HeadLayout,
    run: &Run,
) -> Result<Tensor> {
    let gpu = cuda::of(q.device())?;
    let joined = uninit(&gpu, (q.dims()[0], layout.row), q.dtype())?;
    rope(&gpu, "rope_join", inv_freq, [q, k, v], &joined, layout, run)?;
    Ok(joined)
}

pub fn rope_split(inv_freq: &[f32], d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
    let gpu = cuda::of(d.device())?;
    let part = |heads: usize| uninit(&gpu, (d.dims()[0], heads * layout.head_dim), d.dtype());
    let (q, k, v) = (part(layout.heads)?, part(layout.kv_heads)?, part(layout.kv_heads)?);
    rope(&gpu, "rope_split", inv_freq, [&q, &k, &v], d, layout, run)?;
    Ok([q, k, v])
}

fn rope(
    gpu: &Gpu,
    kernel: &str,
    inv_freq: &[f32],
    [q, k, v]: [&Tensor; 3],
    joined: &Tensor,
    l: &HeadLayout,
    run: &Run,
) -> Result<()> {
    let (positions, freq) = (inputs(run)?.positions(), gpu.constant(inv_freq)?);
    let (q_at, k_at, v_at, joined_at) = (address(q)?, address(k)?, address(v)?, address(joined)?);
    let (heads, kv_heads, d) = (l.heads as i32, l.kv_heads as i32, l.head_dim as i32);
    let args: [&dyn KernelArg; 9] = [&positions, &freq, &q_at, &k_at, &v_at, &joined_at, &heads, &kv_heads, &d];
    gpu.launch(&name(kernel, joined.dtype())?, (joined.dims()[0], 1, 1), 256, 0, &args)
}

// -------------------------------------------------------------------------------------- embedding

/// Rows of `table` `[.., C]` by `count` indices at an address; a negative index gives zeros.
pub fn rows(table: &Tensor, index: u64, count: usize) -> Result<Tensor> {
    let gpu = cuda::of(table.device())?;
    let c = table.dims()[1];
    let out = uninit(&gpu, (count, c), table.dtype())?;
    let (table_at, out_at, c_arg) = (address(table)?, address(&out)?, c as i32);
    if count > 0 {
        let args: [&dyn KernelArg; 4] = [&table_at, &index, &out_at, &c_arg];
        gpu.launch(&name("rows", table.dtype())?, (count, 1, 1), row_threads(c), 0, &args)?;
    }
    Ok(out)
}

// ----------------------------------------------------------------------------------------- linear

/// The weight as a matrix product wants it, and what keeps it alive.
struct Dense {
    address: u64,
    _owner: Option<Tensor>,
}

fn dense(gpu: &Gpu, weight: &Weight, dtype: DType) -> Result<Dense> {
    let owner = match weight {
        Weight::Dense(t) if t.dtype() == dtype => t.clone(),
        Weight::Dense(t) => t.to_dtype(dtype)?,
        Weight::Quantized(q) => {
            let at = gpu.scratch(q.shape().iter().product::<usize>() * dtype.size_in_bytes())?;
            dequantize_into(gpu, q, at, dtype)?;
            return Ok(Dense { address: at, _owner: None });
        }
    };
    Ok(Dense { address: address(&owner)?, _owner: Some(owner) })
}

/// dy `[m, n]` times a weight `[n, k]`. A quantized weight is transposed on its way, because the products with
/// both sides contiguous along the sum are the fastest.
fn times_weight(
    gpu: &Gpu,
    dy: Operand,
    weight: &Weight,
    (m, n, k): (usize, usize, usize),
    y: Operand,
    dtype: DType,
) -> Result<()> {
    let (w, transposed) = match weight {
        Weight::Quantized(q) if transposes(q, dtype) => {
            let address = gpu.scratch(n * k * dtype.size_in_bytes())?;
            dequantize_transposed_into(gpu, q, address, dtype)?;
            (Dense { address, _owner: None }, true)
        }
        other => (dense(gpu, other, dtype)?, false),
    };
    let row = if transposed { n } else { k };
    let w = Operand { address: w.address, row };
    gpu.gemm(&Gemm { m, n: k, k: n, x: dy, w, transposed, y, c: None, bias: None, dtype, out: dtype })
}

impl Lora {
    /// Address of the key of the dropout masks (0: nothing is dropped), the layer's own, the probability.
    fn dropout_args(&self, run: &Run) -> Result<(u64, u64, f64)> {
        let active = run.dropout_key.is_some() && self.dropout > 0.0;
        Ok((if active { inputs(run)?.dropout_key() } else { 0 }, self.id, self.dropout))
    }
}

/// u `[M, r]` = alpha * dropout(x) W^T with W's element (r, k) at `w[r * wr + k * wk]`.
fn down(
    gpu: &Gpu,
    x: &Tensor,
    (w, wr, wk): (u64, usize, usize),
    rank: usize,
    alpha: f64,
    dropout: (u64, u64, f64),
) -> Result<Tensor> {
    let (m, k) = x.dims2()?;
    let u = uninit(gpu, (m, rank), DType::F32)?;
    let (x_at, u_at, alpha) = (address(x)?, address(&u)?, alpha as f32);
    let (wr, wk) = (wr as i64, wk as i64);
    let (m_arg, k, r) = (m as i32, k as i32, rank as i32);
    let (key, id, p) = dropout;
    let args: [&dyn KernelArg; 12] = [&x_at, &w, &wr, &wk, &u_at, &alpha, &m_arg, &k, &r, &key, &id, &p];
    gpu.launch(&name("lora_down", x.dtype())?, (m.div_ceil(8), 1, 1), 512, 0, &args)?;
    Ok(u)
}

/// y `[M, n]` += alpha * dropout(u W^T) with W's element (n, r) at `w[n * wn + r * wr]`.
fn up(
    gpu: &Gpu,
    u: &Tensor,
    (w, wn, wr): (u64, usize, usize),
    y: &Tensor,
    alpha: f64,
    dropout: (u64, u64, f64),
) -> Result<()> {
    let ((m, rank), n) = (u.dims2()?, y.dims()[1]);
    let (u_at, y_at, alpha) = (address(u)?, address(y)?, alpha as f32);
    let (wn, wr) = (wn as i64, wr as i64);
    let (m_arg, n_arg, r) = (m as i32, n as i32, rank as i32);
    let (key, id, p) = dropout;
    let args: [&dyn KernelArg; 12] = [&u_at, &w, &wn, &wr, &y_at, &alpha, &m_arg, &n_arg, &r, &key, &id, &p];
    gpu.launch(&name("lora_up", y.dtype())?, (n.div_ceil(4 * 128), m.div_ceil(16), 1), 128, 0, &args)
}

/// g += grad_scale * alpha * dropout(x)^T u, g's element (n, r) at `g[n * gn + r * gr]`.
fn grad(
    gpu: &Gpu,
    x: &Tensor,
    u: &Tensor,
    (g, gn, gr): (u64, usize, usize),
    scale: u64,
    alpha: f64,
    dropout: (u64, u64, f64),
) -> Result<()> {
    let ((m, n), rank) = (x.dims2()?, u.dims()[1]);
    let (x_at, u_at, alpha) = (address(x)?, address(u)?, alpha as f32);
    let (gn, gr) = (gn as i64, gr as i64);
    let (m_arg, n_arg, r) = (m as i32, n as i32, rank as i32);
    let (key, id, p) = dropout;
    let args: [&dyn KernelArg; 13] = [&x_at, &u_at, &g, &gn, &gr, &scale, &alpha, &m_arg, &n_arg, &r, &key, &id, &p];
    gpu.launch(&name("lora_grad", x.dtype())?, (n.div_ceil(16), 1, 1), 256, 0, &args)
}

const NO_DROPOUT: (u64, u64, f64) = (0, 0, 0.0);

/// Rows that are few enough for the kernels that read the weight once and multiply as they read.
const FEW: usize = 8;
/// Shared memory that a block may have.
const MAX_SHARED: usize = 200 << 10;

/// Whether `gemv.cu` serves: few rows, nothing to be kept for a backward, aligned rows.
fn is_few(linear: &Linear, x: &Tensor, run: &Run) -> Result<bool> {
    let (m, k) = x.dims2()?;
    let fits = m <= FEW && k % 8 == 0 && m * k * x.dtype().size_in_bytes() <= MAX_SHARED;
    let dropped = linear.lora.as_ref().is_some_and(|l| l.dropout > 0.0) && run.dropout_key.is_some();
    let stored = match &linear.weight {
        Weight::Quantized(q) => q.state().quant_type != QuantType::Int8,
        Weight::Dense(w) => w.dtype() == x.dtype(),
    };
    Ok(fits && stored && !dropped && run.saved.is_none())
}

/// [`linear_forward`] for few rows; `n` rows of the weight are multiplied and `ld` is y's row.
fn few_rows(gpu: &Gpu, linear: &Linear, x: &Tensor, c: Option<&Tensor>, y: &Tensor, gelu: bool) -> Result<()> {
    let ((m, k), dtype, out) = (x.dims2()?, x.dtype(), y.dtype());
    let (n, _) = linear.weight.dims2()?;
    let u = match &linear.lora {
        None => None,
        Some(lora) => {
            let (r, x_at, a) = (lora.rank(), address(x)?, address(lora.a.value())?);
            let u = uninit(gpu, (m, r), DType::F32)?;
            let (u_at, k_arg, r_arg) = (address(&u)?, k as i32, r as i32);
            let args: [&dyn KernelArg; 5] = [&x_at, &a, &u_at, &k_arg, &r_arg];
            gpu.launch(&name("down_few", dtype)?, (m, r, 1), 256, 0, &args)?;
            Some(u)
        }
    };
    let (x_at, y_at) = (address(x)?, address(y)?);
    let (m_arg, n_arg, k_arg, ld) = (m as i32, n as i32, k as i32, y.dims()[1] as i64);
    let bias = linear.bias.as_ref().map(address).transpose()?.unwrap_or(0);
    let u_at = u.as_ref().map(address).transpose()?.unwrap_or(0);
    let (b, alpha, rank) = match &linear.lora {
        None => (0, 0f32, 0i32),
        Some(lora) => (address(lora.b.value())?, lora.scaling as f32, lora.rank() as i32),
    };
    let (c_at, gelu) = (c.map(address).transpose()?.unwrap_or(0), i32::from(gelu));
    // Eight warps a block, a row of the weight each.
    let (grid, shared) = ((n.div_ceil(8), 1, 1), m * k * dtype.size_in_bytes());
    let rows = if m == 1 { 1 } else { 8 };
    match &linear.weight {
        Weight::Quantized(q) => {
            let (w, a, code) = (address(q.packed())?, AbsmaxArgs::new(q.state())?, values(q.state().quant_type));
            let args: [&dyn KernelArg; 19] = [
                &x_at,
                &w,
                &a.at,
                &a.absmax2,
                &a.code2,
                &a.offset,
                &a.log_block,
                &a.log_block2,
                &code,
                &y_at,
                &m_arg,
                &n_arg,
                &k_arg,
                &bias,
                &u_at,
                &b,
                &alpha,
                &rank,
                &c_at,
            ];
            let args: Vec<&dyn KernelArg> = args.into_iter().chain([&gelu as &dyn KernelArg]).collect();
            let bytes = (32 << 10) + m * (k + 8) * 2 + 8 * 16 * 8 * 4;
            let whole = k % 64 == 0 && q.state().blocksize % 64 == 0 && bytes <= MAX_SHARED;
            if dtype != DType::F32 && whole {
                let kernel = name("gemv_4bit_mma", dtype)?;
                return gpu.launch(&kernel, (n.div_ceil(16), 1, 1), 256, bytes, &args);
            }
            // As many blocks as run at once: a warp takes several rows.
            let grid = (grid.0.min(3 * gpu.processors), 1, 1);
            gpu.launch(&format!("{}_{rows}", name("gemv_4bit", dtype)?), grid, 256, shared, &args)
        }
        Weight::Dense(w) => {
            let w = address(w)?;
            let args: [&dyn KernelArg; 14] =
                [&x_at, &w, &y_at, &m_arg, &n_arg, &k_arg, &ld, &bias, &u_at, &b, &alpha, &rank, &c_at, &gelu];
            let kernel = if out == dtype { "gemv" } else { "gemv_logits" };
            gpu.launch(&format!("{}_{rows}", name(kernel, dtype)?), grid, 256, shared, &args)
        }
    }
}

/// [`linear_forward`] and gelu after it.
pub fn linear_gelu(linear: &Linear, x: &Tensor, run: &mut Run) -> Result<Tensor> {
    if is_few(linear, x, run)? {
        let gpu = cuda::of(x.device())?;
        let y = uninit(&gpu, (x.dims()[0], linear.weight.dims2()?.0), x.dtype())?;
        few_rows(&gpu, linear, x, None, &y, true)?;
        return Ok(y);
    }
    gelu_forward(&linear_forward(linear, x, None, run)?, run)
}

/// y = x W^T + bias + residual.
fn product(gpu: &Gpu, linear: &Linear, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
    let ((m, k), (n, _), dtype) = (x.dims2()?, linear.weight.dims2()?, x.dtype());
    let y = uninit(gpu, (m, n), dtype)?;
    let weight = dense(gpu, &linear.weight, dtype)?;
    let operand = |t: &Tensor, row: usize| Ok::<_, crate::error::Error>(Operand { address: address(t)?, row });
    gpu.gemm(&Gemm {
        m,
        n,
        k,
        x: operand(x, k)?,
        w: Operand { address: weight.address, row: k },
        transposed: true,
        y: operand(&y, n)?,
        c: residual.map(|r| operand(r, n)).transpose()?,
        bias: linear.bias.as_ref().map(address).transpose()?,
        dtype,
        out: dtype,
    })?;
    Ok(y)
}

/// y, plus `residual`; saves x and A x when an adapter needs them.
pub fn linear_forward(linear: &Linear, x: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(x.device())?;
    let (m, k) = x.dims2()?;
    let (n, _) = linear.weight.dims2()?;
    let dtype = x.dtype();
    if is_few(linear, x, run)? {
        let y = uninit(&gpu, (m, n), dtype)?;
        few_rows(&gpu, linear, x, residual, &y, false)?;
        return Ok(y);
    }
    let y = product(&gpu, linear, x, residual)?;
    if let Some(lora) = &linear.lora {
        let rank = lora.rank();
        let u = down(&gpu, x, (address(lora.a.value())?, k, 1), rank, 1.0, lora.dropout_args(run)?)?;
        up(&gpu, &u, (address(lora.b.value())?, rank, 1), &y, lora.scaling, NO_DROPOUT)?;
        run.save(x);
        run.save(&u);
    }
    Ok(y)
}

/// What [`linear_forward`] saves, without its result.
pub fn linear_remember(linear: &Linear, x: &Tensor, run: &mut Run) -> Result<()> {
    let Some(lora) = &linear.lora else { return Ok(()) };
    let gpu = cuda::of(x.device())?;
    let k = x.dims()[1];
    let u = down(&gpu, x, (address(lora.a.value())?, k, 1), lora.rank(), 1.0, lora.dropout_args(run)?)?;
    run.save(x);
    run.save(&u);
    Ok(())
}

/// dy to dx; adds to the adapter's gradients.
pub fn linear_backward(linear: &Linear, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
    let gpu = cuda::of(dy.device())?;
    let (m, n) = dy.dims2()?;
    let (_, k) = linear.weight.dims2()?;
    let dtype = dy.dtype();
    let mut dx = None;
    if need_dx {
        let y = uninit(&gpu, (m, k), dtype)?;
        let dy_at = Operand { address: address(dy)?, row: n };
        times_weight(&gpu, dy_at, &linear.weight, (m, n, k), Operand { address: address(&y)?, row: k }, dtype)?;
        dx = Some(y);
    }
    if let Some(lora) = &linear.lora {
        let (u, x) = (run.take()?, run.take()?);
        let (rank, scale) = (lora.rank(), inputs(run)?.grad_scale());
        let dropout = lora.dropout_args(run)?;
        let du = down(&gpu, dy, (address(lora.b.value())?, 1, rank), rank, lora.scaling, NO_DROPOUT)?;
        grad(&gpu, dy, &u, (address(lora.b.grad())?, rank, 1), scale, lora.scaling, NO_DROPOUT)?;
        grad(&gpu, &x, &du, (address(lora.a.grad())?, 1, k), scale, 1.0, dropout)?;
        if let Some(dx) = &dx {
            up(&gpu, &du, (address(lora.a.value())?, 1, k), dx, 1.0, dropout)?;
        }
    }
    Ok(dx)
}

// -------------------------------------------------------------------------------------- attention

/// The kernels' `Layout`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LayoutArg {
    row: i32,
    q: [i32; 2],
    k: [i32; 2],
    v: [i32; 2],
    heads: i32,
    kv_heads: i32,
    tokens: i32,
    scale: f32,
}

impl KernelArg for LayoutArg {
    fn pointer(&self) -> *mut std::ffi::c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

/// The kernels' `Place`.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct PlaceArg([i32; 2]);

impl KernelArg for PlaceArg {
    fn pointer(&self) -> *mut std::ffi::c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

fn layout_arg(l: &HeadLayout, tokens: usize) -> LayoutArg {
    let place = |p: Place| [p.offset as i32, p.stride as i32];
    LayoutArg {
        row: l.row as i32,
        q: place(l.q),
        k: place(l.k),
        v: place(l.v),
        heads: l.heads as i32,
        kv_heads: l.kv_heads as i32,
        tokens: tokens as i32,
        scale: 1.0 / (l.head_dim as f32).sqrt(),
    }
}

/// Whether the tensor cores' kernels serve: their dtypes, head sizes and alignment.
fn is_flash(l: &HeadLayout, dtype: DType) -> bool {
    let aligned = [l.q, l.k, l.v].iter().all(|p| p.offset % 8 == 0 && p.stride % 8 == 0) && l.row % 8 == 0;
    matches!(dtype, DType::F16 | DType::BF16) && matches!(l.head_dim, 32 | 64 | 128) && aligned
}

/// Shared memory of a kernel that holds `rows` rows of a head.
fn tile_bytes(rows: usize, head_dim: usize) -> usize {
    rows * (head_dim + 8) * 2
}

/// The slopes on the device; null where there are none.
fn slopes_at(attention: &Attention, gpu: &Arc<Gpu>) -> Result<u64> {
    if attention.slopes.is_empty() { Ok(0) } else { gpu.constant(&attention.slopes) }
}

pub fn attention_forward(attention: &Attention, projected: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(projected.device())?;
    let (l, inputs) = (&attention.layout, inputs(run)?);
    let (m, dtype, d) = (projected.dims()[0], projected.dtype(), l.head_dim);
    if d > 256 {
        return Err(crate::error::Error::argument("head_dim", d, "at most 256 on a GPU", "use DeviceMap::Cpu"));
    }
    let out = uninit(&gpu, (m, l.heads * d), dtype)?;
    let lse = run.saved.is_some().then(|| uninit(&gpu, (l.heads, m), DType::F32)).transpose()?;
    let lse_at = lse.as_ref().map(address).transpose()?.unwrap_or(0);
    let (qkv, slopes, out_at, arg) =
        (address(projected)?, slopes_at(attention, &gpu)?, address(&out)?, layout_arg(l, m));
    let fresh = match &run.cache {
        None => true,
        Some(cache) => cache.lengths().iter().all(|held| *held == 0),
    };
    if let Some(cache) = &run.cache {
        // Its block keeps a score a key: some 50 thousand of them.
        let one_each = !fresh && m == run.sequences.len() && matches!(d, 32 | 64 | 128) && l.row % 8 == 0;
        if one_each && cache.capacity() * 4 <= MAX_SHARED / 2 {
            let (keys, values) = cache.block(run.block);
            let (k_at, v_at, k_row, keys) = (address(keys)?, address(values)?, (l.kv_heads * d) as i64, inputs.keys());
            let args: [&dyn KernelArg; 8] = [&qkv, &k_at, &v_at, &k_row, &keys, &slopes, &out_at, &arg];
            let kernel = format!("{}_{d}", name("decode_attention", dtype)?);
            gpu.launch(&kernel, (m, l.heads, 1), 1024, cache.capacity() * 4, &args)?;
            return Ok(out);
        }
        append(&gpu, cache, run.block, inputs, projected, &arg, d)?;
    }
    if fresh && is_flash(l, dtype) {
        let tiles = inputs.tiles();
        let kernel = format!("{}_{d}", name("flash", dtype)?);
        let args: [&dyn KernelArg; 6] = [&qkv, &tiles, &slopes, &out_at, &lse_at, &arg];
        gpu.launch(&kernel, (l.heads, inputs.shape.tiles(), 1), 128, tile_bytes(4 * 64, d), &args)?;
    } else {
        let keys = inputs.keys();
        let place = |p: Place| PlaceArg([p.offset as i32, p.stride as i32]);
        let (k_at, v_at, k_row, k_place, v_place) = match &run.cache {
            None => (qkv, qkv, l.row as i64, place(l.k), place(l.v)),
            Some(cache) => {
                let (keys, values) = cache.block(run.block);
                let heads = Place { offset: 0, stride: d };
                (address(keys)?, address(values)?, (l.kv_heads * d) as i64, place(heads), place(heads))
            }
        };
        let d_arg = d as i32;
        let args: [&dyn KernelArg; 12] =
            [&qkv, &k_at, &v_at, &k_row, &k_place, &v_place, &keys, &slopes, &out_at, &lse_at, &arg, &d_arg];
        gpu.launch(&name("rows_attention", dtype)?, (m, l.heads, 1), 128, 0, &args)?;
    }
    if let Some(lse) = lse {
        run.save(projected);
        run.save(&out);
        run.save(&lse);
    }
    Ok(out)
}

fn append(
    gpu: &Gpu,
    cache: &KvCache,
    block: usize,
    inputs: &Inputs,
    projected: &Tensor,
    arg: &LayoutArg,
    head_dim: usize,
) -> Result<()> {
    let (keys, values) = cache.block(block);
    let (qkv, places, k, v, d) =
        (address(projected)?, inputs.cache_rows(), address(keys)?, address(values)?, head_dim as i32);
    let args: [&dyn KernelArg; 6] = [&qkv, &places, &k, &v, arg, &d];
    gpu.launch(&name("append", projected.dtype())?, (projected.dims()[0], 1, 1), 256, 0, &args)
}

pub fn attention_backward(attention: &Attention, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(dy.device())?;
    let (lse, out, projected) = (run.take()?, run.take()?, run.take()?);
    let (l, inputs) = (&attention.layout, inputs(run)?);
    let (m, dtype, d) = (projected.dims()[0], projected.dtype(), l.head_dim);
    let grad = uninit(&gpu, projected.dims(), dtype)?;
    let delta = uninit(&gpu, (l.heads, m), DType::F32)?;
    let (qkv, slopes, arg) = (address(&projected)?, slopes_at(attention, &gpu)?, layout_arg(l, m));
    let (out_at, dy_at, lse_at, delta_at, grad_at) =
        (address(&out)?, address(dy)?, address(&lse)?, address(&delta)?, address(&grad)?);
    if is_flash(l, dtype) {
        let tiles = inputs.tiles();
        let bytes = tile_bytes(2 * 64 + 4 * 32, d);
        let kernel = format!("{}_{d}", name("flash_dq", dtype)?);
        let args: [&dyn KernelArg; 9] = [&qkv, &tiles, &slopes, &out_at, &dy_at, &lse_at, &delta_at, &grad_at, &arg];
        gpu.launch(&kernel, (l.heads, inputs.shape.tiles(), 1), 128, bytes, &args)?;
        let kernel = format!("{}_{d}", name("flash_dkv", dtype)?);
        let args: [&dyn KernelArg; 8] = [&qkv, &tiles, &slopes, &dy_at, &lse_at, &delta_at, &grad_at, &arg];
        gpu.launch(&kernel, (l.kv_heads, inputs.shape.tiles(), 1), 128, bytes, &args)?;
    } else {
        let (keys, after, d_arg) = (inputs.keys(), inputs.after(), d as i32);
        let args: [&dyn KernelArg; 10] =
            [&qkv, &keys, &slopes, &out_at, &dy_at, &lse_at, &delta_at, &grad_at, &arg, &d_arg];
        gpu.launch(&name("rows_attention_dq", dtype)?, (m, l.heads, 1), 128, 0, &args)?;
        let args: [&dyn KernelArg; 9] = [&qkv, &after, &slopes, &dy_at, &lse_at, &delta_at, &grad_at, &arg, &d_arg];
        gpu.launch(&name("rows_attention_dkv", dtype)?, (m, l.kv_heads, 1), 128, 0, &args)?;
    }
    Ok(grad)
}

// ---------------------------------------------------------------------------------- head and loss

/// Rows of logits that exist at a time.
const CHUNK_ROWS: usize = super::cross_entropy::GPU_CHUNK_ROWS;

/// The head's weight with as many rows as its memory has: those of a padded table are zeros, and a
/// product of a round size is faster.
fn head_rows(weight: &Weight) -> Result<usize> {
    let (n, k) = weight.dims2()?;
    match weight {
        Weight::Dense(t) => Ok((cuda::alloc(t)?.1 / k).min(n.next_multiple_of(64))),
        Weight::Quantized(_) => Ok(n),
    }
}

/// Logits in f32, `[rows, padded vocabulary]`.
pub fn head_logits(head: &Linear, x: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = cuda::of(x.device())?;
    let (m, k) = x.dims2()?;
    if is_few(head, x, run)? && matches!(head.weight, Weight::Dense(_)) {
        let logits = uninit(&gpu, (m, head.weight.dims2()?.0), DType::F32)?;
        few_rows(&gpu, head, x, None, &logits, false)?;
        return Ok(logits);
    }
    let n = head_rows(&head.weight)?;
    let logits = uninit(&gpu, (m, n), DType::F32)?;
    let weight = dense(&gpu, &head.weight, x.dtype())?;
    gpu.gemm(&Gemm {
        m,
        n,
        k,
        x: Operand { address: address(x)?, row: k },
        w: Operand { address: weight.address, row: k },
        transposed: true,
        y: Operand { address: address(&logits)?, row: n },
        c: None,
        bias: None,
        dtype: x.dtype(),
        out: DType::F32,
    })?;
    if let Some(lora) = &head.lora {
        let (vocab, _) = head.weight.dims2()?;
        if vocab != n {
            return Err(internal("an adapter on a padded head"));
        }
        let u = down(&gpu, x, (address(lora.a.value())?, k, 1), lora.rank(), 1.0, lora.dropout_args(run)?)?;
        up(&gpu, &u, (address(lora.b.value())?, lora.rank(), 1), &logits, lora.scaling, NO_DROPOUT)?;
        run.save(x);
        run.save(&u);
    }
    Ok(logits)
}

/// The loss of the labelled rows of `hidden` (their sum to `loss`, f64 on the device) and, with
/// `learn`, the gradient of `loss_scale` times it by `hidden`.
pub fn head_and_loss(hidden: &Tensor, head: &Linear, learn: bool, loss: u64, run: &Run) -> Result<Option<Tensor>> {
    let gpu = cuda::of(hidden.device())?;
    let inputs = inputs(run)?;
    let ((m, c), dtype, labels) = (hidden.dims2()?, hidden.dtype(), inputs.shape.labels);
    let (vocab, _) = head.weight.dims2()?;
    let losses = uninit(&gpu, labels.max(1), DType::F32)?;
    let losses_at = address(&losses)?;
    let labelled = rows(hidden, inputs.label_rows(), labels)?;
    let grads = learn.then(|| uninit(&gpu, (labels, c), dtype)).transpose()?;
    for begin in (0..labels).step_by(CHUNK_ROWS) {
        let count = CHUNK_ROWS.min(labels - begin);
        let x = labelled.narrow(0, begin, count)?;
        let mut chunk = Run { inputs: run.inputs, dropout_key: run.dropout_key, ..Run::inference(run.sequences) };
        if learn {
            chunk.saved = Some(Default::default());
        }
        let logits = head_logits(head, &x, &mut chunk)?;
        let ld = logits.dims()[1];
        let dlogits = learn.then(|| uninit(&gpu, (count, ld), dtype)).transpose()?;
        let at = |base: u64, width: usize| base + (begin * width) as u64;
        let (logits_at, targets, chunk_losses) = (address(&logits)?, at(inputs.targets(), 4), at(losses_at, 4));
        let (grad_at, scale) = (dlogits.as_ref().map(address).transpose()?.unwrap_or(0), inputs.loss_scale());
        let (vocab_arg, ld_arg) = (vocab as i32, ld as i32);
        let args: [&dyn KernelArg; 7] = [&logits_at, &targets, &chunk_losses, &grad_at, &scale, &vocab_arg, &ld_arg];
        gpu.launch(&name("cross_entropy", dtype)?, (count, 1, 1), 1024, 0, &args)?;
        drop(logits);
        let (Some(dlogits), Some(grads)) = (dlogits, &grads) else { continue };
        let weight = dense(&gpu, &head.weight, dtype)?;
        let row_bytes = c * dtype.size_in_bytes();
        gpu.gemm(&Gemm {
            m: count,
            n: c,
            k: ld,
            x: Operand { address: address(&dlogits)?, row: ld },
            w: Operand { address: weight.address, row: c },
            transposed: false,
            y: Operand { address: at(address(grads)?, row_bytes), row: c },
            c: None,
            bias: None,
            dtype,
            out: dtype,
        })?;
        if let Some(lora) = &head.lora {
            let (u, x) = (chunk.take()?, chunk.take()?);
            let dropout = lora.dropout_args(run)?;
            let (rank, scale) = (lora.rank(), inputs.grad_scale());
            let du = down(&gpu, &dlogits, (address(lora.b.value())?, 1, rank), rank, lora.scaling, NO_DROPOUT)?;
            grad(&gpu, &dlogits, &u, (address(lora.b.grad())?, rank, 1), scale, lora.scaling, NO_DROPOUT)?;
            grad(&gpu, &x, &du, (address(lora.a.grad())?, 1, c), scale, 1.0, dropout)?;
            let dx = grads.narrow(0, begin, count)?;
            up(&gpu, &du, (address(lora.a.value())?, 1, c), &dx, 1.0, dropout)?;
        }
    }
    let n = labels as i32;
    gpu.launch("sum_f64", (1, 1, 1), 256, 0, &[&losses_at, &loss, &n])?;
    let Some(grads) = grads else { return Ok(None) };
    if labels == 0 {
        return zeros(&gpu, (m, c), dtype).map(Some);
    }
    rows(&grads, inputs.slots(), m).map(Some)
}

/// The first columns of `from` `[m, wide]` to `to` `[m, narrow]`, both f32.
pub fn copy_rows(from: &Tensor, to: &Tensor) -> Result<()> {
    let gpu = cuda::of(from.device())?;
    let ((m, wide), narrow) = (from.dims2()?, to.dims()[1]);
    let (from_at, to_at, wide, narrow_arg) = (address(from)?, address(to)?, wide as i32, narrow as i32);
    gpu.launch("copy_columns", (narrow.div_ceil(1024), m, 1), 256, 0, &[&from_at, &to_at, &wide, &narrow_arg])
}
