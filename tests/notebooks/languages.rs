//! The notebooks of the two languages are one: what is not prose is equal, byte for byte.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde_json::{Value, json};

/// The notebooks of a language, by file name.
pub fn notebooks(language: &str) -> BTreeMap<String, Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../notebooks").join(language);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths =
        files.map(|file| file.expect("an entry").path()).filter(|p| p.extension().is_some_and(|e| e == "ipynb"));
    let read = |path: &Path| serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON");
    paths.map(|p| (p.file_name().expect("a name").to_string_lossy().into_owned(), read(&p))).collect()
}

pub fn text(cell: &Value) -> String {
    cell["source"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn is_han(c: char) -> bool {
    ('\u{4e00}'..='\u{9fff}').contains(&c)
}

/// Kinds of cells in their order, and of the code cells source and metadata: what they promise is a test too.
fn code(notebook: &Value) -> Vec<Value> {
    let cells = notebook["cells"].as_array().expect("cells");
    let code = |cell: &Value| match cell["cell_type"].as_str() {
        Some("code") => json!([text(cell), cell["metadata"]]),
        kind => json!(kind),
    };
    cells.iter().map(code).collect()
}

#[test]
fn code_cells_are_equal_in_both_languages() {
    let (english, chinese) = (notebooks("en"), notebooks("zh"));
    assert!(!english.is_empty());
    assert_eq!(
        english.keys().collect::<Vec<_>>(),
        chinese.keys().collect::<Vec<_>>(),
        "each notebook has a translation"
    );
    for (name, notebook) in &english {
        let (en, zh) = (code(notebook), code(&chinese[name]));
        for (i, (en, zh)) in en.iter().zip(&zh).enumerate() {
            assert_eq!(en, zh, "{name}: cell {i} (from 0) of en/ and zh/");
        }
        assert_eq!(en.len(), zh.len(), "{name}: cells");
        assert_eq!(notebook["metadata"], chinese[name]["metadata"], "{name}: metadata");
    }
}

#[test]
fn prose_is_in_its_language() {
    for (name, notebook) in notebooks("zh") {
        for cell in notebook["cells"].as_array().expect("cells").iter().filter(|cell| cell["cell_type"] == "markdown") {
            assert!(text(cell).contains(is_han), "zh/{name}: {:?}", text(cell));
        }
    }
}

/// Each notebook opens with what it takes, and ends with what to try.
#[test]
fn notebooks_open_and_end_alike() {
    for (language, words) in [
        ("en", ["**How long.**", "**Needs**", "## What to try"]),
        ("zh", ["**要多久。**", "**需要什么。**", "## 可以试试"]),
    ] {
        for (name, notebook) in notebooks(language) {
            let cells = notebook["cells"].as_array().expect("cells");
            let (first, last) = (text(&cells[0]), text(&cells[cells.len() - 1]));
            let [time, needs, tries] = words;
            assert!(first.contains(time) && first.contains(needs), "{language}/{name} opens with {first:?}");
            assert!(last.contains(tries), "{language}/{name} ends with {last:?}");
        }
    }
}

/// Code cells fit on a page, in length and in width: a Chinese character takes two columns.
#[test]
fn code_cells_fit_on_a_page() {
    for (name, notebook) in notebooks("en") {
        for cell in notebook["cells"].as_array().expect("cells").iter().filter(|cell| cell["cell_type"] == "code") {
            let code = text(cell);
            assert!(code.lines().count() <= 15, "{name}: {} lines in\n{code}", code.lines().count());
            for line in code.lines() {
                let columns: usize = line.chars().map(|c| if c < '\u{2e80}' { 1 } else { 2 }).sum();
                assert!(columns <= 111, "{name}: {columns} columns in\n{line}");
            }
        }
    }
}

/// What the notebooks read is what its script writes.
#[test]
fn the_lighthouse_is_what_its_script_writes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("scripts/persona/make_rows.py");
    std::fs::create_dir_all(script.parent().expect("a parent")).expect("a folder");
    std::fs::copy(root.join("scripts/persona/make_rows.py"), &script).expect("copied");
    // The script writes beside itself: two folders up, in notebooks/data.
    let output = match Command::new("python3").arg(&script).output() {
        Ok(output) => output,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return eprintln!("skipped: there is no python3 here"),
        Err(e) => panic!("python3: {e}"),
    };
    assert!(output.status.success(), "{}", crate::text(&output));
    for name in ["train.jsonl", "heldout.jsonl"] {
        let read = |root: &Path| std::fs::read(root.join("notebooks/data/lighthouse").join(name)).expect("a file");
        assert!(read(folder.path()) == read(&root), "{name} is not what scripts/persona/make_rows.py writes");
    }
}

/// Pictures are SVG, and no output is large.
#[test]
fn stored_outputs_are_small() {
    for (language, name, notebook) in
        ["en", "zh"].into_iter().flat_map(|l| notebooks(l).into_iter().map(move |(name, notebook)| (l, name, notebook)))
    {
        let outputs: usize =
            notebook["cells"].as_array().expect("cells").iter().map(|cell| cell["outputs"].to_string().len()).sum();
        assert!(outputs > 1000, "{language}/{name} has no stored outputs");
        assert!(outputs < 400_000, "{language}/{name}: {outputs} bytes of outputs");
    }
}
