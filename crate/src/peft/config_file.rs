//! `adapter_config.json`, key for key as PEFT writes it.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Map, Value, json};

use super::{
    config::{InitLoraWeights, LoraConfig},
    targets::TargetModules,
};
use crate::{
    error::{Error, Result},
    safe_file::write_atomically,
};

/// The file in an adapter's folder that holds its configuration.
pub const CONFIG_NAME: &str = "adapter_config.json";

/// The release of PEFT whose files and prints these are.
const PEFT_VERSION: &str = "0.21.2";

impl LoraConfig {
    /// Writes `adapter_config.json` into `dir`, which is made if need be, as PEFT 0.21 writes it.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.save_pretrained_path(dir.as_ref())
    }

    fn save_pretrained_path(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).map_err(Error::io("write", dir))?;
        write_atomically(&dir.join(CONFIG_NAME), self.to_json_string().as_bytes())
    }

    /// The text of `adapter_config.json`: keys sorted, two spaces, as `json.dumps(..., indent=2, sort_keys=True)`.
    pub fn to_json_string(&self) -> String {
        let mut fields: Vec<(String, Value)> = peft_defaults().into_iter().collect();
        for (key, value) in &mut fields {
            if let Some(ours) = self.field(key) {
                *value = ours;
            }
        }
        fields.sort_by(|(a, _), (b, _)| a.cmp(b));
        let sorted: Map<String, Value> = fields.into_iter().collect();
        serde_json::to_string_pretty(&sorted).unwrap_or_default()
    }

    /// The value of the field `key`, or nothing where this crate has no such field.
    pub(super) fn field(&self, key: &str) -> Option<Value> {
        Some(match key {
            "r" => json!(self.r),
            "lora_alpha" => json!(self.lora_alpha),
            "lora_dropout" => json!(self.lora_dropout),
            "target_modules" => modules_to_json(&self.target_modules),
            "exclude_modules" => self.exclude_modules.as_ref().map_or(Value::Null, modules_to_json),
            "use_rslora" => json!(self.use_rslora),
            "init_lora_weights" => match self.init_lora_weights {
                InitLoraWeights::Default => json!(true),
                InitLoraWeights::Random => json!(false),
                InitLoraWeights::Gaussian => json!("gaussian"),
            },
            "layers_to_transform" => json!(self.layers_to_transform),
            "layers_pattern" => json!(self.layers_pattern),
            "rank_pattern" => json!(self.rank_pattern),
            "alpha_pattern" => json!(self.alpha_pattern),
            "base_model_name_or_path" => json!(self.base_model_name_or_path),
            "revision" => json!(self.revision),
            "inference_mode" => json!(self.inference_mode),
            "peft_version" => json!(self.peft_version.as_deref().unwrap_or(PEFT_VERSION)),
            _ => return None,
        })
    }

    /// Reads `adapter_config.json` from the folder `dir`.
    ///
    /// # Errors
    /// `NotFound`; `Malformed` for what is not JSON or has a field of another type; `Unsupported`,
    /// with the field's name, for a feature of PEFT that this crate does not have: an adapter that
    /// was made with it would compute something else here.
    pub fn from_pretrained(dir: impl AsRef<Path>) -> Result<Self> {
        Self::from_pretrained_path(dir.as_ref())
    }

    fn from_pretrained_path(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_NAME);
        if !path.exists() {
            return Err(Error::NotFound {
                what: CONFIG_NAME.into(),
                path,
                remedy: "name the folder of an adapter, e.g. output_dir/checkpoint-500".into(),
            });
        }
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Self::from_json_str(&text, &path)
    }

    /// Reads the text of an `adapter_config.json`; `path` is for messages.
    pub fn from_json_str(text: &str, path: &Path) -> Result<Self> {
        let malformed = |detail: String| Error::Malformed {
            path: path.into(),
            format: CONFIG_NAME,
            detail,
            remedy: "save the adapter again, or correct the file by hand".into(),
        };
        let json: Map<String, Value> = serde_json::from_str(text).map_err(|e| malformed(e.to_string()))?;
        if json.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            let got = json.get("peft_type").map_or("none".into(), Value::to_string);
            return Err(unsupported(path, "peft_type", got, "\"LORA\"", "use an adapter made by LoRA"));
        }
        let mut config = Self::default();
        let defaults = peft_defaults();
        for (key, value) in &json {
            let field = Reader { key, value };
            match key.as_str() {
                "peft_type" | "auto_mapping" | "runtime_config" | "qalora_group_size" | "megatron_core" => Ok(()),
                "task_type" => match value.as_str() {
                    Some("CAUSAL_LM") => Ok(()),
                    None if value.is_null() => Ok(()),
                    _ => {
                        let remedy = "use an adapter of a causal language model";
                        return Err(unsupported(path, key, value.to_string(), "\"CAUSAL_LM\"", remedy));
                    }
                },
                "init_lora_weights" => match value {
                    Value::Bool(default) => field.set(&mut config.init_lora_weights, Some((*default).into())),
                    Value::String(s) if s == "gaussian" => {
                        field.set(&mut config.init_lora_weights, Some(InitLoraWeights::Gaussian))
                    }
                    _ => {
                        let remedy =
                            "convert the adapter to a plain LoRA in PEFT (path_initial_model_for_weight_conversion)";
                        return Err(unsupported(path, key, value.to_string(), "true, false, \"gaussian\"", remedy));
                    }
                },
                "r" => field.set(&mut config.r, field.count()),
                "lora_alpha" => field.set(&mut config.lora_alpha, field.count()),
                "lora_dropout" => field.set(&mut config.lora_dropout, value.as_f64()),
                "target_modules" => field.set(&mut config.target_modules, field.modules()),
                "exclude_modules" => field.set(&mut config.exclude_modules, field.optional(Reader::modules)),
                "use_rslora" => field.set(&mut config.use_rslora, value.as_bool()),
                "layers_to_transform" => field.set(&mut config.layers_to_transform, field.optional(Reader::counts)),
                "layers_pattern" => field.set(&mut config.layers_pattern, field.optional(Reader::texts)),
                "rank_pattern" => field.set(&mut config.rank_pattern, field.pattern()),
                "alpha_pattern" => field.set(&mut config.alpha_pattern, field.pattern()),
                "base_model_name_or_path" => {
                    field.set(&mut config.base_model_name_or_path, field.optional(Reader::text))
                }
                "revision" => field.set(&mut config.revision, field.optional(Reader::text)),
                "inference_mode" => field.set(&mut config.inference_mode, value.as_bool()),
                "peft_version" => field.set(&mut config.peft_version, field.optional(Reader::text)),
                _ if is_off(value) || defaults.get(key) == Some(value) => Ok(()),
                _ => {
                    let expected = defaults.get(key).unwrap_or(&Value::Null).to_string();
                    let remedy = "make the adapter without this feature";
                    return Err(unsupported(path, key, value.to_string(), &expected, remedy));
                }
            }
            .map_err(malformed)?;
        }
        config.validate()?;
        Ok(config)
    }
}

