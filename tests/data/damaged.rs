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
