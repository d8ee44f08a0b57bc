//! Which linear layers get an adapter: PEFT's rules of matching names.

use std::collections::{BTreeMap, BTreeSet};

pub use super::target_modules::TargetModules;
use super::{
    config::LoraConfig,
    target_modules::{compile, is_output_head, is_suffix},
};
use crate::error::{Error, Result, near_names};

/// What PEFT adapts when nothing is named, for the architectures that it knows and we may load.
fn model_default(model_type: &str) -> Option<&'static [&'static str]> {
    Some(match model_type {
        "bloom" | "falcon" | "gpt_neox" => &["query_key_value"],
        "gemma" | "gemma2" | "gemma3_text" | "llama" | "mistral" | "opt" | "qwen2" | "qwen3" | "stablelm" => {
            &["q_proj", "v_proj"]
        }
        "phi" => &["q_proj", "v_proj", "fc1", "fc2"],
        _ => return None,
    })
}

impl LoraConfig {
    /// The configuration with its layers named, and their indices among `linear_names`: what
    /// `get_peft_model` keeps and saves. `ModelDefault` becomes the names for `model_type` and
    /// `AllLinear` the shortest names that mean the same layers.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate) and [`resolve_targets`](Self::resolve_targets), and
    /// `InvalidArgument` when `model_type` has no default.
    pub fn prepare(&self, model_type: &str, linear_names: &[String]) -> Result<(LoraConfig, Vec<usize>)> {
        self.validate()?;
        let target_modules = match &self.target_modules {
            TargetModules::ModelDefault => match model_default(model_type) {
                Some(names) => names.to_vec().into(),
                None => {
                    let known = short_names(linear_names).join(", ");
                    let expected = format!("the layers to adapt: there is no default for a {model_type:?} model");
                    let remedy = format!("set target_modules to names among {known}, or to \"all-linear\".into()");
                    return Err(Error::argument("target_modules", "none", &expected, &remedy));
                }
            },
            TargetModules::AllLinear => {
                let (targets, others): (Vec<&String>, Vec<&String>) =
                    linear_names.iter().partition(|name| !is_output_head(name));
                TargetModules::Names(minimal_suffixes(&targets, &others))
            }
            named => named.clone(),
        };
        let config = LoraConfig { target_modules, ..self.clone() };
        let targets = config.resolve_targets(linear_names)?;
        Ok((config, targets))
    }

    /// The indices of the linear layers that this configuration adapts. `linear_names` are the
    /// dotted paths of all linear layers, the output head among them.
    ///
    /// # Errors
    /// `UnknownTargetModules` when a name matches no layer or nothing is left to adapt,
    /// `InvalidArgument` for a regular expression that does not parse.
    pub fn resolve_targets(&self, linear_names: &[String]) -> Result<Vec<usize>> {
        let is_target = self.target_modules.matcher("target_modules")?;
        let excluded = self.exclude_modules.as_ref().map(|e| e.matcher("exclude_modules")).transpose()?;
        self.refuse_unknown(&is_target, linear_names)?;
        let layers = self.layers_to_transform.as_ref().filter(|layers| !layers.is_empty());
        let layer_of = layer_index(self.layers_pattern.as_deref().unwrap_or_default())?;
        let is_chosen = |name: &String| {
            // A whole name is adapted whatever layers_to_transform says: so does PEFT.
            let is_whole_name = matches!(&self.target_modules, TargetModules::Names(names) if names.contains(name));
            is_target(name)
                && !excluded.as_ref().is_some_and(|is_excluded| is_excluded(name))
                && (is_whole_name || layers.is_none_or(|l| layer_of(name).is_some_and(|index| l.contains(&index))))
        };
        let targets: Vec<usize> = (0..linear_names.len()).filter(|&i| is_chosen(&linear_names[i])).collect();
        if targets.is_empty() {
            let expected = "at least one layer to adapt; exclude_modules and layers_to_transform leave none";
            let remedy = "exclude fewer layers, or name other ones";
            return Err(Error::argument("target_modules", &self.target_modules, expected, remedy));
        }
        Ok(targets)
    }

