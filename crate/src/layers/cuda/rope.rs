//! Rotary position embedding.

use candle_core::Tensor;

use super::{
    super::{attention::HeadLayout, run::Run},
    inputs, name,
};
use crate::{
    cuda::{self, Gpu, KernelArg, address, uninit},
    error::Result,
};

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
