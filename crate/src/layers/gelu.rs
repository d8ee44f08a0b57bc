//! BLOOM's gelu: 0.5 x (1 + tanh(0.79788456 x (1 + 0.044715 x^2))).

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

/// `[M, C]` to `[M, C]`; saves x.
pub fn forward(x: &Tensor, run: &mut Run) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::gelu_forward(x, run);
    }
    only_cpu("gelu", x.device())?;
    run.save(x);
    let view = F32View::new(x)?;
    let mut y = vec![0f32; view.len()];
    y.par_chunks_mut(CHUNK).zip(view.par_chunks(CHUNK)).for_each(|(y, x)| math::gelu(x, y));
    Ok(Tensor::from_vec(y, x.dims(), &Device::Cpu)?)
}

/// dy to dx.
pub fn backward(dy: &Tensor, run: &mut Run) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return super::cuda::gelu_backward(dy, run);
    }
    let x = run.take()?;
    let (x, d) = (F32View::new(&x)?, F32View::new(dy)?);
    let mut dx = vec![0f32; d.len()];
    let chunks = dx.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(d.par_chunks(CHUNK));
    chunks.for_each(|((dx, x), dy)| math::gelu_backward(x, dy, dx));
    Ok(Tensor::from_vec(dx, dy.dims(), &Device::Cpu)?)
}
