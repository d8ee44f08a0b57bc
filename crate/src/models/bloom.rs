//! BLOOM (arXiv:2211.05100), as transformers' `modeling_bloom.py` computes it.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::{
    config_size,
    decoder::{Block, Decoder, DecoderNames, exactly, head, through},
    memory::Needs,
    options::ModelOptions,
    weights::Weights,
};
use crate::{
    error::{Error, Result},
    layers::{
        attention::{Attention, HeadLayout, alibi_slopes},
        embedding::Embedding,
        gelu,
        layer_norm::LayerNorm,
        linear::{Linear, Weight},
        norm::{Norm, Normed},
        run::Run,
    },
    module_tree::ModuleNode,
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
        if !this.hidden_size.is_multiple_of(this.n_head) {
            return Err(Error::argument(
                "n_head",
                this.n_head,
                &format!("a divisor of hidden_size {}", this.hidden_size),
                "get the model's config.json again",
            ));
        }
        Ok(this)
    }
}

/// One transformer block.
#[derive(Clone)]
struct BloomBlock {
    input_layernorm: Norm,
    query_key_value: Linear,
    attention: Attention,
    dense: Linear,
    post_attention_layernorm: Norm,
    dense_h_to_4h: Linear,
    dense_4h_to_h: Linear,
    residual_after_norm: bool,
    attention_dropout: f64,
}

impl Block for BloomBlock {
    fn forward(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (wide, residual) = self.up_to_last(x, run)?;
        self.dense_4h_to_h.forward(&wide, Some(&residual), run) // (M, C)
    }

    fn recompute(&self, x: &Tensor, run: &mut Run) -> Result<()> {
        let (wide, _) = self.up_to_last(x, run)?;
        self.dense_4h_to_h.remember(&wide, run)
    }

    fn backward(&self, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        let mut d = through(&self.dense_4h_to_h, dy, run)?; // (M, 4C)
        d = gelu::backward(&d, run)?; // (M, 4C)
        d = through(&self.dense_h_to_4h, &d, run)?; // (M, C)
        let dx = self.norm_backward(&self.post_attention_layernorm, d, dy, run)?; // (M, C)

        let mut d = through(&self.dense, &dx, run)?; // (M, C)
        d = self.attention.backward(&d, run)?; // (M, heads * 3 * head_dim)
        match self.query_key_value.backward(&d, need_dx, run)? {
            None => Ok(None),
            Some(below) => {
                drop(d);
                Ok(Some(self.norm_backward(&self.input_layernorm, below, &dx, run)?))
            }
        }
    }

    fn linears(&self) -> Vec<&Linear> {
        vec![&self.query_key_value, &self.dense, &self.dense_h_to_4h, &self.dense_4h_to_h]
    }

    fn with_linears(&self, linears: Vec<Linear>) -> Result<Arc<dyn Block>> {
        let [query_key_value, dense, dense_h_to_4h, dense_4h_to_h] = exactly("BLOOM block", linears)?;
        Ok(Arc::new(Self { query_key_value, dense, dense_h_to_4h, dense_4h_to_h, ..self.clone() }))
    }

    fn other_parameters(&self) -> Vec<(usize, String, Tensor)> {
        let norms = [
            (0, "input_layernorm", &self.input_layernorm),
            (2, "post_attention_layernorm", &self.post_attention_layernorm),
        ];
        let both = norms.into_iter().flat_map(|(before, name, norm)| {
            norm.parameters().into_iter().map(move |(part, t)| (before, format!("{name}.{part}"), t.clone()))
        });
        both.collect()
    }

    fn module_tree(&self, name: &str, linear: &dyn Fn(&str, &Linear) -> ModuleNode) -> ModuleNode {
        let (width, eps) = (self.input_layernorm.width(), self.input_layernorm.eps());
        ModuleNode::new(
            name,
            "BloomBlock",
            vec![
                ModuleNode::layer_norm("input_layernorm", width, eps),
                ModuleNode::new(
                    "self_attention",
                    "BloomAttention",
                    vec![
                        linear("query_key_value", &self.query_key_value),
                        linear("dense", &self.dense),
                        ModuleNode::dropout("attention_dropout", self.attention_dropout),
                    ],
                ),
                ModuleNode::layer_norm("post_attention_layernorm", width, eps),
                ModuleNode::new(
                    "mlp",
                    "BloomMLP",
                    vec![
                        linear("dense_h_to_4h", &self.dense_h_to_4h),
                        ModuleNode::leaf("gelu_impl", "BloomGelu()"),
                        linear("dense_4h_to_h", &self.dense_4h_to_h),
                    ],
                ),
            ],
        )
    }

