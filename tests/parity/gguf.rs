//! GGUF files against transformers, which reads them too; scripts/fixtures/gguf_files.py made the
//! files and the numbers.

use std::{
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    error::{Error, Result},
    internals::models::{gguf::Gguf, perplexity},
    model::{AutoModelForCausalLM, BitsAndBytesConfig, Model, ModelOptions},
    tokenizer::{AutoTokenizer, Message, Tokenizer},
};
use qlora_nb_tests::*;
use serde_json::Value;

fn expected(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn load(path: &Path) -> Result<Model> {
    AutoModelForCausalLM::from_pretrained(path, ModelOptions::default())
}

fn row(ids: &Value) -> Vec<u32> {
    serde_json::from_value(ids.clone()).unwrap()
}

/// Token ids, decoded text, special tokens and the chat template.
fn check_tokenizer(tokenizer: &Tokenizer, want: &Value) {
    let texts = want["texts"].as_array().unwrap();
    assert!(texts.len() > 30);
    for case in texts {
        let ids = tokenizer.encode(case["text"].as_str().unwrap()).unwrap().input_ids;
        assert_eq!(ids, row(&case["input_ids"]), "{}", case["text"]);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"].as_str().unwrap());
    }
    let special = [
        ("bos_token", tokenizer.bos_token()),
        ("eos_token", tokenizer.eos_token()),
        ("unk_token", tokenizer.unk_token()),
        ("pad_token", tokenizer.pad_token()),
    ];
    for (name, token) in special {
        assert_eq!(token, want["special"][name].as_str().unwrap(), "{name}");
    }
    let mut chat: Vec<Message> = serde_json::from_value(want["chat"].clone()).unwrap();
    assert_eq!(tokenizer.apply_chat_template(&chat, false).unwrap(), want["rendered"].as_str().unwrap());
    assert_eq!(tokenizer.apply_chat_template(&chat, true).unwrap(), want["prompt"].as_str().unwrap());
    assert_eq!(tokenizer.encode_chat(&chat, true).unwrap().input_ids, row(&want["prompt_ids"]));
    chat.insert(0, Message::system(" Be short. "));
    assert_eq!(tokenizer.apply_chat_template(&chat, true).unwrap(), want["with_system"].as_str().unwrap());
}

#[test]
fn a_file_of_mixed_types_equals_transformers() {
    let (path, want) = (fixture("gguf/tiny.gguf"), expected("gguf/tiny.json"));
    check_tokenizer(&AutoTokenizer::from_pretrained(&path).unwrap(), &want);
    let ids = Tensor::new(row(&want["input_ids"]), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = load(&path).unwrap().logits(&ids, None).unwrap().squeeze(0).unwrap();
    for (i, want) in want["logits"].as_array().unwrap().iter().enumerate() {
        let want: Vec<f64> = serde_json::from_value(want.clone()).unwrap();
        let got = values(&logits.get(14 * i).unwrap());
        let difference = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(got.len() == want.len() && difference < 1e-4, "position {}: logits differ by {difference}", 14 * i);
    }
}

#[test]
fn every_type_is_dequantized_as_by_gguf() {
    let gguf = Gguf::open(fixture("gguf/types.gguf")).unwrap();
    let want = tensors(fixture("gguf/types.safetensors"));
    let kinds = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];
    assert_eq!(gguf.types().keys().map(String::as_str).collect::<std::collections::BTreeSet<_>>(), kinds.into());
    for (i, kind) in kinds.iter().enumerate() {
        let name = format!("model.layers.{i}.mlp.up_proj.weight");
        let tensor = gguf.tensor(&name, &[2, 256], DType::F32).unwrap().expect("the tensor");
        let difference = max_difference(&tensor, &want[*kind]);
        // K types multiply in another order: an ulp of values up to a few hundred.
        let tolerance = if kind.ends_with('K') { 1e-5 } else { 0.0 };
        assert!(difference <= tolerance, "{kind} differs by {difference}");
    }
}

/// A folder with one GGUF file means that file, a folder in Hugging Face layout does not.
#[test]
fn a_folder_with_one_file_is_enough() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| std::fs::copy(fixture("gguf/tiny.gguf"), folder.path().join(name)).unwrap();
    copy("a.gguf");
    let model = load(folder.path()).unwrap();
    assert!(AutoTokenizer::from_pretrained(folder.path()).is_ok());
    copy("b.GGUF");
    let error = load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("a.gguf, b.GGUF"), "{error}");
    // Saved in Hugging Face layout it comes back the same, from beside the files.
    model.save_pretrained(folder.path()).unwrap();
    let again = load(folder.path()).unwrap();
    let ids = Tensor::new(&[[5u32, 9, 17]], &Device::Cpu).unwrap();
    assert_eq!(values(&model.logits(&ids, None).unwrap()), values(&again.logits(&ids, None).unwrap()));
    let error = load(&folder.path().join("none.gguf")).unwrap_err();
    assert!(matches!(&error, Error::NotFound { what, .. } if what == "GGUF file"), "{error}");
}

