//! Rotary position embedding (RoPE, arXiv:2104.09864): pairs of elements of a query or key are
//! turned by an angle that grows with the position, so that a score depends on the distance.
//!
//! As in transformers, element i is paired with element i + head_dim / 2.

use std::sync::{Arc, RwLock};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{
    attention::HeadLayout,
    cpu::{F32View, math},
    only_cpu,
    run::Run,
};
use crate::error::Result;

/// Rows a thread takes at a time.
const ROWS: usize = 64;

/// Angles by position. Cloning shares the table, which grows as longer texts come.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Radians a position, for each of the head_dim / 2 pairs.
    inv_freq: Arc<[f32]>,
    /// For each position head_dim / 2 cosines, then as many sines.
    table: Arc<RwLock<Arc<[f32]>>>,
}

impl Rope {
    pub fn new(inv_freq: Vec<f32>) -> Self {
        Self { inv_freq: inv_freq.into(), table: Arc::default() }
    }

    /// The frequencies of the plain form: `theta^(-2i / head_dim)`, rounded as PyTorch rounds them.
    ///
    /// ```
    /// let f = qlora_nb::layers::rope::Rope::frequencies(10_000.0, 4);
    /// assert_eq!(f, [1.0, 0.01]);
    /// ```
    pub fn frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
        let power = |i: usize| theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32;
        (0..head_dim / 2).map(|i| 1.0 / power(i)).collect()
    }

    /// Cosines and sines of the positions 0 .. `positions` at least: for each position
    /// head_dim / 2 cosines, then as many sines.
    pub fn table(&self, positions: usize) -> Arc<[f32]> {
        let needed = positions * 2 * self.inv_freq.len();
        let held = self.table.read().unwrap_or_else(|e| e.into_inner()).clone();
        if held.len() >= needed {
            return held;
        }
        let mut table = Vec::with_capacity(positions.next_power_of_two() * 2 * self.inv_freq.len());
        for position in 0..positions.next_power_of_two() {
            let angles = || self.inv_freq.iter().map(|f| position as f32 * f);
            table.extend(angles().map(f32::cos));
            table.extend(angles().map(f32::sin));
        }
        let table: Arc<[f32]> = table.into();
        *self.table.write().unwrap_or_else(|e| e.into_inner()) = table.clone();
        table
    }

    /// q `[M, heads * head_dim]`, k and v `[M, kv_heads * head_dim]` side by side in rows of
    /// `layout`, q and k turned to their positions; saves nothing.
    pub fn join(&self, q: &Tensor, k: &Tensor, v: &Tensor, layout: &HeadLayout, run: &Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            return super::cuda::rope_join(&self.inv_freq, q, k, v, layout, run);
        }
        only_cpu("rope", q.device())?;
        let (positions, table) = self.positions(run);
        let (q, k, v) = (F32View::new(q)?, F32View::new(k)?, F32View::new(v)?);
        let (wide, narrow) = (layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let step = 2 * self.inv_freq.len();
        let mut out = vec![0f32; positions.len() * layout.row];
        let turn = |chunk: usize, out: &mut [f32]| {
            for (i, out) in out.chunks_exact_mut(layout.row).enumerate() {
                let i = chunk * ROWS + i;
                let angles = &table[positions[i] * step..][..step];
                let (to_q, rest) = out.split_at_mut(wide);
                let (to_k, to_v) = rest.split_at_mut(narrow);
                math::rotate(&q[i * wide..][..wide], angles, 1.0, to_q);
                math::rotate(&k[i * narrow..][..narrow], angles, 1.0, to_k);
                to_v.copy_from_slice(&v[i * narrow..][..narrow]);
            }
        };
        out.par_chunks_mut(ROWS * layout.row).enumerate().for_each(|(chunk, out)| turn(chunk, out));
        Ok(Tensor::from_vec(out, (positions.len(), layout.row), &Device::Cpu)?)
    }

    /// The gradient of what [`Rope::join`] gave to those of q, k and v: turned back.
    pub fn split(&self, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
        #[cfg(feature = "cuda")]
        if d.device().is_cuda() {
            return super::cuda::rope_split(&self.inv_freq, d, layout, run);
        }
        let (positions, table) = self.positions(run);
        let d = F32View::new(d)?;
        let (m, wide, narrow) = (positions.len(), layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim);
        let step = 2 * self.inv_freq.len();
        let (mut dq, mut dk, mut dv) = (vec![0f32; m * wide], vec![0f32; m * narrow], vec![0f32; m * narrow]);
        let rows = dq.par_chunks_exact_mut(wide).zip(dk.par_chunks_exact_mut(narrow));
        let rows = rows.zip(dv.par_chunks_exact_mut(narrow)).zip(d.par_chunks_exact(layout.row)).zip(&positions);
        rows.with_min_len(ROWS).for_each(|((((dq, dk), dv), d), position)| {
            let angles = &table[position * step..][..step];
            // A rotation's transpose is its inverse: the sines change their sign.
            math::rotate(&d[..wide], angles, -1.0, dq);
            math::rotate(&d[wide..wide + narrow], angles, -1.0, dk);
            dv.copy_from_slice(&d[wide + narrow..]);
        });
        let tensor = |data, width| Tensor::from_vec(data, (m, width), &Device::Cpu);
        Ok([tensor(dq, wide)?, tensor(dk, narrow)?, tensor(dv, narrow)?])
    }

    /// Each packed row's position in its sequence, counted on from what the cache holds.
    fn positions(&self, run: &Run) -> (Vec<usize>, Arc<[f32]>) {
        let before = |sequence: usize| run.cache.as_ref().map_or(0, |cache| cache.lengths()[sequence]);
        let ranges = run.sequences.ranges().enumerate();
        let positions: Vec<usize> =
            ranges.flat_map(|(s, range)| (0..range.len()).map(move |i| (s, i))).map(|(s, i)| before(s) + i).collect();
        let longest = positions.iter().max().map_or(0, |p| p + 1);
        (positions, self.table(longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::sequences::Sequences;

    /// Rotation keeps lengths, scores depend on the distance alone, and `split` undoes `join`.
    #[test]
    fn what_is_turned_comes_back() -> Result<()> {
        let layout = HeadLayout::grouped(2, 1, 8);
        let rope = Rope::new(Rope::frequencies(100.0, 8));
        let sequences = Sequences::new([3, 4]);
        let run = Run::inference(&sequences);
        let same = |width: usize| {
            let row: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).sin()).collect();
            Tensor::from_vec(row.repeat(7), (7, width), &Device::Cpu)
        };
        let (q, k, v) = (same(16)?, same(8)?, same(8)?);
        let joined = rope.join(&q, &k, &v, &layout, &run)?;
        let rows = joined.to_vec2::<f32>()?;
        let score = |i: usize, j: usize| math::dot(&rows[i][..8], &rows[j][16..24]);
        assert!((score(2, 1) - score(1, 0)).abs() < 1e-5 && (score(6, 4) - score(2, 0)).abs() < 1e-5);
        assert!((score(2, 0) - score(1, 0)).abs() > 1e-3, "positions change nothing");
        for (back, want) in rope.split(&joined, &layout, &run)?.iter().zip([&q, &k, &v]) {
            let difference = (back - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference < 1e-6, "{difference}");
        }
        Ok(())
    }
}
