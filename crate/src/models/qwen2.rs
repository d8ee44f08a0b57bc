//! Qwen2 and Qwen2.5 (arXiv:2407.10671): a Llama whose q, k and v have a bias; `modeling_qwen2.py`.

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
    Ok(LlamaConfig { qkv_bias: true, o_bias: false, mlp_bias: false, sliding_window: window, ..llama }
        .describe("Qwen2"))
}
