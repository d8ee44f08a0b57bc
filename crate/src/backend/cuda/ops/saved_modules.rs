//! Modules that learn whole.

use candle_core::{DType, Tensor};

use super::{
    super::{Gemm, Gpu, KernelArg, Operand, address, inputs::ROWS, uninit},
    inputs, name, row_threads,
};
use crate::{
    backend::{param::Param, run::Run},
    error::Result,
};

/// The weight in another dtype, with rows of zeros behind it as a loaded table has.
pub fn cast_weight(gpu: &Gpu, weight: &Param, dtype: DType) -> Result<Tensor> {
    let (n, k) = weight.value().dims2()?;
    let padded = n.next_multiple_of(ROWS);
    let table = uninit(gpu, (padded, k), dtype)?;
    let (from, to, count, all) = (address(weight.value())?, address(&table)?, (n * k) as i64, (padded * k) as i64);
    let blocks = (padded * k).div_ceil(256);
    gpu.launch(&name("cast_table", dtype)?, (blocks, 1, 1), 256, 0, &[&from, &to, &count, &all])?;
    Ok(table.narrow(0, 0, n)?)
}

pub fn weight_backward(gpu: &Gpu, x: &Tensor, dy: &Tensor, weight: &Param, run: &Run) -> Result<()> {
    let ((m, columns), (n, k)) = (dy.dims2()?, weight.value().dims2()?);
    let grad = Operand { address: address(weight.grad())?, row: k };
    gpu.gemm(&Gemm {
        m: n,
        n: k,
        k: m,
        x: Operand { address: address(dy)?, row: columns },
        x_transposed: true,
        w: Operand { address: address(x)?, row: k },
        transposed: false,
        y: grad,
        c: Some(grad),
        bias: None,
        gelu: None,
        scale: Some(inputs(run)?.grad_scale()),
        dtype: dy.dtype(),
        out: DType::F32,
    })
}

pub fn embed_backward(gpu: &Gpu, dx: &Tensor, table: &Param, padding_idx: Option<usize>, run: &Run) -> Result<()> {
    let ((rows, c), inputs) = (dx.dims2()?, inputs(run)?);
    let (dx_at, ids, grad, scale) = (address(dx)?, inputs.ids(), address(table.grad())?, inputs.grad_scale());
    let (rows_arg, c_arg, padding) = (rows as i32, c as i32, padding_idx.map_or(-1, |id| id as i32));
    let args: [&dyn KernelArg; 7] = [&dx_at, &ids, &grad, &scale, &rows_arg, &c_arg, &padding];
    gpu.launch(&name("embedding_backward", dx.dtype())?, (rows, 1, 1), row_threads(c), 0, &args)
}
