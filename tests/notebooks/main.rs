//! What a notebook's user is promised, each promise through the real runner: rustc, evcxr, the library's dylib.

mod checks;
mod failures;
mod install;
mod languages;
mod parameters;
mod repl;
mod runner;
mod variables;
mod walkthrough;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

/// The runner, and where the library is laid out for it. `QLORA_NB_PREFIX` names a layout that is there already;
/// without it the first test installs one, and the others wait for it.
pub fn qlora_nb() -> Command {
    let exe = env!("CARGO_BIN_EXE_qlora-nb");
    let prefix = std::env::var_os("QLORA_NB_PREFIX").map(PathBuf::from).unwrap_or_else(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let lock = std::fs::File::create(folder.join("install.lock")).expect("a lock file");
        lock.lock().expect("the lock");
        let prefix = folder.join("notebooks");
        let install =
            Command::new(exe).arg("install").env("QLORA_NB_PREFIX", &prefix).output().expect("qlora-nb starts");
        assert!(install.status.success(), "{}", text(&install));
        prefix
    });
    let mut command = Command::new(exe);
    command.env("QLORA_NB_PREFIX", prefix);
    command
}

/// All that a command printed.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A notebook that was run, and what the runner said.
pub struct Run {
    pub success: bool,
    pub said: String,
    pub notebook: Value,
}

impl Run {
    pub fn of(notebook: &Path, options: &[&str]) -> Run {
        let folder = tempfile::tempdir().expect("a folder");
        let executed = folder.path().join("executed.ipynb");
        let mut command = qlora_nb();
        let output = command.arg("run").arg(notebook).arg("-o").arg(&executed).args(options).output();
        let output = output.expect("qlora-nb starts");
        let written = std::fs::read_to_string(&executed).unwrap_or_else(|_| panic!("no notebook: {}", text(&output)));
        let notebook = serde_json::from_str(&written).expect("JSON");
        Run { success: output.status.success(), said: text(&output), notebook }
    }

    /// Runs cells in a notebook of their own.
    pub fn cells(cells: &[&str]) -> Run {
        Run::cells_with(cells, &[])
    }

    pub fn cells_with(cells: &[&str], options: &[&str]) -> Run {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cells.ipynb");
        let cell = |source: &&str| json!({ "cell_type": "code", "metadata": {}, "source": source, "outputs": [] });
        let cells: Vec<Value> = cells.iter().map(cell).collect();
        std::fs::write(&path, json!({ "nbformat": 4, "metadata": {}, "cells": cells }).to_string()).expect("written");
        Run::of(&path, options)
    }

    pub fn assert_success(&self) {
        assert!(self.success, "{}", self.said);
    }

    /// The outputs of a cell, the first of which is 0.
    pub fn outputs(&self, cell: usize) -> &[Value] {
        self.notebook["cells"][cell]["outputs"].as_array().map_or(&[], Vec::as_slice)
    }

    /// The text of a cell's streams.
    pub fn stream(&self, cell: usize, name: &str) -> String {
        let streams = self.outputs(cell).iter().filter(|output| output["name"] == name);
        let lines = streams.flat_map(|output| output["text"].as_array().into_iter().flatten());
        lines.filter_map(Value::as_str).collect()
    }
}

/// Runs the command and expects status 2 and a message, at once.
pub fn refuses(command: &mut Command, message: &str) {
    let output = command.output().expect("qlora-nb starts");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains(message), "{} does not say {message:?}", text(&output));
}

/// A notebook that is kept beside this file.
pub fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/notebooks").join(name)
}
