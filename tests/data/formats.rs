//! JSON, JSONL, Parquet and CSV.

use std::{fs, path::PathBuf, sync::Arc};

use qlora_nb::prelude::*;
use qlora_nb_tests::*;

fn file(folder: &tempfile::TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

#[test]
fn alpaca_loads_from_json() {
    let Some(path) = shared("data/alpaca_zh_demo.json") else { return };
    let ds = Dataset::from_json(path).unwrap();
    assert_eq!(ds.num_rows(), 1000);
    assert_eq!(ds.column_names(), ["instruction", "input", "output"]);
    let with_input = ds.filter(|ex| Ok(!ex.text("input")?.is_empty())).unwrap();
    assert_eq!(with_input.num_rows(), 139);
    let longest = ds.iter().map(|ex| ex.text("output").unwrap().chars().count()).max();
    assert_eq!(longest, Some(1200));
}

#[test]
fn json_arrays_lines_and_nested_values() {
    let folder = tempfile::tempdir().unwrap();
    let rows = r#"{"text": "a", "n": 1, "x": 1.5, "ok": true, "none": null, "ids": [1, 2], "chat": [{"role": "user", "content": "嗨"}]}
{"text": "b\n", "n": 2, "x": 2, "ok": false, "none": null, "ids": [], "chat": []}"#;
    let lines = Dataset::from_json(file(&folder, "rows.jsonl", rows)).unwrap();
    let array = format!("\u{feff} [{}]", rows.replacen("}\n{", "},\n{", 1));
    let array = Dataset::from_json(file(&folder, "rows.json", array)).unwrap();
    assert_eq!(lines.slice(..).to_string(), array.slice(..).to_string());
    assert_eq!(
        lines.slice(..).to_string(),
        "{'text': ['a', 'b\\n'], 'n': [1, 2], 'x': [1.5, 2.0], 'ok': [True, False], 'none': [None, None], \
         'ids': [[1, 2], []], 'chat': [[{'role': 'user', 'content': '嗨'}], []]}"
    );
    assert_eq!(
        lines.features().to_string(),
        "{'text': Value('string'), 'n': Value('int64'), 'x': Value('float64'), 'ok': Value('bool'), \
         'none': Value('null'), 'ids': List(Value('int64')), \
         'chat': List({'role': Value('string'), 'content': Value('string')})}"
    );
    assert!(lines.get(1).unwrap().ints("ids").unwrap().is_empty());
    assert!(lines.get(0).unwrap().bool("ok").unwrap());
    assert!(lines.get(0).unwrap().is_null("none").unwrap());
    assert!(Dataset::from_json(file(&folder, "empty.json", "[]")).unwrap().is_empty());
}

#[test]
fn bad_json_is_named_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let load = |content: &str| {
        let error = Dataset::from_json(file(&folder, "rows.json", content)).unwrap_err();
        assert!(matches!(&error, Error::Malformed { path, .. } if path.ends_with("rows.json")), "{error}");
        error.to_string()
    };
    for (content, expected) in [
        ("", "the file is empty"),
        (" \n ", "the file is empty"),
        ("[{\"a\": 1}, {\"b\": 1}]", "row 1 has no key \"a\""),
        ("{\"a\": 1}\n{\"a\": 1, \"b\": 1}", "row 1 has a key \"b\""),
        ("[{\"a\": 1}, {\"a\": \"x\"}]", "row 1, key \"a\": string where the rows above have int64"),
        ("{\"a\": [1]}\n{\"a\": [true]}", "row 1, key \"a\": bool where the rows above have int64"),
        ("[{\"a\": 1}, {\"a\": 1]", "line 1 column 19"),
        ("{\"a\": 1}\n{\"a\": ", "row 1: EOF"),
        ("[1, 2]", "expected a map"),
        ("{\"a\": 1}\n7", "row 1: "),
        ("nonsense", "row 0: "),
    ] {
        let error = load(content);
        assert!(error.contains(expected), "{content:?}: {error}");
    }
    let error = Dataset::from_json(folder.path().join("none.json")).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[test]
fn csv_with_quotes_numbers_and_gaps() {
    let folder = tempfile::tempdir().unwrap();
    let text = "instruction,n,x,ok,when\n\"a, \"\"b\"\"\n二\",1,1.5,true,2024-01-02\nc,2,,false,\n";
    let ds = Dataset::from_csv(file(&folder, "rows.csv", text)).unwrap();
    assert_eq!(
        ds.slice(..).to_string(),
        "{'instruction': ['a, \"b\"\\n二', 'c'], 'n': [1, 2], 'x': [1.5, None], 'ok': [True, False], \
         'when': ['2024-01-02', None]}"
    );
    for (content, expected) in [("", "no header"), ("a,b\n1,2\n1\n", "line 3")] {
        let error = Dataset::from_csv(file(&folder, "bad.csv", content)).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }) && error.to_string().contains(expected), "{error}");
    }
    assert!(Dataset::from_csv(file(&folder, "header.csv", "a,b\n")).unwrap().is_empty());
}

