//! Decoding: a row of a weight times a few rows of x, where a product is limited by reading the weight. Codes become values
//! in registers, 16 or 32 at a time, and are multiplied there: the weight is never in memory in f32.
//!
//! The bits are those of widening the row and [`math::dot`]: as many partial sums, in the same order, products and sums
//! apart.

use std::borrow::Cow;

use super::{
    math::{self, LANES},
    simd::Level,
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

    /// Row `row` of the weight times each row of x.
    pub fn dots(&self, w: &WeightView, row: usize) -> [f32; FEW_ROWS] {
        let mut sums = [0f32; FEW_ROWS];
        match self.m {
            1 => sums[..1].copy_from_slice(&self.sums::<1>(w, row)),
            2 => sums[..2].copy_from_slice(&self.sums::<2>(w, row)),
            3 => sums[..3].copy_from_slice(&self.sums::<3>(w, row)),
            _ => sums.copy_from_slice(&self.sums::<4>(w, row)),
        }
        sums
    }

    fn sums<const M: usize>(&self, w: &WeightView, row: usize) -> [f32; M] {
        let (start, k) = (row * self.k, self.k);
        let x: [&[f32]; M] = std::array::from_fn(|j| &self.x[j * k..][..k]);
        let mut sums = self.lanes(w, start, x).map(math::sum_lanes);
        // What is no whole group of lanes.
        let rest = k - k % LANES;
        let mut add = |i: usize, w: f32| {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += w * x[i];
            }
        };
        match w {
            WeightView::F16(w) => (rest..k).for_each(|i| add(i, w[start + i].to_f32())),
            WeightView::Bf16(w) => (rest..k).for_each(|i| add(i, w[start + i].to_f32())),
            _ => {}
        }
        sums
    }

    /// Partial sums of elements `start .. start + k` of the weight, but for the rest beyond whole groups.
    #[cfg(target_arch = "x86_64")]
    fn lanes<const M: usize>(&self, w: &WeightView, start: usize, x: [&[f32]; M]) -> [[f32; LANES]; M] {
        let range = start..start + self.k;
        // SAFETY: the level was detected on this processor.
        match (self.level, w) {
            (Level::Avx512, WeightView::Quantized(w)) => unsafe { avx512::quantized(w, start, x) },
            (Level::Avx512, WeightView::F16(w)) => unsafe { avx512::f16(&w[range], x) },
            (Level::Avx512, WeightView::Bf16(w)) => unsafe { avx512::bf16(&w[range], x) },
            (Level::Avx2, WeightView::Quantized(w)) => unsafe { avx2::quantized(w, start, x) },
            (Level::Avx2, WeightView::F16(w)) => unsafe { avx2::f16(&w[range], x) },
            (Level::Avx2, WeightView::Bf16(w)) => unsafe { avx2::bf16(&w[range], x) },
            _ => [[0.0; LANES]; M],
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn lanes<const M: usize>(&self, _: &WeightView, _: usize, _: [&[f32]; M]) -> [[f32; LANES]; M] {
        [[0.0; LANES]; M]
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

/// Puts the sums of elements that lay as [`evens_first`] has them back into their order.
fn in_order(sums: [f32; LANES]) -> [f32; LANES] {
    std::array::from_fn(|i| sums[i / 2 + LANES / 2 * (i % 2)])
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{super::simd::x86::round512, LANES, in_order};
    use crate::quantized::QuantizedCpu;

    #[target_feature(enable = "avx512f,avx2")]
    pub fn quantized<const M: usize>(w: &QuantizedCpu, start: usize, x: [&[f32]; M]) -> [[f32; LANES]; M] {
        let k = x[0].len();
        let packed = w.packed[start / 2..(start + k) / 2].as_chunks::<16>().0;
        let values = load(w.quant_type.values().first_chunk().unwrap_or(&[0.0; 16]));
        let (first, a_block) = (start / w.blocksize, w.blocksize / LANES);
        let mut table = values;
        let sums = accumulate(packed.len(), x, |i| {
            if i % a_block == 0 {
                let absmax = _mm512_set1_ps(w.absmax.get(first + i / a_block));
                table = round512(w.dtype, _mm512_mul_ps(values, absmax));
            }
            // SAFETY: 16 readable bytes.
            let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(packed[i].as_ptr().cast()) });
            // Only the low four bits of each index count.
            let high = _mm512_srli_epi32::<4>(codes);
            [_mm512_permutexvar_ps(high, table), _mm512_permutexvar_ps(codes, table)]
        });
        sums.map(in_order)
    }

    #[target_feature(enable = "avx512f,avx2")]
    pub fn f16<const M: usize>(w: &[f16], x: [&[f32]; M]) -> [[f32; LANES]; M] {
        let w = w.as_chunks::<16>().0;
        // SAFETY: 16 numbers of 2 bytes.
        let wide = |w: &[f16; 16]| _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(w.as_ptr().cast()) });
        accumulate(w.len() / 2, x, |i| [wide(&w[2 * i]), wide(&w[2 * i + 1])])
    }

    #[target_feature(enable = "avx512f,avx2")]
    pub fn bf16<const M: usize>(w: &[bf16], x: [&[f32]; M]) -> [[f32; LANES]; M] {
        let w = w.as_chunks::<16>().0;
        let wide = |w: &[bf16; 16]| {
            // SAFETY: 16 numbers of 2 bytes.
            let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(w.as_ptr().cast()) });
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        };
        accumulate(w.len() / 2, x, |i| [wide(&w[2 * i]), wide(&w[2 * i + 1])])
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(from: &[f32; 16]) -> __m512 {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    /// Adds up `weights(i)`, 32 of them, times the numbers of x there.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn accumulate<const M: usize>(
        groups: usize,
        x: [&[f32]; M],
        mut weights: impl FnMut(usize) -> [__m512; 2],
    ) -> [[f32; LANES]; M] {
        let x = x.map(|x| &x.as_chunks::<LANES>().0[..groups]);
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        for i in 0..groups {
            let w = weights(i);
            for (sums, x) in sums.iter_mut().zip(x) {
                for ((sum, w), x) in sums.iter_mut().zip(w).zip(x[i].as_chunks().0) {
                    *sum = _mm512_add_ps(*sum, _mm512_mul_ps(w, load(x)));
                }
            }
        }
        sums.map(|sums| {
            let mut lanes = [0f32; LANES];
            for (sum, lanes) in sums.iter().zip(lanes.as_chunks_mut::<16>().0) {
                // SAFETY: 64 writable bytes.
                unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), *sum) };
            }
            lanes
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{super::simd::x86::round256, LANES, in_order};
    use crate::quantized::QuantizedCpu;

    #[target_feature(enable = "avx2,f16c")]
    pub fn quantized<const M: usize>(w: &QuantizedCpu, start: usize, x: [&[f32]; M]) -> [[f32; LANES]; M] {
        let k = x[0].len();
        let packed = w.packed[start / 2..(start + k) / 2].as_chunks::<16>().0;
        let values = w.quant_type.values().as_chunks::<8>().0;
        let values = [load(&values[0]), load(&values[1])];
        let (first, a_block) = (start / w.blocksize, w.blocksize / LANES);
        let mut table = values;
        let sums = accumulate(packed.len(), x, |i| {
            if i % a_block == 0 {
                let absmax = _mm256_set1_ps(w.absmax.get(first + i / a_block));
                table = [
                    round256(w.dtype, _mm256_mul_ps(values[0], absmax)),
                    round256(w.dtype, _mm256_mul_ps(values[1], absmax)),
                ];
            }
            // A look-up sees three bits; the fourth, moved to the sign, chooses the half.
            let lookup = |index: __m256i| {
                let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let [low, high] = table.map(|half| _mm256_permutevar8x32_ps(half, index));
                _mm256_blendv_ps(low, high, fourth)
            };
            let codes = |bytes: &[u8; 8]| {
                // SAFETY: 8 readable bytes.
                _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) })
            };
            let halves = packed[i].as_chunks::<8>().0;
            let (first, second) = (codes(&halves[0]), codes(&halves[1]));
            let high = |codes: __m256i| _mm256_srli_epi32::<4>(codes);
            [lookup(high(first)), lookup(high(second)), lookup(first), lookup(second)]
        });
        sums.map(in_order)
    }

    #[target_feature(enable = "avx2,f16c")]
    pub fn f16<const M: usize>(w: &[f16], x: [&[f32]; M]) -> [[f32; LANES]; M] {
        let w = w.as_chunks::<8>().0;
        // SAFETY: 8 numbers of 2 bytes.
        let wide = |w: &[f16; 8]| _mm256_cvtph_ps(unsafe { _mm_loadu_si128(w.as_ptr().cast()) });
        accumulate(w.len() / 4, x, |i| [0, 1, 2, 3].map(|part| wide(&w[4 * i + part])))
    }

    #[target_feature(enable = "avx2,f16c")]
    pub fn bf16<const M: usize>(w: &[bf16], x: [&[f32]; M]) -> [[f32; LANES]; M] {
        let w = w.as_chunks::<8>().0;
        let wide = |w: &[bf16; 8]| {
            // SAFETY: 8 numbers of 2 bytes.
            let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(w.as_ptr().cast()) });
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        };
        accumulate(w.len() / 4, x, |i| [0, 1, 2, 3].map(|part| wide(&w[4 * i + part])))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn load(from: &[f32; 8]) -> __m256 {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    /// Adds up `weights(i)`, 32 of them, times the numbers of x there.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn accumulate<const M: usize>(
        groups: usize,
        x: [&[f32]; M],
        mut weights: impl FnMut(usize) -> [__m256; 4],
    ) -> [[f32; LANES]; M] {
        let x = x.map(|x| &x.as_chunks::<LANES>().0[..groups]);
        let mut sums = [[_mm256_setzero_ps(); 4]; M];
        for i in 0..groups {
            let w = weights(i);
            for (sums, x) in sums.iter_mut().zip(x) {
                for ((sum, w), x) in sums.iter_mut().zip(w).zip(x[i].as_chunks().0) {
                    *sum = _mm256_add_ps(*sum, _mm256_mul_ps(w, load(x)));
                }
            }
        }
        sums.map(|sums| {
            let mut lanes = [0f32; LANES];
            for (sum, lanes) in sums.iter().zip(lanes.as_chunks_mut::<8>().0) {
                // SAFETY: 32 writable bytes.
                unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), *sum) };
            }
            lanes
        })
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::{super::simd, *};
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
                let mut row = vec![0f32; k];
                for r in 0..n {
                    w.widen(r * k, &mut row);
                    let got = few.dots(w, r);
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
