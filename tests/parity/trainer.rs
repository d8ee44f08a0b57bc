//! A training run against transformers' Trainer, log by log, and what a run promises on a real model.

use std::{fs, path::Path};

use qlora_nb::{
    model::{AutoModelForCausalLM, BitsAndBytesConfig, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    prelude::*,
    quant::QuantType,
    trainer::Trainable,
};
use qlora_nb_tests::*;
use serde_json::Value as Json;

fn json(name: &str) -> Json {
    serde_json::from_slice(&fs::read(fixture(name)).unwrap()).unwrap()
}

/// The rows that the reference was trained on.
fn rows() -> Dataset {
    let rows = json("trainer_run/rows.json");
    let ints = |row: &Json, key: &str| -> Vec<i64> {
        row[key].as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect()
    };
    let n = rows.as_array().unwrap().len() as i64;
    let numbers = Dataset::from_columns([("row", (0..n).collect::<Vec<_>>())]).unwrap();
    let features = |ex: &Example| {
        let row = &rows[ex.int("row")? as usize];
        let unsigned = |key: &str| ints(row, key).into_iter().map(|x| x as u32).collect();
        Ok(Features {
            input_ids: unsigned("input_ids"),
            attention_mask: unsigned("attention_mask"),
            labels: ints(row, "labels"),
        })
    };
    numbers.map(features).unwrap()
}

/// The reference's adapter at its start, on a fresh copy of its base.
fn model(config: &LoraConfig, quantization_config: Option<BitsAndBytesConfig>) -> PeftModel {
    let options = ModelOptions { quantization_config, ..Default::default() };
    let base = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), options).unwrap();
    let model = get_peft_model(&base, config).unwrap();
    let init = tensors(fixture("trainer_run/adapter_init.safetensors"));
    for param in model.trainable_parameters() {
        param.set(&init[param.name()]).unwrap();
    }
    model
}

fn lora() -> LoraConfig {
    LoraConfig { r: 4, lora_alpha: 8, target_modules: ["query_key_value"].into(), ..Default::default() }
}

fn args(output_dir: &Path) -> TrainingArguments {
    TrainingArguments {
        output_dir: output_dir.to_owned(),
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: 2,
        num_train_epochs: 3,
        learning_rate: 1e-2,
        max_grad_norm: 1.0,
        warmup_steps: 2,
        logging_steps: 4,
        save_steps: 4,
        seed: 42,
        disable_tqdm: true,
        ..Default::default()
    }
}

fn weights(model: &PeftModel) -> Vec<Vec<f64>> {
    model.trainable_parameters().iter().map(|p| values(p.value())).collect()
}

