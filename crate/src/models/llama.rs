//! Llama (arXiv:2302.13971) and its successors, as transformers' `modeling_llama.py` computes them; with what its
//! relatives add: see `qwen2`, `qwen3`, `mistral`.

use std::sync::Arc;

use candle_core::Tensor;
use serde_json::Value;

use super::{
    LARGEST_SIZE, config_size,
    decoder::{BlockKind, Description},
    parts::{NormKind, Part, Parts},
    rope_scaling::{BAD_CONFIG, RopeScaling},
};
use crate::{
    backend::{
        operands::{Attention, HeadLayout, Norm, Rope},
        run::Run,
    },
    error::{Error, Result, ensure},
};

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
    /// q_proj, k_proj and v_proj have a bias.
    pub qkv_bias: bool,
    /// o_proj has a bias.
    pub o_bias: bool,
    /// gate_proj, up_proj and down_proj have a bias.
    pub mlp_bias: bool,
    /// Printed in the module tree only.
    pub pad_token_id: Option<usize>,
    /// q and k go through a norm, head by head (Qwen3).
    pub qk_norm: bool,
    /// In the layers that slide a query sees so many keys, its own the last of them (Mistral).
    pub sliding_window: Option<usize>,
    /// Whether each layer slides; empty: all do.
    pub slides: Vec<bool>,
}

/// `sliding_window` of config.json, where a missing one is 4096 and null is none.
pub(super) fn sliding_window(config: &Value) -> Result<Option<usize>> {
    match config.get("sliding_window") {
        None => Ok(Some(4096)),
        Some(Value::Null) => Ok(None),
        Some(_) => config_size(config, &["sliding_window"]).map(Some),
    }
}

/// The window of a Qwen, and which of its layers have it: only with `use_sliding_window`, from `max_window_layers` on,
/// unless `layer_types` names each layer.
pub(super) fn qwen_window(config: &Value, layers: usize) -> Result<(Option<usize>, Vec<bool>)> {
    if config["use_sliding_window"] != true {
        return Ok((None, Vec::new()));
    }
    let first = config["max_window_layers"].as_u64().unwrap_or(28);
    let slides = match config["layer_types"].as_array() {
        Some(types) => types.iter().map(|kind| kind == "sliding_attention").collect(),
        None => (0..layers as u64).map(|layer| layer >= first).collect(),
    };
    Ok((sliding_window(config)?, slides))
}

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
            return Err(Error::unsupported("hidden_act", act, ["silu"], "choose a model with this activation"));
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
            qkv_bias: flag("attention_bias"),
            o_bias: flag("attention_bias"),
            mlp_bias: flag("mlp_bias"),
            pad_token_id: config["pad_token_id"].as_u64().map(|id| id as usize),
            qk_norm: false,
            sliding_window: None,
            slides: Vec::new(),
        };
        let fine = heads.max(this.num_key_value_heads) * this.head_dim <= LARGEST_SIZE;
        let expected = format!("a head_dim of which {heads} heads are not wider than {LARGEST_SIZE}");
        ensure(fine, "head_dim", this.head_dim, &expected, BAD_CONFIG)?;
        let whole = [
            ("num_key_value_heads", this.num_key_value_heads, "a divisor of num_attention_heads", heads),
            ("head_dim: halves", 2, "an even head_dim", this.head_dim),
        ];
        for (name, divisor, expected, of) in whole {
            let fine = of > 0 && of.is_multiple_of(divisor);
            ensure(fine, name, divisor, &format!("{expected}, which is {of}"), BAD_CONFIG)?;
        }
        Ok(this)
    }

    /// The angles of the rotary embedding, radians a position.
    pub fn inv_freq(&self) -> Vec<f32> {
        let plain = Rope::frequencies(self.rope_theta, self.head_dim);
        plain.into_iter().map(|f| self.rope_scaling.apply(f64::from(f)) as f32).collect()
    }
}

