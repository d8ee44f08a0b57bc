//! Sums of matrices, and conversions between their dtypes.

use candle_core::{DType, Tensor};

use super::super::{Gpu, KernelArg, address, dtype_suffix, of, uninit};
use crate::error::Result;

/// Numbers that a block of threads makes.
const SUMMED: usize = 8 * 256;

/// y = from + bias + c in y's dtype, each where it is given: `from` in any, bias and c in y's; c may be y itself.
pub fn sum_into(gpu: &Gpu, from: &Tensor, bias: Option<&Tensor>, c: Option<&Tensor>, y: &Tensor) -> Result<()> {
    let at = |t: Option<&Tensor>| t.map_or(Ok(0), address);
    let (from_at, bias, c, y_at) = (address(from)?, at(bias)?, at(c)?, address(y)?);
    let (n, columns) = (y.elem_count() as i64, y.dims().last().copied().unwrap_or(1) as i32);
    let kernel = format!("sum_{}_{}", dtype_suffix(from.dtype())?, dtype_suffix(y.dtype())?);
    let args: [&dyn KernelArg; 6] = [&from_at, &bias, &c, &y_at, &n, &columns];
    gpu.launch(&kernel, (y.elem_count().div_ceil(SUMMED), 1, 1), 256, 0, &args)
}

/// a + b.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let gpu = of(a.device())?;
    let y = uninit(gpu, a.dims(), a.dtype())?;
    sum_into(gpu, a, None, Some(b), &y)?;
    Ok(y)
}

/// x in another dtype; itself where that is its own.
pub fn converted(gpu: &Gpu, x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let y = uninit(gpu, x.dims(), dtype)?;
    sum_into(gpu, x, None, None, &y)?;
    Ok(y)
}
