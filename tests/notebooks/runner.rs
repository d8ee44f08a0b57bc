//! The runner itself: what it writes, and what it says of bad input.

use std::path::Path;
use std::process::Command;

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
    refuses(qlora_nb().arg("run").arg(&good).env("PATH", "/nowhere"), "cannot run rustc");
    refuses(bare().args(["run", "a.ipynb", "--timeout", "soon"]), "expected seconds, got \"soon\"");
    refuses(bare().args(["run", "a.ipynb", "--timeout", "1e300"]), "expected seconds, got \"1e300\"");
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
    assert!(text(&doctor()).contains("was moved"), "{}", text(&doctor()));
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
