//! `GenerationConfig`: how text is generated.

use std::hash::{BuildHasher, Hasher, RandomState};

use serde_json::Value;

use crate::error::{Result, ensure};

/// How text is generated. Names and meanings are those of `transformers`.
///
/// What is `None` comes from the checkpoint's `generation_config.json` and, where that is silent
/// too, from the defaults of `transformers`, given with each field. `do_sample` alone is what it
/// says: without it the most likely token is taken, whatever the checkpoint prefers, so that a
/// cell gives the same text each time unless it asks for chance. The checkpoint's own wishes,
/// `do_sample` among them, are `GenerationConfig::from_checkpoint` or a pipeline's
/// `generation_config()`.
///
/// ```
/// use qlora_nb::pipeline::GenerationConfig;
/// let config = GenerationConfig { max_length: Some(500), do_sample: true, ..Default::default() };
/// assert_eq!(config.temperature, None);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Longest sequence in tokens, the prompt counted. Giving it here overrules a
    /// `max_new_tokens` of the checkpoint. Without any limit 20 new tokens are made.
    pub max_length: Option<usize>,
    /// Most tokens to make, the prompt not counted. Wins over `max_length`.
    pub max_new_tokens: Option<usize>,
    /// The end tokens are forbidden before this many tokens were made. Default 0.
    pub min_new_tokens: Option<usize>,
    /// Draw tokens by their probability instead of taking the most likely one.
    pub do_sample: bool,
    /// Logits are divided by it. Sampling only. Default 1.0.
    pub temperature: Option<f64>,
    /// Draw from this many most likely tokens; 0 for all. Sampling only. Default 50.
    pub top_k: Option<usize>,
    /// Draw from the most likely tokens that together have this probability; 1.0 for all.
    /// Sampling only. Default 1.0.
    pub top_p: Option<f64>,
    /// Above 1: tokens of the prompt and of what was made so far become less likely. Default 1.0.
    pub repetition_penalty: Option<f64>,
    /// The tokens that end a sequence. `Some(vec![])` for none.
    pub eos_token_id: Option<Vec<u32>>,
    /// Sequences to make from each prompt; more than one only when sampling. Default 1.
    pub num_return_sequences: Option<usize>,
    /// The same seed gives the same text, for a prompt alone and in a batch. Without one each
    /// call draws its own.
    pub seed: Option<u64>,
}

