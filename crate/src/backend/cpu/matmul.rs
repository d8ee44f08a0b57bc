//! Matrix products with a weight that may be stored in fewer bits than it is computed in.
//!
//! A strip of the weight (at most `DEPTH` times `STRIP` elements) is widened to f32 into the order in which
//! `tile::multiply` reads it, and used for all rows at once: a quantized weight never exists whole in f32, and the
//! widening costs no trip to memory. The same product gives the same bits with any number of threads.

use std::{borrow::Cow, cell::RefCell};

use super::{
    SharedMut,
    dots::{FEW_ROWS, FewRows},
    math, pack,
    simd::{self, Level},
    team,
    tile::{self, Mat, NARROW, Numbers, Onto, STRIP, Target},
    weight::WeightView,
};

/// Rows of a strip that are packed at once: 128 KiB of f32, which stay in a core's L2 cache.
const DEPTH: usize = 1024;
/// Elements of a weight that a thread takes at a time for a few rows.
const FEW_ROWS_TILE: usize = 1 << 14;
/// Numbers that are rounded by a thread at a time.
const PIECE: usize = 1 << 13;
/// Below this many multiplications a second thread costs more than it brings.
const WORTH_A_THREAD: usize = 1 << 15;

/// out[m, n] = scale * a[m, k] b[k, n] (+ out when `accumulate`); out's rows are `out_row` apart.
#[allow(clippy::too_many_arguments)]
pub fn gemm_f32(
    (m, n, k): (usize, usize, usize),
    scale: f32,
    a: Mat,
    b: Mat,
    out: &mut [f32],
    out_row: usize,
    accumulate: bool,
    threads: bool,
) {
    assert!(Mat::rows(out, out_row).reaches(m, n) <= out.len(), "gemm: the output is too small");
    // SAFETY: the assertion above.
    unsafe { gemm_into((m, n, k), scale, a, b, out.as_mut_ptr(), out_row, accumulate, threads) }
}

/// [`gemm_f32`] into a pointer, for threads that share an output.
///
/// # Safety
/// `out` must be valid for the m × n elements, rows `out_row` apart, and no other thread
/// may touch those elements meanwhile.
#[allow(clippy::too_many_arguments)]
pub unsafe fn gemm_into(
    (m, n, k): (usize, usize, usize),
    scale: f32,
    a: Mat,
    b: Mat,
    out: *mut f32,
    out_row: usize,
    accumulate: bool,
    threads: bool,
) {
    assert!(a.reaches(m, k) <= a.data.len() && b.reaches(k, n) <= b.data.len(), "gemm: an operand is too small");
    // SAFETY: nothing but this function's own tasks writes through it.
    let out = unsafe { SharedMut::from_ptr(out) };
    let onto = if accumulate { Onto::Output } else { Onto::NOTHING };
    let strip = |i: usize, rows: std::ops::Range<usize>| {
        let start = i * STRIP;
        let columns = STRIP.min(n - start);
        let width = if columns <= NARROW { NARROW } else { STRIP };
        for_depth(k, width, onto, |depth, onto, scratch| {
            let (a, b) = (a.from(rows.start, depth.start), b.from(depth.start, start));
            pack::matrix(simd::level(), b, (depth.len(), columns), width, scratch);
            // SAFETY: rows and columns of the output belong to this task.
            unsafe {
                let target = Target { ptr: out.at(rows.start * out_row + start), row: out_row, columns, scale, onto };
                tile::multiply(simd::level(), Numbers::F32, (rows.len(), depth.len()), a, scratch, width, target);
            }
        });
    };
    let strips = n.div_ceil(STRIP);
    if !threads || m * n * k < WORTH_A_THREAD {
        return (0..strips).for_each(|i| strip(i, 0..m));
    }
    // Rows are shared out where there are too few strips for the threads; it changes no bits.
    let parts = (2 * team::threads()).div_ceil(strips.max(1));
    let rows = m.div_ceil(parts).next_multiple_of(12);
    let parts = m.div_ceil(rows.max(1));
    team::run(strips * parts, |task| {
        let first = task % parts * rows;
        strip(task / parts, first..m.min(first + rows));
    });
}

thread_local! {
    /// A strip that is being used, for each thread.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs `part(depth range, onto, scratch of that depth)` over a depth of k: the first is added to `onto`, the others to
/// what the output holds then.
fn for_depth<'a>(
    k: usize,
    width: usize,
    mut onto: Onto<'a>,
    mut part: impl FnMut(std::ops::Range<usize>, Onto<'a>, &mut [f32]),
) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize(scratch.len().max(k.min(DEPTH) * width), 0.0);
        let mut first = 0;
        loop {
            let end = k.min(first + DEPTH);
            part(first..end, onto, &mut scratch[..(end - first) * width]);
            (first, onto) = (end, Onto::Output);
            if first == k {
                break;
            }
        }
    });
}

