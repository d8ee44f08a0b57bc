//! `LoraConfig`: what an adapter looks like.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::target_modules::{TargetModules, compile};
use crate::{
    error::{Result, ensure},
    names::with_defaults,
};

with_defaults! {
/// The configuration of a LoRA adapter. Fields and defaults are PEFT's; what PEFT can do and
/// this crate cannot (trained biases, other starts, ...) is not a field, and a file that asks for it is refused.
///
/// ```
/// use qlora_nb::peft::config::{LoraConfig, TaskType};
/// let config = LoraConfig {
///     task_type: TaskType::CausalLm, r: 16, target_modules: ["query_key_value"].into(), ..Default::default()
/// };
/// assert_eq!(config.scaling_of("transformer.h.0.self_attention.query_key_value")?, 0.5);
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// What the model is for.
    #[serde(skip_deserializing)]
    pub task_type: TaskType = TaskType::CausalLm,
    /// Rank of the update: `lora_A` is `[r, in]`, `lora_B` is `[out, r]`.
    pub r: usize = 8,
    /// The update is multiplied by `lora_alpha / r`.
    pub lora_alpha: usize = 8,
    /// Probability of dropping each input element of the adapter in training, 0 to below 1.
    pub lora_dropout: f64 = 0.0,
    /// The linear layers to adapt: names, `"all-linear"` or a regular expression.
    pub target_modules: TargetModules = TargetModules::ModelDefault,
    /// Layers that stay as they are though `target_modules` matches them.
    pub exclude_modules: Option<TargetModules> = None,
    /// Modules that learn whole, beside the adapters, and are saved with them: names, or ends of names, of the output head
    /// (`lm_head`) and the table of embeddings. A copy in f32 learns. Where the two are tied and only one is named, they
    /// part, as in PEFT.
    pub modules_to_save: Option<Vec<String>> = None,
    /// Multiply by `lora_alpha / sqrt(r)` instead.
    pub use_rslora: bool = false,
    /// Learn the length of each row of the adapted weight apart from its direction (DoRA, arXiv:2402.09353).
    pub use_dora: bool = false,
    /// How `lora_A` and `lora_B` start.
    pub init_lora_weights: InitLoraWeights = InitLoraWeights::Default,
    /// Adapt these layers only, counted from 0. Not together with a regular expression.
    pub layers_to_transform: Option<Vec<usize>> = None,
    /// The name of the list of layers in the module paths (`h`, `layers`), where it is not plain.
    pub layers_pattern: Option<Vec<String>> = None,
    /// Other ranks for some layers: name or regular expression, rank.
    pub rank_pattern: BTreeMap<String, usize> = BTreeMap::new(),
    /// Other alphas for some layers: name or regular expression, alpha.
    pub alpha_pattern: BTreeMap<String, usize> = BTreeMap::new(),
    /// The base model. `get_peft_model` fills it in.
    pub base_model_name_or_path: Option<String> = None,
    /// The base model's revision on the hub.
    pub revision: Option<String> = None,
    /// The adapter is for use, not for training. Saved adapters say so.
    pub inference_mode: bool = false,
    /// The release of PEFT that wrote the file; by default the one whose format this is.
    pub peft_version: Option<String> = None,
}
}

/// What a model is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum TaskType {
    /// Predicting the next token, `CAUSAL_LM`.
    #[default]
    #[serde(rename = "CAUSAL_LM")]
    CausalLm,
}

/// How an adapter starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Value", try_from = "Value")]
pub enum InitLoraWeights {
    /// A from `kaiming_uniform(a = sqrt 5)`, B zero: the adapter starts as no change. `True` in PEFT.
    #[default]
    Default,
    /// A from a normal distribution of deviation 1/r, B zero. `"gaussian"` in PEFT.
    Gaussian,
    /// A and B both from `kaiming_uniform(a = sqrt 5)`: the adapter starts as a random change, for
    /// tests. `False` in PEFT.
    Random,
}

impl From<bool> for InitLoraWeights {
    fn from(default: bool) -> Self {
        if default { Self::Default } else { Self::Random }
    }
}

impl From<InitLoraWeights> for Value {
    fn from(init: InitLoraWeights) -> Self {
        match init {
            InitLoraWeights::Default => true.into(),
            InitLoraWeights::Random => false.into(),
            InitLoraWeights::Gaussian => "gaussian".into(),
        }
    }
}

impl TryFrom<Value> for InitLoraWeights {
    type Error = &'static str;

    fn try_from(value: Value) -> Result<Self, &'static str> {
        match value {
            Value::Bool(default) => Ok(default.into()),
            Value::String(name) if name == "gaussian" => Ok(Self::Gaussian),
            _ => Err("expected true, false or \"gaussian\""),
        }
    }
}