    fn refuse_unknown(&self, is_target: &dyn Fn(&str) -> bool, linear_names: &[String]) -> Result<()> {
        let available = short_names(linear_names);
        let (unknown, suggestions) = match &self.target_modules {
            TargetModules::Names(names) => {
                let is_known = |target: &str| linear_names.iter().any(|name| is_suffix(target, name));
                let unknown: Vec<String> = names.iter().filter(|target| !is_known(target)).cloned().collect();
                let suggestions = unknown.iter().flat_map(|t| near_names(t, &available)).collect::<BTreeSet<_>>();
                (unknown, suggestions.into_iter().collect())
            }
            TargetModules::Regex(pattern) if !linear_names.iter().any(|name| is_target(name)) => {
                let near = near_names(pattern, &available);
                let quote = |n: &String| format!("[{n:?}].into() (a single string is a regex for the whole name)");
                (vec![pattern.clone()], near.iter().take(1).map(quote).collect())
            }
            _ => return Ok(()),
        };
        if unknown.is_empty() {
            return Ok(());
        }
        Err(Error::UnknownTargetModules { unknown, suggestions, available })
    }

    /// The rank of the adapter on the layer `name`: `r`, or what `rank_pattern` says.
    pub fn rank_of(&self, name: &str) -> Result<usize> {
        Ok(pattern_value(&self.rank_pattern, "rank_pattern", name)?.unwrap_or(self.r))
    }

    /// What the adapter's output on the layer `name` is multiplied by: `lora_alpha / r`, or
    /// `lora_alpha / sqrt(r)` with `use_rslora`, of that layer's own rank and alpha.
    pub fn scaling_of(&self, name: &str) -> Result<f64> {
        let r = self.rank_of(name)? as f64;
        let alpha = pattern_value(&self.alpha_pattern, "alpha_pattern", name)?.unwrap_or(self.lora_alpha) as f64;
        Ok(if self.use_rslora { alpha / r.sqrt() } else { alpha / r })
    }
}

/// Finds the number of a layer in its path. `patterns` name the list of layers (`h`, `layers`); without them it is the
/// first number that follows two names.
fn layer_index(patterns: &[String]) -> Result<impl Fn(&str) -> Option<usize>> {
    let first_number = [r"^.*?\.[^.]*\.(?P<idx>\d+)\.".to_owned()];
    let in_list: Vec<String> = patterns.iter().map(|list| format!(r"^(?:.*?\.)?{list}\.(?P<idx>\d+)\.")).collect();
    let all = if patterns.is_empty() { &first_number[..] } else { &in_list };
    let all = all.iter().map(|pattern| compile(pattern, "layers_pattern")).collect::<Result<Vec<_>>>()?;
    Ok(move |name: &str| all.iter().find_map(|regex| regex.captures(name))?.name("idx")?.as_str().parse().ok())
}

