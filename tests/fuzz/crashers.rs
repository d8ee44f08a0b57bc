//! Inputs that once ended a reader, or had it take all memory: each is an error now.

use std::{collections::HashMap, sync::Arc};

use arrow_array::{RecordBatch, new_null_array};
use arrow_schema::{DataType, Field};
use candle_core::{DType, Device, Tensor};
use parquet::arrow::ArrowWriter;
use qlora_nb::{error::Error, peft::PeftModel, prelude::*, quant::QuantizedTensor};
use serde_json::{Value as Json, json};

use super::corpus::{self, file, write_folder};

/// What the error says, which names the remedy.
fn refused<T>(result: Result<T>) -> String {
    let Err(error) = result else { panic!("it loads") };
    let text = error.to_string();
    assert!(text.contains("what to do: "), "{text}");
    text
}

/// With other parts than a good one.
fn tokenizer(changes: Json) -> Result<Tokenizer> {
    let mut json = corpus::bpe();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    AutoTokenizer::from_pretrained(write_folder(&vec![file("tokenizer.json", json.to_string())]).path())
}

/// `tokenizers` panics on each of them.
#[test]
fn tokenizers_whose_parts_contradict_each_other() {
    let mut model = corpus::bpe()["model"].clone();
    model["continuing_subword_prefix"] = "abcdef".into();
    refused(tokenizer(json!({ "model": model })));

    let strip = json!({ "type": "Strip", "content": "a", "start": 0, "stop": 9 });
    let strip = tokenizer(json!({ "decoder": strip })).unwrap();
    let _ = strip.decode(&[4, 4], false);

    let post_processor = json!({
        "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "none", "type_id": 0 } }], "pair": [],
        "special_tokens": {},
    });
    let _ = tokenizer(json!({ "post_processor": post_processor })).and_then(|tokenizer| tokenizer.encode("a"));
}

/// What frees the tree of its tokens would use up the stack.
#[test]
fn unigram_tokens_of_any_length() {
    let load = |n: usize| {
        let vocab = json!([["<unk>", 0.0], ["a".repeat(n), -1.0]]);
        tokenizer(json!({ "model": { "type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": vocab } }))
    };
    load(1000).unwrap();
    assert!(refused(load(200_000)).contains("200000 bytes"));
}

/// A rank is what memory is taken for, before the weights are read.
#[test]
fn adapters_of_a_rank_that_their_weights_do_not_have() {
    let base = corpus::base();
    let load = |change: &dyn Fn(&mut Json)| {
        let mut files = corpus::adapters().remove(0);
        let mut config: Json = serde_json::from_slice(&files[0].1).unwrap();
        change(&mut config);
        files[0].1 = config.to_string().into_bytes();
        PeftModel::from_pretrained(&base, write_folder(&files).path())
    };
    load(&|_| {}).unwrap();
    assert!(refused(load(&|config| config["r"] = 16_000.into())).contains("adapter_model.safetensors"));
    refused(load(&|config| config["r"] = (1u64 << 62).into()));
    refused(load(&|config| config["rank_pattern"] = json!({ "q_proj": 1u64 << 40 })));
    let config = LoraConfig { r: usize::MAX, ..corpus::lora_configs().remove(0) };
    assert!(matches!(get_peft_model(&base, &config), Err(Error::InvalidArgument { .. })));
}

/// Three rows of nothing that would take gigabytes.
#[test]
fn parquet_with_cells_longer_than_the_file() {
    let list = |n| DataType::FixedSizeList(Arc::new(Field::new("item", DataType::Float32, true)), n);
    let load = |n: i32| {
        let column = new_null_array(&list(n), 1);
        let batch = RecordBatch::try_from_iter([("fixed", column)]).unwrap();
        let mut bytes = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        Dataset::from_parquet(write_folder(&vec![file("data.parquet", bytes)]).path().join("data.parquet"))
    };
    load(100).unwrap();
    assert!(refused(load(1 << 20)).contains("1048576 elements"));
}

/// As deep as they are long: they once used up the stack.
#[test]
fn templates_that_nest() {
    let tokenizer = corpus::tokenizer();
    let render =
        |template: String| tokenizer.with_chat_template(&template)?.apply_chat_template(&[Message::user("a")], true);
    refused(render("-".repeat(9 << 20)));
    for (begin, part, end) in [
        ("{{ ", "-", "1 }}"),
        ("{{ ", "not ", "1 }}"),
        ("{{ 1", "+1", " }}"),
        ("{{ x", ".a", " }}"),
        ("{{ 'a'", "|trim", " }}"),
    ] {
        let _ = render(format!("{begin}{}{end}", part.repeat((250 << 10) / part.len())));
    }
}

/// The bytes of a JSON object, as another type of number.
#[test]
fn a_quantization_state_of_another_dtype() {
    let name = "w.quant_state.bitsandbytes__nf4";
    let load = |dtype| {
        let state = Tensor::zeros(16, dtype, &Device::Cpu).unwrap();
        let tensors = HashMap::from([(name.to_string(), state)]);
        QuantizedTensor::from_tensors("w", |name| Ok(tensors.get(name).cloned()))
    };
    for dtype in [DType::F32, DType::I64, DType::U8] {
        assert!(refused(load(dtype)).contains(name));
    }
}

/// `tojson` writes text that exists twice while it grows: 100 MB of it took 150 at a time, from a template of 263 bytes.
#[test]
fn json_of_a_template_is_bounded() {
    let tokenizer = corpus::tokenizer();
    let render = |n: usize| {
        let template = format!("{{{{ range({n})|tojson(indent=1000) }}}}");
        tokenizer.with_chat_template(&template)?.apply_chat_template(&[Message::user("a")], true)
    };
    assert!(render(1000).unwrap().len() > 1_000_000);
    assert!(refused(render(20_000)).contains("ran out of fuel"));
}
