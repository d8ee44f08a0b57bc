//! kill -9 at random moments of training, saving, rotating, merging and writing a dataset: what is on disk loads, the run
//! goes on to the same bits, files of others stay, and nothing is left over in the end.
//!
//! `KILLS` says how many (12): `KILLS=200 cargo nextest run --release --workspace -E 'test(kills)'`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use qlora_nb::{
    dataset::Dataset,
    error::Result,
    model::{AutoModelForCausalLM, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::Trainer,
    training_args::TrainingArguments,
};
use qlora_nb_tests::*;

/// The folder that the child works in.
const FOLDER: &str = "QLORA_NB_KILLED_IN";
/// Files that are not ours: none may change.
const FOREIGN: [&str; 4] = ["keep.txt", "run/notes.txt", "run/.hidden.tmp", "run/.checkpoint-notes.tmp"];

fn adapted() -> PeftModel {
    let base = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), ModelOptions::default()).unwrap();
    let config =
        LoraConfig { r: 4, target_modules: ["query_key_value"].into(), lora_dropout: 0.1, ..Default::default() };
    get_peft_model(&base, &config).unwrap()
}

fn rows() -> Dataset {
    let ids: Vec<Vec<i64>> =
        (0..40).map(|row| (0..6 + row % 7).map(|i| 4 + (row * 13 + i * 7) % 150).collect()).collect();
    let mask: Vec<Vec<i64>> = ids.iter().map(|row| vec![1; row.len()]).collect();
    Dataset::from_columns([("input_ids", ids.clone()), ("attention_mask", mask), ("labels", ids)]).unwrap()
}

fn trainer(model: &PeftModel, folder: &Path) -> Result<Trainer> {
    let args = TrainingArguments {
        output_dir: folder.join("run"),
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        num_train_epochs: 3,
        learning_rate: 1e-2,
        save_steps: 1,
        save_total_limit: Some(2),
        disable_tqdm: true,
        ..Default::default()
    };
    Trainer::new(model, args, &rows(), collator())
}

/// One update, and its checkpoint in `run`.
pub fn one_step(model: &PeftModel, folder: &Path) {
    trainer(model, folder).unwrap().train_steps(1).unwrap();
}

/// A checkpoint in `run`, before the first update.
pub fn checkpoint(model: &PeftModel, folder: &Path) -> Result<()> {
    trainer(model, folder)?.save_checkpoint().map(drop)
}

/// The checkpoints there, the newest last.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.join("run")).unwrap().map(|entry| entry.unwrap().path());
    let number = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<usize>().ok();
    let mut found: Vec<PathBuf> = entries.filter(|path| number(path).is_some()).collect();
    found.sort_by_key(number);
    found
}

/// Trains on from the newest checkpoint, and saves all that can be saved after each update.
#[test]
#[ignore = "the child process of the test below"]
fn the_child() {
    let Some(folder) = env::var_os(FOLDER).map(PathBuf::from) else { return };
    let model = adapted();
    let mut trainer = trainer(&model, &folder).unwrap();
    if let Some(last) = checkpoints(&folder).last() {
        trainer.load_checkpoint(last).unwrap();
    }
    loop {
        let output = trainer.train_steps(1).unwrap();
        rows().save_to_disk(folder.join("data")).unwrap();
        model.save_pretrained(folder.join("adapter")).unwrap();
        model.merge_and_unload().unwrap().save_pretrained(folder.join("merged")).unwrap();
        if output.finished || trainer.state().global_step >= trainer.state().max_steps {
            break;
        }
    }
    fs::write(folder.join("done"), "").unwrap();
}

fn new_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("run")).unwrap();
    FOREIGN.iter().for_each(|name| fs::write(folder.path().join(name), name).unwrap());
    folder
}

fn start(folder: &Path) -> Child {
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "kills::the_child", "--include-ignored"]).env(FOLDER, folder);
    child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// What is there loads, whenever the process was killed.
fn check(folder: &Path) {
    for name in FOREIGN {
        assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), name);
    }
    let model = adapted();
    for checkpoint in checkpoints(folder) {
        trainer(&model, folder).unwrap().load_checkpoint(&checkpoint).unwrap();
    }
    let has = |file: &str| folder.join(file).exists();
    if has("data") {
        assert_eq!(Dataset::load_from_disk(folder.join("data")).unwrap().len(), rows().len());
    }
    if has("adapter/adapter_config.json") {
        PeftModel::from_pretrained(model.base_model(), folder.join("adapter")).unwrap();
    }
    if has("merged/config.json") {
        AutoModelForCausalLM::from_pretrained(folder.join("merged"), ModelOptions::default()).unwrap();
    }
}

/// Names of all files and folders below, hidden ones too.
fn names(folder: &Path, all: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        all.push(path.display().to_string());
        if path.is_dir() {
            names(&path, all);
        }
    }
}

#[test]
fn a_killed_process_loses_nothing_and_leaves_nothing() {
    let kills: usize = env::var("KILLS").ok().map_or(12, |n| n.parse().expect("KILLS is a number"));
    let whole = new_folder();
    assert!(start(whole.path()).wait().unwrap().success());
    let adapter = |folder: &Path| fs::read(folder.join("adapter/adapter_model.safetensors")).unwrap();
    let expected = adapter(whole.path());

    let (mut killed, mut runs, mut random) = (0, 0, 0x9e37_79b9_u64);
    while killed < kills {
        let folder = new_folder();
        runs += 1;
        while !folder.path().join("done").exists() {
            let mut child = start(folder.path());
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            if killed < kills {
                thread::sleep(Duration::from_micros(30_000 + (random >> 33) % 400_000));
                if child.try_wait().unwrap().is_none() {
                    child.kill().unwrap();
                    killed += 1;
                }
            }
            child.wait().unwrap();
            check(folder.path());
        }
        assert!(adapter(folder.path()) == expected, "run {runs}: other bits");
        let mut all = Vec::new();
        names(folder.path(), &mut all);
        all.retain(|name| name.contains("/.") && !FOREIGN.iter().any(|foreign| name.ends_with(foreign)));
        all.retain(|name| !name.contains("/.tmp") || name.matches("/.").count() > 1);
        assert!(all.is_empty(), "run {runs}: {all:?}");
    }
    println!("{killed} kills in {runs} runs");
}
