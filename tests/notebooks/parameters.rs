//! The walkthrough's parameter cell: what is wrong in it gives one clear error at the step that reads it, and after a
//! correction the notebook goes on.

use std::path::Path;

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

#[test]
fn a_mistake_in_the_parameters_is_one_error_and_no_end() {
    let path = Path::new(FOLDER).join("qlora_walkthrough.ipynb");
    let walkthrough: Value = serde_json::from_slice(&std::fs::read(path).expect("the notebook")).expect("JSON");
    let find = |words: &str| cell(&walkthrough, words);
    let parameters = find("let run = POET;");
    let with = |fields: &str| parameters.replace("let run = POET;", &format!("let run = Run {{ {fields}, ..POET }};"));
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
    let output = command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", folder.path()).output();
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
            assert!(words.iter().all(|word| said.contains(word)), "cell {i} says {said:?}, not {words:?}");
        }
    }
}