#[test]
fn a_gguf_is_quantized_anew() {
    let config = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: true, ..Default::default() };
    let options = ModelOptions { torch_dtype: DType::F16, quantization_config: Some(config), ..Default::default() };
    let model = AutoModelForCausalLM::from_pretrained(fixture("gguf/tiny.gguf"), options).unwrap();
    assert!(model.is_quantized());
    let list: Vec<String> =
        model.named_parameters().iter().map(|(n, p)| format!("{n} {}", p.dtype())).take(2).collect();
    assert_eq!(list, ["model.embed_tokens.weight torch.float16", "model.layers.0.self_attn.q_proj.weight torch.uint8"]);
}

/// The tiny file with bytes replaced.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    let mut bytes = std::fs::read(fixture("gguf/tiny.gguf")).unwrap();
    change(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn place(bytes: &[u8], of: &[u8]) -> usize {
    bytes.windows(of.len()).position(|w| w == of).expect("the bytes are there")
}

#[test]
fn what_cannot_be_read_is_named() {
    // A string value: key, type 8, length, text.
    let text = |key: &'static str, to: &'static str| {
        move |bytes: &mut Vec<u8>| {
            let at = place(bytes, key.as_bytes()) + key.len() + 12;
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        }
    };
    // A tensor's type follows its name, the number of dimensions and two dimensions.
    let kind = |to: u8| {
        move |bytes: &mut Vec<u8>| {
            let name = b"blk.0.ffn_up.weight";
            let at = place(bytes, name) + name.len() + 4 + 16;
            bytes[at] = to;
        }
    };
    let number = |key: &'static str, to: u32| {
        move |bytes: &mut Vec<u8>| {
            let at = place(bytes, key.as_bytes()) + key.len() + 4;
            bytes[at..at + 4].copy_from_slice(&to.to_le_bytes());
        }
    };
    type Change = Box<dyn FnOnce(&mut Vec<u8>)>;
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(text("general.architecture", "qwen2")), "qwen2"),
        (Box::new(kind(20)), "IQ4_NL"),
        (Box::new(kind(99)), "ggml type 99"),
        (Box::new(number("llama.feed_forward_length", 32)), "blk.0.ffn_gate.weight"),
        (Box::new(number("llama.embedding_length", 64)), "partial_rotary_factor"),
        (Box::new(number("llama.block_count", 1 << 30)), "block_count"),
        (Box::new(number("llama.rope.dimension_count", 4)), "partial_rotary_factor"),
        (Box::new(number("llama.attention.head_count_kv", 3)), "num_key_value_heads"),
        (Box::new(|b: &mut Vec<u8>| b.truncate(20_000)), "not a valid GGUF file"),
        (Box::new(|b: &mut Vec<u8>| b.truncate(b.len() - 40)), "not a valid GGUF file"),
        (Box::new(|b: &mut Vec<u8>| b.clear()), "not a valid GGUF file"),
        (Box::new(|b: &mut Vec<u8>| b[0] = b'X'), "not a valid GGUF file"),
    ];
    for (change, named) in cases {
        let (_folder, path) = changed(change);
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("what to do"), "expected {named}: {error}");
    }
    for (change, named) in [
        (text("tokenizer.ggml.pre", "smellm"), "smellm"),
        (text("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model"),
    ] {
        let (_folder, path) = changed(change);
        let error = AutoTokenizer::from_pretrained(&path).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("tokenizer.json"), "{error}");
    }
}

/// `add_bos_token` and `add_eos_token` of the file hold for each text.
#[test]
fn a_file_may_ask_for_tokens_around_each_text() {
    let (_folder, path) = changed(|bytes| {
        let key = b"tokenizer.ggml.add_bos_token";
        let at = place(bytes, key) + key.len() + 4;
        assert_eq!(bytes[at], 0);
        bytes[at] = 1;
    });
    let tokenizer = AutoTokenizer::from_pretrained(&path).unwrap();
    let plain = tokenizer.encode_without_special_tokens("Hello").unwrap().input_ids;
    assert_eq!(tokenizer.encode("Hello").unwrap().input_ids, [vec![1], plain].concat());
}

/// The tiny file with one more metadata entry, the first: its key, its type's number and its bytes.
fn with_entry(key: &str, kind: u32, value: &[u8]) -> (tempfile::TempDir, PathBuf) {
    changed(|bytes| {
        let count = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) + 1;
        bytes[16..24].copy_from_slice(&count.to_le_bytes());
        let key = [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &kind.to_le_bytes()].concat();
        bytes.splice(24..24, [&key[..], value].concat());
    })
}

