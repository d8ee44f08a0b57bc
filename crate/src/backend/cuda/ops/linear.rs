//! Linear layers: a matrix product of cuBLASLt, with what stands on it.

use candle_core::{DType, Tensor};

use super::{
    super::{Gemm, Gpu, Operand, address, of, uninit},
    activation::{gelu_forward, save_gelu_input},
    few, head, lora,
    product::Product,
    sum::{converted, sum_into},
    weights::with_weight,
};
use crate::{
    backend::{
        internal,
        operands::{Around, Frozen, Input, Weight},
        run::Run,
    },
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
fn product(gpu: &Gpu, linear: &Product, x: &Tensor, c: Option<&Tensor>, out: &Out, run: &Run) -> Result<()> {
    let Out { y, gelu } = out;
    let dtype = linear.dtype(x.dtype());
    let bias = linear.frozen.bias.as_ref();
    if dtype != x.dtype() {
        // Made in its own dtype, then in that of the activations.
        let made = uninit(gpu, y.dims(), dtype)?;
        let plain = Product { frozen: &Frozen { bias: None, ..linear.frozen.clone() }, lora: None };
        product(gpu, &plain, &converted(gpu, x, dtype)?, None, &Out { y: &made, gelu: None }, run)?;
        return sum_into(gpu, &made, bias, c, y);
    }
    let ((m, k), (_, n), out) = (x.dims2()?, y.dims2()?, y.dtype());
    let (x, c, y) = (operand(x)?, c.map(operand).transpose()?, operand(y)?);
    let bias = bias.map(address).transpose()?;
    let gelu = gelu.map(|before| before.map_or(Ok(0), address)).transpose()?;
    with_weight(gpu, &linear.frozen.weight, dtype, false, run, |w, _| {
        gpu.gemm(&Gemm {
            m,
            n,
            k,
            x,
            x_transposed: false,
            w,
            transposed: true,
            y,
            c,
            bias,
            gelu,
            scale: None,
            dtype,
            out,
        })
    })
}

/// dx = dy W + c. dy may be wider than W has rows, as y of [`product`].
fn product_backward(
    gpu: &Gpu,
    linear: &Product,
    dy: &Tensor,
    c: Option<&Tensor>,
    dx: &Tensor,
    run: &Run,
) -> Result<()> {
    let dtype = linear.dtype(dy.dtype());
    if dtype != dy.dtype() {
        let made = uninit(gpu, dx.dims(), dtype)?;
        product_backward(gpu, linear, &converted(gpu, dy, dtype)?, None, &made, run)?;
        return sum_into(gpu, &made, None, c, dx);
    }
    let ((m, k), (_, n)) = (dy.dims2()?, dx.dims2()?);
    let (x, c, y) = (operand(dy)?, c.map(operand).transpose()?, operand(dx)?);
    with_weight(gpu, &linear.frozen.weight, dtype, true, run, |w, transposed| {
        gpu.gemm(&Gemm {
            m,
            n,
            k,
            x,
            x_transposed: false,
            w,
            transposed,
            y,
            c,
            bias: None,
            gelu: None,
            scale: None,
            dtype,
            out: dtype,
        })
    })
}

/// y, with what stands around it; saves x and A x when an adapter needs them. Where few rows are decoded one kernel makes
/// the norm in front of it and gelu behind it too.
pub fn linear_forward(linear: &Product, input: &Input, around: &Around, run: &mut Run) -> Result<Tensor> {
    if let Input::Normed(normed) = input
        && let Some((norm, x)) = normed.unmade()
        && few::takes_norm(linear, x, run)?
    {
        let around = few::Around { norm: Some(norm), c: around.residual, gelu: around.gelu };
        return few::forward(linear, x, x.dtype(), &around);
    }
    let x = input.tensor(run)?;
    let is_dense = matches!(linear.frozen.weight, Weight::Dense(_));
    if few::serves(linear, x, run)? && (is_dense || !around.logits) {
        let out = if around.logits { DType::F32 } else { x.dtype() };
        return few::forward(linear, x, out, &few::Around { norm: None, c: around.residual, gelu: around.gelu });
    }
    let gpu = of(x.device())?;
    let (rows, _) = linear.frozen.weight.dims2()?;
    let (n, dtype) =
        if around.logits { (head::head_rows(&linear.frozen.weight)?, DType::F32) } else { (rows, x.dtype()) };
    if linear.lora.is_some() && n != rows {
        return Err(internal("an adapter on a padded head"));
    }
    let y = uninit(gpu, (x.dims()[0], n), dtype)?;
    // The product's own gelu is for 16 bits, and for one that is made in the dtype of the activations.
    let fuses_gelu = around.gelu && x.dtype() != DType::F32 && linear.dtype(x.dtype()) == x.dtype();
    let before = (fuses_gelu && run.saved.is_some()).then(|| uninit(gpu, y.dims(), dtype)).transpose()?;
    let out = Out { y: &y, gelu: fuses_gelu.then_some(before.as_ref()) };
    adapted(gpu, linear, x, around.residual, &out, run)?;
    if let Some(before) = before {
        save_gelu_input(&before, run);
    }
    if around.gelu && !fuses_gelu { gelu_forward(&y, run) } else { Ok(y) }
}

/// The product and the adapter's part of it.
fn adapted(gpu: &Gpu, linear: &Product, x: &Tensor, residual: Option<&Tensor>, out: &Out, run: &mut Run) -> Result<()> {
    let Some(lora) = linear.lora else { return product(gpu, linear, x, residual, out, run) };
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

/// dy to dx; adds to the adapter's gradients.
pub fn linear_backward(linear: &Product, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
    let gpu = of(dy.device())?;
    let shape = (dy.dims2()?.0, linear.frozen.weight.dims2()?.1);
    let dx = need_dx.then(|| uninit(gpu, shape, dy.dtype())).transpose()?;
    if let Some(lora) = linear.lora {
        lora::backward(gpu, lora, dy, dx.as_ref(), run)?;
    }
    if let Some(dx) = &dx {
        product_backward(gpu, linear, dy, linear.lora.map(|_| dx), dx, run)?;
    }
    Ok(dx)
}
