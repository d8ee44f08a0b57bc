//! What is made of the walkthrough notebook: the program `crate/examples/walkthrough.rs`, cell by cell, and the READMEs'
//! picture and table of poems.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::languages::{notebooks, text};

/// A cell as the program has it. The one difference: what the notebook would display, the program prints.
fn as_printed(cell: &str) -> String {
    let (before, last) = cell.rsplit_once('\n').map_or(("", cell), |(before, last)| (before, last));
    let statement = last.split(" // ").next().unwrap_or(last);
    if statement.ends_with([';', '}']) {
        return cell.to_owned();
    }
    let printed = format!("println!(\"{{}}\", {last});");
    if before.is_empty() { printed } else { format!("{before}\n{printed}") }
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

fn code_cells() -> Vec<Value> {
    let notebook = notebooks("en").remove("qlora_walkthrough.ipynb").expect("the walkthrough");
    let cells = notebook["cells"].as_array().expect("cells").iter();
    cells.filter(|cell| cell["cell_type"] == "code").cloned().collect()
}

#[test]
fn the_example_is_the_notebook() {
    let example = std::fs::read_to_string(repository("crate/examples/walkthrough.rs")).expect("the example");
    let lines: Vec<&str> = example.lines().map(|line| line.strip_prefix("    ").unwrap_or(line)).collect();
    let cells = lines.split(|line| line.starts_with("// %%")).skip(1).map(|cell| {
        let end = cell.iter().position(|line| line.starts_with("// Not in the notebook")).unwrap_or(cell.len());
        cell[..end].join("\n").trim_end().to_owned()
    });
    let cells: Vec<String> = cells.collect();
    let expected: Vec<String> = code_cells().iter().map(|cell| as_printed(&text(cell))).collect();
    for (i, (cell, expected)) in cells.iter().zip(&expected).enumerate() {
        assert_eq!(cell, expected, "the example's code cell {i} (from 0) is not the notebook's");
    }
    assert_eq!(cells.len(), expected.len(), "cells");
}

/// The stored outputs, a string each: `stream` for what was printed, or a MIME type.
fn stored(kind: &str) -> Vec<String> {
    let outputs = code_cells().into_iter().flat_map(|cell| cell["outputs"].as_array().cloned().unwrap_or_default());
    let lines = outputs.map(|output| match kind {
        "stream" => output["text"].clone(),
        mime => output["data"][mime].clone(),
    });
    let joined = |lines: Value| -> Option<String> {
        Some(lines.as_array()?.iter().filter_map(Value::as_str).collect::<String>())
    };
    lines.filter_map(joined).collect()
}

#[test]
fn the_readmes_show_the_stored_outputs() {
    let picture = std::fs::read_to_string(repository("notebooks/pictures/loss.svg")).expect("the picture");
    assert!(stored("image/svg+xml").contains(&picture), "notebooks/pictures/README.md says how the picture is renewed");

    let printed = stored("stream");
    let poems = |text: &str| -> Vec<(String, String)> {
        let shown = text.split("Human: ").skip(1).filter_map(|one| one.split_once("\n\nAssistant: "));
        let cell = |text: &str| text.trim().replace('\n', "<br>");
        shown.map(|(request, poem)| (cell(request), cell(poem))).collect()
    };
    let after = printed.iter().find(|text| text.contains(" in form before, ")).expect("the poems after training");
    let before = printed.iter().find(|text| text.contains(" in form\n")).expect("the poems before training");
    let counts: Vec<&str> = after.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty()).take(3).collect();
    let [good, all, better] = counts[..] else { panic!("{counts:?} are not three numbers") };
    let heads = [
        ("README.md", format!("| request | before: {good} of {all} in form | after: {better} of {all} |")),
        ("README.zh.md", format!("| 请求 | 训练前：{all} 首中 {good} 首合格 | 训练后：{better} 首合格 |")),
    ];
    let (before, after) = (poems(before), poems(after));
    assert_eq!((before.len(), after.len()), (3, 3));
    let rows = before.iter().zip(&after).map(|((request, old), (_, new))| format!("| {request} | {old} | {new} |"));
    let table: Vec<String> = std::iter::once("|---|---|---|".to_owned()).chain(rows).collect();
    for (name, head) in heads {
        let readme = std::fs::read_to_string(repository(name)).expect("a README");
        let expected = format!("{head}\n{}\n", table.join("\n"));
        assert!(readme.contains(&expected), "{name} lacks the table\n{expected}");
        assert!(readme.contains("](notebooks/pictures/loss.svg)"), "{name} lacks the picture");
    }
}
