//! Dequantization on the CPU: the hot path of every forward and backward.
//!
//! A block has one `absmax` and at most 16 different weights, so the weights of a block are a
//! table of 16, made once (multiplied and rounded to the compute dtype), and each element is a
//! look-up: one instruction for 16 elements with AVX-512, three for 8 with AVX2.

use candle_core::DType;
use half::{bf16, f16};

use super::{QuantType, encode::Element};

/// A quantized weight as slices: what the kernels read. Cheap to copy and to share with threads.
#[derive(Clone, Copy)]
pub struct QuantizedCpu<'a> {
    /// Codes: two a byte, the first element in the high nibble; `Int8` one a byte.
    pub packed: &'a [u8],
    pub absmax: AbsmaxCpu<'a>,
    pub quant_type: QuantType,
    /// Elements that share one `absmax`; a power of two, at least 32.
    pub blocksize: usize,
    /// The dtype that dequantized values are rounded to: F32, F16 or BF16.
    pub dtype: DType,
    /// Elements of the weight.
    pub len: usize,
}

/// The block maxima, plain or double-quantized.
#[derive(Clone, Copy)]
pub enum AbsmaxCpu<'a> {
    Plain(&'a [f32]),
    /// `code[codes[block]] * absmax[block / blocksize] + offset`, blocksize a power of two.
    Nested {
        codes: &'a [u8],
        code: &'a [f32; 256],
        absmax: &'a [f32],
        blocksize: usize,
        offset: f32,
    },
}

impl AbsmaxCpu<'_> {
    /// The maximum of one block, f32. Double quantization may return a small negative number
    /// for a block that is nearly zero, as in bitsandbytes.
    #[inline(always)]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Nested { codes, code, absmax, blocksize, offset } => {
                code[codes[block] as usize] * absmax[block >> blocksize.trailing_zeros()] + offset
            }
        }
    }
}

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
    dequantize_at(super::simd::level(), view, start, out);
}

pub(crate) fn dequantize_at(level: super::simd::Level, view: &QuantizedCpu<'_>, start: usize, out: &mut [f32]) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor.
        super::simd::Level::Avx512 => unsafe { super::simd::x86::dequantize_avx512(view, start, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        super::simd::Level::Avx2 => unsafe { super::simd::x86::dequantize_avx2(view, start, out) },
        super::simd::Level::Scalar => dequantize_scalar(view, start, out),
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

/// [`round_to`] of all.
pub(crate) fn round_all(dtype: DType, x: &mut [f32]) {
    fn through<T: Element + Default>(x: &mut [f32]) {
        let mut narrow = [T::default(); 1024];
        for x in x.chunks_mut(1024) {
            let narrow = &mut narrow[..x.len()];
            T::from_f32s(x, narrow);
            T::as_f32(narrow, x);
        }
    }
    match dtype {
        DType::F16 => through::<f16>(x),
        DType::BF16 => through::<bf16>(x),
        _ => {}
    }
}

/// Rounds to the nearest value of `dtype`, ties to even.
#[inline(always)]
pub(crate) fn round_to(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}