/// One entry of the file on its way into a field.
struct Reader<'a> {
    key: &'a str,
    value: &'a Value,
}

impl Reader<'_> {
    fn set<T>(&self, field: &mut T, value: Option<T>) -> Result<(), String> {
        *field = value.ok_or_else(|| format!("{} is {}, which is of another type", self.key, self.value))?;
        Ok(())
    }

    /// `null`, or what `read` makes of the value.
    fn optional<T>(&self, read: impl Fn(&Self) -> Option<T>) -> Option<Option<T>> {
        if self.value.is_null() { Some(None) } else { read(self).map(Some) }
    }

    fn text(&self) -> Option<String> {
        self.value.as_str().map(String::from)
    }

    /// A whole number; some files write one as `16.0`.
    fn count(&self) -> Option<usize> {
        count(self.value)
    }

    fn counts(&self) -> Option<Vec<usize>> {
        match self.value {
            Value::Array(items) => items.iter().map(count).collect(),
            one => Some(vec![count(one)?]),
        }
    }

    fn texts(&self) -> Option<Vec<String>> {
        match self.value {
            Value::Array(items) => items.iter().map(|item| item.as_str().map(String::from)).collect(),
            one => Some(vec![one.as_str()?.into()]),
        }
    }

    fn modules(&self) -> Option<TargetModules> {
        match self.value {
            Value::Null => Some(TargetModules::ModelDefault),
            Value::String(text) => Some(text.as_str().into()),
            _ => self.texts().map(TargetModules::Names),
        }
    }

    fn pattern(&self) -> Option<BTreeMap<String, usize>> {
        match self.value {
            Value::Null => Some(BTreeMap::new()),
            Value::Object(map) => map.iter().map(|(name, n)| Some((name.clone(), count(n)?))).collect(),
            _ => None,
        }
    }
}

fn count(value: &Value) -> Option<usize> {
    let n = value.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0 && *n < 1e9)?;
    Some(n as usize)
}

/// A feature that is not asked for, whatever its name.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

fn unsupported(path: &Path, key: &str, got: String, supported: &str, remedy: &str) -> Error {
    Error::Unsupported {
        what: format!("{}: {key} =", path.display()),
        got,
        supported: vec![supported.into()],
        remedy: remedy.into(),
    }
}

fn modules_to_json(modules: &TargetModules) -> Value {
    match modules {
        TargetModules::ModelDefault => Value::Null,
        TargetModules::AllLinear => json!("all-linear"),
        TargetModules::Names(names) => json!(names),
        TargetModules::Regex(pattern) => json!(pattern),
    }
}

