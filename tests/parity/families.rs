//! Qwen2, Qwen3 and Mistral against transformers and PEFT; scripts/fixtures/{qwen2,qwen3,mistral}_tiny.py made the
//! numbers, and scripts/fixtures/tiny_models.py says what they are.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Tensor};
use qlora_nb::{
    display::module_tree::trainable_parameters_text,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, Model, ModelOptions, Parameter},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::{PassOptions, Trainable},
};
use qlora_nb_tests::*;
use serde_json::json;

const FAMILIES: [&str; 3] = ["qwen2_tiny", "qwen3_tiny", "mistral_tiny"];

fn load(path: &Path) -> Model {
    AutoModelForCausalLM::from_pretrained(path, ModelOptions::default()).expect("the tiny model")
}

fn numbers(family: &str) -> HashMap<String, Tensor> {
    tensors(fixture(&format!("{family}.safetensors")))
}

/// The tiny model with another config.json; `change` may add weights to the checkpoint or take some away.
fn variant(family: &str, config: serde_json::Value, change: impl Fn(&mut HashMap<String, Tensor>)) -> Model {
    let (folder, from) = (tempfile::tempdir().unwrap(), fixture(family));
    let read = std::fs::read(from.join("config.json")).unwrap();
    let mut merged: serde_json::Value = serde_json::from_slice(&read).unwrap();
    merged.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    std::fs::write(folder.path().join("config.json"), merged.to_string()).unwrap();
    let mut weights = tensors(from.join("model.safetensors"));
    change(&mut weights);
    candle_core::safetensors::save(&weights, folder.path().join("model.safetensors")).unwrap();
    load(folder.path())
}

/// Logits of the last positions of `single`, as many as the fixture has.
fn last_logits(model: &Model, t: &HashMap<String, Tensor>) -> Tensor {
    let (logits, kept) = (model.logits(&t["single.input_ids"], None).unwrap(), t["single.logits"].dims()[1]);
    logits.narrow(1, logits.dims()[1] - kept, kept).unwrap()
}

#[test]
fn forward_equals_transformers() {
    for family in FAMILIES {
        let (model, t) = (load(&fixture(family)), numbers(family));
        for side in ["right", "left"] {
            let part = |name: &str| &t[&format!("{side}.{name}")];
            let (ids, mask) = (part("input_ids"), part("attention_mask"));
            let difference = max_difference_where(&model.logits(ids, Some(mask)).unwrap(), part("logits"), mask);
            assert!(difference < 1e-4, "{family}, {side}: logits differ by {difference}");
        }
        for side in ["right", "long"] {
            let pass = model.loss(&labelled_batch(&t, side)).unwrap();
            let (loss, want) = (pass.loss_sum / pass.num_label_tokens as f64, &t[&format!("{side}.loss")]);
            assert!((loss - values(want)[0]).abs() < 1e-5, "{family}, {side}: loss {loss}, expected {want}");
        }
        let difference = max_difference(&last_logits(&model, &t), &t["single.logits"]);
        assert!(difference < 1e-4, "{family}, 70 tokens: logits differ by {difference}");
    }
}

