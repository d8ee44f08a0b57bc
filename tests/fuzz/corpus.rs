//! Small good files to damage: tiny models of every family, datasets, tokenizers.

use std::{fs, path::Path, sync::Arc};

use arrow_array::{
    ArrayRef, DictionaryArray, Int32Array, RecordBatch, StringArray, StructArray, new_null_array, types::Int32Type,
};
use arrow_schema::{DataType, Field};
use candle_core::{DType, Device, Tensor};
use parquet::{arrow::ArrowWriter, file::properties::WriterProperties};
use qlora_nb::{peft::PeftModel, prelude::*};
use qlora_nb_tests::fixture;
use serde_json::{Value as Json, json};

use super::harness::Files;

/// The files of a folder.
pub fn read_folder(folder: &Path) -> Files {
    let mut files = Files::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            files.push((path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}

pub fn write_folder(files: &Files) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

pub fn file(name: &str, text: impl Into<Vec<u8>>) -> (String, Vec<u8>) {
    (name.into(), text.into())
}

// Datasets.

pub const JSON: [&str; 4] = [
    r#"[{"text": "a", "n": 1, "x": 1.5, "ok": true}, {"text": "诗\n", "n": -2, "x": 2, "ok": null}]"#,
    r#"[{"none": null, "ids": [1, 2, 3], "chat": [{"role": "user", "content": "嗨"}]}, {"none": null, "ids": [], "chat": []}]"#,
    r#"[{"a": {"b": {"c": [[1], [], [2, 3]]}}, "d": ""}, {"a": {"b": {"c": []}}, "d": "x"}, {"a": null, "d": null}]"#,
    "[]",
];

pub const CSV: [&str; 4] = [
    "text,n,x,ok\na,1,1.5,true\n\"b, \"\"c\"\"\",-2,2,false\n,,,\n",
    "a\n1\n2\n3\n",
    "when,what\r\n2024-01-31T10:00:00,\"two\r\nlines\"\r\n,x\r\n",
    "\u{feff}名,value\n诗,1e5\n",
];

fn table() -> RecordBatch {
    let text: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("诗诗")]));
    let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1, -2, 3]));
    let keys = DictionaryArray::<Int32Type>::from_iter([Some("x"), None, Some("x")]);
    let parts = vec![(Arc::new(Field::new("n", DataType::Int32, true)), numbers.clone())];
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("text", text),
        ("numbers", numbers),
        ("keys", Arc::new(keys)),
        ("struct", Arc::new(StructArray::from(parts))),
        ("none", new_null_array(&DataType::Null, 3)),
        ("fixed", new_null_array(&fixed(), 3)),
    ];
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true))).unwrap()
}

fn fixed() -> DataType {
    DataType::FixedSizeList(Arc::new(Field::new("item", DataType::Float32, true)), 2)
}

pub fn parquet() -> Vec<Files> {
    let write = |batch: &RecordBatch, properties: WriterProperties| {
        let mut bytes = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
        writer.write(batch).unwrap();
        writer.close().unwrap();
        vec![file("data.parquet", bytes)]
    };
    let plain = || WriterProperties::builder().set_dictionary_enabled(false);
    let small = RecordBatch::try_from_iter([("n", Arc::new(Int32Array::from(vec![5; 40])) as ArrayRef)]).unwrap();
    let snappy = parquet::basic::Compression::SNAPPY;
    let zstd = parquet::basic::Compression::ZSTD(Default::default());
    vec![
        write(&table(), WriterProperties::builder().build()),
        write(&table(), plain().build()),
        write(&small, WriterProperties::builder().build()),
        write(&small, plain().set_compression(snappy).build()),
        write(&table(), plain().set_compression(zstd).build()),
        write(&small, plain().set_writer_version(parquet::file::properties::WriterVersion::PARQUET_2_0).build()),
    ]
}

