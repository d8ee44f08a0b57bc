//! What reads files and messages of others, on damaged ones: it takes them or refuses them with an error, and nothing
//! else. The library's readers are tested so in `tests/fuzz`, which has the parts that are shared.

#[path = "../../../tests/fuzz/harness.rs"]
mod harness;
#[path = "../../../tests/fuzz/mutate.rs"]
mod mutate;

use jupyter_protocol::messaging::CompleteRequest;
use jupyter_zmq_client::Connection;
use serde_json::{Value, json};
use zeromq::{RouterSocket, Socket};

use self::harness::{Files, Input, MEMORY, Reader, Test, Verdict, fuzz};
use crate::assistance::Assistance;
use crate::check::Terms;
use crate::history::{self, History};
use crate::messages;
use crate::notebook::Notebook;
use crate::syntax;

fn told<T>(result: anyhow::Result<T>) -> Result<T, String> {
    // Who reads a message of a notebook or a client has no other remedy than its text.
    result.map_err(|e| format!("{e:#}; remedy: "))
}

fn file(name: &str, json: &Value) -> (String, Vec<u8>) {
    (name.into(), format!("{json:#}").into_bytes())
}

fn notebooks() -> Vec<Files> {
    let cell = |kind: &str, source: Value, more: Value| {
        let mut cell = json!({ "cell_type": kind, "id": "a", "metadata": {}, "source": source });
        more.as_object().into_iter().flatten().for_each(|(key, value)| cell[key] = value.clone());
        cell
    };
    let outputs = json!([
        { "output_type": "stream", "name": "stdout", "text": ["1 诗\n", "2"] },
        { "output_type": "execute_result", "execution_count": 1, "metadata": {},
          "data": { "text/plain": ["1.5"], "text/html": "<b>1.5</b>" } },
        { "output_type": "error", "ename": "E", "evalue": "e", "traceback": ["\u{1b}[31me\u{1b}[0m"] },
        { "output_type": "display_data", "data": { "image/png": "aGk=" }, "metadata": { "a": 1 } },
    ]);
    let terms =
        json!({ "qlora-nb": { "tolerance": 0.1, "mask": ["\\d+ s"], "timeout": 5 }, "tags": ["raises-exception"] });
    let tests = json!({ "outputs": outputs, "execution_count": 1, "metadata": terms });
    let one = json!({
        "nbformat": 4, "nbformat_minor": 5,
        "metadata": { "kernelspec": { "name": "qlora-nb", "language": "rust" }, "language_info": { "name": "rust" } },
        "cells": [
            cell("markdown", json!("# a"), json!({})),
            cell("code", json!(["let a = 1;\n", "a"]), tests),
            cell("code", json!("b"), json!({ "outputs": [], "metadata": { "tags": ["skip", "nondeterministic"] } })),
        ],
    });
    let old =
        json!({ "nbformat": 4, "nbformat_minor": 2, "metadata": {}, "cells": [cell("code", json!("1"), json!({}))] });
    vec![vec![file("a.ipynb", &one)], vec![file("a.ipynb", &old)]]
}

fn read_notebook(input: &Input) -> Verdict {
    let path = input.folder().join("a.ipynb");
    let mut notebook = told(Notebook::read(&path))?;
    for cell in notebook.code_cells() {
        syntax::is_complete(&notebook.source(cell));
        let _ = (notebook.must_fail(cell), notebook.is_skipped(cell));
        let terms = told(Terms::of(&notebook, cell))?;
        let outputs = notebook.outputs(cell).to_vec();
        crate::check::difference(&outputs, &outputs, &terms);
        notebook.set_outputs(cell, 1, outputs);
        notebook.set_count(cell, 2);
        notebook.set_source(cell, "x\ny");
    }
    notebook.clear_outputs();
    told(notebook.write(&path.with_file_name("out.txt")))
}

