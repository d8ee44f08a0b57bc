//! The runner itself: what it writes, and what it says of bad input.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{Run, qlora_nb, refuses, text};

#[test]
fn outputs_keep_their_order_and_forms() {
    let run = Run::cells(&[
        "use qlora_nb::display::{Html, Svg};",
        "println!(\"first\");\neprintln!(\"second\");\nHtml::new(\"<b>1</b>\", \"1\").evcxr_display();\nSvg::new(\"<svg/>\", \"a picture\")",
        "print!(\"without a newline\");",
        "for i in 0..2 { println!(\"{i}\"); }",
    ]);
    run.assert_success();
    let kinds: Vec<_> =
        run.outputs(1).iter().map(|output| output["output_type"].as_str().unwrap_or_default()).collect();
    assert_eq!(kinds, ["stream", "stream", "display_data", "execute_result"]);
    assert_eq!(run.outputs(1)[2]["data"]["text/html"][0], "<b>1</b>");
    assert_eq!(run.outputs(1)[3]["data"]["image/svg+xml"][0], "<svg/>");
    assert_eq!(run.outputs(1)[3]["data"]["text/plain"][0], "a picture");
    assert_eq!(run.stream(2, "stdout"), "without a newline");
    assert_eq!(run.stream(3, "stdout"), "0\n1\n");
    assert_eq!(run.outputs(3).len(), 1, "a loop's () is shown: {:?}", run.outputs(3));
}

#[test]
fn cells_run_in_the_notebooks_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("beside.txt"), "found").expect("written");
    let notebook = folder.path().join("here.ipynb");
    let cell = "{\"cell_type\": \"code\", \"source\": \"std::fs::read_to_string(\\\"beside.txt\\\")?\"}";
    std::fs::write(&notebook, format!("{{\"nbformat\": 4, \"cells\": [{cell}]}}")).expect("written");
    Run::of(&notebook, &[]).assert_success();
}

#[test]
fn a_cell_that_must_fail_and_does_not_fails_the_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let notebook = folder.path().join("tagged.ipynb");
    let cell = "{\"cell_type\": \"code\", \"source\": \"1\", \"metadata\": {\"tags\": [\"raises-exception\"]}}";
    std::fs::write(&notebook, format!("{{\"nbformat\": 4, \"cells\": [{cell}]}}")).expect("written");
    let run = Run::of(&notebook, &[]);
    assert!(!run.success && run.said.contains("did not fail"), "{}", run.said);
}

#[test]
fn bad_input_is_refused_with_a_remedy() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("written");
        path
    };
    let good = write("good.ipynb", "{\"nbformat\": 4, \"cells\": []}");
    let bare = || Command::new(env!("CARGO_BIN_EXE_qlora-nb"));
    refuses(bare().args(["run", "/nowhere.ipynb"]), "/nowhere.ipynb");
    refuses(bare().arg("run").arg(write("text.ipynb", "hello")), "is not a notebook");
    refuses(bare().arg("run").arg(write("old.ipynb", "{\"nbformat\": 3}")), "--nbformat 4");
    let missing = folder.path().join("missing");
    refuses(bare().arg("run").arg(&good).arg("--prefix").arg(&missing), "remedy: qlora-nb install");
    let mut without_rust = qlora_nb();
    without_rust.arg("run").arg(&good).env("PATH", "/nowhere").env("RUSTUP_HOME", "/nowhere");
    refuses(&mut without_rust, "remedy: qlora-nb install, for the rustc on PATH; or rustup toolchain install");
    refuses(bare().args(["run", "a.ipynb", "--timeout", "soon"]), "expected seconds, got \"soon\"");
    for number in ["1e300", "1e30", "1e19", "1e-12", "0", "nan"] {
        refuses(bare().args(["run", "a.ipynb", "--timeout", number]), &format!("expected seconds, got {number:?}"));
    }
    refuses(bare().args(["walk"]), "unrecognized subcommand 'walk'");
    refuses(bare().args(["run"]), "<NOTEBOOK>...");
    refuses(bare().args(["run", "a.ipynb", "--uptade"]), "unexpected argument '--uptade'");
    refuses(&mut bare(), "Usage: qlora-nb <COMMAND>");
}

