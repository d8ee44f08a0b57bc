//! Step 5: how to train.
//!
//! Every field changes something. An argument of Hugging Face's that is missing here is not
//! honoured here, and naming it is a compile error instead of a silence.

use std::{fmt, path::PathBuf};

use serde_json::{Map, Value, json};

use crate::{
    error::{Error, Result},
    optim::{Optim, SchedulerType},
};

/// The arguments of a training run, with the names and defaults of transformers 5.
///
/// ```
/// use qlora_nb::training_args::TrainingArguments;
/// let args = TrainingArguments {
///     output_dir: "out/qlora".into(),
///     per_device_train_batch_size: 4,
///     gradient_accumulation_steps: 8,
///     logging_steps: 20,
///     num_train_epochs: 1,
///     gradient_checkpointing: true,
///     ..Default::default()
/// };
/// assert_eq!(args.learning_rate, 5e-5);
/// args.validate().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingArguments {
    /// Where `checkpoint-N` folders go; made if need be. A leading `~/` is the home folder.
    pub output_dir: PathBuf,
    /// Rows a micro-batch.
    pub per_device_train_batch_size: usize,
    /// Rows a batch of evaluation.
    pub per_device_eval_batch_size: usize,
    /// Micro-batches an update. The loss is divided by the labels of all of them, so the split
    /// changes memory, not the result.
    pub gradient_accumulation_steps: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Decoupled decay of the weights; SGD adds it to the gradient.
    pub weight_decay: f64,
    /// Of AdamW and, as in transformers, of Lion, whose authors use 0.9 and 0.99.
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm; 0 leaves them as they are.
    pub max_grad_norm: f64,
    /// Whole passes over the data. For a part of a pass set `max_steps`.
    pub num_train_epochs: usize,
    /// Updates in all, in place of `num_train_epochs`; -1 leaves it to the epochs.
    pub max_steps: isize,
    /// How the learning rate moves after the warm-up.
    pub lr_scheduler_type: SchedulerType,
    /// Updates over which the learning rate rises from 0.
    pub warmup_steps: usize,
    /// The same as a share of all updates, 0 to 1. Set one of the two.
    pub warmup_ratio: f64,
    /// When to log.
    pub logging_strategy: IntervalStrategy,
    /// Updates between two log entries.
    pub logging_steps: usize,
    /// Also log the first update.
    pub logging_first_step: bool,
    /// When to save a checkpoint. With `Steps` one is saved at the end, too.
    pub save_strategy: SaveStrategy,
    /// Updates between two checkpoints.
    pub save_steps: usize,
    /// How many checkpoints to keep; older ones are deleted after a newer one is safely
    /// written. None keeps all.
    pub save_total_limit: Option<usize>,
    /// When to evaluate; needs an evaluation dataset.
    pub eval_strategy: IntervalStrategy,
    /// Updates between two evaluations; None takes `logging_steps`.
    pub eval_steps: Option<usize>,
    /// Also evaluate before the first update.
    pub eval_on_start: bool,
    /// After training, put back the adapters of the checkpoint with the lowest evaluation loss.
    pub load_best_model_at_end: bool,
    /// Of dropout and, unless `data_seed` is set, of the order of the rows.
    pub seed: u64,
    /// Of the order of the rows alone.
    pub data_seed: Option<u64>,
    /// Whether the rows are shuffled.
    pub train_sampling_strategy: SamplingStrategy,
    /// Leave out the last batch of an epoch if it has fewer rows than the others.
    pub dataloader_drop_last: bool,
    /// Compute in bf16 where the device gains from it. The CPU computes in f32, which is more
    /// exact; there a note says so and nothing else changes.
    pub bf16: bool,
    /// Compute in f16; see `bf16`.
    pub fp16: bool,
    /// Keep only the input of each block and compute its inside again on the way back: less
    /// memory, more time, the same numbers bit for bit.
    pub gradient_checkpointing: bool,
    /// The optimizer.
    pub optim: Optim,
    /// Show no progress and no log lines.
    pub disable_tqdm: bool,
}

/// When something happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IntervalStrategy {
    /// Never.
    #[default]
    No,
    /// Every so many updates.
    Steps,
    /// After each epoch.
    Epoch,
}

