//! A test a reader. What loads is used a little, too.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    internals::models::gguf::Gguf,
    model::{CausalLM, Model},
    peft::PeftModel,
    prelude::*,
};
use serde_json::json;

use super::{
    corpus::{self, file},
    harness::{Files, Input, MEMORY, Reader, Test, Verdict, fuzz},
};

/// `reader!(name, inputs of a short run, good files, reader)`
macro_rules! reader {
    ($name:ident, $short:expr, $corpus:expr, $read:expr) => {
        reader!($name, $short, MEMORY, $corpus, $read);
    };
    ($name:ident, $short:expr, $memory:expr, $corpus:expr, $read:expr) => {
        #[test]
        fn $name() {
            let make = || ($corpus, Box::new($read) as Reader);
            fuzz(&Test { module: module_path!(), name: stringify!($name), short: $short, memory: $memory, make });
        }
    };
}

fn told<T>(result: Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

// Datasets.

fn look(dataset: Result<Dataset>) -> Verdict {
    let dataset = told(dataset)?;
    let _ = (dataset.forms(), dataset.to_string(), dataset.slice(..3).to_string(), dataset.features().to_string());
    for i in [0, dataset.len() / 2, dataset.len().saturating_sub(1)] {
        if i < dataset.len() {
            told(dataset.get(i))?.to_string();
        }
    }
    for name in dataset.column_names().iter().take(3) {
        told(dataset.head(8).column(name))?;
    }
    let shuffled = dataset.head(64).shuffle(1);
    shuffled.iter().take(4).for_each(|row| drop(row.fields()));
    Ok(())
}

fn one(name: &str, texts: &[&str]) -> Vec<Files> {
    texts.iter().map(|text| vec![file(name, *text)]).collect()
}

fn lines() -> Vec<Files> {
    let rows = |text: &str| -> Vec<u8> {
        let rows: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        rows.iter().map(|row| format!("{row}\n")).collect::<String>().into_bytes()
    };
    corpus::JSON[..3].iter().map(|text| vec![file("rows.jsonl", rows(text))]).collect()
}

reader!(arrow, 1500, corpus::arrow(), |input: &Input| look(Dataset::load_from_disk(input.folder())));
reader!(json, 2000, one("rows.json", &corpus::JSON), |input: &Input| {
    look(Dataset::from_json(input.folder().join("rows.json")))
});
reader!(jsonl, 2000, lines(), |input: &Input| look(Dataset::from_json(input.folder().join("rows.jsonl"))));
reader!(csv, 2000, one("rows.csv", &corpus::CSV), |input: &Input| {
    look(Dataset::from_csv(input.folder().join("rows.csv")))
});
reader!(parquet, 1000, corpus::parquet(), |input: &Input| {
    look(Dataset::from_parquet(input.folder().join("data.parquet")))
});

// Models.

/// A pass over three tokens; what a model says of itself.
fn pass(model: &Model) -> Verdict {
    let ids = Tensor::new(&[[1u32, 2, 0]], &Device::Cpu).unwrap();
    told(model.logits(&ids, None))?;
    let _ = (model.to_string(), model.num_parameters(), model.memory_report());
    let mut cache = told(model.new_cache(1))?;
    told(model.next_token_logits(&[&[1]], &mut cache)).map(drop)
}

fn load_in(folder: &Path, dtype: DType) -> Result<Model> {
    let options = ModelOptions { torch_dtype: dtype, ..Default::default() };
    AutoModelForCausalLM::from_pretrained(folder, options)
}

fn model(input: &Input) -> Verdict {
    pass(&told(load_in(input.folder(), DType::F32))?)
}

/// The same weights in 4 bits.
fn quantized(folder: &Path) -> Verdict {
    let quantization_config = Some(BitsAndBytesConfig { load_in_4bit: true, ..Default::default() });
    let options = ModelOptions { quantization_config, torch_dtype: DType::F16, ..Default::default() };
    pass(&told(AutoModelForCausalLM::from_pretrained(folder, options))?)
}

reader!(safetensors, 1000, corpus::sharded(), |input: &Input| model(input).and_then(|()| quantized(input.folder())));
reader!(four_bit, 1000, corpus::four_bit(), model);
reader!(config, 1000, corpus::configs(), model);

reader!(generation_config, 1000, vec![corpus::model("llama", DType::F32)], {
    let tokenizer = corpus::tokenizer();
    move |input: &Input| {
        let model = told(load_in(input.folder(), DType::F32))?;
        let pipe = told(pipeline("text-generation", &model, &tokenizer))?;
        told(pipe.generation_config())?;
        let config = GenerationConfig { max_new_tokens: Some(2), seed: Some(1), ..Default::default() };
        for do_sample in [false, true] {
            told(pipe.generate("ab to", &GenerationConfig { do_sample, ..config.clone() }))?;
        }
        Ok(())
    }
});

reader!(gguf, 500, corpus::gguf(), |input: &Input| {
    let path = input.folder().join("model.gguf");
    let model = told(AutoModelForCausalLM::from_pretrained(&path, ModelOptions::default()));
    let tokenizer = told(AutoTokenizer::from_pretrained(&path)).and_then(|tokenizer| encode(&tokenizer));
    let _ = Gguf::open(&path).map(|gguf| gguf.types());
    pass(&model?).and(tokenizer)
});

// Adapters and checkpoints.

reader!(adapter, 1000, corpus::adapters(), {
    let base = corpus::base();
    move |input: &Input| {
        let model = told(PeftModel::from_pretrained(&base, input.folder()))?;
        let _ = (model.to_string(), model.num_parameters());
        let ids = Tensor::new(&[[1u32, 2, 0]], &Device::Cpu).unwrap();
        told(model.logits(&ids, None))?;
        pass(&told(model.merge_and_unload())?)
    }
});

reader!(checkpoint, 300, corpus::checkpoints(), {
    let (base, config) = (corpus::base(), corpus::lora_configs().remove(0));
    move |input: &Input| {
        let model = told(get_peft_model(&base, &config))?;
        let mut trainer = corpus::trainer(&model, input.folder());
        told(trainer.load_checkpoint(input.folder()))?;
        let _ = trainer.loss_curve();
        told(trainer.train_steps(1))?;
        Ok(())
    }
});

// Tokenizers.

fn encode(tokenizer: &Tokenizer) -> Verdict {
    for text in ["", "ab to 诗. 123\n  é</s>", "a b c"] {
        let encoding = told(tokenizer.encode(text))?;
        told(tokenizer.decode(&encoding.input_ids, true))?;
    }
    told(tokenizer.decode(&[0, 1, 7, 31, u32::MAX], false))?;
    let _ = (tokenizer.to_string(), tokenizer.len(), tokenizer.all_special_ids());
    if tokenizer.pad_token_id().is_some() {
        told(tokenizer.encode_batch(&["a", "a b c d"]))?;
    }
    if tokenizer.chat_template().is_some() {
        told(tokenizer.apply_chat_template(&[Message::user("a")], true))?;
    }
    Ok(())
}

reader!(tokenizer, 1000, corpus::tokenizer_folders(), |input: &Input| {
    encode(&told(AutoTokenizer::from_pretrained(input.folder()))?)
});

// The text that a template may make is much more than its own.
reader!(chat_template, 1000, 4 * MEMORY, corpus::chat_templates(), {
    let tokenizer = corpus::tokenizer();
    let talk = [Message::system("s"), Message::user("snow?\n"), Message::assistant("白")];
    let odd = json!([{ "role": "user", "content": "" }]);
    let odd: Vec<Message> = serde_json::from_value(odd).unwrap();
    move |input: &Input| {
        let template =
            input.files.first().map_or(String::new(), |(_, bytes)| String::from_utf8_lossy(bytes).into_owned());
        let tokenizer = told(tokenizer.with_chat_template(&template))?;
        told(tokenizer.apply_chat_template(&odd, true))?;
        told(tokenizer.apply_chat_template(&talk, false))?;
        Ok(())
    }
});