/// By 0 candle would divide; of a byte of a list it would make 32.
#[test]
fn metadata_that_candle_does_not_check() {
    let list =
        |kind: u32, count: u64, bytes: usize| [&kind.to_le_bytes()[..], &count.to_le_bytes(), &vec![1; bytes]].concat();
    for (key, kind, value, named) in [
        ("general.alignment", 4, vec![0; 4], Some("general.alignment is 0")),
        ("general.alignment", 0, vec![0], Some("general.alignment is 0")),
        ("general.alignment\0", 3, vec![0; 2], Some("general.alignment is 0")),
        ("general.alignment", 4, vec![32, 0, 0, 0], None),
        ("x.general.alignment", 4, vec![0; 4], None),
        ("flags", 9, list(0, 6_000_000, 6_000_000), Some("flags has 6000000 values")),
        ("flags", 9, list(9, 0, 0), Some("no list of lists")),
        ("flags", 9, list(0, 1 << 60, 100), Some("flags has 1152921504606846976 values")),
        ("flags", 9, list(0, 100, 100), None),
        ("flags", 9, list(8, 0, 0), None),
        ("text", 8, vec![255; 8], Some("not a valid GGUF file")),
    ] {
        let (_folder, path) = with_entry(key, kind, &value);
        match (Gguf::open(&path), named) {
            (Ok(_), None) => {}
            (Err(error), Some(named)) if error.to_string().contains(named) => {}
            (result, _) => panic!("{key:?} of type {kind}: expected {named:?}, got {:?}", result.map(|_| ())),
        }
    }
}

/// What llama.cpp takes a file for that does not say all.
#[test]
fn what_is_left_out_is_llama_cpps() {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let two = 2f32.to_le_bytes().to_vec();
    let rope = |path: &Path| Gguf::open(path).unwrap().config().unwrap()["rope_parameters"].clone();
    for (key, kind, value, rope_type, factor) in [
        ("llama.rope.scaling.factor", 6, two.clone(), "linear", Some(2.0)),
        ("llama.rope.scale_linear", 6, two, "linear", Some(2.0)),
        ("llama.rope.scaling.factor", 6, vec![0; 4], "default", None),
        ("llama.rope.scaling.type", 8, text("none"), "default", None),
        ("llama.rope.scaling.type", 8, text("linear"), "default", None),
        ("llama.rope.scaling.type", 8, text("yarn"), "yarn", None),
    ] {
        let (_folder, path) = with_entry(key, kind, &value);
        let rope = rope(&path);
        assert_eq!((rope["rope_type"].as_str(), rope["factor"].as_f64()), (Some(rope_type), factor), "{key}");
    }
    // A Llama 3 of 2024 has no add_bos_token. Another tokenizer without it wants none.
    for (pre, first) in [("llama3", Some(1)), ("smollm", None)] {
        let (_folder, path) = changed(|bytes| {
            let at = place(bytes, b"tokenizer.ggml.pre") + 18 + 12;
            bytes[at..at + 6].copy_from_slice(format!("{pre:6}").as_bytes());
            let at = place(bytes, b"tokenizer.ggml.add_bos_token");
            bytes[at] = b'_';
        });
        let tokenizer = AutoTokenizer::from_pretrained(&path).unwrap();
        let plain = tokenizer.encode_without_special_tokens("Hello").unwrap().input_ids;
        let want: Vec<u32> = first.into_iter().chain(plain).collect();
        assert_eq!(tokenizer.encode("Hello").unwrap().input_ids, want, "{pre}");
    }
}

/// Any byte of the header may be wrong: an error or another model, never a panic.
#[test]
fn damaged_headers_never_panic() {
    let original = std::fs::read(fixture("gguf/tiny.gguf")).unwrap();
    let (_folder, path) = changed(|_| ());
    let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let tensors = place(&original, b"token_embd.weight");
    let mut refused = 0;
    // The first kilobyte (sizes and names of the metadata), and the tensors' places and shapes.
    for at in (0..1024).step_by(2).chain((tensors..tensors + 1400).step_by(3)) {
        for value in [0, 0xff, original[at] ^ 0x10] {
            file.seek(SeekFrom::Start(at as u64)).unwrap();
            file.write_all(&[value]).unwrap();
            refused += usize::from(load(&path).is_err()) + usize::from(AutoTokenizer::from_pretrained(&path).is_err());
        }
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&original[at..=at]).unwrap();
    }
    assert!(refused > 500, "only {refused} were refused");
    assert!(load(&path).is_ok());
}

/// The real model in f32: its tokens, and its perplexity on a text.
#[test]
fn smollm2_equals_transformers() {
    let Some(path) = smollm2() else { return };
    let want = expected("gguf/smollm2.json");
    let tokenizer = AutoTokenizer::from_pretrained(&path).unwrap();
    check_tokenizer(&tokenizer, &want);
    let ids = tokenizer.encode(want["passage"].as_str().unwrap()).unwrap().input_ids;
    assert_eq!(ids, row(&want["passage_ids"]));
    let model = load(&path).unwrap();
    let perplexity = perplexity(model.decoder(), &ids, ids.len()).unwrap();
    let reference = want["perplexity"].as_f64().unwrap();
    println!("perplexity {perplexity}, transformers {reference}");
    assert!((perplexity - reference).abs() < 1e-3, "{perplexity}, expected {reference}");
}