/// What a product with a frozen weight is computed in; sums are f32 always.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compute {
    F32,
    /// Both operands are rounded to bf16 first, except for so few rows that reading the weight takes all the time.
    Bf16,
}

/// x[m, k] w[n, k]^T, `[m, n]`, plus a residual `[m, n]` and a bias `[n]`.
pub fn product_nt(
    (m, n, k): (usize, usize, usize),
    x: &[f32],
    w: &WeightView,
    [residual, bias]: [Option<&[f32]>; 2],
    compute: Compute,
) -> Vec<f32> {
    // SAFETY: the product writes each element.
    unsafe {
        written(m * n, |out| match m {
            0..=FEW_ROWS => dot_rows((m, n, k), x, w, [residual, bias], out),
            _ => {
                let x = Rows::new(simd::level(), x, (m, k), compute);
                nt_into((m, n, k), &x, w, Onto::Around { residual, bias }, out);
            }
        })
    }
}

/// dy[m, n] w[n, k], `[m, k]`.
pub fn product_nn((m, n, k): (usize, usize, usize), dy: &[f32], w: &WeightView, compute: Compute) -> Vec<f32> {
    let dy = Rows::new(simd::level(), dy, (m, n), compute);
    // SAFETY: the product writes each element.
    unsafe { written(m * k, |out| nn_into((m, n, k), &dy, w, out)) }
}

/// The rows `[m, depth]` of a product, as it is computed.
struct Rows<'a> {
    level: Level,
    compute: Compute,
    numbers: Numbers,
    data: Cow<'a, [f32]>,
    row: usize,
}

impl<'a> Rows<'a> {
    fn new(level: Level, x: &'a [f32], (m, depth): (usize, usize), compute: Compute) -> Self {
        let x = &x[..m * depth];
        if compute == Compute::F32 {
            return Self { level, compute, numbers: Numbers::F32, data: x.into(), row: depth };
        }
        if !simd::has_bf16(level) {
            let mut data = x.to_vec();
            team::chunks(&mut data, PIECE, |_, x| math::round_bf16(x));
            return Self { level, compute, numbers: Numbers::F32, data: data.into(), row: depth };
        }
        let row = depth.div_ceil(2);
        let mut data = vec![0f32; m * row];
        let rows = (PIECE / depth.max(1)).max(1);
        team::chunks(&mut data, (rows * row).max(1), |range, pairs| {
            for (i, pairs) in (range.start / row..).zip(pairs.chunks_exact_mut(row)) {
                math::bf16_pairs(&x[i * depth..][..depth], pairs);
            }
        });
        Self { level, compute, numbers: Numbers::Bf16Pairs, data: data.into(), row }
    }

    /// Times a strip that is packed in f32, in some of the depth.
    ///
    /// # Safety
    /// As [`tile::multiply`].
    unsafe fn times(&self, m: usize, depth: std::ops::Range<usize>, strip: &mut [f32], to: Target) {
        let rows = strip.as_chunks_mut::<STRIP>().0;
        // Parts of a depth begin with an even number.
        let (first, count) = match self.numbers {
            Numbers::F32 if self.compute == Compute::Bf16 => {
                math::round_bf16(rows.as_flattened_mut());
                (depth.start, depth.len())
            }
            Numbers::F32 => (depth.start, depth.len()),
            Numbers::Bf16Pairs => {
                math::bf16_row_pairs(self.level, rows);
                (depth.start / 2, depth.len().div_ceil(2))
            }
        };
        let x = Mat::rows(&self.data[first..], self.row);
        // SAFETY: the caller's promise.
        unsafe { tile::multiply(self.level, self.numbers, (m, count), x, strip, STRIP, to) };
    }
}

/// `len` elements that `write` writes: nobody need fill them with zeros before.
///
/// # Safety
/// `write` writes each of them.
unsafe fn written(len: usize, write: impl FnOnce(SharedMut)) -> Vec<f32> {
    let mut out = Vec::with_capacity(len);
    // SAFETY: the memory is this function's; the caller's promise.
    unsafe {
        write(SharedMut::from_ptr(out.as_mut_ptr()));
        out.set_len(len);
    }
    out
}

