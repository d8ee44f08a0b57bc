//! What operations share during one pass.

use candle_core::Tensor;

use super::{Backend, Tokens, internal, kv_cache::KvCache, sequences::Sequences};
use crate::{error::Result, interrupt};

/// One pass over a batch: its tokens, what is kept of it, the device that makes it.
pub struct Run<'a> {
    pub backend: &'static dyn Backend,
    pub ids: &'a [u32],
    /// For each token the label of the next, or -100.
    pub targets: &'a [i64],
    /// Where each sequence begins in the packed rows.
    pub sequences: &'a Sequences,
    /// `Some`: operations keep what their backward takes.
    pub saved: Option<Saved>,
    /// Names the dropout masks of this pass; `None`: no dropout.
    pub dropout_key: Option<u64>,
    /// `Some`: keys and values are appended to the cache and attention reads from there.
    pub cache: Option<&'a mut KvCache>,
    /// The block that runs, for the cache.
    pub block: usize,
    /// What the gradient of the summed loss is multiplied by.
    pub grad_scale: f64,
    /// The summed loss so far, on a device that gives it at once.
    pub loss_sum: f64,
    /// What the batch is on the GPU; `None` on the CPU.
    #[cfg(feature = "cuda")]
    pub card: Option<super::cuda::OnCard<'a>>,
}

impl<'a> Run<'a> {
    /// A pass that keeps nothing.
    pub fn new(backend: &'static dyn Backend, tokens: &Tokens<'a>) -> Self {
        Self {
            backend,
            ids: tokens.ids,
            targets: tokens.targets,
            sequences: tokens.sequences,
            saved: None,
            dropout_key: None,
            cache: None,
            block: 0,
            grad_scale: 1.0,
            loss_sum: 0.0,
            #[cfg(feature = "cuda")]
            card: None,
        }
    }

    /// Ends the pass if somebody asked to stop: on a CPU one may take minutes. A GPU's is recorded whole, and short.
    pub fn check_stop(&self) -> Result<()> {
        if self.backend.is_cpu() { interrupt::check("a pass over the model") } else { Ok(()) }
    }

    /// Keeps `tensor` for the backward, if there will be one.
    pub fn save(&mut self, label: &'static str, tensor: &Tensor) {
        if let Some(saved) = &mut self.saved {
            saved.0.push((label, tensor.clone()));
        }
    }

    /// The tensor that was saved last and not yet taken, which must have this label.
    pub fn take(&mut self, label: &str) -> Result<Tensor> {
        match self.saved.as_mut().and_then(|saved| saved.0.pop()) {
            Some((kept, tensor)) if kept == label => Ok(tensor),
            Some((kept, _)) => Err(internal(format!("the backward wants {label}, {kept} was saved last"))),
            None => Err(internal(format!("the backward wants {label}, nothing is saved"))),
        }
    }

    /// Runs `work` with another stack for what is saved (`None`: nothing is), and puts the present one back.
    pub fn with_saved<R>(&mut self, saved: Option<Saved>, work: impl FnOnce(&mut Self) -> R) -> R {
        let before = std::mem::replace(&mut self.saved, saved);
        let done = work(self);
        self.saved = before;
        done
    }
}

/// The labelled stack of activations between a forward and its backward.
#[derive(Default)]
pub struct Saved(Vec<(&'static str, Tensor)>);

impl Saved {
    /// What is kept, in the order of saving.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        self.0.iter().map(|(label, tensor)| (*label, tensor))
    }
}
