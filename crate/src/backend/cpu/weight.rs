//! Weights as the CPU's products read them.

use candle_core::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{
    super::{internal, operands::Weight},
    dequantize::dequantize_range,
};
use crate::{
    error::Result,
    quantized::{QuantizedCpu, with_slice},
};

/// A weight `[n, k]` in row-major order, as it is stored.
pub enum WeightView<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Quantized(QuantizedCpu<'a>),
}

impl WeightView<'_> {
    /// Elements `start .. start + out.len()` of the flattened weight, widened to f32.
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F32(w) => out.copy_from_slice(&w[range]),
            Self::F16(w) => w[range].convert_to_f32_slice(out),
            Self::Bf16(w) => w[range].convert_to_f32_slice(out),
            Self::Quantized(w) => dequantize_range(w, start, out),
        }
    }
}

impl Weight {
    /// Runs `f` on the weight as the CPU's products read it.
    pub(super) fn with_view<R>(&self, f: impl FnOnce(&WeightView) -> R) -> Result<R> {
        let tensor = match self {
            Self::Quantized(q) => return q.with_cpu(|view| f(&WeightView::Quantized(*view))),
            Self::Dense(t) => t,
        };
        match tensor.dtype() {
            DType::F32 => with_slice(tensor, |w| f(&WeightView::F32(w))),
            DType::F16 => with_slice(tensor, |w| f(&WeightView::F16(w))),
            DType::BF16 => with_slice(tensor, |w| f(&WeightView::Bf16(w))),
            other => Err(internal(format!("weight: {other:?} is not computed with"))),
        }
    }
}
