//! Gelu and SwiGLU.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{
    super::{Activations, run::Run},
    Cpu, F32View, math,
};
use crate::error::Result;

const GELU_INPUT: &str = "gelu: input";
const GATE: &str = "swiglu: gate";
const UP: &str = "swiglu: up";

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 15;

impl Activations for Cpu {
    fn gelu(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.save(GELU_INPUT, x);
        let view = F32View::new(x)?;
        let mut y = vec![0f32; view.len()];
        y.par_chunks_mut(CHUNK).zip(view.par_chunks(CHUNK)).for_each(|(y, x)| math::gelu(x, y));
        Ok(Tensor::from_vec(y, x.dims(), &Device::Cpu)?)
    }

    fn gelu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        let x = run.take(GELU_INPUT)?;
        let (x, d) = (F32View::new(&x)?, F32View::new(dy)?);
        let mut dx = vec![0f32; d.len()];
        let chunks = dx.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(d.par_chunks(CHUNK));
        chunks.for_each(|((dx, x), dy)| math::gelu_backward(x, dy, dx));
        Ok(Tensor::from_vec(dx, dy.dims(), &Device::Cpu)?)
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.save(GATE, gate);
        run.save(UP, up);
        let (g, u) = (F32View::new(gate)?, F32View::new(up)?);
        let mut y = vec![0f32; g.len()];
        let chunks = y.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).zip(u.par_chunks(CHUNK));
        chunks.for_each(|((y, g), u)| math::swiglu(g, u, y));
        Ok(Tensor::from_vec(y, gate.dims(), &Device::Cpu)?)
    }

    fn swiglu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
        let (up, gate) = (run.take(UP)?, run.take(GATE)?);
        let (g, u, d) = (F32View::new(&gate)?, F32View::new(&up)?, F32View::new(dy)?);
        let (mut dg, mut du) = (vec![0f32; d.len()], vec![0f32; d.len()]);
        let out = dg.par_chunks_mut(CHUNK).zip(du.par_chunks_mut(CHUNK));
        let chunks = out.zip(g.par_chunks(CHUNK)).zip(u.par_chunks(CHUNK)).zip(d.par_chunks(CHUNK));
        chunks.for_each(|((((dg, du), g), u), dy)| math::swiglu_backward(g, u, dy, dg, du));
        let tensor = |data| Tensor::from_vec(data, dy.dims(), &Device::Cpu);
        Ok((tensor(dg)?, tensor(du)?))
    }
}
