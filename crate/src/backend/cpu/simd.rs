//! Kinds of processor: loops compiled for each, and the look-up of 4-bit codes in x86 vector instructions.

use std::sync::LazyLock;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The best level that this processor has.
#[inline]
pub(crate) fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        static LEVEL: LazyLock<Level> = LazyLock::new(|| *available().last().unwrap_or(&Level::Scalar));
        *LEVEL
    }
    #[cfg(not(target_arch = "x86_64"))]
    Level::Scalar
}

/// Asks for `bytes` from `first` on, before they are read: a hint, of any address.
#[inline(always)]
pub(crate) fn prefetch(first: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (first, bytes);
}

/// Whether this level comes with products of bf16.
pub(crate) fn has_bf16(level: Level) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static HAS: LazyLock<bool> = LazyLock::new(|| is_x86_feature_detected!("avx512bf16"));
        level == Level::Avx512 && *HAS
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        false
    }
}

/// All levels that this processor has, slowest first.
pub(crate) fn available() -> Vec<Level> {
    #[allow(unused_mut)]
    let mut levels = vec![Level::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if avx2 && is_x86_feature_detected!("f16c") {
            levels.push(Level::Avx2);
            let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            if avx512 && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512dq") {
                levels.push(Level::Avx512);
            }
        }
    }
    levels
}

