//! Architectures, one file each, and what they have in common.

pub mod bloom;
pub mod causal_lm;
pub mod decoder;
pub mod memory;
pub mod options;
pub mod weights;

use serde_json::Value;

use crate::error::{Error, Result};
use decoder::Decoder;
use options::ModelOptions;
use weights::Weights;

/// The architectures that can be loaded: `model_type` in config.json.
pub const SUPPORTED: [&str; 1] = ["bloom"];

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

/// Builds the network that `config` (config.json) describes from `weights`; gives the names
/// of tensors that the model did not ask for.
pub fn build(config: &Value, mut weights: Weights, options: &ModelOptions) -> Result<(Decoder, Vec<String>)> {
    check_supported(config)?;
    let decoder = bloom::load(&bloom::BloomConfig::from_json(config)?, &mut weights, options)?;
    Ok((decoder, weights.finish()?))
}
