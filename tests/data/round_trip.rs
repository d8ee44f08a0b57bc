//! What is saved is what is loaded, here and in Python.

use std::{fs, process::Command};

use proptest::prelude::*;
use qlora_nb::prelude::*;
use qlora_nb_tests::*;

fn rows(ds: &Dataset) -> Vec<Value> {
    ds.iter().map(|ex| Value::Struct(ex.fields())).collect()
}

/// Values of one type, with gaps.
fn column(len: usize) -> BoxedStrategy<Vec<Value>> {
    let gaps = |values: BoxedStrategy<Value>| {
        proptest::collection::vec(prop_oneof![1 => Just(Value::Null), 4 => values], len..=len).boxed()
    };
    prop_oneof![
        gaps(".{0,12}".prop_map(Value::from).boxed()),
        gaps(any::<i64>().prop_map(Value::from).boxed()),
        gaps(any::<f64>().prop_filter("NaN equals nothing", |x| !x.is_nan()).prop_map(Value::from).boxed()),
        gaps(any::<bool>().prop_map(Value::from).boxed()),
        gaps(proptest::collection::vec(any::<i64>(), 0..5).prop_map(Value::from).boxed()),
        gaps(proptest::collection::vec("[a-c\u{4e00}-\u{4e10}]{0,3}", 0..3).prop_map(Value::from).boxed()),
        gaps(
            (any::<i64>(), ".{0,4}")
                .prop_map(|(n, s)| { Value::Struct(vec![("n".into(), n.into()), ("s".into(), s.into())]) })
                .boxed()
        ),
    ]
    .boxed()
}

fn dataset() -> impl Strategy<Value = Dataset> {
    (0usize..40, 1usize..5).prop_flat_map(|(len, columns)| {
        proptest::collection::vec(column(len), columns..=columns).prop_map(|columns| {
            Dataset::from_columns(columns.into_iter().enumerate().map(|(i, c)| (format!("c{i}"), c))).unwrap()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]
    #[test]
    fn any_rows_come_back(ds in dataset(), seed in any::<u64>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("saved");
        // The second save replaces the first: the rows in another order, from the same columns.
        for ds in [ds.clone(), ds.shuffle(seed)] {
            ds.save_to_disk(&path).unwrap();
            let loaded = Dataset::load_from_disk(&path).unwrap();
            prop_assert_eq!(rows(&loaded), rows(&ds));
            prop_assert_eq!(loaded.features(), ds.features());
        }
        prop_assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary folder stays");
    }
}

#[test]
fn a_large_selection_is_written_in_batches() {
    let ds = Dataset::from_columns([("n", 0i64..5000)]).unwrap().shuffle(7);
    let folder = tempfile::tempdir().unwrap();
    ds.save_to_disk(folder.path().join("a")).unwrap();
    assert_eq!(rows(&Dataset::load_from_disk(folder.path().join("a")).unwrap()), rows(&ds));
    // A slice writes its own rows, not the columns that it looks into.
    ds.head(3).save_to_disk(folder.path().join("b")).unwrap();
    let shard = folder.path().join("b/data-00000-of-00001.arrow");
    assert!(fs::metadata(shard).unwrap().len() < 1500);
}

#[test]
fn what_python_said_of_a_column_survives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("labelled");
    Dataset::from_columns([("label", vec![0i64, 1])]).unwrap().save_to_disk(&path).unwrap();
    let info = path.join("dataset_info.json");
    let class_label = serde_json::json!({ "names": ["bad", "good"], "_type": "ClassLabel" });
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&info).unwrap()).unwrap();
    json["features"]["label"] = class_label.clone();
    fs::write(&info, json.to_string()).unwrap();
    let renamed = Dataset::load_from_disk(&path).unwrap().rename_column("label", "y").unwrap();
    renamed.save_to_disk(&path).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&info).unwrap()).unwrap();
    assert_eq!(json["features"], serde_json::json!({ "y": class_label }));
}

