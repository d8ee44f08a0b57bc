//! Step 5: how to train.
//!
//! Every field changes something. An argument of Hugging Face's that is missing here is not
//! honoured here, and naming it is a compile error instead of a silence.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::{
    error::{Result, ensure},
    names::{named, with_defaults},
    optim::{
        Optim,
        lr_scheduler::{SchedulerType, warmup_steps},
    },
};

with_defaults! {
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
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainingArguments {
    /// Where `checkpoint-N` folders go; made if need be. A leading `~/` is the home folder.
    #[serde(serialize_with = "path_as_text")]
    pub output_dir: PathBuf = "trainer_output".into(),
    /// Rows a micro-batch.
    pub per_device_train_batch_size: usize = 8,
    /// Rows a batch of evaluation.
    pub per_device_eval_batch_size: usize = 8,
    /// Micro-batches an update. The loss is divided by the labels of all of them, so the split
    /// changes memory, not the result.
    pub gradient_accumulation_steps: usize = 1,
    /// The highest learning rate.
    pub learning_rate: f64 = 5e-5,
    /// Decoupled decay of the weights; SGD adds it to the gradient.
    pub weight_decay: f64 = 0.0,
    /// Of AdamW and, as in transformers, of Lion, whose authors use 0.9 and 0.99.
    pub adam_beta1: f64 = 0.9,
    pub adam_beta2: f64 = 0.999,
    pub adam_epsilon: f64 = 1e-8,
    /// Gradients are scaled down to this norm; 0 leaves them as they are.
    pub max_grad_norm: f64 = 1.0,
    /// Whole passes over the data. For a part of a pass set `max_steps`.
    pub num_train_epochs: usize = 3,
    /// Updates in all, in place of `num_train_epochs`; -1 leaves it to the epochs.
    pub max_steps: isize = -1,
    /// How the learning rate moves after the warm-up.
    #[serde(serialize_with = "as_text")]
    pub lr_scheduler_type: SchedulerType = SchedulerType::default(),
    /// Updates over which the learning rate rises from 0.
    pub warmup_steps: usize = 0,
    /// The same as a share of all updates, 0 to 1. Set one of the two.
    pub warmup_ratio: f64 = 0.0,
    /// When to log.
    pub logging_strategy: IntervalStrategy = IntervalStrategy::Steps,
    /// Updates between two log entries.
    pub logging_steps: usize = 500,
    /// Also log the first update.
    pub logging_first_step: bool = false,
    /// When to save a checkpoint. With `Steps` one is saved at the end, too.
    pub save_strategy: SaveStrategy = SaveStrategy::Steps,
    /// Updates between two checkpoints.
    pub save_steps: usize = 500,
    /// How many checkpoints to keep; older ones are deleted after a newer one is safely
    /// written. None keeps all.
    pub save_total_limit: Option<usize> = None,
    /// When to evaluate; needs an evaluation dataset.
    pub eval_strategy: IntervalStrategy = IntervalStrategy::No,
    /// Updates between two evaluations; None takes `logging_steps`.
    pub eval_steps: Option<usize> = None,
    /// Also evaluate before the first update.
    pub eval_on_start: bool = false,
    /// After training, put back the adapters of the checkpoint with the lowest evaluation loss.
    pub load_best_model_at_end: bool = false,
    /// Of dropout and, unless `data_seed` is set, of the order of the rows.
    pub seed: u64 = 42,
    /// Of the order of the rows alone.
    pub data_seed: Option<u64> = None,
    /// Whether the rows are shuffled.
    pub train_sampling_strategy: SamplingStrategy = SamplingStrategy::Random,
    /// Leave out the last batch of an epoch if it has fewer rows than the others.
    pub dataloader_drop_last: bool = false,
    /// Keep only the input of each block and compute its inside again on the way back: less
    /// memory, more time, the same numbers bit for bit.
    pub gradient_checkpointing: bool = false,
    /// The optimizer.
    #[serde(serialize_with = "as_text")]
    pub optim: Optim = Optim::default(),
    /// Show no progress and no log lines.
    pub disable_tqdm: bool = false,
}
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

named!(IntervalStrategy { No => "no", Steps => "steps", Epoch => "epoch" });

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

named!(SaveStrategy { No => "no", Steps => "steps", Epoch => "epoch", Best => "best" });

/// The order of the rows in an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SamplingStrategy {
    /// A new permutation each epoch, PyTorch's for the same seed.
    #[default]
    Random,
    /// As they are in the dataset.
    Sequential,
}

