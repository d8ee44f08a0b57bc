//! `LoraConfig`: what an adapter looks like.

use std::{collections::BTreeMap, fmt};

use serde_json::Value;

use super::{
    config_file::peft_defaults,
    targets::{Matcher, TargetModules, compile},
};
use crate::{
    error::{Error, Result},
    py_repr::{py_bool, py_float, py_str},
};

/// The configuration of a LoRA adapter. Fields and defaults are PEFT's; what PEFT can do and
/// this crate cannot (DoRA, trained biases, ...) is not a field, and a file that asks for it is refused.
///
/// ```
/// use qlora_nb::peft::config::{LoraConfig, TaskType};
/// let config = LoraConfig {
///     task_type: TaskType::CausalLm, r: 16, target_modules: ["query_key_value"].into(), ..Default::default()
/// };
/// assert_eq!(config.scaling_of("transformer.h.0.self_attention.query_key_value")?, 0.5);
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// What the model is for.
    pub task_type: TaskType,
    /// Rank of the update: `lora_A` is `[r, in]`, `lora_B` is `[out, r]`.
    pub r: usize,
    /// The update is multiplied by `lora_alpha / r`.
    pub lora_alpha: usize,
    /// Probability of dropping each input element of the adapter in training, 0 to below 1.
    pub lora_dropout: f64,
    /// The linear layers to adapt: names, `"all-linear"` or a regular expression.
    pub target_modules: TargetModules,
    /// Layers that stay as they are though `target_modules` matches them.
    pub exclude_modules: Option<TargetModules>,
    /// Multiply by `lora_alpha / sqrt(r)` instead.
    pub use_rslora: bool,
    /// How `lora_A` and `lora_B` start.
    pub init_lora_weights: InitLoraWeights,
    /// Adapt these layers only, counted from 0. Not together with a regular expression.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The name of the list of layers in the module paths (`h`, `layers`), where it is not plain.
    pub layers_pattern: Option<Vec<String>>,
    /// Other ranks for some layers: name or regular expression, rank.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other alphas for some layers: name or regular expression, alpha.
    pub alpha_pattern: BTreeMap<String, usize>,
    /// The base model. `get_peft_model` fills it in.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision on the hub.
    pub revision: Option<String>,
    /// The adapter is for use, not for training. Saved adapters say so.
    pub inference_mode: bool,
    /// The release of PEFT that wrote the file; by default the one whose format this is.
    pub peft_version: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            task_type: TaskType::CausalLm,
            r: 8,
            lora_alpha: 8,
            lora_dropout: 0.0,
            target_modules: TargetModules::ModelDefault,
            exclude_modules: None,
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Default,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            base_model_name_or_path: None,
            revision: None,
            inference_mode: false,
            peft_version: None,
        }
    }
}

/// What a model is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskType {
    /// Predicting the next token, `CAUSAL_LM`.
    #[default]
    CausalLm,
}

/// How an adapter starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

impl LoraConfig {
    /// Refuses values outside their domains.
    pub fn validate(&self) -> Result<()> {
        let refuse = |name: &str, got: &dyn fmt::Display, expected: &str, remedy: &str| {
            Err(Error::argument(name, got, expected, remedy))
        };
        if self.r == 0 {
            return refuse("r", &self.r, "a rank of at least 1", "use 8");
        }
        if let Some((name, r)) = self.rank_pattern.iter().find(|(_, r)| **r == 0) {
            return refuse(&format!("rank_pattern[{name:?}]"), r, "a rank of at least 1", "use 8, or exclude_modules");
        }
        for (field, patterns) in [("rank_pattern", &self.rank_pattern), ("alpha_pattern", &self.alpha_pattern)] {
            for pattern in patterns.keys() {
                compile(pattern, field)?;
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return refuse("lora_dropout", &self.lora_dropout, "0 to below 1", "use 0.0, or a small value like 0.05");
        }
        if matches!(&self.target_modules, TargetModules::Names(names) if names.is_empty()) {
            let remedy = "name the layers, e.g. [\"query_key_value\"].into(), or use \"all-linear\".into()";
            return refuse("target_modules", &"[]", "at least one name", remedy);
        }
        if self.layers_to_transform.is_some() && matches!(self.target_modules, TargetModules::Regex(_)) {
            let expected = "none beside a regular expression in target_modules";
            return refuse("layers_to_transform", &"set", expected, "name the layers' numbers in the expression");
        }
        if self.layers_pattern.as_ref().is_some_and(|p| !p.is_empty()) && self.layers_to_transform.is_none() {
            let expected = "none without layers_to_transform";
            return refuse("layers_pattern", &"set", expected, "set layers_to_transform, or leave layers_pattern out");
        }
        for (field, modules) in
            [("target_modules", Some(&self.target_modules)), ("exclude_modules", self.exclude_modules.as_ref())]
        {
            match modules {
                None | Some(TargetModules::ModelDefault) => {}
                Some(modules) => drop(Matcher::new(modules, field)?),
            }
        }
        Ok(())
    }
}

/// As PEFT's `repr`.
impl fmt::Display for LoraConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoraConfig(")?;
        for (i, (key, default)) in peft_defaults().iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            let value = match key.as_str() {
                "task_type" => "<TaskType.CAUSAL_LM: 'CAUSAL_LM'>".into(),
                "peft_type" => "<PeftType.LORA: 'LORA'>".into(),
                "target_modules" => self.target_modules.to_string(),
                "exclude_modules" => self.exclude_modules.as_ref().map_or("None".into(), TargetModules::to_string),
                // The one field that is printed and never saved stands before `lora_bias`.
                "lora_bias" => {
                    format!("{separator}runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=False), {key}=False")
                }
                _ => py_value(&self.field(key).unwrap_or_else(|| default.clone())),
            };
            match key.as_str() {
                "lora_bias" => f.write_str(&value)?,
                _ => write!(f, "{separator}{key}={value}")?,
            }
        }
        f.write_str(")")
    }
}

/// Names as the set that PEFT makes of them, in the order given.
impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ModelDefault => f.write_str("None"),
            Self::AllLinear => f.write_str("'all-linear'"),
            Self::Regex(pattern) => f.write_str(&py_str(pattern)),
            Self::Names(names) if names.is_empty() => f.write_str("set()"),
            Self::Names(names) => {
                let names: Vec<String> = names.iter().map(|name| py_str(name)).collect();
                write!(f, "{{{}}}", names.join(", "))
            }
        }
    }
}

fn py_value(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(b) => py_bool(*b).into(),
        Value::Number(n) if n.is_f64() => py_float(n.as_f64().unwrap_or(f64::NAN)),
        Value::Number(n) => n.to_string(),
        Value::String(s) => py_str(s),
        Value::Array(items) => format!("[{}]", items.iter().map(py_value).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let entries: Vec<String> = map.iter().map(|(k, v)| format!("{}: {}", py_str(k), py_value(v))).collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

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
