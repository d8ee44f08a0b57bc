//! Files whose numbers and names are absurd, and what is saved of models that are partly in 4 bits.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    error::Error,
    internals::generation::generate,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, CausalLM, ModelOptions},
    optim::{self, Hyperparameters, Optim},
    peft::{LoraConfig, Param, get_peft_model},
    pipeline::GenerationConfig,
    quant::QuantType,
};
use qlora_nb_tests::*;
use serde_json::{Value, json};

use crate::model::{copy, copy_of, edit_config, load, names};

/// Nothing of what the numbers say is made before the file is known to have it.
#[test]
fn configurations_with_absurd_numbers() {
    let huge = 1u64 << 60;
    for (model, changes, named) in [
        ("bloom_tiny", json!({"n_layer": huge}), "n_layer"),
        ("bloom_tiny", json!({"n_layer": 10_000_000}), "h.2."),
        ("bloom_tiny", json!({"hidden_size": 1u64 << 40, "n_head": 1u64 << 40}), "hidden_size"),
        ("bloom_tiny", json!({"vocab_size": huge}), "vocab_size"),
        ("llama_tiny", json!({"num_hidden_layers": 16_000_000}), "layers.2."),
        ("llama_tiny", json!({"num_hidden_layers": huge}), "num_hidden_layers"),
        ("llama_tiny", json!({"intermediate_size": 1 << 24}), "gate_proj"),
        ("llama_tiny", json!({"intermediate_size": huge}), "intermediate_size"),
        ("llama_tiny", json!({"head_dim": huge, "num_key_value_heads": huge}), "num_key_value_heads"),
        ("qwen2_tiny", json!({"use_sliding_window": true, "num_hidden_layers": huge}), "num_hidden_layers"),
    ] {
        let folder = copy_of(model);
        edit_config(folder.path(), |config| {
            changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        });
        names(&load(folder.path()).unwrap_err(), &[named]);
    }
    // Tensors that the file has not, in a size that no memory has: 2^24 * 2^24 numbers.
    for (missing, model) in [("embed_tokens", "llama_tiny"), ("gate_proj", "llama_tiny"), ("lm_head", "llama_tiny")] {
        let folder = copy_of(model);
        edit_config(folder.path(), |config| {
            for key in ["vocab_size", "hidden_size", "intermediate_size"] {
                config[key] = (1 << 24).into();
            }
        });
        let file = folder.path().join("model.safetensors");
        let all: HashMap<String, Tensor> =
            tensors(&file).into_iter().filter(|(name, _)| !name.contains(missing)).collect();
        let kept = if missing == "embed_tokens" { HashMap::new() } else { all };
        candle_core::safetensors::save(&kept, &file).unwrap();
        let error = load(folder.path()).unwrap_err();
        assert!(matches!(error, Error::KeyMismatch { .. } | Error::Shape { .. }), "{error}");
    }
}