/// Keys of `generation_config.json` that change what is generated and have no field here, with
/// the value that changes nothing.
const NOT_HERE: [(&str, f64); 20] = [
    ("num_beams", 1.0),
    ("min_length", 0.0),
    ("min_p", 0.0),
    ("top_h", 1.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("guidance_scale", 1.0),
    ("forced_bos_token_id", f64::NAN),
    ("forced_eos_token_id", f64::NAN),
    ("bad_words_ids", f64::NAN),
    ("suppress_tokens", f64::NAN),
    ("begin_suppress_tokens", f64::NAN),
    ("sequence_bias", f64::NAN),
    ("exponential_decay_length_penalty", f64::NAN),
    ("stop_strings", f64::NAN),
    ("watermarking_config", f64::NAN),
    ("max_time", f64::NAN),
    ("penalty_alpha", 0.0),
];

/// Each takes memory before its first token.
const MOST_SEQUENCES: usize = 1024;

impl GenerationConfig {
    /// What a checkpoint's `generation_config.json` asks for.
    pub fn from_checkpoint(defaults: &Value) -> Result<Self> {
        let check = |fine: bool, key: &str, expected: &str| {
            let name = format!("{key} in generation_config.json");
            ensure(fine, &name, &defaults[key], expected, "correct the file, or set the argument yourself")
        };
        let number = |key: &str| {
            let value = &defaults[key];
            check(value.is_null() || value.is_number(), key, "a number").map(|()| value.as_f64())
        };
        let count = |key: &str| -> Result<Option<usize>> {
            let n = number(key)?;
            check(n.is_none_or(|n| n.fract() == 0.0 && (0.0..=1e15).contains(&n)), key, "a count")?;
            Ok(n.map(|n| n as usize))
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let end = &defaults["eos_token_id"];
        let eos_token_id = match end {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        check(end.is_null() || eos_token_id.is_some(), "eos_token_id", "a token id or a list of them")?;
        Ok(Self {
            max_length: count("max_length")?,
            max_new_tokens: count("max_new_tokens")?,
            min_new_tokens: count("min_new_tokens")?,
            do_sample: defaults["do_sample"].as_bool().unwrap_or(false),
            temperature: number("temperature")?,
            top_k: count("top_k")?,
            top_p: number("top_p")?,
            repetition_penalty: number("repetition_penalty")?,
            eos_token_id,
            num_return_sequences: count("num_return_sequences")?,
            seed: None,
        })
    }

    /// This configuration, with what it leaves open taken from `fallback`; `do_sample` is this one's.
    pub fn or(&self, fallback: &GenerationConfig) -> Self {
        // One limit replaces the other kind too: who asks for max_length 500 does not mean the
        // 120 new tokens of some file.
        let limits = if self.max_length.is_some() || self.max_new_tokens.is_some() { self } else { fallback };
        Self {
            max_length: limits.max_length,
            max_new_tokens: limits.max_new_tokens,
            min_new_tokens: self.min_new_tokens.or(fallback.min_new_tokens),
            do_sample: self.do_sample,
            temperature: self.temperature.or(fallback.temperature),
            top_k: self.top_k.or(fallback.top_k),
            top_p: self.top_p.or(fallback.top_p),
            repetition_penalty: self.repetition_penalty.or(fallback.repetition_penalty),
            eos_token_id: self.eos_token_id.clone().or_else(|| fallback.eos_token_id.clone()),
            num_return_sequences: self.num_return_sequences.or(fallback.num_return_sequences),
            seed: self.seed.or(fallback.seed),
        }
    }

    /// What the user may want to know: arguments that have no effect, and wishes of the
    /// checkpoint that cannot be met.
    pub fn notices(&self, defaults: &Value) -> Vec<String> {
        let mut notices = Vec::new();
        if let (Some(length), Some(new)) = (self.max_length, self.max_new_tokens) {
            notices.push(format!(
                "both max_new_tokens (= {new}) and max_length (= {length}) are set; max_new_tokens wins"
            ));
        }
        if !self.do_sample {
            let given = [
                ("temperature", self.temperature.is_some_and(|t| t != 1.0)),
                ("top_k", self.top_k.is_some_and(|k| k != 50)),
                ("top_p", self.top_p.is_some_and(|p| p != 1.0)),
                ("seed", self.seed.is_some()),
            ];
            for (name, _) in given.into_iter().filter(|(_, given)| *given) {
                notices.push(format!("{name} has no effect without do_sample: true"));
            }
        }
        for (key, neutral) in NOT_HERE {
            let value = &defaults[key];
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(fields) => fields.is_empty(),
                value => value.as_f64() == Some(neutral),
            };
            if !off {
                notices
                    .push(format!("generation_config.json asks for {key} = {value}, which is not supported; left out"));
            }
        }
        notices
    }
}

/// A configuration with nothing left open.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Temperature, top_k (0 for all), top_p.
    pub sampling: Option<(f64, usize, f64)>,
    pub repetition_penalty: f64,
    pub eos_token_id: Vec<u32>,
    pub min_new_tokens: usize,
    pub num_return_sequences: usize,
    pub seed: u64,
    max_new_tokens: Option<usize>,
    max_length: Option<usize>,
    /// Of the model: where neither is given there are 20 new tokens, within these.
    max_position_embeddings: Option<usize>,
}

impl Settings {
    pub fn new(config: &GenerationConfig, defaults: &Value) -> Result<Self> {
        let config = config.or(&GenerationConfig::from_checkpoint(defaults)?);
        if let Some(new) = config.max_new_tokens {
            ensure(new > 0, "max_new_tokens", new, "at least 1", "ask for at least one token, or leave it out")?;
        }
        let sampling = (config.temperature.unwrap_or(1.0), config.top_k.unwrap_or(50), config.top_p.unwrap_or(1.0));
        if config.do_sample {
            let (temperature, _, top_p) = sampling;
            let remedy = "for the most likely token at each step set do_sample: false";
            let fine = temperature > 0.0 && temperature.is_finite();
            ensure(fine, "temperature", temperature, "a number above 0", remedy)?;
            let remedy = "use e.g. 0.9, or 1.0 for all tokens";
            ensure(top_p > 0.0 && top_p <= 1.0, "top_p", top_p, "above 0, at most 1", remedy)?;
        }
        let penalty = config.repetition_penalty.unwrap_or(1.0);
        let remedy = "use 1.0 for none, e.g. 1.2 against repetition";
        ensure(penalty > 0.0 && penalty.is_finite(), "repetition_penalty", penalty, "a number above 0", remedy)?;
        let num_return_sequences = config.num_return_sequences.unwrap_or(1);
        let fine = num_return_sequences == 1 || (num_return_sequences > 1 && config.do_sample);
        let expected = "1, or more with do_sample: true: without chance all would be the same";
        let remedy = "set do_sample: true, or leave num_return_sequences out";
        ensure(fine, "num_return_sequences", num_return_sequences, expected, remedy)?;
        let (fine, remedy) = (num_return_sequences <= MOST_SEQUENCES, "call several times, each with another seed");
        let expected = format!("at most {MOST_SEQUENCES} of one prompt");
        ensure(fine, "num_return_sequences", num_return_sequences, &expected, remedy)?;
        Ok(Self {
            sampling: config.do_sample.then_some(sampling),
            repetition_penalty: penalty,
            eos_token_id: config.eos_token_id.unwrap_or_default(),
            min_new_tokens: config.min_new_tokens.unwrap_or(0),
            num_return_sequences,
            seed: config.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()),
            max_new_tokens: config.max_new_tokens,
            max_length: config.max_length,
            max_position_embeddings: defaults["max_position_embeddings"].as_u64().map(|n| n as usize),
        })
    }

    /// How many tokens may follow a prompt.
    pub fn max_new_tokens(&self, prompt: usize, prompt_length: usize) -> Result<usize> {
        let (name, total) = match (self.max_new_tokens, self.max_length, self.max_position_embeddings) {
            (Some(new), ..) => return Ok(new),
            (_, Some(total), _) => ("max_length", total),
            (.., Some(positions)) => ("max_position_embeddings", positions.min(prompt_length + 20)),
            (.., None) => return Ok(20),
        };
        let expected = format!("more than the {prompt_length} tokens of prompt {prompt}: it counts the prompt");
        let remedy = "raise it, set max_new_tokens, or shorten the prompt";
        ensure(total > prompt_length, name, total, &expected, remedy)?;
        Ok(total - prompt_length)
    }
}