    fn needs(&self, gpu: Option<DType>) -> Needs {
        let c = self.input_layernorm.width();
        let adapted = |linear: &Linear, width: usize| if linear.lora.is_some() { width } else { 0 };
        let adapters =
            adapted(&self.query_key_value, c) + adapted(&self.dense_h_to_4h, c) + adapted(&self.dense_4h_to_h, 4 * c);
        // Both norms' inputs and statistics, the projection, the input of gelu.
        let (saved, statistics) = (2 * c + 3 * c + 4 * c + adapters, 4);
        // Around gelu's backward: dy, its input's gradient and its output's.
        let working = 9 * c;
        if gpu.is_none() {
            return Needs { saved: saved + adapted(&self.dense, c), statistics, working };
        }
        // And attention's output, which is dense's input; the sums of its rows; A x of the adapters.
        let ranks: usize = self.linears().iter().filter_map(|l| Some(l.lora.as_ref()?.rank())).sum();
        let statistics = statistics + self.attention.layout.heads + ranks;
        Needs { saved: saved + c, statistics, working }
    }
}

impl BloomBlock {
    /// Everything but the last linear layer: its input and the residual that goes round it.
    fn up_to_last(&self, x: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
        // What is not needed any more goes at once: each is as large as the batch.
        let normed = self.input_layernorm.of(x); // (M, C)
        let projected = self.query_key_value.forward_normed(&normed, run)?; // (M, heads * 3 * head_dim)
        let residual = self.residual(normed, x, run)?;
        let mixed = self.attention.forward(&projected, run)?; // (M, C)
        drop(projected);
        let x = self.dense.forward(&mixed, Some(&residual), run)?; // (M, C)
        drop((mixed, residual));

        let normed = self.post_attention_layernorm.of(&x); // (M, C)
        let wide = self.dense_h_to_4h.forward_normed_gelu(&normed, run)?; // (M, 4C)
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
        if self.residual_after_norm { norm.backward(&(d + dy)?, None, run) } else { norm.backward(&d, Some(dy), run) }
    }
}

/// Reads a BLOOM. Names may or may not begin with `transformer.`.
pub fn load(config: &BloomConfig, weights: &mut Weights, options: &ModelOptions) -> Result<Decoder> {
    let (c, dtype) = (config.hidden_size, options.torch_dtype);
    let quantization = options.quantization_config.as_ref();
    weights.optional_prefix("transformer.");
    let norm = |weights: &mut Weights, name: &str| {
        let weight = weights.tensor(&format!("{name}.weight"), &[c], dtype)?;
        let bias = weights.tensor(&format!("{name}.bias"), &[c], dtype)?;
        LayerNorm::new(weight, bias, config.layer_norm_epsilon)
    };
    let linear = |weights: &mut Weights, name: &str, out: usize, input: usize| {
        let weight = weights.linear(name, (out, input), dtype, quantization)?;
        let bias = weights.tensor(&format!("{name}.bias"), &[out], dtype)?;
        Ok::<_, Error>(Linear::new(name, weight, Some(bias)))
    };
    let embedding =
        Embedding { weight: weights.table("transformer.word_embeddings.weight", &[config.vocab_size, c], dtype)? };
    let embedding_norm = norm(weights, "transformer.word_embeddings_layernorm")?;
    let attention = Attention {
        layout: HeadLayout::interleaved(config.n_head, c / config.n_head),
        slopes: alibi_slopes(config.n_head),
    };
    let mut blocks: Vec<Arc<dyn Block>> = Vec::with_capacity(config.n_layer);
    for i in 0..config.n_layer {
        let p = format!("transformer.h.{i}");
        blocks.push(Arc::new(BloomBlock {
            input_layernorm: Norm::Layer(norm(weights, &format!("{p}.input_layernorm"))?),
            query_key_value: linear(weights, &format!("{p}.self_attention.query_key_value"), 3 * c, c)?,
            attention: attention.clone(),
            dense: linear(weights, &format!("{p}.self_attention.dense"), c, c)?,
            post_attention_layernorm: Norm::Layer(norm(weights, &format!("{p}.post_attention_layernorm"))?),
            dense_h_to_4h: linear(weights, &format!("{p}.mlp.dense_h_to_4h"), 4 * c, c)?,
            dense_4h_to_h: linear(weights, &format!("{p}.mlp.dense_4h_to_h"), c, 4 * c)?,
            residual_after_norm: config.apply_residual_connection_post_layernorm,
            attention_dropout: config.attention_dropout,
        }));
    }
    let final_norm = norm(weights, "transformer.ln_f")?;
    let (head, tied) = head(weights, &embedding.weight, config.tie_word_embeddings, options)?;
    Ok(Decoder {
        architecture: "BloomForCausalLM",
        names: DecoderNames {
            model: "transformer",
            model_class: "BloomModel",
            embedding: "word_embeddings",
            embedding_norm: "word_embeddings_layernorm",
            blocks: "h",
            final_norm: "ln_f",
            without_parameters: &[],
        },
        head: Linear::new("lm_head", Weight::Dense(head), None),
        tied,
        embedding,
        padding_idx: None,
        embedding_norm: Some(embedding_norm),
        blocks,
        final_norm: Norm::Layer(final_norm),
        kv_width: c,
        recorded: Default::default(),
    })
}