/// Folders that save_to_disk wrote.
pub fn arrow() -> Vec<Files> {
    let mut all = Vec::new();
    let save = |dataset: &Dataset| {
        let folder = tempfile::tempdir().unwrap();
        dataset.save_to_disk(folder.path().join("saved")).unwrap();
        read_folder(&folder.path().join("saved"))
    };
    for text in JSON {
        let folder = write_folder(&vec![file("rows.json", text)]);
        all.push(save(&Dataset::from_json(folder.path().join("rows.json")).unwrap()));
    }
    for files in parquet().iter().take(3) {
        let folder = write_folder(files);
        all.push(save(&Dataset::from_parquet(folder.path().join("data.parquet")).unwrap()));
    }
    all.extend(["alpaca_tiny/train", "alpaca_shards"].map(|name| read_folder(&fixture(name))));
    all
}

// Models.

/// Tensors with values that are small, and the same each time.
fn tensors(shapes: &[(String, Vec<usize>)], dtype: DType) -> Vec<u8> {
    let tensor = |(name, shape): &(String, Vec<usize>)| {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| ((i * 7 + name.len()) as f32 * 0.61).sin() * 0.2).collect();
        (name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap())
    };
    safetensors::serialize(shapes.iter().map(tensor), None).unwrap()
}

fn shapes(list: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
    list.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
}

fn llama_shapes() -> Vec<(String, Vec<usize>)> {
    shapes(&[
        ("model.embed_tokens.weight", &[32, 8]),
        ("model.layers.0.input_layernorm.weight", &[8]),
        ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
        ("model.layers.0.self_attn.k_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.v_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.o_proj.weight", &[8, 8]),
        ("model.layers.0.post_attention_layernorm.weight", &[8]),
        ("model.layers.0.mlp.gate_proj.weight", &[16, 8]),
        ("model.layers.0.mlp.up_proj.weight", &[16, 8]),
        ("model.layers.0.mlp.down_proj.weight", &[8, 16]),
        ("model.norm.weight", &[8]),
        ("lm_head.weight", &[32, 8]),
    ])
}

fn bloom_shapes() -> Vec<(String, Vec<usize>)> {
    shapes(&[
        ("transformer.word_embeddings.weight", &[32, 8]),
        ("transformer.word_embeddings_layernorm.weight", &[8]),
        ("transformer.word_embeddings_layernorm.bias", &[8]),
        ("transformer.h.0.input_layernorm.weight", &[8]),
        ("transformer.h.0.input_layernorm.bias", &[8]),
        ("transformer.h.0.self_attention.query_key_value.weight", &[24, 8]),
        ("transformer.h.0.self_attention.query_key_value.bias", &[24]),
        ("transformer.h.0.self_attention.dense.weight", &[8, 8]),
        ("transformer.h.0.self_attention.dense.bias", &[8]),
        ("transformer.h.0.post_attention_layernorm.weight", &[8]),
        ("transformer.h.0.post_attention_layernorm.bias", &[8]),
        ("transformer.h.0.mlp.dense_h_to_4h.weight", &[32, 8]),
        ("transformer.h.0.mlp.dense_h_to_4h.bias", &[32]),
        ("transformer.h.0.mlp.dense_4h_to_h.weight", &[8, 32]),
        ("transformer.h.0.mlp.dense_4h_to_h.bias", &[8]),
        ("transformer.ln_f.weight", &[8]),
        ("transformer.ln_f.bias", &[8]),
    ])
}

/// The fixture's configuration for a model of width 8.
fn config(family: &str) -> Json {
    let text = fs::read(fixture(&format!("{family}_tiny/config.json"))).unwrap();
    let mut config: Json = serde_json::from_slice(&text).unwrap();
    let sizes = match family {
        "bloom" => json!({ "hidden_size": 8, "n_head": 2, "n_layer": 1, "vocab_size": 32 }),
        _ => json!({
            "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
            "num_hidden_layers": 1, "vocab_size": 32, "attention_bias": family == "qwen2", "mlp_bias": false,
            "tie_word_embeddings": false, "layer_types": ["full_attention"],
        }),
    };
    for (key, value) in sizes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

const GENERATION: &str = r#"{"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 3, "do_sample": true,
    "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 4,
    "num_return_sequences": 1}"#;

