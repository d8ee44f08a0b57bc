//! What the engine promises of itself: no gradient is cut, checkpointing changes no bit,
//! padding and splitting change nothing.

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    collator::Batch,
    internals::backend::param::Param,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::{PassOptions, Trainable},
};
use qlora_nb_tests::*;

/// One of each architecture.
const MODELS: [&str; 2] = ["bloom_tiny", "llama_tiny"];

fn model(name: &str, dropout: f64, quantized: bool) -> PeftModel {
    let quantization = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: true, ..Default::default() };
    let options = ModelOptions { quantization_config: quantized.then_some(quantization), ..Default::default() };
    let base = AutoModelForCausalLM::from_pretrained(fixture(name), options).unwrap();
    let config = LoraConfig { r: 4, target_modules: "all-linear".into(), lora_dropout: dropout, ..Default::default() };
    let model = get_peft_model(&base, &config).unwrap();
    for (i, p) in model.trainable_parameters().iter().enumerate() {
        let n = p.value().elem_count();
        let random: Vec<f32> = (0..n).map(|j| ((i * 31 + j * 17) % 23) as f32 / 100.0 - 0.11).collect();
        p.set(&Tensor::from_vec(random, p.value().dims(), &Device::Cpu).unwrap()).unwrap();
    }
    model
}

/// Three rows of different lengths; the first `prompt` labels of each are ignored.
fn batch(left: bool, prompt: usize) -> Batch {
    let (rows, length) = ([11usize, 7, 9], 11);
    let (mut ids, mut mask, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for (r, &n) in rows.iter().enumerate() {
        for position in 0..length {
            let start = if left { length - n } else { 0 };
            let real = (start..start + n).contains(&position);
            let id = (((position - start.min(position)) * 7 + r * 13) % 150 + 4) as u32;
            ids.push(if real { id } else { 3 });
            mask.push(u32::from(real));
            labels.push(if real && position - start >= prompt { i64::from(id) } else { -100 });
        }
    }
    let t = |v: Vec<u32>| Tensor::from_vec(v, (3, length), &Device::Cpu).unwrap();
    Batch::new(t(ids), t(mask), Tensor::from_vec(labels, (3, length), &Device::Cpu).unwrap()).unwrap()
}

fn gradients(model: &PeftModel, batch: &Batch, gradient_checkpointing: bool, key: u64) -> Vec<Vec<f64>> {
    let params = model.trainable_parameters();
    params.iter().for_each(|p| p.zero_grad().unwrap());
    let options = PassOptions { num_items: 20.0, gradient_checkpointing, dropout_key: key };
    model.forward_backward(batch, &options).unwrap();
    params.iter().map(|p: &Param| values(p.grad())).collect()
}

#[test]
fn checkpointing_gives_the_same_gradients_bit_for_bit() {
    for name in MODELS {
        for (dropout, quantized) in [(0.0, false), (0.2, false), (0.2, true)] {
            let model = model(name, dropout, quantized);
            let plain = gradients(&model, &batch(false, 1), false, 5);
            assert_eq!(plain, gradients(&model, &batch(false, 1), true, 5), "{name}");
        }
    }
}

#[test]
fn dropout_follows_its_key() {
    for name in MODELS {
        let model = model(name, 0.3, false);
        let first = gradients(&model, &batch(false, 1), false, 5);
        assert_ne!(first, gradients(&model, &batch(false, 1), false, 6));
        assert_eq!(first, gradients(&model, &batch(false, 1), false, 5));
    }
}

#[test]
fn the_side_of_the_padding_changes_nothing() {
    for name in MODELS {
        let model = model(name, 0.0, false);
        assert_eq!(gradients(&model, &batch(false, 1), false, 0), gradients(&model, &batch(true, 1), false, 0));
    }
}

/// Central differences of the loss, for the largest gradient of each parameter: nothing is cut.
#[test]
fn every_adapter_parameter_has_the_gradient_that_differences_give() {
    for (name, quantized) in MODELS.into_iter().flat_map(|name| [(name, false), (name, true)]) {
        let (model, batch) = (model(name, 0.0, quantized), batch(false, 2));
        let grads = gradients(&model, &batch, true, 0);
        for (p, grad) in model.trainable_parameters().iter().zip(&grads) {
            let largest = (0..grad.len()).max_by(|&a, &b| grad[a].abs().total_cmp(&grad[b].abs())).unwrap();
            assert!(grad[largest] != 0.0, "{} has no gradient", p.name());
            let before = p.value().copy().unwrap();
            let loss_at = |delta: f32| {
                let mut v = before.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                v[largest] += delta;
                p.set(&Tensor::from_vec(v, before.dims(), &Device::Cpu).unwrap()).unwrap();
                model.loss(&batch).unwrap().loss_sum / 20.0
            };
            let slope = (loss_at(5e-3) - loss_at(-5e-3)) / 1e-2;
            p.set(&before).unwrap();
            let error = (slope - grad[largest]).abs() / grad[largest].abs().max(1e-2);
            assert!(error < 2e-2, "{}: gradient {}, differences give {slope}", p.name(), grad[largest]);
        }
    }
}

#[test]
fn an_adapter_comes_back_from_disk_the_same() {
    let (model, folder) = (model("bloom_tiny", 0.0, false), tempfile::tempdir().unwrap());
    model.save_pretrained(folder.path()).unwrap();
    let again = PeftModel::from_pretrained(model.base_model(), folder.path()).unwrap();
    let ids = Tensor::new(&[[5u32, 9, 17]], &Device::Cpu).unwrap();
    assert_eq!(values(&model.logits(&ids, None).unwrap()), values(&again.logits(&ids, None).unwrap()));
    assert_eq!(model.logits(&ids, None).unwrap().dtype(), DType::F32);
}

#[test]
fn a_model_comes_back_from_disk_the_same() {
    let ids = Tensor::new(&[[5u32, 9, 17]], &Device::Cpu).unwrap();
    for (name, quantized) in MODELS.into_iter().flat_map(|name| [(name, false), (name, true)]) {
        let (model, folder) = (model(name, 0.0, quantized), tempfile::tempdir().unwrap());
        model.base_model().save_pretrained(folder.path()).unwrap();
        let again = AutoModelForCausalLM::from_pretrained(folder.path(), ModelOptions::default()).unwrap();
        assert_eq!(again.is_quantized(), quantized);
        let logits = |m: &qlora_nb::model::Model| values(&m.logits(&ids, None).unwrap());
        assert_eq!(logits(model.base_model()), logits(&again));
        let merged = model.merge_and_unload().unwrap();
        merged.save_pretrained(folder.path()).unwrap();
        let again = AutoModelForCausalLM::from_pretrained(folder.path(), ModelOptions::default()).unwrap();
        assert_eq!(logits(&merged), logits(&again));
    }
}
