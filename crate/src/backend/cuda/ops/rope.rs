//! Rotary position embedding.

use candle_core::Tensor;

use super::{
    super::{Gpu, KernelArg, address, of, uninit},
    inputs, name,
};
use crate::{
    backend::{
        operands::{HeadLayout, Rope},
        run::Run,
    },
    error::Result,
};

pub fn rope_join(rope: &Rope, qkv: [&Tensor; 3], layout: &HeadLayout, run: &Run) -> Result<Tensor> {
    let gpu = of(qkv[0].device())?;
    let joined = uninit(gpu, (qkv[0].dims()[0], layout.row), qkv[0].dtype())?;
    turn(gpu, "rope_join", rope, qkv, &joined, layout, run)?;
    Ok(joined)
}

pub fn rope_split(rope: &Rope, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
    let gpu = of(d.device())?;
    let part = |width: usize| uninit(gpu, (d.dims()[0], width), d.dtype());
    let (q, k, v) = (part(layout.width())?, part(layout.kv_width())?, part(layout.kv_width())?);
    turn(gpu, "rope_split", rope, [&q, &k, &v], d, layout, run)?;
    Ok([q, k, v])
}

fn turn(
    gpu: &Gpu,
    kernel: &str,
    rope: &Rope,
    [q, k, v]: [&Tensor; 3],
    joined: &Tensor,
    l: &HeadLayout,
    run: &Run,
) -> Result<()> {
    let (positions, freq) = (inputs(run)?.positions(), gpu.constant(&rope.inv_freq)?);
    let (q_at, k_at, v_at, joined_at) = (address(q)?, address(k)?, address(v)?, address(joined)?);
    let (heads, kv_heads, d) = (l.heads as i32, l.kv_heads as i32, l.head_dim as i32);
    let args: [&dyn KernelArg; 9] = [&positions, &freq, &q_at, &k_at, &v_at, &joined_at, &heads, &kv_heads, &d];
    gpu.launch(&name(kernel, joined.dtype())?, (joined.dims()[0], 1, 1), 256, 0, &args)
}