/// A Parquet file with the columns `text` and `n`, made by the parquet crate.
fn parquet_file(folder: &tempfile::TempDir) -> PathBuf {
    use arrow_array::{ArrayRef, Int32Array, RecordBatch, StringViewArray};
    let text: ArrayRef =
        Arc::new(StringViewArray::from_iter_values((0..2500).map(|i| format!("第{i}行 of the table"))));
    let n: ArrayRef = Arc::new(Int32Array::from_iter_values(0..2500));
    let batch = RecordBatch::try_from_iter([("text", text), ("n", n)]).unwrap();
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    file(folder, "rows.parquet", bytes)
}

#[test]
fn parquet_loads_and_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = parquet_file(&folder);
    let ds = Dataset::from_parquet(&path).unwrap();
    assert_eq!(ds.num_rows(), 2500);
    assert_eq!(ds.get(2499).unwrap().text("text").unwrap(), "第2499行 of the table");
    assert_eq!(ds.get(1234).unwrap().int("n").unwrap(), 1234);
    assert_eq!(ds.features().to_string(), "{'text': Value('large_string'), 'n': Value('int32')}");
    let whole = fs::read(&path).unwrap();
    for bad in [&whole[..0], &whole[..10], &whole[..whole.len() - 1], &whole[1..], b"PAR1"] {
        let error = Dataset::from_parquet(file(&folder, "bad.parquet", bad)).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
}

#[test]
fn damaged_parquet_never_ends_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(parquet_file(&folder)).unwrap();
    let (mut refused, step) = (0, whole.len() / 400);
    for byte in (0..whole.len()).step_by(step.max(1)) {
        let mut bad = whole.clone();
        bad[byte] ^= 1 << (byte % 8);
        match Dataset::from_parquet(file(&folder, "bad.parquet", &bad)) {
            Ok(ds) => assert!(ds.iter().all(|ex| ex.fields().len() == ds.column_names().len())),
            Err(Error::Malformed { .. }) => refused += 1,
            Err(other) => panic!("byte {byte}: {other}"),
        }
    }
    assert!(refused > 0);
}

#[test]
fn rows_and_columns_in_memory() {
    let ds = Dataset::from_rows([
        Example::new().with("text", "a").with("ids", vec![1u32, 2]),
        Example::new().with("ids", Vec::<i64>::new()).with("text", Value::Null),
    ])
    .unwrap();
    assert_eq!(ds.slice(..).to_string(), "{'text': ['a', None], 'ids': [[1, 2], []]}");
    assert!(Dataset::from_rows([]).unwrap().is_empty());
    let error = Dataset::from_columns([("a", vec![1i64, 2]), ("b", vec![1])]).unwrap_err();
    assert!(error.to_string().contains("2 values, as many as \"a\" has"), "{error}");
    assert!(Dataset::from_columns([("a", vec![1i64]), ("a", vec![1])]).is_err());
    let mixed = Dataset::from_columns([("a", vec![Value::from(1i64), Value::from("x")])]).unwrap_err();
    assert!(matches!(mixed, Error::Row { row: 1, .. }), "{mixed}");
    let different =
        Dataset::from_rows([Example::new().with("a", 1i64), Example::new().with("a", 1i64).with("b", 2i64)]);
    assert!(matches!(different.unwrap_err(), Error::Row { row: 1, .. }));
}
