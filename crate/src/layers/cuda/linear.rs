//! Linear layers: a matrix product of cuBLASLt, with what stands on it.

use candle_core::{DType, Tensor};

use super::{
    super::{linear::Linear, norm::Normed, run::Run},
    few::{self, Around},
    gelu_forward, lora,
    weights::with_weight,
};
use crate::{
    cuda::{self, Gemm, Gpu, Operand, address, uninit},
    error::Result,
};

/// Where the rows of a matrix are.
fn operand(t: &Tensor) -> Result<Operand> {
    Ok(Operand { address: address(t)?, row: t.dims2()?.1 })
}

/// Where a product goes. It may be wider than W has rows: then W goes on with rows of zeros.
struct Out<'a> {
    y: &'a Tensor,
    /// y goes through gelu; before that it is also written here, if there is a place.
    gelu: Option<Option<&'a Tensor>>,
}

/// y = x W^T + bias + c, in y's dtype; c may be y itself.
fn product(gpu: &Gpu, linear: &Linear, x: &Tensor, c: Option<&Tensor>, Out { y, gelu }: &Out, run: &Run) -> Result<()> {
    let ((m, k), (_, n), dtype, out) = (x.dims2()?, y.dims2()?, x.dtype(), y.dtype());
    let (x, c, y) = (operand(x)?, c.map(operand).transpose()?, operand(y)?);
    let bias = linear.bias.as_ref().map(address).transpose()?;
    let gelu = gelu.map(|before| before.map_or(Ok(0), address)).transpose()?;
    with_weight(gpu, &linear.weight, dtype, false, run, |w, _| {
        gpu.gemm(&Gemm { m, n, k, x, w, transposed: true, y, c, bias, gelu, dtype, out })
    })
}

/// dx = dy W + c. dy may be wider than W has rows, as y of [`product`].
fn product_backward(gpu: &Gpu, linear: &Linear, dy: &Tensor, c: Option<&Tensor>, dx: &Tensor, run: &Run) -> Result<()> {
    let ((m, k), (_, n), dtype) = (dy.dims2()?, dx.dims2()?, dy.dtype());
    let (x, c, y) = (operand(dy)?, c.map(operand).transpose()?, operand(dx)?);
    with_weight(gpu, &linear.weight, dtype, true, run, |w, transposed| {
        gpu.gemm(&Gemm { m, n, k, x, w, transposed, y, c, bias: None, gelu: None, dtype, out: dtype })
    })
}

/// [`linear_forward`] and gelu after it.
pub fn linear_gelu(linear: &Linear, x: &Tensor, run: &mut Run) -> Result<Tensor> {
    if few::serves(linear, x, run)? {
        return few::forward(linear, x, x.dtype(), &Around { gelu: true, ..Around::default() });
    }
    // The product's own gelu is for 16 bits.
    if x.dtype() == DType::F32 {
        return gelu_forward(&linear_forward(linear, x, None, run)?, run);
    }
    let gpu = cuda::of(x.device())?;
    let shape = (x.dims()[0], linear.weight.dims2()?.0);
    let y = uninit(&gpu, shape, x.dtype())?;
    let before = run.saved.is_some().then(|| uninit(&gpu, shape, x.dtype())).transpose()?;
    adapted(&gpu, linear, x, None, &Out { y: &y, gelu: Some(before.as_ref()) }, run)?;
    if let Some(before) = before {
        run.save(&before);
    }
    Ok(y)
}

/// [`linear_forward`] of a norm's output, or [`linear_gelu`], where one kernel makes both: few rows, nothing to be kept.
pub fn linear_normed(linear: &Linear, input: &Normed, gelu: bool, run: &mut Run) -> Result<Option<Tensor>> {
    let Some((norm, x)) = input.before().filter(|(_, x)| x.device().is_cuda()) else { return Ok(None) };
    if !few::takes_norm(linear, x, run)? {
        return Ok(None);
    }
    few::forward(linear, x, x.dtype(), &Around { norm: Some(norm), gelu, ..Around::default() }).map(Some)
}

/// y, plus `residual`; saves x and A x when an adapter needs them.
pub fn linear_forward(linear: &Linear, x: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
    if few::serves(linear, x, run)? {
        return few::forward(linear, x, x.dtype(), &Around { c: residual, ..Around::default() });
    }
    linear_to(linear, x, residual, (linear.weight.dims2()?.0, x.dtype()), run)
}

/// [`linear_forward`] to `[M, n]` in a dtype; n may be more than the weight's rows, its padding.
pub fn linear_to(
    linear: &Linear,
    x: &Tensor,
    residual: Option<&Tensor>,
    (n, dtype): (usize, DType),
    run: &mut Run,
) -> Result<Tensor> {
    let gpu = cuda::of(x.device())?;
    let y = uninit(&gpu, (x.dims()[0], n), dtype)?;
    adapted(&gpu, linear, x, residual, &Out { y: &y, gelu: None }, run)?;
    Ok(y)
}

/// The product and the adapter's part of it.
fn adapted(gpu: &Gpu, linear: &Linear, x: &Tensor, residual: Option<&Tensor>, out: &Out, run: &mut Run) -> Result<()> {
    let Some(lora) = &linear.lora else { return product(gpu, linear, x, residual, out, run) };
    // First what does not need the weight, which may still be on its way.
    let u = lora::forward_down(gpu, lora, x, run)?;
    if residual.is_some() {
        product(gpu, linear, x, residual, out, run)?;
        return lora::forward_up(gpu, lora, &u, out.y, true);
    }
    // The product adds to what is there for less than it costs to add to it afterwards.
    lora::forward_up(gpu, lora, &u, out.y, false)?;
    product(gpu, linear, x, Some(out.y), out, run)
}

/// What [`linear_forward`] saves, without its result.
pub fn linear_remember(linear: &Linear, x: &Tensor, run: &mut Run) -> Result<()> {
    let Some(lora) = &linear.lora else { return Ok(()) };
    lora::forward_down(&*cuda::of(x.device())?, lora, x, run).map(drop)
}

/// dy to dx; adds to the adapter's gradients.
pub fn linear_backward(linear: &Linear, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
    let gpu = cuda::of(dy.device())?;
    let dx = match need_dx {
        true => Some(uninit(&gpu, (dy.dims2()?.0, linear.weight.dims2()?.1), dy.dtype())?),
        false => None,
    };
    adapted_backward(&gpu, linear, dy, dx.as_ref(), run)?;
    Ok(dx)
}

/// dy to dx, where it is given; adds to the adapter's gradients.
pub fn adapted_backward(gpu: &Gpu, linear: &Linear, dy: &Tensor, dx: Option<&Tensor>, run: &mut Run) -> Result<()> {
    if let Some(lora) = &linear.lora {
        lora::backward(gpu, lora, dy, dx, run)?;
    }
    let Some(dx) = dx else { return Ok(()) };
    product_backward(gpu, linear, dy, linear.lora.as_ref().map(|_| dx), dx, run)
}
