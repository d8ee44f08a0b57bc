//! The walkthrough's parameter cell: what is wrong in it gives one clear error at the step that reads it, and after a
//! correction the notebook goes on.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::Path,
};

use serde_json::{Value, json};

use crate::{qlora_nb, text};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../notebooks/en");

/// The source of the walkthrough's first code cell that has `words`.
fn cell(notebook: &Value, words: &str) -> String {
    let source = |cell: &Value| -> String {
        cell["source"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
    };
    let cells = notebook["cells"].as_array().expect("cells");
    let code = cells.iter().filter(|cell| cell["cell_type"] == "code").map(source);
    code.into_iter().find(|source| source.contains(words)).unwrap_or_else(|| panic!("no cell has {words:?}"))
}

fn walkthrough() -> Value {
    let path = Path::new(FOLDER).join("qlora_walkthrough.ipynb");
    serde_json::from_slice(&std::fs::read(path).expect("the notebook")).expect("JSON")
}

/// The parameter cell with other values.
fn with(parameters: &str, fields: &str) -> String {
    parameters.replace("let run = POET;", &format!("let run = Run {{ {fields}, ..POET }};"))
}

#[test]
fn a_mistake_in_the_parameters_is_one_error_and_no_end() {
    let walkthrough = walkthrough();
    let find = |words: &str| cell(&walkthrough, words);
    let parameters = find("let run = POET;");
    let with = |fields: &str| with(&parameters, fields);
    let (data, tokenizer, model) = (find("load_from_disk"), find("AutoTokenizer"), find("AutoModelForCausalLM"));
    let (config, adapters) = (find("LoraConfig {"), find("get_peft_model"));
    // Cells, and what the error of those that fail has to say.
    let cells: Vec<(String, &[&str])> = vec![
        (find("prelude"), &[]),
        (with("data: \"../data/poem_zh\""), &[]),
        (data.clone(), &["../data/poem_zh"]),
        (with("model: \"../models/poet-blom-zh\""), &[]),
        (data, &[]),
        (tokenizer.clone(), &["../models/poet-blom-zh"]),
        // A model of the hub, and no network.
        (with("model: \"Langboat/bloom-1b4-zh\""), &[]),
        (tokenizer.clone(), &["Langboat/bloom-1b4-zh"]),
        (with("modules: \"q_proj\""), &[]),
        (tokenizer, &[]),
        (model, &[]),
        (config.clone(), &[]),
        (adapters.clone(), &["q_proj", "query_key_value"]),
        (parameters, &[]),
        (config, &[]),
        (adapters, &[]),
    ];
    fails_where_it_must(&cells, "http://127.0.0.1:9");
}

/// A hub that knows no model: it answers as the public one does to somebody without a token, 404 for what must be
/// public and 401 for what may be private.
fn hub_without_models() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = String::new();
            for line in BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
                request += &line;
            }
            let status = if request.contains("/private/") { "401 Unauthorized" } else { "404 Not Found" };
            let body = "{\"error\":\"Repository not found\"}";
            let _ = write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nx-error-code: RepoNotFound\r\n\
                 content-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
        }
    });
    format!("http://127.0.0.1:{port}")
}

#[test]
fn a_model_that_the_hub_does_not_have_is_one_error_and_no_end() {
    let walkthrough = walkthrough();
    let find = |words: &str| cell(&walkthrough, words);
    let parameters = find("let run = POET;");
    let tokenizer = find("AutoTokenizer");
    let model = find("AutoModelForCausalLM");
    let cells: Vec<(String, &[&str])> = vec![
        (find("prelude"), &[]),
        (with(&parameters, "model: \"Langboat/bloom-1b4-zhh\""), &[]),
        (tokenizer.clone(), &["Langboat/bloom-1b4-zhh", "no such repository", "check the name"]),
        (model.clone(), &["Langboat/bloom-1b4-zhh", "no such repository", "check the name"]),
        (with(&parameters, "model: \"private/bloom\""), &[]),
        (tokenizer.clone(), &["private/bloom", "private", "check the name", "HF_TOKEN"]),
        (parameters, &[]),
        (tokenizer, &[]),
        (model, &[]),
    ];
    fails_where_it_must(&cells, &hub_without_models());
}

/// Runs cells beside the notebooks' models and data. `cells` tells what the error of each has to say: nothing where
/// it must succeed.
fn fails_where_it_must(cells: &[(String, &[&str])], hub: &str) {
    let source = |(source, error): &(String, &[&str])| {
        let tags: &[&str] = if error.is_empty() { &[] } else { &["raises-exception"] };
        json!({ "cell_type": "code", "metadata": { "tags": tags }, "source": source, "outputs": [] })
    };
    let notebook = json!({ "nbformat": 4, "metadata": {}, "cells": cells.iter().map(source).collect::<Vec<_>>() });
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["data", "models"] {
        std::os::unix::fs::symlink(Path::new(FOLDER).join("..").join(name), folder.path().join(name)).expect("a link");
    }
    let here = folder.path().join("en");
    std::fs::create_dir(&here).expect("a folder");
    let (given, executed) = (here.join("given.ipynb"), here.join("executed.ipynb"));
    std::fs::write(&given, notebook.to_string()).expect("written");
    let mut command = qlora_nb();
    command.arg("run").arg(&given).arg("-o").arg(&executed);
    let output = command.env("HF_ENDPOINT", hub).env("NO_PROXY", "127.0.0.1").env("HF_HOME", folder.path()).output();
    let output = output.expect("qlora-nb starts");
    assert!(output.status.success(), "{}", text(&output));
    let executed: Value = serde_json::from_slice(&std::fs::read(executed).expect("written")).expect("JSON");
    for (i, (_, words)) in cells.iter().enumerate() {
        let outputs = executed["cells"][i]["outputs"].as_array().expect("outputs");
        let errors: Vec<&Value> = outputs.iter().filter(|output| output["output_type"] == "error").collect();
        assert_eq!(errors.len(), usize::from(!words.is_empty()), "cell {i}: {errors:?}");
        for error in errors {
            let said = error["evalue"].as_str().unwrap_or_default();
            assert_eq!(error["ename"], "Error", "cell {i}: {error}");
            let all = error["traceback"].to_string();
            let says = |word: &&str| said.contains(word) || all.contains(word);
            assert!(words.iter().all(says), "cell {i} says {all:?}, not {words:?}");
            assert!(said.contains(words[0]), "cell {i}'s first line is {said:?}");
        }
    }
}
