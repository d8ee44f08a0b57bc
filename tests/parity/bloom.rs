//! BLOOM's forward against transformers'.

use std::path::Path;

use candle_core::{DType, Tensor};
use qlora_nb::{
    layers::attention::alibi_slopes,
    model::{AutoModelForCausalLM, Model, ModelOptions},
    models::causal_lm::CausalLM,
};
use qlora_nb_tests::*;

fn load(path: &Path) -> Model {
    AutoModelForCausalLM::from_pretrained(path, ModelOptions::default()).expect("the tiny model")
}

/// Logits without padding, right-padded and left-padded, and greedy continuation with the cache.
fn forward_matches(model: &Model, file: &Path) {
    let t = tensors(file);
    let logits = model.logits(&t["input_ids"], Some(&t["attention_mask"])).unwrap();
    let difference = max_difference_where(&logits, &t["logits"], &t["attention_mask"]);
    assert!(difference < 1e-4, "right-padded logits differ by {difference}");

    let (ids, mask) = (&t["left_input_ids"], &t["left_attention_mask"]);
    let difference = max_difference_where(&model.logits(ids, Some(mask)).unwrap(), &t["left_logits"], mask);
    assert!(difference < 1e-4, "left-padded logits differ by {difference}");

    if let Some(single) = t.get("single_logits") {
        let length = single.dims()[1];
        let row = t["input_ids"].narrow(0, 0, 1).unwrap().narrow(1, 0, length).unwrap();
        let difference = max_difference(&model.logits(&row, None).unwrap(), single);
        assert!(difference < 1e-4, "logits of a single row differ by {difference}");
    }
    greedy_matches(model, &t["greedy"]);
}

/// Every token of `greedy` `[1, n]` beyond a prompt is the likeliest after those before it, by
/// the cache one token at a time and by the full forward.
fn greedy_matches(model: &Model, greedy: &Tensor) {
    let ids: Vec<u32> = values(greedy).iter().map(|&v| v as u32).collect();
    let prompt = ids.len() - 24;
    let argmax = |logits: &[f64]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
    let mut cache = model.new_cache(1).unwrap();
    let mut logits = model.next_token_logits(&[&ids[..prompt]], &mut cache).unwrap();
    for &want in &ids[prompt..] {
        assert_eq!(argmax(&values(&logits)), want);
        logits = model.next_token_logits(&[&[want]], &mut cache).unwrap();
    }
    let full = model.logits(&greedy.to_dtype(DType::U32).unwrap(), None).unwrap();
    let last = full.narrow(1, ids.len() - 1, 1).unwrap().squeeze(1).unwrap();
    assert!(max_difference(&last, &logits) < 1e-4, "the cache changes the logits");
}

#[test]
fn forward_equals_transformers() {
    forward_matches(&load(&fixture("bloom_tiny")), &fixture("bloom_forward.safetensors"));
}

#[test]
fn forward_equals_the_shared_golden() {
    let (Some(model), Some(file)) = (shared("golden/bloom_tiny"), shared("golden/bloom_forward.safetensors")) else {
        return;
    };
    let model = load(&model);
    forward_matches(&model, &file);
    let t = tensors(file);
    let states = model.decoder().hidden_states(&t["input_ids"], Some(&t["attention_mask"])).unwrap();
    for (i, state) in states.iter().enumerate() {
        let difference = max_difference_where(state, &t[&format!("hidden_{i}")], &t["attention_mask"]);
        assert!(difference < 1e-4, "hidden state {i} differs by {difference}");
    }
    for (heads, name) in [(16, "alibi_16heads_len8"), (6, "alibi_6heads_len8")] {
        alibi_matches(heads, &t[name]);
    }
    // [batch * heads, 1, T], right-padded: the row without padding is the plain table.
    let mask = values(&t["attention_mask"]);
    let length = t["alibi"].dims()[2];
    for (row, mask) in mask.chunks(length).enumerate().filter(|(_, m)| m.iter().all(|v| *v == 1.0)) {
        alibi_matches(4, &t["alibi"].narrow(0, 4 * row, 4).unwrap());
        assert_eq!(mask.len(), length);
    }
}

/// `table` is [heads, 1, T]: slope × position.
fn alibi_matches(heads: usize, table: &Tensor) {
    let length = table.dims()[2];
    let slopes = alibi_slopes(heads);
    for (head, row) in values(table).chunks(length).enumerate() {
        for (j, want) in row.iter().enumerate() {
            assert_eq!(f64::from(slopes[head] * j as f32), *want, "{heads} heads, head {head}, key {j}");
        }
    }
}

#[test]
fn loss_equals_transformers() {
    let (Some(model), Some(file)) = (shared("golden/bloom_tiny"), shared("golden/bloom_forward.safetensors")) else {
        return;
    };
    let t = tensors(file);
    let u32s = |name: &str| t[name].to_dtype(DType::U32).unwrap();
    let batch =
        qlora_nb::batch::Batch::new(u32s("input_ids"), u32s("attention_mask"), t["labels"].clone()).unwrap();
    let pass = load(&model).loss(&batch).unwrap();
    let loss = pass.loss_sum / pass.num_label_tokens as f64;
    assert!((loss - values(&t["loss"])[0]).abs() < 1e-5, "{loss}");
}

#[test]
fn a_quantized_model_computes_with_the_dequantized_weights() {
    use qlora_nb::{layers::linear::Weight, model::BitsAndBytesConfig};
    let config = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: true, ..Default::default() };
    let options = ModelOptions { torch_dtype: DType::F16, quantization_config: Some(config), ..Default::default() };
    let quantized = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), options).unwrap();
    let dense = quantized.decoder().map_linears(|l| {
        Ok(qlora_nb::layers::linear::Linear { weight: Weight::Dense(l.weight.dequantize()?), ..l.clone() })
    });
    let ids = Tensor::new(&[[5u32, 9, 17, 3, 88]], &candle_core::Device::Cpu).unwrap();
    let difference = max_difference(&quantized.logits(&ids, None).unwrap(), &dense.unwrap().logits(&ids, None).unwrap());
    assert!(difference < 1e-5, "{difference}");
    let names: Vec<String> =
        quantized.named_parameters().iter().map(|(n, p)| format!("{n} {}", p.dtype())).take(7).collect();
    assert_eq!(names[0], "transformer.word_embeddings.weight torch.float16");
    assert_eq!(names[5], "transformer.h.0.self_attention.query_key_value.weight torch.uint8");
    assert_eq!(names[6], "transformer.h.0.self_attention.query_key_value.bias torch.float16");
}