/// The network that a config.json describes.
pub fn describe(config: &Value) -> Result<Description> {
    Ok(LlamaConfig::from_json(config)?.describe("Llama"))
}

impl LlamaConfig {
    /// The network, its classes called `class`: `LlamaForCausalLM`, `LlamaModel`, `LlamaMLP`.
    pub fn describe(&self, class: &'static str) -> Description {
        let (c, wide) = (self.hidden_size, self.intermediate_size);
        let layout = HeadLayout::grouped(self.num_attention_heads, self.num_key_value_heads, self.head_dim);
        let norm_kind = NormKind::Rms { eps: self.rms_norm_eps, class: format!("{class}RMSNorm") };
        let norm = |name, width| Part::Norm(name, width, norm_kind.clone());
        let mut attention = vec![
            Part::Linear("q_proj", (layout.width(), c), self.qkv_bias),
            Part::Linear("k_proj", (layout.kv_width(), c), self.qkv_bias),
            Part::Linear("v_proj", (layout.kv_width(), c), self.qkv_bias),
            Part::Linear("o_proj", (c, layout.width()), self.o_bias),
        ];
        if self.qk_norm {
            attention.extend([norm("q_norm", self.head_dim), norm("k_norm", self.head_dim)]);
        }
        let mlp = vec![
            Part::Linear("gate_proj", (wide, c), self.mlp_bias),
            Part::Linear("up_proj", (wide, c), self.mlp_bias),
            Part::Linear("down_proj", (c, wide), self.mlp_bias),
            Part::Plain("act_fn", "SiLUActivation()".into()),
        ];
        let block = vec![
            Part::Module("self_attn", format!("{class}Attention"), attention),
            Part::Module("mlp", format!("{class}MLP"), mlp),
            norm("input_layernorm", c),
            norm("post_attention_layernorm", c),
        ];
        let attention = |window| Attention { layout, slopes: Vec::new(), window };
        let kind = LlamaBlock {
            rope: Rope::new(self.inv_freq()),
            full: attention(None),
            sliding: attention(self.sliding_window),
            slides: self.slides.clone(),
            working: c + 3 * wide,
        };
        Description {
            class,
            model: "model",
            prefix: "model.",
            vocab_size: self.vocab_size,
            hidden_size: c,
            num_layers: self.num_hidden_layers,
            embedding: "embed_tokens",
            padding_idx: self.pad_token_id,
            embedding_norm: None,
            blocks: "layers",
            block: (format!("{class}DecoderLayer"), block),
            kind: Arc::new(kind),
            computed: &["self_attn.rotary_emb.inv_freq"],
            final_norm: ("norm", norm_kind.clone()),
            plain: vec![("rotary_emb", format!("{class}RotaryEmbedding()"))],
            tied: self.tie_word_embeddings,
            kv_width: layout.kv_width(),
        }
    }
}

/// One transformer block.
struct LlamaBlock {
    rope: Rope,
    full: Attention,
    sliding: Attention,
    slides: Vec<bool>,
    working: usize,
}

impl LlamaBlock {
    /// That of the layer that runs.
    fn attention(&self, run: &Run) -> &Attention {
        if self.slides.get(run.block).copied().unwrap_or(true) { &self.sliding } else { &self.full }
    }
}

