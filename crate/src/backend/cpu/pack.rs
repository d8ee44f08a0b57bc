//! Strips of weights and matrices in the order in which [`super::tile::multiply`] reads them: row after row of `width`
//! elements, f32. What lies beyond the columns that a strip has is never looked at.

use std::ops::Range;

use super::{
    simd::{self, Level},
    tile::{Mat, STRIP},
    weight::WeightView,
};
use crate::quantized::QuantType;

/// Rows of a weight that are transposed at once.
const ROWS: usize = 8;

/// `[depth, columns]` of a matrix.
pub fn matrix(level: Level, b: Mat, (depth, columns): (usize, usize), width: usize, strip: &mut [f32]) {
    if b.row == 1 && b.col >= depth {
        let row = |j: usize| &b.data[j * b.col..][..depth];
        for first in (0..columns).step_by(ROWS) {
            let rows: [&[f32]; ROWS] = std::array::from_fn(|r| row((first + r).min(columns - 1)));
            transpose(level, &rows, &mut strip[first..], width);
        }
        return;
    }
    for (p, out) in strip.chunks_exact_mut(width).take(depth).enumerate() {
        let from = &b.data[p * b.row..];
        if b.col == 1 {
            out[..columns].copy_from_slice(&from[..columns]);
        } else {
            out[..columns].iter_mut().enumerate().for_each(|(j, out)| *out = from[j * b.col]);
        }
    }
}

/// Element (p, j) is that of w `[n, k]` in row `rows.start + j` and column `columns.start + p`.
pub fn transposed(
    level: Level,
    w: &WeightView,
    k: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    strip: &mut [f32],
) {
    let at = |row: usize| row.min(rows.end - 1) * k + columns.start;
    if let WeightView::Quantized(w) = w
        && w.quant_type != QuantType::Int8
        && k.is_multiple_of(w.blocksize)
        && columns.start.is_multiple_of(w.blocksize)
    {
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level was detected on this processor.
            Level::Avx512 => return unsafe { x86::codes_avx512(w, k, rows, columns, strip) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => return unsafe { x86::codes_avx2(w, k, rows, columns, strip) },
            Level::Scalar => {}
        }
    }
    let depth = columns.len();
    let mut wide = vec![0f32; if matches!(w, WeightView::F32(_)) { 0 } else { ROWS * depth }];
    for first in rows.clone().step_by(ROWS) {
        for (r, wide) in wide.chunks_exact_mut(depth).enumerate() {
            w.widen(at(first + r), wide);
        }
        let row = |r: usize| match w {
            WeightView::F32(w) => &w[at(first + r)..][..depth],
            _ => &wide[r * depth..][..depth],
        };
        transpose(level, &std::array::from_fn(row), &mut strip[first - rows.start..], STRIP);
    }
}

/// Element (p, j) is that of w `[n, k]` in row `rows.start + p` and column `columns.start + j`.
pub fn rows(level: Level, w: &WeightView, k: usize, rows: Range<usize>, columns: Range<usize>, strip: &mut [f32]) {
    let start = rows.start * k + columns.start;
    let out = &mut strip[..rows.len() * STRIP];
    match w {
        WeightView::Quantized(w) if w.quant_type != QuantType::Int8 => {
            super::dequantize::dequantize_rows_at(level, w, (start, k), columns.len(), STRIP, out);
        }
        _ => {
            for (i, out) in out.chunks_exact_mut(STRIP).enumerate() {
                prefetch(w, start + (i + AHEAD) * k);
                w.widen(start + i * k, &mut out[..columns.len()]);
            }
        }
    }
}

/// Rows of a weight that are asked for before they are widened: of each only a line or two are read, and no processor
/// guesses the next.
const AHEAD: usize = 32;

/// Asks for [`STRIP`] elements from `at` on.
fn prefetch(w: &WeightView, at: usize) {
    let (first, size) = match w {
        WeightView::F32(w) => (w.as_ptr().cast::<u8>(), 4),
        WeightView::F16(w) => (w.as_ptr().cast(), 2),
        WeightView::Bf16(w) => (w.as_ptr().cast(), 2),
        WeightView::Quantized(_) => return,
    };
    simd::prefetch(first.wrapping_add(at * size), STRIP * size);
}

