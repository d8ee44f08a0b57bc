//! Llama against transformers and PEFT; scripts/fixtures/llama_tiny.py made the numbers.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    display::module_tree::trainable_parameters_text,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, Model, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::{PassOptions, Trainable},
};
use qlora_nb_tests::*;

fn load(path: &Path) -> Model {
    AutoModelForCausalLM::from_pretrained(path, ModelOptions::default()).expect("the tiny model")
}

fn numbers() -> HashMap<String, Tensor> {
    tensors(fixture("llama_tiny.safetensors"))
}

/// The tiny model with another config.json, with or without its own output head.
fn variant(changes: serde_json::Value, head: bool) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let read = std::fs::read(fixture("llama_tiny/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&read).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut weights = tensors(fixture("llama_tiny/model.safetensors"));
    if !head {
        weights.remove("lm_head.weight");
    }
    candle_core::safetensors::save(&weights, folder.path().join("model.safetensors")).unwrap();
    load(folder.path())
}

#[test]
fn forward_equals_transformers() {
    let (model, t) = (load(&fixture("llama_tiny")), numbers());
    for side in ["right", "left"] {
        let part = |name: &str| &t[&format!("{side}.{name}")];
        let (ids, mask) = (part("input_ids"), part("attention_mask"));
        let difference = max_difference_where(&model.logits(ids, Some(mask)).unwrap(), part("logits"), mask);
        assert!(difference < 1e-4, "{side}: logits differ by {difference}");
    }
    let pass = model.loss(&labelled_batch(&t, "right")).unwrap();
    let loss = pass.loss_sum / pass.num_label_tokens as f64;
    assert!((loss - values(&t["right.loss"])[0]).abs() < 1e-5, "{loss}");
    let (input_ids, mask) = (&t["left.input_ids"], &t["left.attention_mask"]);
    for (i, state) in model.decoder().hidden_states(input_ids, Some(mask)).unwrap().iter().enumerate() {
        let difference = max_difference_where(state, &t[&format!("left.hidden_{i}")], mask);
        assert!(difference < 1e-4, "hidden state {i} differs by {difference}");
    }
    let difference = max_difference(&model.logits(&t["single.input_ids"], None).unwrap(), &t["single.logits"]);
    assert!(difference < 1e-4, "60 tokens: logits differ by {difference}");
}

#[test]
fn other_configurations_equal_transformers() {
    let t = numbers();
    for (name, changes) in [
        ("tied", serde_json::json!({"tie_word_embeddings": true})),
        (
            "llama3",
            serde_json::json!({"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        ),
        // As transformers before 5 wrote it.
        (
            "linear",
            serde_json::json!({"rope_parameters": null, "rope_theta": 1000.0,
            "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ),
        ("plain", serde_json::json!({"attention_bias": false, "mlp_bias": false})),
    ] {
        let logits = variant(changes, name != "tied").logits(&t["single.input_ids"], None).unwrap();
        let difference = max_difference(&logits, &t[&format!("{name}.logits")]);
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");
        assert!(max_difference(&logits, &t["single.logits"]) > 1e-2, "{name} changes nothing");
    }
}

/// transformers ties only what does not differ.
#[test]
fn a_head_of_its_own_is_not_tied() {
    let t = numbers();
    let model = variant(serde_json::json!({"tie_word_embeddings": true}), true);
    let difference = max_difference(&model.logits(&t["single.input_ids"], None).unwrap(), &t["single.logits"]);
    assert!(difference < 1e-4 && !model.decoder().is_tied(), "logits differ by {difference}");
}

/// Greedy tokens, one at a time through the cache: of one prompt, and of a batch of unequal ones.
#[test]
fn generation_equals_transformers() {
    assert_generates(&load(&fixture("llama_tiny")), &numbers(), "llama_tiny");
}

fn adapted(t: &HashMap<String, Tensor>) -> PeftModel {
    let config = LoraConfig { r: 4, lora_alpha: 8, target_modules: "all-linear".into(), ..Default::default() };
    let model = get_peft_model(&load(&fixture("llama_tiny")), &config).unwrap();
    for param in model.trainable_parameters() {
        param.set(&t[&format!("init.{}", param.name())]).unwrap();
    }
    model
}

#[test]
fn every_adapter_gradient_equals_pefts() {
    let t = numbers();
    for gradient_checkpointing in [false, true] {
        let model = adapted(&t);
        let batch = labelled_batch(&t, "right");
        let num_items = batch.num_label_tokens() as f64;
        let options = PassOptions { num_items, gradient_checkpointing, dropout_key: 0 };
        let loss = model.forward_backward(&batch, &options).unwrap().loss_sum / num_items;
        assert!((loss - values(&t["lora.loss"])[0]).abs() < 1e-5, "{loss}");
        let params = model.trainable_parameters();
        assert_eq!(params.len(), 2 * 7 * 2);
        for p in params {
            let want = &t[&format!("grad.{}", p.name())];
            let (difference, largest) =
                (max_difference(p.grad(), want), values(want).into_iter().fold(0.0, |m: f64, v| m.max(v.abs())));
            assert!(largest > 1e-3, "{} is not tested: {largest}", p.name());
            assert!(difference < 1e-5, "gradient of {} differs by {difference}", p.name());
        }
    }
}

#[test]
fn adapters_are_merged_saved_and_loaded() {
    let t = numbers();
    let (model, folder) = (adapted(&t), tempfile::tempdir().unwrap());
    let (input_ids, mask) = (&t["right.input_ids"], &t["right.attention_mask"]);
    let check = |logits: Tensor, name: &str| {
        let difference = max_difference_where(&logits, &t[&format!("{name}.logits")], mask);
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");
    };
    check(model.logits(input_ids, Some(mask)).unwrap(), "lora");
    let merged = model.merge_and_unload().unwrap();
    check(merged.logits(input_ids, Some(mask)).unwrap(), "merged");
    model.save_pretrained(folder.path()).unwrap();
    let again = PeftModel::from_pretrained(model.base_model(), folder.path()).unwrap();
    check(again.logits(input_ids, Some(mask)).unwrap(), "lora");
    merged.save_pretrained(folder.path().join("merged")).unwrap();
    check(load(&folder.path().join("merged")).logits(input_ids, Some(mask)).unwrap(), "merged");
}

#[test]
fn llama_prints_as_in_transformers_and_peft() {
    let want: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture("llama_tiny.json")).unwrap()).unwrap();
    let listed = |parameters: Vec<(String, qlora_nb::model::Parameter)>| -> String {
        parameters.iter().map(|(name, p)| format!("{name} {}\n", p.dtype())).collect()
    };
    let model = load(&fixture("llama_tiny"));
    assert_eq!(model.to_string(), want["tree"]);
    assert_eq!(listed(model.named_parameters()), want["named_parameters"].as_str().unwrap());
    let quantization = BitsAndBytesConfig { load_in_4bit: true, ..Default::default() };
    let options =
        ModelOptions { torch_dtype: DType::F16, quantization_config: Some(quantization), ..Default::default() };
    let quantized = AutoModelForCausalLM::from_pretrained(fixture("llama_tiny"), options).unwrap();
    assert_eq!(quantized.to_string(), want["tree_4bit"]);
    assert_eq!(listed(quantized.named_parameters()), want["named_parameters_4bit"].as_str().unwrap());
    let peft = adapted(&numbers());
    assert_eq!(peft.to_string(), want["peft_tree"]);
    assert_eq!(listed(peft.named_parameters()), want["named_parameters_peft"].as_str().unwrap());
    let (trainable, all) = peft.num_parameters();
    assert_eq!(trainable_parameters_text(trainable, all) + "\n", want["trainable"].as_str().unwrap());
}

/// Without `target_modules` PEFT adapts q_proj and v_proj.
#[test]
fn the_default_targets_are_pefts() {
    let model = get_peft_model(&load(&fixture("llama_tiny")), &LoraConfig::default()).unwrap();
    let names: Vec<String> = model.trainable_parameters().iter().map(|p| p.name().to_string()).collect();
    assert_eq!(names.len(), 8);
    assert!(names.iter().all(|n| n.contains("q_proj") || n.contains("v_proj")), "{names:?}");
    let ids = Tensor::new(&[[5u32, 9]], &Device::Cpu).unwrap();
    assert!(model.logits(&ids, None).is_ok());
}
