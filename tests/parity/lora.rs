//! LoRA training against PEFT and torch.optim.AdamW, step by step.

use std::path::Path;

use candle_core::{DType, Tensor};
use qlora_nb::{
    batch::Batch,
    layers::param::Param,
    model::{AutoModelForCausalLM, ModelOptions},
    models::causal_lm::{PassOptions, Trainable},
    peft::{LoraConfig, PeftModel, get_peft_model},
};
use qlora_nb_tests::*;

use crate::adamw::PlainAdamW;

/// The adapted tiny model with the reference's initial values.
fn adapted(model: &Path, config: &LoraConfig, init: impl Fn(&str) -> Tensor) -> PeftModel {
    let base = AutoModelForCausalLM::from_pretrained(model, ModelOptions::default()).unwrap();
    let model = get_peft_model(&base, config).unwrap();
    for param in model.trainable_parameters() {
        param.set(&init(param.name())).unwrap();
    }
    model
}

fn batch_of(ids: &Tensor) -> Batch {
    let ids = ids.to_dtype(DType::U32).unwrap();
    Batch::new(ids.clone(), ids.ones_like().unwrap(), ids.to_dtype(DType::I64).unwrap()).unwrap()
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn grad_norm(params: &[Param]) -> f64 {
    let sum: f64 = params.iter().flat_map(|p| values(p.grad())).map(|g| g * g).sum();
    sum.sqrt()
}

/// The golden's 20 steps with the batch cut in `splits` micro-batches.
fn golden_run(splits: usize, gradient_checkpointing: bool) -> Option<PeftModel> {
    let (model, file) = (shared("golden/bloom_tiny")?, shared("golden/lora_same.safetensors")?);
    let t = tensors(file);
    let config = LoraConfig { r: 8, lora_alpha: 8, target_modules: ["query_key_value"].into(), ..Default::default() };
    let model =
        adapted(&model, &config, |name| t[&format!("init.{}", name.replace(".weight", ".default.weight"))].clone());
    let params = model.trainable_parameters();
    let mut optimizer = PlainAdamW::new(&params, 0.0);
    let (losses, norms) = (values(&t["losses"]), values(&t["grad_norms"]));
    for step in 0..20 {
        let ids = t["batches"].get(step).unwrap();
        let rows = ids.dims()[0] / splits;
        let whole = batch_of(&ids);
        let mut loss = 0.0;
        params.iter().for_each(|p| p.zero_grad().unwrap());
        for i in 0..splits {
            let batch = batch_of(&ids.narrow(0, i * rows, rows).unwrap());
            let options =
                PassOptions { num_items: whole.num_label_tokens() as f64, gradient_checkpointing, dropout_key: 0 };
            loss += model.forward_backward(&batch, &options).unwrap().loss_sum / options.num_items;
        }
        assert!((loss - losses[step]).abs() < 1e-5, "step {step}: loss {loss}, expected {}", losses[step]);
        let norm = grad_norm(&params);
        assert!((norm - norms[step]).abs() < 1e-4, "step {step}: gradient norm {norm}, expected {}", norms[step]);
        optimizer.step(1e-2, 1.0);
    }
    let trained = tensors(shared("golden/adapter_same/adapter_model.safetensors")?);
    for p in &params {
        let difference = max_difference(p.value(), &trained[p.name()]);
        assert!(difference < 1e-5, "{} differs by {difference}", p.name());
    }
    Some(model)
}

#[test]
fn twenty_steps_equal_peft() {
    let Some(model) = golden_run(1, false) else { return };
    let t = tensors(shared("golden/lora_same.safetensors").unwrap());
    let f = tensors(shared("golden/bloom_forward.safetensors").unwrap());
    let (ids, mask) = (&f["input_ids"], &f["attention_mask"]);
    let difference =
        max_difference_where(&model.logits(ids, Some(mask)).unwrap(), &t["final_logits_on_forward_ids"], mask);
    assert!(difference < 1e-4, "final logits differ by {difference}");
    let merged = model.merge_and_unload().unwrap();
    let difference =
        max_difference_where(&merged.logits(ids, Some(mask)).unwrap(), &t["merged_logits_on_forward_ids"], mask);
    assert!(difference < 1e-4, "merged logits differ by {difference}");
    let weight = merged.decoder().linears()[0].weight.dequantize().unwrap();
    let difference = max_difference(&weight, &t["merged_h0_qkv_weight"]);
    assert!(difference < 1e-5, "merged weight differs by {difference}");
}

#[test]
fn twenty_steps_with_checkpointing_equal_peft() {
    golden_run(1, true);
}

#[test]
fn twenty_steps_accumulated_equal_peft() {
    golden_run(2, false);
    golden_run(4, true);
}

#[test]
fn an_adapter_that_peft_saved_loads() {
    let (Some(model), Some(adapter)) = (shared("golden/bloom_tiny"), shared("golden/adapter_same")) else { return };
    let base = AutoModelForCausalLM::from_pretrained(model, ModelOptions::default()).unwrap();
    let model = PeftModel::from_pretrained(&base, adapter).unwrap();
    let t = tensors(shared("golden/lora_same.safetensors").unwrap());
    let f = tensors(shared("golden/bloom_forward.safetensors").unwrap());
    let (ids, mask) = (&f["input_ids"], &f["attention_mask"]);
    let difference =
        max_difference_where(&model.logits(ids, Some(mask)).unwrap(), &t["final_logits_on_forward_ids"], mask);
    assert!(difference < 1e-4, "logits differ by {difference}");
}

/// The fixture's run: every linear adapted, two unequal micro-batches a step, warm-up, decay
/// and clipping.
#[test]
fn ten_steps_on_all_linears_equal_peft() {
    let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture("lora_curve.json")).unwrap()).unwrap();
    let t = tensors(fixture("lora_curve.safetensors"));
    let config = LoraConfig { r: 4, lora_alpha: 8, target_modules: "all-linear".into(), ..Default::default() };
    for gradient_checkpointing in [false, true] {
        let model = adapted(&fixture("bloom_tiny"), &config, |name| t[&format!("init.{name}")].clone());
        let params = model.trainable_parameters();
        let decay = meta["weight_decay"].as_f64().unwrap();
        let mut optimizer = PlainAdamW::new(&params, decay);
        for (step, want) in numbers(&meta["losses"]).into_iter().enumerate() {
            let part = |name: &str, i: usize| t[&format!("batch_{}.{name}", (2 * step + i) % 4)].clone();
            let batch = |i: usize| {
                let (ids, mask) = (part("input_ids", i), part("attention_mask", i));
                let u = |t: Tensor| t.to_dtype(DType::U32).unwrap();
                Batch::new(u(ids), u(mask), part("labels", i)).unwrap()
            };
            let batches = [batch(0), batch(1)];
            let num_items: usize = batches.iter().map(|b| b.num_label_tokens()).sum();
            params.iter().for_each(|p| p.zero_grad().unwrap());
            let options = PassOptions { num_items: num_items as f64, gradient_checkpointing, dropout_key: 0 };
            let sum: f64 = batches.iter().map(|b| model.forward_backward(b, &options).unwrap().loss_sum).sum();
            let loss = sum / num_items as f64;
            assert!((loss - want).abs() < 1e-5, "step {step}: loss {loss}, expected {want}");
            if step == 0 {
                for p in &params {
                    let difference = max_difference(p.grad(), &t[&format!("grad_1.{}", p.name())]);
                    assert!(difference < 1e-5, "gradient of {} differs by {difference}", p.name());
                }
            }
            let norm = grad_norm(&params);
            let scale = (meta["max_grad_norm"].as_f64().unwrap() / (norm + 1e-6)).min(1.0);
            let wanted = numbers(&meta["grad_norms"])[step];
            assert!((norm - wanted).abs() < 1e-4, "step {step}: gradient norm {}, expected {wanted}", norm);
            optimizer.step(numbers(&meta["learning_rates"])[step], scale);
        }
        for p in &params {
            let difference = max_difference(p.value(), &t[&format!("final.{}", p.name())]);
            assert!(difference < 1e-5, "{} differs by {difference}", p.name());
        }
    }
}
