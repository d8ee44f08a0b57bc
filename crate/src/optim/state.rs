//! Optimizers that update each element by itself ([`Elementwise`]): their states in 32 or in 8 bits, and a step on the
//! CPU; other devices have kernels for it (see [`States`]).

use std::{array::from_fn, slice::ChunksMut};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{At, Elementwise, Optim, Rule, Slices, kernel::run};
use crate::{
    backend::{
        self,
        cpu::simd,
        optimizer::{Argument, Part, States, Step},
        param::{Param, modify_f32, read_f32},
    },
    error::Result,
    quantized::NESTED_BLOCKSIZE as BLOCK,
};

/// bitsandbytes keeps 32-bit states for tensors smaller than this.
const MIN_8BIT_SIZE: usize = 4096;

/// Fewer elements than this in all parameters together, and threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 16;

/// Elements worth a task of their own; a multiple of every block.
const TASK: usize = 1 << 15;

/// An optimizer of this kind: `by_element::<Step, 2>` for a step with two moments.
pub(super) fn by_element<S: Elementwise<N>, const N: usize>(optim: Optim) -> Box<dyn Rule> {
    Box::new(ByElement::<S, N> { optim, new: S::new, states: Vec::new(), on_device: None })
}

struct ByElement<S, const N: usize> {
    optim: Optim,
    new: fn(Optim, &At, bool) -> S,
    /// Those that the loop below works on.
    states: Vec<State<N>>,
    /// Those of a device whose kernels make the steps.
    on_device: Option<Box<dyn States>>,
}

/// The moments of one parameter.
struct State<const N: usize> {
    /// 8-bit codes; empty for moments in 32 bits.
    codes: [Vec<u8>; N],
    /// The moments, or the maxima of their blocks of 256.
    numbers: [Vec<f32>; N],
}

impl<S: Elementwise<N>, const N: usize> Rule for ByElement<S, N> {
    fn parts(&self, param: &Param) -> Vec<Part> {
        let (dims, n) = (param.value().dims(), param.value().elem_count());
        if !self.optim.is_8bit() || n < MIN_8BIT_SIZE {
            return S::MOMENTS.map(|moment| Part::new(moment.name, DType::F32, dims)).into();
        }
        let codes = (1..=N).map(|k| Part::new(format!("state{k}"), DType::U8, dims));
        codes.chain((1..=N).map(|k| Part::new(format!("absmax{k}"), DType::F32, &[n.div_ceil(BLOCK)]))).collect()
    }

    fn set(&mut self, params: &[Param], states: Vec<Vec<Tensor>>) -> Result<()> {
        if self.states.is_empty() && self.on_device.is_none() {
            let parts = params.iter().map(|p| self.parts(p)).collect();
            let device = backend::of(params[0].value().device())?;
            self.on_device = device.optimizer_states(params, parts, N, self.optim.is_paged())?;
        }
        if let Some(states_there) = &self.on_device {
            return states_there.replace(&states);
        }
        self.states = states.iter().map(|parts| State::of(parts)).collect::<Result<_>>()?;
        Ok(())
    }

    fn copies(&self) -> Result<Vec<Vec<Tensor>>> {
        if let Some(states) = &self.on_device {
            return states.copies();
        }
        self.states.iter().map(State::copies).collect()
    }

    fn step(&mut self, params: &[Param], at: &At) -> Result<()> {
        let steps = [false, true].map(|is_8bit| (self.new)(self.optim, at, is_8bit));
        if let Some(states) = &self.on_device {
            let maps = S::MOMENTS.map(|moment| [moment.map().value, moment.map().above].concat()).concat();
            return states.step(&Step { kernel: S::KERNEL, arguments: steps.each_ref().map(Argument::new), maps });
        }
        let one = |(param, state): (&Param, &mut State<N>)| {
            read_f32(param.grad(), |g| modify_f32(param.value(), |p| state.step(&steps, p, g)))?
        };
        if params.iter().map(|p| p.value().elem_count()).sum::<usize>() < PARALLEL_FROM {
            params.iter().zip(&mut self.states).try_for_each(one)
        } else {
            params.par_iter().zip(&mut self.states).try_for_each(one)
        }
    }

    fn on_device(&self) -> Option<&dyn States> {
        self.on_device.as_deref()
    }
}

impl<const N: usize> State<N> {
    /// Of its parts, in their order. The numbers are written, not only promised by the system: what a run needs is there
    /// before its first step, and whoever measures the process finds it.
    fn of(parts: &[Tensor]) -> Result<Self> {
        let (codes, numbers) = parts.split_at(parts.len() - N);
        let mut state = Self { codes: from_fn(|_| Vec::new()), numbers: from_fn(|_| Vec::new()) };
        for (to, part) in state.codes.iter_mut().zip(codes) {
            *to = part.flatten_all()?.to_vec1()?;
        }
        for (to, part) in state.numbers.iter_mut().zip(numbers) {
            *to = part.flatten_all()?.to_vec1()?;
        }
        Ok(state)
    }

