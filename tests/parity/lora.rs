//! LoRA training against PEFT and torch.optim.AdamW, step by step.

use std::path::Path;

use candle_core::{DType, Tensor};
use qlora_nb::{
    collator::Batch,
    internals::backend::param::Param,
    model::{AutoModelForCausalLM, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::{PassOptions, Trainable},
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
    let weight = merged.decoder().linears()[0].weight().dequantize().unwrap();
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

/// A's first values are those that `get_peft_model` gives after `torch.manual_seed(42)`.
#[test]
fn adapters_start_with_pefts_numbers() {
    let want: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture("kaiming.json")).unwrap()).unwrap();
    let base = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), ModelOptions::default()).unwrap();
    let config = LoraConfig { r: 4, target_modules: ["query_key_value"].into(), ..Default::default() };
    let model = get_peft_model(&base, &config).unwrap();
    let modules = want["modules"].as_object().unwrap();
    let params = model.trainable_parameters();
    assert_eq!(params.len(), 2 * modules.len());
    for param in params {
        let got = values(param.value());
        let Some(module) = modules.get(param.name()) else {
            assert!(param.name().contains("lora_B") && got.iter().all(|v| *v == 0.0), "{}", param.name());
            continue;
        };
        let first = numbers(&module["first"]);
        assert_eq!(got[..first.len()], first, "{}", param.name());
        let sum: f64 = got.iter().sum();
        assert!((sum - module["sum"].as_f64().unwrap()).abs() < 1e-6, "{}: sum {sum}", param.name());
    }
}

/// An adapter on every linear layer with values that need no random numbers.
fn adapter_to_exchange() -> PeftModel {
    let base = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), ModelOptions::default()).unwrap();
    let config = LoraConfig { r: 4, lora_alpha: 8, target_modules: "all-linear".into(), ..Default::default() };
    let model = get_peft_model(&base, &config).unwrap();
    for (i, p) in model.trainable_parameters().iter().enumerate() {
        let value = |j: usize| ((i * 31 + j * 17) % 23) as f32 / 100.0 - 0.11;
        let data: Vec<f32> = (0..p.value().elem_count()).map(value).collect();
        p.set(&Tensor::from_vec(data, p.value().dims(), &candle_core::Device::Cpu).unwrap()).unwrap();
    }
    model
}

/// The logits in a file that `tests/interchange/peft_reads_ours.py` wrote are ours.
fn logits_equal_python(model: &PeftModel, path: &Path) {
    let result: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ids: Vec<u32> = numbers(&result["input_ids"][0]).into_iter().map(|v| v as u32).collect();
    let ids = Tensor::new(ids, &candle_core::Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let ours = values(&model.logits(&ids, None).unwrap());
    let theirs: Vec<f64> = result["logits"][0].as_array().unwrap().iter().flat_map(numbers).collect();
    assert_eq!(ours.len(), theirs.len());
    let difference = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(difference < 1e-4, "logits differ by {difference}");
}

/// What PEFT made of this adapter, kept: `UPDATE_FIXTURES=1` with `QLORA_PYTHON` writes it anew.
#[test]
fn an_adapter_that_we_saved_gives_pefts_logits() {
    logits_equal_python(&adapter_to_exchange(), &fixture("peft_reads_ours.json"));
}

/// The same through Python itself, where `QLORA_PYTHON` (or python3) has torch and PEFT.
#[test]
fn python_peft_reads_an_adapter_that_we_saved() {
    let (model, folder) = (adapter_to_exchange(), tempfile::tempdir().unwrap());
    model.save_pretrained(folder.path()).unwrap();
    let update = std::env::var_os("UPDATE_FIXTURES").is_some();
    let out = if update { fixture("peft_reads_ours.json") } else { folder.path().join("logits.json") };
    let python = std::env::var("QLORA_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = root().join("tests/interchange/peft_reads_ours.py");
    let mut command = std::process::Command::new(python);
    command.arg(script).arg(fixture("bloom_tiny")).arg(folder.path()).args(["--ids", "[[5, 17, 93, 40, 8, 131]]"]);
    let result = match command.arg("--out").arg(&out).output() {
        Ok(result) => result,
        Err(e) => return eprintln!("skipped: {e}"),
    };
    let said = String::from_utf8_lossy(&result.stderr);
    match result.status.code() {
        Some(0) => logits_equal_python(&model, &out),
        Some(77) => eprintln!("{}", said.trim()),
        other => panic!("exit {other:?}: {said}"),
    }
}
