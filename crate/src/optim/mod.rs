//! AdamW as torch and bitsandbytes do it, gradient clipping, and learning-rate schedules.
//!
//! Only the adapter is trained, so the optimizer is small; what matters is that its numbers are
//! the reference's. The order of every multiplication, and where torch's CPU kernels use a fused
//! multiply-add, are reproduced, so the moments are bit-equal to torch's; the weights differ by
//! an ulp now and then, because torch's square root (MKL's) is not correctly rounded.

mod adamw;
mod clip;
mod kernel;
pub mod lr_scheduler;
mod state;

use std::{fmt, str::FromStr};

pub use adamw::AdamW;
pub use clip::{GradNorm, clip_grad_norm};
pub use lr_scheduler::SchedulerType;

use crate::error::{Error, Result};

/// Which AdamW, under Hugging Face's names.
///
/// "Paged" optimizers keep their state where the GPU driver may move it to the host (managed
/// memory, which a step asks for on the card beforehand). On the CPU the operating system pages
/// all memory, so they are the same arithmetic in ordinary memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Optim {
    /// `adamw_torch`: torch.optim.AdamW, 8 bytes of state a parameter.
    #[default]
    AdamWTorch,
    /// `paged_adamw_32bit`: bitsandbytes' AdamW with 32-bit states, 8 bytes a parameter.
    PagedAdamW32bit,
    /// `adamw_8bit` (also `adamw_bnb_8bit`): bitsandbytes' AdamW with 8-bit states, 2 bytes a
    /// parameter; tensors of fewer than 4096 elements keep 32-bit states.
    AdamW8bit,
    /// `paged_adamw_8bit`.
    PagedAdamW8bit,
}

impl Optim {
    const ALL: [Self; 4] = [Self::AdamWTorch, Self::PagedAdamW32bit, Self::AdamW8bit, Self::PagedAdamW8bit];

    /// The name in `TrainingArguments(optim=...)`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AdamWTorch => "adamw_torch",
            Self::PagedAdamW32bit => "paged_adamw_32bit",
            Self::AdamW8bit => "adamw_8bit",
            Self::PagedAdamW8bit => "paged_adamw_8bit",
        }
    }

    /// Whether the state may leave a GPU's memory for the host's.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_paged(self) -> bool {
        matches!(self, Self::PagedAdamW32bit | Self::PagedAdamW8bit)
    }

    pub(crate) fn is_8bit(self) -> bool {
        matches!(self, Self::AdamW8bit | Self::PagedAdamW8bit)
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
        match s {
            "adamw_bnb_8bit" => Ok(Self::AdamW8bit),
            _ => Self::ALL.into_iter().find(|o| o.as_str() == s).ok_or_else(|| Error::Unsupported {
                what: "optim".into(),
                got: s.into(),
                supported: Self::ALL.map(|o| o.as_str().to_string()).into(),
                remedy: "use \"paged_adamw_32bit\", as QLoRA does".into(),
            }),
        }
    }
}
