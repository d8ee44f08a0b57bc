//! The optimizer: one state a parameter, one step for all of them.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    Optim,
    kernel::{Rule, Step},
    state::State,
};
use crate::{
    error::{Error, Result},
    layers::param::{Param, modify_f32, read_f32},
};

/// Fewer elements than this in all parameters together, and threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 16;

/// AdamW over a list of parameters, which it changes in place.
pub struct AdamW {
    optim: Optim,
    params: Vec<Param>,
    states: Vec<State>,
    /// Steps done.
    step: u64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
}

impl AdamW {
    /// `betas` in [0, 1), `eps` and `weight_decay` at least 0. The decay is decoupled
    /// (`p *= 1 - lr * weight_decay`) and comes before the update. Fails for a value outside its
    /// domain, for no parameters, and for two of one name.
    pub fn new(optim: Optim, params: &[Param], betas: (f64, f64), eps: f64, weight_decay: f64) -> Result<Self> {
        for (name, beta) in [("adam_beta1", betas.0), ("adam_beta2", betas.1)] {
            domain(
                name,
                beta,
                (0.0..1.0).contains(&beta),
                "a number from 0 up to, not including, 1",
                "use 0.9 and 0.999",
            )?;
        }
        domain("adam_epsilon", eps, eps >= 0.0 && eps.is_finite(), "a number of at least 0", "use 1e-8")?;
        let decay_ok = weight_decay >= 0.0 && weight_decay.is_finite();
        domain("weight_decay", weight_decay, decay_ok, "a number of at least 0", "use 0, or 0.01 to 0.1")?;
        if params.is_empty() {
            let remedy = "call get_peft_model first: the base model's weights are frozen";
            return Err(Error::argument("parameters of the optimizer", "none", "at least one", remedy));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = params.iter().find(|p| !names.insert(p.name())) {
            let remedy = "pass each parameter once: it would be stepped twice";
            return Err(Error::argument("parameters of the optimizer", twice.name(), "different names", remedy));
        }
        if let Some(p) = params.iter().find(|p| !p.value().device().is_cpu()) {
            return Err(Error::Unsupported {
                what: format!("device of {}", p.name()),
                got: "GPU".into(),
                supported: vec!["cpu".into()],
                remedy: "load the model with DeviceMap::Cpu".into(),
            });
        }
        let states = params.iter().map(|p| State::new(p, optim.is_8bit())).collect::<Result<_>>()?;
        Ok(Self { optim, params: params.to_vec(), states, step: 0, betas, eps, weight_decay })
    }

    /// One step with learning rate `lr`. The gradients are multiplied by `grad_scale` (see
    /// `clip_grad_norm`) as they are read, and stay as they are.
    pub fn step(&mut self, lr: f64, grad_scale: f32) -> Result<()> {
        domain(
            "learning_rate",
            lr,
            lr >= 0.0 && lr.is_finite(),
            "a number of at least 0",
            "use 1e-4 to 1e-3 for LoRA",
        )?;
        self.step += 1;
        let rule = |state: &State| match (self.optim, state) {
            (Optim::AdamWTorch, _) => Rule::Torch,
            (_, State::Full { .. }) => Rule::Bnb32,
            (_, State::Quantized { .. }) => Rule::Bnb8,
        };
        let one = |(p, state): (&Param, &State)| -> Result<()> {
            let step = Step::new(rule(state), lr, self.betas, self.eps, self.weight_decay, self.step, grad_scale);
            read_f32(p.grad(), |g| {
                let mut done = Ok(());
                modify_f32(p.value(), |p| done = state.step(&step, p, g))?;
                done
            })?
        };
        if self.params.iter().map(|p| p.value().elem_count()).sum::<usize>() < PARALLEL_FROM {
            self.params.iter().zip(&self.states).try_for_each(one)
        } else {
            self.params.par_iter().zip(&self.states).try_for_each(one)
        }
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Bytes of the state.
    pub fn num_bytes(&self) -> usize {
        let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.states.iter().flat_map(State::parts).map(|(_, t)| bytes(t)).sum()
    }

    /// Copies of the state under checkpoint names: `step` (i64, one element), and for each parameter
    /// `<name>.exp_avg` and `<name>.exp_avg_sq`, or for an 8-bit state `<name>.state1`,
    /// `.state2` (uint8), `.absmax1` and `.absmax2`.
    pub fn state_dict(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::from([("step".to_string(), Tensor::new(&[self.step as i64], &Device::Cpu)?)]);
        for (p, state) in self.params.iter().zip(&self.states) {
            for (part, tensor) in state.parts() {
                tensors.insert(format!("{}.{part}", p.name()), tensor.copy()?);
            }
        }
        Ok(tensors)
    }

    /// Puts a state from `state_dict` back, bit for bit. Nothing changes when it fails: with
    /// `Error::KeyMismatch` for a state of other parameters or of another kind of optimizer,
    /// with `Error::Shape` or `Error::InvalidArgument` for tensors of another form.
    pub fn load_state_dict(&mut self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let known = |p: &Param, state: &State| -> Vec<String> {
            state.parts().iter().map(|(part, _)| format!("{}.{part}", p.name())).collect()
        };
        let mut expected: BTreeSet<String> =
            self.params.iter().zip(&self.states).flat_map(|(p, state)| known(p, state)).collect();
        expected.insert("step".into());
        let given: BTreeSet<String> = tensors.keys().cloned().collect();
        if expected != given {
            return Err(Error::KeyMismatch {
                path: PathBuf::from("the optimizer's state"),
                missing: expected.difference(&given).cloned().collect(),
                unexpected: given.difference(&expected).cloned().collect(),
                remedy: "resume with the same optim and an adapter of the same r and target_modules".into(),
            });
        }
        let step = match tensors["step"].to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?[..] {
            [step] if step >= 0 => step as u64,
            _ => {
                let remedy = "the checkpoint is damaged: resume from an earlier one";
                return Err(Error::argument("step of the optimizer's state", &tensors["step"], "one count", remedy));
            }
        };
        let load = |(p, state): (&Param, &State)| {
            state.with_parts(|part| {
                let name = format!("{}.{part}", p.name());
                let own = state.parts().into_iter().find(|(own, _)| *own == part).map(|(_, t)| t);
                own.map_or_else(|| Ok(tensors[&name].clone()), |own| like(own, &name, &tensors[&name]))
            })
        };
        self.states = self.params.iter().zip(&self.states).map(load).collect::<Result<_>>()?;
        self.step = step;
        Ok(())
    }
}

/// A copy of `tensor`, which must have the form of `own`.
fn like(own: &Tensor, name: &str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.dims() != own.dims() {
        return Err(Error::Shape {
            name: name.into(),
            path: None,
            expected: own.dims().to_vec(),
            got: tensor.dims().to_vec(),
            remedy: "resume with an adapter of the same r and target_modules".into(),
        });
    }
    if tensor.dtype() != own.dtype() {
        let remedy = "resume with the same optim";
        return Err(Error::argument(
            &format!("dtype of {name}"),
            tensor.dtype().as_str(),
            own.dtype().as_str(),
            remedy,
        ));
    }
    Ok(tensor.to_device(own.device())?.force_contiguous()?)
}

fn domain(name: &str, value: f64, ok: bool, expected: &str, remedy: &str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::argument(name, value, expected, remedy)) }
}
