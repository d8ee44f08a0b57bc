//! Adafactor as transformers' Trainer makes it for `optim="adafactor"`: `transformers.optimization.Adafactor` with
//! `scale_parameter=False, relative_step=False` and its other defaults (Shazeer and Stern, arXiv:1804.04235).
//!
//! ```text
//! b = 1 - t**-0.8, u = g * g + 1e-30
//! matrix: row = b * row + (1 - b) * mean(u, -1), col = b * col + (1 - b) * mean(u, -2)
//!         update = g * rsqrt(row / mean(row)) * rsqrt(col)
//! vector: v = b * v + (1 - b) * u, update = g * rsqrt(v)
//! update /= max(1, rms(update))
//! p -= lr * weight_decay * p
//! p -= lr * update
//! ```
//!
//! States and weights are within 1e-6 (relative) of the reference's: means are taken in f64, so that they do not depend
//! on the order of a sum, and are the same on the CPU and on a GPU.

use candle_core::{D, DType, Tensor};

use super::{At, Part};
use crate::error::Result;

/// Keeps the square of a gradient of 0 from being 0.
const EPS: f64 = 1e-30;

/// The average of step `t` forgets as `t` to the power of this.
const DECAY_RATE: f64 = -0.8;

/// An update's root mean square is at most this.
const CLIP_THRESHOLD: f64 = 1.0;

pub(super) fn parts(dims: &[usize]) -> Vec<Part> {
    match dims {
        [outer @ .., rows, columns] => vec![
            Part::new("exp_avg_sq_row", DType::F32, &[outer, &[*rows]].concat()),
            Part::new("exp_avg_sq_col", DType::F32, &[outer, &[*columns]].concat()),
        ],
        _ => vec![Part::new("exp_avg_sq", DType::F32, dims)],
    }
}

pub(super) fn step(at: &At, p: &Tensor, g: &Tensor, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
    let beta = 1.0 - (at.t as f64).powf(DECAY_RATE);
    let average = |old: &Tensor, new: &Tensor| (old * beta)? + (new * (1.0 - beta))?;
    let squares = (g.sqr()? + EPS)?; // (.., rows, columns)
    let (factor, state) = match state {
        [row, col] => {
            let row = average(row, &mean(&squares, D::Minus1)?)?; // (.., rows)
            let col = average(col, &mean(&squares, D::Minus2)?)?; // (.., columns)
            let of_rows = row.broadcast_div(&mean(&row, D::Minus1)?.unsqueeze(D::Minus1)?)?;
            let of_rows = rsqrt(&of_rows)?.unsqueeze(D::Minus1)?; // (.., rows, 1)
            let of_columns = rsqrt(&col.unsqueeze(D::Minus2)?)?; // (.., 1, columns)
            (of_rows.broadcast_mul(&of_columns)?, vec![row, col])
        }
        state => {
            let state = state.iter().map(|old| average(old, &squares)).collect::<candle_core::Result<Vec<_>>>()?;
            (rsqrt(&state[0])?, state)
        }
    };
    let update = (factor * g)?;
    let rms = update.to_dtype(DType::F64)?.sqr()?.mean_all()?.sqrt()?;
    let shrink = (rms / CLIP_THRESHOLD)?.maximum(1.0)?.to_dtype(DType::F32)?;
    let update = (update.broadcast_div(&shrink)? * at.lr)?;
    let decayed = (p + (p * (-at.hyperparameters.weight_decay * at.lr))?)?;
    Ok(((decayed - update)?, state))
}

fn mean(x: &Tensor, dim: D) -> candle_core::Result<Tensor> {
    x.to_dtype(DType::F64)?.mean(dim)?.to_dtype(x.dtype())
}

fn rsqrt(x: &Tensor) -> candle_core::Result<Tensor> {
    x.sqrt()?.recip()
}
