//! A thread that trains and a cell that generates, on one model: both get what each gets alone, and neither waits for ever.

use std::{sync::Arc, thread};

use candle_core::{Device, Tensor};
use qlora_nb::{
    collator::Batch,
    model::{AutoModelForCausalLM, CausalLM, Model, ModelOptions},
    optim::{AdamW, Optim},
    peft::{LoraConfig, get_peft_model},
    trainer::{PassOptions, Trainable},
};
use qlora_nb_tests::*;

fn base() -> Model {
    AutoModelForCausalLM::from_pretrained(fixture("llama_tiny"), ModelOptions::default()).expect("the tiny model")
}

fn batch() -> Batch {
    labelled_batch(&tensors(fixture("llama_tiny.safetensors")), "right")
}

/// The losses of twenty steps of a fresh adapter.
fn train(base: &Model) -> Vec<f64> {
    let model =
        get_peft_model(base, &LoraConfig { target_modules: "all-linear".into(), ..Default::default() }).unwrap();
    let (batch, params) = (batch(), model.trainable_parameters());
    let mut optimizer = AdamW::new(Optim::AdamWTorch, &params, (0.9, 0.999), 1e-8, 0.0).unwrap();
    let step = |i| {
        params.iter().for_each(|p| p.zero_grad().unwrap());
        let num_items = batch.num_label_tokens() as f64;
        let options = PassOptions { num_items, gradient_checkpointing: i % 2 == 0, dropout_key: i };
        let loss = model.forward_backward(&batch, &options).unwrap().loss_sum / num_items;
        optimizer.step(1e-2, 1.0).unwrap();
        loss
    };
    (0..20).map(step).collect()
}

/// Thirty tokens, one a pass, the likeliest each time.
fn generate(base: &Model) -> Vec<u32> {
    let (mut cache, mut ids) = (base.new_cache(1).unwrap(), vec![3u32, 5, 8]);
    let mut new = ids.clone();
    for _ in 0..30 {
        let logits = base.next_token_logits(&[&new], &mut cache).unwrap().to_vec2::<f32>().unwrap();
        let best = (0..logits[0].len()).max_by(|&a, &b| logits[0][a].total_cmp(&logits[0][b])).unwrap() as u32;
        new = vec![best];
        ids.push(best);
    }
    ids
}

#[test]
fn training_and_generation_at_once_give_what_each_gives_alone() {
    let base = base();
    let (losses, ids) = (train(&base), generate(&base));
    assert!(losses[19] < losses[0] - 0.01, "{losses:?}");
    thread::scope(|scope| {
        let trainings: Vec<_> = (0..2).map(|_| scope.spawn(|| train(&base))).collect();
        for _ in 0..10 {
            assert_eq!(generate(&base), ids);
        }
        trainings.into_iter().for_each(|training| assert_eq!(training.join().unwrap(), losses));
    });
}

/// As a loss that keeps a model near another one does.
#[test]
fn a_loss_may_ask_a_model() {
    let base = Arc::new(base());
    let config = LoraConfig { target_modules: "all-linear".into(), ..Default::default() };
    let (model, other, batch) = (get_peft_model(&base, &config).unwrap(), base.clone(), batch());
    let ids = Tensor::new(&[[3u32, 5, 8]], &Device::Cpu).unwrap();
    let loss = move |logits: &Tensor, _: &Tensor| -> qlora_nb::error::Result<Tensor> {
        let reference = other.logits(&ids, None)?.sum_all()?;
        Ok(logits.sum_all()?.broadcast_sub(&reference)?)
    };
    let options = PassOptions { num_items: 1.0, gradient_checkpointing: false, dropout_key: 0 };
    assert!(model.forward_backward_with(&batch, &options, &loss).unwrap().loss_sum.is_finite());
}