    fn copies(&self) -> Result<Vec<Tensor>> {
        let codes = self.codes.iter().filter(|c| !c.is_empty()).map(|c| Tensor::new(&c[..], &Device::Cpu));
        let numbers = self.numbers.iter().map(|n| Tensor::new(&n[..], &Device::Cpu));
        Ok(codes.chain(numbers).collect::<candle_core::Result<_>>()?)
    }

    /// A step of the weights `p` with the gradients `g`: the first of `steps`, or for 8-bit moments the second.
    fn step<S: Elementwise<N>>(&mut self, [full, quantized]: &[S; 2], p: &mut [f32], g: &[f32]) {
        let is_8bit = self.codes.iter().any(|codes| !codes.is_empty());
        let mut codes = self.codes.each_mut().map(|codes| codes.chunks_mut(TASK));
        let mut numbers = self.numbers.each_mut().map(|n| n.chunks_mut(if is_8bit { TASK / BLOCK } else { TASK }));
        let tasks = p.chunks_mut(TASK).zip(g.chunks(TASK)).map(|(p, g)| (p, g, next(&mut codes), next(&mut numbers)));
        tasks.collect::<Vec<_>>().into_par_iter().for_each(|(p, g, codes, numbers)| match is_8bit {
            false => run(simd::level(), full, Slices { p, g, moments: numbers }),
            true => step_8bit(quantized, Slices { p, g, moments: numbers }, codes),
        });
    }
}

/// Block by block: from 8 bits, one step in f32, back to 8 bits. What stands for the moments are their maxima.
fn step_8bit<S: Elementwise<N>, const N: usize>(step: &S, slices: Slices<'_, N>, codes: [&mut [u8]; N]) {
    let Slices { p, g, moments: absmax } = slices;
    let maps = S::MOMENTS.map(|moment| moment.map());
    let mut codes = codes.map(|codes| codes.chunks_mut(BLOCK));
    for (block, (p, g)) in p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).enumerate() {
        let (codes, mut moments) = (next(&mut codes), [[0f32; BLOCK]; N]);
        let mut moments = moments.each_mut().map(|m| &mut m[..p.len()]);
        for k in 0..N {
            maps[k].decode_block(codes[k], absmax[k][block], moments[k]);
        }
        run(simd::level(), step, Slices { p, g, moments: moments.each_mut().map(|m| &mut m[..]) });
        for k in 0..N {
            absmax[k][block] = maps[k].encode_block(moments[k], codes[k]);
        }
    }
}

/// The next piece of each; an empty one where there is none.
fn next<'a, T, const N: usize>(pieces: &mut [ChunksMut<'a, T>; N]) -> [&'a mut [T]; N] {
    pieces.each_mut().map(|pieces| pieces.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::{Hyperparameters, adamw, lion};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// Two steps of `n` elements, at once or block by block.
    fn two_steps<S: Elementwise<N>, const N: usize>(optim: Optim, n: usize, by_block: bool) -> Vec<u32> {
        let is_8bit = optim.is_8bit();
        let size = if by_block { BLOCK } else { n };
        let mut p = numbers(n, 1);
        let mut states: Vec<State<N>> = p
            .chunks(size)
            .map(|p| State {
                codes: from_fn(|_| vec![0; if is_8bit { p.len() } else { 0 }]),
                numbers: from_fn(|_| vec![0.0; if is_8bit { p.len().div_ceil(BLOCK) } else { p.len() }]),
            })
            .collect();
        for t in 1..3 {
            let (g, at) = (
                numbers(n, 1 + t),
                At { hyperparameters: Hyperparameters::default(), t: t as u64, lr: 1e-2, grad_scale: 0.5 },
            );
            let steps = [false, true].map(|is_8bit| S::new(optim, &at, is_8bit));
            let pieces = p.chunks_mut(size).zip(g.chunks(size)).zip(&mut states);
            pieces.for_each(|((p, g), state)| state.step(&steps, p, g));
        }
        let codes = (0..N).flat_map(|k| states.iter().flat_map(move |s| s.codes[k].iter().map(|c| u32::from(*c))));
        let numbers = (0..N).flat_map(|k| states.iter().flat_map(move |s| s.numbers[k].iter().map(|v| v.to_bits())));
        p.iter().map(|v| v.to_bits()).chain(codes).chain(numbers).collect()
    }

    #[test]
    fn tasks_change_nothing() {
        for n in [TASK + 1, 3 * TASK + 77, 5 * TASK] {
            for optim in [Optim::AdamWTorch, Optim::AdamW8bit] {
                let [tasks, blocks] = [false, true].map(|by_block| two_steps::<adamw::Step, 2>(optim, n, by_block));
                assert!(tasks == blocks, "{optim}, {n} elements");
            }
            for optim in [Optim::Lion32bit, Optim::Lion8bit] {
                let [tasks, blocks] = [false, true].map(|by_block| two_steps::<lion::Step, 1>(optim, n, by_block));
                assert!(tasks == blocks, "{optim}, {n} elements");
            }
        }
    }
}
