//! The floats that weights come in, and rounding to them.

use candle_core::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// A float that weights come in.
pub(crate) trait Element: Copy + Sync {
    /// `source` as f32, in `buffer` unless it is f32 already.
    fn as_f32<'a>(source: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32];

    /// The nearest values of this type.
    fn from_f32s(source: &[f32], out: &mut [Self]);
}

impl Element for f32 {
    #[inline(always)]
    fn as_f32<'a>(source: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        source
    }

    fn from_f32s(source: &[f32], out: &mut [f32]) {
        out.copy_from_slice(source);
    }
}

impl Element for f16 {
    #[inline(always)]
    fn as_f32<'a>(source: &'a [f16], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..source.len()];
        source.convert_to_f32_slice(buffer);
        buffer
    }

    fn from_f32s(source: &[f32], out: &mut [f16]) {
        out.convert_from_f32_slice(source);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn as_f32<'a>(source: &'a [bf16], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..source.len()];
        for (b, s) in buffer.iter_mut().zip(source) {
            *b = f32::from_bits(u32::from(s.to_bits()) << 16);
        }
        buffer
    }

    fn from_f32s(source: &[f32], out: &mut [bf16]) {
        out.convert_from_f32_slice(source);
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
