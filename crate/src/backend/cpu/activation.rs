//! Gelu and SwiGLU.

use candle_core::{Device, Tensor};

use super::{
    super::{Activations, run::Run},
    Cpu, F32View, SharedMut, math, team,
};
use crate::error::Result;

const GELU_INPUT: &str = "gelu: input";
const GATE: &str = "swiglu: gate";
const UP: &str = "swiglu: up";

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 13;

impl Activations for Cpu {
    fn gelu(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.save(GELU_INPUT, x);
        let view = F32View::new(x)?;
        let mut y = vec![0f32; view.len()];
        team::chunks(&mut y, CHUNK, |range, y| math::gelu(&view[range], y));
        Ok(Tensor::from_vec(y, x.dims(), &Device::Cpu)?)
    }

    fn gelu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        let x = run.take(GELU_INPUT)?;
        let (x, d) = (F32View::new(&x)?, F32View::new(dy)?);
        let mut dx = vec![0f32; d.len()];
        team::chunks(&mut dx, CHUNK, |range, dx| math::gelu_backward(&x[range.clone()], &d[range], dx));
        Ok(Tensor::from_vec(dx, dy.dims(), &Device::Cpu)?)
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.save(GATE, gate);
        run.save(UP, up);
        let (g, u) = (F32View::new(gate)?, F32View::new(up)?);
        let mut y = vec![0f32; g.len()];
        team::chunks(&mut y, CHUNK, |range, y| math::swiglu(&g[range.clone()], &u[range], y));
        Ok(Tensor::from_vec(y, gate.dims(), &Device::Cpu)?)
    }

    fn swiglu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
        let (up, gate) = (run.take(UP)?, run.take(GATE)?);
        let (g, u, d) = (F32View::new(&gate)?, F32View::new(&up)?, F32View::new(dy)?);
        let (mut dg, mut du) = (vec![0f32; d.len()], vec![0f32; d.len()]);
        let (len, to_g, to_u) = (d.len(), SharedMut::new(&mut dg), SharedMut::new(&mut du));
        team::ranges(len, CHUNK, |at| {
            // SAFETY: these elements belong to this share.
            let (dg, du) = unsafe { (to_g.slice(at.clone()), to_u.slice(at.clone())) };
            math::swiglu_backward(&g[at.clone()], &u[at.clone()], &d[at], dg, du);
        });
        let tensor = |data| Tensor::from_vec(data, dy.dims(), &Device::Cpu);
        Ok((tensor(dg)?, tensor(du)?))
    }
}
