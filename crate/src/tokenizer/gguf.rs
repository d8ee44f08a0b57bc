//! The tokenizer that a GGUF file carries (`tokenizer.ggml.*`), put in tokenizer.json's form.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{PaddingSide, config::Config};
use crate::{
    error::{Error, Result},
    models::gguf::Gguf,
};

/// ggml's token types that become added tokens: unknown and control tokens are special, those
/// that the model's maker defined are not.
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// tokenizer.json's content, and what the files beside it would say.
pub(super) fn read(gguf: &Gguf, name_or_path: &str) -> Result<(Value, Config)> {
    let missing = |key: &str| gguf.malformed(format!("there is no tokenizer.ggml.{key}, or it is of another type"));
    let kind = gguf.text("tokenizer.ggml.model").ok_or_else(|| missing("model"))?;
    if kind != "gpt2" {
        return Err(unsupported(gguf, "tokenizer.ggml.model", &kind, &["gpt2 (byte-level BPE)"]));
    }
    let tokens = gguf.texts("tokenizer.ggml.tokens").ok_or_else(|| missing("tokens"))?;
    let merges = gguf.texts("tokenizer.ggml.merges").ok_or_else(|| missing("merges"))?;
    let types = gguf.numbers("tokenizer.ggml.token_type").unwrap_or_default();
    let different = tokens.iter().collect::<HashSet<_>>().len();
    if different != tokens.len() {
        return Err(gguf.malformed(format!("{} tokens occur twice", tokens.len() - different)));
    }
    if let Some(merge) = merges.iter().find(|m| !m.contains(' ')) {
        return Err(gguf.malformed(format!("the merge {merge:?} is no pair")));
    }
    let pre = gguf.text("tokenizer.ggml.pre").unwrap_or_else(|| "gpt-2".into());
    let added = tokens.iter().zip(&types).enumerate();
    let added = added.filter(|(_, (_, kind))| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind));
    let added = added.map(|(id, (token, kind))| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": *kind != USER_DEFINED})
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.to_string(), id.into())).collect();

    let id = |key: &str| gguf.number(&format!("tokenizer.ggml.{key}_token_id")).map(|id| id as usize);
    let token = |key: &str| Some(tokens.get(id(key)?)?.to_string());
    let json = json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer(gguf, &pre)?,
        "post_processor": post_processor(gguf, &pre, |key| Some((id(key)?, token(key)?))),
        "decoder": byte_level,
        "model": {"type": "BPE", "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": is_llama3(&pre),
            "vocab": vocab, "merges": merges},
    });
    let names = [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")];
    let config = Config {
        name_or_path: name_or_path.into(),
        class: "TokenizersBackend".into(),
        special: names.into_iter().filter_map(|(name, key)| Some((name, token(key)?))).collect(),
        additional: Vec::new(),
        padding_side: PaddingSide::Right,
        model_max_length: gguf.number("llama.context_length").map(|n| n as usize),
        clean_up_tokenization_spaces: false,
        chat_template: gguf.text("tokenizer.chat_template"),
    };
    Ok((json, config))
}

/// Whether this is the tokenizer of Llama 3, under one of llama.cpp's names.
fn is_llama3(pre: &str) -> bool {
    ["llama-bpe", "llama3", "llama-v3"].contains(&pre)
}

/// How text is cut before pairs are merged, under llama.cpp's names. The regular expressions are
/// those of the models' own tokenizer.json.
fn pre_tokenizer(gguf: &Gguf, name: &str) -> Result<Value> {
    let byte_level =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |numbers: &str| {
        let regex = [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
            numbers,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ];
        let regex =
            json!({"type": "Split", "pattern": {"Regex": regex.concat()}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [regex, byte_level(false)]})
    };
    Ok(match name {
        "gpt-2" => byte_level(true),
        "smollm" | "starcoder" | "refact" | "command-r" => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)]})
        }
        llama if is_llama3(llama) => split(r"\p{N}{1,3}"),
        "qwen2" | "deepseek-r1-qwen" => split(r"\p{N}"),
        other => {
            let supported = ["gpt-2", "smollm", "starcoder", "refact", "command-r", "llama-bpe", "qwen2"];
            return Err(unsupported(gguf, "tokenizer.ggml.pre", other, &supported));
        }
    })
}

/// The tokens that the file wants before and after each text. As in llama.cpp a Llama 3 that says nothing wants the one
/// before.
fn post_processor(gguf: &Gguf, pre: &str, token: impl Fn(&str) -> Option<(usize, String)>) -> Value {
    let default = |key: &str| key == "bos" && is_llama3(pre);
    let said = |key: &str| gguf.number(&format!("tokenizer.ggml.add_{key}_token"));
    let wanted = |key: &str| said(key).map_or(default(key), |n| n != 0.0);
    let around = |key: &str| token(key).filter(|_| wanted(key));
    let (bos, eos) = (around("bos"), around("eos"));
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |token: &Option<(usize, String)>, part: i32| {
        token.iter().map(|(_, t)| json!({"SpecialToken": {"id": t, "type_id": part}})).collect::<Vec<_>>()
    };
    let text = |id: &str, part: i32| vec![json!({"Sequence": {"id": id, "type_id": part}})];
    let single = |id: &str, part: i32| [special(&bos, part), text(id, part), special(&eos, part)].concat();
    let tokens = bos.iter().chain(&eos).map(|(id, t)| (t.clone(), json!({"id": t, "ids": [id], "tokens": [t]})));
    let pair = [single("A", 0), single("B", 1)].concat();
    let tokens: serde_json::Map<String, Value> = tokens.collect();
    json!({"type": "TemplateProcessing", "single": single("A", 0), "pair": pair, "special_tokens": tokens})
}

fn unsupported(gguf: &Gguf, what: &str, got: &str, supported: &[&str]) -> Error {
    let what = format!("{what} of {}", gguf.path().display());
    let remedy = "load the tokenizer from the model's folder in Hugging Face layout (tokenizer.json)";
    Error::unsupported(&what, got, supported.iter().copied(), remedy)
}
