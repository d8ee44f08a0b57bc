//! Qwen2 and Qwen2.5 (arXiv:2407.10671): a Llama whose q, k and v have a bias; `modeling_qwen2.py`.

use serde_json::Value;

use super::{
    decoder::Description,
    llama::{LlamaConfig, qwen_window},
};
use crate::error::Result;

/// The network that a config.json describes.
pub fn describe(config: &Value) -> Result<Description> {
    let llama = LlamaConfig::from_json(config)?;
    let (sliding_window, slides) = qwen_window(config, llama.num_hidden_layers)?;
    let own = LlamaConfig { qkv_bias: true, o_bias: false, mlp_bias: false, ..llama };
    Ok(LlamaConfig { sliding_window, slides, ..own }.describe("Qwen2"))
}