/// config.json, generation_config.json and weights in one file, of a family.
pub fn model(family: &str, dtype: DType) -> Files {
    let mut shapes = if family == "bloom" { bloom_shapes() } else { llama_shapes() };
    let layer = "model.layers.0.self_attn";
    if family == "qwen2" {
        shapes.extend([("q", 8), ("k", 4), ("v", 4)].map(|(p, n)| (format!("{layer}.{p}_proj.bias"), vec![n])));
    }
    if family == "qwen3" {
        shapes.extend(["q", "k"].map(|p| (format!("{layer}.{p}_norm.weight"), vec![4])));
    }
    vec![
        file("config.json", format!("{:#}", config(family))),
        file("generation_config.json", GENERATION),
        file("model.safetensors", tensors(&shapes, dtype)),
    ]
}

pub const FAMILIES: [&str; 5] = ["bloom", "llama", "qwen2", "qwen3", "mistral"];

/// Llama's ways to stretch positions, and others' windows.
pub fn configs() -> Vec<Files> {
    let mut all: Vec<Files> = FAMILIES.iter().map(|family| model(family, DType::F32)).collect();
    let ropes = [
        json!({ "rope_theta": 1e4, "rope_type": "linear", "factor": 2.0 }),
        json!({ "rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64 }),
    ];
    for rope in ropes {
        let mut files = model("llama", DType::F32);
        let mut json = config("llama");
        json["rope_parameters"] = rope.clone();
        files[0].1 = json.to_string().into_bytes();
        all.push(files);
        let mut files = model("llama", DType::F32);
        json["rope_scaling"] = rope;
        json.as_object_mut().unwrap().remove("rope_parameters");
        files[0].1 = json.to_string().into_bytes();
        all.push(files);
    }
    all
}

/// Weights in two files with an index, and in one.
pub fn sharded() -> Vec<Files> {
    let mut all = Vec::new();
    for (family, dtype) in [("llama", DType::F16), ("bloom", DType::F32), ("qwen3", DType::BF16)] {
        let one = model(family, dtype);
        let shapes = if family == "bloom" { bloom_shapes() } else { llama_shapes() };
        let mut files: Files = one.iter().filter(|(name, _)| name.ends_with(".json")).cloned().collect();
        let (mut map, half) = (serde_json::Map::new(), shapes.len() / 2);
        for (i, part) in [&shapes[..half], &shapes[half..]].into_iter().enumerate() {
            let name = format!("model-0000{}-of-00002.safetensors", i + 1);
            map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
            files.push((name, tensors(part, dtype)));
        }
        let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
        files.push(file("model.safetensors.index.json", index.to_string()));
        all.extend([one, if family == "qwen3" { model("qwen2", dtype) } else { files }]);
    }
    all
}

pub fn load(folder: &Path) -> Result<Model> {
    AutoModelForCausalLM::from_pretrained(folder, ModelOptions::default())
}

/// As bitsandbytes saves them.
pub fn four_bit() -> Vec<Files> {
    let mut all = Vec::new();
    for (family, kind, double) in [
        ("llama", QuantType::Nf4, true),
        ("llama", QuantType::Nf4, false),
        ("bloom", QuantType::Fp4, true),
        ("bloom", QuantType::Nf4, false),
    ] {
        let folder = write_folder(&model(family, DType::F32));
        let quantization_config = Some(BitsAndBytesConfig {
            load_in_4bit: true,
            bnb_4bit_quant_type: kind,
            bnb_4bit_use_double_quant: double,
            ..Default::default()
        });
        let options = ModelOptions { quantization_config, torch_dtype: DType::F16, ..Default::default() };
        let model = AutoModelForCausalLM::from_pretrained(folder.path(), options).unwrap();
        let saved = tempfile::tempdir().unwrap();
        model.save_pretrained(saved.path()).unwrap();
        all.push(read_folder(saved.path()));
    }
    all
}

pub fn gguf() -> Vec<Files> {
    vec![vec![file("model.gguf", fs::read(fixture("gguf/tiny.gguf")).unwrap())]]
}

// Adapters and checkpoints.

/// The model that adapters are for.
pub fn base() -> Model {
    load(write_folder(&model("llama", DType::F32)).path()).unwrap()
}

pub fn lora_configs() -> Vec<LoraConfig> {
    let plain = LoraConfig { r: 2, target_modules: ["q_proj", "v_proj"].into(), ..Default::default() };
    vec![
        plain.clone(),
        LoraConfig { use_dora: true, ..plain.clone() },
        LoraConfig { modules_to_save: Some(vec!["lm_head".into()]), ..plain },
    ]
}

pub fn adapters() -> Vec<Files> {
    let base = base();
    let save = |config: LoraConfig| {
        let folder = tempfile::tempdir().unwrap();
        get_peft_model(&base, &config).unwrap().save_pretrained(folder.path()).unwrap();
        read_folder(folder.path())
    };
    lora_configs().into_iter().map(save).collect()
}

pub fn trainer(model: &PeftModel, output_dir: &Path) -> Trainer {
    let rows = Dataset::from_columns([("row", vec![0i64, 1, 2, 3])]).unwrap();
    let features = |ex: &Example| {
        let i = ex.int("row")? as u32;
        Ok(Features { input_ids: vec![i, 5, 9], attention_mask: vec![1; 3], labels: vec![i64::from(i), 5, 9] })
    };
    let collator = DataCollatorForSeq2Seq {
        padding_side: PaddingSide::Left,
        pad_token_id: Some(3),
        pad_to_multiple_of: None,
        label_pad_token_id: -100,
    };
    let args = TrainingArguments {
        output_dir: output_dir.into(),
        per_device_train_batch_size: 2,
        max_steps: 3,
        logging_steps: 1,
        save_strategy: SaveStrategy::No,
        disable_tqdm: true,
        ..Default::default()
    };
    Trainer::new(model, args, &rows.map(features).unwrap(), collator).unwrap()
}

pub fn checkpoints() -> Vec<Files> {
    let folder = tempfile::tempdir().unwrap();
    let model = get_peft_model(&base(), &lora_configs()[0]).unwrap();
    let mut trainer = trainer(&model, folder.path());
    let mut all = Vec::new();
    for _ in 0..2 {
        trainer.train_steps(1).unwrap();
        all.push(read_folder(&trainer.save_checkpoint().unwrap()));
    }
    all
}

// Tokenizers.

/// A byte-level BPE of 32 tokens.
pub fn bpe() -> Json {
    let tokens =
        ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "c", "d", "e", "Ġ", "ab", "Ġa", "Ċ", "n", "o", "t", "to", "."];
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().enumerate().map(|(id, token)| (token.to_string(), id.into())).collect();
    let added = |(id, token): (usize, &&str)| {
        json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true })
    };
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": tokens.iter().enumerate().take(4).map(added).collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["a", "b"], ["Ġ", "a"], ["t", "o"]] },
    })
}

