//! What all optimizers share: the checks, the count of steps, the names in a checkpoint. What they do is a [`Rule`].

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
};

use candle_core::{DType, Device, Tensor};

use super::{Hyperparameters, Optim, Optimizer};
use crate::{
    backend::{
        self,
        optimizer::{Part, States},
        param::Param,
    },
    error::{Error, Result, ensure},
    quantized::with_f32,
};

/// Which step is made, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    pub hyperparameters: Hyperparameters,
    /// Counts from 1.
    pub t: u64,
    pub lr: f64,
    /// What gradients are multiplied with.
    pub grad_scale: f32,
}

/// What an optimizer does, and its state: of each parameter the parts, in their order.
pub(super) trait Rule: Send {
    /// The parts of a parameter's state.
    fn parts(&self, param: &Param) -> Vec<Part>;

    /// Takes these for the states of `params`: tensors on the CPU, of the parts' dtypes and shapes. The first call makes
    /// room where the parameters are; one that fails changes nothing.
    fn set(&mut self, params: &[Param], states: Vec<Vec<Tensor>>) -> Result<()>;

    /// Copies on the CPU.
    fn copies(&self) -> Result<Vec<Vec<Tensor>>>;

    /// One step of all parameters.
    fn step(&mut self, params: &[Param], at: &At) -> Result<()>;

    /// The states in a device's memory, if a kernel makes the steps.
    fn on_device(&self) -> Option<&dyn States> {
        None
    }
}

/// Any optimizer over its parameters.
pub(super) struct Stepper {
    params: Vec<Param>,
    /// Under their whole names.
    parts: Vec<Vec<Part>>,
    rule: Box<dyn Rule>,
    hyperparameters: Hyperparameters,
    /// Steps done.
    step: u64,
}

impl Stepper {
    pub fn new(optim: Optim, params: &[Param], hyperparameters: &Hyperparameters) -> Result<Self> {
        let Hyperparameters { betas, eps, weight_decay } = *hyperparameters;
        for (name, beta) in [("adam_beta1", betas.0), ("adam_beta2", betas.1)] {
            let expected = "a number from 0 up to, not including, 1";
            ensure((0.0..1.0).contains(&beta), name, beta, expected, "use 0.9 and 0.999")?;
        }
        at_least_0("adam_epsilon", eps, "use 1e-8")?;
        at_least_0("weight_decay", weight_decay, "use 0, or 0.01 to 0.1")?;
        let wrong =
            |got: &str, expected, remedy| Err(Error::argument("parameters of the optimizer", got, expected, remedy));
        let Some(first) = params.first() else {
            return wrong("none", "at least one", "call get_peft_model first: the base model's weights are frozen");
        };
        let mut names = BTreeSet::new();
        if let Some(twice) = params.iter().find(|p| !names.insert(p.name())) {
            return wrong(twice.name(), "different names", "pass each parameter once: it would be stepped twice");
        }
        let device = first.value().device();
        if let Some(p) = params.iter().find(|p| !p.value().device().same_device(device)) {
            let (here, there) = (p.value().device().location(), device.location());
            let (name, got) = (p.name(), format!("{here:?}, that of {} is {there:?}", first.name()));
            let remedy = "load the whole model on one device";
            return Err(Error::argument(&format!("device of {name}"), got, "the same for all parameters", remedy));
        }
        let mut rule = optim.rule();
        let mut parts: Vec<Vec<Part>> = params.iter().map(|p| rule.parts(p)).collect();
        rule.set(params, each(&parts, |part| Ok(Tensor::zeros(part.shape.as_slice(), part.dtype, &Device::Cpu)?))?)?;
        for (p, parts) in params.iter().zip(&mut parts) {
            parts.iter_mut().for_each(|part| part.name = format!("{}.{}", p.name(), part.name));
        }
        Ok(Self { params: params.to_vec(), parts, rule, hyperparameters: *hyperparameters, step: 0 })
    }
}

