//! Layer and RMS normalization, row by row.

use candle_core::{Device, Tensor};

use super::{
    super::{Norms, operands::Norm, run::Run},
    Cpu, F32View, SharedMut, math, team,
};
use crate::error::Result;

const INPUT: &str = "norm: input";
const STATISTICS: &str = "norm: statistics";

/// Rows a thread takes at a time.
const ROWS: usize = 16;

impl Norms for Cpu {
    /// Saves x and each row's statistics: mean and 1/std, or 1/rms.
    fn norm(&self, norm: &Norm, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (m, c) = x.dims2()?;
        let eps = norm.eps as f32;
        let mut y = vec![0f32; m * c];
        let mut statistics = vec![0f32; m * per_row(norm)];
        {
            let (x, weight) = (F32View::new(x)?, F32View::new(&norm.wide.0)?);
            let bias = norm.wide.1.as_ref().map(F32View::new).transpose()?;
            let (to_y, to_statistics, per) = (SharedMut::new(&mut y), SharedMut::new(&mut statistics), per_row(norm));
            team::ranges(m, ROWS, |rows| {
                // SAFETY: these rows belong to this share.
                let y = unsafe { to_y.slice(rows.start * c..rows.end * c) };
                let statistics = unsafe { to_statistics.slice(rows.start * per..rows.end * per) };
                let rows = x[rows.start * c..rows.end * c].chunks_exact(c).zip(y.chunks_exact_mut(c));
                for ((x, y), statistics) in rows.zip(statistics.chunks_exact_mut(per)) {
                    match &bias {
                        Some(bias) => {
                            let (mean, rstd) = math::layer_norm_row(x, &weight, bias, eps, y);
                            statistics.copy_from_slice(&[mean, rstd]);
                        }
                        None => statistics[0] = math::rms_norm_row(x, &weight, eps, y),
                    }
                }
            });
        }
        if run.saved.is_some() {
            run.save(INPUT, x);
            run.save(STATISTICS, &Tensor::from_vec(statistics, (m, per_row(norm)), &Device::Cpu)?);
        }
        Ok(Tensor::from_vec(y, (m, c), &Device::Cpu)?)
    }

    fn norm_backward(&self, norm: &Norm, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        let (m, c) = dy.dims2()?;
        let (statistics, x) = (run.take(STATISTICS)?, run.take(INPUT)?);
        let mut dx = vec![0f32; m * c];
        let residual = residual.map(F32View::new).transpose()?;
        let (x, statistics, dy) = (F32View::new(&x)?, F32View::new(&statistics)?, F32View::new(dy)?);
        let weight = F32View::new(&norm.wide.0)?;
        let per = per_row(norm);
        team::chunks(&mut dx, ROWS * c, |range, dx| {
            if let Some(residual) = &residual {
                dx.copy_from_slice(&residual[range.clone()]);
            }
            let rows =
                dx.chunks_exact_mut(c).zip(x[range.clone()].chunks_exact(c)).zip(dy[range.clone()].chunks_exact(c));
            for (((dx, x), dy), statistics) in rows.zip(statistics[range.start / c * per..].chunks_exact(per)) {
                match *statistics {
                    [mean, rstd] => math::layer_norm_backward_row(x, &weight, dy, mean, rstd, dx),
                    [inverse] => math::rms_norm_backward_row(x, &weight, dy, inverse, dx),
                    _ => {}
                }
            }
        });
        Ok(Tensor::from_vec(dx, (m, c), &Device::Cpu)?)
    }
}

/// Statistics of a row.
fn per_row(norm: &Norm) -> usize {
    if norm.bias.is_some() { 2 } else { 1 }
}