#[test]
fn a_shell_can_complete_the_command_line() {
    for (shell, sign) in [("bash", "complete -F"), ("zsh", "#compdef qlora-nb"), ("fish", "complete -c qlora-nb")] {
        let output = Command::new(env!("CARGO_BIN_EXE_qlora-nb")).args(["completions", shell]).output();
        let output = output.expect("qlora-nb starts");
        let script = text(&output);
        assert!(output.status.success() && script.contains(sign), "{script}");
        assert!(["install", "doctor", "junit"].iter().all(|word| script.contains(word)), "{script}");
    }
}

#[test]
fn another_rustc_is_noticed() {
    let run = qlora_nb();
    let prefix = run.get_envs().find_map(|(name, value)| (name == "QLORA_NB_PREFIX").then_some(value?));
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("prefix");
    let status = Command::new("cp").arg("-r").arg(prefix.expect("a prefix")).arg(&copy).status();
    assert!(status.is_ok_and(|status| status.success()));
    let doctor = || qlora_nb().arg("doctor").arg("--prefix").arg(&copy).output().expect("qlora-nb starts");
    std::fs::write(Path::new(&copy).join("rustc"), "rustc 1.0.0 (2015)\n").expect("written");
    let output = doctor();
    assert!(!output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("was built by rustc 1.0.0"), "{}", text(&output));
}

#[test]
fn a_healthy_installation_is_healthy() {
    let output = qlora_nb().arg("doctor").output().expect("qlora-nb starts");
    assert!(output.status.success(), "{}", text(&output));
}

/// A notebook of code cells, in a folder of its own.
fn notebook(folder: &Path, cells: &[&str]) -> PathBuf {
    let stored = json!({ "output_type": "stream", "name": "stdout", "text": ["stored\n"] });
    let cell = |source: &&str| json!({ "cell_type": "code", "metadata": {}, "source": source, "outputs": [stored] });
    let cells: Vec<Value> = cells.iter().map(cell).collect();
    let path = folder.join("own.ipynb");
    std::fs::write(&path, json!({ "nbformat": 4, "metadata": {}, "cells": cells }).to_string()).expect("written");
    path
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("a notebook")
}

#[test]
fn a_run_that_comes_to_nothing_leaves_the_notebook() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = notebook(folder.path(), &["1", "2"]);
    let before = read(&path);
    let output = qlora_nb().arg("run").arg(&path).env("TMPDIR", "/nowhere").output().expect("qlora-nb starts");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("not written"), "{}", text(&output));
    assert_eq!(read(&path), before);
}

#[test]
fn what_was_saved_meanwhile_stays() {
    let folder = tempfile::tempdir().expect("a folder");
    let edit = "let text = std::fs::read_to_string(\"own.ipynb\")?;\n\
                std::fs::write(\"own.ipynb\", text.replace(\"1 + 1\", \"2 + 2\"))?;";
    let path = notebook(folder.path(), &[edit, "1 + 1"]);
    refuses(qlora_nb().arg("run").arg(&path), "was changed while it ran");
    assert!(read(&path).contains("2 + 2") && read(&path).contains("stored"));
    let beside = folder.path().join("own.executed.ipynb");
    assert!(read(&beside).contains("1 + 1") && !read(&beside).contains("stored"));
}

#[test]
fn a_link_to_a_notebook_stays_a_link() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = notebook(folder.path(), &["1 + 41"]);
    let link = folder.path().join("link.ipynb");
    std::os::unix::fs::symlink(&path, &link).expect("linked");
    let output = qlora_nb().arg("run").arg(&link).output().expect("qlora-nb starts");
    assert!(output.status.success(), "{}", text(&output));
    assert!(link.is_symlink() && read(&path).contains("42"), "{}", read(&path));
}

