//! SIGINT at random moments of every call that takes a while: the call ends, with its result or as interrupted, what it
//! was given is as before, and the next call does what it would have done.
//!
//! `INTERRUPTS` says how many in all (22); the longest wait for an answer is printed.

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use qlora_nb::{
    error::{Error, Result},
    model::{AutoModelForCausalLM, BitsAndBytesConfig, Model, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    prelude::{DType, Dataset, Trainer, TrainingArguments},
};
use qlora_nb_tests::*;

/// What the calls are given, and where they write.
struct Place {
    folder: tempfile::TempDir,
    base: Model,
    adapted: PeftModel,
    rows: Dataset,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("model")).unwrap();
        write_random_bloom(&at("model"), 512, 6, 8, 20_000);
        let base = load(&at("model")).unwrap();
        let config = LoraConfig { target_modules: "all-linear".into(), ..Default::default() };
        let adapted = get_peft_model(&base, &config).unwrap();
        let row = |i: i64| (0..300).map(|j| (i * 31 + j * 7) % 20_000).collect::<Vec<i64>>();
        let ids: Vec<Vec<i64>> = (0..3000).map(row).collect();
        let text: Vec<String> = ids.iter().map(|ids| format!("{ids:?}").repeat(4)).collect();
        let mask = vec![vec![1i64; 300]; ids.len()];
        let rows = Dataset::from_columns([("input_ids", ids.clone()), ("attention_mask", mask), ("labels", ids)]);
        let lines: Vec<String> = text.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
        fs::write(at("rows.jsonl"), lines.join("\n")).unwrap();
        fs::write(at("rows.json"), format!("[{}]", lines.join(","))).unwrap();
        let csv: Vec<String> = text.iter().map(|text| format!("\"{text}\"")).collect();
        fs::write(at("rows.csv"), format!("text\n{}\n", csv.join("\n"))).unwrap();
        let place = Self { base, adapted, rows: rows.unwrap(), folder };
        place.rows.save_to_disk(place.at("data")).unwrap();
        place
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn trainer(&self) -> Result<Trainer> {
        let args = TrainingArguments {
            output_dir: self.at("run"),
            disable_tqdm: true,
            max_steps: 20_000,
            per_device_train_batch_size: 1,
            ..Default::default()
        };
        Trainer::new(&self.adapted, args, &self.rows, collator())
    }
}

fn load(folder: &Path) -> Result<Model> {
    let quantization = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: true, ..Default::default() };
    AutoModelForCausalLM::from_pretrained(
        folder,
        ModelOptions { torch_dtype: DType::F16, quantization_config: Some(quantization), ..Default::default() },
    )
}

/// A call, and what its result is known by.
type Call = (&'static str, fn(&Place) -> Result<String>);

const CALLS: [Call; 11] = [
    ("from_pretrained", |place| Ok(load(&place.at("model"))?.num_parameters().to_string())),
    ("merge_and_unload", |place| Ok(place.adapted.merge_and_unload()?.num_parameters().to_string())),
    ("save_pretrained", |place| place.base.save_pretrained(place.at("saved")).map(|()| String::new())),
    ("Trainer::new", |place| Ok(place.trainer()?.state().max_steps.to_string())),
    ("memory_plan", |place| place.trainer()?.memory_plan().map(|_| String::new())),
    ("train_steps", |place| Ok(place.trainer()?.train_steps(2)?.interrupted.to_string())),
    ("from_json, lines", |place| Ok(Dataset::from_json(place.at("rows.jsonl"))?.len().to_string())),
    ("from_json, array", |place| Ok(Dataset::from_json(place.at("rows.json"))?.len().to_string())),
    ("from_csv", |place| Ok(Dataset::from_csv(place.at("rows.csv"))?.len().to_string())),
    ("load_from_disk", |place| Ok(Dataset::load_from_disk(place.at("data"))?.len().to_string())),
    ("save_to_disk", |place| place.rows.save_to_disk(place.at("data")).map(|()| String::new())),
];

#[test]
fn an_interrupt_at_any_moment_loses_nothing() {
    let interrupts: usize = env::var("INTERRUPTS").ok().map_or(22, |n| n.parse().expect("INTERRUPTS is a number"));
    // One that comes before or after a call is not for it.
    // SAFETY: no handler of ours is replaced.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
    let place = Place::new();
    let whole: Vec<(String, Duration)> = CALLS
        .iter()
        .map(|(_, call)| {
            let begin = Instant::now();
            (call(&place).unwrap(), begin.elapsed())
        })
        .collect();
    let (mut random, mut longest) = (0x9e37_79b9_u64, BTreeMap::new());
    for n in 0..interrupts {
        let ((name, call), (expected, takes)) = (CALLS[n % CALLS.len()], &whole[n % CALLS.len()]);
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let moment = takes.mul_f64((random >> 40) as f64 / (1u64 << 24) as f64);
        let waits = thread::spawn(move || {
            thread::sleep(moment);
            // SAFETY: a signal to this process.
            unsafe { libc::kill(libc::getpid(), libc::SIGINT) };
            Instant::now()
        });
        let done = call(&place);
        let ended = Instant::now();
        let answered = ended.saturating_duration_since(waits.join().unwrap());
        let entry = longest.entry(name).or_insert((0, 0, Duration::ZERO));
        entry.0 += 1;
        match done {
            Err(Error::Interrupted { .. }) => entry.1 += 1,
            // It was done already, or told in its result.
            Ok(result) => assert!(result == *expected || result == "true", "{name}: {result}"),
            Err(other) => panic!("{name} after {moment:?}: {other}"),
        }
        entry.2 = entry.2.max(answered);
        assert_eq!(call(&place).unwrap(), *expected, "{name}: the next call");
    }
    for (name, (times, stopped, wait)) in longest {
        println!("{name}: {stopped} of {times} stopped, the longest wait {:.0} ms", wait.as_secs_f64() * 1e3);
    }
    let names: Vec<_> = fs::read_dir(place.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{names:?}");
}