impl LoraConfig {
    /// Refuses values outside their domains.
    pub fn validate(&self) -> Result<()> {
        // Larger is no adapter: a damaged file must not ask for that much memory.
        let (ranks, rank) = (1..=1 << 14, "a rank of 1 to 16384");
        ensure(ranks.contains(&self.r), "r", self.r, rank, "use 8")?;
        for (name, r) in &self.rank_pattern {
            ensure(ranks.contains(r), &format!("rank_pattern[{name:?}]"), r, rank, "use 8, or exclude_modules")?;
        }
        for (field, patterns) in [("rank_pattern", &self.rank_pattern), ("alpha_pattern", &self.alpha_pattern)] {
            patterns.keys().try_for_each(|pattern| compile(pattern, field).map(drop))?;
        }
        let (p, remedy) = (self.lora_dropout, "use 0.0, or a small value like 0.05");
        ensure((0.0..1.0).contains(&p), "lora_dropout", p, "0 to below 1", remedy)?;
        let none_named = matches!(&self.target_modules, TargetModules::Names(names) if names.is_empty());
        let remedy = "name the layers, e.g. [\"query_key_value\"].into(), or use \"all-linear\".into()";
        ensure(!none_named, "target_modules", "[]", "at least one name", remedy)?;
        let by_regex = matches!(self.target_modules, TargetModules::Regex(_));
        let fine = self.layers_to_transform.is_none() || !by_regex;
        let expected = "none beside a regular expression in target_modules";
        ensure(fine, "layers_to_transform", "set", expected, "name the layers' numbers in the expression")?;
        let fine = self.layers_to_transform.is_some() || self.layers_pattern.as_ref().is_none_or(|p| p.is_empty());
        let remedy = "set layers_to_transform, or leave layers_pattern out";
        ensure(fine, "layers_pattern", "set", "none without layers_to_transform", remedy)?;
        let modules =
            [("target_modules", Some(&self.target_modules)), ("exclude_modules", self.exclude_modules.as_ref())];
        for (field, modules) in modules {
            if let Some(modules) = modules.filter(|modules| **modules != TargetModules::ModelDefault) {
                drop(modules.matcher(field)?);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::error::Error;

    #[test]
    fn a_configuration_prints_as_in_peft() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/peft/config_cases.json");
        let cases: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for case in cases["cases"].as_array().unwrap() {
            let mut args = case["args"].clone();
            args["peft_type"] = "LORA".into();
            let mut config = LoraConfig::from_json_str(&args.to_string(), Path::new("case")).unwrap();
            if let TargetModules::Names(names) = &mut config.target_modules {
                names.sort();
            }
            // One number or one name stays what it was in PEFT; here it is a list of one.
            let mut expected = case["repr"].as_str().unwrap().to_string();
            for (one, list) in [("transform=1,", "transform=[1],"), ("layers_pattern='h',", "layers_pattern=['h'],")] {
                expected = expected.replace(one, list);
            }
            assert_eq!(config.to_string(), expected);
        }
    }

    #[test]
    fn values_outside_their_domain_are_refused() {
        let ok = LoraConfig { target_modules: ["dense"].into(), ..Default::default() };
        ok.validate().unwrap();
        let pattern = |n| BTreeMap::from([("dense(".to_string(), n)]);
        for (field, config) in [
            ("r", LoraConfig { r: 0, ..ok.clone() }),
            ("lora_dropout", LoraConfig { lora_dropout: 1.0, ..ok.clone() }),
            ("lora_dropout", LoraConfig { lora_dropout: f64::NAN, ..ok.clone() }),
            ("target_modules", LoraConfig { target_modules: Vec::<String>::new().into(), ..ok.clone() }),
            ("target_modules", LoraConfig { target_modules: "(".into(), ..ok.clone() }),
            ("exclude_modules", LoraConfig { exclude_modules: Some("(".into()), ..ok.clone() }),
            ("layers_pattern", LoraConfig { layers_pattern: Some(vec!["h".into()]), ..ok.clone() }),
            ("rank_pattern", LoraConfig { rank_pattern: pattern(0), ..ok.clone() }),
            ("rank_pattern", LoraConfig { rank_pattern: pattern(1), ..ok.clone() }),
            ("alpha_pattern", LoraConfig { alpha_pattern: pattern(1), ..ok.clone() }),
            (
                "layers_to_transform",
                LoraConfig { target_modules: ".*dense".into(), layers_to_transform: Some(vec![0]), ..ok.clone() },
            ),
        ] {
            let error = config.validate().unwrap_err();
            assert!(matches!(&error, Error::InvalidArgument { name, .. } if name.starts_with(field)), "{error}");
        }
    }
}
