//! The floats that weights come in, and rounding to them.

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::Read;
use crate::error::Result;

/// A CPU tensor of `dtype`, which all threads fill: `read` gives its numbers, rounded as they are stored.
pub(crate) fn filled(shape: &[usize], dtype: DType, read: &Read<'_>) -> Result<Tensor> {
    match dtype {
        DType::F16 => filled_with(shape, read, |x, out: &mut [f16]| out.convert_from_f32_slice(x)),
        DType::BF16 => filled_with(shape, read, |x, out: &mut [bf16]| out.convert_from_f32_slice(x)),
        _ => filled_with(shape, read, |x, out: &mut [f32]| out.copy_from_slice(x)),
    }
}

fn filled_with<T: WithDType>(
    shape: &[usize],
    read: &Read<'_>,
    round: impl Fn(&[f32], &mut [T]) + Sync,
) -> Result<Tensor> {
    // Whole blocks a task, and enough of them to be worth one; a buffer that stays in the cache.
    const TASK: usize = 1 << 16;
    const BUFFER: usize = 1 << 14;
    let mut out = vec![T::zero(); shape.iter().product()];
    let tasks = out.par_chunks_mut(TASK).enumerate().map(|(task, out)| -> Result<()> {
        let mut buffer = [0f32; BUFFER];
        out.chunks_mut(BUFFER).enumerate().try_for_each(|(i, out)| {
            let x = &mut buffer[..out.len()];
            read(task * TASK + i * BUFFER, x)?;
            round(x, out);
            Ok(())
        })
    });
    tasks.find_map_first(Result::err).map_or(Ok(()), Err)?;
    Ok(Tensor::from_vec(out, shape, &Device::Cpu)?)
}

/// [`round_to`] of all.
pub(crate) fn round_all(dtype: DType, x: &mut [f32]) {
    fn through<T: Copy>(zero: T, x: &mut [f32])
    where
        [T]: HalfFloatSliceExt,
    {
        let mut narrow = [zero; 1024];
        for x in x.chunks_mut(1024) {
            let narrow = &mut narrow[..x.len()];
            narrow.convert_from_f32_slice(x);
            narrow.convert_to_f32_slice(x);
        }
    }
    match dtype {
        DType::F16 => through(f16::ZERO, x),
        DType::BF16 => through(bf16::ZERO, x),
        _ => {}
    }
}

/// Rounds to the nearest value of `dtype`, ties to even.
#[inline(always)]
pub(crate) fn round_to(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}