#[test]
fn a_run_logs_what_transformers_logs() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(&lora(), None);
    let mut trainer = Trainer::new(&model, args(dir.path()), &rows(), collator()).unwrap();
    let output = trainer.train().unwrap();

    let expected = json("trainer_run/log_history.json");
    let got = trainer.log_history();
    assert_eq!(got.len(), expected.as_array().unwrap().len());
    for (got, expected) in got.iter().zip(expected.as_array().unwrap()) {
        for (name, value) in expected.as_object().unwrap() {
            let (Some(got), value) = (got.get(name), value.as_f64().unwrap()) else {
                assert_eq!(name, "total_flos", "only this is not computed");
                continue;
            };
            let tolerance = match name.as_str() {
                "loss" | "train_loss" => 1e-5,
                "grad_norm" => 1e-4,
                _ => 1e-15,
            };
            assert!((got - value).abs() <= tolerance, "{name}: {got}, expected {value} in {expected}");
        }
    }
    assert_eq!(output.global_step, 18);
    let trained = tensors(fixture("trainer_run/adapter_final.safetensors"));
    for p in model.trainable_parameters() {
        let difference = max_difference(p.value(), &trained[p.name()]);
        assert!(difference < 1e-5, "{} differs by {difference}", p.name());
    }

    let run = json("trainer_run/run.json");
    for name in run["checkpoints"].as_array().unwrap() {
        assert!(dir.path().join(name.as_str().unwrap()).is_dir(), "{name}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), run["checkpoints"].as_array().unwrap().len());
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let (ours, theirs) =
        (read(&dir.path().join("checkpoint-18/trainer_state.json")), read(&fixture("trainer_run/trainer_state.json")));
    // Line by line: keys, their order and the layout are the same, floats as near as the log's.
    assert_eq!(ours.lines().count(), theirs.lines().count());
    for (ours, theirs) in ours.lines().zip(theirs.lines()) {
        let number = |line: &str| line.rsplit_once(": ").and_then(|(_, n)| n.trim_end_matches(',').parse::<f64>().ok());
        match (number(ours), number(theirs)) {
            (Some(a), Some(b)) => {
                assert_eq!(ours.split_once(':').unwrap().0, theirs.split_once(':').unwrap().0);
                let counted_here_only = ours.contains("num_input_tokens_seen") || ours.contains("total_flos");
                assert!(counted_here_only || (a - b).abs() < 1e-4, "{ours}, expected {theirs}");
            }
            _ => assert_eq!(ours, theirs),
        }
    }
}

/// What is logged, evaluated and saved at which update, under three mixes of strategies.
#[test]
fn evaluations_and_strategies_are_those_of_transformers() {
    let eval = json("trainer_run/eval.json");
    for run in eval["runs"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let changes = &run["arguments"];
        let count = |key: &str| changes[key].as_u64().map(|n| n as usize);
        let interval = |key: &str, default| match changes[key].as_str() {
            Some("steps") => IntervalStrategy::Steps,
            Some("epoch") => IntervalStrategy::Epoch,
            Some("no") => IntervalStrategy::No,
            _ => default,
        };
        let args = TrainingArguments {
            per_device_eval_batch_size: 4,
            max_steps: changes["max_steps"].as_i64().unwrap() as isize,
            logging_strategy: interval("logging_strategy", IntervalStrategy::Steps),
            logging_first_step: changes["logging_first_step"].as_bool().unwrap_or(false),
            eval_strategy: interval("eval_strategy", IntervalStrategy::No),
            eval_steps: count("eval_steps"),
            eval_on_start: changes["eval_on_start"].as_bool().unwrap_or(false),
            save_strategy: match interval("save_strategy", IntervalStrategy::Steps) {
                IntervalStrategy::Steps => SaveStrategy::Steps,
                IntervalStrategy::Epoch => SaveStrategy::Epoch,
                IntervalStrategy::No => SaveStrategy::No,
            },
            save_steps: count("save_steps").unwrap_or(4),
            save_total_limit: count("save_total_limit"),
            ..args(dir.path())
        };
        let trainer = Trainer::new(&model(&lora(), None), args, &rows(), collator()).unwrap();
        let mut trainer = trainer.with_eval_dataset(&rows().head(6)).unwrap();
        trainer.train().unwrap();
        let expected = run["log_history"].as_array().unwrap();
        assert_eq!(trainer.log_history().len(), expected.len(), "{:?}", trainer.log_history());
        for (got, expected) in trainer.log_history().iter().zip(expected) {
            let timed = |name: &str| name.ends_with("_runtime") || name.ends_with("_per_second");
            let names: Vec<&str> = got.iter().map(|(name, _)| name).filter(|name| !timed(name)).collect();
            let wanted: Vec<&String> = expected.as_object().unwrap().keys().collect();
            assert_eq!(names, wanted);
            for name in names {
                let (got, wanted) = (got.get(name).unwrap(), expected[name].as_f64().unwrap());
                assert!((got - wanted).abs() < 1e-4, "{name}: {got}, expected {wanted} in {expected}");
            }
        }
        let mut saved: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        saved.sort();
        assert_eq!(Json::from(saved), run["checkpoints"]);
    }
}

#[test]
fn checkpointing_and_accumulation_change_no_number_that_matters() {
    let dir = tempfile::tempdir().unwrap();
    let run = |batch: usize, accumulation: usize, gradient_checkpointing: bool| {
        let model = model(&LoraConfig { lora_dropout: 0.1, ..lora() }, None);
        let args = TrainingArguments {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            gradient_checkpointing,
            logging_steps: 1,
            max_steps: 5,
            save_strategy: SaveStrategy::No,
            ..args(dir.path())
        };
        let mut trainer = Trainer::new(&model, args, &rows(), collator()).unwrap();
        trainer.train().unwrap();
        (weights(&model), trainer.state().curve("loss"))
    };
    assert_eq!(run(4, 2, false), run(4, 2, true), "checkpointing gives the same bits, dropout included");

    let without_dropout = |batch: usize, accumulation: usize| {
        let model = model(&lora(), None);
        let args = TrainingArguments {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            logging_steps: 1,
            max_steps: 5,
            save_strategy: SaveStrategy::No,
            ..args(dir.path())
        };
        let mut trainer = Trainer::new(&model, args, &rows(), collator()).unwrap();
        trainer.train().unwrap();
        trainer.state().curve("loss")
    };
    let whole = without_dropout(8, 1);
    for (batch, accumulation) in [(4, 2), (2, 4)] {
        for (a, b) in without_dropout(batch, accumulation).iter().zip(&whole) {
            assert!((a.1 - b.1).abs() < 1e-5, "{accumulation} micro-batches: {a:?}, expected {b:?}");
        }
    }
}

/// NF4 base, dropout, checkpointing, evaluations, and saves between two log entries: everything
/// that has a state.
#[test]
fn a_resumed_run_equals_the_uninterrupted_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let nf4 = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_quant_type: QuantType::Nf4, ..Default::default() };
    let config = LoraConfig { lora_dropout: 0.1, target_modules: ["query_key_value"].into(), ..lora() };
    let fresh = || {
        let model = model(&config, Some(nf4.clone()));
        let args = TrainingArguments {
            save_steps: 3,
            gradient_checkpointing: true,
            eval_strategy: IntervalStrategy::Epoch,
            ..args(dir.path())
        };
        let trainer = Trainer::new(&model, args, &rows(), collator()).unwrap();
        (trainer.with_eval_dataset(&rows().head(6)).unwrap(), model)
    };
    let history = |trainer: &Trainer| -> Vec<(String, f64)> {
        let timed = |name: &str| name.ends_with("_runtime") || name.ends_with("_per_second");
        let entries = trainer.log_history().iter().flat_map(|e| e.iter());
        entries.filter(|(n, _)| !timed(n)).map(|(n, v)| (n.to_owned(), v)).collect()
    };
    let (mut whole, model) = fresh();
    let expected = (whole.train().unwrap().training_loss, weights(&model), history(&whole));
    for step in [3, 6, 15] {
        let (mut trainer, model) = fresh();
        let output = trainer.resume_from_checkpoint(dir.path().join(format!("checkpoint-{step}"))).unwrap();
        assert_eq!((output.training_loss, weights(&model), history(&trainer)), expected, "from step {step}");
    }
    // The checkpoint is an adapter as PEFT writes it, and loads as one.
    let base = AutoModelForCausalLM::from_pretrained(
        fixture("bloom_tiny"),
        ModelOptions { quantization_config: Some(nf4), ..Default::default() },
    );
    let loaded = PeftModel::from_pretrained(&base.unwrap(), dir.path().join("checkpoint-18")).unwrap();
    assert_eq!(weights(&loaded), expected.1);
}

