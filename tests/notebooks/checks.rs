//! Notebooks as tests: what passes, what fails, what is said of it, and what is rewritten.
//!
//! `table/` holds notebooks of which every tool that executes notebooks must think the same (nbclient, nbmake);
//! what `promises/` holds can be seen only by one that compares outputs. `expected.json` says what they come to.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};

use crate::{kept, qlora_nb, text};

fn test(options: &[&str], paths: &[PathBuf]) -> Output {
    qlora_nb().arg("test").args(options).args(paths).output().expect("qlora-nb starts")
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("readable")).expect("JSON")
}

/// Writes a notebook of cells, each a source and metadata.
fn write(path: &Path, cells: &[(&str, Value)]) -> PathBuf {
    let cell = |(source, metadata): &(&str, Value)| json!({ "cell_type": "code", "source": source, "metadata": metadata, "outputs": [] });
    let cells: Vec<Value> = cells.iter().map(cell).collect();
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, json!({ "nbformat": 4, "metadata": {}, "cells": cells }).to_string()).expect("written");
    path.to_owned()
}

fn copy(name: &str, folder: &Path) -> PathBuf {
    let path = folder.join(Path::new(name).file_name().expect("a name"));
    fs::copy(kept(name), &path).expect("copied");
    path
}

/// The start tags of a JUnit file, as name and attributes, and the texts between them; panics if it is no XML.
fn parse(xml: &str) -> Vec<(String, BTreeMap<String, String>, String)> {
    let plain = |text: &str| {
        assert!(!text.contains(['<', '>']) && text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
        let known = ["lt", "gt", "amp", "quot", "apos"];
        assert!(text.split('&').skip(1).all(|rest| known.contains(&rest.split(';').next().unwrap_or(""))), "{text:?}");
        let text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&apos;", "'");
        text.replace("&amp;", "&")
    };
    let (mut tags, mut open) = (Vec::new(), Vec::new());
    let body = xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n").expect("the declaration");
    for piece in body.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').expect("a tag's end");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let (name, rest) = tag.split_once([' ', '/']).unwrap_or((tag, ""));
        let mut quoted = rest.trim_end_matches('/').split('"');
        let mut attributes = BTreeMap::new();
        while let (Some(key), Some(value)) = (quoted.next(), quoted.next()) {
            let key = key.trim().strip_suffix('=').expect("an attribute");
            assert!(attributes.insert(key.to_owned(), plain(value)).is_none(), "{key} twice");
        }
        if !tag.ends_with('/') {
            open.push(name.to_owned());
        }
        tags.push((name.to_owned(), attributes, plain(text)));
    }
    assert!(open.is_empty(), "{open:?} stay open");
    tags
}