/// # Safety
/// `out` has m × n elements, which nobody else touches.
unsafe fn nt_into((m, n, k): (usize, usize, usize), x: &Rows, w: &WeightView, onto: Onto, out: SharedMut) {
    for_tasks(n.div_ceil(STRIP), m * n * k, |i| {
        let start = i * STRIP;
        let columns = STRIP.min(n - start);
        for_depth(k, STRIP, onto.from(start), |depth, onto, strip| {
            pack::transposed(x.level, w, k, start..start + columns, depth.clone(), strip);
            // SAFETY: these columns of the output belong to this task.
            unsafe { x.times(m, depth, strip, Target { ptr: out.at(start), row: n, columns, scale: 1.0, onto }) };
        });
    });
}

/// # Safety
/// `dx` has m × k elements, which nobody else touches.
unsafe fn nn_into((m, n, k): (usize, usize, usize), dy: &Rows, w: &WeightView, dx: SharedMut) {
    for_tasks(k.div_ceil(STRIP), m * n * k, |i| {
        let start = i * STRIP;
        let columns = STRIP.min(k - start);
        for_depth(n, STRIP, Onto::NOTHING, |depth, onto, strip| {
            pack::rows(dy.level, w, k, depth.clone(), start..start + columns, strip);
            // SAFETY: these columns of dx belong to this task.
            unsafe { dy.times(m, depth, strip, Target { ptr: dx.at(start), row: k, columns, scale: 1.0, onto }) };
        });
    });
}

/// [`nt_into`] for a few rows of x (decoding): each row of w is read once and dotted with each x.
///
/// # Safety
/// As [`nt_into`].
unsafe fn dot_rows(
    (m, n, k): (usize, usize, usize),
    x: &[f32],
    w: &WeightView,
    [residual, bias]: [Option<&[f32]>; 2],
    out: SharedMut,
) {
    // Long runs of rows, which memory gives faster, and some for each thread.
    let rows = (FEW_ROWS_TILE / k.max(1)).max(n.div_ceil(4 * team::threads())).next_multiple_of(4);
    let few = FewRows::new(simd::level(), (m, k), x, w);
    for_tasks(n.div_ceil(rows), m * n * k, |i| {
        let rows = i * rows..n.min((i + 1) * rows);
        let mut sums = vec![[0f32; FEW_ROWS]; rows.len()];
        match (&few, w) {
            (Some(few), w) => few.dots(w, rows.clone(), &mut sums),
            (None, WeightView::F32(w)) => {
                let rows = w[rows.start * k..rows.end * k].chunks_exact(k);
                sums.iter_mut().zip(rows).for_each(|(sums, w)| *sums = dots(m, x, w));
            }
            (None, w) => {
                let mut wide = vec![0f32; k];
                for (row, sums) in rows.clone().zip(&mut sums) {
                    w.widen(row * k, &mut wide);
                    *sums = dots(m, x, &wide);
                }
            }
        }
        for (row, sums) in rows.zip(&sums) {
            for (j, sum) in sums[..m].iter().enumerate() {
                let at = j * n + row;
                let before = residual.map_or(0.0, |residual| residual[at]) + bias.map_or(0.0, |bias| bias[row]);
                // SAFETY: column `row` of the output belongs to this task.
                unsafe { out.at(at).write(before + sum) };
            }
        }
    });
}

/// Each of m rows of x times w.
fn dots(m: usize, x: &[f32], w: &[f32]) -> [f32; FEW_ROWS] {
    std::array::from_fn(|j| if j < m { math::dot(&x[j * w.len()..][..w.len()], w) } else { 0.0 })
}