/// Compiles a function for every level, whose loops the compiler vectorizes by itself. It runs at the level that is its
/// first argument, otherwise at the best of this processor. Generic parameters stand in brackets.
macro_rules! simd {
    ($(#[$about:meta])* $vis:vis fn $name:ident$([$($generics:tt)+])?(
        $level:ident: Level, $($arg:ident: $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block) => {
        $(#[$about])*
        $vis fn $name$(<$($generics)+>)?(
            $level: $crate::backend::cpu::simd::Level, $($arg: $ty),*
        ) $(-> $ret)? {
            #[inline(always)]
            fn body$(<$($generics)+>)?($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
            fn avx512$(<$($generics)+>)?($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2$(<$($generics)+>)?($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match $level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the level was detected on this processor.
                $crate::backend::cpu::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::backend::cpu::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                $crate::backend::cpu::simd::Level::Scalar => body($($arg),*),
            }
        }
    };
    ($(#[$about:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$about])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            $crate::backend::cpu::simd::simd! {
                #[inline(always)]
                fn at(level: Level, $($arg: $ty),*) $(-> $ret)? $body
            }
            at($crate::backend::cpu::simd::level(), $($arg),*)
        }
    };
}

pub(crate) use simd;

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use std::arch::x86_64::*;

    use candle_core::DType;
    use half::f16;

    use super::super::dequantize::{for_each_block, lookup_scalar};
    use crate::quantized::QuantizedCpu;

    /// Right shifts that bring nibble 0..8 of a little-endian u32 to the bottom, in the order
    /// of the elements (high nibble of byte 0 first).
    pub(crate) const NIBBLE_SHIFTS: [i32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];

    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    pub(crate) fn dequantize_avx512(view: &QuantizedCpu<'_>, start: usize, out: &mut [f32]) {
        let values = view.quant_type.values();
        assert_eq!(values.len(), 16);
        // SAFETY: 16 f32 are 64 readable bytes; the same for the constants below.
        let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        let shifts = unsafe { _mm256_loadu_si256(NIBBLE_SHIFTS.as_ptr().cast()) };
        let shifts = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(shifts), shifts);
        // Elements 0..8 lie in the first u32 that is loaded, 8..16 in the second.
        let spread = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        for_each_block(view.blocksize, start, out, |block, start, out| {
            let table = round512(view.dtype, _mm512_mul_ps(values, _mm512_set1_ps(view.absmax.get(block))));
            let lookup = |packed: &[u8; 8]| {
                // SAFETY: 8 readable bytes.
                let codes = unsafe { _mm_loadl_epi64(packed.as_ptr().cast()) };
                let codes = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(codes));
                // Only the low four bits of each index count, so the rest may stay.
                _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts), table)
            };
            // SAFETY: 16 writable f32, here and below.
            let store = |to: &mut [f32; 16], values| unsafe { _mm512_storeu_ps(to.as_mut_ptr(), values) };
            let lookup = |packed: &[u8; 8], out: &mut [f32; 16]| store(out, lookup(packed));
            for_each_group(view.packed, start, out, |to| store(to, table), lookup);
        });
    }

    /// `columns` elements at `start`, then at `step` behind it, and so on, in rows of `out`: one call for them all, in which
    /// `$dequantize` is inlined.
    macro_rules! dequantize_rows {
        ($name:ident, $dequantize:ident, $features:literal) => {
            #[target_feature(enable = $features)]
            pub(crate) fn $name(
                view: &QuantizedCpu<'_>,
                (start, step): (usize, usize),
                columns: usize,
                width: usize,
                out: &mut [f32],
            ) {
                for (i, out) in out.chunks_exact_mut(width).enumerate() {
                    $dequantize(view, start + i * step, &mut out[..columns]);
                }
            }
        };
    }

    dequantize_rows!(dequantize_rows_avx512, dequantize_avx512, "avx512f,avx2");
    dequantize_rows!(dequantize_rows_avx2, dequantize_avx2, "avx2,f16c");

    #[target_feature(enable = "f16c,avx")]
    pub(crate) fn widen_f16(from: &[f16], to: &mut [f32]) {
        let ((from, rest), (to, last)) = (from.as_chunks::<8>(), to.as_chunks_mut::<8>());
        for (from, to) in from.iter().zip(to) {
            // SAFETY: 8 numbers of 2 bytes and of 4.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) };
        }
        for (from, to) in rest.iter().zip(last) {
            *to = from.to_f32();
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(crate) fn round512(dtype: DType, x: __m512) -> __m512 {
        match dtype {
            DType::F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x)),
            DType::BF16 => {
                let bits = _mm512_castps_si512(x);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
            }
            _ => x,
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    pub(crate) fn dequantize_avx2(view: &QuantizedCpu<'_>, start: usize, out: &mut [f32]) {
        let values = view.quant_type.values();
        assert_eq!(values.len(), 16);
        // SAFETY: 16 f32 are two times 32 readable bytes; the same for the constants below.
        let (low, high) = unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())) };
        let shifts = unsafe { _mm256_loadu_si256(NIBBLE_SHIFTS.as_ptr().cast()) };
        for_each_block(view.blocksize, start, out, |block, start, out| {
            let absmax = _mm256_set1_ps(view.absmax.get(block));
            let low = round256(view.dtype, _mm256_mul_ps(low, absmax));
            let high = round256(view.dtype, _mm256_mul_ps(high, absmax));
            let lookup = |packed: &[u8; 4], out: &mut [f32; 8]| {
                let index = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*packed)), shifts);
                // A look-up sees three bits; the fourth, moved to the sign, chooses the half.
                let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let value = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, index),
                    _mm256_permutevar8x32_ps(high, index),
                    fourth,
                );
                // SAFETY: 8 writable f32.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), value) };
            };
            let table = |to: &mut [f32; 16]| {
                // SAFETY: 16 writable f32.
                unsafe { _mm256_storeu_ps(to.as_mut_ptr(), low) };
                unsafe { _mm256_storeu_ps(to[8..].as_mut_ptr(), high) };
            };
            for_each_group(view.packed, start, out, table, lookup);
        });
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    pub(crate) fn round256(dtype: DType, x: __m256) -> __m256 {
        match dtype {
            DType::F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x)),
            DType::BF16 => {
                let bits = _mm256_castps_si256(x);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
                _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
            }
            _ => x,
        }
    }

    /// `lookup` for each whole group of elements; the first, if it starts in the middle of a byte, and the last few go
    /// through the `table`.
    #[inline(always)]
    fn for_each_group<const BYTES: usize, const N: usize>(
        packed: &[u8],
        start: usize,
        out: &mut [f32],
        table: impl FnOnce(&mut [f32; 16]),
        lookup: impl Fn(&[u8; BYTES], &mut [f32; N]),
    ) {
        let (head, whole) = out.split_at_mut(if start % 2 == 1 { 1.min(out.len()) } else { 0 });
        let (groups, tail) = whole.as_chunks_mut();
        let first = start + head.len();
        for (out, packed) in groups.iter_mut().zip(packed[first / 2..].as_chunks().0) {
            lookup(packed, out);
        }
        if !head.is_empty() || !tail.is_empty() {
            let mut values = [0f32; 16];
            table(&mut values);
            lookup_scalar(&values, packed, start, head);
            lookup_scalar(&values, packed, first + groups.len() * N, tail);
        }
    }
}
