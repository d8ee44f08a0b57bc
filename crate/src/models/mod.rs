//! Architectures, one file each, and what they have in common.

pub mod bloom;
pub mod causal_lm;
pub mod decoder;
pub mod gguf;
#[cfg(feature = "cuda")]
pub(crate) mod gpu;
pub mod llama;
pub mod memory;
pub mod options;
mod perplexity;
pub mod weights;

pub use perplexity::perplexity;
use serde_json::Value;

use crate::error::{Error, Result};
use decoder::Decoder;
use options::ModelOptions;
use weights::Weights;

#[cfg(feature = "cuda")]
pub use gpu::Recorded;

/// What a GPU keeps between passes: nothing in a build without one.
#[cfg(not(feature = "cuda"))]
#[derive(Clone, Debug, Default)]
pub struct Recorded;

/// The architectures that can be loaded: `model_type` in config.json.
pub const SUPPORTED: [&str; 2] = ["bloom", "llama"];

/// Fails on an architecture that is not among [`SUPPORTED`]: before gigabytes are fetched for it.
pub fn check_supported(config: &Value) -> Result<()> {
    let model_type = config["model_type"].as_str().unwrap_or("(missing)");
    if SUPPORTED.contains(&model_type) {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: "model_type".into(),
        got: model_type.into(),
        supported: SUPPORTED.map(String::from).into(),
        remedy: "choose a model of a supported architecture".into(),
    })
}

/// A positive integer of config.json, under the first of `names` that it has.
pub(crate) fn config_size(config: &Value, names: &[&str]) -> Result<usize> {
    let got = names.iter().map(|n| &config[*n]).find(|v| !v.is_null()).unwrap_or(&Value::Null);
    got.as_u64().filter(|v| *v > 0).map(|v| v as usize).ok_or_else(|| {
        Error::argument(names[0], got, "a positive integer in config.json", "get the model's config.json again")
    })
}

/// Builds the network that `config` (config.json) describes from `weights`; gives the names
/// of tensors that the model did not ask for.
pub fn build(config: &Value, weights: Weights, options: &ModelOptions) -> Result<(Decoder, Vec<String>)> {
    check_supported(config)?;
    let load = |mut weights: Weights| {
        let decoder = match config["model_type"].as_str() {
            Some("llama") => llama::load(&llama::LlamaConfig::from_json(config)?, &mut weights, options)?,
            _ => bloom::load(&bloom::BloomConfig::from_json(config)?, &mut weights, options)?,
        };
        Ok((decoder, weights.finish()?))
    };
    #[cfg(feature = "cuda")]
    return weights.with_room(options, load);
    #[cfg(not(feature = "cuda"))]
    load(weights)
}
