//! The gated activation of Llama's MLP (arXiv:2002.05202): silu(gate) * up, silu(x) = x / (1 + e^-x).

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{
    cpu::{F32View, math},
    only_cpu,
    run::Run,
};
use crate::error::Result;

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 15;

/// `gate` and `up`, `[M, C]` each, to `[M, C]`; saves both.
pub fn forward(gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        return super::cuda::swiglu_forward(gate, up, run);
    }
    only_cpu("swiglu", gate.device())?;
    run.save(gate);
    run.save(up);
    let (g, u) = (F32View::new(gate)?, F32View::new(up)?);
    let mut y = vec![0f32; g.len()];
    let chunks = y.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).zip(u.par_chunks(CHUNK));
    chunks.for_each(|((y, g), u)| math::swiglu(g, u, y));
    Ok(Tensor::from_vec(y, gate.dims(), &Device::Cpu)?)
}

/// dy to the gradients of gate and up.
pub fn backward(dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return super::cuda::swiglu_backward(dy, run);
    }
    let (up, gate) = (run.take()?, run.take()?);
    let (g, u, d) = (F32View::new(&gate)?, F32View::new(&up)?, F32View::new(dy)?);
    let (mut dg, mut du) = (vec![0f32; d.len()], vec![0f32; d.len()]);
    let out = dg.par_chunks_mut(CHUNK).zip(du.par_chunks_mut(CHUNK));
    let chunks = out.zip(g.par_chunks(CHUNK)).zip(u.par_chunks(CHUNK)).zip(d.par_chunks(CHUNK));
    chunks.for_each(|((((dg, du), g), u), dy)| math::swiglu_backward(g, u, dy, dg, du));
    let tensor = |data| Tensor::from_vec(data, dy.dims(), &Device::Cpu);
    Ok((tensor(dg)?, tensor(du)?))
}
