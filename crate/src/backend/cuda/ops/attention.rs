//! Attention, with and without a cache of keys and values.

use candle_core::{DType, Tensor};

use super::{
    super::{Gpu, Inputs, KernelArg, address, kernel_arg, of, told::attention as told, uninit},
    inputs, name,
};
use crate::{
    backend::{
        kv_cache::KvCache,
        operands::{Attention, HeadLayout, Place},
        run::Run,
    },
    error::{Error, Result},
};

const PROJECTED: &str = "attention: projected";
const OUTPUT: &str = "attention: output";
const LOG_SUM_EXP: &str = "attention: log of the rows' sums";

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
    /// Keys that a query sees at the most; beyond any position where there is no window.
    window: i32,
}

/// The kernels' `Place`.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct PlaceArg([i32; 2]);

kernel_arg!(LayoutArg, PlaceArg);
const _: () = assert!(size_of::<LayoutArg>() == told::LAYOUT);

fn layout_arg(attention: &Attention, tokens: usize) -> LayoutArg {
    let l = &attention.layout;
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
        window: attention.window.map_or(i32::MAX, |w| w.min(i32::MAX as usize) as i32),
    }
}

/// Whether the tensor cores' kernels serve: their dtypes, head sizes and alignment.
fn is_flash(l: &HeadLayout, dtype: DType) -> bool {
    let aligned = [l.q, l.k, l.v].iter().all(|p| p.offset.is_multiple_of(8) && p.stride.is_multiple_of(8))
        && l.row.is_multiple_of(8);
    matches!(dtype, DType::F16 | DType::BF16) && matches!(l.head_dim, 32 | 64 | 128) && aligned
}

/// Whether some query of `rows` may have keys before its window. Told by the rows of the whole batch: a pass that was
/// recorded serves any lengths of its sequences.
fn windowed(attention: &Attention, rows: usize) -> bool {
    attention.window.is_some_and(|window| window < rows)
}

/// Shared memory of a kernel that holds `rows` rows of a head.
fn tile_bytes(rows: usize, head_dim: usize) -> usize {
    rows * (head_dim + 8) * 2
}

/// Shared memory of the tensor cores' backward: a tile of keys and of values, two stages of queries and gradients.
fn backward_bytes(head_dim: usize) -> usize {
    tile_bytes(6 * told::TILE, head_dim)
}

/// Whether a block has room for [`backward_bytes`], which with heads of 128 are more than some cards have.
fn has_room(gpu: &Gpu, head_dim: usize) -> bool {
    backward_bytes(head_dim) + 4 * told::TILE * DType::F32.size_in_bytes() <= gpu.shared_per_block
}

/// The slopes on the device; null where there are none.
fn slopes_at(attention: &Attention, gpu: &Gpu) -> Result<u64> {
    if attention.slopes.is_empty() { Ok(0) } else { gpu.constant(&attention.slopes) }
}

pub fn attention_forward(attention: &Attention, projected: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = of(projected.device())?;
    let (l, inputs) = (&attention.layout, inputs(run)?);
    let (m, dtype, d) = (projected.dims()[0], projected.dtype(), l.head_dim);
    if d > 256 {
        return Err(Error::argument("head_dim", d, "at most 256 on a GPU", "use DeviceMap::Cpu"));
    }
    let out = uninit(gpu, (m, l.heads * d), dtype)?;
    let lse = run.saved.is_some().then(|| uninit(gpu, (l.heads, m), DType::F32)).transpose()?;
    let lse_at = lse.as_ref().map(address).transpose()?.unwrap_or(0);
    let (qkv, slopes, out_at, arg) =
        (address(projected)?, slopes_at(attention, gpu)?, address(&out)?, layout_arg(attention, m));
    let fresh = match &run.cache {
        None => true,
        Some(cache) => cache.lengths().iter().all(|held| *held == 0),
    };
    if let Some(cache) = &run.cache {
        if !fresh && m == run.sequences.len() && matches!(d, 32 | 64 | 128) && l.row % 8 == 0 {
            let (keys, values) = cache.block(run.block);
            let (k_at, v_at, k_row, keys) = (address(keys)?, address(values)?, (l.kv_heads * d) as i64, inputs.keys());
            let args: [&dyn KernelArg; 8] = [&qkv, &k_at, &v_at, &k_row, &keys, &slopes, &out_at, &arg];
            let kernel = format!("{}_{d}", name("decode_attention", dtype)?);
            gpu.launch(&kernel, (m, l.heads, gpu.cluster_depth(&kernel)?), 256, 0, &args)?;
            return Ok(out);
        }
        append(gpu, cache, run.block, inputs, projected, &arg, d)?;
    }
    if fresh && is_flash(l, dtype) {
        let tiles = inputs.tiles();
        let kernel = format!("{}_{d}", name(if windowed(attention, m) { "flash_window" } else { "flash" }, dtype)?);
        let args: [&dyn KernelArg; 6] = [&qkv, &tiles, &slopes, &out_at, &lse_at, &arg];
        gpu.launch(&kernel, (l.heads, inputs.shape.tiles(), 1), 128, tile_bytes(4 * told::TILE, d), &args)?;
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
        run.save(PROJECTED, projected);
        run.save(OUTPUT, &out);
        run.save(LOG_SUM_EXP, &lse);
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
    let gpu = of(dy.device())?;
    let (lse, out, projected) = (run.take(LOG_SUM_EXP)?, run.take(OUTPUT)?, run.take(PROJECTED)?);
    let (l, inputs) = (&attention.layout, inputs(run)?);
    let (m, dtype, d) = (projected.dims()[0], projected.dtype(), l.head_dim);
    let grad = uninit(gpu, projected.dims(), dtype)?;
    let delta = uninit(gpu, (l.heads, m), DType::F32)?;
    let (qkv, slopes, arg) = (address(&projected)?, slopes_at(attention, gpu)?, layout_arg(attention, m));
    let (out_at, dy_at, lse_at, delta_at, grad_at) =
        (address(&out)?, address(dy)?, address(&lse)?, address(&delta)?, address(&grad)?);
    if is_flash(l, dtype) && has_room(gpu, d) {
        let kernel = format!("{}_{d}", name("flash_delta", dtype)?);
        let args: [&dyn KernelArg; 4] = [&out_at, &dy_at, &delta_at, &arg];
        gpu.launch(&kernel, ((m * l.heads).div_ceil(256 / 16), 1, 1), 256, 0, &args)?;
        let (tiles, bytes) = (inputs.tiles(), backward_bytes(d));
        let kind = if windowed(attention, m) { "flash_window_backward" } else { "flash_backward" };
        let kernel = format!("{}_{d}", name(kind, dtype)?);
        let args: [&dyn KernelArg; 8] = [&qkv, &tiles, &slopes, &dy_at, &lse_at, &delta_at, &grad_at, &arg];
        gpu.launch(&kernel, (l.kv_heads + l.heads, inputs.shape.tiles(), 1), 128, bytes, &args)?;
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
