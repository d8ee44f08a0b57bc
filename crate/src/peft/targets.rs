//! Which linear layers get an adapter: PEFT's rules of matching names.

use std::collections::BTreeSet;

use regex::Regex;

use super::config::LoraConfig;
use crate::error::{Error, Result, near_names};

/// The layers to adapt, as PEFT's `target_modules`.
///
/// ```
/// use qlora_nb::peft::targets::TargetModules;
/// let by_name: TargetModules = ["query_key_value"].into();
/// let all: TargetModules = "all-linear".into();
/// let by_regex: TargetModules = r".*\.h\.[0-3]\..*dense".into();
/// assert_eq!((all, by_name.to_string()), (TargetModules::AllLinear, "{'query_key_value'}".into()));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TargetModules {
    /// PEFT's choice for the architecture: `query_key_value` of BLOOM, `q_proj` and `v_proj` of Llama.
    #[default]
    ModelDefault,
    /// Every linear layer but the output head.
    AllLinear,
    /// The layers whose name is one of these, or ends in a dot and one of these.
    Names(Vec<String>),
    /// The layers whose whole name this regular expression matches.
    Regex(String),
}

impl From<&str> for TargetModules {
    /// `"all-linear"`, or a regular expression.
    fn from(text: &str) -> Self {
        match text.eq_ignore_ascii_case("all-linear") {
            true => Self::AllLinear,
            false => Self::Regex(text.into()),
        }
    }
}

impl From<String> for TargetModules {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(names: [S; N]) -> Self {
        Vec::from(names).into()
    }
}

impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(names: Vec<S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

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
        let matcher = Matcher::new(&self.target_modules, "target_modules")?;
        let excluded = self.exclude_modules.as_ref().map(|e| Matcher::new(e, "exclude_modules")).transpose()?;
        self.refuse_unknown(&matcher, linear_names)?;
        let layers = self.layers_to_transform.as_ref().filter(|layers| !layers.is_empty());
        let layer_index = LayerIndex::new(self.layers_pattern.as_deref().unwrap_or_default())?;
        let mut targets = Vec::new();
        for (i, name) in linear_names.iter().enumerate() {
            if excluded.as_ref().is_some_and(|e| e.matches(name)) || !matcher.matches(name) {
                continue;
            }
            // A whole name is adapted whatever layers_to_transform says: so does PEFT.
            let chosen = match layers {
                Some(layers) if !matcher.is_whole_name(name) => {
                    layer_index.of(name).is_some_and(|index| layers.contains(&index))
                }
                _ => true,
            };
            if chosen {
                targets.push(i);
            }
        }
        if targets.is_empty() {
            return Err(Error::argument(
                "target_modules",
                &self.target_modules,
                "at least one layer to adapt; exclude_modules and layers_to_transform leave none",
                "exclude fewer layers, or name other ones",
            ));
        }
        Ok(targets)
    }

    fn refuse_unknown(&self, matcher: &Matcher, linear_names: &[String]) -> Result<()> {
        let available = short_names(linear_names);
        let (unknown, suggestions) = match matcher {
            Matcher::AllLinear => return Ok(()),
            Matcher::Names(names) => {
                let unknown: Vec<String> =
                    names.iter().filter(|t| !linear_names.iter().any(|name| is_suffix(t, name))).cloned().collect();
                let suggestions = unknown.iter().flat_map(|t| near_names(t, &available)).collect::<BTreeSet<_>>();
                (unknown, suggestions.into_iter().collect())
            }
            Matcher::Regex(regex, _) if linear_names.iter().any(|name| regex.is_match(name)) => return Ok(()),
            Matcher::Regex(_, pattern) => {
                let near = near_names(pattern, &available);
                let quote = |n: &String| format!("[{n:?}].into() (a single string is a regex for the whole name)");
                (vec![pattern.clone()], near.iter().take(1).map(quote).collect())
            }
        };
        match unknown.is_empty() {
            true => Ok(()),
            false => Err(Error::UnknownTargetModules { unknown, suggestions, available }),
        }
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

/// `target_modules` or `exclude_modules`, ready to match.
pub(super) enum Matcher {
    AllLinear,
    Names(Vec<String>),
    Regex(Regex, String),
}

impl Matcher {
    pub(super) fn new(modules: &TargetModules, field: &str) -> Result<Self> {
        Ok(match modules {
            TargetModules::AllLinear => Self::AllLinear,
            TargetModules::Names(names) => Self::Names(names.clone()),
            TargetModules::Regex(pattern) => Self::Regex(whole(pattern, field)?, pattern.clone()),
            TargetModules::ModelDefault => {
                return Err(Error::argument(
                    field,
                    "none",
                    "names, a regular expression or \"all-linear\"",
                    "name the layers, e.g. [\"query_key_value\"].into()",
                ));
            }
        })
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Self::AllLinear => !is_output_head(name),
            Self::Names(names) => names.iter().any(|t| is_suffix(t, name)),
            Self::Regex(regex, _) => regex.is_match(name),
        }
    }

    fn is_whole_name(&self, name: &str) -> bool {
        matches!(self, Self::Names(names) if names.iter().any(|t| t == name))
    }
}

/// Finds the number of a layer in its path.
struct LayerIndex(Vec<Regex>);

impl LayerIndex {
    /// `patterns` name the list of layers (`h`, `layers`); without them it is the first number
    /// that follows two names.
    fn new(patterns: &[String]) -> Result<Self> {
        if patterns.is_empty() {
            return Ok(Self(vec![compile(r"^.*?\.[^.]*\.(?P<idx>\d+)\.", "layers_pattern")?]));
        }
        let compiled = patterns.iter().map(|p| compile(&format!(r"^(?:.*?\.)?{p}\.(?P<idx>\d+)\."), "layers_pattern"));
        Ok(Self(compiled.collect::<Result<_>>()?))
    }

    fn of(&self, name: &str) -> Option<usize> {
        self.0.iter().find_map(|regex| regex.captures(name))?.name("idx")?.as_str().parse().ok()
    }
}

/// The value of the first key that matches the end of `name`, from a dot or the start on.
fn pattern_value(
    patterns: &std::collections::BTreeMap<String, usize>,
    field: &str,
    name: &str,
) -> Result<Option<usize>> {
    for (key, value) in patterns {
        if compile(&format!(r"^(?:.*\.)?(?:{key})$"), field)?.is_match(name) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

pub(super) fn whole(pattern: &str, field: &str) -> Result<Regex> {
    compile(&format!("^(?:{pattern})$"), field)
}

pub(super) fn compile(pattern: &str, field: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| {
        let expected = format!("a regular expression ({})", e.to_string().replace('\n', " "));
        Error::argument(field, pattern, &expected, "correct it; look-around and back-references are not supported")
    })
}

fn is_suffix(target: &str, name: &str) -> bool {
    name.strip_suffix(target).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// The names under which architectures keep the layer that makes the logits.
fn is_output_head(name: &str) -> bool {
    ["lm_head", "embed_out"].iter().any(|head| is_suffix(head, name))
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
