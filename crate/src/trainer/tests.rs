//! The trainer on a stand-in model: what it promises, and every way to stop it and go on.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use super::{
    double::{Double, collator, dataset, gradients_are_zero, rows},
    *,
};
use crate::{
    interrupt,
    optim::{Optim, SchedulerType},
};

mod faults;
mod screen;

/// A log's names and numbers, entry by entry.
type Log = Vec<Vec<(String, f64)>>;

fn args(dir: &Path) -> TrainingArguments {
    TrainingArguments {
        output_dir: dir.to_owned(),
        per_device_train_batch_size: 3,
        gradient_accumulation_steps: 2,
        num_train_epochs: 2,
        learning_rate: 0.05,
        logging_steps: 2,
        save_steps: 3,
        disable_tqdm: true,
        ..Default::default()
    }
}

fn trainer(model: &Arc<Double>, args: TrainingArguments) -> Trainer {
    Trainer::on(model.clone(), args, &dataset(&rows(16)), collator()).unwrap()
}

/// The log without what the clock says.
fn log(trainer: &Trainer) -> Log {
    let timed = |name: &str| name.ends_with("_runtime") || name.ends_with("_per_second");
    let entry = |e: &LogEntry| e.iter().filter(|(n, _)| !timed(n)).map(|(n, v)| (n.to_owned(), v)).collect();
    trainer.log_history().iter().map(entry).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What an uninterrupted run gives: 16 rows, batch 3, 2 a window: 6 micro-batches, 3 updates an epoch.
fn whole(args: TrainingArguments, dropout: bool) -> (Vec<f32>, Log, f64) {
    let model = Double::with(dropout);
    let mut trainer = trainer(&model, args).with_eval_dataset(&dataset(&rows(5))).unwrap();
    let output = trainer.train().unwrap();
    assert!(output.finished && !output.interrupted);
    (model.weights(), log(&trainer), output.training_loss)
}

#[test]
fn a_run_logs_saves_and_ends_as_in_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let model = Double::new();
    let mut trainer = trainer(&model, TrainingArguments { logging_first_step: true, ..args(dir.path()) });
    let output = trainer.train().unwrap();
    assert_eq!((output.global_step, output.finished), (6, true));
    let steps: Vec<f64> = trainer.log_history().iter().map(|e| e.get("step").unwrap()).collect();
    assert_eq!(steps, [1.0, 2.0, 4.0, 6.0, 6.0]);
    let keys = |e: &LogEntry| e.iter().map(|(n, _)| n.to_owned()).collect::<Vec<_>>();
    assert_eq!(keys(&trainer.log_history()[0]), ["loss", "grad_norm", "learning_rate", "epoch", "step"]);
    assert_eq!(
        keys(&trainer.log_history()[4]),
        ["train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch", "step"]
    );
    assert_eq!(keys(&output.metrics)[3..], ["train_loss", "epoch"]);
    let rate = |i: usize| trainer.log_history()[i].get("learning_rate").unwrap();
    assert_eq!((rate(0), rate(3)), (0.05, 0.05 * (1.0 / 6.0)));
    assert_eq!(names(dir.path()), ["checkpoint-3", "checkpoint-6"]);
    assert_eq!(
        names(&dir.path().join("checkpoint-3")),
        [
            "adapter_model.safetensors",
            "optimizer.safetensors",
            "progress.json",
            "rng_state.json",
            "scheduler.json",
            "trainer_state.json",
            "training_args.json"
        ]
    );
    let text = fs::read_to_string(dir.path().join("checkpoint-3/trainer_state.json")).unwrap();
    assert!(text.starts_with("{\n  \"best_global_step\": null,\n") && text.ends_with("}\n"), "{text}");
    assert!(output.to_string().starts_with("TrainOutput(global_step=6, training_loss="), "{output}");
    // The losses fall: gradients have the right sign and the optimizer is called.
    let losses = trainer.state().curve("loss");
    assert!(losses[3].1 < losses[0].1 - 0.05, "{losses:?}");
    // The run is over: the same output, nothing trained.
    let weights = model.weights();
    assert_eq!(trainer.train().unwrap(), output);
    assert_eq!(model.weights(), weights);
}

