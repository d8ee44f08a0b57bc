//! Whether a cell showed what its notebook promises.
//!
//! A promise is a cell's stored outputs, under the terms that the cell declares:
//!
//! | where | what | means |
//! |---|---|---|
//! | tag | `skip`, `skip-execution` | not executed; what is stored stays (the second name is nbclient's) |
//! | tag | `nondeterministic` | executed, must succeed, outputs are not compared |
//! | tag | `raises-exception` | must fail, with the stored error's name and message |
//! | cell metadata | `"qlora_nb": {"tolerance": 1e-3}` | numbers may differ by 1e-3 of the larger of them and 1 |
//! | cell metadata | `"qlora_nb": {"mask": ["regex", ...]}` | what matches is not compared |
//! | output metadata | `"qlora_nb": {"volatile": true}` | an output that legitimately differs; the library marks times so |
//!
//! Compared are: all text on stdout, all text on stderr (the two pipes have no common order), each rich output by MIME
//! type, and the error. Not compared are execution counts, tracebacks, and whether text ends in a newline.

use std::sync::LazyLock;

use anyhow::{Context, Result, bail};
use regex::Regex;
use serde_json::Value;

use crate::diff;
use crate::notebook::Notebook;

/// Our key in the metadata of notebooks, cells and outputs.
const OURS: &str = "qlora_nb";
const MASKED: &str = "<masked>";

#[derive(Debug, Default)]
pub struct Terms {
    pub nondeterministic: bool,
    tolerance: Option<f64>,
    masks: Vec<Regex>,
}

impl Terms {
    pub fn of(notebook: &Notebook, cell: usize) -> Result<Terms> {
        let mut terms = Terms { nondeterministic: notebook.has_tag(cell, "nondeterministic"), ..Default::default() };
        for (key, value) in ours(notebook.cell_metadata(cell))? {
            match key.as_str() {
                "tolerance" => {
                    let number = value.as_f64().filter(|number| *number >= 0.0);
                    let what =
                        || format!("metadata {OURS}.tolerance: expected a number that is not negative, got {value}");
                    terms.tolerance = Some(number.with_context(what)?);
                }
                "mask" => {
                    let what = || format!("metadata {OURS}.mask: expected a list of regular expressions, got {value}");
                    for mask in value.as_array().with_context(what)? {
                        terms.masks.push(regex(mask.as_str().with_context(what)?)?);
                    }
                }
                _ => bail!("metadata {OURS}.{key} is unknown: expected tolerance or mask"),
            }
        }
        Ok(terms)
    }
}

/// How much memory a notebook says that it needs: metadata `"qlora_nb": {"memory_mib": 4096}`.
pub fn memory_mib(notebook: &Notebook) -> Result<Option<u64>> {
    let mut memory = None;
    for (key, value) in ours(notebook.metadata())? {
        let number = value.as_u64().filter(|number| *number > 0);
        match (key.as_str(), number) {
            ("memory_mib", Some(number)) => memory = Some(number),
            ("memory_mib", None) => bail!("metadata {OURS}.memory_mib: expected a positive integer, got {value}"),
            _ => bail!("metadata {OURS}.{key} of the notebook is unknown: expected memory_mib"),
        }
    }
    Ok(memory)
}

fn ours(metadata: &Value) -> Result<impl Iterator<Item = (&String, &Value)>> {
    let ours = &metadata[OURS];
    if !ours.is_object() && !ours.is_null() {
        bail!("metadata {OURS}: expected an object, got {ours}");
    }
    Ok(ours.as_object().into_iter().flatten())
}

fn regex(text: &str) -> Result<Regex> {
    let regex = Regex::new(text)
        .map_err(|error| anyhow::anyhow!("metadata {OURS}.mask: {text:?} is no regular expression\n{error}"))?;
    // It would put a mask between any two letters.
    if regex.is_match("") {
        bail!("metadata {OURS}.mask: {text:?} matches the empty text\nremedy: + in place of *");
    }
    Ok(regex)
}

