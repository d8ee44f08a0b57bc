//! Causal attention on the CPU, a block of queries at a time.
//!
//! The scores of `QUERY_BLOCK` queries against the keys that they may see are the only
//! part of the T x T matrix that ever exists; the backward computes them again. Queries,
//! keys and values are read where the fused projection left them, through strides, and
//! their gradients are written to the same places.

use candle_core::{Device, Tensor};

use super::{
    super::{
        Attends,
        kv_cache::KvCache,
        operands::{Attention, HeadLayout, Place, Rope},
        param::modify_f32,
        run::Run,
    },
    Cpu, F32View, SharedMut,
    math::{self, scale_alibi, softmax, softmax_backward},
    matmul::gemm_into,
    rope, team,
    tile::Mat,
};
use crate::error::Result;

const PROJECTED: &str = "attention: projected";

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
/// `keys - queries` earlier ones; query i sees the last `window` of keys 0 ..= keys - queries + i.
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
    /// A query sees so many keys at the most, its own the last of them.
    pub window: usize,
    /// Where its output rows begin.
    pub place: usize,
}

/// Queries whose scores exist at a time, and the keys that one of them sees.
struct Block {
    first_query: usize,
    queries: usize,
    first_key: usize,
    keys: usize,
}

impl Head<'_> {
    /// P = softmax(scale q k^T + alibi) of a block: row-major, one column a key of the block, zero where a key is hidden.
    fn probabilities(&self, block: &Block, p: &mut Vec<f32>) {
        let &Block { first_query, queries, first_key, keys } = block;
        p.clear();
        p.resize(queries * keys, 0.0);
        let (q, k) = (self.q.rows(first_query), self.k.rows(first_key).t());
        // SAFETY: p is this thread's own and has queries * keys elements.
        unsafe { gemm_into((queries, keys, self.head_dim), 1.0, q, k, p.as_mut_ptr(), keys, false, false) };
        for (i, row) in p.chunks_exact_mut(keys).enumerate() {
            let end = self.keys - self.queries + first_query + i + 1 - first_key;
            let begin = end.saturating_sub(self.window);
            let (seen, later) = row.split_at_mut(end);
            let (earlier, visible) = seen.split_at_mut(begin);
            scale_alibi(visible, self.scale, self.slope);
            softmax(visible);
            earlier.fill(0.0);
            later.fill(0.0);
        }
    }

    fn blocks(self) -> impl Iterator<Item = Block> {
        (0..self.queries).step_by(QUERY_BLOCK).map(move |first_query| {
            let queries = QUERY_BLOCK.min(self.queries - first_query);
            let before = self.keys - self.queries + first_query;
            let first_key = (before + 1).saturating_sub(self.window);
            Block { first_query, queries, first_key, keys: before + queries - first_key }
        })
    }

    /// Writes the head's output rows to its place in `out`, `row` apart.
    ///
    /// # Safety
    /// No other thread may touch those elements.
    unsafe fn forward(&self, out: SharedMut, row: usize) {
        if self.queries == 1 {
            // SAFETY: the caller's promise.
            return self.one_query(unsafe { out.slice(self.place..self.place + self.head_dim) });
        }
        let mut p = Vec::new();
        for block in self.blocks() {
            self.probabilities(&block, &mut p);
            let dims = (block.queries, self.head_dim, block.keys);
            let v = self.v.rows(block.first_key);
            // SAFETY: the caller's promise.
            unsafe {
                let out = out.at(self.place + block.first_query * row);
                gemm_into(dims, 1.0, Mat::rows(&p, block.keys), v, out, row, false, false);
            }
        }
    }

    /// A new token's: nothing is packed for a single row.
    fn one_query(&self, out: &mut [f32]) {
        let first = self.keys.saturating_sub(self.window);
        let rows = |of: &Operand<'_>| (of.offset + first * of.row, of.row);
        let q = &self.q.data[self.q.offset..][..self.head_dim];
        let mut p = vec![0f32; self.keys - first];
        let (start, row) = rows(&self.k);
        math::dots(q, &self.k.data[start..], row, &mut p);
        scale_alibi(&mut p, self.scale, self.slope);
        softmax(&mut p);
        let (start, row) = rows(&self.v);
        math::weighted_sum(&p, &self.v.data[start..], row, out);
    }

    /// Adds the gradients of q, k and v at the operands' own places in `grad`; `dout` has rows as the output.
    ///
    /// # Safety
    /// No other thread may touch those elements.
    unsafe fn backward(&self, dout: &[f32], row: usize, grad: SharedMut) {
        let (mut p, mut dp) = (Vec::new(), Vec::new());
        let dout = Operand { data: dout, offset: self.place, row };
        let (q, k, v, d) = (self.q, self.k, self.v, self.head_dim);
        for block in self.blocks() {
            let Block { first_query, queries, first_key, keys } = block;
            self.probabilities(&block, &mut p);
            dp.clear();
            dp.resize(queries * keys, 0.0);
            let dout = dout.rows(first_query);
            let at = |operand: &Operand, row: usize| operand.offset + row * operand.row;
            // SAFETY: dp is this thread's own; the places in `grad` are the caller's promise.
            unsafe {
                let (dp, dv) = (dp.as_mut_ptr(), grad.at(at(&v, first_key)));
                gemm_into((queries, keys, d), 1.0, dout, v.rows(first_key).t(), dp, keys, false, false);
                gemm_into((keys, d, queries), 1.0, Mat::rows(&p, keys).t(), dout, dv, v.row, true, false);
            }
            for (p, dp) in p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys)) {
                softmax_backward(p, dp, self.scale);
            }
            let ds = Mat::rows(&dp, keys);
            // SAFETY: as above.
            unsafe {
                let (dq, dk) = (grad.at(at(&q, first_query)), grad.at(at(&k, first_key)));
                gemm_into((queries, d, keys), 1.0, ds, k.rows(first_key), dq, q.row, true, false);
                gemm_into((keys, d, queries), 1.0, ds.t(), q.rows(first_query), dk, k.row, true, false);
            }
        }
    }
}

