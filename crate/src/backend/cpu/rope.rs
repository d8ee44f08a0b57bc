//! Rotary position embedding.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{
    super::{
        operands::{HeadLayout, Rope},
        run::Run,
    },
    F32View, SharedMut, math, team,
};
use crate::error::Result;

/// Rows a thread takes at a time.
const ROWS: usize = 16;

/// q `[M, heads * head_dim]`, k and v `[M, kv_heads * head_dim]` side by side in rows of
/// `layout`, q and k turned to their positions.
pub(super) fn join(rope: &Rope, qkv: [&Tensor; 3], layout: &HeadLayout, run: &Run) -> Result<Tensor> {
    let (positions, table) = positions(rope, run);
    let [q, k, v] = [F32View::new(qkv[0])?, F32View::new(qkv[1])?, F32View::new(qkv[2])?];
    let (wide, narrow) = (layout.width(), layout.kv_width());
    let step = 2 * rope.inv_freq.len();
    let mut out = vec![0f32; positions.len() * layout.row];
    team::chunks(&mut out, ROWS * layout.row, |range, out| {
        for (i, out) in (range.start / layout.row..).zip(out.chunks_exact_mut(layout.row)) {
            let angles = &table[positions[i] * step..][..step];
            let (to_q, rest) = out.split_at_mut(wide);
            let (to_k, to_v) = rest.split_at_mut(narrow);
            math::rotate(&q[i * wide..][..wide], angles, 1.0, to_q);
            math::rotate(&k[i * narrow..][..narrow], angles, 1.0, to_k);
            to_v.copy_from_slice(&v[i * narrow..][..narrow]);
        }
    });
    Ok(Tensor::from_vec(out, (positions.len(), layout.row), &Device::Cpu)?)
}

/// The gradient of what [`join`] gave to those of q, k and v: turned back.
pub(super) fn split(rope: &Rope, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
    let (positions, table) = positions(rope, run);
    let d = F32View::new(d)?;
    let (m, wide, narrow) = (positions.len(), layout.width(), layout.kv_width());
    let step = 2 * rope.inv_freq.len();
    let (mut dq, mut dk, mut dv) = (vec![0f32; m * wide], vec![0f32; m * narrow], vec![0f32; m * narrow]);
    let (to_q, to_k, to_v) = (SharedMut::new(&mut dq), SharedMut::new(&mut dk), SharedMut::new(&mut dv));
    team::ranges(m, ROWS, |rows| {
        for i in rows {
            let (angles, d) = (&table[positions[i] * step..][..step], &d[i * layout.row..][..layout.row]);
            let (own, own_narrow) = (i * wide..(i + 1) * wide, i * narrow..(i + 1) * narrow);
            // SAFETY: these rows belong to this share.
            let (dq, dk, dv) = unsafe { (to_q.slice(own), to_k.slice(own_narrow.clone()), to_v.slice(own_narrow)) };
            // A rotation's transpose is its inverse: the sines change their sign.
            math::rotate(&d[..wide], angles, -1.0, dq);
            math::rotate(&d[wide..wide + narrow], angles, -1.0, dk);
            dv.copy_from_slice(&d[wide + narrow..]);
        }
    });
    let tensor = |data, width| Tensor::from_vec(data, (m, width), &Device::Cpu);
    Ok([tensor(dq, wide)?, tensor(dk, narrow)?, tensor(dv, narrow)?])
}

/// Each packed row's position in its sequence, counted on from what the cache holds.
fn positions(rope: &Rope, run: &Run) -> (Vec<usize>, Arc<[f32]>) {
    let before = |sequence: usize| run.cache.as_ref().map_or(0, |cache| cache.lengths()[sequence]);
    let ranges = run.sequences.ranges().enumerate();
    let positions: Vec<usize> =
        ranges.flat_map(|(s, range)| (0..range.len()).map(move |i| (s, i))).map(|(s, i)| before(s) + i).collect();
    let longest = positions.iter().max().map_or(0, |p| p + 1);
    (positions, rope.table(longest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Tokens, cpu::Cpu, sequences::Sequences};

    /// Rotation keeps lengths, scores depend on the distance alone, and `split` undoes `join`.
    #[test]
    fn what_is_turned_comes_back() -> Result<()> {
        let layout = HeadLayout::grouped(2, 1, 8);
        let rope = Rope::new(Rope::frequencies(100.0, 8));
        let sequences = Sequences::new([3, 4]);
        let run = Run::new(&Cpu, &Tokens { ids: &[0; 7], targets: &[], sequences: &sequences });
        let same = |width: usize| {
            let row: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).sin()).collect();
            Tensor::from_vec(row.repeat(7), (7, width), &Device::Cpu)
        };
        let (q, k, v) = (same(16)?, same(8)?, same(8)?);
        let joined = join(&rope, [&q, &k, &v], &layout, &run)?;
        let rows = joined.to_vec2::<f32>()?;
        let score = |i: usize, j: usize| math::dot(&rows[i][..8], &rows[j][16..24]);
        assert!((score(2, 1) - score(1, 0)).abs() < 1e-5 && (score(6, 4) - score(2, 0)).abs() < 1e-5);
        assert!((score(2, 0) - score(1, 0)).abs() > 1e-3, "positions change nothing");
        for (back, want) in split(&rope, &joined, &layout, &run)?.iter().zip([&q, &k, &v]) {
            let difference = (back - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference < 1e-6, "{difference}");
        }
        Ok(())
    }
}
