//! Folders that Python's `datasets` wrote, and what a dataset does with its rows.

use qlora_nb::prelude::*;
use qlora_nb_tests::*;

fn json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn rows(ds: &Dataset) -> Vec<Value> {
    ds.iter().map(|ex| Value::Struct(ex.fields())).collect()
}

fn expected(split: &str) -> Vec<Value> {
    json("alpaca_expected.json")[split].as_array().unwrap().iter().cloned().map(Value::from).collect()
}

#[test]
fn a_dataset_dict_of_python_loads() {
    let dict = DatasetDict::load_from_disk(fixture("alpaca_tiny")).unwrap();
    assert_eq!(dict.splits(), ["train", "test"]);
    for (split, dataset) in dict.iter() {
        assert_eq!(rows(dataset), expected(split));
    }
    assert_eq!(
        dict.get("train").unwrap().features().to_string(),
        "{'instruction': Value('string'), 'input': Value('string'), 'output': Value('string'), \
         'input_ids': List(Value('int64')), 'score': Value('int64')}"
    );
    let features = "['instruction', 'input', 'output', 'input_ids', 'score']";
    assert_eq!(
        dict.to_string(),
        format!(
            "DatasetDict({{\n    train: Dataset({{\n        features: {features},\n        num_rows: 6\n    }})\n    \
             test: Dataset({{\n        features: {features},\n        num_rows: 6\n    }})\n}})"
        )
    );
    let error = dict.get("tran").unwrap_err().to_string();
    assert!(error.contains("did you mean \"train\"?"), "{error}");
}

#[test]
fn shards_are_read_in_order() {
    assert_eq!(rows(&Dataset::load_from_disk(fixture("alpaca_shards")).unwrap()), expected("train"));
}

#[test]
fn values_are_read_by_type() {
    let ds = Dataset::load_from_disk(fixture("alpaca_tiny/train")).unwrap();
    let row = ds.get(3).unwrap();
    assert_eq!(row.text("output").unwrap(), "天亮了，\n窗外有鸟叫。");
    assert_eq!(row.ints("input_ids").unwrap(), [1, 2, 3, 4, 5]);
    assert_eq!(row.int("score").unwrap(), 9007199254740993); // beyond what a double holds
    assert_eq!(row.float("score").unwrap(), 9007199254740992.0);
    assert!(ds.get(2).unwrap().ints("input_ids").unwrap().is_empty());
    assert_eq!(
        ds.get(1).unwrap().to_string(),
        "{'instruction': '把这句话译成英文。', 'input': '雨停了。', 'output': 'The rain has stopped.', \
         'input_ids': [7], 'score': 2}"
    );
}

#[test]
fn wrong_columns_types_and_rows_are_named() {
    let ds = Dataset::load_from_disk(fixture("alpaca_tiny/train")).unwrap();
    let row = ds.get(4).unwrap();
    let error = row.text("instructions").unwrap_err();
    assert!(matches!(&error, Error::MissingColumn { column, row: Some(4), .. } if column == "instructions"), "{error}");
    assert!(error.to_string().contains("\"instruction\""), "{error}");
    let error = row.text("score").unwrap_err();
    assert!(
        matches!(&error, Error::ColumnType { row: Some(4), expected, got, .. } if expected == "string" && got == "int64"),
        "{error}"
    );
    assert!(row.ints("output").unwrap_err().to_string().contains("a list of integers"));
    assert!(row.int("output").is_err() && row.float("output").is_err() && row.bool("score").is_err());
    let error = ds.get(6).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { len: 6, .. }), "{error}");
    assert!(ds.select(&[0, 6]).is_err());
    assert!(ds.column("nothing").is_err());
}

#[test]
fn a_missing_value_is_an_error_with_a_way_out() {
    let ds = Dataset::from_columns([("input", vec![Some("x"), None])]).unwrap();
    let row = ds.get(1).unwrap();
    let error = row.text("input").unwrap_err().to_string();
    assert!(error.contains("text_or(\"input\", \"\")"), "{error}");
    assert_eq!(row.text_or("input", "").unwrap(), "");
    assert_eq!(ds.get(0).unwrap().text_or("input", "").unwrap(), "x");
    assert!(row.text_or("output", "").is_err(), "a column that is not there is no missing value");
}

