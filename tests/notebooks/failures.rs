//! Whatever goes wrong in a cell fails the run, names the cell and says why.

use crate::Run;

/// Runs a good cell, then `cell`, then one that must not be reached.
fn fails(cell: &str, name: &str, message: &str) -> Run {
    let run = Run::cells(&["let before = 1;", cell, "println!(\"reached\");"]);
    assert!(!run.success, "a cell that ends in {name} passed:\n{}", run.said);
    assert!(run.said.contains("cell 2 of"), "the cell is not named:\n{}", run.said);
    assert!(run.outputs(2).is_empty(), "the run went on after the failure:\n{}", run.said);
    let error = run.outputs(1).last().cloned().unwrap_or_default();
    assert_eq!(error["output_type"], "error");
    assert_eq!(error["ename"], name, "{error}");
    let said = format!("{} {}", error["evalue"], error["traceback"]);
    assert!(said.contains(message), "{said} does not say {message:?}");
    assert!(run.said.contains(message), "the terminal does not say {message:?}:\n{}", run.said);
    run
}

#[test]
fn a_panic() {
    let run = fails("println!(\"shown\");\npanic!(\"on purpose\");", "Panic", "on purpose");
    assert_eq!(run.stream(1, "stdout"), "shown\n");
    assert!(run.said.contains("line 2"), "the line is not named:\n{}", run.said);
}

#[test]
fn a_failed_assertion() {
    fails("assert_eq!(before, 2);", "Panic", "left == right");
}

#[test]
fn a_panic_after_text_without_a_newline() {
    let run = fails("print!(\"unfinished\");\npanic!(\"on purpose\");", "Panic", "on purpose");
    assert_eq!(run.stream(1, "stdout"), "unfinished");
}

#[test]
fn an_error_through_the_question_mark() {
    let run = fails("let text = std::fs::read_to_string(\"/nowhere\")?;", "Error", "No such file");
    assert_eq!(run.stream(1, "stderr"), "");
}

/// What a cell wrote on stderr itself is shown, and is no part of the error that ends it.
#[test]
fn an_error_after_a_note_on_stderr() {
    let cell = "let name = \"x\";\neprintln!(\"a note on {name}\");\neprintln!(\"{}\", name);\neprint!(\"and \");\n\
                std::fs::read_to_string(\"/nowhere\")?;";
    let run = fails(cell, "Error", "No such file");
    assert_eq!(run.stream(1, "stderr"), "a note on x\nx\nand ");
    let error = run.outputs(1).last().cloned().unwrap_or_default();
    assert!(error["evalue"].as_str().is_some_and(|said| said.starts_with("No such file")), "{error}");
    assert_eq!(error["traceback"].as_array().map(Vec::len), Some(1), "{error}");
}

#[test]
fn an_error_of_the_library() {
    fails("let ds = qlora_nb::prelude::Dataset::load_from_disk(\"nowhere\")?;", "Error", "nowhere");
}

#[test]
fn a_compile_error() {
    let run = fails("let x = 1;\nlet y: u32 = \"text\";", "CompileError", "expected `u32`, found `&str`");
    assert!(run.said.contains("2 | let y: u32 = \"text\";"), "{}", run.said);
}

#[test]
fn an_abort() {
    fails("std::process::abort();", "ProcessDied", "SIGABRT");
}

#[test]
fn an_exit_though_its_status_is_0() {
    fails("std::process::exit(0);", "ProcessDied", "exited with status 0");
}

#[test]
fn a_cell_without_end() {
    let run =
        Run::cells_with(&["loop { std::thread::sleep(std::time::Duration::from_secs(1)); }"], &["--timeout", "5"]);
    assert!(!run.success && run.said.contains("Timeout"), "{}", run.said);
}

#[test]
fn a_variable_that_has_no_type_name() {
    fails("let it = vec![1, 2].into_iter().map(|x| x + 1);", "CompileError", "`it` cannot be kept");
}
