//! Optimizers as torch, transformers and bitsandbytes do them, gradient clipping, and learning-rate schedules.
//!
//! Only the adapter is trained, so the optimizer is small; what matters is that its numbers are
//! the reference's. For AdamW and Lion the order of every multiplication, and where torch's CPU kernels use a fused
//! multiply-add, are reproduced, so the moments are bit-equal to torch's; AdamW's weights differ by
//! an ulp now and then, because torch's square root (MKL's) is not correctly rounded.
//!
//! | file | what |
//! |---|---|
//! | `stepper` | what all optimizers share: checks, the count of steps, checkpoints |
//! | `kernel`, `state` | optimizers that update each element by itself, in 32 or 8 bits: the loop, the states |
//! | `adamw`, `lion` | such optimizers: their moments and the update of one element |
//! | `by_tensor` | optimizers written with operations of whole tensors |
//! | `adafactor`, `sgd` | such optimizers |
//!
//! A new optimizer is a file like `lion` (and its arithmetic in `backend/cuda/kernels/adamw.cu`) or like `adafactor`, and a
//! row in `optimizers!` below.

mod adafactor;
mod adamw;
mod by_tensor;
mod clip;
mod kernel;
mod lion;
pub mod lr_scheduler;
mod sgd;
mod state;
mod stepper;

use std::{collections::HashMap, fmt, str::FromStr};

pub use adamw::AdamW;
use by_tensor::by_tensor;
use candle_core::Tensor;
pub use clip::{GradNorm, clip_grad_norm};
use kernel::{Elementwise, Moment, Scalars, Slices, each};
pub use lr_scheduler::SchedulerType;
use state::by_element;
use stepper::{At, Rule, Stepper};

use crate::{
    backend::{optimizer::Part, param::Param},
    error::{Error, Result},
};

/// The enum of all optimizers: documentation, name here, name in Python, and what it does.
macro_rules! optimizers {
    ($($(#[$about:meta])* $optim:ident = $name:literal: $rule:expr,)*) => {
        /// Which optimizer, under Hugging Face's names.
        ///
        /// "Paged" optimizers keep their state where the GPU driver may move it to the host (managed
        /// memory, which a step asks for on the card beforehand). On the CPU the operating system pages
        /// all memory, so they are the same arithmetic in ordinary memory. With 8-bit states, tensors of fewer than
        /// 4096 elements keep 32-bit ones.
        ///
        /// ```
        /// use qlora_nb::optim::Optim;
        /// let optim: Optim = "paged_lion_8bit".parse()?;
        /// assert_eq!(optim, Optim::PagedLion8bit);
        /// assert_eq!(optim.to_string(), "paged_lion_8bit");
        /// # Ok::<(), qlora_nb::error::Error>(())
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub enum Optim {
            $($(#[$about])* $optim,)*
        }

        impl Optim {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$optim),*];

            /// The name in `TrainingArguments(optim=...)`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$optim => $name,)* }
            }

            fn rule(self) -> Box<dyn Rule> {
                match self { $(Self::$optim => $rule(self),)* }
            }
        }
    };
}

optimizers! {
    /// `adamw_torch`: torch.optim.AdamW, 8 bytes of state a parameter.
    #[default]
    AdamWTorch = "adamw_torch": by_element::<adamw::Step, 2>,
    /// `paged_adamw_32bit`: bitsandbytes' AdamW with 32-bit states, 8 bytes a parameter.
    PagedAdamW32bit = "paged_adamw_32bit": by_element::<adamw::Step, 2>,
    /// `adamw_8bit` (also `adamw_bnb_8bit`): bitsandbytes' AdamW with 8-bit states, 2 bytes a parameter.
    AdamW8bit = "adamw_8bit": by_element::<adamw::Step, 2>,
    /// `paged_adamw_8bit`.
    PagedAdamW8bit = "paged_adamw_8bit": by_element::<adamw::Step, 2>,
    /// `lion_32bit`: bitsandbytes' Lion, 4 bytes of state a parameter; wants a learning rate 3 to 10 times smaller than
    /// AdamW's.
    Lion32bit = "lion_32bit": by_element::<lion::Step, 1>,
    /// `paged_lion_32bit`.
    PagedLion32bit = "paged_lion_32bit": by_element::<lion::Step, 1>,
    /// `lion_8bit`: bitsandbytes' Lion with 8-bit states, 1 byte a parameter.
    Lion8bit = "lion_8bit": by_element::<lion::Step, 1>,
    /// `paged_lion_8bit`.
    PagedLion8bit = "paged_lion_8bit": by_element::<lion::Step, 1>,
    /// `adafactor`: transformers' Adafactor without relative steps; one number a row and one a column.
    Adafactor = "adafactor": by_tensor(adafactor::parts, adafactor::step),
    /// `sgd`: torch.optim.SGD without momentum; no state at all.
    Sgd = "sgd": by_tensor(sgd::parts, sgd::step),
}

impl Optim {
    /// Whether the state may leave a GPU's memory for the host's.
    pub(crate) fn is_paged(self) -> bool {
        self.as_str().starts_with("paged")
    }

    pub(crate) fn is_8bit(self) -> bool {
        self.as_str().ends_with("8bit")
    }

    /// `adamw`, `lion`, `adafactor`, `sgd`.
    fn family(self) -> &'static str {
        self.as_str().trim_start_matches("paged_").split('_').next().unwrap_or_default()
    }

    /// The one of the same family with the smallest state: paged, in 8 bits.
    pub(crate) fn smallest(self) -> Self {
        format!("paged_{}_8bit", self.family()).parse().unwrap_or(self)
    }

    /// The error of a name that is none of this `family` ("": of any).
    fn unsupported(what: &str, got: &str, family: &str) -> Error {
        let supported = Self::ALL.iter().map(|o| o.as_str()).filter(|name| name.contains(family));
        Error::unsupported(what, got, supported, "use \"paged_adamw_32bit\", as QLoRA does")
    }
}