/// Windows by config.json, heads of their own and shared ones, biases.
#[test]
fn other_configurations_equal_transformers() {
    let window = |extra: serde_json::Value| {
        let mut config = json!({"use_sliding_window": true, "sliding_window": 6});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    };
    // As config.json files from before transformers 5 have it: no layer_types.
    let by_depth = window(json!({"max_window_layers": 1, "layer_types": null}));
    for (family, name, config) in [
        ("mistral_tiny", "full", json!({"sliding_window": null})),
        ("mistral_tiny", "window_66", json!({"sliding_window": 66})),
        ("mistral_tiny", "window_69", json!({"sliding_window": 69})),
        ("qwen2_tiny", "window", by_depth.clone()),
        ("qwen2_tiny", "layer_types", window(json!({"layer_types": ["sliding_attention", "full_attention"]}))),
        ("qwen2_tiny", "untied", json!({"tie_word_embeddings": false})),
        ("qwen3_tiny", "window", by_depth),
        ("qwen3_tiny", "tied", json!({"tie_word_embeddings": true})),
        ("qwen3_tiny", "bias", json!({"attention_bias": true})),
    ] {
        let t = numbers(family);
        let model = variant(family, config, |weights| match name {
            "untied" => drop(weights.insert("lm_head.weight".into(), t["untied.lm_head.weight"].clone())),
            "tied" => drop(weights.remove("lm_head.weight")),
            "bias" => {
                for (layer, part) in (0..2).flat_map(|i| ["q", "k", "v", "o"].map(|p| (i, p))) {
                    let bias = t[&format!("bias.{part}_proj.bias")].clone();
                    weights.insert(format!("model.layers.{layer}.self_attn.{part}_proj.bias"), bias);
                }
            }
            _ => {}
        });
        let logits = last_logits(&model, &t);
        let difference = max_difference(&logits, &t[&format!("{name}.logits")]);
        assert!(difference < 1e-4, "{family}, {name}: logits differ by {difference}");
        assert!(max_difference(&logits, &t["single.logits"]) > 1e-2, "{family}: {name} changes nothing");
    }
}

/// A window that use_sliding_window does not switch on, or that no layer is deep enough for.
#[test]
fn qwens_unused_windows_change_nothing() {
    for (family, config) in ["qwen2_tiny", "qwen3_tiny"].into_iter().flat_map(|family| {
        [(false, 0), (true, 2)].map(|(used, layers)| {
            let config = json!({"use_sliding_window": used, "sliding_window": 6, "max_window_layers": layers,
                "layer_types": null});
            (family, config)
        })
    }) {
        let t = numbers(family);
        let logits = last_logits(&variant(family, config.clone(), |_| ()), &t);
        let difference = max_difference(&logits, &t["single.logits"]);
        assert!(difference < 1e-4, "{family}, {config}: logits differ by {difference}");
    }
}

/// Greedy tokens, one at a time through the cache, beyond Mistral's window: of one prompt, and of a batch of unequal
/// ones.
#[test]
fn generation_equals_transformers() {
    for family in FAMILIES {
        assert_generates(&load(&fixture(family)), &numbers(family), family);
    }
}

fn adapted(family: &str, t: &HashMap<String, Tensor>) -> PeftModel {
    let config = LoraConfig { r: 4, lora_alpha: 8, target_modules: "all-linear".into(), ..Default::default() };
    let model = get_peft_model(&load(&fixture(family)), &config).unwrap();
    for param in model.trainable_parameters() {
        param.set(&t[&format!("init.{}", param.name())]).unwrap();
    }
    model
}

#[test]
fn every_adapter_gradient_equals_pefts() {
    for (family, (side, grad, loss)) in FAMILIES
        .into_iter()
        .flat_map(|f| [("right", "grad", Some("lora.loss")), ("long", "grad_long", None)].map(|batch| (f, batch)))
    {
        let t = numbers(family);
        for gradient_checkpointing in [false, true] {
            let model = adapted(family, &t);
            let batch = labelled_batch(&t, side);
            let num_items = batch.num_label_tokens() as f64;
            let options = PassOptions { num_items, gradient_checkpointing, dropout_key: 0 };
            let got = model.forward_backward(&batch, &options).unwrap().loss_sum / num_items;
            if let Some(loss) = loss {
                assert!((got - values(&t[loss])[0]).abs() < 1e-5, "{family}: loss {got}");
            }
            let params = model.trainable_parameters();
            assert_eq!(params.len(), 2 * 7 * 2);
            for p in params {
                let want = &t[&format!("{grad}.{}", p.name())];
                let largest = values(want).into_iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                let difference = max_difference(p.grad(), want);
                assert!(largest > 1e-3, "{family}: {} is not tested: {largest}", p.name());
                assert!(difference < 1e-5, "{family}, {side}: gradient of {} differs by {difference}", p.name());
            }
        }
    }
}

