//! `modules_to_save` against PEFT; scripts/fixtures/modules_to_save.py made the numbers.

use candle_core::{DType, Device, Tensor};
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

/// A case's name, its model, what is saved.
const CASES: [(&str, &str, &[&str]); 5] = [
    ("head", "llama", &["lm_head"]),
    ("embed", "llama", &["embed_tokens"]),
    ("both", "llama", &["lm_head", "embed_tokens"]),
    ("tied_embed", "qwen2", &["embed_tokens"]),
    ("tied_head", "qwen2", &["lm_head"]),
];

fn base(family: &str) -> Model {
    AutoModelForCausalLM::from_pretrained(fixture(&format!("{family}_tiny")), ModelOptions::default()).unwrap()
}

fn config(target: &str, modules: &[&str]) -> LoraConfig {
    let modules_to_save = Some(modules.iter().map(|name| name.to_string()).collect());
    LoraConfig { r: 4, lora_alpha: 8, target_modules: [target].into(), modules_to_save, ..Default::default() }
}

fn batch(family: &str) -> Batch {
    labelled_batch(&tensors(fixture(&format!("{family}_tiny.safetensors"))), "right")
}

fn first_row(batch: &Batch) -> Tensor {
    batch.input_ids.narrow(0, 0, 1).unwrap()
}

/// The model of a case, A and B with the fixture's values.
fn model(family: &str, modules: &[&str]) -> PeftModel {
    let t = tensors(fixture("modules_to_save.safetensors"));
    let model = get_peft_model(&base(family), &config("q_proj", modules)).unwrap();
    for param in model.trainable_parameters() {
        if let Some(value) = t.get(&format!("{family}.init.{}", param.name())) {
            param.set(value).unwrap();
        }
    }
    model
}

#[test]
fn modules_to_save_learn_as_in_peft() {
    let t = tensors(fixture("modules_to_save.safetensors"));
    for (case, family, modules) in CASES {
        let (model, batch) = (model(family, modules), batch(family));
        let params = model.trainable_parameters();
        for gradient_checkpointing in [false, true] {
            loss_and_gradients(&model, &batch, gradient_checkpointing);
            for param in &params {
                if let Some(want) = t.get(&format!("{case}.grad.{}", param.name())) {
                    let difference = max_difference(param.grad(), want);
                    assert!(difference < 1e-5, "{case} {}: {difference}", param.name());
                }
            }
        }
        let mut optimizer = AdamW::new(Optim::AdamWTorch, &params, (0.9, 0.999), 1e-8, 0.0).unwrap();
        for want in values(&t[&format!("{case}.losses")]) {
            let loss = loss_and_gradients(&model, &batch, true);
            assert!((loss - want).abs() < 1e-4, "{case}: {loss}, expected {want}");
            optimizer.step(1e-2, 1.0).unwrap();
        }
        let want = &t[&format!("{case}.logits")];
        let difference = max_difference(&model.logits(&first_row(&batch), None).unwrap(), want);
        assert!(difference < 1e-4, "{case}: {difference}");
    }
}

#[test]
fn modules_to_save_print_as_in_peft() {
    let expected: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("modules_to_save.json")).unwrap()).unwrap();
    for (case, family, modules) in CASES {
        let (model, expected) = (model(family, modules), &expected[case]);
        assert_eq!(model.to_string(), expected["tree"].as_str().unwrap(), "{case}");
        assert_eq!(listed_parameters(&model), expected["named_parameters"].as_str().unwrap().trim_end(), "{case}");
        let learn: Vec<String> =
            model.named_parameters().into_iter().filter(|(_, p)| p.requires_grad()).map(|(name, _)| name).collect();
        assert_eq!(serde_json::json!(learn), expected["learn"], "{case}");
        let (trainable, all) = model.num_parameters();
        assert_eq!(trainable_parameters_text(trainable, all), expected["trainable"].as_str().unwrap().trim());
        let out = tempfile::tempdir().unwrap();
        model.save_pretrained(out.path()).unwrap();
        let mut keys: Vec<String> = tensors(out.path().join("adapter_model.safetensors")).into_keys().collect();
        let mut theirs: Vec<String> = serde_json::from_value(expected["keys"].clone()).unwrap();
        keys.sort();
        theirs.sort();
        assert_eq!(keys, theirs, "{case}");
        let saved = LoraConfig::from_pretrained(out.path()).unwrap().modules_to_save;
        assert_eq!(serde_json::json!(saved), expected["modules_to_save"]);
        assert!(
            model.forms()[0].1.contains("(modules_to_save): <b>ModuleDict</b></span>"),
            "{case}: marked as learning"
        );
    }
}