impl fmt::Display for Optim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Optim {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let name = if s == "adamw_bnb_8bit" { "adamw_8bit" } else { s };
        let found = Self::ALL.iter().find(|o| o.as_str() == name);
        found.copied().ok_or_else(|| Self::unsupported("optim", s, ""))
    }
}

/// What an optimizer is set to beside its learning rate; each takes of it what it has a use for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyperparameters {
    /// The decay of the averages, in [0, 1): AdamW, Lion. As in transformers the default is AdamW's for both; Lion's
    /// authors use 0.9 and 0.99.
    pub betas: (f64, f64),
    /// At least 0: AdamW.
    pub eps: f64,
    /// At least 0: all. Decoupled (`p *= 1 - lr * weight_decay` before the update) but for SGD, which adds
    /// `weight_decay * p` to the gradient.
    pub weight_decay: f64,
}

impl Default for Hyperparameters {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Changes a list of parameters in place, by their gradients; made by [`new`].
pub trait Optimizer: Send {
    /// One step with learning rate `lr`. The gradients are multiplied by `grad_scale` (see
    /// [`clip_grad_norm`]) as they are read, and stay as they are.
    ///
    /// # Errors
    /// A learning rate that is negative or not finite; a GPU's errors.
    fn step(&mut self, lr: f64, grad_scale: f32) -> Result<()>;

    /// Steps done.
    fn steps(&self) -> u64;

    /// Bytes of the state.
    fn num_bytes(&self) -> usize;

    /// Copies of the state, on the CPU, under checkpoint names: `step` (i64, one element), and `<parameter>.<part>`
    /// for the parts that the optimizer keeps, under the names of the reference:
    ///
    /// | optimizer | parts |
    /// |---|---|
    /// | AdamW, 32 bits | `exp_avg`, `exp_avg_sq` (f32, the parameter's shape) |
    /// | AdamW, 8 bits | `state1`, `state2` (uint8, the parameter's shape), `absmax1`, `absmax2` (f32, one a block of 256) |
    /// | Lion, 32 bits | `state1` (f32, the parameter's shape) |
    /// | Lion, 8 bits | `state1` (uint8, the parameter's shape), `absmax1` (f32, one a block of 256) |
    /// | Adafactor | `exp_avg_sq_row` (f32, the shape without its last dimension), `exp_avg_sq_col` (without the last but one); for a vector `exp_avg_sq` |
    /// | SGD | none |
    fn state_dict(&self) -> Result<HashMap<String, Tensor>>;

    /// Puts a state from `state_dict` back, bit for bit. Nothing changes when it fails: with
    /// [`Error::KeyMismatch`] for a state of other parameters or of another kind of optimizer,
    /// with [`Error::Shape`] or [`Error::InvalidArgument`] for tensors of another form.
    fn load_state_dict(&mut self, tensors: &HashMap<String, Tensor>) -> Result<()>;

    /// Moves the state of a paged optimizer from the GPU to the host's memory, to make room for something else;
    /// the next step brings it back. Does nothing on the CPU and for an optimizer that is not paged.
    fn page_out(&self) -> Result<()>;

    /// Whether the state was moved to the host's memory, and not back yet.
    fn is_paged_out(&self) -> Result<bool>;

    /// Whether the state is in memory that may move between the GPU and the host.
    fn is_paged(&self) -> bool;
}

/// The optimizer of that name over `params` (f32, all on one device), with a state of zeros.
///
/// ```
/// use qlora_nb::{candle_core::{Device, Tensor}, optim::{self, Hyperparameters, Optim}, peft::Param};
/// let params = [Param::new("w", &Tensor::new(&[1f32, -1.0], &Device::Cpu)?)?];
/// let mut optimizer = optim::new(Optim::Lion32bit, &params, &Hyperparameters::default())?;
/// optimizer.step(1e-4, 1.0)?;
/// assert_eq!((optimizer.steps(), optimizer.num_bytes()), (1, 8));
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidArgument`] for a hyperparameter outside its domain, for no parameters, for two of one name, and for
/// parameters on different devices.
pub fn new(optim: Optim, params: &[Param], hyperparameters: &Hyperparameters) -> Result<Box<dyn Optimizer>> {
    Ok(Box::new(Stepper::new(optim, params, hyperparameters)?))
}

/// Bytes of the state that the optimizer would have over `params`.
pub(crate) fn num_bytes(optim: Optim, params: &[Param]) -> usize {
    let rule = optim.rule();
    params.iter().flat_map(|p| rule.parts(p)).map(|part| part.num_bytes()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_the_family_and_the_size() {
        for &optim in Optim::ALL {
            assert_eq!(optim.as_str().parse::<Optim>().unwrap(), optim);
        }
        assert_eq!(Optim::AdamWTorch.smallest(), Optim::PagedAdamW8bit);
        assert_eq!(Optim::PagedLion32bit.smallest(), Optim::PagedLion8bit);
        assert_eq!(Optim::Adafactor.smallest(), Optim::Adafactor);
        assert!(Optim::Lion8bit.is_8bit() && !Optim::Lion32bit.is_8bit() && !Optim::Sgd.is_8bit());
        let error = "ademamix".parse::<Optim>().unwrap_err().to_string();
        assert!(Optim::ALL.iter().all(|o| error.contains(o.as_str())), "{error}");
    }
}
