//! Disks that are full or read-only, too little memory, too few files: an error that says what to do, everything as it
//! was, and the next call works.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{ArrayRef, RecordBatch, StringArray, new_null_array};
use arrow_schema::DataType;
use candle_core::Device;
use parquet::arrow::ArrowWriter;
use qlora_nb::{
    dataset::Dataset,
    error::{Error, Result},
    model::{AutoModelForCausalLM, DeviceMap, Model, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    tokenizer::AutoTokenizer,
};
use qlora_nb_tests::*;

use crate::model::names;

fn base() -> Model {
    AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), ModelOptions::default()).unwrap()
}

fn adapted() -> PeftModel {
    get_peft_model(&base(), &LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() }).unwrap()
}

/// Every file below, with its bytes.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(content(&path)),
            false => drop(all.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    all
}

/// A way to save, into a folder.
type Save<'a> = (&'static str, &'a dyn Fn(&Path) -> Result<()>);

fn with_saves(check: impl Fn(&str, &dyn Fn(&Path) -> Result<()>)) {
    let (base, adapted) = (base(), adapted());
    let rows = Dataset::from_columns([("a", (0..9000).collect::<Vec<i64>>())]).unwrap();
    let curve = qlora_nb::display::line_chart("a title", "x", "y", &[]);
    let tokenizer = AutoTokenizer::from_pretrained(root().join("notebooks/models/poet-bloom-zh")).unwrap();
    let saves: [Save; 7] = [
        ("model", &|folder| base.save_pretrained(folder)),
        ("adapter", &|folder| adapted.save_pretrained(folder)),
        ("merged", &|folder| adapted.merge_and_unload()?.save_pretrained(folder)),
        ("dataset", &|folder| rows.save_to_disk(folder)),
        ("checkpoint", &|folder| super::kills::checkpoint(&adapted, folder)),
        ("tokenizer", &|folder| tokenizer.save_pretrained(folder)),
        ("picture", &|folder| curve.save(folder.join("curve.svg"))),
    ];
    saves.iter().for_each(|(name, save)| check(name, save));
}

#[test]
fn a_full_disk_leaves_what_was_there() {
    with_saves(|name, save| {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("place");
        fs::create_dir(&place).unwrap();
        save(&place).unwrap();
        let before = content(folder.path());
        for bytes in [0, 100, 3000] {
            let error = match with_file_size_limit(bytes, || save(&place)) {
                Err(error) => error,
                // Nothing of it is as large as that.
                Ok(()) => continue,
            };
            assert!(matches!(&error, Error::Io { path, .. } if path.starts_with(&place)), "{name}: {error}");
            assert!(error.to_string().contains("what to do"), "{name}: {error}");
            assert!(content(folder.path()) == before, "{name}, {bytes} bytes: the folder is another");
        }
        assert!(with_file_size_limit(0, || save(&place)).is_err(), "{name}");
        save(&place).unwrap();
    });
}

#[test]
fn a_place_that_takes_nothing_is_named() {
    with_saves(|name, save| {
        // A file system without files of ours, whoever asks; and a file where a folder must be.
        let file = tempfile::NamedTempFile::new().unwrap();
        for (place, named) in [(Path::new("/proc/self/qlora-nb"), "qlora-nb"), (&file.path().join("inside"), ".tmp")] {
            let error = save(place).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Io { .. } | Error::InvalidArgument { .. }), "{name}: {text}");
            assert!(text.contains("what to do") && text.contains(named), "{name}: {text}");
        }
    });
}

/// A limit of this process; tests have one of their own each.
fn limit(which: libc::__rlimit_resource_t, most: u64) {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid places to write to and to read from.
    unsafe {
        libc::getrlimit(which, &mut limits);
        limits.rlim_cur = most.min(limits.rlim_max);
        assert_eq!(libc::setrlimit(which, &limits), 0);
    }
}

fn address_space() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn a_model_larger_than_the_memory_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    write_random_bloom(folder.path(), 512, 6, 8, 20_000);
    let load = || {
        let options = ModelOptions { device_map: DeviceMap::Cpu, ..Default::default() };
        AutoModelForCausalLM::from_pretrained(folder.path(), options)
    };
    // It takes 114 MiB in f32.
    let own = address_space();
    limit(libc::RLIMIT_AS, own + (60 << 20));
    let error = load().unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("GiB are free") && text.contains("load_in_4bit") && text.contains("drop(model)"), "{text}");
    limit(libc::RLIMIT_AS, own + (1 << 30));
    assert!(load().is_ok());
}

/// A few bytes of a Parquet file stand for as many rows, and as long texts, as one likes.
#[test]
fn rows_beyond_the_memory_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, column: ArrayRef, times: usize| {
        let path = folder.path().join(name);
        let batch = RecordBatch::try_from_iter([("a", column)]).unwrap();
        let mut writer = ArrowWriter::try_new(fs::File::create(&path).unwrap(), batch.schema(), None).unwrap();
        (0..times).for_each(|_| writer.write(&batch).unwrap());
        writer.close().unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 1 << 20);
        path
    };
    // 800 and 500 MB of rows.
    let nulls = write("nulls.parquet", new_null_array(&DataType::Int64, 1_000_000), 100);
    let texts = write("texts.parquet", Arc::new(StringArray::from(vec!["a".repeat(50_000); 1000])), 10);
    let csv = folder.path().join("rows.csv");
    fs::write(&csv, "a\n").unwrap();
    fs::OpenOptions::new().write(true).open(&csv).unwrap().set_len(1 << 40).unwrap();
    limit(libc::RLIMIT_AS, address_space() + (200 << 20));
    for (path, read) in
        [(nulls, Dataset::from_parquet as fn(_) -> _), (texts, Dataset::from_parquet), (csv, Dataset::from_csv)]
    {
        let error = read(path.clone()).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        names(&error, &[&path.display().to_string(), "MiB", "split the file"]);
    }
    let rows = Dataset::from_columns([("a", vec![1i64, 2])]).unwrap();
    assert_eq!(rows.len(), 2, "there is memory left to work with");
}

/// Arrow counts the bytes of a batch's texts in 32 bits.
#[test]
fn more_text_than_a_batch_can_have() {
    let free = qlora_nb::internals::backend::of(&Device::Cpu).unwrap().available_bytes().unwrap();
    if free.is_some_and(|bytes| bytes < 12 << 30) {
        eprintln!("skipped: it needs 12 GiB of free memory");
        return;
    }
    let texts = vec!["a".repeat(2_200_000); 1000];
    let error = Dataset::from_columns([("a", texts)]).unwrap_err();
    assert!(error.to_string().contains("more than 2 GiB of text"), "{error}");
}

#[test]
fn too_few_files_are_told() {
    let (base, adapted) = (base(), adapted());
    let folder = tempfile::tempdir().unwrap();
    base.save_pretrained(folder.path().join("model")).unwrap();
    let before = content(folder.path());
    limit(libc::RLIMIT_NOFILE, 0);
    for error in [
        AutoModelForCausalLM::from_pretrained(folder.path().join("model"), ModelOptions::default()).unwrap_err(),
        base.save_pretrained(folder.path().join("model")).unwrap_err(),
        adapted.save_pretrained(folder.path().join("adapter")).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert!(error.to_string().contains("ulimit -n"), "{error}");
    }
    limit(libc::RLIMIT_NOFILE, 1024);
    assert!(content(folder.path()) == before);
    assert!(AutoModelForCausalLM::from_pretrained(folder.path().join("model"), ModelOptions::default()).is_ok());
}
