//! Printed forms against those of PyTorch, PEFT and transformers (`hf_prints.json`).

use candle_core::DType;
use qlora_nb::{
    display::module_tree::trainable_parameters_text,
    model::BitsAndBytesConfig,
    model::{AutoModelForCausalLM, Model, ModelOptions},
    peft::{LoraConfig, get_peft_model},
    pipeline::GenerationConfig,
    pipeline::pipeline,
    quant::QuantType,
    tokenizer::AutoTokenizer,
};
use qlora_nb_tests::*;
use serde_json::Value;

fn prints() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("hf_prints.json")).expect("a fixture")).expect("JSON")
}

fn poet_4bit() -> Model {
    let options = ModelOptions {
        torch_dtype: DType::F16,
        quantization_config: Some(BitsAndBytesConfig {
            load_in_4bit: true,
            bnb_4bit_quant_type: QuantType::Nf4,
            bnb_4bit_use_double_quant: true,
            bnb_4bit_compute_dtype: DType::F16,
        }),
        ..Default::default()
    };
    AutoModelForCausalLM::from_pretrained(root().join("notebooks/models/poet-bloom-zh"), options).expect("the model")
}

#[test]
fn models_configurations_and_counts_print_as_in_peft() {
    let (prints, model) = (prints(), poet_4bit());
    assert_eq!(model.to_string(), prints["model_tree_4bit"].as_str().unwrap());

    let config = LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() };
    assert_eq!(config.to_string(), prints["lora_config"].as_str().unwrap());
    let peft = get_peft_model(&model, &config).unwrap();
    assert_eq!(peft.to_string(), prints["peft_model_tree"].as_str().unwrap());
    let at_home = LoraConfig { base_model_name_or_path: Some("models/poet-bloom-zh".into()), ..peft.config().clone() };
    assert_eq!(at_home.to_string(), prints["lora_config_after"].as_str().unwrap());
    let (trainable, all) = peft.num_parameters();
    let line = format!("{}\n", trainable_parameters_text(trainable, all));
    assert_eq!(line, prints["print_trainable_parameters"].as_str().unwrap());

    let all_linear =
        LoraConfig { target_modules: "all-linear".into(), lora_alpha: 16, lora_dropout: 0.1, ..Default::default() };
    let peft = get_peft_model(&model, &all_linear).unwrap();
    assert_eq!(peft.to_string(), prints["all_linear_tree"].as_str().unwrap());
    let (trainable, all) = peft.num_parameters();
    let line = format!("{}\n", trainable_parameters_text(trainable, all));
    assert_eq!(line, prints["all_linear_trainable"].as_str().unwrap());
}

#[test]
fn the_walkthroughs_last_cell_prints_as_in_transformers() {
    let prints = prints();
    let folder = root().join("notebooks/models/poet-bloom-zh");
    let options = ModelOptions { torch_dtype: DType::F32, ..Default::default() };
    let model = AutoModelForCausalLM::from_pretrained(&folder, options).unwrap();
    let tokenizer = AutoTokenizer::from_pretrained(folder.to_str().unwrap()).unwrap();
    let pipe = pipeline("text-generation", &model, &tokenizer).unwrap();
    let config = GenerationConfig { max_new_tokens: Some(12), ..Default::default() };
    let out = pipe.generate(prints["pipeline_prompt"].as_str().unwrap(), &config).unwrap();
    assert_eq!(out.to_string(), prints["pipeline"].as_str().unwrap());
}
