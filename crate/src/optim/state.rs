//! The moments of one parameter, in 32 or in 8 bits, and their names in a checkpoint; on the CPU (for a GPU, see
//! `cuda`).

use std::{marker::PhantomData, sync::Mutex};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use rayon::prelude::*;

use super::kernel::Step;
use crate::{
    backend::{cpu::simd, param::Param},
    error::Result,
    quantized::{DynamicMap, NESTED_BLOCKSIZE},
};

/// bitsandbytes keeps 32-bit states for tensors smaller than this.
const MIN_8BIT_SIZE: usize = 4096;

/// Tensors on the CPU, changed in place.
pub(crate) enum State {
    Full {
        /// First moment, f32.
        exp_avg: Tensor,
        /// Second moment, f32.
        exp_avg_sq: Tensor,
    },
    /// Codes (uint8) of the moments, and their maxima (f32) over blocks of 256.
    Quantized { state1: Tensor, state2: Tensor, absmax1: Tensor, absmax2: Tensor },
}

/// What a part of a state is.
pub(crate) struct Form {
    /// Behind the parameter's name in a checkpoint.
    pub name: &'static str,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl Form {
    pub fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }
}

/// The parts of a parameter's state: two moments, or their codes and maxima.
pub(crate) fn forms(param: &Param, is_8bit: bool) -> Vec<Form> {
    let value = param.value();
    let n = value.elem_count();
    let form = |name, dtype, shape: &[usize]| Form { name, dtype, shape: shape.to_vec() };
    let dims = value.dims();
    if !is_8bit || n < MIN_8BIT_SIZE {
        return vec![form("exp_avg", DType::F32, dims), form("exp_avg_sq", DType::F32, dims)];
    }
    let maxima = &[n.div_ceil(NESTED_BLOCKSIZE)];
    vec![
        form("state1", DType::U8, dims),
        form("state2", DType::U8, dims),
        form("absmax1", DType::F32, maxima),
        form("absmax2", DType::F32, maxima),
    ]
}

impl State {
    /// Zeros that are written, not only promised by the system: what a run needs is there before its first step, and
    /// whoever measures the process finds it.
    pub fn zeros(forms: &[Form]) -> Result<Self> {
        let zeros = forms.iter().map(|f| Tensor::zeros(f.shape.as_slice(), f.dtype, &Device::Cpu));
        let zeros = zeros.collect::<candle_core::Result<Vec<_>>>()?;
        for tensor in &zeros {
            match tensor.dtype() {
                DType::U8 => modify::<u8, _>(tensor, |codes| codes.fill(0))?,
                _ => modify::<f32, _>(tensor, |numbers| numbers.fill(0.0))?,
            }
        }
        Self::of(zeros)
    }

    /// Of tensors of a parameter's forms.
    pub fn of(parts: Vec<Tensor>) -> Result<Self> {
        match <[Tensor; 2]>::try_from(parts) {
            Ok([exp_avg, exp_avg_sq]) => Ok(Self::Full { exp_avg, exp_avg_sq }),
            Err(parts) => match <[Tensor; 4]>::try_from(parts) {
                Ok([state1, state2, absmax1, absmax2]) => Ok(Self::Quantized { state1, state2, absmax1, absmax2 }),
                Err(parts) => {
                    let what = format!("optimizer state: {} parts", parts.len());
                    Err(candle_core::Error::Msg(what).bt().into())
                }
            },
        }
    }

    /// The parts, in the order of the forms.
    pub fn parts(&self) -> Vec<&Tensor> {
        match self {
            Self::Full { exp_avg, exp_avg_sq } => vec![exp_avg, exp_avg_sq],
            Self::Quantized { state1, state2, absmax1, absmax2 } => vec![state1, state2, absmax1, absmax2],
        }
    }

    /// One step of the weights `p` with the gradients `g`.
    pub fn step(&self, step: &Step, p: &mut [f32], g: &[f32]) -> Result<()> {
        match self {
            Self::Full { exp_avg, exp_avg_sq } => {
                modify(exp_avg, |m| modify(exp_avg_sq, |v| step_full(step, p, g, m, v)))?
            }
            Self::Quantized { state1, state2, absmax1, absmax2 } => modify(state1, |q1| {
                modify(state2, |q2| {
                    modify(absmax1, |a1| modify(absmax2, |a2| step_quantized(step, p, g, [q1, q2], [a1, a2])))
                })
            })???,
        }
    }
}

/// Elements worth a task of their own; a multiple of every block.
const TASK: usize = 1 << 15;

fn step_full(step: &Step, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let level = simd::level();
    if p.len() <= TASK {
        return step.run(level, p, g, m, v);
    }
    let moments = m.par_chunks_mut(TASK).zip(v.par_chunks_mut(TASK));
    let tasks = p.par_chunks_mut(TASK).zip(g.par_chunks(TASK)).zip(moments);
    tasks.for_each(|((p, g), (m, v))| step.run(level, p, g, m, v));
}

/// Block by block: from 8 bits, one step in f32, back to 8 bits.
fn step_quantized(step: &Step, p: &mut [f32], g: &[f32], [q1, q2]: [&mut [u8]; 2], [a1, a2]: [&mut [f32]; 2]) {
    const BLOCK: usize = NESTED_BLOCKSIZE;
    let level = simd::level();
    let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
    let codes = q1.par_chunks_mut(BLOCK).zip(q2.par_chunks_mut(BLOCK));
    let blocks = p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).zip(codes).zip(a1.par_iter_mut().zip(a2));
    blocks.with_min_len(TASK / BLOCK).for_each(|(((p, g), (q1, q2)), (a1, a2))| {
        let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
        let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
        signed.decode_block(q1, *a1, m);
        unsigned.decode_block(q2, *a2, v);
        step.run(level, p, g, m, v);
        *a1 = signed.encode_block(m, q1);
        *a2 = unsigned.encode_block(v, q2);
    });
}

/// An element type that states are stored in.
trait Stored: Sized {
    fn of(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
}

impl Stored for f32 {
    fn of(storage: &mut CpuStorage) -> Option<&mut Vec<f32>> {
        if let CpuStorage::F32(data) = storage { Some(data) } else { None }
    }
}

impl Stored for u8 {
    fn of(storage: &mut CpuStorage) -> Option<&mut Vec<u8>> {
        if let CpuStorage::U8(data) = storage { Some(data) } else { None }
    }
}

/// Runs `f` on the elements of a contiguous CPU tensor, in place.
fn modify<T: Stored, R>(tensor: &Tensor, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    struct Op<T, F, R>(Mutex<(Option<F>, Option<R>)>, PhantomData<fn(T)>);
    impl<T: Stored, R, F: FnOnce(&mut [T]) -> R> InplaceOp1 for Op<T, F, R> {
        fn name(&self) -> &'static str {
            "optimizer state"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (Some(data), Some((start, end))) = (T::of(storage), layout.contiguous_offsets()) else {
                candle_core::bail!("optimizer state: not a contiguous tensor of its type");
            };
            if let Ok(mut slot) = self.0.lock() {
                slot.1 = slot.0.take().map(|f| f(&mut data[start..end]));
            }
            Ok(())
        }
    }
    let op = Op(Mutex::new((Some(f), None)), PhantomData);
    tensor.inplace_op1(&op)?;
    let done = op.0.into_inner().ok().and_then(|slot| slot.1);
    done.ok_or_else(|| candle_core::Error::Msg("optimizer state: the update did not run".into()).bt().into())
}
