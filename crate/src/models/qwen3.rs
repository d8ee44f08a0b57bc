//! Qwen3 (arXiv:2505.09388): a Llama whose queries and keys are normalized head by head; `modeling_qwen3.py`.

use serde_json::Value;

use super::{
    decoder::Description,
    llama::{LlamaConfig, qwen_window},
};
use crate::error::Result;

/// The network that a config.json describes.
pub fn describe(config: &Value) -> Result<Description> {
    // Its head_dim is 128 where config.json has none.
    let mut config = config.clone();
    if config["head_dim"].is_null() {
        config["head_dim"] = 128.into();
    }
    let llama = LlamaConfig::from_json(&config)?;
    let (sliding_window, slides) = qwen_window(&config, llama.num_hidden_layers)?;
    Ok(LlamaConfig { qk_norm: true, mlp_bias: false, sliding_window, slides, ..llama }.describe("Qwen3"))
}
