//! Everything that can go wrong: what the user is told, and that nothing is lost.

use super::*;
use crate::{features::IGNORE_INDEX, models::causal_lm::Trainable, optim::Optim, training_args::SamplingStrategy};

#[test]
fn a_checkpoint_of_another_run_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = args(dir.path());
    trainer(&Double::new(), base.clone()).train_steps(3).unwrap();
    let checkpoint = dir.path().join("checkpoint-3");
    let field_of = |mut trainer: Trainer, model: &Double| {
        let weights = model.weights();
        let error = trainer.resume_from_checkpoint(&checkpoint).unwrap_err();
        assert_eq!(model.weights(), weights);
        assert_eq!(trainer.state().global_step, 0);
        match error {
            Error::CheckpointMismatch { field, .. } => field,
            other => panic!("{other}"),
        }
    };
    type Change = (&'static str, fn(&mut TrainingArguments));
    let changes: [Change; 15] = [
        ("per_device_train_batch_size", |a| a.per_device_train_batch_size = 4),
        ("gradient_accumulation_steps", |a| a.gradient_accumulation_steps = 1),
        ("learning_rate", |a| a.learning_rate = 0.06),
        ("weight_decay", |a| a.weight_decay = 0.1),
        ("adam_beta1", |a| a.adam_beta1 = 0.8),
        ("adam_beta2", |a| a.adam_beta2 = 0.9),
        ("adam_epsilon", |a| a.adam_epsilon = 1e-6),
        ("max_grad_norm", |a| a.max_grad_norm = 2.0),
        ("seed", |a| a.seed = 43),
        ("data_seed", |a| a.data_seed = Some(7)),
        ("train_sampling_strategy", |a| a.train_sampling_strategy = SamplingStrategy::Sequential),
        ("dataloader_drop_last", |a| a.dataloader_drop_last = true),
        ("optim", |a| a.optim = Optim::PagedAdamW32bit),
        ("max_steps", |a| a.num_train_epochs = 3),
        ("warmup_steps", |a| a.warmup_ratio = 0.5),
    ];
    for (field, change) in changes {
        let mut other = base.clone();
        change(&mut other);
        let model = Double::new();
        assert_eq!(field_of(trainer(&model, other), &model), field);
    }
    let model = Double::new();
    let other_data = Trainer::on(model.clone(), base.clone(), &dataset(&rows(15)), collator()).unwrap();
    assert_eq!(field_of(other_data, &model), "data");
    let other_padding = DataCollatorForSeq2Seq { pad_to_multiple_of: Some(8), ..collator() };
    let other_padding = Trainer::on(model.clone(), base.clone(), &dataset(&rows(16)), other_padding).unwrap();
    assert_eq!(field_of(other_padding, &model), "data_collator");
    assert_eq!(field_of(trainer(&model, base.clone()).with_lr_schedule(|_| 0.05), &model), "lr_schedule");
    let mut other_rank = Double::new();
    Arc::get_mut(&mut other_rank).unwrap().lora_r = 16;
    assert_eq!(field_of(trainer(&other_rank, base.clone()), &other_rank), "LoraConfig.r");
    // What changes no number may change.
    let free = TrainingArguments {
        output_dir: dir.path().join("elsewhere"),
        logging_steps: 1,
        save_steps: 2,
        save_total_limit: Some(1),
        gradient_checkpointing: true,
        ..base
    };
    assert_eq!(trainer(&Double::new(), free).resume_from_checkpoint(&checkpoint).unwrap().global_step, 6);
    assert_eq!(names(&dir.path().join("elsewhere")), ["checkpoint-6"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update() {
    let dir = tempfile::tempdir().unwrap();
    let expected = whole(args(tempfile::tempdir().unwrap().path()), false);
    for poison in [f64::NAN, f64::INFINITY] {
        let model = Double::new();
        let mut trainer = trainer(&model, args(dir.path()));
        trainer.train_steps(4).unwrap();
        let weights = model.weights();
        // The second micro-batch of update 5: pass 9 of the whole run.
        model.before_pass(move |n| if n == 9 { poison } else { 0.0 });
        let error = trainer.train().unwrap_err();
        let Error::NotFinite { step: 5, checkpoint: Some(checkpoint), .. } = &error else { panic!("{error}") };
        assert_eq!(*checkpoint, dir.path().join("checkpoint-3"));
        assert_eq!(model.weights(), weights);
        assert!(gradients_are_zero(&model));
        assert_eq!(trainer.state().global_step, 4);
        // The cause removed, the run goes on as if nothing had happened.
        model.no_hook();
        trainer.train().unwrap();
        assert_eq!((model.weights(), log(&trainer)), (expected.0.clone(), expected.1.clone()));
    }
}

#[test]
fn a_gradient_that_is_not_finite_stops_before_the_update() {
    let dir = tempfile::tempdir().unwrap();
    let model = Double::new();
    let poisoned = model.clone();
    model.before_pass(move |n| {
        if n == 3 {
            crate::backend::param::modify_f32(poisoned.trainable_parameters()[0].grad(), |g| g[0] = f32::NAN).unwrap();
        }
        0.0
    });
    let mut trainer = trainer(&model, args(dir.path()));
    let error = trainer.train().unwrap_err();
    assert!(matches!(&error, Error::NotFinite { what, step: 2, .. } if what.contains("gradient")), "{error}");
    assert!(gradients_are_zero(&model) && model.weights().iter().all(|w| w.is_finite()));
}

#[test]
fn rows_without_labels_teach_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut some = rows(6);
    for row in &mut some[3..] {
        row.labels.fill(IGNORE_INDEX);
    }
    let args = TrainingArguments {
        per_device_train_batch_size: 3,
        gradient_accumulation_steps: 1,
        num_train_epochs: 1,
        logging_steps: 1,
        train_sampling_strategy: SamplingStrategy::Sequential,
        save_strategy: SaveStrategy::No,
        ..args(dir.path())
    };
    let model = Double::new();
    let mut trainer = Trainer::on(model.clone(), args.clone(), &dataset(&some), collator()).unwrap();
    let before = model.weights();
    trainer.train_steps(1).unwrap();
    let after_labels = model.weights();
    assert_ne!(after_labels, before);
    // AdamW has momentum by now; without labels it must not act.
    trainer.train().unwrap();
    assert_eq!(model.weights(), after_labels);
    assert_eq!(trainer.state().curve("loss")[1], (2.0, 0.0));
    for row in &mut some {
        // A label on the first token is never predicted.
        row.labels.fill(IGNORE_INDEX);
        row.labels[0] = 1;
    }
    let error = Trainer::on(model, args, &dataset(&some), collator()).unwrap_err();
    assert!(matches!(error, Error::NothingToLearn { rows: 6, total: 6, .. }), "{error}");
}

#[test]
fn bad_rows_are_named_before_training() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |rows: &[crate::features::Features]| {
        Trainer::on(Double::new(), args(dir.path()), &dataset(rows), collator()).unwrap_err()
    };
    let mut some = rows(4);
    some[2].input_ids[1] = 11;
    assert!(matches!(refused(&some), Error::TokenId { row: 2, position: 1, id: 11, vocab_size: 11 }));
    let mut some = rows(4);
    some[3].labels[2] = -1;
    assert!(matches!(refused(&some), Error::TokenId { row: 3, position: 2, id: -1, .. }));
    let mut some = rows(4);
    some[1] = Default::default();
    assert!(matches!(refused(&some), Error::EmptySequence { row: 1 }));
    let mut some = rows(4);
    some[2].attention_mask.fill(0);
    assert!(matches!(refused(&some), Error::EmptySequence { row: 2 }));
    let mut some = rows(4);
    some[1].labels.pop();
    assert!(matches!(refused(&some), Error::UnequalLengths { row: 1, field: "labels", .. }));
    assert!(matches!(refused(&[]), Error::InvalidArgument { .. } | Error::MissingColumn { .. }));
    let text = Dataset::from_columns([("text", ["a"])]).unwrap();
    let error = Trainer::on(Double::new(), args(dir.path()), &text, collator()).unwrap_err();
    assert!(matches!(&error, Error::MissingColumn { column, .. } if column == "input_ids"), "{error}");
    let no_padding = DataCollatorForSeq2Seq { pad_token_id: None, ..collator() };
    let error = Trainer::on(Double::new(), args(dir.path()), &dataset(&rows(4)), no_padding).unwrap_err();
    assert!(error.to_string().contains("pad_token"), "{error}");
    let drop_last =
        TrainingArguments { dataloader_drop_last: true, per_device_train_batch_size: 5, ..args(dir.path()) };
    let error = Trainer::on(Double::new(), drop_last, &dataset(&rows(4)), collator()).unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument { name, .. } if name == "dataloader_drop_last"), "{error}");
}