/// What we save we read, in f32 and in 4 bits, with adapters and with these merged.
#[test]
fn models_and_adapters_are_saved_and_loaded() {
    for family in FAMILIES {
        let (t, folder) = (numbers(family), tempfile::tempdir().unwrap());
        let model = adapted(family, &t);
        let (input_ids, mask) = (&t["right.input_ids"], &t["right.attention_mask"]);
        let check = |logits: Tensor, name: &str| {
            let difference = max_difference_where(&logits, &t[&format!("{name}.logits")], mask);
            assert!(difference < 1e-4, "{family}, {name}: logits differ by {difference}");
        };
        check(model.logits(input_ids, Some(mask)).unwrap(), "lora");
        model.save_pretrained(folder.path()).unwrap();
        let again = PeftModel::from_pretrained(model.base_model(), folder.path()).unwrap();
        check(again.logits(input_ids, Some(mask)).unwrap(), "lora");
        let merged = model.merge_and_unload().unwrap();
        check(merged.logits(input_ids, Some(mask)).unwrap(), "lora");
        merged.save_pretrained(folder.path().join("merged")).unwrap();
        check(load(&folder.path().join("merged")).logits(input_ids, Some(mask)).unwrap(), "lora");
        model.base_model().save_pretrained(folder.path().join("base")).unwrap();
        check(load(&folder.path().join("base")).logits(input_ids, Some(mask)).unwrap(), "right");

        let quantization = BitsAndBytesConfig { load_in_4bit: true, ..Default::default() };
        let options = ModelOptions { quantization_config: Some(quantization), ..Default::default() };
        let quantized = AutoModelForCausalLM::from_pretrained(fixture(family), options).unwrap();
        quantized.save_pretrained(folder.path().join("nf4")).unwrap();
        let again = load(&folder.path().join("nf4"));
        assert!(again.is_quantized(), "{family}");
        let logits = |model: &Model| values(&model.logits(input_ids, Some(mask)).unwrap());
        assert_eq!(logits(&quantized), logits(&again), "{family}");
    }
}

#[test]
fn families_print_as_in_transformers_and_peft() {
    for family in FAMILIES {
        let want: serde_json::Value =
            serde_json::from_slice(&std::fs::read(fixture(&format!("{family}.json"))).unwrap()).unwrap();
        let listed = |parameters: Vec<(String, Parameter)>| -> String {
            parameters.iter().map(|(name, p)| format!("{name} {:?} {}\n", p.dims(), p.dtype())).collect()
        };
        let model = load(&fixture(family));
        assert_eq!(model.to_string(), want["tree"]);
        assert_eq!(listed(model.named_parameters()), want["named_parameters"].as_str().unwrap());
        let quantization = BitsAndBytesConfig { load_in_4bit: true, ..Default::default() };
        let options =
            ModelOptions { torch_dtype: DType::F16, quantization_config: Some(quantization), ..Default::default() };
        let quantized = AutoModelForCausalLM::from_pretrained(fixture(family), options).unwrap();
        assert_eq!(quantized.to_string(), want["tree_4bit"]);
        assert_eq!(listed(quantized.named_parameters()), want["named_parameters_4bit"].as_str().unwrap());
        let peft = adapted(family, &numbers(family));
        assert_eq!(peft.to_string(), want["peft_tree"]);
        assert_eq!(listed(peft.named_parameters()), want["named_parameters_peft"].as_str().unwrap());
        let (trainable, all) = peft.num_parameters();
        assert_eq!(trainable_parameters_text(trainable, all) + "\n", want["trainable"].as_str().unwrap());
    }
}

/// Without `target_modules` PEFT adapts q_proj and v_proj of all three.
#[test]
fn the_default_targets_are_pefts() {
    for family in FAMILIES {
        let model = get_peft_model(&load(&fixture(family)), &LoraConfig::default()).unwrap();
        let names: Vec<String> = model.trainable_parameters().iter().map(|p| p.name().to_string()).collect();
        assert_eq!(names.len(), 8, "{family}");
        assert!(names.iter().all(|n| n.contains("q_proj") || n.contains("v_proj")), "{family}: {names:?}");
    }
}
