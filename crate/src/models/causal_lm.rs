//! What generation and training ask of a model, whatever its architecture.

use candle_core::Tensor;

use crate::{
    backend::{kv_cache::KvCache, param::Param},
    batch::Batch,
    error::Result,
    layers::custom_loss::LossFn,
};

pub use crate::backend::{Draw, LossScale, Next};

/// A model that predicts the next token: a base model or one with adapters.
pub trait CausalLM: Send + Sync {
    /// Number of rows of the embedding table, and of logits.
    fn vocab_size(&self) -> usize;

    /// The checkpoint's `config.json` and, merged over it, `generation_config.json`:
    /// where `eos_token_id`, `pad_token_id`, `temperature`... are found.
    fn generation_defaults(&self) -> &serde_json::Value;

    /// An empty key-value cache for `sequences` sequences.
    fn new_cache(&self, sequences: usize) -> Result<KvCache>;

    /// Appends `new_tokens[i]` (one or more ids) to sequence i of the cache and gives
    /// the logits after the last of them: f32 `[sequences, vocab]`. Sequences may be of
    /// different lengths: nothing is padded.
    fn next_token_logits(&self, new_tokens: &[&[u32]], cache: &mut KvCache) -> Result<Tensor>;

    /// Appends as [`CausalLM::next_token_logits`] does, and chooses the next tokens where the logits are. A model that
    /// cannot, or cannot this time, gives the logits.
    fn next_tokens(&self, new_tokens: &[&[u32]], cache: &mut KvCache, draws: &[Draw]) -> Result<Next> {
        let _ = draws;
        self.next_token_logits(new_tokens, cache).map(Next::Logits)
    }
}

/// A model with parameters to learn.
pub trait Trainable: CausalLM {
    /// The parameters that learn, in the order of the modules.
    fn trainable_parameters(&self) -> Vec<Param>;

    /// One micro-batch: adds d(sum of token losses / `num_items`)/d(parameter) to every gradient.
    fn forward_backward(&self, batch: &Batch, options: &PassOptions) -> Result<Pass>;

    /// The same with a loss of the caller's own in place of the cross-entropy; `loss_sum` is its sum.
    fn forward_backward_with(&self, batch: &Batch, options: &PassOptions, loss: &LossFn) -> Result<Pass>;

    /// What the loss is multiplied by in f16; `None` where it is not, or no pass was made yet.
    fn loss_scale(&self) -> Option<LossScale>;

    /// Puts a scale in place of the present one, for a run that is resumed; `None`: the first one.
    fn set_loss_scale(&self, scale: Option<LossScale>);

    /// The loss alone, without dropout.
    fn loss(&self, batch: &Batch) -> Result<Pass>;
}

/// How a micro-batch is run.
#[derive(Clone, Debug)]
pub struct PassOptions {
    /// What the summed loss is divided by: the labels of the WHOLE accumulation window,
    /// so that splitting a batch changes neither loss nor gradient.
    pub num_items: f64,
    /// Keep only the input of each block and compute its inside again on the way back.
    pub gradient_checkpointing: bool,
    /// Names the dropout masks of this micro-batch: the same key gives the same masks.
    pub dropout_key: u64,
}

/// What one pass over a micro-batch gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pass {
    /// Sum of the cross-entropies (nats) of all labels that are not -100.
    pub loss_sum: f64,
    /// How many labels that were.
    pub num_label_tokens: usize,
}