#[test]
fn an_output_dir_that_cannot_be_written_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = Trainer::on(Double::new(), args(&file.join("out")), &dataset(&rows(4)), collator()).unwrap_err();
    assert!(error.to_string().contains("file/out"), "{error}");
    // Nothing is to be written: nothing is checked.
    let no_save = TrainingArguments { save_strategy: SaveStrategy::No, ..args(&file.join("out")) };
    trainer(&Double::new(), no_save);
}

#[test]
fn a_save_that_fails_can_be_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let expected = whole(args(tempfile::tempdir().unwrap().path()), false);
    let model = Double::new();
    let mut trainer = trainer(&model, args(&out));
    // A file takes the folder's place after the check at the start.
    fs::remove_dir(&out).unwrap();
    fs::write(&out, "").unwrap();
    let error = trainer.train().unwrap_err();
    assert!(error.to_string().contains("out/checkpoint-3"), "{error}");
    assert_eq!(trainer.state().global_step, 3);
    fs::remove_file(&out).unwrap();
    assert!(trainer.train().unwrap().finished);
    assert_eq!(names(&out), ["checkpoint-3", "checkpoint-6"], "the save that failed is made up for");
    assert_eq!((model.weights(), log(&trainer)), (expected.0, expected.1));
}

/// Runs in a process of its own, whose files may not grow: what a full disk does to a save.
#[test]
fn a_full_disk_leaves_no_half_written_checkpoint() {
    const CHILD: &str = "QLORA_TEST_FULL_DISK";
    if let Some(out) = std::env::var_os(CHILD) {
        return full_disk(Path::new(&out));
    }
    let dir = tempfile::tempdir().unwrap();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "trainer::tests::faults::a_full_disk_leaves_no_half_written_checkpoint", "--nocapture"])
        .env(CHILD, dir.path())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    assert_eq!(names(dir.path()), ["checkpoint-3", "checkpoint-6"]);
}

fn full_disk(out: &Path) {
    let limit = |bytes: libc::rlim_t| unsafe {
        // Without this the signal, not the error, would reach us.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    };
    let model = Double::new();
    let mut trainer = trainer(&model, args(out));
    trainer.train_steps(5).unwrap();
    let good = fs::read(out.join("checkpoint-3/optimizer.safetensors")).unwrap();
    limit(600);
    let error = trainer.train().unwrap_err();
    let weights = model.weights();
    assert!(matches!(&error, Error::Io { path, .. } if path.starts_with(out.join("checkpoint-6"))), "{error}");
    assert_eq!(names(out), ["checkpoint-3"]);
    assert_eq!(fs::read(out.join("checkpoint-3/optimizer.safetensors")).unwrap(), good);
    assert_eq!(trainer.state().global_step, 6, "the last update was made before the save");
    limit(libc::RLIM_INFINITY);
    assert!(trainer.train().unwrap().finished);
    assert_eq!(model.weights(), weights);
}
