//! Optimizers written with candle's operations on whole tensors, on any device: for those that need no speed.

use candle_core::{Device, Tensor};

use super::{At, Optim, Rule};
use crate::{
    backend::{optimizer::Part, param::Param},
    error::Result,
};

/// The parts of the state of a parameter of that shape.
type Parts = fn(&[usize]) -> Vec<Part>;

/// The new weights and state, from the weights, the gradients, scaled, and the state.
type Step = fn(&At, &Tensor, &Tensor, &[Tensor]) -> Result<(Tensor, Vec<Tensor>)>;

/// An optimizer of this kind.
pub(super) fn by_tensor(parts: Parts, step: Step) -> impl Fn(Optim) -> Box<dyn Rule> {
    move |_| Box::new(ByTensor { parts, step, states: Vec::new() })
}

struct ByTensor {
    parts: Parts,
    step: Step,
    /// Where the parameters are. These tensors are never changed in place, so they may be shared.
    states: Vec<Vec<Tensor>>,
}

impl Rule for ByTensor {
    fn parts(&self, param: &Param) -> Vec<Part> {
        (self.parts)(param.value().dims())
    }

    fn set(&mut self, params: &[Param], states: Vec<Vec<Tensor>>) -> Result<()> {
        self.states = on(params[0].value().device(), &states)?;
        Ok(())
    }

    fn copies(&self) -> Result<Vec<Vec<Tensor>>> {
        on(&Device::Cpu, &self.states)
    }

    /// All is computed before anything changes: a GPU without room for it leaves the parameters as they are.
    fn step(&mut self, params: &[Param], at: &At) -> Result<()> {
        let one = |(param, state): (&Param, &Vec<Tensor>)| {
            let g = (param.grad() * f64::from(at.grad_scale))?;
            (self.step)(at, param.value(), &g, state)
        };
        let new = params.iter().zip(&self.states).map(one).collect::<Result<Vec<_>>>()?;
        for ((param, state), (value, new)) in params.iter().zip(&mut self.states).zip(new) {
            param.value().flatten_all()?.slice_set(&value.flatten_all()?, 0, 0)?;
            *state = new;
        }
        Ok(())
    }
}

fn on(device: &Device, states: &[Vec<Tensor>]) -> Result<Vec<Vec<Tensor>>> {
    let state = |state: &Vec<Tensor>| state.iter().map(|part| Ok(part.to_device(device)?)).collect();
    states.iter().map(state).collect()
}
