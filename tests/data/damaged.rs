//! Folders that are not what save_to_disk wrote: each a typed error that names the file.

use std::{fs, path::Path};

use qlora_nb::prelude::*;
use qlora_nb_tests::*;

const SHARD: &str = "data-00000-of-00001.arrow";

fn copy(from: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

fn refused(folder: &Path, file: &str) -> String {
    let error = Dataset::load_from_disk(folder).unwrap_err();
    let named = match &error {
        Error::Malformed { path, .. } | Error::NotFound { path, .. } | Error::Io { path, .. } => path.ends_with(file),
        _ => false,
    };
    assert!(named, "{file}: {error}");
    error.to_string()
}

#[test]
fn missing_folders_and_files() {
    let text = refused(Path::new("no/such/folder"), "no/such/folder");
    assert!(text.contains("relative path"), "{text}");
    let folder = copy(&fixture("alpaca_tiny/train"));
    let text = refused(&folder.path().join("state.json"), "state.json");
    assert!(text.contains("from_json"), "{text}");
    fs::remove_file(folder.path().join(SHARD)).unwrap();
    refused(folder.path(), SHARD);
    fs::remove_file(folder.path().join("state.json")).unwrap();
    let text = refused(folder.path(), "state.json");
    assert!(text.contains("dataset_info.json"), "it says what is there: {text}");
}

#[test]
fn one_dataset_and_several_are_told_apart() {
    let folder = fixture("alpaca_tiny");
    let text = refused(&folder, "alpaca_tiny");
    assert!(text.contains("[\"train\", \"test\"]") && text.contains("DatasetDict::load_from_disk"), "{text}");
    let error = DatasetDict::load_from_disk(folder.join("train")).unwrap_err().to_string();
    assert!(error.contains("Dataset::load_from_disk"), "{error}");
    let folder = copy(&fixture("alpaca_tiny/train"));
    fs::remove_file(folder.path().join("state.json")).unwrap();
    let error = DatasetDict::load_from_disk(folder.path()).unwrap_err();
    assert!(matches!(&error, Error::NotFound { path, .. } if path.ends_with("dataset_dict.json")), "{error}");
}

#[test]
fn damaged_json() {
    for file in ["state.json", "dataset_info.json"] {
        let folder = copy(&fixture("alpaca_tiny/train"));
        let path = folder.path().join(file);
        let whole = fs::read(&path).unwrap();
        for bad in [&whole[..0], &whole[..whole.len() / 2], b"\xff\xfe"] {
            fs::write(&path, bad).unwrap();
            refused(folder.path(), file);
        }
    }
    let folder = copy(&fixture("alpaca_tiny/train"));
    for state in ["{}", "[]", "null", "{\"_data_files\": [{\"name\": 1}]}"] {
        fs::write(folder.path().join("state.json"), state).unwrap();
        refused(folder.path(), "state.json");
    }
}

/// JSON that is no object, and names that lead out of the folder.
#[test]
fn json_of_another_form() {
    let folder = copy(&fixture("alpaca_tiny/train"));
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    for info in ["[]", "1", "\"x\"", "null", "{\"features\": 1}"] {
        write("dataset_info.json", info);
        assert!(Dataset::load_from_disk(folder.path()).is_ok(), "{info}");
    }
    let shard = folder.path().join(SHARD);
    for name in [shard.to_str().unwrap(), "../x.arrow", "", "."] {
        write("state.json", &format!("{{\"_data_files\": [{{\"filename\": {name:?}}}]}}"));
        assert!(refused(folder.path(), "state.json").contains("a file in this folder"));
    }
    fs::remove_file(folder.path().join("state.json")).unwrap();
    for splits in ["[]", "1", "{\"splits\": [\"../train\"]}", "{\"splits\": [\"/train\"]}", "{\"splits\": [1]}"] {
        write("dataset_dict.json", splits);
        let error = DatasetDict::load_from_disk(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::Malformed { path, .. } if path.ends_with("dataset_dict.json")), "{error}");
    }
}