impl Optimizer for Stepper {
    fn step(&mut self, lr: f64, grad_scale: f32) -> Result<()> {
        at_least_0("learning_rate", lr, "use 1e-4 to 1e-3 for LoRA")?;
        let t = self.step + 1;
        // The constructor refuses an empty list.
        let device = self.params[0].value().device();
        let _one = backend::of(device)?.lock();
        self.rule.step(&self.params, &At { hyperparameters: self.hyperparameters, t, lr, grad_scale })?;
        self.step = t;
        Ok(())
    }

    fn steps(&self) -> u64 {
        self.step
    }

    fn num_bytes(&self) -> usize {
        self.parts.iter().flatten().map(Part::num_bytes).sum()
    }

    fn state_dict(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::from([("step".to_string(), Tensor::new(&[self.step as i64], &Device::Cpu)?)]);
        let copies = self.rule.copies()?;
        for (part, copy) in self.parts.iter().flatten().zip(copies.into_iter().flatten()) {
            tensors.insert(part.name.clone(), copy.reshape(part.shape.as_slice())?);
        }
        Ok(tensors)
    }

    fn load_state_dict(&mut self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let mut expected: BTreeSet<String> = self.parts.iter().flatten().map(|part| part.name.clone()).collect();
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
            ref steps => {
                let remedy = "the checkpoint is damaged: resume from an earlier one";
                // Not the tensor itself: of a shape like [2^40, 0] candle prints each empty row.
                let got = steps.first().map_or("an empty tensor".into(), |step| format!("{step}, of {}", steps.len()));
                return Err(Error::argument("step of the optimizer's state", got, "one count", remedy));
            }
        };
        self.rule.set(&self.params, each(&self.parts, |part| checked(part, &tensors[&part.name]))?)?;
        self.step = step;
        Ok(())
    }

    fn page_out(&self) -> Result<()> {
        self.rule.on_device().map_or(Ok(()), |states| states.page_out())
    }

    fn is_paged_out(&self) -> Result<bool> {
        self.rule.on_device().map_or(Ok(false), |states| states.is_paged_out())
    }

    fn is_paged(&self) -> bool {
        self.rule.on_device().is_some_and(|states| states.is_paged())
    }
}

/// A copy of `tensor` on the CPU, which must be of this form.
fn checked(part: &Part, tensor: &Tensor) -> Result<Tensor> {
    if tensor.dims() != part.shape {
        let remedy = "resume with an adapter of the same r and target_modules";
        return Err(Error::shape(&part.name, None, &part.shape, tensor.dims(), remedy));
    }
    if tensor.dtype() != part.dtype {
        let (name, got) = (format!("dtype of {}", part.name), tensor.dtype().as_str());
        return Err(Error::argument(&name, got, part.dtype.as_str(), "resume with the same optim"));
    }
    let tensor = tensor.to_device(&Device::Cpu)?.force_contiguous()?;
    // Means of squares, and the maxima of blocks.
    let is_positive = part.name.contains(".exp_avg_sq") || part.name.contains(".absmax");
    let wrong = |v: &&f32| !v.is_finite() || is_positive && **v < 0.0;
    let found = match part.dtype {
        DType::F32 => with_f32(&tensor, |values| values.iter().find(wrong).copied())?,
        _ => None,
    };
    if let Some(value) = found {
        let expected = if is_positive { "finite numbers of at least 0" } else { "finite numbers" };
        let remedy = "the checkpoint is damaged: resume from an earlier one";
        return Err(Error::argument(&part.name, value, expected, remedy));
    }
    Ok(tensor)
}

/// A tensor for each part.
fn each(parts: &[Vec<Part>], tensor: impl Fn(&Part) -> Result<Tensor>) -> Result<Vec<Vec<Tensor>>> {
    parts.iter().map(|parts| parts.iter().map(&tensor).collect()).collect()
}

fn at_least_0(name: &str, value: f64, remedy: &str) -> Result<()> {
    ensure(value >= 0.0 && value.is_finite(), name, value, "a number of at least 0", remedy)
}