/// The other kinds of every part.
fn tokenizers() -> Vec<Json> {
    let mut all = vec![bpe()];
    let mut with = |changes: Json| {
        let mut json = bpe();
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        all.push(json);
    };
    let split = json!({ "type": "Split", "pattern": { "Regex": "\\p{N}{1,3}|\\s+(?!\\S)|\\s+" }, "behavior": "Isolated",
        "invert": false });
    with(json!({
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [split, { "type": "Digits", "individual_digits": true },
            { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": false }] },
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } },
        "truncation": { "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 1 },
        "padding": { "strategy": { "Fixed": 8 }, "direction": "Right", "pad_to_multiple_of": 2, "pad_id": 3, "pad_type_id": 0,
            "pad_token": "<pad>" },
    }));
    with(json!({
        "normalizer": { "type": "Sequence", "normalizers": [{ "type": "NFKC" }, { "type": "Lowercase" }, { "type": "Prepend",
            "prepend": "a" }, { "type": "Replace", "pattern": { "String": " " }, "content": "Ġ" }, { "type": "StripAccents" },
            { "type": "Strip", "strip_left": true, "strip_right": true }] },
        "pre_tokenizer": { "type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "first", "split": true },
        "decoder": { "type": "Sequence", "decoders": [{ "type": "Replace", "pattern": { "String": "Ġ" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "post_processor": { "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": true,
            "add_prefix_space": true },
    }));
    with(json!({
        "normalizer": { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": { "type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1] },
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": { "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": { "<unk>": 0, "<s>": 1, "</s>": 2, "a": 4, "##b": 5, "c": 6 } },
    }));
    with(json!({
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [{ "type": "WhitespaceSplit" }, { "type": "Punctuation",
            "behavior": "Isolated" }, { "type": "UnicodeScripts" }] },
        "decoder": { "type": "BPEDecoder", "suffix": "</w>" },
        "model": { "type": "Unigram", "unk_id": 0, "byte_fallback": false,
            "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["a", -1.0], ["ab", -1.5], ["c", -2.5]] },
    }));
    with(json!({
        "pre_tokenizer": { "type": "CharDelimiterSplit", "delimiter": "b" },
        "decoder": { "type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true },
        "model": { "type": "WordLevel", "unk_token": "<unk>", "vocab": { "<unk>": 0, "a": 4, "to": 5 } },
    }));
    all
}

const TOKENIZER_CONFIG: [&str; 2] = [
    r#"{"tokenizer_class": "BloomTokenizerFast", "padding_side": "left", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 1000000000000000019884624838656,
        "clean_up_tokenization_spaces": true, "additional_special_tokens": ["<x>"],
        "chat_template": [{"name": "default", "template": "{% for m in messages %}{{ m.content }}{% endfor %}"}]}"#,
    r#"{"padding_side": "right", "model_max_length": 64, "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": false, "normalized": false, "special": true}}"#,
];

pub fn tokenizer_folders() -> Vec<Files> {
    let config =
        json!({ "model_type": "bloom", "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 3 }).to_string();
    let folder = |(i, json): (usize, Json)| {
        vec![
            // Twice as likely to be damaged, by beginning with it.
            file("tokenizer.json", json.to_string()),
            file("tokenizer_config.json", TOKENIZER_CONFIG[i % 2]),
            file("special_tokens_map.json", r#"{"eos_token": "</s>", "cls_token": {"content": "<s>"}}"#),
            file("generation_config.json", GENERATION),
            file("config.json", config.clone()),
        ]
    };
    tokenizers().into_iter().enumerate().map(folder).collect()
}

pub fn tokenizer() -> Tokenizer {
    let files = vec![file("tokenizer.json", bpe().to_string()), file("tokenizer_config.json", TOKENIZER_CONFIG[0])];
    AutoTokenizer::from_pretrained(write_folder(&files).path()).unwrap()
}

pub fn chat_templates() -> Vec<Files> {
    let cases: Vec<Json> = serde_json::from_slice(&fs::read(fixture("chat_templates.json")).unwrap()).unwrap();
    let mut all: Vec<&str> = cases.iter().filter_map(|case| case["template"].as_str()).collect();
    all.dedup();
    all.into_iter().map(|template| vec![file("chat_template.jinja", template)]).collect()
}
