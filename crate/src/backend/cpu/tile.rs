//! The inner loop of the products of matrices: rows of one times a strip of another, which lies packed.
//!
//! An element of a product is one chain of fused multiply-adds in the order of the depth, so it has the same bits with any
//! number of threads or rows, with AVX-512 and with AVX2. (Without either, products and sums are rounded apart.)

use super::simd::{self, Level};

/// Columns of a strip.
pub const STRIP: usize = 32;
/// Columns of a narrow strip, for products with as few columns as LoRA's.
pub const NARROW: usize = 16;

/// A matrix: where it starts, and the distance between rows and columns.
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

    /// Without the rows and columns before these.
    pub fn from(self, row: usize, column: usize) -> Self {
        Self { data: &self.data[(row * self.row + column * self.col).min(self.data.len())..], ..self }
    }

    /// Elements that so many rows and columns reach over.
    pub fn reaches(&self, rows: usize, cols: usize) -> usize {
        if rows == 0 || cols == 0 { 0 } else { (rows - 1) * self.row + (cols - 1) * self.col + 1 }
    }
}

/// Where a product goes: `scale` times it, in rows `row` apart of `columns` elements.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub ptr: *mut f32,
    pub row: usize,
    pub columns: usize,
    pub scale: f32,
    pub onto: Onto<'a>,
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub enum Onto<'a> {
    /// What the output holds.
    Output,
    /// A residual, in rows as far apart as the output's, and a bias, the same in each row. The output is only written.
    Around { residual: Option<&'a [f32]>, bias: Option<&'a [f32]> },
}

impl<'a> Onto<'a> {
    pub const NOTHING: Self = Self::Around { residual: None, bias: None };

    /// From a column on.
    pub fn from(self, column: usize) -> Self {
        let from = |values: Option<&'a [f32]>| values.map(|values| &values[column..]);
        match self {
            Self::Around { residual, bias } => Self::Around { residual: from(residual), bias: from(bias) },
            other => other,
        }
    }
}

impl Target<'_> {
    /// The columns from `first` on, fewer than N.
    fn rest<const N: usize>(&self, first: usize) -> usize {
        self.columns.saturating_sub(first).min(N)
    }

    /// What row `i` of the product is added to, in the last columns, `first ..`.
    ///
    /// # Safety
    /// The row must lie in the output.
    unsafe fn before<const N: usize>(&self, i: usize, first: usize) -> [f32; N] {
        let columns = self.rest::<N>(first);
        let mut before = [0f32; N];
        let mut add = |from: &[f32]| before.iter_mut().zip(&from[..columns]).for_each(|(before, from)| *before += from);
        match self.onto {
            _ if columns == 0 => {}
            // SAFETY: the caller's promise.
            Onto::Output => add(unsafe { std::slice::from_raw_parts(self.ptr.add(i * self.row + first), columns) }),
            Onto::Around { residual, bias } => {
                residual.into_iter().for_each(|residual| add(&residual[i * self.row + first..]));
                bias.into_iter().for_each(|bias| add(&bias[first..]));
            }
        }
        before
    }

    /// Row `i` of the output, in the last columns, `first ..`.
    ///
    /// # Safety
    /// As [`Target::before`].
    unsafe fn write<const N: usize>(&self, i: usize, first: usize, row: &[f32; N]) {
        let columns = self.rest::<N>(first);
        if columns > 0 {
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), self.ptr.add(i * self.row + first), columns) };
        }
    }
}

/// What the numbers of a product are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Numbers {
    F32,
    /// Two of bf16 in the place of each f32, neighbours in the depth; the sums are f32. For processors with AVX-512 BF16.
    Bf16Pairs,
}

