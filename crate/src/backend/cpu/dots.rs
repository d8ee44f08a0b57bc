//! Decoding: a row of a weight times a few rows of x, where a product is limited by reading the weight. Codes become values
//! in registers, 16 or 32 at a time, and are multiplied there: the weight is never in memory in f32.
//!
//! The bits are those of widening the row and [`math::dot`]: as many partial sums, in the same order, products and sums
//! apart.

use std::{borrow::Cow, ops::Range};

#[cfg(target_arch = "x86_64")]
use candle_core::DType;

use super::{
    math::LANES,
    simd::{self, Level},
    weight::WeightView,
};
use crate::quantized::QuantType;

/// Up to this many rows of x, a product is limited by reading the weight.
pub const FEW_ROWS: usize = 4;

/// At most [`FEW_ROWS`] rows of x, `[m, k]`, in the order in which the weight's elements come.
pub struct FewRows<'a> {
    m: usize,
    k: usize,
    x: Cow<'a, [f32]>,
    level: Level,
}

impl<'a> FewRows<'a> {
    /// `None`: this weight, or this processor, has no product of its own.
    pub fn new(level: Level, (m, k): (usize, usize), x: &'a [f32], w: &WeightView) -> Option<Self> {
        if level == Level::Scalar || !(1..=FEW_ROWS).contains(&m) {
            return None;
        }
        let x = &x[..m * k];
        let x = match w {
            WeightView::F32(_) => return None,
            WeightView::F16(_) | WeightView::Bf16(_) => Cow::Borrowed(x),
            // Rows begin with a block.
            WeightView::Quantized(w) if w.quant_type == QuantType::Int8 || k % w.blocksize != 0 => return None,
            WeightView::Quantized(_) => Cow::Owned(evens_first(x)),
        };
        Some(Self { m, k, x, level })
    }

    /// Rows `rows` of the weight times each row of x: of each the products.
    pub fn dots(&self, w: &WeightView, rows: Range<usize>, out: &mut [[f32; FEW_ROWS]]) {
        // Rows of codes are taken some at a time, as many as there are registers for.
        match self.m {
            1 => self.rows::<1, 4>(w, rows, out),
            2 => self.rows::<2, 2>(w, rows, out),
            3 => self.rows::<3, 1>(w, rows, out),
            _ => self.rows::<4, 1>(w, rows, out),
        }
    }

    fn rows<const M: usize, const R: usize>(&self, w: &WeightView, rows: Range<usize>, out: &mut [[f32; FEW_ROWS]]) {
        let (k, start) = (self.k, rows.start * self.k);
        let range = start..rows.end * k;
        let x: [&[f32]; M] = std::array::from_fn(|j| &self.x[j * k..][..k]);
        // SAFETY: the level was detected on this processor.
        #[cfg(target_arch = "x86_64")]
        match (self.level, w) {
            (Level::Avx512, WeightView::Quantized(w)) => unsafe { avx512::quantized::<M, R>(w, start, x, out) },
            (Level::Avx512, WeightView::F16(w)) => unsafe { avx512::f16(&w[range], x, out) },
            (Level::Avx512, WeightView::Bf16(w)) => unsafe { avx512::bf16(&w[range], x, out) },
            (Level::Avx2, WeightView::Quantized(w)) => unsafe { avx2::quantized::<M, R>(w, start, x, out) },
            (Level::Avx2, WeightView::F16(w)) => unsafe { avx2::f16(&w[range], x, out) },
            (Level::Avx2, WeightView::Bf16(w)) => unsafe { avx2::bf16(&w[range], x, out) },
            _ => {}
        }
        // What is no whole group of lanes.
        let rest = k - k % LANES;
        let mut add = |i: usize, widened: &dyn Fn(usize) -> f32| {
            for (row, out) in out.iter_mut().enumerate() {
                let w = widened(start + row * k + i);
                out.iter_mut().zip(x).for_each(|(out, x)| *out += w * x[i]);
            }
        };
        match w {
            WeightView::F16(w) => (rest..k).for_each(|i| add(i, &|at| w[at].to_f32())),
            WeightView::Bf16(w) => (rest..k).for_each(|i| add(i, &|at| w[at].to_f32())),
            _ => {}
        }
    }
}

/// Of every 32 elements those in high nibbles, then those in low ones: as their codes are taken from 16 bytes.
fn evens_first(x: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    for (out, x) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(x.as_chunks::<LANES>().0) {
        for i in 0..LANES / 2 {
            (out[i], out[LANES / 2 + i]) = (x[2 * i], x[2 * i + 1]);
        }
    }
    out
}

