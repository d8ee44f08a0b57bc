//! DoRA and several adapters on one base against PEFT; scripts/fixtures/{dora,adapters}.py made the numbers.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use qlora_nb::{
    collator::Batch,
    display::module_tree::trainable_parameters_text,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, Model, ModelOptions},
    optim::{AdamW, Optim},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::Trainable,
};
use qlora_nb_tests::*;
use serde_json::Value;

fn base(options: ModelOptions) -> Model {
    AutoModelForCausalLM::from_pretrained(fixture("llama_tiny"), options).expect("the tiny model")
}

fn plain() -> Model {
    base(ModelOptions::default())
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn dora() -> LoraConfig {
    LoraConfig { r: 4, lora_alpha: 8, target_modules: "all-linear".into(), use_dora: true, ..Default::default() }
}

/// The `right` batch of llama_tiny.safetensors.
fn batch() -> Batch {
    labelled_batch(&tensors(fixture("llama_tiny.safetensors")), "right")
}

/// Sets what learns to the fixture's values under `prefix`.
fn set(model: &PeftModel, t: &HashMap<String, Tensor>, prefix: &str) {
    model.trainable_parameters().iter().for_each(|p| p.set(&t[&format!("{prefix}{}", p.name())]).unwrap());
}

/// The loss of the batch; the gradients stay in the parameters.
fn pass(model: &PeftModel, gradient_checkpointing: bool) -> f64 {
    loss_and_gradients(model, &batch(), gradient_checkpointing)
}

fn scalar(t: &Tensor) -> f64 {
    values(t)[0]
}

/// Logits of the real positions alone: padding has none here.
fn logits_differ(model: &PeftModel, expected: &Tensor) -> f64 {
    let batch = batch();
    let mask = batch.attention_mask.to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap();
    let got = model.logits(&batch.input_ids, Some(&batch.attention_mask)).unwrap();
    max_difference(&got, &expected.broadcast_mul(&mask).unwrap())
}

#[test]
fn dora_equals_peft() {
    let t = tensors(fixture("dora.safetensors"));
    let model = get_peft_model(&plain(), &dora()).unwrap();
    for param in model.trainable_parameters().iter().filter(|p| p.name().contains("magnitude")) {
        let difference = max_difference(param.value(), &t[&format!("fresh.{}", param.name())]);
        assert!(difference < 1e-6, "{}: {difference}", param.name());
    }
    set(&model, &t, "init.");
    assert!(logits_differ(&model, &t["logits"]) < 1e-4);
    for checkpointing in [false, true] {
        let loss = pass(&model, checkpointing);
        assert!((loss - scalar(&t["loss"])).abs() < 1e-5, "{loss}");
        for param in model.trainable_parameters() {
            let difference = max_difference(param.grad(), &t[&format!("grad.{}", param.name())]);
            assert!(difference < 1e-5, "{}: {difference}", param.name());
        }
    }
}

#[test]
fn dora_trains_as_in_peft_and_is_merged_saved_and_loaded() {
    let t = tensors(fixture("dora.safetensors"));
    let model = get_peft_model(&plain(), &dora()).unwrap();
    set(&model, &t, "init.");
    let params = model.trainable_parameters();
    let mut optimizer = AdamW::new(Optim::AdamWTorch, &params, (0.9, 0.999), 1e-8, 0.1).unwrap();
    for want in values(&t["losses"]) {
        let loss = pass(&model, true);
        assert!((loss - want).abs() < 1e-4, "{loss}, expected {want}");
        optimizer.step(1e-2, 1.0).unwrap();
    }
    for param in &params {
        let difference = max_difference(param.value(), &t[&format!("final.{}", param.name())]);
        assert!(difference < 1e-4, "{}: {difference}", param.name());
    }
    let loaded = PeftModel::from_pretrained(&plain(), fixture("dora_adapter")).unwrap();
    assert!(loaded.config().use_dora && logits_differ(&loaded, &t["final.logits"]) < 1e-4);
    let merged = loaded.merge_and_unload().unwrap();
    for (name, parameter) in merged.named_parameters() {
        if let Some(want) = t.get(&format!("merged.{name}")) {
            assert!(max_difference(parameter.tensor(), want) < 1e-5, "{name}");
        }
    }
    let out = tempfile::tempdir().unwrap();
    loaded.save_pretrained(out.path()).unwrap();
    let saved = tensors(out.path().join("adapter_model.safetensors"));
    let theirs = tensors(fixture("dora_adapter/adapter_model.safetensors"));
    assert_eq!(saved.len(), theirs.len());
    saved.iter().for_each(|(name, tensor)| assert_eq!(values(tensor), values(&theirs[name]), "{name}"));
}

#[test]
fn dora_on_four_bits_equals_peft() {
    let t = tensors(fixture("dora.safetensors"));
    let quantization = BitsAndBytesConfig { load_in_4bit: true, ..Default::default() };
    let model = base(ModelOptions { quantization_config: Some(quantization), ..Default::default() });
    let model = get_peft_model(&model, &dora()).unwrap();
    for param in model.trainable_parameters().iter().filter(|p| p.name().contains("magnitude")) {
        let difference = max_difference(param.value(), &t[&format!("nf4.fresh.{}", param.name())]);
        assert!(difference < 1e-5, "{}: {difference}", param.name());
    }
    set(&model, &t, "init.");
    assert!(logits_differ(&model, &t["nf4.logits"]) < 1e-4);
    let loss = pass(&model, false);
    assert!((loss - scalar(&t["nf4.loss"])).abs() < 1e-5, "{loss}");
    for param in model.trainable_parameters() {
        let difference = max_difference(param.grad(), &t[&format!("nf4.grad.{}", param.name())]);
        assert!(difference < 1e-5, "{}: {difference}", param.name());
    }
}

#[test]
fn dora_prints_as_in_peft() {
    let expected = json("dora.json");
    let model = get_peft_model(&plain(), &dora()).unwrap();
    assert_eq!(model.to_string(), expected["peft_tree"].as_str().unwrap());
    assert_eq!(listed_parameters(&model), expected["named_parameters"].as_str().unwrap().trim_end());
    let dropout = LoraConfig { lora_dropout: 0.1, ..dora() };
    let error = get_peft_model(&plain(), &dropout).unwrap_err().to_string();
    assert!(error.contains("lora_dropout") && error.contains("use_dora"), "{error}");
}

fn two() -> PeftModel {
    let first = LoraConfig { r: 4, lora_alpha: 8, target_modules: ["q_proj", "v_proj"].into(), ..Default::default() };
    let other =
        LoraConfig { r: 2, lora_alpha: 6, target_modules: ["q_proj", "down_proj"].into(), ..Default::default() };
    get_peft_model(&plain(), &first).unwrap().add_adapter("other", &other).unwrap()
}

#[test]
fn two_adapters_on_one_base_are_as_in_peft() {
    let (t, expected) = (tensors(fixture("adapters.safetensors")), json("adapters.json"));
    let model = two();
    for name in ["default", "other"] {
        for param in model.set_adapter(name).unwrap().trainable_parameters() {
            let listed = format!("init.{}", param.name().replace(".weight", &format!(".{name}.weight")));
            param.set(&t[&listed]).unwrap();
        }
    }
    assert_eq!(model.active_adapter(), Some("default"));
    assert_eq!(model.to_string(), expected["tree"].as_str().unwrap());
    assert_eq!(listed_parameters(&model), expected["named_parameters"].as_str().unwrap().trim_end());
    for (state, model) in [
        ("default", model.clone()),
        ("other", model.set_adapter("other").unwrap()),
        ("base", model.disable_adapter().unwrap()),
    ] {
        let logits = model.logits(&t["input_ids"].to_dtype(DType::U32).unwrap(), None).unwrap();
        let difference = max_difference(&logits, &t[&format!("logits.{state}")]);
        assert!(difference < 1e-4, "{state}: {difference}");
        let learn: Vec<String> =
            model.named_parameters().into_iter().filter(|(_, p)| p.requires_grad()).map(|(name, _)| name).collect();
        let state = &expected["states"][state];
        assert_eq!(serde_json::json!(learn), state["learn"]);
        let (trainable, all) = model.num_parameters();
        assert_eq!(trainable_parameters_text(trainable, all), state["trainable"].as_str().unwrap().trim());
    }
    let out = tempfile::tempdir().unwrap();
    model.save_pretrained(out.path()).unwrap();
    for folder in ["", "other"] {
        let name = format!("{folder}/adapter_model.safetensors");
        let (ours, theirs) =
            (tensors(out.path().join(name.trim_start_matches('/'))), tensors(fixture(&format!("two_adapters/{name}"))));
        assert_eq!(ours.len(), theirs.len());
        ours.iter().for_each(|(name, tensor)| assert_eq!(values(tensor), values(&theirs[name]), "{name}"));
    }
    let loaded = PeftModel::from_pretrained(&plain(), fixture("two_adapters")).unwrap();
    let loaded = loaded.load_adapter(fixture("two_adapters/other"), "other").unwrap().set_adapter("other").unwrap();
    let logits = loaded.logits(&t["input_ids"].to_dtype(DType::U32).unwrap(), None).unwrap();
    assert!(max_difference(&logits, &t["logits.other"]) < 1e-4);
}

/// The one that is active learns; the other, and the model that both stand on, stay as they are.
#[test]
fn only_the_active_adapter_learns() {
    let model = two();
    let other = model.set_adapter("other").unwrap();
    let before: Vec<Vec<f64>> = model.trainable_parameters().iter().map(|p| values(p.value())).collect();
    pass(&other, false);
    assert!(other.trainable_parameters().iter().any(|p| values(p.grad()).iter().any(|g| *g != 0.0)));
    assert!(model.trainable_parameters().iter().all(|p| values(p.grad()).iter().all(|g| *g == 0.0)));
    assert_eq!(model.trainable_parameters().iter().map(|p| values(p.value())).collect::<Vec<_>>(), before);
    assert!(model.disable_adapter().unwrap().trainable_parameters().is_empty());
    for error in [
        model.set_adapter("none").unwrap_err(),
        model.add_adapter("other", &LoraConfig::default()).unwrap_err(),
        model.add_adapter("a/b", &LoraConfig::default()).unwrap_err(),
    ] {
        assert!(error.to_string().contains("adapter"), "{error}");
    }
}
