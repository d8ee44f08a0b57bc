//! `adapter_config.json`, key for key as PEFT writes it.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use serde_json::{Map, Value, json};

use super::{config::LoraConfig, target_modules::TargetModules};
use crate::{
    error::{Error, Result},
    json_file::check_field,
    py_repr::{commas, py_json},
    safe_file::write_atomically,
};

/// The file in an adapter's folder that holds its configuration.
pub const CONFIG_NAME: &str = "adapter_config.json";

/// The remedy for an adapter whose start changed the base model.
const CONVERT: &str = "convert the adapter to a plain LoRA in PEFT (path_initial_model_for_weight_conversion)";

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
        let sorted: BTreeMap<String, Value> = self.fields().into_iter().collect();
        serde_json::to_string_pretty(&sorted).unwrap_or_default()
    }

    /// All of PEFT's fields in its order, with the values of this configuration.
    fn fields(&self) -> Map<String, Value> {
        let ours = json!(self);
        let mut fields = peft_defaults();
        for (key, value) in &mut fields {
            // What is null here is null there by default, too, but for the version.
            if ours.get(key).is_some_and(|ours| !ours.is_null()) {
                *value = ours[key].clone();
            }
        }
        fields
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
            let remedy = "name the folder of an adapter, e.g. output_dir/checkpoint-500";
            return Err(Error::not_found(CONFIG_NAME, path, remedy));
        }
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Self::from_json_str(&text, &path)
    }

    /// Reads the text of an `adapter_config.json`; `path` is for messages.
    pub fn from_json_str(text: &str, path: &Path) -> Result<Self> {
        let malformed = |detail: String| {
            Error::malformed(path, CONFIG_NAME, detail, "save the adapter again, or correct the file by hand")
        };
        let unsupported = |key: &str, value: &dyn fmt::Display, supported: &str, remedy: &str| {
            Err(Error::unsupported(&format!("{}: {key} =", path.display()), value, [supported], remedy))
        };
        let json: Map<String, Value> = serde_json::from_str(text).map_err(|e| malformed(e.to_string()))?;
        if json.get("peft_type").is_none_or(|kind| kind != "LORA") {
            let got = json.get("peft_type").map_or("none".into(), Value::to_string);
            return unsupported("peft_type", &got, "\"LORA\"", "use an adapter made by LoRA");
        }
        let (ours, defaults, mut fields) = (json!(Self::default()), peft_defaults(), Map::new());
        for (key, value) in &json {
            match key.as_str() {
                "peft_type" | "auto_mapping" | "runtime_config" | "qalora_group_size" | "megatron_core" => {}
                "task_type" if value.is_null() || value == "CAUSAL_LM" => {}
                "task_type" => {
                    return unsupported(key, value, "\"CAUSAL_LM\"", "use an adapter of a causal language model");
                }
                "init_lora_weights" if check_field::<Self>(key, value).is_err() => {
                    let supported = "true, false, \"gaussian\"";
                    return unsupported(key, value, supported, CONVERT);
                }
                _ if ours.get(key).is_some() => {
                    let value = plain(key, value);
                    let wrong = |_| malformed(format!("{key} is {value}, which is of another type"));
                    check_field::<Self>(key, &value).map_err(wrong)?;
                    fields.insert(key.clone(), value);
                }
                _ if is_off(value) || defaults.get(key) == Some(value) => {}
                _ => {
                    let expected = defaults.get(key).unwrap_or(&Value::Null).to_string();
                    return unsupported(key, value, &expected, "make the adapter without this feature");
                }
            }
        }
        let config: Self = serde_json::from_value(fields.into()).map_err(|e| malformed(e.to_string()))?;
        config.validate()?;
        Ok(config)
    }
}

/// As PEFT's `repr`.
impl fmt::Display for LoraConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = |(key, value): (&String, &Value)| match key.as_str() {
            "task_type" => format!("{key}=<TaskType.CAUSAL_LM: 'CAUSAL_LM'>"),
            "peft_type" => format!("{key}=<PeftType.LORA: 'LORA'>"),
            "target_modules" => format!("{key}={}", self.target_modules),
            "exclude_modules" => {
                format!("{key}={}", self.exclude_modules.as_ref().unwrap_or(&TargetModules::default()))
            }
            // The one field that is printed and never saved stands before this one.
            "lora_bias" => format!("runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=False), {key}=False"),
            _ => format!("{key}={}", py_json(value)),
        };
        write!(f, "LoraConfig({})", commas(self.fields().iter().map(one)))
    }
}

/// A field's value in the one form that we write of those that PEFT reads.
fn plain(key: &str, value: &Value) -> Value {
    match (key, value) {
        ("layers_to_transform" | "layers_pattern", Value::Number(_) | Value::String(_)) => {
            json!([whole_numbers(value)])
        }
        ("rank_pattern" | "alpha_pattern", Value::Null) => json!({}),
        _ => whole_numbers(value),
    }
}

/// Some files write a whole number as `16.0`.
fn whole_numbers(value: &Value) -> Value {
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(n) if n.fract() == 0.0 && (0.0..1e9).contains(&n) => json!(n as u64),
            _ => value.clone(),
        },
        Value::Array(items) => items.iter().map(whole_numbers).collect(),
        Value::Object(entries) => entries.iter().map(|(key, value)| (key.clone(), whole_numbers(value))).collect(),
        other => other.clone(),
    }
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

/// The keys that PEFT 0.21 writes, in the order of its `repr`, with its defaults.
fn peft_defaults() -> Map<String, Value> {
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
    fields.as_object().cloned().unwrap_or_default()
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
