//! Mistral (arXiv:2310.06825): a Llama whose queries see a window of keys; `modeling_mistral.py`.

use serde_json::Value;

use super::{
    decoder::Description,
    llama::{LlamaConfig, sliding_window},
};
use crate::error::Result;

/// The network that a config.json describes.
pub fn describe(config: &Value) -> Result<Description> {
    let llama = LlamaConfig { sliding_window: sliding_window(config)?, ..LlamaConfig::from_json(config)? };
    Ok(LlamaConfig { qkv_bias: false, o_bias: false, mlp_bias: false, ..llama }.describe("Mistral"))
}
