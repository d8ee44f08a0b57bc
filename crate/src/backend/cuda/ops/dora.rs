//! What DoRA adds to LoRA.

use candle_core::{DType, Tensor};

use super::{
    super::{KernelArg, address, of, told::dora::COLUMNS, uninit},
    card,
    linear::linear_forward,
    name,
    product::Product,
    sum::converted,
};
use crate::{
    backend::{
        operands::{Around, Frozen, Lora},
        param::Param,
        run::Run,
    },
    error::Result,
};

/// The lengths of the rows of W + s B A: A goes through the layer as r rows of x, so W is read as for a product.
pub fn dora_norms(frozen: &Frozen, lora: &Lora, weight_norms2: &Tensor, dtype: DType, run: &mut Run) -> Result<Tensor> {
    let (a, b) = (lora.a.value(), lora.b.value());
    let (gpu, (r, k), n) = (of(a.device())?, a.dims2()?, weight_norms2.elem_count());
    let x = converted(gpu, a, dtype)?;
    let around = Around { logits: true, ..Around::default() };
    let product = Product { frozen, lora: None };
    let wa = run.with_saved(None, |run| linear_forward(&product, &(&x).into(), &around, run))?; // (r, out)
    let (gram, norms) = (uninit(gpu, (r, r), DType::F32)?, uninit(gpu, n, DType::F32)?);
    let (a_at, gram_at, k_arg) = (address(a)?, address(&gram)?, k as i32);
    gpu.launch("dora_gram", (r, r, 1), 256, 0, &[&a_at, &gram_at, &k_arg])?;
    let (norms2, wa_at, b_at, norms_at) = (address(weight_norms2)?, address(&wa)?, address(b)?, address(&norms)?);
    let (s, n_arg, columns, r_arg) = (lora.scaling as f32, n as i32, wa.dims()[1] as i32, r as i32);
    let args: [&dyn KernelArg; 9] = [&norms2, &wa_at, &gram_at, &b_at, &norms_at, &s, &n_arg, &columns, &r_arg];
    gpu.launch("dora_norms", (n.div_ceil(256), 1, 1), 256, 0, &args)?;
    Ok(norms)
}

pub fn scale_columns(
    z: &Tensor,
    [magnitude, norms]: [&Tensor; 2],
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let (gpu, count) = (of(z.device())?, z.elem_count());
    let y = uninit(gpu, z.dims(), z.dtype())?;
    let at = |t: Option<&Tensor>| t.map_or(Ok(0), address);
    let (z_at, m, norms, bias, c) = (address(z)?, address(magnitude)?, address(norms)?, at(bias)?, at(residual)?);
    let (y_at, count_arg, n) = (address(&y)?, count as i64, z.dims2()?.1 as i32);
    let args: [&dyn KernelArg; 8] = [&z_at, &m, &norms, &bias, &c, &y_at, &count_arg, &n];
    gpu.launch(&name("scale_columns", z.dtype())?, (count.div_ceil(256), 1, 1), 256, 0, &args)?;
    Ok(y)
}

pub fn scale_columns_backward(dy: &Tensor, z: &Tensor, magnitude: &Param, norms: &Tensor, run: &Run) -> Result<Tensor> {
    let (gpu, (m, n)) = (of(dy.device())?, dy.dims2()?);
    let dz = uninit(gpu, (m, n), dy.dtype())?;
    let (dy_at, z_at, magnitude_at, norms) = (address(dy)?, address(z)?, address(magnitude.value())?, address(norms)?);
    let (dz_at, grad, by) = (address(&dz)?, address(magnitude.grad())?, card(run)?.inputs.grad_scale());
    let (m_arg, n_arg) = (m as i32, n as i32);
    let args: [&dyn KernelArg; 9] = [&dy_at, &z_at, &magnitude_at, &norms, &dz_at, &grad, &by, &m_arg, &n_arg];
    gpu.launch(&name("scale_columns_backward", dy.dtype())?, (n.div_ceil(COLUMNS), 1, 1), 256, 0, &args)?;
    Ok(dz)
}