/// When a checkpoint is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SaveStrategy {
    /// Never.
    No,
    /// Every `save_steps` updates, and at the end.
    #[default]
    Steps,
    /// After each epoch.
    Epoch,
    /// After each evaluation whose loss is the lowest so far.
    Best,
}

/// The order of the rows in an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SamplingStrategy {
    /// A new permutation each epoch, PyTorch's for the same seed.
    #[default]
    Random,
    /// As they are in the dataset.
    Sequential,
}

impl Default for TrainingArguments {
    fn default() -> Self {
        Self {
            output_dir: "trainer_output".into(),
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 8,
            gradient_accumulation_steps: 1,
            learning_rate: 5e-5,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            num_train_epochs: 3,
            max_steps: -1,
            lr_scheduler_type: SchedulerType::default(),
            warmup_steps: 0,
            warmup_ratio: 0.0,
            logging_strategy: IntervalStrategy::Steps,
            logging_steps: 500,
            logging_first_step: false,
            save_strategy: SaveStrategy::Steps,
            save_steps: 500,
            save_total_limit: None,
            eval_strategy: IntervalStrategy::No,
            eval_steps: None,
            eval_on_start: false,
            load_best_model_at_end: false,
            seed: 42,
            data_seed: None,
            train_sampling_strategy: SamplingStrategy::Random,
            dataloader_drop_last: false,
            bf16: false,
            fp16: false,
            gradient_checkpointing: false,
            optim: Optim::default(),
            disable_tqdm: false,
        }
    }
}

