//! Architectures, one file each, and what they have in common.

pub mod bloom;
pub mod causal_lm;
pub mod decoder;
pub mod gguf;
pub mod llama;
pub mod memory;
mod mistral;
mod needs;
pub mod options;
pub mod parameter;
mod parts;
mod perplexity;
mod qwen2;
mod qwen3;
mod rope_scaling;
pub mod weights;

pub use perplexity::perplexity;
use serde_json::Value;

use crate::error::{Error, Result};
use decoder::{Decoder, Description};
use options::ModelOptions;
use weights::Weights;

/// What makes a network of config.json.
type Describe = fn(&Value) -> Result<Description>;

/// The architectures that can be loaded, by `model_type` in config.json.
const FAMILIES: [(&str, Describe); 5] = [
    ("bloom", bloom::describe),
    ("llama", llama::describe),
    ("mistral", mistral::describe),
    ("qwen2", qwen2::describe),
    ("qwen3", qwen3::describe),
];

/// Fails on an architecture that cannot be loaded: before gigabytes are fetched for it.
pub fn check_supported(config: &Value) -> Result<()> {
    family(config).map(drop)
}

fn family(config: &Value) -> Result<Describe> {
    let model_type = config["model_type"].as_str().unwrap_or("(missing)");
    let found = FAMILIES.iter().find(|(name, _)| *name == model_type);
    found.map(|(_, describe)| *describe).ok_or_else(|| {
        let supported = FAMILIES.map(|(name, _)| name);
        Error::unsupported("model_type", model_type, supported, "choose a model of a supported architecture")
    })
}

/// Beyond any model: a damaged config.json must not ask for that much memory.
pub(crate) const LARGEST_SIZE: usize = 1 << 24;

/// A positive integer of config.json, under the first of `names` that it has.
pub(crate) fn config_size(config: &Value, names: &[&str]) -> Result<usize> {
    let got = names.iter().map(|n| &config[*n]).find(|v| !v.is_null()).unwrap_or(&Value::Null);
    got.as_u64().map(|v| v as usize).filter(|v| (1..=LARGEST_SIZE).contains(v)).ok_or_else(|| {
        let expected = format!("a positive integer in config.json, at most {LARGEST_SIZE}");
        Error::argument(names[0], got, &expected, "get the model's config.json again")
    })
}

/// Builds the network that `config` (config.json) describes from `weights`; gives the names
/// of tensors that the model did not ask for.
pub fn build(config: &Value, weights: Weights, options: &ModelOptions) -> Result<(Decoder, Vec<String>)> {
    let description = family(config)?(config)?;
    weights.with_room(options, |mut weights| {
        let decoder = Decoder::load(description, &mut weights, options)?;
        Ok((decoder, weights.finish()?))
    })
}
