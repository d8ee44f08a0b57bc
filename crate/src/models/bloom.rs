//! BLOOM (arXiv:2211.05100), as transformers' `modeling_bloom.py` computes it.

use std::sync::Arc;

use candle_core::Tensor;
use serde_json::Value;

use super::{
    config_size,
    decoder::{BlockKind, Description},
    parts::{NormKind, Part, Parts},
    rope_scaling::BAD_CONFIG,
};
use crate::{
    backend::{
        operands::{Attention, HeadLayout, Norm, Normed},
        run::Run,
    },
    error::{Result, ensure},
    layers::alibi_slopes,
    py_repr::py_float,
};

/// config.json of a BLOOM.
#[derive(Clone, Debug, PartialEq)]
pub struct BloomConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub layer_norm_epsilon: f64,
    /// The residual starts after the norm instead of before it.
    pub apply_residual_connection_post_layernorm: bool,
    pub tie_word_embeddings: bool,
    /// Dropout of the base model; printed in the module tree only: a frozen base is not regularized.
    pub attention_dropout: f64,
}

impl BloomConfig {
    /// Reads the fields under their new and their old names.
    pub fn from_json(config: &Value) -> Result<Self> {
        let size = |names: &[&str]| config_size(config, names);
        let flag = |name: &str, default: bool| config[name].as_bool().unwrap_or(default);
        let this = Self {
            vocab_size: size(&["vocab_size"])?,
            hidden_size: size(&["hidden_size", "n_embed"])?,
            n_layer: size(&["n_layer", "num_hidden_layers"])?,
            n_head: size(&["n_head", "num_attention_heads"])?,
            layer_norm_epsilon: config["layer_norm_epsilon"].as_f64().unwrap_or(1e-5),
            apply_residual_connection_post_layernorm: flag("apply_residual_connection_post_layernorm", false),
            tie_word_embeddings: flag("tie_word_embeddings", true),
            attention_dropout: config["attention_dropout"].as_f64().unwrap_or(0.0),
        };
        let expected = format!("a divisor of hidden_size {}", this.hidden_size);
        ensure(this.hidden_size.is_multiple_of(this.n_head), "n_head", this.n_head, &expected, BAD_CONFIG)?;
        Ok(this)
    }
}

/// The network that a config.json describes.
pub fn describe(config: &Value) -> Result<Description> {
    let config = BloomConfig::from_json(config)?;
    let c = config.hidden_size;
    let norm_kind = NormKind::Layer { eps: config.layer_norm_epsilon };
    let norm = |name| Part::Norm(name, c, norm_kind.clone());
    let linear = |name, shape| Part::Linear(name, shape, true);
    let attention_dropout = format!("Dropout(p={}, inplace=False)", py_float(config.attention_dropout));
    let attention = vec![
        linear("query_key_value", (3 * c, c)),
        linear("dense", (c, c)),
        Part::Plain("attention_dropout", attention_dropout),
    ];
    let mlp = vec![
        linear("dense_h_to_4h", (4 * c, c)),
        Part::Plain("gelu_impl", "BloomGelu()".into()),
        linear("dense_4h_to_h", (c, 4 * c)),
    ];
    let block = vec![
        norm("input_layernorm"),
        Part::Module("self_attention", "BloomAttention".into(), attention),
        norm("post_attention_layernorm"),
        Part::Module("mlp", "BloomMLP".into(), mlp),
    ];
    let kind = BloomBlock {
        attention: Attention {
            layout: HeadLayout::interleaved(config.n_head, c / config.n_head),
            slopes: alibi_slopes(config.n_head),
            window: None,
        },
        residual_after_norm: config.apply_residual_connection_post_layernorm,
    };
    Ok(Description {
        class: "Bloom",
        model: "transformer",
        prefix: "transformer.",
        vocab_size: config.vocab_size,
        hidden_size: c,
        num_layers: config.n_layer,
        embedding: "word_embeddings",
        padding_idx: None,
        embedding_norm: Some(("word_embeddings_layernorm", norm_kind.clone())),
        blocks: "h",
        block: ("BloomBlock".into(), block),
        kind: Arc::new(kind),
        computed: &[],
        final_norm: ("ln_f", norm_kind),
        plain: Vec::new(),
        tied: config.tie_word_embeddings,
        kv_width: c,
    })
}

/// One transformer block.
struct BloomBlock {
    attention: Attention,
    residual_after_norm: bool,
}

impl BlockKind for BloomBlock {
    fn forward(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (wide, residual) = self.up_to_last(parts, x, run)?;
        parts.linear("dense_4h_to_h")?.forward_onto(&wide, &residual, run) // (M, C)
    }

    fn recompute(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<()> {
        let (wide, _) = self.up_to_last(parts, x, run)?;
        parts.linear("dense_4h_to_h")?.remember(&wide, run)
    }

    fn backward(&self, parts: &Parts, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        let mut d = parts.linear("dense_4h_to_h")?.backward_through(dy, run)?; // (M, 4C)
        d = run.backend.gelu_backward(&d, run)?; // (M, 4C)
        d = parts.linear("dense_h_to_4h")?.backward_through(&d, run)?; // (M, C)
        let dx = self.norm_backward(parts.norm("post_attention_layernorm")?, d, dy, run)?; // (M, C)

        let mut d = parts.linear("dense")?.backward_through(&dx, run)?; // (M, C)
        d = self.attention.backward(&d, run)?; // (M, heads * 3 * head_dim)
        match parts.linear("query_key_value")?.backward(&d, need_dx, run)? {
            None => Ok(None),
            Some(below) => {
                drop(d);
                Ok(Some(self.norm_backward(parts.norm("input_layernorm")?, below, &dx, run)?))
            }
        }
    }

    /// Around gelu's backward: dy, its input's gradient and its output's.
    fn working(&self) -> usize {
        9 * self.attention.layout.width()
    }
}

impl BloomBlock {
    /// Everything but the last linear layer: its input and the residual that goes round it.
    fn up_to_last(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
        // What is not needed any more goes at once: each is as large as the batch.
        let normed = parts.norm("input_layernorm")?.of(x); // (M, C)
        let projected = parts.linear("query_key_value")?.forward(&normed, run)?; // (M, heads * 3 * head_dim)
        let residual = self.residual(normed, x, run)?;
        let mixed = self.attention.forward(&projected, run)?; // (M, C)
        drop(projected);
        let x = parts.linear("dense")?.forward_onto(&mixed, &residual, run)?; // (M, C)
        drop((mixed, residual));

        let normed = parts.norm("post_attention_layernorm")?.of(&x); // (M, C)
        let wide = parts.linear("dense_h_to_4h")?.forward_gelu(&normed, run)?; // (M, 4C)
        let residual = self.residual(normed, &x, run)?;
        Ok((wide, residual))
    }

    /// What goes round a branch whose norm made `normed` of `x`.
    fn residual(&self, normed: Normed, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        Ok(if self.residual_after_norm { normed.tensor(run)?.clone() } else { x.clone() })
    }

    /// Through a norm whose input also goes round it as the residual. `d` is the gradient of
    /// the norm's output by the branch, `dy` the gradient of the residual.
    fn norm_backward(&self, norm: &Norm, d: Tensor, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        if self.residual_after_norm {
            norm.backward(&run.backend.add(&d, dy)?, None, run)
        } else {
            norm.backward(&d, Some(dy), run)
        }
    }
}
