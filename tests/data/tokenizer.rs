//! Tokens and text against transformers (`tokenizer.json`).

use std::fs;

use qlora_nb::prelude::*;
use qlora_nb_tests::*;
use serde_json::Value as Json;

fn poet() -> Tokenizer {
    AutoTokenizer::from_pretrained(root().join("notebooks/models/poet-bloom-zh")).unwrap()
}

fn expected() -> Json {
    serde_json::from_slice(&fs::read(fixture("tokenizer.json")).unwrap()).unwrap()
}

fn ids(list: &Json) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn check_cases(tokenizer: &Tokenizer, cases: &Json) {
    for case in cases.as_array().unwrap() {
        let encoding = tokenizer.encode(case["text"].as_str().unwrap()).unwrap();
        assert_eq!(encoding.input_ids, ids(&case["input_ids"]), "{}", case["text"]);
        assert_eq!(encoding.attention_mask, ids(&case["attention_mask"]));
        assert_eq!(tokenizer.decode(&encoding.input_ids, false).unwrap(), case["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&encoding.input_ids, true).unwrap(), case["without_special"].as_str().unwrap());
        check_stream(tokenizer, &encoding.input_ids);
    }
}

/// The pieces of a stream are whole characters and together the whole text.
fn check_stream(tokenizer: &Tokenizer, ids: &[u32]) {
    for keep in [false, true] {
        let mut stream = tokenizer.decode_stream();
        if keep {
            stream = stream.keep_special_tokens();
        }
        let mut pieces = Vec::new();
        for &id in ids {
            pieces.extend(stream.push(id).unwrap());
        }
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}') && !piece.is_empty()), "{pieces:?}");
        pieces.extend(stream.finish().unwrap());
        assert_eq!(pieces.concat(), tokenizer.decode(ids, !keep).unwrap());
    }
}

fn check_description(tokenizer: &Tokenizer, expected: &Json) {
    assert_eq!(tokenizer.len() as u64, expected["len"].as_u64().unwrap());
    assert_eq!(tokenizer.vocab_size() as u64, expected["vocab_size"].as_u64().unwrap());
    let token = |name: &str| expected["special_tokens"][name].as_str().unwrap_or("");
    assert_eq!(tokenizer.bos_token(), token("bos_token"));
    assert_eq!(tokenizer.eos_token(), token("eos_token"));
    assert_eq!(tokenizer.unk_token(), token("unk_token"));
    assert_eq!(tokenizer.pad_token(), token("pad_token"));
    let id = |name: &str| expected["special_ids"][name].as_u64().map(|id| id as u32);
    assert_eq!(tokenizer.eos_token_id(), id("eos_token"));
    assert_eq!(tokenizer.pad_token_id(), id("pad_token"));
    assert_eq!(tokenizer.padding_side().to_string(), expected["padding_side"].as_str().unwrap());
}

#[test]
fn the_bundled_tokenizer_is_transformers() {
    let (tokenizer, expected) = (poet(), expected());
    check_description(&tokenizer, &expected["poet"]);
    check_cases(&tokenizer, &expected["cases"]);
    assert_eq!(tokenizer.all_special_ids(), [0, 1, 2, 3]);
    assert_eq!(tokenizer.model_max_length(), Some(1024));
}

#[test]
fn batches_are_padded_on_either_side() {
    let (tokenizer, expected) = (poet(), expected());
    let texts: Vec<&str> = expected["batch_of"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    for (side, name) in [(PaddingSide::Left, "left"), (PaddingSide::Right, "right")] {
        let rows = tokenizer.with_padding_side(side).encode_batch(&texts).unwrap();
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(row.input_ids, ids(&expected["batch"][name]["input_ids"][i]));
            assert_eq!(row.attention_mask, ids(&expected["batch"][name]["attention_mask"][i]));
        }
    }
}

/// A folder of the bundled tokenizer.json, changed and with other files beside it.
fn variant(changes: &Json) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = root().join("notebooks/models/poet-bloom-zh/tokenizer.json");
    let mut whole: Json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for part in ["post_processor", "truncation"] {
        if !changes[part].is_null() {
            whole[part] = changes[part].clone();
        }
    }
    fs::write(folder.path().join("tokenizer.json"), whole.to_string()).unwrap();
    for (name, content) in changes["files"].as_object().into_iter().flatten() {
        fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

#[test]
fn other_configurations_are_read_as_transformers_reads_them() {
    for (name, expected) in expected()["variants"].as_object().unwrap() {
        let folder = variant(expected);
        eprintln!("{name}");
        let tokenizer = AutoTokenizer::from_pretrained(folder.path()).unwrap();
        check_description(&tokenizer, expected);
        check_cases(&tokenizer, &expected["cases"]);
    }
}

#[test]
fn tokens_are_found_in_whatever_file_names_them() {
    let files = serde_json::json!({ "files": {
        "special_tokens_map.json": { "bos_token": "<s>", "pad_token": { "content": "<pad>" } },
        "generation_config.json": { "eos_token_id": [2, 1], "bos_token_id": 3 },
        "config.json": { "model_type": "bloom", "eos_token_id": 1, "unk_token_id": 0 },
    } });
    let tokenizer = AutoTokenizer::from_pretrained(variant(&files).path()).unwrap();
    let tokens = [tokenizer.bos_token(), tokenizer.eos_token(), tokenizer.pad_token(), tokenizer.unk_token()];
    assert_eq!(tokens, ["<s>", "</s>", "<pad>", "<unk>"]);
    assert_eq!(tokenizer.padding_side(), PaddingSide::Left, "BLOOM pads on the left");
}

#[test]
fn it_prints_as_in_the_walkthrough() {
    let files = serde_json::json!({ "files": { "tokenizer_config.json": {
        "tokenizer_class": "BloomTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "model_max_length": 1e30,
    } } });
    let folder = variant(&files);
    let tokenizer = AutoTokenizer::from_pretrained(folder.path()).unwrap();
    assert_eq!(
        tokenizer.to_string(),
        format!(
            "BloomTokenizerFast(name_or_path='{}', vocab_size=6144, \
             model_max_length=1000000000000000019884624838656, is_fast=True, padding_side='left', \
             truncation_side='right', special_tokens={{'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', \
             'pad_token': '<pad>'}}, clean_up_tokenization_spaces=False)",
            folder.path().display()
        )
    );
}

#[test]
fn a_padding_token_is_needed_only_where_rows_differ() {
    let files = serde_json::json!({ "files": { "tokenizer_config.json": { "eos_token": "</s>" } } });
    let tokenizer = AutoTokenizer::from_pretrained(variant(&files).path()).unwrap();
    assert_eq!((tokenizer.pad_token(), tokenizer.pad_token_id()), ("", None));
    assert!(tokenizer.encode_batch(&["春眠", "不觉"]).is_ok());
    let error = tokenizer.encode_batch(&["春眠", "不"]).unwrap_err().to_string();
    assert!(error.contains("with_pad_token"), "{error}");
    let padded = tokenizer.with_pad_token("<pad>").unwrap();
    assert_eq!(padded.encode_batch(&["春眠", "不"]).unwrap()[1].attention_mask, [1, 0]);
    assert!(tokenizer.with_pad_token("<no such token>").is_err());
}

#[test]
fn damaged_and_missing_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let load = || AutoTokenizer::from_pretrained(folder.path()).map(|_| ()).unwrap_err();
    let error = load();
    assert!(matches!(&error, Error::NotFound { path, .. } if path.ends_with("tokenizer.json")), "{error}");
    let good = fs::read(root().join("notebooks/models/poet-bloom-zh/tokenizer.json")).unwrap();
    let path = folder.path().join("tokenizer.json");
    for bad in [&b""[..], &good[..good.len() / 2], b"{}", b"[1, 2]", &[0xff, 0xfe, 0x00]] {
        fs::write(&path, bad).unwrap();
        let error = load();
        assert!(matches!(&error, Error::Malformed { path: p, .. } if *p == path), "{error}");
    }
    fs::write(&path, &good).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), "{\"eos_token\": ").unwrap();
    let error = load();
    assert!(matches!(&error, Error::Malformed { path, .. } if path.ends_with("tokenizer_config.json")), "{error}");
    fs::write(folder.path().join("tokenizer_config.json"), "{\"padding_side\": \"top\"}").unwrap();
    assert!(load().to_string().contains("\"left\" or \"right\""));
}

#[test]
fn what_is_saved_is_the_same_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let changed = poet().with_pad_token("<unk>").unwrap().with_padding_side(PaddingSide::Right);
    let changed = changed.with_chat_template("{{ messages[0].content }}").unwrap();
    for tokenizer in [changed, poet()] {
        tokenizer.save_pretrained(folder.path()).unwrap();
        let again = AutoTokenizer::from_pretrained(folder.path()).unwrap();
        let text = "Human: 写一首五言绝句。</s>, it 's";
        let ids = tokenizer.encode(text).unwrap().input_ids;
        assert_eq!(again.encode(text).unwrap().input_ids, ids);
        assert_eq!(again.decode(&ids, false).unwrap(), tokenizer.decode(&ids, false).unwrap());
        // The second has no template, and the first's is gone.
        assert_eq!(again.chat_template(), tokenizer.chat_template());
        assert_eq!(again.model_max_length(), tokenizer.model_max_length());
        let print = |t: &Tokenizer| t.to_string().replace(t.name_or_path(), "");
        assert_eq!(print(&again), print(&tokenizer));
    }
}
