//! Products in bf16 on the CPU, where `bnb_4bit_compute_dtype` asks for them.

use candle_core::DType;
use qlora_nb::{
    model::{AutoModelForCausalLM, BitsAndBytesConfig, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::Trainable,
};
use qlora_nb_tests::*;

fn model(compute: DType) -> PeftModel {
    let quantization = BitsAndBytesConfig {
        load_in_4bit: true,
        bnb_4bit_use_double_quant: true,
        bnb_4bit_compute_dtype: compute,
        ..Default::default()
    };
    let options =
        ModelOptions { torch_dtype: DType::BF16, quantization_config: Some(quantization), ..Default::default() };
    let base = AutoModelForCausalLM::from_pretrained(fixture("llama_tiny"), options).expect("the tiny model");
    get_peft_model(&base, &LoraConfig { target_modules: "all-linear".into(), ..Default::default() }).unwrap()
}

/// The loss, and all gradients behind each other.
fn pass(model: &PeftModel, gradient_checkpointing: bool) -> (f64, Vec<f64>) {
    let batch = labelled_batch(&tensors(fixture("llama_tiny.safetensors")), "right");
    let loss = loss_and_gradients(model, &batch, gradient_checkpointing);
    let params = model.trainable_parameters();
    (loss, params.iter().flat_map(|p| values(p.grad())).collect())
}

#[test]
fn bf16_stays_near_f32_and_repeats_its_bits() {
    let (f32_model, bf16_model) = (model(DType::F32), model(DType::BF16));
    let ((loss, exact), (rounded_loss, rounded)) = (pass(&f32_model, false), pass(&bf16_model, false));
    // bf16 has 8 bits of precision: 0.4 % of each operand, which sums even out.
    let difference = (rounded_loss / loss - 1.0).abs();
    assert!(difference > 0.0 && difference < 4e-3, "{rounded_loss} instead of {loss}");
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = dot(&exact, &rounded) / (dot(&exact, &exact) * dot(&rounded, &rounded)).sqrt();
    assert!(cosine < 1.0 - 1e-9 && cosine > 0.999, "the gradients' directions: {cosine}");
    // Recomputing makes the same roundings.
    for checkpointing in [false, true] {
        assert_eq!(pass(&model(DType::BF16), checkpointing), (rounded_loss, rounded.clone()), "{checkpointing}");
    }
}