/// Shards that an index names: inside the folder, each tensor once.
#[test]
fn an_index_that_leads_astray() {
    let folder = copy();
    let shard = |name: &str| folder.path().join(name);
    fs::rename(shard("model.safetensors"), shard("a.safetensors")).unwrap();
    fs::copy(shard("a.safetensors"), shard("b.safetensors")).unwrap();
    fs::copy(shard("a.safetensors"), folder.path().parent().unwrap().join("outside.safetensors")).unwrap();
    let absolute = shard("a.safetensors").display().to_string();
    for (place, named) in [
        (json!("../outside.safetensors"), "in no file of the model's folder"),
        (json!(absolute), "in no file of the model's folder"),
        (json!(7), "in no file of the model's folder"),
        (json!("b.safetensors"), "a.safetensors too"),
    ] {
        let index = json!({"weight_map": {"x": "a.safetensors", "y": place}});
        fs::write(shard("model.safetensors.index.json"), index.to_string()).unwrap();
        let error = load(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
        names(&error, &[named]);
    }
    fs::write(shard("model.safetensors.index.json"), r#"{"weight_map": {"x": "a.safetensors"}}"#).unwrap();
    assert!(load(folder.path()).is_ok());
}

#[test]
fn a_header_longer_than_any_reader_takes() {
    let folder = copy();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, 150_000_000u64.to_le_bytes()).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(200_000_000).unwrap();
    names(&load(folder.path()).unwrap_err(), &["150000000", "100000000"]);
}

#[test]
fn more_sequences_than_memory_has() {
    let folder = copy();
    let wishes = json!({"num_return_sequences": 1_000_000_000, "do_sample": true});
    fs::write(folder.path().join("generation_config.json"), wishes.to_string()).unwrap();
    let model = load(folder.path()).unwrap();
    let config = GenerationConfig::from_checkpoint(model.generation_defaults()).unwrap();
    let error = generate(&model, &[vec![5]], &config, &mut |_, _| ()).unwrap_err();
    names(&error, &["num_return_sequences", "1000000000"]);
}

/// An optimizer's state with numbers that no step makes is refused and changes nothing.
#[test]
fn a_state_that_no_optimizer_has() {
    let param = Param::new("w", &Tensor::ones(4096, DType::F32, &Device::Cpu).unwrap()).unwrap();
    for (optim, part, bad) in [
        (Optim::AdamWTorch, "exp_avg", f32::NAN),
        (Optim::AdamWTorch, "exp_avg_sq", -1e-9),
        (Optim::AdamWTorch, "exp_avg_sq", f32::INFINITY),
        (Optim::AdamW8bit, "absmax2", -1.0),
        (Optim::AdamW8bit, "absmax1", f32::NEG_INFINITY),
        (Optim::Lion32bit, "state1", f32::NAN),
        (Optim::Adafactor, "exp_avg_sq", -1.0),
    ] {
        let mut optimizer = optim::new(optim, std::slice::from_ref(&param), &Hyperparameters::default()).unwrap();
        let good = optimizer.state_dict().unwrap();
        let mut state = good.clone();
        let (key, shape) = (format!("w.{part}"), good[&format!("w.{part}")].dims().to_vec());
        let mut numbers = vec![0f32; shape.iter().product()];
        numbers[shape[0] / 2] = bad;
        state.insert(key.clone(), Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap());
        let error = optimizer.load_state_dict(&state).unwrap_err();
        names(&error, &[&key, &bad.to_string(), "finite"]);
        assert!(optimizer.load_state_dict(&good).is_ok());
        // To print it took hours.
        let mut state = good.clone();
        state.insert("step".into(), Tensor::zeros((1 << 40, 0), DType::I64, &Device::Cpu).unwrap());
        names(&optimizer.load_state_dict(&state).unwrap_err(), &["step of the optimizer's state", "an empty tensor"]);
    }
}

fn in_4_bits(quant_type: QuantType, double: bool) -> ModelOptions {
    let config = BitsAndBytesConfig {
        load_in_4bit: true,
        bnb_4bit_quant_type: quant_type,
        bnb_4bit_use_double_quant: double,
        bnb_4bit_compute_dtype: DType::BF16,
    };
    ModelOptions { quantization_config: Some(config), ..Default::default() }
}

fn saved_quantization(folder: &Path) -> Value {
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    config["quantization_config"].clone()
}

/// transformers makes a 4-bit layer of each linear one that config.json does not except.
#[test]
fn a_model_partly_in_4_bits_is_saved_as_it_is() {
    let base = AutoModelForCausalLM::from_pretrained(fixture("llama_tiny"), in_4_bits(QuantType::Fp4, true)).unwrap();
    let config = LoraConfig { target_modules: ["q_proj"].into(), ..Default::default() };
    let merged = get_peft_model(&base, &config).unwrap().merge_and_unload().unwrap();
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    merged.save_pretrained(first.path()).unwrap();
    let want = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"],
    });
    assert_eq!(saved_quantization(first.path()), want);
    // Loaded again without a word of it, or with options that its weights do not have.
    load(first.path()).unwrap().save_pretrained(second.path()).unwrap();
    assert_eq!(saved_quantization(second.path()), want);
    base.save_pretrained(first.path()).unwrap();
    let other = AutoModelForCausalLM::from_pretrained(first.path(), in_4_bits(QuantType::Nf4, false)).unwrap();
    other.save_pretrained(second.path()).unwrap();
    assert_eq!(saved_quantization(second.path()), saved_quantization(first.path()));
    load(&fixture("llama_tiny")).unwrap().save_pretrained(second.path()).unwrap();
    assert!(saved_quantization(second.path()).is_null());
}

/// Equal codes with other statistics are another model.
#[test]
fn fingerprints_tell_how_weights_are_quantized() {
    let kinds = [(QuantType::Nf4, false), (QuantType::Nf4, true), (QuantType::Fp4, false)];
    let fingerprint = |(quant_type, double)| {
        let base = AutoModelForCausalLM::from_pretrained(fixture("llama_tiny"), in_4_bits(quant_type, double)).unwrap();
        get_peft_model(&base, &LoraConfig::default()).unwrap().fingerprint().unwrap()
    };
    let all: std::collections::HashSet<String> = kinds.into_iter().map(fingerprint).collect();
    assert_eq!(all.len(), kinds.len());
    assert!(all.contains(&fingerprint(kinds[0])));
}