/// Runs `work` on every head; rows of the output, of `len` elements, are `row` apart. A `group` of neighbours, which share
/// keys and values, is one task.
fn for_heads(heads: &[Head], group: usize, (len, row): (usize, usize), work: impl Fn(&Head) + Sync) {
    for head in heads {
        assert!(head.queries <= head.keys, "attention: more queries than keys");
        let end = head.place + head.queries.saturating_sub(1) * row + head.head_dim;
        assert!(head.queries == 0 || end <= len, "attention: output");
    }
    // What is less is over before another thread has seen it.
    if heads.iter().map(|h| h.queries * h.keys * h.head_dim).sum::<usize>() > 1 << 15 {
        team::run(heads.len().div_ceil(group), |i| heads.chunks(group).nth(i).into_iter().flatten().for_each(&work));
    } else {
        heads.iter().for_each(work);
    }
}

impl Attends for Cpu {
    fn rope(&self, rope: &Rope, qkv: [&Tensor; 3], layout: &HeadLayout, run: &Run) -> Result<Tensor> {
        rope::join(rope, qkv, layout, run)
    }

    fn rope_backward(&self, rope: &Rope, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
        rope::split(rope, d, layout, run)
    }

    /// Saves `projected`.
    fn attention(&self, attention: &Attention, projected: &Tensor, run: &mut Run) -> Result<Tensor> {
        run.save(PROJECTED, projected);
        let (layout, width) = (&attention.layout, attention.layout.width());
        let view = F32View::new(projected)?;
        let mut heads = heads(attention, &view, run);
        let mut out = vec![0f32; run.sequences.num_tokens() * width];
        let (size, shared) = ((out.len(), width), SharedMut::new(&mut out));
        // SAFETY: each head of each sequence has its own columns and rows of the output.
        let forward = |head: &Head| unsafe { head.forward(shared, width) };
        match &run.cache {
            None => for_heads(&heads, 1, size, forward),
            Some(cache) => {
                append(cache, run, layout, &view)?;
                let (keys, values) = cache.block(run.block);
                let (keys, values) = (F32View::new(keys)?, F32View::new(values)?);
                let kv_width = layout.kv_width();
                for (i, head) in heads.iter_mut().enumerate() {
                    let (sequence, h) = (i / layout.heads, i % layout.heads);
                    let h = h * layout.kv_heads / layout.heads;
                    let offset = sequence * cache.capacity() * kv_width + h * layout.head_dim;
                    head.keys = cache.lengths()[sequence] + head.queries;
                    head.k = Operand { data: &keys, offset, row: kv_width };
                    head.v = Operand { data: &values, offset, row: kv_width };
                }
                for_heads(&heads, 1, size, forward);
            }
        }
        Ok(Tensor::from_vec(out, (run.sequences.num_tokens(), width), &Device::Cpu)?)
    }

