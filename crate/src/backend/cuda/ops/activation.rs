//! Gelu and SwiGLU.

use candle_core::Tensor;

use super::{
    super::{KernelArg, address, of, uninit},
    name,
};
use crate::{
    backend::{internal, run::Run},
    error::Result,
};

const GELU_INPUT: &str = "gelu: input";
const GATE: &str = "swiglu: gate";
const UP: &str = "swiglu: up";

fn elementwise_grid(n: usize) -> Result<(usize, usize, usize)> {
    if n.is_multiple_of(8) { Ok((n.div_ceil(8 * 256), 1, 1)) } else { Err(internal("elements: not a multiple of 8")) }
}

/// Keeps what gelu's backward takes, for a product that made gelu itself.
pub fn save_gelu_input(x: &Tensor, run: &mut Run) {
    run.save(GELU_INPUT, x);
}

pub fn gelu_forward(x: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = of(x.device())?;
    run.save(GELU_INPUT, x);
    let y = uninit(gpu, x.dims(), x.dtype())?;
    let (x_at, y_at, n) = (address(x)?, address(&y)?, x.elem_count() as i64);
    gpu.launch(&name("gelu", x.dtype())?, elementwise_grid(x.elem_count())?, 256, 0, &[&x_at, &y_at, &n])?;
    Ok(y)
}

pub fn gelu_backward(dy: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = of(dy.device())?;
    let x = run.take(GELU_INPUT)?;
    let dx = uninit(gpu, dy.dims(), dy.dtype())?;
    let (dy_at, x_at, dx_at, n) = (address(dy)?, address(&x)?, address(&dx)?, dy.elem_count() as i64);
    let args: [&dyn KernelArg; 4] = [&dy_at, &x_at, &dx_at, &n];
    gpu.launch(&name("gelu_backward", dy.dtype())?, elementwise_grid(dy.elem_count())?, 256, 0, &args)?;
    Ok(dx)
}

pub fn swiglu_forward(gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = of(gate.device())?;
    run.save(GATE, gate);
    run.save(UP, up);
    let y = uninit(gpu, gate.dims(), gate.dtype())?;
    let (gate_at, up_at, y_at, n) = (address(gate)?, address(up)?, address(&y)?, gate.elem_count() as i64);
    let args: [&dyn KernelArg; 4] = [&gate_at, &up_at, &y_at, &n];
    gpu.launch(&name("swiglu", gate.dtype())?, elementwise_grid(gate.elem_count())?, 256, 0, &args)?;
    Ok(y)
}

pub fn swiglu_backward(dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
    let gpu = of(dy.device())?;
    let (up, gate) = (run.take(UP)?, run.take(GATE)?);
    let (dgate, dup) = (uninit(gpu, dy.dims(), dy.dtype())?, uninit(gpu, dy.dims(), dy.dtype())?);
    let (dy_at, gate_at, up_at) = (address(dy)?, address(&gate)?, address(&up)?);
    let (dgate_at, dup_at, n) = (address(&dgate)?, address(&dup)?, dy.elem_count() as i64);
    let args: [&dyn KernelArg; 6] = [&dy_at, &gate_at, &up_at, &dgate_at, &dup_at, &n];
    gpu.launch(&name("swiglu_backward", dy.dtype())?, elementwise_grid(dy.elem_count())?, 256, 0, &args)?;
    Ok((dgate, dup))
}
