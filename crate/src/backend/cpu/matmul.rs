//! Matrix products with a weight that may be stored in fewer bits than it is computed in.
//!
//! A tile of the weight (at most `TILE` elements, half of a core's L2 cache) is widened
//! to f32 and multiplied at once, so a quantized weight never exists whole in f32 and the
//! widening costs no trip to memory. The tiles depend on the shapes alone, never on the
//! number of threads: the same product gives the same bits with any number of them. (Between kinds
//! of processor the last bits differ: `gemm` has kernels for AVX-512, for FMA and for neither.)

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use super::{
    SharedMut,
    dots::{FEW_ROWS, FewRows},
    math, simd,
    weight::WeightView,
};

/// Elements of a weight that are widened at once (256 KiB of f32).
const TILE: usize = 1 << 16;
/// Below this many multiplications a second thread costs more than it brings.
const WORTH_A_THREAD: usize = 1 << 17;

/// A matrix for [`gemm_f32`]: where it starts, and the distance between rows and columns.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub col: usize,
}

impl<'a> Mat<'a> {
    pub fn rows(data: &'a [f32], row: usize) -> Self {
        Self { data, row, col: 1 }
    }

    /// The transpose: the same data, strides exchanged.
    pub fn t(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }

    fn reaches(&self, rows: usize, cols: usize) -> usize {
        if rows == 0 || cols == 0 { 0 } else { (rows - 1) * self.row + (cols - 1) * self.col + 1 }
    }
}

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
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.reaches(m, k) <= a.data.len() && b.reaches(k, n) <= b.data.len(), "gemm: an operand is too small");
    let parallelism = if threads && m * n * k >= WORTH_A_THREAD { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: the operands' extents are checked above, the output's by the caller.
    unsafe {
        gemm(
            m,
            n,
            k,
            out,
            1,
            out_row as isize,
            accumulate,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// out[m, n] += x[m, k] w[n, k]^T.
pub fn matmul_nt((m, n, k): (usize, usize, usize), x: &[f32], w: &WeightView, out: &mut [f32]) {
    assert!(x.len() >= m * k && out.len() >= m * n, "matmul_nt: a buffer is too small");
    if m <= FEW_ROWS {
        return dot_rows((m, n, k), x, w, out);
    }
    if let WeightView::F32(w) = w {
        return gemm_f32((m, n, k), 1.0, Mat::rows(x, k), Mat::rows(w, k).t(), out, n, true, true);
    }
    // Four tiles at least, so that a few threads share evenly; sixteen rows at least, so that
    // the product of a tile is worth its call.
    let rows = (TILE / k).min(n.div_ceil(4)).max(16).min(n);
    let shared = SharedMut::new(out);
    let tile = |scratch: &mut Vec<f32>, start: usize| {
        let rows = rows.min(n - start);
        scratch.resize(rows * k, 0.0);
        w.widen(start * k, scratch);
        // SAFETY: columns start .. start + rows of the output belong to this tile.
        unsafe {
            gemm_into((m, rows, k), 1.0, Mat::rows(x, k), Mat::rows(scratch, k).t(), shared.at(start), n, true, false);
        }
    };
    for_tiles(n, rows, m * n * k, tile);
}

/// dx[m, k] += dy[m, n] w[n, k].
pub fn matmul_nn((m, n, k): (usize, usize, usize), dy: &[f32], w: &WeightView, dx: &mut [f32]) {
    assert!(dy.len() >= m * n && dx.len() >= m * k, "matmul_nn: a buffer is too small");
    if let WeightView::F32(w) = w {
        return gemm_f32((m, k, n), 1.0, Mat::rows(dy, n), Mat::rows(w, k), dx, k, true, true);
    }
    // A tile is `cols` columns of w, whole quantization blocks where k allows it.
    let cols = k.div_ceil(4).next_multiple_of(64).clamp(64, 512).min(k);
    let depth = (TILE / cols).max(1);
    let shared = SharedMut::new(dx);
    let tile = |scratch: &mut Vec<f32>, start: usize| {
        let cols = cols.min(k - start);
        for first in (0..n).step_by(depth) {
            let depth = depth.min(n - first);
            scratch.resize(depth * cols, 0.0);
            for (i, row) in scratch.chunks_exact_mut(cols).enumerate() {
                w.widen((first + i) * k + start, row);
            }
            let a = Mat::rows(&dy[first..], n);
            // SAFETY: columns start .. start + cols of dx belong to this tile.
            unsafe {
                gemm_into((m, cols, depth), 1.0, a, Mat::rows(scratch, cols), shared.at(start), k, true, false);
            }
        }
    };
    for_tiles(k, cols, m * n * k, tile);
}

/// [`matmul_nt`] for a few rows of x (decoding): each row of w is read once and dotted with each x.
fn dot_rows((m, n, k): (usize, usize, usize), x: &[f32], w: &WeightView, out: &mut [f32]) {
    let rows = (TILE / 4 / k).max(1);
    let shared = SharedMut::new(out);
    if let Some(few) = FewRows::new(simd::level(), (m, k), x, w) {
        let tile = |_: &mut Vec<f32>, start: usize| {
            for row in start..n.min(start + rows) {
                for (j, sum) in few.dots(w, row)[..m].iter().enumerate() {
                    // SAFETY: column `row` of the output belongs to this tile.
                    unsafe { *shared.at(j * n + row) += sum };
                }
            }
        };
        return for_tiles(n, rows, m * n * k, tile);
    }
    let tile = |scratch: &mut Vec<f32>, start: usize| {
        let rows = rows.min(n - start);
        let tile: &[f32] = match w {
            WeightView::F32(w) => &w[start * k..(start + rows) * k],
            _ => {
                scratch.resize(rows * k, 0.0);
                w.widen(start * k, scratch);
                scratch
            }
        };
        for (i, w) in tile.chunks_exact(k).enumerate() {
            for (j, x) in x.chunks_exact(k).take(m).enumerate() {
                // SAFETY: column start + i of the output belongs to this tile.
                unsafe { *shared.at(j * n + start + i) += math::dot(x, w) };
            }
        }
    };
    for_tiles(n, rows, m * n * k, tile);
}

/// Runs `tile(scratch, start)` for start = 0, step, 2 step, ... < n, on all threads if `work` is worth it.
fn for_tiles(n: usize, step: usize, work: usize, tile: impl Fn(&mut Vec<f32>, usize) + Sync) {
    let count = n.div_ceil(step.max(1));
    if count > 1 && work >= WORTH_A_THREAD {
        (0..count).into_par_iter().for_each_init(Vec::new, |scratch, i| tile(scratch, i * step));
    } else {
        let mut scratch = Vec::new();
        (0..count).for_each(|i| tile(&mut scratch, i * step));
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

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

    #[test]
    fn products_equal_three_loops() {
        for (m, n, k) in [(1, 5, 7), (3, 33, 65), (17, 130, 96), (40, 300, 192), (5, 1, 1)] {
            let (x, dy) = (random(m * k, 1), random(m * n, 2));
            let half: Vec<f16> = random(n * k, 3).into_iter().map(f16::from_f32).collect();
            let brain: Vec<bf16> = random(n * k, 4).into_iter().map(bf16::from_f32).collect();
            let single = random(n * k, 5);
            for w in [WeightView::F16(&half), WeightView::Bf16(&brain), WeightView::F32(&single)] {
                let mut wide = vec![0.0; n * k];
                w.widen(0, &mut wide);
                let mut out = vec![1.0; m * n];
                matmul_nt((m, n, k), &x, &w, &mut out);
                for (got, want) in out.iter().zip(naive((m, n, k), |i, l| x[i * k + l], |l, j| wide[j * k + l])) {
                    assert!((got - 1.0 - want).abs() < 1e-4, "nt {m} {n} {k}: {got} {want}");
                }
                let mut dx = vec![1.0; m * k];
                matmul_nn((m, n, k), &dy, &w, &mut dx);
                for (got, want) in dx.iter().zip(naive((m, k, n), |i, l| dy[i * n + l], |l, j| wide[l * k + j])) {
                    assert!((got - 1.0 - want).abs() < 1e-4, "nn {m} {n} {k}: {got} {want}");
                }
            }
        }
    }
}