#[test]
fn a_checkpoint_is_saved_at_the_end_even_between_two_multiples() {
    let dir = tempfile::tempdir().unwrap();
    trainer(&Double::new(), TrainingArguments { max_steps: 4, ..args(dir.path()) }).train().unwrap();
    assert_eq!(names(dir.path()), ["checkpoint-3", "checkpoint-4"]);
    let dir = tempfile::tempdir().unwrap();
    let each_epoch = TrainingArguments { save_strategy: SaveStrategy::Epoch, max_steps: 4, ..args(dir.path()) };
    trainer(&Double::new(), each_epoch).train().unwrap();
    // An epoch that is cut short ends as well.
    assert_eq!(names(dir.path()), ["checkpoint-3", "checkpoint-4"]);
    let dir = tempfile::tempdir().unwrap();
    trainer(&Double::new(), TrainingArguments { save_strategy: SaveStrategy::No, ..args(dir.path()) }).train().unwrap();
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn splitting_a_batch_changes_neither_loss_nor_weights() {
    let dir = tempfile::tempdir().unwrap();
    let run = |batch: usize, accumulation: usize| {
        let model = Double::new();
        let args = TrainingArguments {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            logging_steps: 1,
            ..args(dir.path())
        };
        let mut trainer = trainer(&model, args);
        trainer.train().unwrap();
        (trainer.state().curve("loss"), model.weights())
    };
    let (losses, weights) = run(8, 1);
    for (batch, accumulation) in [(4, 2), (2, 4), (1, 8)] {
        let (l, w) = run(batch, accumulation);
        assert_eq!(l.len(), losses.len());
        for (a, b) in l.iter().zip(&losses) {
            assert!((a.1 - b.1).abs() < 1e-5, "{a:?} {b:?}");
        }
        assert!(w.iter().zip(&weights).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_numbers() {
    let expected = whole(args(tempfile::tempdir().unwrap().path()), true);
    for pass in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let model = Double::with(true);
        let mut trainer = trainer(&model, args(dir.path()));
        model.before_pass(move |n| {
            if n == pass {
                interrupt::request();
            }
            0.0
        });
        let output = trainer.train().unwrap();
        // The last micro-batch of the last window completes the run.
        assert_eq!(output.interrupted, pass < 11, "pass {pass}");
        assert!(gradients_are_zero(&model));
        assert_eq!(output.global_step, if pass % 2 == 0 { pass / 2 } else { pass / 2 + 1 });
        model.no_hook();
        let output = trainer.train().unwrap();
        assert!(output.finished && !interrupt::requested());
        assert_eq!((model.weights(), log(&trainer), output.training_loss), expected, "pass {pass}");
    }
}

#[test]
fn every_micro_batch_has_dropout_masks_of_its_own() {
    let keys = |seed: u64| {
        let dir = tempfile::tempdir().unwrap();
        let model = Double::with(true);
        trainer(&model, TrainingArguments { seed, ..args(dir.path()) }).train().unwrap();
        model.options().iter().map(|options| options.dropout_key).collect::<Vec<_>>()
    };
    let (a, b) = (keys(1), keys(2));
    assert_eq!(a, keys(1));
    let mut all = [a, b].concat();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 24);
}

/// An argument that is not honoured does not exist.
#[test]
fn every_argument_of_the_arithmetic_reaches_it() {
    let base = whole(args(tempfile::tempdir().unwrap().path()), false).0;
    type Change = (&'static str, fn(&mut TrainingArguments));
    let changes: [Change; 13] = [
        ("per_device_train_batch_size", |a| a.per_device_train_batch_size = 2),
        ("gradient_accumulation_steps", |a| a.gradient_accumulation_steps = 3),
        ("num_train_epochs", |a| a.num_train_epochs = 3),
        ("max_steps", |a| a.max_steps = 5),
        ("learning_rate", |a| a.learning_rate = 0.06),
        ("lr_scheduler_type", |a| a.lr_scheduler_type = SchedulerType::Cosine),
        ("warmup_steps", |a| a.warmup_steps = 2),
        ("warmup_ratio", |a| a.warmup_ratio = 0.5),
        ("weight_decay", |a| a.weight_decay = 0.1),
        ("adam_beta1", |a| a.adam_beta1 = 0.8),
        ("adam_beta2", |a| a.adam_beta2 = 0.9),
        ("adam_epsilon", |a| a.adam_epsilon = 1e-3),
        ("seed", |a| a.seed = 1),
    ];
    for (name, change) in changes {
        let dir = tempfile::tempdir().unwrap();
        let mut changed = args(dir.path());
        change(&mut changed);
        assert_ne!(whole(changed, false).0, base, "{name}");
    }
    for gradient_checkpointing in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let model = Double::new();
        trainer(&model, TrainingArguments { gradient_checkpointing, ..args(dir.path()) }).train_steps(1).unwrap();
        assert!(model.options().iter().all(|options| options.gradient_checkpointing == gradient_checkpointing));
    }
}

#[test]
fn sigint_stops_training_and_not_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let model = Double::new();
    model.before_pass(|n| {
        if n == 5 {
            // SAFETY: raise has no preconditions; the trainer's guard has installed its handler.
            unsafe { libc::raise(libc::SIGINT) };
        }
        0.0
    });
    let output = trainer(&model, args(dir.path())).train().unwrap();
    assert!(output.interrupted && output.global_step == 3);
    assert!(output.to_string().contains("trainer.train() goes on from here"), "{output}");
}

#[test]
fn train_steps_add_up_to_train() {
    let expected = whole(args(tempfile::tempdir().unwrap().path()), true);
    let dir = tempfile::tempdir().unwrap();
    let model = Double::with(true);
    let mut trainer = trainer(&model, args(dir.path()));
    assert_eq!(trainer.train_steps(0).unwrap().global_step, 0);
    let first = trainer.train_steps(1).unwrap();
    let second = trainer.train_steps(1).unwrap();
    assert_eq!((first.global_step, first.finished, second.global_step), (1, false, 2));
    // Each call reports its own updates; the log the mean of both.
    let logged = trainer.log_history()[0].get("loss").unwrap();
    assert!(((first.training_loss + second.training_loss) / 2.0 - logged).abs() < 1e-12);
    assert!(trainer.train_steps(100).unwrap().finished);
    assert_eq!(model.weights(), expected.0);
    let losses = |log: &Log| log[..3].to_vec();
    assert_eq!(losses(&log(&trainer)), losses(&expected.1));
}

#[test]
fn a_resumed_run_is_the_uninterrupted_run_bit_for_bit() {
    // Saves that fall between two log entries, at an epoch's end, and beside evaluations.
    for eval_strategy in [IntervalStrategy::No, IntervalStrategy::Steps, IntervalStrategy::Epoch] {
        let dir = tempfile::tempdir().unwrap();
        let args = TrainingArguments {
            save_steps: 1,
            eval_strategy,
            logging_strategy: IntervalStrategy::Steps,
            lr_scheduler_type: SchedulerType::Linear,
            warmup_steps: 2,
            ..args(dir.path())
        };
        let expected = whole(args.clone(), true);
        for step in 1..=6 {
            // A process that knows nothing but the folder.
            let model = Double::with(true);
            let mut trainer = trainer(&model, args.clone()).with_eval_dataset(&dataset(&rows(5))).unwrap();
            let checkpoint = dir.path().join(format!("checkpoint-{step}"));
            let copy = dir.path().join("copy").join(format!("checkpoint-{step}"));
            copy_folder(&checkpoint, &copy);
            let output = trainer.resume_from_checkpoint(&copy).unwrap();
            assert_eq!(
                (model.weights(), log(&trainer), output.training_loss),
                expected,
                "{eval_strategy}, step {step}"
            );
        }
    }
}

#[test]
fn every_optimizer_trains_resumes_and_is_in_the_memory_plan() {
    for &optim in Optim::ALL {
        let dir = tempfile::tempdir().unwrap();
        let args = TrainingArguments { optim, weight_decay: 0.01, ..args(dir.path()) };
        let (start, expected) = (Double::new().weights(), whole(args.clone(), true));
        assert!(start.iter().zip(&expected.0).all(|(a, b)| a != b && b.is_finite()), "{optim}");
        let model = Double::with(true);
        let mut trainer = trainer(&model, args).with_eval_dataset(&dataset(&rows(5))).unwrap();
        trainer.resume_from_checkpoint(dir.path().join("checkpoint-3")).unwrap();
        assert_eq!(model.weights(), expected.0, "{optim}");
        let plan = trainer.memory_plan().unwrap();
        let terms = plan.terms.iter().filter(|term| term.name == format!("optimizer state ({optim})"));
        assert_eq!(terms.map(|term| term.bytes).sum::<usize>(), trainer.optimizer.num_bytes(), "{optim}");
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

#[test]
fn evaluation_is_logged_and_the_best_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let args = TrainingArguments {
        eval_strategy: IntervalStrategy::Steps,
        eval_steps: Some(1),
        save_steps: 1,
        save_total_limit: Some(1),
        eval_on_start: true,
        load_best_model_at_end: true,
        // The evaluation loss falls, then this schedule throws the weights far off.
        ..args(dir.path())
    };
    let model = Double::new();
    let schedule = |step: usize| if step < 3 { 0.05 } else { 3.0 };
    let eval = dataset(&rows(5));
    let mut trainer = trainer(&model, args).with_eval_dataset(&eval).unwrap().with_lr_schedule(schedule);
    trainer.train().unwrap();
    let losses = trainer.state().curve("eval_loss");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(trainer.state().best_global_step, Some(3));
    assert_eq!(trainer.state().best_metric, Some(losses[3].1));
    assert_eq!(names(dir.path()), ["checkpoint-3"]);
    let now = trainer.evaluate().unwrap();
    assert_eq!(now.get("eval_loss"), Some(losses[3].1), "the best weights are back");
    let keys: Vec<_> = now.iter().map(|(n, _)| n).collect();
    assert_eq!(keys, ["eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"]);
}

/// A run whose folder was moved, or that is named by another path, keeps its best checkpoint.
#[test]
fn the_best_is_kept_when_a_moved_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let run = |out: &Path| {
        let args = TrainingArguments {
            eval_strategy: IntervalStrategy::Steps,
            eval_steps: Some(1),
            save_steps: 1,
            save_total_limit: Some(2),
            load_best_model_at_end: true,
            ..args(out)
        };
        let schedule = |step: usize| if step < 3 { 0.05 } else { 3.0 };
        trainer(&Double::new(), args).with_eval_dataset(&dataset(&rows(5))).unwrap().with_lr_schedule(schedule)
    };
    run(&dir.path().join("first")).train_steps(4).unwrap();
    fs::rename(dir.path().join("first"), dir.path().join("moved")).unwrap();
    let out = dir.path().join("moved/../moved");
    let mut resumed = run(&out);
    assert!(resumed.resume_from_checkpoint(dir.path().join("moved/checkpoint-4")).unwrap().finished);
    assert_eq!(names(&out), ["checkpoint-3", "checkpoint-6"]);
    let best = resumed.state().best_metric;
    assert_eq!(resumed.evaluate().unwrap().get("eval_loss"), best);
    // Without it the run ends all the same.
    let mut alone = run(&dir.path().join("alone"));
    alone.load_checkpoint(dir.path().join("moved/checkpoint-6")).unwrap();
    fs::remove_dir_all(dir.path().join("moved/checkpoint-3")).unwrap();
    assert!(alone.train().unwrap().finished);
}

#[test]
fn the_best_strategy_saves_only_improvements() {
    let dir = tempfile::tempdir().unwrap();
    let args = TrainingArguments {
        eval_strategy: IntervalStrategy::Steps,
        eval_steps: Some(1),
        save_strategy: SaveStrategy::Best,
        ..args(dir.path())
    };
    let schedule = |step: usize| if step < 3 { 0.05 } else { 3.0 };
    let eval = dataset(&rows(5));
    trainer(&Double::new(), args).with_eval_dataset(&eval).unwrap().with_lr_schedule(schedule).train().unwrap();
    assert_eq!(names(dir.path()), ["checkpoint-1", "checkpoint-2", "checkpoint-3"]);
}

#[test]
fn evaluation_needs_a_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let asked = TrainingArguments { eval_strategy: IntervalStrategy::Epoch, ..args(dir.path()) };
    let mut trainer = trainer(&Double::new(), asked);
    assert!(trainer.train().unwrap_err().to_string().contains("with_eval_dataset"));
    assert!(trainer.evaluate().unwrap_err().to_string().contains("with_eval_dataset"));
    let mut trainer = trainer.with_eval_dataset(&dataset(&rows(5))).unwrap();
    interrupt::request();
    assert!(matches!(trainer.evaluate().unwrap_err(), Error::Interrupted { .. }));
    assert!(trainer.evaluate().is_ok(), "one request stops one call");
}