#[test]
fn a_checkpoint_of_another_adapter_or_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let start = |model: &PeftModel| Trainer::new(model, args(dir.path()), &rows(), collator()).unwrap();
    start(&model(&lora(), None)).train_steps(4).unwrap();
    let field = |model: &PeftModel| match start(model).load_checkpoint(dir.path().join("checkpoint-4")) {
        Err(Error::CheckpointMismatch { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(&model(&LoraConfig { lora_alpha: 16, ..lora() }, None)), "LoraConfig.lora_alpha");
    assert_eq!(field(&model(&LoraConfig { lora_dropout: 0.1, ..lora() }, None)), "LoraConfig.lora_dropout");
    let base = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), ModelOptions::default()).unwrap();
    let other_rank = get_peft_model(&base, &LoraConfig { r: 2, ..lora() }).unwrap();
    assert_eq!(field(&other_rank), "LoraConfig.r");
    let quantized = BitsAndBytesConfig { load_in_4bit: true, ..Default::default() };
    assert_eq!(field(&model(&lora(), Some(quantized))), "model");
}

/// The random stream under the data order, for seeds and lengths of the reference's.
#[test]
fn permutations_equal_torch() {
    let want = json("sampler.json");
    let permutations = want["randperm"].as_object().unwrap();
    assert!(permutations.len() > 3);
    for (name, order) in permutations {
        let (seed, n) = name.strip_prefix("seed ").and_then(|s| s.split_once(", n ")).unwrap();
        let order: Vec<usize> = order.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
        assert_eq!(qlora_nb::trainer::randperm(n.parse().unwrap(), seed.parse().unwrap()), order, "{name}");
    }
}
