//! Causal attention on the CPU, a block of queries at a time.
//!
//! The scores of `QUERY_BLOCK` queries against the keys that they may see are the only
//! part of the T x T matrix that ever exists; the backward computes them again. Queries,
//! keys and values are read where the fused projection left them, through strides, and
//! their gradients are written to the same places.

use rayon::prelude::*;

use super::{
    SharedMut,
    math::{scale_alibi, softmax, softmax_backward},
    matmul::{Mat, gemm_into},
};

/// Queries whose scores exist at a time: 64 x 1024 scores fit a core's L2 cache.
const QUERY_BLOCK: usize = 64;

/// One head of one sequence: where its rows are and how far apart.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    pub data: &'a [f32],
    pub offset: usize,
    pub row: usize,
}

impl<'a> Operand<'a> {
    fn rows(&self, first: usize) -> Mat<'a> {
        Mat::rows(&self.data[self.offset + first * self.row..], self.row)
    }
}

/// The attention of one head over one sequence: `queries` rows that follow
/// `keys - queries` earlier ones; query i sees keys 0 ..= keys - queries + i.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    pub q: Operand<'a>,
    pub k: Operand<'a>,
    pub v: Operand<'a>,
    pub queries: usize,
    pub keys: usize,
    pub head_dim: usize,
    /// ALiBi: `slope * j` is added to the score of key j; 0 for none.
    pub slope: f32,
    pub scale: f32,
}

impl Head<'_> {
    /// P = softmax(scale q k^T + alibi) for queries first .. first + rows: row-major, `seen`
    /// columns, zero where the causal mask hides a key.
    fn probabilities(&self, first: usize, rows: usize, seen: usize, p: &mut Vec<f32>) {
        p.clear();
        p.resize(rows * seen, 0.0);
        let dims = (rows, seen, self.head_dim);
        // SAFETY: p is this thread's own and has rows * seen elements.
        unsafe { gemm_into(dims, 1.0, self.q.rows(first), self.k.rows(0).t(), p.as_mut_ptr(), seen, false, false) };
        for (i, row) in p.chunks_exact_mut(seen).enumerate() {
            let (visible, hidden) = row.split_at_mut(self.keys - self.queries + first + i + 1);
            scale_alibi(visible, self.scale, self.slope);
            softmax(visible);
            hidden.fill(0.0);
        }
    }

    fn blocks(self) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..self.queries).step_by(QUERY_BLOCK).map(move |first| {
            let rows = QUERY_BLOCK.min(self.queries - first);
            (first, rows, self.keys - self.queries + first + rows)
        })
    }

    /// Writes the head's output rows at `out[offset + i * row ..]`.
    ///
    /// # Safety
    /// No other thread may touch those elements.
    unsafe fn forward(&self, out: SharedMut, offset: usize, row: usize) {
        let mut p = Vec::new();
        for (first, rows, seen) in self.blocks() {
            self.probabilities(first, rows, seen, &mut p);
            let dims = (rows, self.head_dim, seen);
            // SAFETY: the caller's promise.
            unsafe {
                let out = out.at(offset + first * row);
                gemm_into(dims, 1.0, Mat::rows(&p, seen), self.v.rows(0), out, row, false, false);
            }
        }
    }

    /// Adds the gradients of q, k and v at the operands' own places in `grad`.
    ///
    /// # Safety
    /// No other thread may touch those elements.
    unsafe fn backward(&self, dout: Operand, grad: SharedMut) {
        let (mut p, mut dp) = (Vec::new(), Vec::new());
        let (q, k, v, d) = (self.q, self.k, self.v, self.head_dim);
        for (first, rows, seen) in self.blocks() {
            self.probabilities(first, rows, seen, &mut p);
            dp.clear();
            dp.resize(rows * seen, 0.0);
            let dout = dout.rows(first);
            let (at_q, at_k, at_v) = (q.offset + first * q.row, k.offset, v.offset);
            // SAFETY: dp is this thread's own; the places in `grad` are the caller's promise.
            unsafe {
                gemm_into((rows, seen, d), 1.0, dout, v.rows(0).t(), dp.as_mut_ptr(), seen, false, false);
                gemm_into((seen, d, rows), 1.0, Mat::rows(&p, seen).t(), dout, grad.at(at_v), v.row, true, false);
            }
            for (p, dp) in p.chunks_exact(seen).zip(dp.chunks_exact_mut(seen)) {
                softmax_backward(p, dp, self.scale);
            }
            let ds = Mat::rows(&dp, seen);
            // SAFETY: as above.
            unsafe {
                gemm_into((rows, d, seen), 1.0, ds, k.rows(0), grad.at(at_q), q.row, true, false);
                gemm_into((seen, d, rows), 1.0, ds.t(), q.rows(first), grad.at(at_k), k.row, true, false);
            }
        }
    }
}

/// Runs every head; `place[i]` is where head i's output rows start, rows `row` apart.
pub fn forward(heads: &[Head], place: &[usize], out: &mut [f32], row: usize) {
    check(heads, place, out.len(), row);
    let shared = SharedMut::new(out);
    let run = |(head, &offset): (&Head, &usize)| {
        // SAFETY: each head of each sequence has its own columns and rows of the output.
        unsafe { head.forward(shared, offset, row) }
    };
    if worth_threads(heads) {
        heads.par_iter().zip(place).for_each(run);
    } else {
        heads.iter().zip(place).for_each(run);
    }
}

/// Adds every head's gradients to `grad`, which has the layout of the operands' buffer.
/// Heads that share keys and values (grouped queries) must be neighbours: groups of `group`.
pub fn backward(heads: &[Head], place: &[usize], dout: &[f32], row: usize, grad: &mut [f32], group: usize) {
    check(heads, place, dout.len(), row);
    let shared = SharedMut::new(grad);
    let run = |(heads, places): (&[Head], &[usize])| {
        for (head, &offset) in heads.iter().zip(places) {
            // SAFETY: each group has its own keys and values, each head its own queries.
            unsafe { head.backward(Operand { data: dout, offset, row }, shared) }
        }
    };
    if worth_threads(heads) {
        heads.par_chunks(group).zip(place.par_chunks(group)).for_each(run);
    } else {
        heads.chunks(group).zip(place.chunks(group)).for_each(run);
    }
}

/// A single query against a short cache is over before a thread has woken up.
fn worth_threads(heads: &[Head]) -> bool {
    heads.iter().map(|h| h.queries * h.keys * h.head_dim).sum::<usize>() > 1 << 17
}

fn check(heads: &[Head], place: &[usize], len: usize, row: usize) {
    assert_eq!(heads.len(), place.len(), "attention: one place a head");
    for (head, offset) in heads.iter().zip(place) {
        assert!(head.queries <= head.keys, "attention: more queries than keys");
        assert!(head.queries == 0 || offset + (head.queries - 1) * row + head.head_dim <= len, "attention: output");
    }
}