/// The keys that PEFT 0.21 writes, in the order of its `repr`, with its defaults.
pub(super) fn peft_defaults() -> Map<String, Value> {
    let fields = json!({
        "task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": null, "peft_version": PEFT_VERSION,
        "base_model_name_or_path": null, "revision": null, "inference_mode": false, "r": 8,
        "target_modules": null, "exclude_modules": null, "lora_alpha": 8, "lora_dropout": 0.0,
        "fan_in_fan_out": false, "bias": "none", "use_rslora": false, "modules_to_save": null,
        "init_lora_weights": true, "layers_to_transform": null, "layers_pattern": null,
        "rank_pattern": {}, "alpha_pattern": {}, "megatron_config": null, "megatron_core": "megatron.core",
        "trainable_token_indices": null, "loftq_config": {}, "eva_config": null, "corda_config": null,
        "lora_ga_config": null, "use_dora": false, "velora_config": null, "alora_invocation_tokens": null,
        "use_qalora": false, "qalora_group_size": 16, "monteclora_config": null, "layer_replication": null,
        "lora_bias": false, "target_parameters": null, "use_bdlora": null, "arrow_config": null,
        "kasa_config": null, "ensure_weight_tying": false,
    });
    match fields {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/peft");

    fn read(fields: &str) -> Result<LoraConfig> {
        LoraConfig::from_json_str(&format!("{{\"peft_type\": \"LORA\", {fields}}}"), Path::new("adapter_config.json"))
    }

    #[test]
    fn a_file_is_written_byte_for_byte_as_peft_writes_it() {
        let config = LoraConfig {
            inference_mode: true,
            base_model_name_or_path: Some("poet".into()),
            lora_dropout: 0.1,
            target_modules: ["dense"].into(),
            rank_pattern: [("h.1.dense".to_string(), 4)].into(),
            ..Default::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("new/folder");
        config.save_pretrained(&dir).unwrap();
        let theirs = fs::read_to_string(Path::new(FIXTURES).join(CONFIG_NAME)).unwrap();
        assert_eq!(fs::read_to_string(dir.join(CONFIG_NAME)).unwrap(), theirs);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "no temporary file is left");
        let read = LoraConfig::from_pretrained(&dir).unwrap();
        assert_eq!(read, LoraConfig { peft_version: Some(PEFT_VERSION.into()), ..config });
    }

    #[test]
    fn every_file_of_peft_is_read_and_written_again() {
        let cases: Value =
            serde_json::from_str(&fs::read_to_string(Path::new(FIXTURES).join("config_cases.json")).unwrap()).unwrap();
        for case in cases["cases"].as_array().unwrap() {
            let config = LoraConfig::from_json_str(&case["saved"].to_string(), Path::new("case")).unwrap();
            let mut again: Value = serde_json::from_str(&config.to_json_string()).unwrap();
            if case["saved"]["layers_pattern"].is_string() {
                again["layers_pattern"] = again["layers_pattern"][0].take();
            }
            if case["saved"]["layers_to_transform"].is_number() {
                again["layers_to_transform"] = again["layers_to_transform"][0].take();
            }
            assert_eq!(again, case["saved"], "{}", case["args"]);
        }
    }

    #[test]
    fn a_feature_that_is_not_here_is_refused_by_name() {
        for (fields, name) in [
            ("\"use_dora\": true", "use_dora"),
            ("\"modules_to_save\": [\"lm_head\"]", "modules_to_save"),
            ("\"fan_in_fan_out\": true", "fan_in_fan_out"),
            ("\"bias\": \"all\"", "bias"),
            ("\"lora_bias\": true", "lora_bias"),
            ("\"layer_replication\": [[0, 4]]", "layer_replication"),
            ("\"trainable_token_indices\": [1, 2]", "trainable_token_indices"),
            ("\"init_lora_weights\": \"pissa\"", "init_lora_weights"),
            ("\"loftq_config\": {\"loftq_bits\": 4}", "loftq_config"),
            ("\"task_type\": \"SEQ_CLS\"", "task_type"),
            ("\"a_feature_of_tomorrow\": 1", "a_feature_of_tomorrow"),
        ] {
            let error = read(fields).unwrap_err();
            assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains(name)), "{fields}: {error}");
        }
        let other = LoraConfig::from_json_str("{\"peft_type\": \"IA3\"}", Path::new("x")).unwrap_err();
        assert!(matches!(other, Error::Unsupported { .. }), "{other}");
        read("\"a_feature_of_tomorrow\": null, \"another\": false, \"lora_alpha\": 16.0").unwrap();
    }

    #[test]
    fn a_broken_file_is_named() {
        for text in ["", "[]", "{\"peft_type\": \"LORA\"", "{\"peft_type\": \"LORA\", \"r\": \"eight\"}"] {
            let error = LoraConfig::from_json_str(text, Path::new("here/adapter_config.json")).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "{text}: {error}");
            assert!(error.to_string().contains("here/adapter_config.json"));
        }
        assert!(read("\"r\": 8.5").unwrap_err().to_string().contains("r is 8.5"));
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(LoraConfig::from_pretrained(folder.path()), Err(Error::NotFound { .. })));
    }

    #[test]
    fn an_unwritable_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let error = LoraConfig::default().save_pretrained(folder.path().join("file")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}