/// Of a column without values no byte is in the file: what numbers its rows would need 32 EiB.
#[test]
fn more_rows_than_the_file_can_hold() {
    use arrow_array as array;
    use arrow_ipc::writer::StreamWriter;
    use arrow_schema as datatypes;
    let folder = copy(&fixture("alpaca_tiny/train"));
    let write = |rows: usize| {
        let schema = datatypes::Schema::new(vec![datatypes::Field::new("n", datatypes::DataType::Null, true)]);
        let columns: Vec<array::ArrayRef> = vec![std::sync::Arc::new(array::NullArray::new(rows))];
        let batch = array::RecordBatch::try_new(std::sync::Arc::new(schema), columns).unwrap();
        let file = fs::File::create(folder.path().join(SHARD)).unwrap();
        let mut writer = StreamWriter::try_new(file, &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
    };
    write(1 << 62);
    assert!(refused(folder.path(), SHARD).contains("4611686018427387904"));
    write(1 << 20);
    assert_eq!(Dataset::load_from_disk(folder.path()).unwrap().shuffle(1).num_rows(), 1 << 20);
}

/// Only what a saved dataset consists of is replaced.
#[test]
fn saving_a_dataset_deletes_nothing_else() {
    let (folder, ds) = (tempfile::tempdir().unwrap(), Dataset::from_columns([("n", 0i64..4)]).unwrap());
    let splits = ds.train_test_split(0.5, 1).unwrap();
    let place = folder.path().join("data");
    let saves: [&dyn Fn() -> Result<()>; 2] = [&|| ds.save_to_disk(&place), &|| splits.save_to_disk(&place)];
    for save in saves {
        save().unwrap();
        for foreign in ["notes.txt", "raw/a.csv", "train/b.arrow", "other/state.json", "data-00000-of-00009.arrow"] {
            let path = place.join(foreign);
            let made = !path.parent().unwrap().exists();
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "mine").unwrap();
            let error = save().unwrap_err();
            let named = place.join(foreign.split('/').next().unwrap());
            assert!(matches!(&error, Error::InvalidArgument { .. }), "{error}");
            assert!(error.to_string().contains(named.to_str().unwrap()), "{foreign}: {error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
            if made { fs::remove_dir_all(path.parent().unwrap()) } else { fs::remove_file(&path) }.unwrap();
        }
        fs::write(place.join(if place.join("state.json").exists() { "" } else { "train" }).join("cache-1f.arrow"), "")
            .unwrap();
        saves.iter().for_each(|save| save().unwrap());
        fs::remove_dir_all(&place).unwrap();
    }
    let outside = DatasetDict::new([("../evil", ds)]);
    assert!(outside.save_to_disk(&place).unwrap_err().to_string().contains("../evil"));
    assert!(!folder.path().join("evil").exists() && !place.exists());
}

#[test]
fn a_shard_cut_off_anywhere_is_refused() {
    let folder = copy(&fixture("alpaca_tiny/train"));
    let path = folder.path().join(SHARD);
    let whole = fs::read(&path).unwrap();
    for len in (0..whole.len()).filter(|len| len % 3 == 0 || whole.len() - len < 20) {
        fs::write(&path, &whole[..len]).unwrap();
        refused(folder.path(), SHARD);
    }
    fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
    refused(folder.path(), SHARD);
    fs::write(&path, [b"ARROW1\0\0", &whole[..]].concat()).unwrap();
    assert!(refused(folder.path(), SHARD).contains("stream format"));
}

/// A flipped bit is refused or changes a value; it never ends the process.
#[test]
fn flipped_bits_never_end_the_process() {
    let folder = copy(&fixture("alpaca_tiny/train"));
    let path = folder.path().join(SHARD);
    let whole = fs::read(&path).unwrap();
    let (mut refused, mut read) = (0, 0);
    for byte in 0..whole.len() {
        // Writing files is what takes the time: three of eight bits do.
        for bit in [byte % 8, (byte + 3) % 8, 7] {
            let mut bad = whole.clone();
            bad[byte] ^= 1 << bit;
            fs::write(&path, &bad).unwrap();
            match Dataset::load_from_disk(folder.path()) {
                Ok(ds) => {
                    read += 1;
                    let _ = (ds.to_string(), ds.slice(..).to_string(), ds.to_html());
                    for ex in ds.iter() {
                        let _ = (ex.text("output"), ex.ints("input_ids"), ex.int("score"));
                    }
                }
                Err(Error::Malformed { path: named, .. }) => {
                    assert!(named == path || named == folder.path());
                    refused += 1;
                }
                Err(other) => panic!("byte {byte}, bit {bit}: {other}"),
            }
        }
    }
    eprintln!("{refused} refused, {read} read with other values");
    assert!(refused > 1000 && read > 1000);
}

#[test]
fn shards_of_different_datasets_do_not_mix() {
    let folder = copy(&fixture("alpaca_shards"));
    let other = Dataset::from_columns([("text", vec!["a"])]).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    other.save_to_disk(elsewhere.path().join("other")).unwrap();
    fs::copy(elsewhere.path().join("other").join(SHARD), folder.path().join("data-00001-of-00002.arrow")).unwrap();
    let text = refused(folder.path(), "data-00001-of-00002.arrow");
    assert!(text.contains("[text: string]") && text.contains("instruction: string"), "{text}");
}