impl TrainingArguments {
    /// Refuses values outside their domain and combinations that contradict each other.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the argument's name.
    pub fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("per_device_train_batch_size", self.per_device_train_batch_size),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("logging_steps", self.logging_steps),
            ("save_steps", self.save_steps),
            ("eval_steps", self.eval_steps()),
            ("save_total_limit", self.save_total_limit.unwrap_or(1)),
        ];
        for (name, value) in at_least_one {
            check(name, value, value >= 1, "at least 1", "to switch it off use its strategy, or None")?;
        }
        let not_negative = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
        ];
        for (name, value) in not_negative {
            check(name, value, value >= 0.0 && value.is_finite(), "a number of 0 or more", "see its default")?;
        }
        for (name, value) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            check(name, value, (0.0..1.0).contains(&value), "0 or more and less than 1", "use 0.9 and 0.999")?;
        }
        let epsilon = self.adam_epsilon;
        check("adam_epsilon", epsilon, epsilon > 0.0 && epsilon.is_finite(), "more than 0", "use 1e-8")?;
        let ratio = self.warmup_ratio;
        check(
            "warmup_ratio",
            ratio,
            (0.0..=1.0).contains(&ratio),
            "a share from 0 to 1",
            "for a count use warmup_steps",
        )?;
        let one_warmup = ratio == 0.0 || self.warmup_steps == 0;
        check("warmup_ratio", ratio, one_warmup, "0 when warmup_steps is set", "set one of the two")?;
        let constant = self.lr_scheduler_type == SchedulerType::Constant && (ratio > 0.0 || self.warmup_steps > 0);
        check("lr_scheduler_type", "constant", !constant, "a schedule with a warm-up", "use ConstantWithWarmup")?;
        let steps = self.max_steps;
        check("max_steps", steps, steps == -1 || steps > 0, "-1, or at least 1", "-1 trains for num_train_epochs")?;
        let epochs = self.num_train_epochs;
        check(
            "num_train_epochs",
            epochs,
            epochs > 0 || steps > 0,
            "at least 1",
            "for a part of an epoch use max_steps",
        )?;
        check("bf16", true, !(self.bf16 && self.fp16), "false when fp16 is true", "set one of the two")?;
        let no_folder = self.output_dir.as_os_str().is_empty();
        check("output_dir", "\"\"", !no_folder, "a folder", "name one, e.g. \"out/qlora\"")?;
        self.validate_strategies()
    }

    fn validate_strategies(&self) -> Result<()> {
        let evaluates = self.eval_strategy != IntervalStrategy::No;
        let best = self.save_strategy == SaveStrategy::Best;
        check("save_strategy", "Best", !best || evaluates, "an eval_strategy beside it", "set eval_strategy")?;
        if !self.load_best_model_at_end || best {
            return Ok(());
        }
        let same = matches!(
            (self.eval_strategy, self.save_strategy),
            (IntervalStrategy::Steps, SaveStrategy::Steps) | (IntervalStrategy::Epoch, SaveStrategy::Epoch)
        );
        let name = "load_best_model_at_end";
        let remedy = "set both to Steps or both to Epoch, or save_strategy to Best";
        check(name, true, same, "an eval_strategy equal to save_strategy, so that the best is saved", remedy)?;
        let multiple =
            self.eval_strategy == IntervalStrategy::Epoch || self.save_steps.is_multiple_of(self.eval_steps());
        check(name, true, multiple, "save_steps to be a multiple of eval_steps", "set save_steps equal to eval_steps")
    }

    /// Updates between two evaluations.
    pub fn eval_steps(&self) -> usize {
        let default = if self.eval_strategy == IntervalStrategy::Steps { self.logging_steps } else { 500 };
        self.eval_steps.unwrap_or(default)
    }

    /// Updates of warm-up in a run of `max_steps`.
    pub fn warmup_steps(&self, max_steps: usize) -> usize {
        match self.warmup_steps {
            0 => (max_steps as f64 * self.warmup_ratio).ceil() as usize,
            steps => steps,
        }
    }

    /// `output_dir` with `~/` resolved.
    pub fn output_dir(&self) -> PathBuf {
        match (self.output_dir.strip_prefix("~"), std::env::var_os("HOME")) {
            (Ok(rest), Some(home)) => PathBuf::from(home).join(rest),
            _ => self.output_dir.clone(),
        }
    }

    /// Every argument by name, as `training_args.json` holds them.
    pub(crate) fn to_json(&self) -> Map<String, Value> {
        // No `..`: a field that is added and forgotten here does not compile.
        let Self {
            output_dir,
            per_device_train_batch_size,
            per_device_eval_batch_size,
            gradient_accumulation_steps,
            learning_rate,
            weight_decay,
            adam_beta1,
            adam_beta2,
            adam_epsilon,
            max_grad_norm,
            num_train_epochs,
            max_steps,
            lr_scheduler_type,
            warmup_steps,
            warmup_ratio,
            logging_strategy,
            logging_steps,
            logging_first_step,
            save_strategy,
            save_steps,
            save_total_limit,
            eval_strategy,
            eval_steps,
            eval_on_start,
            load_best_model_at_end,
            seed,
            data_seed,
            train_sampling_strategy,
            dataloader_drop_last,
            bf16,
            fp16,
            gradient_checkpointing,
            optim,
            disable_tqdm,
        } = self;
        let all = json!({
            "output_dir": output_dir.to_string_lossy(),
            "per_device_train_batch_size": per_device_train_batch_size,
            "per_device_eval_batch_size": per_device_eval_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "adam_beta1": adam_beta1,
            "adam_beta2": adam_beta2,
            "adam_epsilon": adam_epsilon,
            "max_grad_norm": max_grad_norm,
            "num_train_epochs": num_train_epochs,
            "max_steps": max_steps,
            "lr_scheduler_type": lr_scheduler_type.to_string(),
            "warmup_steps": warmup_steps,
            "warmup_ratio": warmup_ratio,
            "logging_strategy": logging_strategy.to_string(),
            "logging_steps": logging_steps,
            "logging_first_step": logging_first_step,
            "save_strategy": save_strategy.to_string(),
            "save_steps": save_steps,
            "save_total_limit": save_total_limit,
            "eval_strategy": eval_strategy.to_string(),
            "eval_steps": eval_steps,
            "eval_on_start": eval_on_start,
            "load_best_model_at_end": load_best_model_at_end,
            "seed": seed,
            "data_seed": data_seed,
            "train_sampling_strategy": train_sampling_strategy.to_string(),
            "dataloader_drop_last": dataloader_drop_last,
            "bf16": bf16,
            "fp16": fp16,
            "gradient_checkpointing": gradient_checkpointing,
            "optim": optim.to_string(),
            "disable_tqdm": disable_tqdm,
        });
        match all {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }
}

fn check(name: &str, got: impl fmt::Display, fine: bool, expected: &str, remedy: &str) -> Result<()> {
    if fine { Ok(()) } else { Err(Error::argument(name, got, expected, remedy)) }
}

impl fmt::Display for IntervalStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::No => "no",
            Self::Steps => "steps",
            Self::Epoch => "epoch",
        })
    }
}

