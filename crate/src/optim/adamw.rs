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
    state::{Form, State, forms},
};
#[cfg(feature = "cuda")]
use crate::backend::cuda::optim as cuda;
use crate::{
    backend::param::{Param, modify_f32, read_f32},
    error::{Error, Result},
};

/// Fewer elements than this in all parameters together, and threads cost more than they save.
const PARALLEL_FROM: usize = 1 << 16;

/// AdamW over a list of parameters, which it changes in place.
pub struct AdamW {
    optim: Optim,
    params: Vec<Param>,
    /// The parts of each parameter's state.
    forms: Vec<Vec<Form>>,
    states: States,
    /// Steps done.
    step: u64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
}

/// The states of all parameters, where these are.
enum States {
    Cpu(Vec<State>),
    #[cfg(feature = "cuda")]
    Gpu(cuda::States),
}

impl AdamW {
    /// `betas` in [0, 1), `eps` and `weight_decay` at least 0. The decay is decoupled
    /// (`p *= 1 - lr * weight_decay`) and comes before the update. Fails for a value outside its
    /// domain, for no parameters, for two of one name, and for parameters on different devices.
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
        let device = params[0].value().device();
        if let Some(p) = params.iter().find(|p| !p.value().device().same_device(device)) {
            let got =
                format!("{:?}, that of {} is {:?}", p.value().device().location(), params[0].name(), device.location());
            let remedy = "load the whole model on one device";
            return Err(Error::argument(
                &format!("device of {}", p.name()),
                got,
                "the same for all parameters",
                remedy,
            ));
        }
        let forms: Vec<Vec<Form>> = params.iter().map(|p| forms(p, optim.is_8bit())).collect();
        let states = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => States::Gpu(cuda::States::new(params, &forms, optim.is_paged())?),
            device => {
                crate::backend::of(device)?;
                States::Cpu(forms.iter().map(|forms| State::zeros(forms)).collect::<Result<_>>()?)
            }
        };
        Ok(Self { optim, params: params.to_vec(), forms, states, step: 0, betas, eps, weight_decay })
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
        let t = self.step + 1;
        let full = if self.optim == Optim::AdamWTorch { Rule::Torch } else { Rule::Bnb32 };
        let step = |rule| Step::new(rule, lr, self.betas, self.eps, self.weight_decay, t, grad_scale);
        match &self.states {
            States::Cpu(states) => self.step_on_cpu(states, full, step)?,
            #[cfg(feature = "cuda")]
            States::Gpu(states) => states.step(full, step)?,
        }
        self.step = t;
        Ok(())
    }

    fn step_on_cpu(&self, states: &[State], full: Rule, step: impl Fn(Rule) -> Step + Sync) -> Result<()> {
        let one = |(p, state): (&Param, &State)| -> Result<()> {
            let step = step(if matches!(state, State::Full { .. }) { full } else { Rule::Bnb8 });
            read_f32(p.grad(), |g| {
                let mut done = Ok(());
                modify_f32(p.value(), |p| done = state.step(&step, p, g))?;
                done
            })?
        };
        if self.params.iter().map(|p| p.value().elem_count()).sum::<usize>() < PARALLEL_FROM {
            self.params.iter().zip(states).try_for_each(one)
        } else {
            self.params.par_iter().zip(states).try_for_each(one)
        }
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Bytes of the state.
    pub fn num_bytes(&self) -> usize {
        self.forms.iter().flatten().map(Form::num_bytes).sum()
    }

    /// Bytes that the state would have in 8 bits.
    pub(crate) fn num_bytes_in_8bit(&self) -> usize {
        self.params.iter().flat_map(|p| forms(p, true)).map(|form| form.num_bytes()).sum()
    }

    /// Moves the state of a paged optimizer from the GPU to the host's memory, to make room for something else;
    /// the next step brings it back. Does nothing on the CPU and for an optimizer that is not paged.
    pub fn page_out(&self) -> Result<()> {
        match &self.states {
            States::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            States::Gpu(states) => states.page_out(),
        }
    }

    /// Whether the state was moved to the host's memory, and not back yet.
    pub fn is_paged_out(&self) -> Result<bool> {
        match &self.states {
            States::Cpu(_) => Ok(false),
            #[cfg(feature = "cuda")]
            States::Gpu(states) => Ok(states.place()? == Some(crate::backend::cuda::Place::Host)),
        }
    }

    /// Whether the state is in memory that may move between the GPU and the host.
    pub(crate) fn is_paged(&self) -> bool {
        match &self.states {
            States::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            States::Gpu(states) => states.is_paged(),
        }
    }

    /// Copies of the state, on the CPU, under checkpoint names: `step` (i64, one element), and for each parameter
    /// `<name>.exp_avg` and `<name>.exp_avg_sq`, or for an 8-bit state `<name>.state1`,
    /// `.state2` (uint8), `.absmax1` and `.absmax2`.
    pub fn state_dict(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::from([("step".to_string(), Tensor::new(&[self.step as i64], &Device::Cpu)?)]);
        let copy = |state: &State| state.parts().into_iter().map(|t| Ok(t.copy()?)).collect::<Result<Vec<_>>>();
        let copies = match &self.states {
            States::Cpu(states) => states.iter().map(copy).collect::<Result<Vec<_>>>()?,
            #[cfg(feature = "cuda")]
            States::Gpu(states) => states.copies(&self.forms)?,
        };
        for ((p, forms), copies) in self.params.iter().zip(&self.forms).zip(copies) {
            tensors.extend(forms.iter().zip(copies).map(|(form, copy)| (key(p, form), copy)));
        }
        Ok(tensors)
    }

    /// Puts a state from `state_dict` back, bit for bit. Nothing changes when it fails: with
    /// `Error::KeyMismatch` for a state of other parameters or of another kind of optimizer,
    /// with `Error::Shape` or `Error::InvalidArgument` for tensors of another form.
    pub fn load_state_dict(&mut self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let parts = self.params.iter().zip(&self.forms);
        let mut expected: BTreeSet<String> =
            parts.clone().flat_map(|(p, forms)| forms.iter().map(|form| key(p, form))).collect();
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
        let load = |(p, forms): (&Param, &Vec<Form>)| {
            let one = |form: &Form| form.check(&key(p, form), &tensors[&key(p, form)]);
            forms.iter().map(one).collect::<Result<Vec<_>>>()
        };
        let loaded = parts.map(load).collect::<Result<Vec<_>>>()?;
        match &mut self.states {
            States::Cpu(states) => *states = loaded.into_iter().map(State::of).collect::<Result<_>>()?,
            #[cfg(feature = "cuda")]
            States::Gpu(states) => states.replace(&loaded)?,
        }
        self.step = step;
        Ok(())
    }
}

/// The name of a part of a parameter's state in a checkpoint.
fn key(param: &Param, form: &Form) -> String {
    format!("{}.{}", param.name(), form.name)
}

impl Form {
    /// A copy of `tensor` on the CPU, which must have this form.
    fn check(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        if tensor.dims() != self.shape {
            return Err(Error::Shape {
                name: name.into(),
                path: None,
                expected: self.shape.clone(),
                got: tensor.dims().to_vec(),
                remedy: "resume with an adapter of the same r and target_modules".into(),
            });
        }
        if tensor.dtype() != self.dtype {
            let (got, expected) = (tensor.dtype().as_str(), self.dtype.as_str());
            return Err(Error::argument(&format!("dtype of {name}"), got, expected, "resume with the same optim"));
        }
        Ok(tensor.to_device(&Device::Cpu)?.force_contiguous()?)
    }
}

fn domain(name: &str, value: f64, ok: bool, expected: &str, remedy: &str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::argument(name, value, expected, remedy)) }
}