/// Every notebook comes to what is expected of it, and none is touched.
#[test]
fn good_and_bad_notebooks() {
    let folders = [kept("table"), kept("promises")];
    let names = |folder: &PathBuf| {
        let expected = read(&folder.join("expected.json"));
        let expected = expected.as_object().expect("an object").clone();
        expected.into_iter().map(|(name, verdict)| (folder.join(name), verdict == "pass")).collect::<Vec<_>>()
    };
    let expected: BTreeMap<PathBuf, bool> = folders.iter().flat_map(names).collect();
    let before: Vec<_> = expected.keys().map(|path| fs::read(path).expect("readable")).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let junit = folder.path().join("new/junit.xml");
    let output = test(&["--junit", &junit.to_string_lossy()], &folders);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");

    let tags = parse(&fs::read_to_string(&junit).expect("JUnit XML"));
    let suites = tags.iter().filter(|(name, ..)| name == "testsuite");
    let verdicts: BTreeMap<PathBuf, bool> = suites
        .map(|(_, suite, _)| (suite["name"].clone().into(), suite["failures"] == "0" && suite["errors"] == "0"))
        .collect();
    assert_eq!(verdicts, expected, "{said}");
    let cases = tags.iter().filter(|(name, ..)| name == "testcase").count();
    assert_eq!(tags[0].1["tests"], cases.to_string());
    let skipped: Vec<_> = tags.iter().filter(|(name, ..)| name == "skipped").map(|tag| &tag.1["message"]).collect();
    assert_eq!(skipped, ["not reached", "tagged skip"]);
    let failures = tags.iter().filter(|(name, ..)| name == "failure");
    let details: Vec<&str> = failures.map(|(.., text)| text.as_str()).collect();
    for (in_file, said_of_it) in [
        ("@@ stdout\n line 18\n-line nineteen\n+line 19\n line 20", "cell 2 of"),
        ("@@ error\n-Panic: the message of yesterday\n+Panic: the message of today", "raises_another.ipynb differs"),
        ("@@ stdout\n-done <masked>\n+gone <masked>", "beside_mask.ipynb differs"),
    ] {
        assert!(details.contains(&in_file), "{details:#?} lack {in_file:?}");
        assert!(said.contains(in_file) && said.contains(said_of_it), "{said}\n\nlacks {in_file:?} or {said_of_it:?}");
    }
    assert!(details.contains(&"@@ output 1, text/plain\n+20"), "{details:#?}");
    assert!(said.contains("nothing_stored.ipynb has no stored outputs, and 1 of its cells"), "{said}");
    assert!(said.contains("tagged raises-exception, but did not fail"), "{said}");
    assert!(!said.contains('\u{1b}'), "colours though no terminal:\n{said}");
    let after: Vec<_> = expected.keys().map(|path| fs::read(path).expect("readable")).collect();
    assert!(before == after, "a notebook was touched");
}

/// Rewritten are the cells that differ; notebooks that keep their promises or fail stay byte for byte.
#[test]
fn update_rewrites_what_differs_and_no_more() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = ["promises/changed_output", "promises/nothing_stored", "table/within_terms", "table/panic"];
    let paths: Vec<PathBuf> = names.iter().map(|name| copy(&format!("{name}.ipynb"), folder.path())).collect();
    let before: Vec<_> = paths.iter().map(|path| fs::read(path).expect("readable")).collect();
    let (changed, bare) = (read(&paths[0]), read(&paths[1]));
    let output = test(&["--update"], &paths);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "the panic passed:\n{said}");
    assert!(said.contains("panic.ipynb: not rewritten"), "{said}");
    for i in [2, 3] {
        assert!(fs::read(&paths[i]).expect("readable") == before[i], "{} was touched", paths[i].display());
    }
    let mut expected = changed.clone();
    expected["cells"][2]["outputs"][0]["text"][1] = json!("line 19\n");
    assert_eq!(read(&paths[0]), expected);
    let mut expected = bare.clone();
    let result = json!({ "output_type": "execute_result", "execution_count": 1, "data": { "text/plain": ["20"] },
                         "metadata": {} });
    expected["cells"][1]["outputs"] = json!([result]);
    expected["cells"][1]["execution_count"] = json!(1);
    assert_eq!(read(&paths[1]), expected);

    let output = test(&["--jobs", "2"], &paths[..2]);
    assert_eq!(output.status.code(), Some(0), "what was rewritten differs:\n{}", text(&output));
}

/// A notebook whose process is killed is reported, and hides no other.
#[test]
fn a_notebooks_process_that_is_killed() {
    let folder = tempfile::tempdir().expect("a folder");
    let kill = "let parent = |pid: &str| {\n    let status = std::fs::read_to_string(format!(\"/proc/{pid}/status\")).unwrap();\n    \
                status.lines().find_map(|line| line.strip_prefix(\"PPid:\")).unwrap().trim().to_owned()\n};\n\
                std::process::Command::new(\"kill\").arg(\"-9\").arg(parent(&parent(\"self\"))).status()?;";
    let kill = format!("{{\n{kill}\n}}");
    let killed = write(&folder.path().join("a.ipynb"), &[("1;", json!({})), (&kill, json!({})), ("2;", json!({}))]);
    let good = write(&folder.path().join("b.ipynb"), &[("let x = 1;", json!({}))]);
    let junit = folder.path().join("junit.xml");
    let output = test(&["--memory", "1", "--junit", &junit.to_string_lossy()], &[killed, good]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("a.ipynb: the notebook's process stopped: signal: 9"), "{said}");
    assert!(said.contains("2 notebooks, 4 cells: 2 ok, 2 not reached, 1 broke down"), "{said}");
    let tags = parse(&fs::read_to_string(&junit).expect("JUnit XML"));
    assert_eq!((tags[0].1["tests"].as_str(), tags[0].1["errors"].as_str()), ("5", "1"));
}

