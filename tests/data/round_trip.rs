//! What is saved is what is loaded, here and in Python.

use std::fs;

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