named!(SamplingStrategy { Random => "random", Sequential => "sequential" });

impl TrainingArguments {
    /// Refuses values outside their domain and combinations that contradict each other.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::error::Error::InvalidArgument) with the argument's name.
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
            ensure(value >= 1, name, value, "at least 1", "to switch it off use its strategy, or None")?;
        }
        let not_negative = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
        ];
        for (name, value) in not_negative {
            ensure(value >= 0.0 && value.is_finite(), name, value, "a number of 0 or more", "see its default")?;
        }
        for (name, value) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            ensure((0.0..1.0).contains(&value), name, value, "0 or more and less than 1", "use 0.9 and 0.999")?;
        }
        let epsilon = self.adam_epsilon;
        ensure(epsilon > 0.0 && epsilon.is_finite(), "adam_epsilon", epsilon, "more than 0", "use 1e-8")?;
        let ratio = self.warmup_ratio;
        let is_share = (0.0..=1.0).contains(&ratio);
        ensure(is_share, "warmup_ratio", ratio, "a share from 0 to 1", "for a count use warmup_steps")?;
        let one_warmup = ratio == 0.0 || self.warmup_steps == 0;
        ensure(one_warmup, "warmup_ratio", ratio, "0 when warmup_steps is set", "set one of the two")?;
        let constant = self.lr_scheduler_type == SchedulerType::Constant && (ratio > 0.0 || self.warmup_steps > 0);
        ensure(!constant, "lr_scheduler_type", "constant", "a schedule with a warm-up", "use ConstantWithWarmup")?;
        let steps = self.max_steps;
        ensure(steps == -1 || steps > 0, "max_steps", steps, "-1, or at least 1", "-1 trains for num_train_epochs")?;
        let epochs = self.num_train_epochs;
        let remedy = "for a part of an epoch use max_steps";
        ensure(epochs > 0 || steps > 0, "num_train_epochs", epochs, "at least 1", remedy)?;
        let no_folder = self.output_dir.as_os_str().is_empty();
        ensure(!no_folder, "output_dir", "\"\"", "a folder", "name one, e.g. \"out/qlora\"")?;
        self.validate_strategies()
    }

    fn validate_strategies(&self) -> Result<()> {
        let evaluates = self.eval_strategy != IntervalStrategy::No;
        let best = self.save_strategy == SaveStrategy::Best;
        ensure(!best || evaluates, "save_strategy", "Best", "an eval_strategy beside it", "set eval_strategy")?;
        if !self.load_best_model_at_end || best {
            return Ok(());
        }
        let same = evaluates && self.eval_strategy.as_str() == self.save_strategy.as_str();
        let name = "load_best_model_at_end";
        let remedy = "set both to Steps or both to Epoch, or save_strategy to Best";
        ensure(same, name, true, "an eval_strategy equal to save_strategy, so that the best is saved", remedy)?;
        let multiple =
            self.eval_strategy == IntervalStrategy::Epoch || self.save_steps.is_multiple_of(self.eval_steps());
        ensure(multiple, name, true, "save_steps to be a multiple of eval_steps", "set save_steps equal to eval_steps")
    }

    /// Updates between two evaluations.
    pub fn eval_steps(&self) -> usize {
        let default = if self.eval_strategy == IntervalStrategy::Steps { self.logging_steps } else { 500 };
        self.eval_steps.unwrap_or(default)
    }

    /// Updates of warm-up in a run of `max_steps`.
    pub fn warmup_steps(&self, max_steps: usize) -> usize {
        match self.warmup_steps {
            0 => warmup_steps(self.warmup_ratio, max_steps),
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
        serde_json::to_value(self).ok().and_then(|json| json.as_object().cloned()).unwrap_or_default()
    }
}

fn as_text<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn path_as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

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
        assert_eq!(fields.len(), 32);
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
