//! Damaged, missing and foreign models and adapters.

use std::{fs, path::Path};

use candle_core::{Device, Tensor};
use qlora_nb::{
    error::Error,
    model::CausalLM,
    model::{AutoModelForCausalLM, Model, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::Trainable,
};
use qlora_nb_tests::*;
use tempfile::TempDir;

pub(super) fn load(folder: &Path) -> Result<Model, Error> {
    AutoModelForCausalLM::from_pretrained(folder, ModelOptions::default())
}

/// A copy of the tiny model to damage.
pub(super) fn copy() -> TempDir {
    copy_of("bloom_tiny")
}

pub(super) fn copy_of(model: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(fixture(model).join(name), folder.path().join(name)).unwrap();
    }
    folder
}

pub(super) fn edit_config(folder: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

fn qkv() -> LoraConfig {
    LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() }
}

/// The text tells where and what to do.
pub(super) fn names(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts.iter().chain(&["what to do"]) {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn a_missing_folder_or_file() {
    let error = load(Path::new("no/such/folder/at/all")).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    names(&error, &["no/such/folder/at/all"]);
    for name in ["config.json", "model.safetensors"] {
        let folder = copy();
        fs::remove_file(folder.path().join(name)).unwrap();
        let error = load(folder.path()).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
        names(&error, &["model.safetensors".split('.').next().unwrap()]);
    }
}

#[test]
fn json_that_is_truncated_empty_or_no_object() {
    for text in ["", "{\"model_type\": \"bloom\"", "[1, 2]", "\u{fffd}"] {
        let folder = copy();
        fs::write(folder.path().join("config.json"), text).unwrap();
        let error = load(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{text:?}: {error}");
        names(&error, &["config.json"]);
    }
}

#[test]
fn safetensors_cut_anywhere() {
    let whole = fs::read(fixture("bloom_tiny/model.safetensors")).unwrap();
    for length in [0, 3, 8, 200, whole.len() / 2, whole.len() - 1] {
        let folder = copy();
        fs::write(folder.path().join("model.safetensors"), &whole[..length]).unwrap();
        let error = load(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{length} bytes: {error}");
        names(&error, &["model.safetensors"]);
    }
}

/// A flipped bit in the header is found, or changes nothing that matters; it never panics.
#[test]
fn safetensors_with_flipped_bits() {
    let whole = fs::read(fixture("bloom_tiny/model.safetensors")).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let folder = copy();
    let (mut refused, mut tried) = (0, 0);
    for byte in (0..8 + header).step_by(7) {
        let mut damaged = whole.clone();
        damaged[byte] ^= 1 << (byte % 7);
        fs::write(folder.path().join("model.safetensors"), &damaged).unwrap();
        tried += 1;
        refused += usize::from(load(folder.path()).is_err());
    }
    assert!(refused * 10 > tried * 9, "only {refused} of {tried} damaged headers were refused");
}

#[test]
fn a_weight_that_is_not_a_number_is_named() {
    let mut bytes = fs::read(fixture("bloom_tiny/model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let folder = copy();
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let error = load(folder.path()).unwrap_err();
    names(&error, &["NaN", "elements"]);
}

#[test]
fn an_unsupported_architecture_lists_the_supported() {
    let folder = copy();
    edit_config(folder.path(), |c| c["model_type"] = "mamba".into());
    let error = load(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    names(&error, &["mamba", "bloom"]);
}

#[test]
fn a_config_that_does_not_fit_the_weights() {
    let folder = copy();
    edit_config(folder.path(), |c| c["n_layer"] = 3.into());
    let error = load(folder.path()).unwrap_err();
    assert!(matches!(&error, Error::KeyMismatch { missing, .. } if missing.len() == 12), "{error}");
    names(&error, &["h.2.", "missing"]);
    let folder = copy();
    edit_config(folder.path(), |c| c["vocab_size"] = 161.into());
    let error = load(folder.path()).unwrap_err();
    assert!(matches!(&error, Error::Shape { expected, got, .. } if expected[0] == 161 && got[0] == 160), "{error}");
    let folder = copy();
    edit_config(folder.path(), |c| c["n_head"] = 7.into());
    names(&load(folder.path()).unwrap_err(), &["n_head", "7"]);
}

#[test]
fn token_ids_beyond_the_vocabulary() {
    let model = load(&fixture("bloom_tiny")).unwrap();
    let ids = Tensor::new(&[[1u32, 2], [3, 160]], &Device::Cpu).unwrap();
    let error = model.logits(&ids, None).unwrap_err();
    assert!(matches!(error, Error::TokenId { row: 1, position: 1, id: 160, vocab_size: 160 }), "{error}");
    let mut cache = model.new_cache(1).unwrap();
    assert!(matches!(model.next_token_logits(&[&[999]], &mut cache), Err(Error::TokenId { id: 999, .. })));
    assert!(matches!(model.next_token_logits(&[&[]], &mut cache), Err(Error::EmptySequence { row: 0 })));
    // Nothing was lost: the cache and the model go on.
    assert!(model.next_token_logits(&[&[1]], &mut cache).is_ok());
}

#[test]
fn unknown_target_modules_suggest_near_names() {
    let model = load(&fixture("bloom_tiny")).unwrap();
    let config = LoraConfig { target_modules: ["query_key_values"].into(), ..Default::default() };
    let error = get_peft_model(&model, &config).unwrap_err();
    assert!(matches!(error, Error::UnknownTargetModules { .. }));
    names(&error, &["query_key_values", "did you mean query_key_value"]);
    assert!(get_peft_model(&model, &qkv()).is_ok(), "the model is still there");
}

#[test]
fn an_adapter_for_another_model_names_its_keys() {
    let base = load(&fixture("bloom_tiny")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    get_peft_model(&base, &qkv()).unwrap().save_pretrained(folder.path()).unwrap();

    // The same adapter, said to be on other layers.
    let path = folder.path().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("query_key_value", "dense_h_to_4h")).unwrap();
    let error = PeftModel::from_pretrained(&base, folder.path()).unwrap_err();
    assert!(matches!(error, Error::KeyMismatch { .. }), "{error}");
    names(&error, &["dense_h_to_4h", "query_key_value"]);

    // Another rank than the weights have.
    fs::write(&path, text.replace("\"r\": 8", "\"r\": 4")).unwrap();
    let error = PeftModel::from_pretrained(&base, folder.path()).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    names(&error, &["lora_A"]);

    // A rank that no memory has room for.
    fs::write(&path, text.replace("\"r\": 8", "\"r\": 1000000000000")).unwrap();
    names(&PeftModel::from_pretrained(&base, folder.path()).unwrap_err(), &["r = 1000000000000"]);

    // Cut weights: an error, and an adapter that was loaded before keeps its values.
    fs::write(&path, &text).unwrap();
    let loaded = PeftModel::from_pretrained(&base, folder.path()).unwrap();
    let weights = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let before = values(loaded.trainable_parameters()[0].value());
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(loaded.load_adapter_weights(folder.path()), Err(Error::Malformed { .. })));
    assert_eq!(before, values(loaded.trainable_parameters()[0].value()));
}

#[test]
fn a_place_that_cannot_be_written() {
    let base = load(&fixture("bloom_tiny")).unwrap();
    let model = get_peft_model(&base, &qkv()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let error = model.save_pretrained(file.join("adapter")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    names(&error, &["file/adapter"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "in the way");
}

/// Saving over an adapter when the disk is full (here: a limit on the size of files) leaves the
/// old adapter whole and nothing half-written.
#[test]
fn a_full_disk_leaves_the_old_adapter() {
    let base = load(&fixture("bloom_tiny")).unwrap();
    let model = get_peft_model(&base, &qkv()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    model.save_pretrained(folder.path()).unwrap();
    let before = fs::read(folder.path().join("adapter_model.safetensors")).unwrap();
    let bigger = get_peft_model(&base, &LoraConfig { r: 64, ..qkv() }).unwrap();
    let error = with_file_size_limit(16 << 10, || bigger.save_pretrained(folder.path())).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert_eq!(before, fs::read(folder.path().join("adapter_model.safetensors")).unwrap());
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(PeftModel::from_pretrained(&base, folder.path()).is_ok());
}
