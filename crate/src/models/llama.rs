//! Llama (arXiv:2302.13971) and its successors, as transformers' `modeling_llama.py` computes them.

use std::{f64::consts::PI, sync::Arc};

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
        attention::{Attention, HeadLayout},
        embedding::Embedding,
        linear::{Linear, Weight},
        norm::Norm,
        rms_norm::RmsNorm,
        rope::Rope,
        run::Run,
        swiglu,
    },
    module_tree::ModuleNode,
};

/// The class of the norms, as PyTorch prints it.
pub const RMS_NORM: &str = "LlamaRMSNorm";

/// config.json of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Fewer than the heads: several queries share a key (GQA, arXiv:2305.13245).
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    /// q_proj, k_proj, v_proj and o_proj have a bias.
    pub attention_bias: bool,
    /// gate_proj, up_proj and down_proj have a bias.
    pub mlp_bias: bool,
    /// Printed in the module tree only.
    pub pad_token_id: Option<usize>,
}

/// How the angles of positions beyond those of the first training are slowed down.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All by one factor.
    Linear { factor: f64 },
    /// Llama 3.1's: the slow angles by `factor`, the fast ones not, those between gradually.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
}

impl RopeScaling {
    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` (before).
    pub(crate) fn from_json(config: &Value, rope: &Value) -> Result<Self> {
        let unsupported = |what: &str, got: &Value, supported: &[&str]| Error::Unsupported {
            what: what.into(),
            got: got.as_str().map_or_else(|| got.to_string(), String::from),
            supported: supported.iter().map(|s| s.to_string()).collect(),
            remedy: "choose a model whose config.json has one of these".into(),
        };
        for partial in [&rope["partial_rotary_factor"], &config["partial_rotary_factor"]] {
            if partial.as_f64().is_some_and(|f| f != 1.0) {
                return Err(unsupported("partial_rotary_factor", partial, &["1.0"]));
            }
        }
        let number = |name: &str| {
            rope[name].as_f64().filter(|v| *v > 0.0).ok_or_else(|| {
                let expected = "a positive number, which this rope_type needs";
                Error::argument(&format!("{name} of the RoPE parameters"), &rope[name], expected, BAD_CONFIG)
            })
        };
        let kind = if rope["rope_type"].is_null() { &rope["type"] } else { &rope["rope_type"] };
        Ok(match kind.as_str() {
            None if kind.is_null() => Self::Default,
            Some("default") => Self::Default,
            Some("linear") => Self::Linear { factor: number("factor")? },
            Some("llama3") => Self::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: match &rope["original_max_position_embeddings"] {
                    Value::Null => config_size(config, &["max_position_embeddings"])? as f64,
                    _ => number("original_max_position_embeddings")?,
                },
            },
            _ => return Err(unsupported("rope_type", kind, &["default", "linear", "llama3"])),
        })
    }

    /// What a frequency (radians a position) becomes.
    pub(crate) fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                // Turns that the angle makes over the first training's context.
                let turns = original_max_position_embeddings * frequency / (2.0 * PI);
                if turns > high_freq_factor {
                    frequency
                } else if turns < low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

const BAD_CONFIG: &str = "get the model's config.json again";

impl LlamaConfig {
    /// Reads config.json; what is left out has transformers' default.
    pub fn from_json(config: &Value) -> Result<Self> {
        let or = |name: &str, default: usize| match &config[name] {
            Value::Null => Ok(default),
            _ => config_size(config, &[name]),
        };
        let flag = |name: &str| config[name].as_bool().unwrap_or(false);
        let (hidden_size, heads) =
            (config_size(config, &["hidden_size"])?, config_size(config, &["num_attention_heads"])?);
        if let Some(act) = config["hidden_act"].as_str().filter(|a| *a != "silu") {
            return Err(Error::Unsupported {
                what: "hidden_act".into(),
                got: act.into(),
                supported: vec!["silu".into()],
                remedy: "choose a model with this activation".into(),
            });
        }
        let rope = ["rope_parameters", "rope_scaling"].into_iter().map(|name| &config[name]).find(|r| r.is_object());
        let rope = rope.unwrap_or(&Value::Null);
        let this = Self {
            vocab_size: config_size(config, &["vocab_size"])?,
            hidden_size,
            intermediate_size: config_size(config, &["intermediate_size"])?,
            num_hidden_layers: config_size(config, &["num_hidden_layers"])?,
            num_attention_heads: heads,
            num_key_value_heads: or("num_key_value_heads", heads)?,
            head_dim: or("head_dim", hidden_size / heads)?,
            rms_norm_eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope_theta: rope["rope_theta"].as_f64().or(config["rope_theta"].as_f64()).unwrap_or(10_000.0),
            rope_scaling: RopeScaling::from_json(config, rope)?,
            tie_word_embeddings: flag("tie_word_embeddings"),
            attention_bias: flag("attention_bias"),
            mlp_bias: flag("mlp_bias"),
            pad_token_id: config["pad_token_id"].as_u64().map(|id| id as usize),
        };
        // Beyond any model: a damaged file must not ask for that much memory.
        let wide = [heads, this.num_key_value_heads].map(|n| n.checked_mul(this.head_dim));
        if wide.into_iter().any(|width| width.is_none_or(|w| w > 1 << 24)) {
            let expected = format!("a head_dim of which {heads} heads are not wider than 2^24");
            return Err(Error::argument("head_dim", this.head_dim, &expected, BAD_CONFIG));
        }
        let whole = [
            ("num_key_value_heads", this.num_key_value_heads, "a divisor of num_attention_heads", heads),
            ("head_dim: halves", 2, "an even head_dim", this.head_dim),
        ];
        for (name, divisor, expected, of) in whole {
            if of == 0 || !of.is_multiple_of(divisor) {
                return Err(Error::argument(name, divisor, &format!("{expected}, which is {of}"), BAD_CONFIG));
            }
        }
        Ok(this)
    }

    /// The angles of the rotary embedding, radians a position.
    pub fn inv_freq(&self) -> Vec<f32> {
        let plain = Rope::frequencies(self.rope_theta, self.head_dim);
        plain.into_iter().map(|f| self.rope_scaling.apply(f64::from(f)) as f32).collect()
    }
}

/// One transformer block.
#[derive(Clone)]
struct LlamaBlock {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    rope: Rope,
    attention: Attention,
    o_proj: Linear,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    input_layernorm: Norm,
    post_attention_layernorm: Norm,
}

impl Block for LlamaBlock {
    fn forward(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        // What is not needed any more goes at once: each is as large as the batch.
        let normed = self.input_layernorm.of(x); // (M, C)
        let q = self.q_proj.forward_normed(&normed, run)?; // (M, heads * head_dim)
        let k = self.k_proj.forward_normed(&normed, run)?; // (M, kv_heads * head_dim)
        let v = self.v_proj.forward_normed(&normed, run)?; // (M, kv_heads * head_dim)
        drop(normed);
        let joined = self.rope.join(&q, &k, &v, &self.attention.layout, run)?; // (M, (heads + 2 kv_heads) * head_dim)
        drop((q, k, v));
        let mixed = self.attention.forward(&joined, run)?; // (M, heads * head_dim)
        drop(joined);
        let x = self.o_proj.forward(&mixed, Some(x), run)?; // (M, C)
        drop(mixed);

        let normed = self.post_attention_layernorm.of(&x); // (M, C)
        let gate = self.gate_proj.forward_normed(&normed, run)?; // (M, I)
        let up = self.up_proj.forward_normed(&normed, run)?; // (M, I)
        drop(normed);
        let wide = swiglu::forward(&gate, &up, run)?; // (M, I)
        drop((gate, up));
        self.down_proj.forward(&wide, Some(&x), run) // (M, C)
    }

    fn backward(&self, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        let d = through(&self.down_proj, dy, run)?; // (M, I)
        let (dgate, dup) = swiglu::backward(&d, run)?; // (M, I) each
        drop(d);
        let d = (through(&self.up_proj, &dup, run)? + through(&self.gate_proj, &dgate, run)?)?; // (M, C)
        drop((dgate, dup));
        let dx = self.post_attention_layernorm.backward(&d, Some(dy), run)?; // (M, C)

        let mut d = through(&self.o_proj, &dx, run)?; // (M, heads * head_dim)
        d = self.attention.backward(&d, run)?; // (M, (heads + 2 kv_heads) * head_dim)
        let [dq, dk, dv] = self.rope.split(&d, &self.attention.layout, run)?;
        drop(d);
        let v = self.v_proj.backward(&dv, need_dx, run)?; // (M, C)
        let k = self.k_proj.backward(&dk, need_dx, run)?; // (M, C)
        let q = self.q_proj.backward(&dq, need_dx, run)?; // (M, C)
        let (Some(q), Some(k), Some(v)) = (q, k, v) else { return Ok(None) };
        Ok(Some(self.input_layernorm.backward(&((q + k)? + v)?, Some(&dx), run)?))
    }

    fn linears(&self) -> Vec<&Linear> {
        vec![&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj, &self.gate_proj, &self.up_proj, &self.down_proj]
    }

    fn with_linears(&self, linears: Vec<Linear>) -> Result<Arc<dyn Block>> {
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = exactly("Llama block", linears)?;
        Ok(Arc::new(Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, ..self.clone() }))
    }

    fn other_parameters(&self) -> Vec<(usize, String, Tensor)> {
        let norms =
            [("input_layernorm", &self.input_layernorm), ("post_attention_layernorm", &self.post_attention_layernorm)];
        // Behind all 7 linears: the order in which transformers makes the modules.
        let both = norms.into_iter().flat_map(|(name, norm)| {
            norm.parameters().into_iter().map(move |(part, t)| (7, format!("{name}.{part}"), t.clone()))
        });
        both.collect()
    }

    fn module_tree(&self, name: &str, linear: &dyn Fn(&str, &Linear) -> ModuleNode) -> ModuleNode {
        let width = self.input_layernorm.width();
        let norm = |name: &str, norm: &Norm| ModuleNode::rms_norm(name, RMS_NORM, width, norm.eps());
        ModuleNode::new(
            name,
            "LlamaDecoderLayer",
            vec![
                ModuleNode::new(
                    "self_attn",
                    "LlamaAttention",
                    vec![
                        linear("q_proj", &self.q_proj),
                        linear("k_proj", &self.k_proj),
                        linear("v_proj", &self.v_proj),
                        linear("o_proj", &self.o_proj),
                    ],
                ),
                ModuleNode::new(
                    "mlp",
                    "LlamaMLP",
                    vec![
                        linear("gate_proj", &self.gate_proj),
                        linear("up_proj", &self.up_proj),
                        linear("down_proj", &self.down_proj),
                        ModuleNode::leaf("act_fn", "SiLUActivation()"),
                    ],
                ),
                norm("input_layernorm", &self.input_layernorm),
                norm("post_attention_layernorm", &self.post_attention_layernorm),
            ],
        )
    }

    fn needs(&self, gpu: Option<DType>) -> Needs {
        let (c, layout, wide) = (self.hidden_size(), &self.attention.layout, self.intermediate_size());
        let mixed = layout.heads * layout.head_dim;
        // What an adapter keeps is shared by the layers that read the same.
        let adapted =
            |linears: &[&Linear], width: usize| if linears.iter().any(|l| l.lora.is_some()) { width } else { 0 };
        let adapters = adapted(&[&self.q_proj, &self.k_proj, &self.v_proj], c)
            + adapted(&[&self.gate_proj, &self.up_proj], c)
            + adapted(&[&self.down_proj], wide);
        // Both norms' inputs and statistics, the joined projections, gate and up.
        let (saved, statistics) = (2 * c + layout.row + 2 * wide + adapters, 2);
        // Around swiglu's backward: dy, the gradient of its output and those of its two inputs.
        let working = c + 3 * wide;
        if gpu.is_none() {
            return Needs { saved: saved + adapted(&[&self.o_proj], mixed), statistics, working };
        }
        // And attention's output, which is o_proj's input; the sums of its rows; A x of the adapters.
        let ranks: usize = self.linears().iter().filter_map(|l| Some(l.lora.as_ref()?.rank())).sum();
        // A GPU's norms keep two numbers a row.
        Needs { saved: saved + mixed, statistics: 2 * statistics + layout.heads + ranks, working }
    }
}

impl LlamaBlock {
    fn hidden_size(&self) -> usize {
        self.input_layernorm.width()
    }

    fn intermediate_size(&self) -> usize {
        self.gate_proj.weight.dims2().map_or(0, |(out, _)| out)
    }
}

/// Reads a Llama. Names may or may not begin with `model.`.
pub fn load(config: &LlamaConfig, weights: &mut Weights, options: &ModelOptions) -> Result<Decoder> {
    let (c, wide, dtype) = (config.hidden_size, config.intermediate_size, options.torch_dtype);
    let (heads, kv_heads) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let quantization = options.quantization_config.as_ref();
    weights.optional_prefix("model.");
    let norm = |weights: &mut Weights, name: &str| {
        let weight = weights.tensor(&format!("{name}.weight"), &[c], dtype)?;
        RmsNorm::new(weight, config.rms_norm_eps).map(Norm::Rms)
    };
    let linear = |weights: &mut Weights, name: &str, (out, input): (usize, usize), has_bias: bool| {
        let weight = weights.linear(name, (out, input), dtype, quantization)?;
        let bias = has_bias.then(|| weights.tensor(&format!("{name}.bias"), &[out], dtype)).transpose()?;
        Ok::<_, Error>(Linear::new(name, weight, bias))
    };
    let embedding = Embedding { weight: weights.table("model.embed_tokens.weight", &[config.vocab_size, c], dtype)? };
    let attention = Attention {
        layout: HeadLayout::grouped(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        slopes: Vec::new(),
    };
    let rope = Rope::new(config.inv_freq());
    let mut blocks: Vec<Arc<dyn Block>> = Vec::new();
    for i in 0..config.num_hidden_layers {
        let p = format!("model.layers.{i}");
        let attention_linear = |weights: &mut Weights, name: &str, shape| {
            linear(weights, &format!("{p}.self_attn.{name}"), shape, config.attention_bias)
        };
        let q_proj = attention_linear(weights, "q_proj", (heads, c))?;
        let k_proj = attention_linear(weights, "k_proj", (kv_heads, c))?;
        let v_proj = attention_linear(weights, "v_proj", (kv_heads, c))?;
        let o_proj = attention_linear(weights, "o_proj", (c, heads))?;
        let mlp_linear = |weights: &mut Weights, name: &str, shape| {
            linear(weights, &format!("{p}.mlp.{name}"), shape, config.mlp_bias)
        };
        blocks.push(Arc::new(LlamaBlock {
            q_proj,
            k_proj,
            v_proj,
            rope: rope.clone(),
            attention: attention.clone(),
            o_proj,
            gate_proj: mlp_linear(weights, "gate_proj", (wide, c))?,
            up_proj: mlp_linear(weights, "up_proj", (wide, c))?,
            down_proj: mlp_linear(weights, "down_proj", (c, wide))?,
            input_layernorm: norm(weights, &format!("{p}.input_layernorm"))?,
            post_attention_layernorm: norm(weights, &format!("{p}.post_attention_layernorm"))?,
        }));
        // A buffer that older checkpoints keep; it is computed.
        weights.ignore(&format!("{p}.self_attn.rotary_emb.inv_freq"));
    }
    let final_norm = norm(weights, "model.norm")?;
    let (head, tied) = head(weights, &embedding.weight, config.tie_word_embeddings, options)?;
    Ok(Decoder {
        architecture: "LlamaForCausalLM",
        names: DecoderNames {
            model: "model",
            model_class: "LlamaModel",
            embedding: "embed_tokens",
            embedding_norm: "",
            blocks: "layers",
            final_norm: "norm",
            without_parameters: &[("rotary_emb", "LlamaRotaryEmbedding()")],
        },
        head: Linear::new("lm_head", Weight::Dense(head), None),
        tied,
        embedding,
        padding_idx: config.pad_token_id,
        embedding_norm: None,
        blocks,
        final_norm,
        kv_width: kv_heads,
        recorded: Default::default(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(changes: Value) -> Result<LlamaConfig> {
        let mut config = json!({"vocab_size": 160, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64});
        if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
            config.extend(changes);
        }
        LlamaConfig::from_json(&config)
    }

    #[test]
    fn old_and_new_configurations_say_the_same() {
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}});
        let new = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}});
        assert_eq!(config(old).unwrap(), config(new).unwrap());
        let plain = config(json!({})).unwrap();
        assert_eq!((plain.head_dim, plain.rope_theta, plain.tie_word_embeddings), (8, 1e4, false));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (changes, named) in [
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), "yarn"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "factor"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"num_key_value_heads": 4}), "num_key_value_heads"),
            (json!({"head_dim": 7}), "head_dim"),
            (json!({"hidden_size": 0}), "hidden_size"),
        ] {
            let error = config(changes).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
