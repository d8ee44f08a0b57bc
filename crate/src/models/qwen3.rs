//! Qwen3 (arXiv:2505.09388): a Llama whose queries and keys are normalized head by head; `modeling_qwen3.py`.

use serde_json::Value;

use super::{
    decoder::Description,
    llama::{LlamaConfig, sliding_window},
};
use crate::error::Result;

/// The network that a config.json describes.
pub fn describe(config: &Value) -> Result<Description> {
    let llama = LlamaConfig::from_json(config)?;
    let window = if config["use_sliding_window"] == true { sliding_window(config)? } else { None };
    Ok(LlamaConfig { qk_norm: true, mlp_bias: false, sliding_window: window, ..llama }.describe("Qwen3"))
}
