//! Layer and RMS normalization.

use candle_core::{DType, Tensor};

use super::{super::run::Run, name, row_threads};
use crate::{
    cuda::{self, KernelArg, address, uninit},
    error::Result,
};

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