#[test]
fn callbacks_see_every_event_and_can_stop() {
    struct Recorder(Arc<Mutex<Vec<String>>>);
    impl TrainerCallback for Recorder {
        fn on_train_begin(&mut self, _: &TrainingArguments, s: &TrainerState, _: &mut TrainerControl) {
            self.0.lock().unwrap().push(format!("begin {}", s.global_step));
        }
        fn on_train_end(&mut self, _: &TrainingArguments, s: &TrainerState, _: &mut TrainerControl) {
            self.0.lock().unwrap().push(format!("end {}", s.global_step));
        }
        fn on_step_end(&mut self, _: &TrainingArguments, s: &TrainerState, control: &mut TrainerControl) {
            self.0.lock().unwrap().push(format!("step {}", s.global_step));
            if s.global_step == 4 {
                control.should_save = true;
                control.should_training_stop = true;
            }
        }
        fn on_epoch_end(&mut self, _: &TrainingArguments, s: &TrainerState, _: &mut TrainerControl) {
            self.0.lock().unwrap().push(format!("epoch {}", s.epoch));
        }
        fn on_log(&mut self, _: &TrainingArguments, _: &TrainerState, _: &mut TrainerControl, logs: &LogEntry) {
            self.0.lock().unwrap().push(format!("log {}", logs.get("step").unwrap()));
        }
        fn on_evaluate(&mut self, _: &TrainingArguments, _: &TrainerState, _: &mut TrainerControl, m: &LogEntry) {
            self.0.lock().unwrap().push(format!("evaluate {}", m.get("eval_loss").is_some()));
        }
        fn on_save(&mut self, _: &TrainingArguments, _: &TrainerState, _: &mut TrainerControl, folder: &Path) {
            self.0.lock().unwrap().push(format!("save {}", folder.file_name().unwrap().display()));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let args = TrainingArguments { eval_strategy: IntervalStrategy::Epoch, ..args(dir.path()) };
    let mut trainer = trainer(&Double::new(), args)
        .with_eval_dataset(&dataset(&rows(5)))
        .unwrap()
        .with_callback(Recorder(seen.clone()));
    let output = trainer.train().unwrap();
    assert!(!output.finished && !output.interrupted);
    let first = "begin 0, step 1, step 2, log 2, step 3, save checkpoint-3, epoch 1, log 3, evaluate true, step 4, log 4, \
                 save checkpoint-4, epoch 1.3333333333333333, log 4, evaluate true, log 4, end 4";
    assert_eq!(seen.lock().unwrap().join(", "), first);
    seen.lock().unwrap().clear();
    assert!(trainer.train().unwrap().finished, "train goes on after a stop");
    assert!(seen.lock().unwrap().join(", ").starts_with("begin 4, step 5"));
}

#[test]
fn the_own_schedule_is_used_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let model = Double::new();
    let args = TrainingArguments { logging_steps: 1, save_strategy: SaveStrategy::No, ..args(dir.path()) };
    let mut trainer =
        trainer(&model, args).with_lr_schedule(|step| if step == 4 { f64::NAN } else { 0.01 * step as f64 });
    let error = trainer.train().unwrap_err();
    assert!(error.to_string().contains("step 4"), "{error}");
    let rates: Vec<f64> = trainer.state().curve("learning_rate").iter().map(|(_, lr)| *lr).collect();
    assert_eq!(rates, [0.0, 0.01, 0.02, 0.03]);
}

#[test]
fn max_grad_norm_0_leaves_gradients_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let norms = |max_grad_norm: f64| {
        let model = Double::new();
        let args = TrainingArguments { max_grad_norm, logging_steps: 1, max_steps: 2, ..args(dir.path()) };
        let mut trainer = trainer(&model, args);
        trainer.train().unwrap();
        (trainer.state().curve("grad_norm"), model.weights())
    };
    let (free, free_weights) = norms(0.0);
    let (loose, loose_weights) = norms(1e6);
    assert_eq!((&free, &free_weights), (&loose, &loose_weights));
    let (tight, tight_weights) = norms(1e-6);
    assert_eq!(tight[0], free[0], "the norm before clipping is logged");
    assert_ne!(tight_weights, free_weights);
}

#[test]
fn a_trainer_can_be_sent_to_another_thread() {
    fn send<T: Send>() {}
    send::<Trainer>();
}