/// `rows` side by side, a column of them in each row of `out`, `width` apart.
fn transpose(level: Level, rows: &[&[f32]; ROWS], out: &mut [f32], width: usize) {
    let depth = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == depth) && (depth == 0 || out.len() >= (depth - 1) * width + ROWS));
    let done = match level {
        Level::Scalar => 0,
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level was detected on this processor (AVX-512 has AVX2); the extents are checked.
        _ => unsafe { x86::transpose(rows, out, width) },
    };
    for p in done..depth {
        for (out, row) in out[p * width..].iter_mut().zip(rows) {
            *out = row[p];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, ops::Range};

    use super::{
        super::simd::x86::{NIBBLE_SHIFTS, round256, round512},
        ROWS, STRIP,
    };
    use crate::quantized::QuantizedCpu;

    /// All whole groups of eight columns; gives how many columns that were.
    ///
    /// # Safety
    /// The rows are of one length, and `out` has a row of eight for each of their columns.
    #[target_feature(enable = "avx2")]
    pub unsafe fn transpose(rows: &[&[f32]; ROWS], out: &mut [f32], width: usize) -> usize {
        let whole = rows[0].len() / 8 * 8;
        for p in (0..whole).step_by(8) {
            // SAFETY: eight columns from p on lie in each row.
            let r = rows.map(|row| unsafe { _mm256_loadu_ps(row.as_ptr().add(p)) });
            // Pairs of rows, then fours, then all eight.
            let pair = |i: usize| (_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1]));
            let ((a, b), (c, d), (e, f), (g, h)) = (pair(0), pair(2), pair(4), pair(6));
            const LOW: i32 = 0b01_00_01_00;
            const HIGH: i32 = 0b11_10_11_10;
            let first = [
                _mm256_shuffle_ps::<LOW>(a, c),
                _mm256_shuffle_ps::<HIGH>(a, c),
                _mm256_shuffle_ps::<LOW>(b, d),
                _mm256_shuffle_ps::<HIGH>(b, d),
            ];
            let second = [
                _mm256_shuffle_ps::<LOW>(e, g),
                _mm256_shuffle_ps::<HIGH>(e, g),
                _mm256_shuffle_ps::<LOW>(f, h),
                _mm256_shuffle_ps::<HIGH>(f, h),
            ];
            for i in 0..4 {
                let low = _mm256_permute2f128_ps::<0x20>(first[i], second[i]);
                let high = _mm256_permute2f128_ps::<0x31>(first[i], second[i]);
                // SAFETY: the caller's promise.
                unsafe {
                    _mm256_storeu_ps(out.as_mut_ptr().add((p + i) * width), low);
                    _mm256_storeu_ps(out.as_mut_ptr().add((p + 4 + i) * width), high);
                }
            }
        }
        whole
    }

    /// Rows of 4-bit codes to columns of a strip: `LANES` rows at a time, eight codes of each in a u32. `emit` gets those,
    /// the rows' block maxima, and where eight rows of the strip begin.
    #[inline(always)]
    fn for_codes<const LANES: usize>(
        w: &QuantizedCpu,
        k: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        strip: &mut [f32],
        emit: impl Fn(&[u32; LANES], &[f32; LANES], *mut f32),
    ) {
        assert!(columns.start.is_multiple_of(w.blocksize) && columns.end.is_multiple_of(8));
        assert!(strip.len() >= columns.len() * STRIP && w.packed.len() >= (rows.end - 1) * k / 2 + columns.end / 2);
        for first in rows.clone().step_by(LANES) {
            // Rows that are not there are the last once more: nobody looks at them.
            let at: [usize; LANES] = std::array::from_fn(|lane| (first + lane).min(rows.end - 1) * k);
            for block in columns.clone().step_by(w.blocksize) {
                let absmax = at.map(|at| w.absmax.get((at + block) / w.blocksize));
                for column in (block..columns.end.min(block + w.blocksize)).step_by(8) {
                    // SAFETY: the codes of eight columns of a row that is there are four bytes.
                    let codes =
                        at.map(|at| unsafe { w.packed.as_ptr().add((at + column) / 2).cast::<u32>().read_unaligned() });
                    let to = (column - columns.start) * STRIP + first - rows.start;
                    // SAFETY: eight rows from here on lie in the strip.
                    emit(&codes, &absmax, unsafe { strip.as_mut_ptr().add(to) });
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    pub fn codes_avx512(w: &QuantizedCpu, k: usize, rows: Range<usize>, columns: Range<usize>, strip: &mut [f32]) {
        let values = w.quant_type.values();
        assert_eq!(values.len(), 16);
        // SAFETY: 16 f32 are 64 readable bytes.
        let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        for_codes::<16>(w, k, rows, columns, strip, |codes, absmax, to| {
            // SAFETY: 16 numbers of 4 bytes each; eight rows of 16 lie behind `to`.
            unsafe {
                let (codes, absmax) = (_mm512_loadu_si512(codes.as_ptr().cast()), _mm512_loadu_ps(absmax.as_ptr()));
                for (i, shift) in NIBBLE_SHIFTS.iter().enumerate() {
                    // Only the low four bits of each index count.
                    let index = _mm512_srlv_epi32(codes, _mm512_set1_epi32(*shift));
                    let value = _mm512_mul_ps(_mm512_permutexvar_ps(index, values), absmax);
                    _mm512_storeu_ps(to.add(i * STRIP), round512(w.dtype, value));
                }
            }
        });
    }

    #[target_feature(enable = "avx2,f16c")]
    pub fn codes_avx2(w: &QuantizedCpu, k: usize, rows: Range<usize>, columns: Range<usize>, strip: &mut [f32]) {
        let values = w.quant_type.values();
        assert_eq!(values.len(), 16);
        // SAFETY: 16 f32 are two times 32 readable bytes.
        let (low, high) = unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())) };
        for_codes::<8>(w, k, rows, columns, strip, |codes, absmax, to| {
            // SAFETY: 8 numbers of 4 bytes each; eight rows of 8 lie behind `to`.
            unsafe {
                let (codes, absmax) = (_mm256_loadu_si256(codes.as_ptr().cast()), _mm256_loadu_ps(absmax.as_ptr()));
                for (i, shift) in NIBBLE_SHIFTS.iter().enumerate() {
                    let index = _mm256_srlv_epi32(codes, _mm256_set1_epi32(*shift));
                    // A look-up sees three bits; the fourth, moved to the sign, chooses the half.
                    let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                    let (low, high) = (_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index));
                    let value = _mm256_mul_ps(_mm256_blendv_ps(low, high, fourth), absmax);
                    _mm256_storeu_ps(to.add(i * STRIP), round256(w.dtype, value));
                }
            }
        });
    }
}
