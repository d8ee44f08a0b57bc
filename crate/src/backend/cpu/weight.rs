//! Weights as the CPU's products read them.

use candle_core::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{
    super::{internal, operands::Weight},
    dequantize::dequantize_range,
    simd::{self, Level, simd},
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
            Self::F16(w) => widen_f16(&w[range], out),
            Self::Bf16(w) => widen_bf16(&w[range], out),
            Self::Quantized(w) => dequantize_range(w, start, out),
        }
    }
}

fn widen_f16(from: &[f16], to: &mut [f32]) {
    match simd::level() {
        Level::Scalar => from.convert_to_f32_slice(to),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        _ => unsafe { simd::x86::widen_f16(from, to) },
    }
}

simd! {
    fn widen_bf16(from: &[bf16], to: &mut [f32]) {
        from.iter().zip(to).for_each(|(from, to)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
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