impl LlamaBlock {
    /// What `down_proj` reads, and the residual that it adds to.
    fn up_to_last(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
        // What is not needed any more goes at once: each is as large as the batch.
        let normed = parts.norm("input_layernorm")?.of(x); // (M, C)
        let mut q = parts.linear("q_proj")?.forward(&normed, run)?; // (M, heads * head_dim)
        let mut k = parts.linear("k_proj")?.forward(&normed, run)?; // (M, kv_heads * head_dim)
        let v = parts.linear("v_proj")?.forward(&normed, run)?; // (M, kv_heads * head_dim)
        drop(normed);
        if let (Some(q_norm), Some(k_norm)) = (parts.optional_norm("q_norm"), parts.optional_norm("k_norm")) {
            q = of_heads(&q, q_norm, |heads| q_norm.forward(heads, run))?;
            k = of_heads(&k, k_norm, |heads| k_norm.forward(heads, run))?;
        }
        let joined = self.rope.join([&q, &k, &v], &self.full.layout, run)?; // (M, (heads + 2 kv_heads) * head_dim)
        drop((q, k, v));
        let mixed = self.attention(run).forward(&joined, run)?; // (M, heads * head_dim)
        drop(joined);
        let x = parts.linear("o_proj")?.forward_onto(&mixed, x, run)?; // (M, C)
        drop(mixed);

        let normed = parts.norm("post_attention_layernorm")?.of(&x); // (M, C)
        let gate = parts.linear("gate_proj")?.forward(&normed, run)?; // (M, I)
        let up = parts.linear("up_proj")?.forward(&normed, run)?; // (M, I)
        drop(normed);
        let wide = run.backend.swiglu(&gate, &up, run)?; // (M, I)
        Ok((wide, x))
    }
}

impl BlockKind for LlamaBlock {
    fn forward(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (wide, x) = self.up_to_last(parts, x, run)?;
        parts.linear("down_proj")?.forward_onto(&wide, &x, run) // (M, C)
    }

    fn recompute(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<()> {
        let (wide, _) = self.up_to_last(parts, x, run)?;
        parts.linear("down_proj")?.remember(&wide, run)
    }

    fn backward(&self, parts: &Parts, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        let backend = run.backend;
        let d = parts.linear("down_proj")?.backward_through(dy, run)?; // (M, I)
        let (dgate, dup) = backend.swiglu_backward(&d, run)?; // (M, I) each
        drop(d);
        let up = parts.linear("up_proj")?.backward_through(&dup, run)?; // (M, C)
        let gate = parts.linear("gate_proj")?.backward_through(&dgate, run)?; // (M, C)
        drop((dgate, dup));
        let d = backend.add(&up, &gate)?; // (M, C)
        drop((up, gate));
        let dx = parts.norm("post_attention_layernorm")?.backward(&d, Some(dy), run)?; // (M, C)

        let mut d = parts.linear("o_proj")?.backward_through(&dx, run)?; // (M, heads * head_dim)
        d = self.attention(run).backward(&d, run)?; // (M, (heads + 2 kv_heads) * head_dim)
        let [mut dq, mut dk, dv] = self.rope.split(&d, &self.full.layout, run)?;
        drop(d);
        if let (Some(q_norm), Some(k_norm)) = (parts.optional_norm("q_norm"), parts.optional_norm("k_norm")) {
            dk = of_heads(&dk, k_norm, |heads| k_norm.backward(heads, None, run))?;
            dq = of_heads(&dq, q_norm, |heads| q_norm.backward(heads, None, run))?;
        }
        let v = parts.linear("v_proj")?.backward(&dv, need_dx, run)?; // (M, C)
        let k = parts.linear("k_proj")?.backward(&dk, need_dx, run)?; // (M, C)
        let q = parts.linear("q_proj")?.backward(&dq, need_dx, run)?; // (M, C)
        let (Some(q), Some(k), Some(v)) = (q, k, v) else { return Ok(None) };
        let d = backend.add(&backend.add(&q, &k)?, &v)?;
        drop((q, k, v));
        Ok(Some(parts.norm("input_layernorm")?.backward(&d, Some(&dx), run)?))
    }

    /// Around swiglu's backward: dy, the gradient of its output and those of its two inputs.
    fn working(&self) -> usize {
        self.working
    }
}

/// Runs `f` on `[M, heads * head_dim]` as rows of one head each: a norm of head_dim numbers.
fn of_heads(x: &Tensor, norm: &Norm, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let rows = x.elem_count() / norm.width();
    Ok(f(&x.reshape((rows, norm.width()))?)?.reshape(x.dims())?) // (M * heads, head_dim) inside
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