/// What values are rounded to.
#[cfg(target_arch = "x86_64")]
const F32: u8 = 0;
#[cfg(target_arch = "x86_64")]
const F16: u8 = 1;
#[cfg(target_arch = "x86_64")]
const BF16: u8 = 2;

#[cfg(target_arch = "x86_64")]
const fn rounded_to(round: u8) -> DType {
    match round {
        F16 => DType::F16,
        BF16 => DType::BF16,
        _ => DType::F32,
    }
}

/// Asks for the `bytes` that come [`AHEAD`] of where `now` begins: a processor follows one row, but not from one to the next.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch<T>(now: &[T], bytes: usize) {
    simd::prefetch(now.as_ptr().cast::<u8>().wrapping_add(AHEAD), bytes);
}

#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// Rows of f16 or bf16, as [`sums`] has those of codes.
#[cfg(target_arch = "x86_64")]
macro_rules! halves {
    ($features:literal, $count:literal, $half:ident, $widen:ident) => {
        #[target_feature(enable = $features)]
        pub fn $half<const M: usize>(w: &[$half], x: [&[f32]; M], out: &mut [[f32; FEW_ROWS]]) {
            let k = x[0].len();
            let x = x.map(|x| x[..k].as_chunks::<LANES>().0);
            for (w, out) in w.chunks_exact(k).zip(out) {
                prefetch(w, 2 * k);
                let mut sums = [[zero(); $count]; M];
                for (i, w) in w.as_chunks().0.iter().enumerate() {
                    add($widen(w), i, &x, &mut sums);
                }
                for (out, sums) in out.iter_mut().zip(&sums) {
                    *out = reduce(sums);
                }
            }
        }
    };
}