    fn attention_backward(&self, attention: &Attention, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        let projected = run.take(PROJECTED)?;
        let (view, dy) = (F32View::new(&projected)?, F32View::new(dy)?);
        let heads = heads(attention, &view, run);
        let mut grad = vec![0f32; view.len()];
        let (layout, shared) = (&attention.layout, SharedMut::new(&mut grad));
        let width = layout.width();
        // SAFETY: each group has its own keys and values, each head its own queries.
        let backward = |head: &Head| unsafe { head.backward(&dy, width, shared) };
        for_heads(&heads, layout.heads / layout.kv_heads, (dy.len(), width), backward);
        Ok(Tensor::from_vec(grad, projected.dims(), &Device::Cpu)?)
    }
}

/// Writes the keys and values of the new tokens behind those that the cache holds. `projected`: the packed rows of the
/// fused projection.
fn append(cache: &KvCache, run: &Run, layout: &HeadLayout, projected: &[f32]) -> Result<()> {
    let (keys, values) = cache.block(run.block);
    let (width, d) = (layout.kv_width(), layout.head_dim);
    for (tensor, place) in [(keys, layout.k), (values, layout.v)] {
        modify_f32(tensor, |data| {
            for (sequence, range) in run.sequences.ranges().enumerate() {
                for (i, row) in range.enumerate() {
                    let position = cache.lengths()[sequence] + i;
                    let to = &mut data[(sequence * cache.capacity() + position) * width..][..width];
                    for (head, to) in to.chunks_exact_mut(d).enumerate() {
                        let from = row * layout.row + place.at(head);
                        to.copy_from_slice(&projected[from..from + d]);
                    }
                }
            }
        })?;
    }
    Ok(())
}

/// Every head of every sequence, heads innermost.
fn heads<'a>(attention: &Attention, projected: &'a [f32], run: &Run) -> Vec<Head<'a>> {
    let l = &attention.layout;
    let mut heads = Vec::with_capacity(run.sequences.len() * l.heads);
    for range in run.sequences.ranges() {
        for h in 0..l.heads {
            let operand = |place: &Place, h: usize| Operand {
                data: projected,
                offset: range.start * l.row + place.at(h),
                row: l.row,
            };
            let kv = h * l.kv_heads / l.heads;
            heads.push(Head {
                q: operand(&l.q, h),
                k: operand(&l.k, kv),
                v: operand(&l.v, kv),
                queries: range.len(),
                keys: range.len(),
                head_dim: l.head_dim,
                slope: attention.slopes.get(h).copied().unwrap_or(0.0),
                scale: 1.0 / (l.head_dim as f32).sqrt(),
                window: attention.window.unwrap_or(usize::MAX),
                place: (range.start * l.heads + h) * l.head_dim,
            });
        }
    }
    heads
}