/// Runs every task, on all threads if `work` multiplications are worth it.
fn for_tasks(tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
    if work >= WORTH_A_THREAD { team::run(tasks, task) } else { (0..tasks).for_each(task) }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use half::{bf16, f16};

    use super::*;
    use crate::quantized::{QuantType, QuantizedTensor};

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_mt::Mt64::new(seed);
        (0..n).map(|_| (rng.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    /// Three loops: the oracle.
    fn naive(
        (m, n, k): (usize, usize, usize),
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f32> {
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k).map(|l| f64::from(a(i, l)) * f64::from(b(l, j))).sum::<f64>() as f32;
            }
        }
        out
    }

    /// Each level of this processor, in f32 and with both operands rounded to bf16.
    fn kinds() -> impl Iterator<Item = (Level, Compute)> {
        simd::available().into_iter().flat_map(|level| [Compute::F32, Compute::Bf16].map(|compute| (level, compute)))
    }

    #[test]
    fn products_equal_three_loops() {
        let shapes = [(5, 1, 1), (17, 130, 96), (40, 300, 192), (6, 70, 1100), (7, 1100, 40), (13, 33, 65)];
        for (m, n, k) in if cfg!(miri) { &shapes[..1] } else { &shapes[..] }.iter().copied() {
            let (x, dy) = (random(m * k, 1), random(m * n, 2));
            let (residual, bias) = (random(m * n, 6), random(n, 7));
            let half: Vec<f16> = random(n * k, 3).into_iter().map(f16::from_f32).collect();
            let brain: Vec<bf16> = random(n * k, 4).into_iter().map(bf16::from_f32).collect();
            let single = random(n * k, 5);
            for w in [WeightView::F16(&half), WeightView::Bf16(&brain), WeightView::F32(&single)] {
                let mut wide = vec![0.0; n * k];
                w.widen(0, &mut wide);
                for (level, compute) in kinds() {
                    let rounded = |x: f32| if compute == Compute::Bf16 { bf16::from_f32(x).to_f32() } else { x };
                    let onto = Onto::Around { residual: Some(&residual), bias: Some(&bias) };
                    let rows = Rows::new(level, &x, (m, k), compute);
                    let y = unsafe { written(m * n, |out| nt_into((m, n, k), &rows, &w, onto, out)) };
                    let want = naive((m, n, k), |i, l| rounded(x[i * k + l]), |l, j| rounded(wide[j * k + l]));
                    for (i, (got, want)) in y.iter().zip(want).enumerate() {
                        let want = want + residual[i] + bias[i % n];
                        assert!((got - want).abs() < 1e-4, "nt {level:?} {compute:?} {m} {n} {k}: {got} {want}");
                    }
                    let rows = Rows::new(level, &dy, (m, n), compute);
                    let dx = unsafe { written(m * k, |out| nn_into((m, n, k), &rows, &w, out)) };
                    let want = naive((m, k, n), |i, l| rounded(dy[i * n + l]), |l, j| rounded(wide[l * k + j]));
                    for (got, want) in dx.iter().zip(want) {
                        assert!((got - want).abs() < 1e-4, "nn {level:?} {compute:?} {m} {n} {k}: {got} {want}");
                    }
                }
            }
        }
    }

    /// Codes packed for a product are the values that widening gives; AVX-512 and AVX2 sum them in one order.
    #[test]
    fn products_of_codes_have_the_bits_of_widened_ones() {
        for (n, k, blocksize) in [(40, 192, 64), (33, 96, 64), (16, 4096, 4096), (35, 64, 32)] {
            let w = Tensor::from_vec(random(n * k, 8), (n, k), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap();
            for quant_type in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4] {
                let w = QuantizedTensor::quantize(&w, quant_type, blocksize, true).unwrap();
                let (m, mut wide) = (9, vec![0.0; n * k]);
                let (x, dy) = (random(m * k, 1), random(m * n, 2));
                w.with_cpu(|w| WeightView::Quantized(*w).widen(0, &mut wide)).unwrap();
                for compute in [Compute::F32, Compute::Bf16] {
                    let mut fused = None;
                    for level in simd::available() {
                        let products = |w: &WeightView| unsafe {
                            let (x, dy) =
                                (Rows::new(level, &x, (m, k), compute), Rows::new(level, &dy, (m, n), compute));
                            let y = written(m * n, |out| nt_into((m, n, k), &x, w, Onto::NOTHING, out));
                            (y, written(m * k, |out| nn_into((m, n, k), &dy, w, out)))
                        };
                        let got = w.with_cpu(|w| products(&WeightView::Quantized(*w))).unwrap();
                        assert_eq!(got, products(&WeightView::F32(&wide)), "{level:?} {compute:?} {n} {k}");
                        if level != Level::Scalar && compute == Compute::F32 {
                            assert_eq!(*fused.get_or_insert(got.clone()), got, "{level:?}, {n} {k}");
                        }
                    }
                }
            }
        }
    }

    /// A gradient that is not a number stays one in bf16.
    #[test]
    fn what_is_not_finite_is_seen_in_bf16() {
        let w = random(32 * 32, 1);
        for value in [f32::NAN, f32::from_bits(0x7fff_ffff), f32::INFINITY] {
            let mut x = random(8 * 32, 2);
            x[3 * 32 + 5] = value;
            let y = product_nt((8, 32, 32), &x, &WeightView::F32(&w), [None; 2], Compute::Bf16);
            let finite: Vec<bool> = y.chunks_exact(32).map(|row| row.iter().all(|v| v.is_finite())).collect();
            assert_eq!(finite, [true, true, true, false, true, true, true, true], "{value}");
        }
    }
}