/// The sums of products, for [`LANES`] lanes in `$count` vectors. [`math::sum_lanes`] adds the upper half of the lanes to
/// the lower, again and again: of lanes in their order first vectors, then parts of one (`lanes`). Loops with indices, since
/// a closure that is handed to a function of the standard library is not inlined with these instructions.
#[cfg(target_arch = "x86_64")]
macro_rules! sums {
    ($features:literal, $count:literal) => {
        /// Rows of 4-bit codes, `R` at a time; x as [`super::evens_first`] has it, so that the even lanes and the odd ones
        /// are apart until the last addition.
        #[target_feature(enable = $features)]
        pub fn quantized<const M: usize, const R: usize>(
            w: &QuantizedCpu,
            start: usize,
            x: [&[f32]; M],
            out: &mut [[f32; FEW_ROWS]],
        ) {
            match w.dtype {
                DType::F16 => rows::<M, R, F16>(w, start, x, out),
                DType::BF16 => rows::<M, R, BF16>(w, start, x, out),
                _ => rows::<M, R, F32>(w, start, x, out),
            }
        }

        #[target_feature(enable = $features)]
        fn rows<const M: usize, const R: usize, const ROUND: u8>(
            w: &QuantizedCpu,
            start: usize,
            x: [&[f32]; M],
            out: &mut [[f32; FEW_ROWS]],
        ) {
            let k = x[0].len();
            let x = x.map(|x| x[..k].as_chunks::<LANES>().0);
            let blocks = k / w.blocksize;
            let mut maxima = vec![0f32; out.len() * blocks];
            read(&w.absmax, start / w.blocksize, &mut maxima);
            let (mut at, mut maxima) = (start, maxima.as_slice());
            let (whole, rest) = out.as_chunks_mut::<R>();
            for out in whole {
                prefetch(&w.packed[at / 2..], R * k / 2);
                codes::<M, R, ROUND>(w, at, maxima, k, &x, out);
                (at, maxima) = (at + R * k, &maxima[R * blocks..]);
            }
            for out in rest {
                codes::<M, 1, ROUND>(w, at, maxima, k, &x, std::array::from_mut(out));
                (at, maxima) = (at + k, &maxima[blocks..]);
            }
        }

        #[target_feature(enable = $features)]
        #[inline(never)]
        fn read(absmax: &AbsmaxCpu, first: usize, out: &mut [f32]) {
            absmax.read(first, out);
        }

        /// R rows of k codes from `start` on, and the maxima of their blocks. A function of its own has all registers.
        #[target_feature(enable = $features)]
        #[inline(never)]
        fn codes<const M: usize, const R: usize, const ROUND: u8>(
            w: &QuantizedCpu,
            start: usize,
            maxima: &[f32],
            k: usize,
            x: &[&[[f32; LANES]]; M],
            out: &mut [[f32; FEW_ROWS]; R],
        ) {
            let packed = w.packed[start / 2..(start + R * k) / 2].as_chunks::<16>().0;
            let (values, block_groups, blocks) = (values(w), w.blocksize / LANES, k / w.blocksize);
            let maxima = &maxima[..R * blocks];
            let mut sums = [[[zero(); $count]; M]; R];
            for block in 0..blocks {
                let at = block * block_groups;
                let mut tables = [table::<ROUND>(values, 0.0); R];
                let mut codes: [&[[u8; 16]]; R] = [&[]; R];
                for row in 0..R {
                    tables[row] = table::<ROUND>(values, maxima[row * blocks + block]);
                    codes[row] = &packed[row * (k / LANES) + at..][..block_groups];
                }
                let mut x_now: [&[[f32; LANES]]; M] = [&[]; M];
                for j in 0..M {
                    x_now[j] = &x[j][at..][..block_groups];
                }
                for group in 0..block_groups {
                    for row in 0..R {
                        add(lookup(&codes[row][group], tables[row]), group, &x_now, &mut sums[row]);
                    }
                }
            }
            for (out, sums) in out.iter_mut().zip(&sums) {
                for (out, sums) in out.iter_mut().zip(sums) {
                    let (even, odd) = sums.split_at($count / 2);
                    *out = reduce(even) + reduce(odd);
                }
            }
        }

        halves!($features, $count, f16, widen_f16);
        halves!($features, $count, bf16, widen_bf16);

        /// Adds 32 weights times the numbers of x there.
        #[target_feature(enable = $features)]
        #[inline]
        fn add<const M: usize>(
            w: [Vector; $count],
            group: usize,
            x: &[&[[f32; LANES]]; M],
            sums: &mut [[Vector; $count]; M],
        ) {
            for j in 0..M {
                let x = x[j][group].as_chunks().0;
                for i in 0..$count {
                    sums[j][i] = plus(sums[j][i], times(w[i], load(&x[i])));
                }
            }
        }

        /// The upper half of the vectors is added to the lower, then the lanes of the last.
        #[target_feature(enable = $features)]
        #[inline]
        fn reduce(sums: &[Vector]) -> f32 {
            match *sums {
                [a] => lanes(a),
                [a, b] => lanes(plus(a, b)),
                [a, b, c, d] => lanes(plus(plus(a, c), plus(b, d))),
                _ => 0.0,
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512 as Vector, _mm512_add_ps as plus, _mm512_mul_ps as times, _mm512_reduce_add_ps as lanes,
        _mm512_setzero_ps as zero, *,
    };

    use half::{bf16, f16};

    use super::{super::simd::x86::round512, BF16, DType, F16, F32, FEW_ROWS, LANES, prefetch, rounded_to};
    use crate::quantized::{AbsmaxCpu, QuantizedCpu};

    sums!("avx512f,avx2", 2);

    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn values(w: &QuantizedCpu) -> __m512 {
        load(w.quant_type.values().first_chunk().unwrap_or(&[0.0; 16]))
    }

    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn table<const ROUND: u8>(values: __m512, absmax: f32) -> __m512 {
        round512(const { rounded_to(ROUND) }, _mm512_mul_ps(values, _mm512_set1_ps(absmax)))
    }

    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn lookup(codes: &[u8; 16], table: __m512) -> [__m512; 2] {
        // SAFETY: 16 readable bytes.
        let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
        // Only the low four bits of each index count.
        let high = _mm512_srli_epi32::<4>(codes);
        [_mm512_permutexvar_ps(high, table), _mm512_permutexvar_ps(codes, table)]
    }

    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn widen_f16(w: &[f16; LANES]) -> [__m512; 2] {
        // SAFETY: 16 numbers of 2 bytes, twice.
        let (low, high) =
            unsafe { (_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w[16..].as_ptr().cast())) };
        [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
    }

    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn widen_bf16(w: &[bf16; LANES]) -> [__m512; 2] {
        // SAFETY: as above.
        let (low, high) =
            unsafe { (_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w[16..].as_ptr().cast())) };
        [wide(low), wide(high)]
    }

    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn wide(bf16: __m256i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bf16)))
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(from: &[f32; 16]) -> __m512 {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256 as Vector, _mm256_add_ps as plus, _mm256_mul_ps as times, _mm256_setzero_ps as zero, *,
    };

    use half::{bf16, f16};

    use super::{super::simd::x86::round256, BF16, DType, F16, F32, FEW_ROWS, LANES, prefetch, rounded_to};
    use crate::quantized::{AbsmaxCpu, QuantizedCpu};

    sums!("avx2,f16c", 4);

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn values(w: &QuantizedCpu) -> [__m256; 2] {
        let values = w.quant_type.values().as_chunks::<8>().0;
        [load(&values[0]), load(&values[1])]
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn table<const ROUND: u8>([low, high]: [__m256; 2], absmax: f32) -> [__m256; 2] {
        let (dtype, absmax) = (const { rounded_to(ROUND) }, _mm256_set1_ps(absmax));
        [round256(dtype, _mm256_mul_ps(low, absmax)), round256(dtype, _mm256_mul_ps(high, absmax))]
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn lookup(codes: &[u8; 16], table: [__m256; 2]) -> [__m256; 4] {
        // SAFETY: 8 readable bytes, twice.
        let (first, second) =
            unsafe { (_mm_loadl_epi64(codes.as_ptr().cast()), _mm_loadl_epi64(codes[8..].as_ptr().cast())) };
        let (first, second) = (_mm256_cvtepu8_epi32(first), _mm256_cvtepu8_epi32(second));
        let (high1, high2) = (_mm256_srli_epi32::<4>(first), _mm256_srli_epi32::<4>(second));
        [value(high1, table), value(high2, table), value(first, table), value(second, table)]
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn value(index: __m256i, [low, high]: [__m256; 2]) -> __m256 {
        // A look-up sees three bits; the fourth, moved to the sign, chooses the half.
        let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), fourth)
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn widen_f16(w: &[f16; LANES]) -> [__m256; 4] {
        let mut out = [zero(); 4];
        for (out, w) in out.iter_mut().zip(w.as_chunks::<8>().0) {
            // SAFETY: 8 numbers of 2 bytes.
            *out = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(w.as_ptr().cast()) });
        }
        out
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn widen_bf16(w: &[bf16; LANES]) -> [__m256; 4] {
        let mut out = [zero(); 4];
        for (out, w) in out.iter_mut().zip(w.as_chunks::<8>().0) {
            // SAFETY: 8 numbers of 2 bytes.
            let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(w.as_ptr().cast()) });
            *out = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits));
        }
        out
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn load(from: &[f32; 8]) -> __m256 {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    /// The upper half of the lanes is added to the lower, until one is left.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn lanes(sum: __m256) -> f32 {
        let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::{
        super::{math, simd},
        *,
    };
    use crate::{
        quant::quantize_4bit,
        quantized::{QuantizedCpu, QuantizedTensor},
    };
    use candle_core::{DType, Device, Tensor};

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_mt::Mt64::new(seed);
        (0..n).map(|_| (rng.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    /// Every processor's product against widening and [`math::dot`], bit by bit.
    fn check(w: &WeightView, n: usize, k: usize) {
        for level in simd::available().into_iter().filter(|level| *level != Level::Scalar) {
            for m in 1..=FEW_ROWS {
                let x = random(m * k, 7 + m as u64);
                let few = FewRows::new(level, (m, k), &x, w).expect("a product of its own");
                let (mut row, mut all) = (vec![0f32; k], vec![[0f32; FEW_ROWS]; n]);
                few.dots(w, 0..n, &mut all);
                for (r, got) in all.iter().enumerate() {
                    w.widen(r * k, &mut row);
                    for (got, x) in got.iter().zip(x.chunks_exact(k)) {
                        let want = math::dot(x, &row);
                        assert_eq!(got.to_bits(), want.to_bits(), "{level:?}, {m} rows, row {r}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn halves_have_the_bits_of_the_oracle() {
        for k in [1, 31, 32, 64, 100, 192] {
            let w = random(5 * k, 3);
            let (single, brain): (Vec<f16>, Vec<bf16>) =
                w.iter().map(|v| (f16::from_f32(*v), bf16::from_f32(*v))).unzip();
            check(&WeightView::F16(&single), 5, k);
            check(&WeightView::Bf16(&brain), 5, k);
        }
    }

    #[test]
    fn codes_have_the_bits_of_the_oracle() {
        let (n, k) = (9, 192);
        for quant_type in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4] {
            for (blocksize, double) in [(64, true), (64, false), (32, false)] {
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    let w = Tensor::from_vec(random(n * k, 5), (n, k), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                    let (packed, state) = quantize_4bit(&w, quant_type, blocksize, double).unwrap();
                    let q = QuantizedTensor::new(&packed, &state).unwrap();
                    q.with_cpu(|view: &QuantizedCpu| check(&WeightView::Quantized(*view), n, k)).unwrap();
                }
            }
        }
    }

    #[test]
    fn what_has_no_product_of_its_own_is_said() {
        let (x, w) = (random(5 * 64, 1), random(64, 2));
        let few = |level, m, w: &WeightView| FewRows::new(level, (m, 64), &x, w).is_some();
        let half: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
        assert!(!few(simd::level(), 1, &WeightView::F32(&w)) && !few(Level::Scalar, 1, &WeightView::F16(&half)));
        assert!(!few(simd::level(), FEW_ROWS + 1, &WeightView::F16(&half)));
    }
}