impl fmt::Display for SaveStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::No => "no",
            Self::Steps => "steps",
            Self::Epoch => "epoch",
            Self::Best => "best",
        })
    }
}

impl fmt::Display for SamplingStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(args: TrainingArguments) -> String {
        match args.validate() {
            Err(Error::InvalidArgument { name, .. }) => name,
            other => panic!("{other:?} for {args:?}"),
        }
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let args = TrainingArguments::default();
        args.validate().unwrap();
        let fields = args.to_json();
        assert_eq!(fields.len(), 34);
        assert_eq!(fields["eval_strategy"], "no");
        assert_eq!(fields["save_strategy"], "steps");
        assert_eq!(fields["train_sampling_strategy"], "random");
    }

    #[test]
    fn values_outside_their_domain_are_refused_by_name() {
        let d = TrainingArguments::default;
        for (args, name) in [
            (TrainingArguments { per_device_train_batch_size: 0, ..d() }, "per_device_train_batch_size"),
            (TrainingArguments { per_device_eval_batch_size: 0, ..d() }, "per_device_eval_batch_size"),
            (TrainingArguments { gradient_accumulation_steps: 0, ..d() }, "gradient_accumulation_steps"),
            (TrainingArguments { logging_steps: 0, ..d() }, "logging_steps"),
            (TrainingArguments { save_steps: 0, ..d() }, "save_steps"),
            (TrainingArguments { save_total_limit: Some(0), ..d() }, "save_total_limit"),
            (TrainingArguments { eval_steps: Some(0), ..d() }, "eval_steps"),
            (TrainingArguments { learning_rate: -1e-3, ..d() }, "learning_rate"),
            (TrainingArguments { learning_rate: f64::NAN, ..d() }, "learning_rate"),
            (TrainingArguments { weight_decay: f64::INFINITY, ..d() }, "weight_decay"),
            (TrainingArguments { max_grad_norm: -1.0, ..d() }, "max_grad_norm"),
            (TrainingArguments { adam_beta1: 1.0, ..d() }, "adam_beta1"),
            (TrainingArguments { adam_beta2: -0.1, ..d() }, "adam_beta2"),
            (TrainingArguments { adam_epsilon: 0.0, ..d() }, "adam_epsilon"),
            (TrainingArguments { warmup_ratio: 1.5, ..d() }, "warmup_ratio"),
            (TrainingArguments { warmup_ratio: 0.1, warmup_steps: 3, ..d() }, "warmup_ratio"),
            (
                TrainingArguments { lr_scheduler_type: SchedulerType::Constant, warmup_steps: 3, ..d() },
                "lr_scheduler_type",
            ),
            (TrainingArguments { max_steps: 0, ..d() }, "max_steps"),
            (TrainingArguments { max_steps: -2, ..d() }, "max_steps"),
            (TrainingArguments { num_train_epochs: 0, ..d() }, "num_train_epochs"),
            (TrainingArguments { bf16: true, fp16: true, ..d() }, "bf16"),
            (TrainingArguments { output_dir: "".into(), ..d() }, "output_dir"),
            (TrainingArguments { save_strategy: SaveStrategy::Best, ..d() }, "save_strategy"),
            (TrainingArguments { load_best_model_at_end: true, ..d() }, "load_best_model_at_end"),
            (
                TrainingArguments {
                    load_best_model_at_end: true,
                    eval_strategy: IntervalStrategy::Steps,
                    eval_steps: Some(3),
                    save_steps: 10,
                    ..d()
                },
                "load_best_model_at_end",
            ),
        ] {
            assert_eq!(refused(args), name);
        }
    }

    #[test]
    fn warmup_is_a_count_or_a_share() {
        let share = TrainingArguments { warmup_ratio: 0.03, ..Default::default() };
        assert_eq!(share.warmup_steps(150), 5);
        let count = TrainingArguments { warmup_steps: 7, ..Default::default() };
        assert_eq!(count.warmup_steps(150), 7);
    }

    #[test]
    fn the_home_folder_is_resolved() {
        let args = TrainingArguments { output_dir: "~/out".into(), ..Default::default() };
        if let Some(home) = std::env::var_os("HOME") {
            assert_eq!(args.output_dir(), PathBuf::from(home).join("out"));
        }
    }
}
