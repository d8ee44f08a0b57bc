//! Dequantization on the CPU: the hot path of every forward and backward.
//!
//! A block has one `absmax` and at most 16 different weights, so the weights of a block are a
//! table of 16, made once (multiplied and rounded to the compute dtype), and each element is a
//! look-up: one instruction for 16 elements with AVX-512, three for 8 with AVX2.

use candle_core::Tensor;

use super::simd::{self, Level};
use crate::{
    error::Result,
    quantized::{QuantType, QuantizedCpu, QuantizedTensor, filled, round_to},
};

/// Dequantizes elements `[start, start + out.len())` of the flattened weight to f32, each
/// rounded through the compute dtype: the values that `dequantize_4bit` gives in that dtype.
///
/// Any `start` and length. Like slice indexing it panics when the range ends beyond the weight.
pub fn dequantize_range(view: &QuantizedCpu<'_>, start: usize, out: &mut [f32]) {
    let end = start.checked_add(out.len());
    assert!(end.is_some_and(|end| end <= view.len), "range of {} from {start}, {} elements", out.len(), view.len);
    if view.quant_type == QuantType::Int8 {
        return dequantize_int8(view, start, out);
    }
    dequantize_at(simd::level(), view, start, out);
}

pub(crate) fn dequantize_at(level: Level, view: &QuantizedCpu<'_>, start: usize, out: &mut [f32]) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx512 => unsafe { simd::x86::dequantize_avx512(view, start, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { simd::x86::dequantize_avx2(view, start, out) },
        Level::Scalar => dequantize_scalar(view, start, out),
    }
}

/// Rows of 4-bit codes: `columns` elements at `start`, then at `step` behind it, and so on, each at the head of a row of
/// `out`, `width` apart.
pub(super) fn dequantize_rows_at(
    level: Level,
    view: &QuantizedCpu<'_>,
    (start, step): (usize, usize),
    columns: usize,
    width: usize,
    out: &mut [f32],
) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        Level::Avx512 => unsafe { simd::x86::dequantize_rows_avx512(view, (start, step), columns, width, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { simd::x86::dequantize_rows_avx2(view, (start, step), columns, width, out) },
        Level::Scalar => {
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                dequantize_scalar(view, start + i * step, &mut out[..columns]);
            }
        }
    }
}

/// The same without SIMD: for processors without AVX2, and the reference for those with it.
fn dequantize_scalar(view: &QuantizedCpu<'_>, start: usize, out: &mut [f32]) {
    for_each_block(view.blocksize, start, out, |block, start, out| {
        let absmax = view.absmax.get(block);
        let mut table = [0f32; 16];
        for (entry, code) in table.iter_mut().zip(view.quant_type.values()) {
            *entry = round_to(view.dtype, code * absmax);
        }
        lookup_scalar(&table, view.packed, start, out);
    });
}

/// Elements `[start, start + out.len())` of `packed` through `table`.
#[inline(always)]
pub(crate) fn lookup_scalar(table: &[f32; 16], packed: &[u8], start: usize, out: &mut [f32]) {
    for (o, i) in out.iter_mut().zip(start..) {
        let byte = packed[i / 2];
        *o = table[if i % 2 == 0 { byte >> 4 } else { byte & 15 } as usize];
    }
}

fn dequantize_int8(view: &QuantizedCpu<'_>, start: usize, out: &mut [f32]) {
    let values = view.quant_type.values();
    for_each_block(view.blocksize, start, out, |block, start, out| {
        let absmax = view.absmax.get(block);
        for (o, code) in out.iter_mut().zip(&view.packed[start..]) {
            *o = round_to(view.dtype, values[*code as usize] * absmax);
        }
    });
}

/// Cuts a range at block boundaries: `f(block, start, part of out)`.
#[inline(always)]
pub(crate) fn for_each_block(
    blocksize: usize,
    mut start: usize,
    mut out: &mut [f32],
    mut f: impl FnMut(usize, usize, &mut [f32]),
) {
    while !out.is_empty() {
        let block = start >> blocksize.trailing_zeros();
        let (part, rest) = out.split_at_mut(out.len().min((block + 1) * blocksize - start));
        f(block, start, part);
        start += part.len();
        out = rest;
    }
}

/// `dequantize_4bit` for a weight on the CPU.
pub(super) fn dequantize(weight: &QuantizedTensor) -> Result<Tensor> {
    weight.with_cpu(|view| {
        let read = |first: usize, x: &mut [f32]| {
            dequantize_range(view, first, x);
            Ok(())
        };
        filled(weight.shape(), weight.dtype(), &read)
    })?
}