#[test]
fn rows_are_chosen_as_in_python() {
    let ds = Dataset::from_columns([("n", 0i64..10)]).unwrap();
    let numbers = |ds: &Dataset| ds.iter().map(|ex| ex.int("n").unwrap()).collect::<Vec<_>>();
    assert_eq!(numbers(&ds.slice(3..5)), [3, 4]);
    assert_eq!(numbers(&ds.slice(8..100)), [8, 9]);
    assert_eq!(numbers(&ds.slice(..)).len(), 10);
    assert_eq!(numbers(&ds.slice(7..=8)), [7, 8]);
    #[allow(clippy::reversed_empty_ranges)] // ds[5:3] in Python
    let backwards = ds.slice(5..3);
    assert!(backwards.is_empty() && ds.slice(20..30).is_empty());
    assert_eq!(numbers(&ds.head(2)), [0, 1]);
    assert_eq!(numbers(&ds.select(&[9, 0, 9]).unwrap()), [9, 0, 9]);
    let odd = ds.filter(|ex| Ok(ex.int("n")? % 2 == 1)).unwrap();
    assert_eq!(numbers(&odd), [1, 3, 5, 7, 9]);
    // Choosing from what was chosen.
    assert_eq!(numbers(&odd.select(&[4, 0]).unwrap().slice(..1)), [9]);
    assert_eq!(numbers(&ds), (0..10).collect::<Vec<_>>(), "the dataset itself is as it was");
}

#[test]
fn a_seed_gives_pythons_order() {
    for case in json("shuffle.json").as_array().unwrap() {
        let list = |name: &str| case[name].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<_>>();
        let ds = Dataset::from_columns([("n", 0..case["len"].as_i64().unwrap())]).unwrap();
        let numbers = |ds: &Dataset| ds.iter().map(|ex| ex.int("n").unwrap()).collect::<Vec<_>>();
        let seed = case["seed"].as_u64().unwrap();
        assert_eq!(numbers(&ds.shuffle(seed)), list("shuffle"));
        let split = ds.train_test_split(case["test_size"].as_f64().unwrap(), seed).unwrap();
        assert_eq!(numbers(&split.get("train").unwrap()), list("train"));
        assert_eq!(numbers(&split.get("test").unwrap()), list("test"));
    }
}

#[test]
fn a_split_leaves_rows_in_both_parts() {
    let ds = Dataset::from_columns([("n", 0i64..4)]).unwrap();
    for size in [0.0, 1.0, 4.0, -0.1, 0.99, f64::NAN, f64::INFINITY] {
        let error = ds.train_test_split(size, 42).unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument { name, .. } if name == "test_size"), "{size}: {error}");
    }
}

#[test]
fn columns_are_chosen_and_renamed() {
    let ds = Dataset::load_from_disk(fixture("alpaca_tiny/test")).unwrap().select(&[2, 0]).unwrap();
    let two = ds.select_columns(&["score", "output"]).unwrap();
    assert_eq!(two.slice(..).to_string(), "{'score': [2, 4], 'output': ['It is freezing.', '1 2 3 4']}");
    assert_eq!(ds.remove_columns(&["input_ids", "score", "input"]).unwrap().column_names(), ["instruction", "output"]);
    let renamed = ds.rename_column("score", "points").unwrap();
    assert_eq!(renamed.get(0).unwrap().int("points").unwrap(), 2);
    assert!(ds.rename_column("score", "output").is_err());
    assert!(ds.rename_column("points", "x").is_err());
    assert!(ds.remove_columns(&["points"]).is_err());
}

#[test]
fn the_table_escapes_cuts_and_counts() {
    let texts: Vec<String> =
        (0..12).map(|i| format!("<b>{i}</b>{}", "长".repeat(if i == 1 { 300 } else { 1 }))).collect();
    let html = Dataset::from_columns([("a<b", texts)]).unwrap().to_html();
    assert!(html.contains("a&lt;b") && html.contains("&lt;b&gt;0&lt;/b&gt;") && !html.contains("<b>"), "{html}");
    assert!(html.contains("… +148 characters"), "{html}");
    assert!(html.contains("12 rows, the first 10 shown"), "{html}");
    assert!(!html.contains("&lt;b&gt;10"), "{html}");
}

#[test]
fn a_dataset_may_go_to_another_thread() {
    fn is_send<T: Send + Sync + Clone + 'static>() {}
    is_send::<Dataset>();
    is_send::<DatasetDict>();
    is_send::<Example>();
    is_send::<Tokenizer>();
    is_send::<DataCollatorForSeq2Seq>();
}