/// The value of the first key that matches the end of `name`, from a dot or the start on.
fn pattern_value(patterns: &BTreeMap<String, usize>, field: &str, name: &str) -> Result<Option<usize>> {
    for (key, value) in patterns {
        if compile(&format!(r"^(?:.*\.)?(?:{key})$"), field)?.is_match(name) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The last part of each path, once each, in order of appearance.
fn short_names(linear_names: &[String]) -> Vec<String> {
    let mut short: Vec<String> = Vec::new();
    for name in linear_names {
        let last = name.rsplit('.').next().unwrap_or(name);
        if !short.iter().any(|s| s == last) {
            short.push(last.into());
        }
    }
    short
}

/// The shortest suffixes that match all of `targets` and none of `others`.
fn minimal_suffixes(targets: &[&String], others: &[&String]) -> Vec<String> {
    let mut suffixes: Vec<String> = Vec::new();
    for target in targets {
        if suffixes.iter().any(|s| is_suffix(s, target)) {
            continue;
        }
        let dots = target.rmatch_indices('.').map(|(i, _)| &target[i + 1..]);
        let shortest = dots.chain([target.as_str()]).find(|s| !others.iter().any(|name| is_suffix(s, name)));
        suffixes.extend(shortest.map(String::from));
    }
    suffixes
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn linear_names() -> Vec<String> {
        let in_block = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h"];
        let blocks = (0..2).flat_map(|i| in_block.map(|name| format!("transformer.h.{i}.{name}")));
        blocks.chain(["lm_head".to_string()]).collect()
    }

    fn with_targets(target_modules: impl Into<TargetModules>) -> LoraConfig {
        LoraConfig { target_modules: target_modules.into(), ..Default::default() }
    }

    #[test]
    fn layers_ranks_and_scalings_are_those_of_peft() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/peft/config_cases.json");
        let fixture: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let names: Vec<String> = serde_json::from_value(fixture["linear_names"].clone()).unwrap();
        for case in fixture["cases"].as_array().unwrap() {
            let mut args = case["args"].clone();
            args["peft_type"] = "LORA".into();
            let config = LoraConfig::from_json_str(&args.to_string(), Path::new("case")).unwrap();
            let (config, targets) = config.prepare("bloom", &names).unwrap();
            let theirs = case["targets"].as_array().unwrap();
            assert_eq!(targets.len(), theirs.len(), "{}", case["args"]);
            for (&i, target) in targets.iter().zip(theirs) {
                assert_eq!(names[i], target["name"], "{}", case["args"]);
                assert_eq!(config.rank_of(&names[i]).unwrap(), target["r"], "{}", names[i]);
                assert_eq!(config.scaling_of(&names[i]).unwrap(), target["scaling"], "{}", names[i]);
            }
            if let TargetModules::Names(mut names) = config.target_modules {
                names.sort();
                assert_eq!(serde_json::json!(names), case["saved"]["target_modules"], "{}", case["args"]);
            }
        }
    }

    #[test]
    fn an_unknown_name_suggests_its_neighbours() {
        let Error::UnknownTargetModules { unknown, suggestions, available } =
            with_targets(["query_key_values", "dense"]).resolve_targets(&linear_names()).unwrap_err()
        else {
            panic!("another error")
        };
        assert_eq!((unknown, suggestions), (vec!["query_key_values".into()], vec!["query_key_value".into()]));
        assert_eq!(available, ["query_key_value", "dense", "dense_h_to_4h", "lm_head"]);
    }

    #[test]
    fn a_single_string_that_is_a_name_is_explained() {
        let error = with_targets("query_key_value").resolve_targets(&linear_names()).unwrap_err().to_string();
        assert!(error.contains("did you mean [\"query_key_value\"].into() (a single string is a regex"), "{error}");
    }

    #[test]
    fn nothing_to_adapt_is_an_error() {
        let excluded = LoraConfig { exclude_modules: Some(["dense"].into()), ..with_targets(["dense"]) };
        let no_such_layer = LoraConfig { layers_to_transform: Some(vec![7]), ..with_targets(["dense"]) };
        for config in [excluded, no_such_layer] {
            let error = config.resolve_targets(&linear_names()).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        }
        let error = LoraConfig::default().prepare("mamba", &linear_names()).unwrap_err();
        assert!(error.to_string().contains("no default for a \"mamba\" model"), "{error}");
        assert!(LoraConfig::default().resolve_targets(&linear_names()).is_err());
    }

    #[test]
    fn all_linear_leaves_the_output_head() {
        let names = linear_names();
        let config = with_targets("All-Linear");
        assert_eq!(config.resolve_targets(&names).unwrap(), (0..6).collect::<Vec<_>>());
        assert_eq!(
            config.prepare("bloom", &names).unwrap().0.target_modules,
            ["query_key_value", "dense", "dense_h_to_4h"].into()
        );
    }
}