/// `run` takes several, and folders.
#[test]
fn run_writes_several_into_a_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let bad = write(&folder.path().join("in/bad.ipynb"), &[("panic!(\"on purpose\")", json!({}))]);
    let path = folder.path().join("in/deeper/kept.ipynb");
    let good = write(&path, &[("1 + 1", json!({})), ("panic!()", json!({ "tags": ["skip"] }))]);
    fs::create_dir(folder.path().join("in/.ipynb_checkpoints")).expect("a folder");
    fs::write(folder.path().join("in/.ipynb_checkpoints/old.ipynb"), "no notebook").expect("written");
    let mut command = qlora_nb();
    command.arg("run").arg(folder.path().join("in")).arg("-o").arg(folder.path().join("out"));
    let output = command.output().expect("qlora-nb starts");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let written = |name: &str| read(&folder.path().join("out").join(name));
    assert_eq!(written("bad.ipynb")["cells"][0]["outputs"][0]["evalue"], "on purpose");
    assert_eq!(written("kept.ipynb")["cells"][0]["outputs"][0]["data"]["text/plain"][0], "2");
    for path in [bad, good] {
        assert_eq!(read(&path)["cells"][0]["outputs"], json!([]), "{} was touched", path.display());
    }
}

/// All that is wrong is said before anything runs.
#[test]
fn what_cannot_be_meant_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let ours = |name: &str, ours: Value| {
        let cells = [("1", json!({})), ("1", json!({ "qlora_nb": ours }))];
        write(&folder.path().join(name), &cells)
    };
    let good = write(&folder.path().join("good.ipynb"), &[("1", json!({}))]);
    let unknown = ours("unknown.ipynb", json!({ "tolerence": 1e-3 }));
    let negative = ours("negative.ipynb", json!({ "tolerance": -1 }));
    let mask = ours("mask.ipynb", json!({ "mask": ["(a"] }));
    let memory = folder.path().join("memory.ipynb");
    let json = json!({ "nbformat": 4, "metadata": { "qlora_nb": { "memory_mib": "2G" } }, "cells": [] });
    fs::write(&memory, json.to_string()).expect("written");
    let nowhere = folder.path().join("nowhere.ipynb");
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    let refuses = |options: &[&str], paths: &[&PathBuf], messages: &[&str]| {
        let paths: Vec<PathBuf> = paths.iter().map(|path| path.to_path_buf()).collect();
        let output = test(options, &paths);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(!text(&output).contains("ready   "), "something ran:\n{}", text(&output));
        for message in messages {
            assert!(text(&output).contains(message), "{} does not say {message:?}", text(&output));
        }
    };
    let cell = format!("cell 2 of {}: metadata qlora_nb.tolerence is unknown", unknown.display());
    let all = [cell.as_str(), "tolerance: expected a number that is not negative, got -1", "\"(a\" is no regular"];
    refuses(&[], &[&good, &unknown, &negative, &mask], &all);
    refuses(&[], &[&memory], &["memory.ipynb", "memory_mib: expected a positive integer, got \"2G\""]);
    refuses(&[], &[&good, &nowhere], &["nowhere.ipynb"]);
    refuses(&[], &[&good, &empty], &["there is no notebook"]);
    refuses(&["-o", "x"], &[&good], &["--update"]);
    refuses(&["--jobs", "0"], &[&good], &["'--jobs <N>': expected a positive integer, got \"0\""]);
    refuses(&["--memory", "2G"], &[&good], &["'--memory <MIB>': expected a positive integer, got \"2G\""]);
    refuses(&[], &[], &["required arguments were not provided", "<NOTEBOOK>..."]);
}
