//! What DoRA adds to LoRA: lengths of the adapted weight's rows, columns scaled by them.

use candle_core::{D, DType, Tensor};

use super::{
    super::{
        Dora, Linears,
        operands::{Around, Frozen, Lora},
        param::{Param, modify_f32},
        run::Run,
    },
    Cpu, F32View, math,
};
use crate::error::Result;

impl Dora for Cpu {
    /// |W + s B A|^2 = |W|^2 + 2 s B (W A^T) + s^2 B (A A^T) B^T, row by row: W is read once, as for r rows of x.
    fn dora_norms(
        &self,
        frozen: &Frozen,
        lora: &Lora,
        weight_norms2: &Tensor,
        _dtype: DType,
        run: &mut Run,
    ) -> Result<Tensor> {
        // Lengths are exact whatever the products of the layer are computed in.
        let frozen = &Frozen { compute_dtype: None, ..frozen.clone() };
        let (a, b, scaling) = (lora.a.value(), lora.b.value(), lora.scaling);
        let wa = run.with_saved(None, |run| self.linear(frozen, None, &a.into(), &Around::default(), run))?; // (r, out)
        let mixed = (b * wa.t()?)?.sum(D::Minus1)?; // (out)
        let update = (b.matmul(&a.matmul(&a.t()?)?)? * b)?.sum(D::Minus1)?; // (out)
        Ok(((weight_norms2 + (mixed * (2.0 * scaling))?)? + (update * (scaling * scaling))?)?.sqrt()?)
    }

    fn scale_columns(
        &self,
        z: &Tensor,
        [magnitude, norms]: [&Tensor; 2],
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut y = z.broadcast_mul(&(magnitude / norms)?)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(&bias.to_dtype(DType::F32)?)?;
        }
        Ok(match residual {
            Some(residual) => (y + residual)?,
            None => y,
        })
    }

    fn scale_columns_backward(
        &self,
        dy: &Tensor,
        z: &Tensor,
        magnitude: &Param,
        norms: &Tensor,
        _run: &Run,
    ) -> Result<Tensor> {
        let gradient = ((dy * z)?.sum(0)? / norms)?; // (out)
        let gradient = F32View::new(&gradient)?;
        modify_f32(magnitude.grad(), |grad| math::axpy(1.0, &gradient, grad))?;
        Ok(dy.broadcast_mul(&(magnitude.value() / norms)?)?)
    }
}
