//! Layer and RMS normalization.

use candle_core::{DType, Tensor};

use super::{
    super::{KernelArg, address, of, uninit},
    name, row_threads,
};
use crate::{
    backend::{operands::Norm, run::Run},
    error::Result,
};

const INPUT: &str = "norm: input";
const STATISTICS: &str = "norm: statistics";

pub fn norm_forward(norm: &Norm, x: &Tensor, run: &mut Run) -> Result<Tensor> {
    let gpu = of(x.device())?;
    let (m, c) = x.dims2()?;
    let y = uninit(gpu, (m, c), x.dtype())?;
    let stats = run.saved.is_some().then(|| uninit(gpu, (m, 2), DType::F32)).transpose()?;
    let stats_at = stats.as_ref().map(address).transpose()?.unwrap_or(0);
    let (x_at, w, y_at) = (address(x)?, address(&norm.wide.0)?, address(&y)?);
    let (c_arg, eps) = (c as i32, norm.eps as f32);
    let (grid, block) = ((m, 1, 1), row_threads(c));
    match &norm.wide.1 {
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
        run.save(INPUT, x);
        run.save(STATISTICS, &stats);
    }
    Ok(y)
}

pub fn norm_backward(norm: &Norm, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
    let gpu = of(dy.device())?;
    let (m, c) = dy.dims2()?;
    let (stats, x) = (run.take(STATISTICS)?, run.take(INPUT)?);
    let dx = uninit(gpu, (m, c), dy.dtype())?;
    let residual = residual.map(address).transpose()?.unwrap_or(0);
    let (dy_at, x_at, w) = (address(dy)?, address(&x)?, address(&norm.wide.0)?);
    let (s, dx_at, c_arg) = (address(&stats)?, address(&dx)?, c as i32);
    let args: [&dyn KernelArg; 7] = [&dy_at, &x_at, &w, &s, &residual, &dx_at, &c_arg];
    let kernel = if norm.bias.is_some() { "layer_norm_backward" } else { "rms_norm_backward" };
    gpu.launch(&name(kernel, dy.dtype())?, (m, 1, 1), row_threads(c), 0, &args)?;
    Ok(dx)
}