/// How what a cell showed differs from what is stored, for people; empty if the promise is kept.
pub fn difference(stored: &[Value], now: &[Value], terms: &Terms) -> Vec<String> {
    if terms.nondeterministic {
        return Vec::new();
    }
    let (stored, now) = (Part::all(stored), Part::all(now));
    let mut shown = Vec::new();
    let gone = stored.iter().filter(|part| now.iter().all(|other| other.what != part.what));
    for part in now.iter().chain(gone) {
        let of = |parts: &[Part]| parts.iter().find(|other| other.what == part.what).map(|other| other.masked(terms));
        let (old, new) = (of(&stored), of(&now));
        let in_both = old.is_some() && new.is_some();
        let (was, is) = (old.unwrap_or_default(), new.unwrap_or_default());
        let (old, new): (Vec<_>, Vec<_>) = (was.lines().collect(), is.lines().collect());
        let mut lines = diff::lines(&old, &new, &|a, b| a == b || terms.tolerance.is_some_and(|t| close(a, b, t)));
        if lines.is_empty() && in_both {
            continue;
        }
        if lines.is_empty() {
            lines.push(if of(&now).is_some() { "+(empty)" } else { "-(empty)" }.to_owned());
        }
        if part.is_binary {
            let sign =
                |sign, text: Option<&&str>| text.map(|text| format!("{sign}{} characters of base64", text.len()));
            lines = sign('-', old.first()).into_iter().chain(sign('+', new.first())).collect();
        }
        shown.push(format!("@@ {}", part.what));
        shown.extend(lines);
    }
    shown
}

/// One text among a cell's outputs.
struct Part {
    /// By which the same one is found on the other side.
    what: String,
    text: String,
    is_binary: bool,
}

impl Part {
    fn all(outputs: &[Value]) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut displays = 0;
        for output in outputs.iter().filter(|output| output["metadata"][OURS]["volatile"] != true) {
            match output["output_type"].as_str().unwrap_or_default() {
                "stream" => {
                    let (what, more) = (output["name"].as_str().unwrap_or("stdout"), text(&output["text"]));
                    match parts.iter_mut().find(|part| part.what == what) {
                        Some(part) => part.text.push_str(&more),
                        None if more.is_empty() => {}
                        None => parts.push(Part { what: what.to_owned(), text: more, is_binary: false }),
                    }
                }
                "error" => {
                    let text = format!("{}: {}", text(&output["ename"]), text(&output["evalue"]));
                    parts.push(Part { what: "error".to_owned(), text, is_binary: false });
                }
                _ => {
                    displays += 1;
                    for (mime, data) in output["data"].as_object().into_iter().flatten() {
                        let what = format!("output {displays}, {mime}");
                        parts.push(Part { what, text: text(data), is_binary: !is_text(mime) });
                    }
                }
            }
        }
        parts
    }

    fn masked(&self, terms: &Terms) -> String {
        let masks = terms.masks.iter().filter(|_| !self.is_binary);
        masks.fold(self.text.clone(), |text, mask| mask.replace_all(&text, MASKED).into_owned())
    }
}

/// Text as nbformat stores it: a string, or a list of lines. JSON is laid out, so that its lines can be compared.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(lines) if lines.iter().all(Value::is_string) => lines.iter().filter_map(Value::as_str).collect(),
        Value::Null => String::new(),
        json => serde_json::to_string_pretty(json).unwrap_or_default(),
    }
}

fn is_text(mime: &str) -> bool {
    let xml_or_json = mime.ends_with("+xml") || mime.ends_with("json") || mime == "application/xml";
    mime.starts_with("text/") || xml_or_json || mime == "application/javascript"
}

/// Whether the numbers in two lines are close, and what stands between them is equal. White space beside a number may
/// differ, for columns are aligned by it.
fn close(a: &str, b: &str, tolerance: f64) -> bool {
    let (a, b) = (numbers(a), numbers(b));
    let is_near = |x: f64, y: f64| (x - y).is_finite() && (x - y).abs() <= tolerance * x.abs().max(y.abs()).max(1.0);
    let is_close = |(a, b): (&Piece, &Piece)| {
        let (x, y) = (a.number, b.number);
        a.before == b.before && (x == y || is_near(x, y))
    };
    a.0.len() == b.0.len() && a.1 == b.1 && a.0.iter().zip(&b.0).all(is_close)
}

struct Piece<'a> {
    before: &'a str,
    number: f64,
}