const REQUESTS: [(&str, &str); 8] = [
    (
        "execute_request",
        r#"{"code": "1", "silent": false, "store_history": true, "user_expressions": {"a": "1"},
        "allow_stdin": true, "stop_on_error": true}"#,
    ),
    ("complete_request", r#"{"code": "let 诗 = vec![1];\n诗.le", "cursor_pos": 22}"#),
    ("inspect_request", r#"{"code": "Vec::new()", "cursor_pos": 7, "detail_level": 0}"#),
    ("is_complete_request", r#"{"code": "fn f() {"}"#),
    (
        "history_request",
        r#"{"output": true, "raw": true, "hist_access_type": "range", "session": 0, "start": 0, "stop": 5}"#,
    ),
    (
        "history_request",
        r#"{"output": false, "raw": true, "hist_access_type": "search", "n": 3, "pattern": "*l?t*",
        "unique": true}"#,
    ),
    ("history_request", r#"{"output": false, "raw": true, "hist_access_type": "tail", "n": 3}"#),
    ("comm_open", r#"{"comm_id": "x", "target_name": "t", "data": {}}"#),
];

/// A frame a file; the delimiter and the signature, which is empty, are put between.
fn requests() -> Vec<Files> {
    let frames = |(kind, content): &(&str, &str)| {
        let header = json!({ "msg_id": "1", "session": "s", "username": "u", "date": "2024-01-31T10:00:00.123456Z",
            "msg_type": kind, "version": "5.3" });
        vec![
            file("1.json", &header),
            ("2.json".into(), b"{}".to_vec()),
            ("3.json".into(), br#"{"a": [1, {"b": null}]}"#.to_vec()),
            ("4.json".into(), content.as_bytes().to_vec()),
            ("5.bin".into(), vec![0, 255]),
        ]
    };
    REQUESTS.iter().map(frames).collect()
}

fn message_reader() -> Reader {
    let connection = Connection::new(RouterSocket::new(), "", "s");
    let assistance = Assistance { api: Default::default() };
    let mut history = History::default();
    for (line, code) in [(1, "let a = 1;"), (2, "诗"), (3, "let b = 2;")] {
        history.add(line, code, "");
    }
    Box::new(move |input: &Input| {
        let mut parts = zeromq::ZmqMessage::from("client");
        let frames = input.files.iter().map(|(_, bytes)| bytes.clone());
        for frame in [b"<IDS|MSG>".to_vec(), Vec::new()].into_iter().chain(frames) {
            parts.push_back(frame.into());
        }
        let request = told(messages::received(parts, &connection))?;
        messages::reply_to(&request, json!({}));
        match request.header.msg_type.as_str() {
            "is_complete_request" => {
                let asked: Value = told(messages::parsed(&request))?;
                syntax::is_complete(asked["code"].as_str().unwrap_or_default());
            }
            "complete_request" | "inspect_request" => {
                let CompleteRequest { code, cursor_pos } = told(messages::parsed(&request))?;
                let names = Default::default();
                assistance.complete(&code, cursor_pos, &names, &|_| None);
                assistance.inspect(&code, cursor_pos, &names, &|_| None);
            }
            "history_request" => {
                let asked: history::Request = told(messages::parsed(&request))?;
                history.answer(&asked);
            }
            "execute_request" => drop(told(messages::parsed::<crate::executor::ExecuteRequest>(&request))?),
            _ => {}
        }
        Ok(())
    })
}

fn connections() -> Vec<Files> {
    let tcp = json!({ "ip": "127.0.0.1", "transport": "tcp", "shell_port": 1, "iopub_port": 2, "stdin_port": 3,
        "control_port": 4, "hb_port": 5, "key": "secret", "signature_scheme": "hmac-sha256", "kernel_name": "qlora-nb" });
    let mut ipc = tcp.clone();
    (ipc["transport"], ipc["ip"]) = (json!("ipc"), json!("/tmp/kernel"));
    vec![vec![file("kernel.json", &tcp)], vec![file("kernel.json", &ipc)]]
}

fn read_connection(input: &Input) -> Verdict {
    let info = told(messages::read_connection_file(&input.folder().join("kernel.json")))?;
    let _ = (info.shell_url(), info.iopub_url(), info.hb_url(), info.control_url(), info.stdin_url());
    Ok(())
}

fn test(name: &'static str, make: fn() -> (Vec<Files>, Reader)) {
    fuzz(&Test { module: module_path!(), name, short: 1000, memory: MEMORY, make });
}

#[test]
fn ipynb() {
    test("ipynb", || (notebooks(), Box::new(read_notebook)));
}

#[test]
fn message() {
    test("message", || (requests(), message_reader()));
}

#[test]
fn connection() {
    test("connection", || (connections(), Box::new(read_connection)));
}