#[test]
fn saving_replaces_datasets_only() {
    let folder = tempfile::tempdir().unwrap();
    let ds = Dataset::from_columns([("n", 0i64..3)]).unwrap();
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let error = ds.save_to_disk(folder.path()).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument { name, .. } if name == "path"), "{error}");
    assert_eq!(fs::read_to_string(folder.path().join("notes.txt")).unwrap(), "mine");
    let error = ds.save_to_disk(folder.path().join("notes.txt/inside")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(ds.save_to_disk("/").is_err());
}

#[test]
fn a_full_disk_leaves_the_earlier_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("saved");
    Dataset::from_columns([("n", 0i64..3)]).unwrap().save_to_disk(&path).unwrap();
    let large = Dataset::from_columns([("n", 0i64..100_000)]).unwrap();
    let error = with_file_size_limit(10_000, || large.save_to_disk(&path)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert_eq!(Dataset::load_from_disk(&path).unwrap().len(), 3);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary folder stays");
}

#[test]
fn a_dict_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("split");
    let dict = Dataset::from_columns([("n", 0i64..10)]).unwrap().train_test_split(0.3, 1).unwrap();
    dict.save_to_disk(&path).unwrap();
    let loaded = DatasetDict::load_from_disk(&path).unwrap();
    assert_eq!(loaded.to_string(), dict.to_string());
    for (name, split) in dict.iter() {
        assert_eq!(rows(&loaded.get(name).unwrap()), rows(split));
    }
}

/// Python's `datasets` reads what we write; needs a Python that has it (`QLORA_PYTHON`).
#[test]
fn python_reads_what_we_save() {
    let python = std::env::var("QLORA_PYTHON").unwrap_or_else(|_| "python3".into());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("saved");
    let chat = Value::Struct(vec![("role".into(), "user".into()), ("n".into(), 1i64.into())]);
    let ds = Dataset::from_rows([
        Example::new()
            .with("text", "春眠")
            .with("n", 1i64)
            .with("x", 0.5)
            .with("ok", true)
            .with("none", Value::Null)
            .with("ids", vec![1i64, 2])
            .with("chat", vec![chat.clone()])
            .with("nested", vec![vec![1i64], vec![]]),
        Example::new()
            .with("text", Value::Null)
            .with("n", -1i64)
            .with("x", -1.0)
            .with("ok", false)
            .with("none", Value::Null)
            .with("ids", Vec::<i64>::new())
            .with("chat", Vec::<i64>::new())
            .with("nested", Value::Null),
    ])
    .unwrap();
    let tokens = Features { input_ids: vec![5, 6], attention_mask: vec![1, 1], labels: vec![-100, 6] };
    let dict = DatasetDict::new([
        ("made", ds.clone()),
        ("loaded", Dataset::load_from_disk(fixture("alpaca_tiny/train")).unwrap().shuffle(1)),
        ("tokenized", ds.map(|_| Ok(tokens.clone())).unwrap()),
    ]);
    dict.save_to_disk(&path).unwrap();
    let script = root().join("tests/interchange/datasets_reads_ours.py");
    let ran = match Command::new(python).arg(script).arg(&path).env("HF_HOME", folder.path()).output() {
        Ok(ran) if ran.status.code() != Some(77) => ran,
        _ => {
            eprintln!("skipped: no Python with datasets (set QLORA_PYTHON)");
            return;
        }
    };
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let read: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
    for (name, split) in dict.iter() {
        let theirs: Vec<Value> = read[name]["rows"].as_array().unwrap().iter().cloned().map(Value::from).collect();
        assert_eq!(theirs, rows(split), "{name}");
    }
    // Versions of `datasets` print a list's type in different words.
    for (column, dtype) in [("input_ids", "'int32'"), ("attention_mask", "'int8'"), ("labels", "'int64'")] {
        let feature = read["tokenized"]["features"][column].as_str().unwrap();
        assert!(feature.contains(dtype), "{column}: {feature}");
    }
}