#[test]
fn modules_to_save_are_saved_loaded_and_merged() {
    for (case, family, modules) in CASES {
        let (model, batch) = (model(family, modules), batch(family));
        let ids = first_row(&batch);
        let before = model.logits(&ids, None).unwrap();
        for param in model.trainable_parameters().iter().filter(|p| !p.name().contains("lora")) {
            param.set(&(param.value() * 1.25).unwrap()).unwrap();
        }
        let logits = model.logits(&ids, None).unwrap();
        assert!(max_difference(&logits, &before) > 1e-2, "{case}");
        let out = tempfile::tempdir().unwrap();
        model.save_pretrained(out.path()).unwrap();
        let loaded = PeftModel::from_pretrained(&base(family), out.path()).unwrap();
        assert_eq!(values(&loaded.logits(&ids, None).unwrap()), values(&logits), "{case}");
        let merged = loaded.merge_and_unload().unwrap();
        assert!(max_difference(&merged.logits(&ids, None).unwrap(), &logits) < 1e-4, "{case}");
        let folder = tempfile::tempdir().unwrap();
        merged.save_pretrained(folder.path()).unwrap();
        let again = AutoModelForCausalLM::from_pretrained(folder.path(), ModelOptions::default()).unwrap();
        assert_eq!(again.config()["tie_word_embeddings"], false, "{case}");
        assert_eq!(values(&again.logits(&ids, None).unwrap()), values(&merged.logits(&ids, None).unwrap()), "{case}");
        // The base, and the adapter when it is disabled, are what they were.
        let disabled = model.disable_adapter().unwrap().logits(&ids, None).unwrap();
        assert_eq!(values(&disabled), values(&base(family).logits(&ids, None).unwrap()), "{case}");
    }
}

/// A second adapter has a copy of the original of its own.
#[test]
fn each_adapter_has_its_own_copy() {
    let model = model("llama", &["lm_head", "embed_tokens"]);
    for param in model.trainable_parameters() {
        param.set(&(param.value() * 1.5).unwrap()).unwrap();
    }
    let two = model.add_adapter("other", &config("q_proj", &["embed_tokens"])).unwrap().set_adapter("other").unwrap();
    let ids = first_row(&batch("llama"));
    // Its B is zero and its copy untouched: the base's logits.
    assert_eq!(values(&two.logits(&ids, None).unwrap()), values(&base("llama").logits(&ids, None).unwrap()));
    let names: Vec<String> = two.named_parameters().into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&"base_model.model.model.embed_tokens.modules_to_save.other.weight".to_string()));
    let mixed = LoraConfig { target_modules: ["lm_head"].into(), ..Default::default() };
    let error = model.add_adapter("mixed", &mixed).unwrap_err().to_string();
    assert!(error.contains("lm_head"), "{error}");
}

/// BLOOM has a norm above its embeddings, which the gradient goes through. Four bits and f16 change nothing of the copies.
#[test]
fn the_gradient_of_blooms_embeddings_is_the_difference_quotient() {
    let quantization = BitsAndBytesConfig { load_in_4bit: true, ..Default::default() };
    let options =
        ModelOptions { torch_dtype: DType::F16, quantization_config: Some(quantization), ..Default::default() };
    let base = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), options).unwrap();
    let model = get_peft_model(&base, &config("query_key_value", &["word_embeddings", "lm_head"])).unwrap();
    let ids = Tensor::new(&[[3u32, 17, 9, 17, 150, 4], [8, 1, 17, 30, 31, 2]], &Device::Cpu).unwrap();
    let (attention_mask, labels) = (ids.ones_like().unwrap(), ids.to_dtype(DType::I64).unwrap());
    let batch = Batch::new(ids, attention_mask, labels).unwrap();
    loss_and_gradients(&model, &batch, false);
    let params = model.trainable_parameters();
    for name in ["word_embeddings", "lm_head"] {
        let param = params.iter().find(|p| p.name().contains(name)).unwrap();
        let (value, grad) = (param.value().copy().unwrap(), param.grad().copy().unwrap());
        let length = grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        // Along the gradient the loss changes by its length.
        let step = 1e-3 / f64::from(length);
        let loss_at = |by: f64| {
            param.set(&(&value + (&grad * by).unwrap()).unwrap()).unwrap();
            let pass = model.loss(&batch).unwrap();
            pass.loss_sum / pass.num_label_tokens as f64
        };
        let quotient = (loss_at(step) - loss_at(-step)) / (2.0 * step * f64::from(length));
        param.set(&value).unwrap();
        assert!((quotient / f64::from(length) - 1.0).abs() < 1e-2, "{name}: {quotient}, length {length}");
    }
}

#[test]
fn a_module_that_cannot_be_saved_is_named() {
    for (modules, word) in [(["norm"], "layernorm"), (["q_proj"], "q_proj"), (["nothing"], "nothing")] {
        let error = get_peft_model(&base("llama"), &config("q_proj", &modules)).unwrap_err().to_string();
        assert!(error.contains("modules_to_save") && error.contains(word) && error.contains("lm_head"), "{error}");
    }
}
