//! Generated tokens and texts against transformers'; scripts/fixtures/generation.py made them.

use std::fs;

use candle_core::DType;
use qlora_nb::{
    error::Error,
    model::{AutoModelForCausalLM, Model, ModelOptions},
    peft::{LoraConfig, get_peft_model},
    pipeline::{FinishReason, GenerationConfig, generate},
    pipeline::{TextGenerationPipeline, pipeline},
    tokenizer::AutoTokenizer,
    trainer::Trainable,
};
use qlora_nb_tests::*;
use serde_json::Value;

fn json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(fixture("generation").join(name)).expect("a fixture")).expect("JSON")
}

fn config(json: &Value) -> GenerationConfig {
    GenerationConfig::from_checkpoint(json).expect("arguments")
}

fn poet() -> (Model, TextGenerationPipeline) {
    let folder = root().join("notebooks/models/poet-bloom-zh");
    let options = ModelOptions { torch_dtype: DType::F32, ..Default::default() };
    let model = AutoModelForCausalLM::from_pretrained(&folder, options).expect("the bundled model");
    let tokenizer = AutoTokenizer::from_pretrained(folder.to_str().expect("UTF-8")).expect("its tokenizer");
    let pipe = pipeline("text-generation", &model, &tokenizer).expect("a pipeline");
    (model, pipe)
}

#[test]
fn tokens_equal_those_of_generate_in_a_batch_and_alone() {
    let model = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), ModelOptions::default()).unwrap();
    let fixture = json("generate.json");
    let prompts: Vec<Vec<u32>> = serde_json::from_value(fixture["prompts"].clone()).unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let config = config(&case["config"]);
        let expected: Vec<Vec<u32>> = serde_json::from_value(case["new_tokens"].clone()).unwrap();
        let batch = generate(&model, &prompts, &config, &mut |_, _| {}).unwrap();
        for ((generated, expected), prompt) in batch.iter().zip(&expected).zip(&prompts) {
            assert_eq!(&generated.ids, expected, "{} after {prompt:?}", case["config"]);
            let alone = generate(&model, std::slice::from_ref(prompt), &config, &mut |_, _| {}).unwrap();
            assert_eq!(&alone[0], generated);
        }
    }
}

#[test]
fn a_pipeline_prints_what_that_of_transformers_prints() {
    let (_, pipe) = poet();
    for case in json("pipeline.json")["cases"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let config = config(&case["config"]);
        let out = pipe.generate(prompt, &config).unwrap();
        assert_eq!(out.to_string(), case["repr"].as_str().unwrap());
        assert_eq!(format!("{out:?}"), out.to_string());
        assert_eq!(out.text(), format!("{prompt}{}", out.new_text()));

        let mut pieces = String::new();
        let streamed = pipe.stream(prompt, &config, |piece| pieces.push_str(piece)).unwrap();
        assert_eq!(&streamed, &out[0]);
        assert_eq!(pieces, out.new_text(), "the pieces of a stream are the text");
    }
}

#[test]
fn a_batch_of_prompts_keeps_its_order_and_its_texts() {
    let (_, pipe) = poet();
    let prompts = ["春眠不觉晓,", "Human: 写一首五言绝句,题目是《山中》\n\nAssistant: ", "床前明月光", "山"];
    let config =
        GenerationConfig { do_sample: true, seed: Some(7), num_return_sequences: Some(2), ..Default::default() };
    let batch = pipe.generate_batch(&prompts, &config).unwrap();
    assert_eq!(batch.iter().map(|g| g.len()).collect::<Vec<_>>(), [2; 4]);
    for (prompt, generations) in prompts.iter().zip(&batch) {
        assert_eq!(&pipe.generate(prompt, &config).unwrap(), generations);
        assert!(generations.iter().all(|g| g.prompt() == *prompt));
        assert_ne!(generations[0], generations[1]);
    }
}

#[test]
fn an_adapted_model_writes_too() {
    let (model, pipe) = poet();
    let config = LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() };
    let adapted = get_peft_model(&model, &config).unwrap();
    let adapted_pipe = pipeline("text-generation", &adapted, pipe.tokenizer()).unwrap();
    let greedy = GenerationConfig { max_new_tokens: Some(16), ..Default::default() };
    let before = pipe.generate("床前明月光", &greedy).unwrap();
    assert_eq!(adapted_pipe.generate("床前明月光", &greedy).unwrap(), before, "a new adapter changes nothing");

    // The adapter is the model's own, not a copy: what training writes, the pipeline sees.
    for parameter in adapted.trainable_parameters().iter().filter(|p| p.name().contains("lora_B")) {
        parameter.set(&parameter.value().ones_like().unwrap().affine(0.3, 0.0).unwrap()).unwrap();
    }
    assert_ne!(adapted_pipe.generate("床前明月光", &greedy).unwrap(), before);
}

#[test]
fn the_same_seed_writes_the_same_poem() {
    let (_, pipe) = poet();
    let config = GenerationConfig { seed: Some(1), ..pipe.generation_config().unwrap() };
    assert!(config.do_sample && config.top_p == Some(0.9), "the checkpoint's own wishes: {config:?}");
    let poem = pipe.generate("Human: 写一首七言绝句\n\nAssistant: ", &config).unwrap();
    assert_eq!(pipe.generate(poem[0].prompt(), &config).unwrap(), poem);
    assert_eq!(poem[0].finish_reason(), FinishReason::Eos);
    assert!(!poem.text().contains("</s>"), "special tokens are left out: {poem}");
}

#[test]
fn what_a_pipeline_cannot_do_is_said() {
    let (model, pipe) = poet();
    let error = pipeline("translation", &model, pipe.tokenizer()).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { supported, .. } if supported[0] == "text-generation"), "{error}");
    let error = pipe.generate("", &GenerationConfig::default()).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    let short = GenerationConfig { max_length: Some(3), ..Default::default() };
    assert!(pipe.generate("床前明月光疑是地上霜", &short).unwrap_err().to_string().contains("max_length = 3"));
    let two = GenerationConfig { do_sample: true, num_return_sequences: Some(2), ..Default::default() };
    assert!(pipe.stream("山", &two, |_| {}).is_err());
}
