//! The session in a terminal. Its editing needs one, so here lines come through a pipe.

use std::io::Write;
use std::process::Stdio;

use crate::{qlora_nb, text};

#[test]
fn cells_go_on_over_lines_and_failures_cost_no_variable() {
    let home = tempfile::tempdir().expect("a folder");
    let mut command = qlora_nb();
    // The history of whoever runs the tests stays as it is.
    command.arg("repl").env("XDG_DATA_HOME", home.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut repl = command.spawn().expect("qlora-nb starts");
    let lines = "let a = 2;\nfn twice(n: i32) -> i32 {\n    n * 2\n}\ntwice(a)\npanic!(\"on purpose\")\n\
                 println!(\"still {a}\");\n:quit\nprintln!(\"not reached\");\n";
    repl.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("written");
    let output = repl.wait_with_output().expect("it ends");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for expected in ["\n4\n", "panicked at", "on purpose", "still 2\n"] {
        assert!(said.contains(expected), "{said} does not contain {expected:?}");
    }
    assert!(!said.contains("not reached"), "{said}");
}