/// A line as numbers, each with the text before it, and the text after the last.
fn numbers(line: &str) -> (Vec<Piece<'_>>, &str) {
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?|[+-]?\.[0-9]+").expect("a constant"));
    let mut pieces = Vec::new();
    let mut end = 0;
    for found in NUMBER.find_iter(line) {
        let mut begin = found.start();
        // In `3-4` and `(a)-4` it is no sign.
        let operand = |c: char| c.is_alphanumeric() || matches!(c, ')' | ']' | '_' | '.');
        if line[..begin].ends_with(operand) && found.as_str().starts_with(['+', '-']) {
            begin += 1;
        }
        let Ok(number) = line[begin..found.end()].parse() else { continue };
        pieces.push(Piece { before: line[end..begin].trim(), number });
        end = found.end();
    }
    (pieces, line[end..].trim())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn terms(ours: Value) -> Result<Terms> {
        let cell = json!({ "cell_type": "code", "source": "1", "metadata": { "qlora_nb": ours } });
        Terms::of(&Notebook::from_json(json!({ "nbformat": 4, "cells": [cell] }), "a.ipynb")?, 0)
    }

    fn out(text: &str) -> Value {
        json!({ "output_type": "stream", "name": "stdout", "text": text })
    }

    fn show(data: Value) -> Value {
        json!({ "output_type": "display_data", "data": data, "metadata": {} })
    }

    fn error(name: &str, message: &str, traceback: &str) -> Value {
        json!({ "output_type": "error", "ename": name, "evalue": message, "traceback": [traceback] })
    }

    #[test]
    fn a_promise_is_kept_or_broken() -> Result<()> {
        let err = |text: &str| json!({ "output_type": "stream", "name": "stderr", "text": text });
        let result = |text: &str, count: u32| json!({ "output_type": "execute_result", "execution_count": count, "data": { "text/plain": [text] } });
        let volatile = |text: &str| {
            let metadata = json!({ "qlora_nb": { "volatile": true } });
            json!({ "output_type": "display_data", "data": { "text/plain": text }, "metadata": metadata })
        };
        let svg = |x: &str| show(json!({ "image/svg+xml": format!("<svg><path d=\"M{x},2L3,4\"/></svg>") }));
        let (none, tolerant) = (json!({}), json!({ "tolerance": 1e-3 }));
        let masked = json!({ "mask": ["in [0-9.]+ s", "0x[0-9a-f]+"] });
        #[rustfmt::skip]
        let table = [
            ("nothing",                  &none, vec![], vec![], true),
            ("a list of lines",          &none, vec![out("a\nb\n")], vec![json!({ "output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"] })], true),
            ("pieces of a stream",       &none, vec![out("a"), err("x"), out("b")], vec![err("x"), out("ab")], true),
            ("another text",             &none, vec![out("a\n")], vec![out("b\n")], false),
            ("an added line",            &none, vec![out("a\n")], vec![out("a\nb\n")], false),
            ("another stream",           &none, vec![out("a")], vec![err("a")], false),
            ("nothing any more",         &none, vec![out("a")], vec![], false),
            ("something new",            &none, vec![], vec![out("a")], false),
            ("an empty line, new",       &none, vec![], vec![out("\n")], false),
            ("a display, new and empty", &none, vec![], vec![show(json!({ "text/plain": "" }))], false),
            ("another count",            &none, vec![result("1", 3)], vec![result("1", 4)], true),
            ("another value",            &none, vec![result("1", 3)], vec![result("2", 3)], false),
            ("no HTML any more",         &none, vec![show(json!({ "text/html": "1", "text/plain": "1" }))], vec![show(json!({ "text/plain": "1" }))], false),
            ("another order of types",   &none, vec![show(json!({ "text/html": "1", "text/plain": "2" }))], vec![show(json!({ "text/plain": "2", "text/html": "1" }))], true),
            ("another order of outputs", &none, vec![result("1", 1), result("2", 1)], vec![result("2", 1), result("1", 1)], false),
            ("another picture",          &none, vec![show(json!({ "image/png": "AAAA" }))], vec![show(json!({ "image/png": "AAAB" }))], false),
            ("JSON, its keys in order",  &none, vec![show(json!({ "application/json": { "a": [1, 2] } }))], vec![show(json!({ "application/json": { "a": [1, 3] } }))], false),
            ("another traceback",        &none, vec![error("Panic", "no", "line 1")], vec![error("Panic", "no", "line 2")], true),
            ("another message",          &none, vec![error("Panic", "no", "")], vec![error("Panic", "yes", "")], false),
            ("another kind of error",    &none, vec![error("Panic", "no", "")], vec![error("Error", "no", "")], false),
            ("a close number",           &none, vec![out("loss 1.0001")], vec![out("loss 1.0002")], false),
            ("a close number",           &tolerant, vec![out("loss 1.0001 at 3")], vec![out("loss 1.0002 at 3")], true),
            ("a number too far",         &tolerant, vec![out("loss 1.0001")], vec![out("loss 1.0041")], false),
            ("large numbers",            &tolerant, vec![out("1000000")], vec![out("1000999")], true),
            ("large numbers too far",    &tolerant, vec![out("1000000")], vec![out("1002000")], false),
            ("a sign near 0",            &tolerant, vec![out("[-0.0001, 1e-5]")], vec![out("[0.0001, -1.1e-5]")], true),
            ("a sign far from 0",        &tolerant, vec![out("-2.5")], vec![out("2.5")], false),
            ("aligned columns",          &tolerant, vec![out("| 9.9999 |x")], vec![out("|10.0001 |x")], true),
            ("another word",             &tolerant, vec![out("loss 1.0")], vec![out("cost 1.0")], false),
            ("a unit",                   &tolerant, vec![out("1.0 s")], vec![out("1.0 ms")], false),
            ("one number more",          &tolerant, vec![out("1 2")], vec![out("1 2 3")], false),
            ("two numbers for one",      &tolerant, vec![out("12")], vec![out("1 2")], false),
            ("NaN",                      &tolerant, vec![out("loss 1.0")], vec![out("loss NaN")], false),
            ("a version",                &tolerant, vec![out("v1.2.3-4")], vec![out("v1.2.3-5")], false),
            ("a close number in SVG",    &tolerant, vec![svg("1.0001")], vec![svg("1.0002")], true),
            ("a number too far in SVG",  &tolerant, vec![svg("1.0001")], vec![svg("1.1")], false),
            ("an integer against 1e400", &tolerant, vec![out("1")], vec![out("1e400")], false),
            ("a masked text",            &masked, vec![out("done in 1.2 s at 0x7f")], vec![out("done in 3 s at 0xab")], true),
            ("a text that is not masked", &masked, vec![out("done in 1.2 s")], vec![out("gone in 1.2 s")], false),
            ("a mask that ends to match", &masked, vec![out("done in 1.2 s")], vec![out("done in 1.2 m")], false),
            ("a volatile output",        &none, vec![volatile("1 s"), out("a")], vec![out("a"), volatile("2 s")], true),
            ("a volatile output is gone", &none, vec![volatile("1 s"), out("a")], vec![out("a")], true),
        ];
        for (what, ours, stored, now, kept) in table {
            let lines = difference(&stored, &now, &terms(ours.clone())?);
            assert_eq!(lines.is_empty(), kept, "{what}: {ours}: {lines:#?}");
        }
        Ok(())
    }

    #[test]
    fn what_is_shown_of_a_difference() -> Result<()> {
        let none = terms(json!({}))?;
        let lines = difference(&[out("a\nb\n")], &[out("a\nc\n"), show(json!({ "text/plain": "1" }))], &none);
        assert_eq!(lines, ["@@ stdout", " a", "-b", "+c", "@@ output 1, text/plain", "+1"]);
        let picture = |data: &str| show(json!({ "image/png": data }));
        let lines = difference(&[picture(&"A".repeat(9000))], &[picture("B")], &none);
        assert_eq!(lines, ["@@ output 1, image/png", "-9000 characters of base64", "+1 characters of base64"]);
        // Numbers within the tolerance are no part of what is shown as changed.
        let lines = difference(&[out("1.0\nx\n")], &[out("1.0001\ny\n")], &terms(json!({ "tolerance": 0.01 }))?);
        assert_eq!(lines, ["@@ stdout", " 1.0001", "-x", "+y"]);
        Ok(())
    }

    #[test]
    fn terms_that_cannot_be_meant_are_refused() {
        for (ours, why) in [
            (json!({ "tolerence": 1 }), "qlora_nb.tolerence is unknown"),
            (json!({ "tolerance": "1e-3" }), "expected a number that is not negative, got \"1e-3\""),
            (json!({ "tolerance": -1 }), "not negative"),
            (json!({ "mask": "a+" }), "a list of regular expressions"),
            (json!({ "mask": [1] }), "a list of regular expressions"),
            (json!({ "mask": ["("] }), "\"(\" is no regular expression"),
            (json!({ "mask": ["[0-9]*"] }), "matches the empty text"),
            (json!([]), "expected an object"),
        ] {
            let error = terms(ours.clone()).err().map(|e| format!("{e:#}")).unwrap_or_default();
            assert!(error.contains(why), "{ours}: {error:?} does not say {why:?}");
        }
    }
}