/// `to` = a `[m, depth]` times a strip `[depth, width]`, width [`STRIP`] or [`NARROW`].
///
/// # Safety
/// The output has the m rows, and no other thread touches them meanwhile.
pub unsafe fn multiply(
    level: Level,
    numbers: Numbers,
    (m, depth): (usize, usize),
    a: Mat,
    strip: &[f32],
    width: usize,
    to: Target,
) {
    assert!(width == STRIP || width == NARROW);
    assert!(numbers == Numbers::F32 || simd::has_bf16(level));
    assert!(to.columns <= width && strip.len() >= depth * width && a.data.len() >= a.reaches(m, depth));
    // SAFETY: the level was detected on this processor; the extents are checked, the output's by the caller.
    unsafe {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if numbers == Numbers::Bf16Pairs => bf16::multiply((m, depth), a, strip, width, to),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::multiply((m, depth), a, strip, width, to),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::multiply((m, depth), a, strip, width, to),
            Level::Scalar => scalar::multiply((m, depth), a, strip, width, to),
        }
    }
}

/// A kernel for vectors of `$lanes`: `$all` and `$some` of them side by side (the widths of a strip, or a part of it),
/// times as many rows at once as registers hold.
macro_rules! kernel {
    ($(#[$features:meta])? $lanes:literal, [$($vectors:literal)+], [$($rows:literal)+]) => {
        /// # Safety
        /// See [`super::multiply`].
        $(#[$features])?
        pub unsafe fn multiply((m, depth): (usize, usize), a: Mat, strip: &[f32], width: usize, to: Target) {
            let mut first = 0;
            $(while width - first >= $lanes * $vectors {
                // SAFETY: the extents were checked.
                unsafe { columns::<$vectors, { $lanes * $vectors }>((m, depth), a, strip, width, first, to) };
                first += $lanes * $vectors;
            })+
        }

        /// Columns `first .. first + N` of all rows.
        $(#[$features])?
        unsafe fn columns<const V: usize, const N: usize>(
            (m, depth): (usize, usize),
            a: Mat,
            strip: &[f32],
            width: usize,
            first: usize,
            to: Target,
        ) {
            let mut i = 0;
            $(while m - i >= $rows {
                // SAFETY: the extents were checked.
                unsafe { block::<$rows, V, N>(depth, a, i, &strip[first..], width, first, to) };
                i += $rows;
            })+
        }

        /// Rows `i .. i + R`, columns `first .. first + N`.
        $(#[$features])?
        #[inline]
        unsafe fn block<const R: usize, const V: usize, const N: usize>(
            depth: usize,
            a: Mat,
            i: usize,
            strip: &[f32],
            width: usize,
            first: usize,
            to: Target,
        ) {
            let mut sums = [[zero(); V]; R];
            let (mut a, rows, column) = (a.data[i * a.row..].as_ptr(), a.row, a.col);
            let mut b = strip.as_ptr();
            for _ in 0..depth {
                // SAFETY: the extents were checked.
                let b_now: [_; V] = std::array::from_fn(|v| unsafe { load(b.add(v * $lanes)) });
                for r in 0..R {
                    // SAFETY: as above.
                    let x = broadcast(unsafe { *a.add(r * rows) });
                    for v in 0..V {
                        sums[r][v] = multiply_add(x, b_now[v], sums[r][v]);
                    }
                }
                // The last step leaves the pointers behind the end.
                (a, b) = (a.wrapping_add(column), b.wrapping_add(width));
            }
            // A copy: what has an address is in memory, at each step of the depth.
            let mut done = [[zero(); V]; R];
            for r in 0..R {
                for v in 0..V {
                    done[r][v] = sums[r][v];
                }
            }
            // SAFETY: the caller's promise.
            unsafe { add_to::<R, V, N>(&done, i, first, to) };
        }

        /// Adds a block to what is there.
        ///
        /// # Safety
        /// See [`super::multiply`].
        $(#[$features])?
        #[inline(never)]
        unsafe fn add_to<const R: usize, const V: usize, const N: usize>(
            sums: &[[Vector; V]; R],
            i: usize,
            first: usize,
            to: Target,
        ) {
            let scale = broadcast(to.scale);
            if to.columns < first + N {
                for (r, sums) in sums.iter().enumerate() {
                    // SAFETY: the caller's promise.
                    let mut row = unsafe { to.before::<N>(i + r, first) };
                    for (sum, part) in sums.iter().zip(row.as_chunks_mut::<$lanes>().0) {
                        // SAFETY: `part` holds a vector.
                        unsafe { store(part.as_mut_ptr(), scale_add(scale, *sum, load(part.as_ptr()))) };
                    }
                    // SAFETY: the caller's promise.
                    unsafe { to.write(i + r, first, &row) };
                }
                return;
            }
            for (r, sums) in sums.iter().enumerate() {
                let at = (i + r) * to.row + first;
                for (v, sum) in sums.iter().enumerate() {
                    // SAFETY: the caller's promise; the row has all columns, and so have its residual and its bias.
                    unsafe {
                        let out = to.ptr.add(at + v * $lanes);
                        let before = match to.onto {
                            Onto::Output => load(out),
                            Onto::Around { residual, bias } => {
                                let part = |values: Option<&[f32]>, at: usize| {
                                    values.map(|values| values[at + v * $lanes..][..$lanes].as_ptr())
                                };
                                match (part(residual, at), part(bias, first)) {
                                    (Some(residual), Some(bias)) => {
                                        scale_add(broadcast(1.0), load(residual), load(bias))
                                    }
                                    (Some(one), None) | (None, Some(one)) => load(one),
                                    (None, None) => zero(),
                                }
                            }
                        };
                        store(out, scale_add(scale, *sum, before));
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512 as Vector, _mm512_fmadd_ps as multiply_add, _mm512_fmadd_ps as scale_add, _mm512_loadu_ps as load,
        _mm512_set1_ps as broadcast, _mm512_setzero_ps as zero, _mm512_storeu_ps as store,
    };

    use super::{Mat, Onto, Target};

    kernel!(#[target_feature(enable = "avx512f")] 16, [2 1], [12 8 4 2 1]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256 as Vector, _mm256_fmadd_ps as multiply_add, _mm256_fmadd_ps as scale_add, _mm256_loadu_ps as load,
        _mm256_set1_ps as broadcast, _mm256_setzero_ps as zero, _mm256_storeu_ps as store,
    };

    use super::{Mat, Onto, Target};

    kernel!(#[target_feature(enable = "avx2,fma")] 8, [2], [6 4 2 1]);
}

#[cfg(target_arch = "x86_64")]
mod bf16 {
    use std::{
        arch::x86_64::{
            __m512, __m512 as Vector, __m512bh, _mm512_dpbf16_ps, _mm512_fmadd_ps as scale_add,
            _mm512_loadu_ps as load, _mm512_set1_ps as broadcast, _mm512_setzero_ps as zero, _mm512_storeu_ps as store,
        },
        mem::transmute,
    };

    use super::{Mat, Onto, Target};

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn multiply_add(x: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: 32 numbers of 2 bytes in the place of 16 of 4.
        unsafe { _mm512_dpbf16_ps(sum, transmute::<__m512, __m512bh>(x), transmute::<__m512, __m512bh>(b)) }
    }

    kernel!(#[target_feature(enable = "avx512f,avx512bf16")] 16, [2 1], [12 8 4 2 1]);
}

mod scalar {
    use super::{Mat, Onto, Target};

    /// Four lanes: what SSE and NEON have.
    type Lanes = [f32; 4];
    type Vector = Lanes;

    fn zero() -> Lanes {
        [0.0; 4]
    }

    fn broadcast(x: f32) -> Lanes {
        [x; 4]
    }

    unsafe fn load(from: *const f32) -> Lanes {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Lanes>().read_unaligned() }
    }

    unsafe fn store(to: *mut f32, v: Lanes) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Lanes>().write_unaligned(v) }
    }

    #[inline(always)]
    fn multiply_add(x: Lanes, b: Lanes, sum: Lanes) -> Lanes {
        // Every Arm processor of 64 bits fuses them; without an instruction it would be a call.
        let fused = cfg!(target_arch = "aarch64");
        std::array::from_fn(|i| if fused { x[i].mul_add(b[i], sum[i]) } else { x[i] * b[i] + sum[i] })
    }

    use self::multiply_add as scale_add;

    kernel!(4, [2], [4 2 1]);
}
