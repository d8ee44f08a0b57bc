//! BLOOM's forward against transformers'.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Tensor};
use qlora_nb::{
    collator::Batch,
    internals::layers::alibi_slopes,
    model::CausalLM,
    model::{AutoModelForCausalLM, Model, ModelOptions},
};
use qlora_nb_tests::*;

fn load(path: &Path) -> Model {
    AutoModelForCausalLM::from_pretrained(path, ModelOptions::default()).expect("the tiny model")
}

/// The largest difference of logits where the mask is 1.
fn check(model: &Model, ids: &Tensor, mask: &Tensor, want: &Tensor, what: &str) {
    let difference = max_difference_where(&model.logits(ids, Some(mask)).unwrap(), want, mask);
    assert!(difference < 1e-4, "{what}: logits differ by {difference}");
}

/// Every token of `ids` beyond the prompt is the likeliest after those before it, by the cache
/// one token at a time and by the full forward.
fn greedy_matches(model: &Model, ids: &[u32], prompt: usize) {
    let argmax = |logits: &[f64]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
    let mut cache = model.new_cache(1).unwrap();
    let mut logits = model.next_token_logits(&[&ids[..prompt]], &mut cache).unwrap();
    for &want in &ids[prompt..] {
        assert_eq!(argmax(&values(&logits)), want);
        logits = model.next_token_logits(&[&[want]], &mut cache).unwrap();
    }
    let full = model.logits(&Tensor::new(ids, &candle_core::Device::Cpu).unwrap().unsqueeze(0).unwrap(), None).unwrap();
    let last = full.narrow(1, ids.len() - 1, 1).unwrap().squeeze(1).unwrap();
    assert!(max_difference(&last, &logits) < 1e-4, "the cache changes the logits");
}

fn loss_of(model: &Model, t: &HashMap<String, Tensor>, prefix: &str) -> f64 {
    let u32s = |name: &str| t[&format!("{prefix}{name}")].to_dtype(DType::U32).unwrap();
    let labels = t[&format!("{prefix}labels")].clone();
    let batch = Batch::new(u32s("input_ids"), u32s("attention_mask"), labels).unwrap();
    let pass = model.loss(&batch).unwrap();
    pass.loss_sum / pass.num_label_tokens as f64
}

#[test]
fn forward_equals_transformers() {
    let model = load(&fixture("bloom_tiny"));
    let t = tensors(fixture("bloom_forward.safetensors"));
    for side in ["right", "left"] {
        let part = |name: &str| &t[&format!("{side}.{name}")];
        check(&model, part("input_ids"), part("attention_mask"), part("logits"), side);
    }
    let loss = loss_of(&model, &t, "right.");
    assert!((loss - values(&t["right.loss"])[0]).abs() < 1e-5, "{loss}");
    let difference = max_difference(&model.logits(&t["single.input_ids"], None).unwrap(), &t["single.logits"]);
    assert!(difference < 1e-4, "no padding: logits differ by {difference}");
    let (prompt, tokens) = (ids(&t["greedy.prompt"]), ids(&t["greedy.tokens"]));
    greedy_matches(&model, &[prompt.clone(), tokens].concat(), prompt.len());
    for (heads, name) in [(4, "alibi_4"), (6, "alibi_6"), (16, "alibi_16")] {
        // Row 0 of the mask has no padding: the plain table.
        let plain = values(&t["alibi.mask"].get(0).unwrap()).iter().all(|m| *m == 1.0);
        assert!(plain);
        alibi_matches(heads, &t[name].get(0).unwrap());
    }
}

/// A batch of rows of different lengths in one cache gives each row's own continuation.
#[test]
fn greedy_batches_equal_transformers() {
    let model = load(&fixture("bloom_tiny"));
    let t = tensors(fixture("bloom_forward.safetensors"));
    let (rows, mask) = (ids(&t["left.input_ids"]), ids(&t["left.attention_mask"]));
    let width = t["left.input_ids"].dims()[1];
    let prompts: Vec<Vec<u32>> = (rows.chunks(width).zip(mask.chunks(width)))
        .map(|(row, mask)| row.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect())
        .collect();
    let want: Vec<Vec<u32>> = ids(&t["greedy_batch.tokens"]).chunks(8).map(|c| c.to_vec()).collect();
    let mut cache = model.new_cache(prompts.len()).unwrap();
    let mut feed = prompts;
    for step in 0..8 {
        let slices: Vec<&[u32]> = feed.iter().map(|f| f.as_slice()).collect();
        let logits = model.next_token_logits(&slices, &mut cache).unwrap();
        for (row, want) in want.iter().enumerate() {
            let logits = values(&logits.get(row).unwrap());
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
            assert_eq!(best, want[step], "row {row}, token {step}");
        }
        feed = want.iter().map(|w| vec![w[step]]).collect();
    }
}

#[test]
fn the_residual_after_the_norm_equals_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("bloom_tiny/config.json")).unwrap()).unwrap();
    config["apply_residual_connection_post_layernorm"] = true.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(fixture("bloom_tiny/model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let t = tensors(fixture("bloom_forward.safetensors"));
    let (model, want) = (load(folder.path()), &t["post_layernorm.logits"]);
    check(&model, &t["right.input_ids"], &t["right.attention_mask"], want, "post layernorm");
}

#[test]
fn forward_equals_the_shared_golden() {
    let (Some(model), Some(file)) = (shared("golden/bloom_tiny"), shared("golden/bloom_forward.safetensors")) else {
        return;
    };
    let model = load(&model);
    let t = tensors(file);
    check(&model, &t["input_ids"], &t["attention_mask"], &t["logits"], "right");
    check(&model, &t["left_input_ids"], &t["left_attention_mask"], &t["left_logits"], "left");
    let row = t["input_ids"].narrow(0, 0, 1).unwrap();
    let difference = max_difference(&model.logits(&row, None).unwrap(), &t["single_logits"]);
    assert!(difference < 1e-4, "no padding: logits differ by {difference}");
    let greedy = ids(&t["greedy"]);
    greedy_matches(&model, &greedy, greedy.len() - 24);
    assert!((loss_of(&model, &t, "") - values(&t["loss"])[0]).abs() < 1e-5);
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
fn a_quantized_model_computes_with_the_dequantized_weights() {
    use qlora_nb::{internals::backend::operands::Weight, model::BitsAndBytesConfig};
    let config = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: true, ..Default::default() };
    let options = ModelOptions { torch_dtype: DType::F16, quantization_config: Some(config), ..Default::default() };
    let quantized = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), options).unwrap();
    let dense = quantized.decoder().map_linears(|l| {
        Ok(qlora_nb::internals::layers::Linear::new(
            &l.name,
            Weight::Dense(l.weight().dequantize()?),
            l.frozen.bias.clone(),
        ))
    });
    let ids = Tensor::new(&[[5u32, 9, 17, 3, 88]], &candle_core::Device::Cpu).unwrap();
    let difference =
        max_difference(&quantized.logits(&ids, None).unwrap(), &dense.unwrap().logits(&ids, None).unwrap());
    assert!(difference < 1e-5, "{difference}");
    let names: Vec<String> =
        quantized.named_parameters().iter().map(|(n, p)| format!("{n} {}", p.dtype())).take(7).collect();
    assert_eq!(names[0], "transformer.word_embeddings.weight torch.float16");
    assert_eq!(names[5], "transformer.h.0.self_attention.query_key_value.weight torch.uint8");
    assert_eq!(names[6], "transformer.h.0.self_attention.query_key_value.bias torch.float16");
}