#[test]
fn a_cell_that_quits_fails() {
    let run = Run::cells(&["1", ":quit", "2"]);
    assert!(!run.success && run.said.contains("restart or shut down"), "{}", run.said);
}

/// `qlora-nb run | head`, `qlora-nb doctor | head -1`, and `> /dev/full`.
#[test]
fn nobody_need_read_what_it_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = notebook(folder.path(), &["1 + 41"]);
    for full in [false, true] {
        for args in [vec!["run", path.to_str().expect("UTF-8")], vec!["doctor"], vec!["--help"]] {
            let mut command = qlora_nb();
            command.args(&args).stderr(Stdio::piped()).stdout(Stdio::piped());
            if full {
                command.stdout(std::fs::File::options().write(true).open("/dev/full").expect("/dev/full"));
            }
            let mut process = command.spawn().expect("qlora-nb starts");
            drop(process.stdout.take());
            let output = process.wait_with_output().expect("it ends");
            assert!(output.status.success() && !text(&output).contains("panicked"), "{args:?}: {}", text(&output));
        }
        assert!(read(&path).contains("42"));
    }
}

#[test]
fn hidden_folders_are_nobodys_notebooks() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join(".trash")).expect("made");
    notebook(&folder.path().join(".trash"), &["1"]);
    refuses(qlora_nb().arg("run").arg(folder.path()), "there is no notebook");
}

/// Starts a run whose first cell waits, and returns it with the id of the process of its cells.
fn waiting(path: &Path) -> (Child, i32) {
    let mut run = qlora_nb();
    run.arg("run").arg(path).stdout(Stdio::piped()).stderr(Stdio::piped());
    let temporary = path.with_file_name("tmp");
    std::fs::create_dir_all(&temporary).expect("made");
    run.env("TMPDIR", temporary);
    let run = run.spawn().expect("qlora-nb starts");
    let said = path.with_file_name("id");
    let id = loop {
        match std::fs::read_to_string(&said).map(|text| text.parse()) {
            Ok(Ok(id)) => break id,
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    (run, id)
}

const WAITS: &str = "std::fs::write(\"id\", std::process::id().to_string())?;\n\
                     println!(\"begun\");\nlet _ = std::process::Command::new(\"sleep\").arg(\"7804\").status()?;";

#[test]
fn an_interrupt_of_the_run_alone_ends_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = notebook(folder.path(), &[WAITS, "1 + 1"]);
    let (run, _) = waiting(&path);
    // What the cell starts, it starts behind its first line.
    std::thread::sleep(Duration::from_millis(300));
    kill(Pid::from_raw(run.id() as i32), Signal::SIGINT).expect("sent");
    let output = run.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("asked to stop") && text(&output).contains("Interrupted"), "{}", text(&output));
    assert!(read(&path).contains("begun"), "{}", read(&path));
}

#[test]
fn the_end_of_the_run_is_the_end_of_its_cells() {
    let folder = tempfile::tempdir().expect("a folder");
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let path = notebook(folder.path(), &[WAITS]);
        let before = read(&path);
        let (mut run, cells) = waiting(&path);
        kill(Pid::from_raw(run.id() as i32), signal).expect("sent");
        assert!(!run.wait().expect("it ends").success());
        // And with them goes what the session left in /tmp.
        let is_left =
            || std::fs::read_dir(path.with_file_name("tmp")).is_ok_and(|mut entries| entries.next().is_some());
        let is_gone = || kill(Pid::from_raw(cells), None).is_err() && !is_left();
        for _ in 0..500 {
            if is_gone() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(is_gone(), "{cells} lives on");
        assert_eq!(read(&path) == before, signal == Signal::SIGKILL);
        std::fs::remove_file(path.with_file_name("id")).expect("removed");
    }
}
