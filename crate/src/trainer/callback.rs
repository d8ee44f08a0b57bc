//! Looking into a training run, and steering it.

use std::path::Path;

use super::state::{LogEntry, TrainerControl, TrainerState};
use crate::training_args::{IntervalStrategy, SaveStrategy, TrainingArguments};

/// A user's hooks into training. All are optional.
///
/// ```
/// use qlora_nb::trainer::{TrainerCallback, TrainerControl, TrainerState};
/// use qlora_nb::training_args::TrainingArguments;
/// /// Stops once the loss is low enough.
/// struct GoodEnough(f64);
/// impl TrainerCallback for GoodEnough {
///     fn on_step_end(&mut self, _: &TrainingArguments, state: &TrainerState, control: &mut TrainerControl) {
///         let last = state.log_history.last().and_then(|entry| entry.get("loss"));
///         control.should_training_stop |= last.is_some_and(|loss| loss < self.0);
///     }
/// }
/// ```
#[allow(unused_variables)]
pub trait TrainerCallback: Send {
    /// A call of `train` or `train_steps` begins.
    fn on_train_begin(&mut self, args: &TrainingArguments, state: &TrainerState, control: &mut TrainerControl) {}
    /// It ends, for whatever reason but an error.
    fn on_train_end(&mut self, args: &TrainingArguments, state: &TrainerState, control: &mut TrainerControl) {}
    /// An update was made.
    fn on_step_end(&mut self, args: &TrainingArguments, state: &TrainerState, control: &mut TrainerControl) {}
    /// All rows were seen once more.
    fn on_epoch_end(&mut self, args: &TrainingArguments, state: &TrainerState, control: &mut TrainerControl) {}
    /// `logs` was added to `state.log_history`.
    fn on_log(
        &mut self,
        args: &TrainingArguments,
        state: &TrainerState,
        control: &mut TrainerControl,
        logs: &LogEntry,
    ) {
    }
    /// An evaluation gave `metrics`.
    fn on_evaluate(
        &mut self,
        args: &TrainingArguments,
        state: &TrainerState,
        control: &mut TrainerControl,
        metrics: &LogEntry,
    ) {
    }
    /// A checkpoint was written to `folder`.
    fn on_save(&mut self, args: &TrainingArguments, state: &TrainerState, control: &mut TrainerControl, folder: &Path) {
    }
}

/// What the arguments ask for after an update.
pub(super) fn after_step(args: &TrainingArguments, state: &TrainerState, control: &mut TrainerControl) {
    let step = state.global_step;
    let last = step >= state.max_steps;
    control.should_log |= step == 1 && args.logging_first_step;
    control.should_log |= args.logging_strategy == IntervalStrategy::Steps && step.is_multiple_of(state.logging_steps);
    control.should_evaluate |=
        args.eval_strategy == IntervalStrategy::Steps && (last || step.is_multiple_of(state.eval_steps));
    control.should_save |= args.save_strategy == SaveStrategy::Steps && (last || step.is_multiple_of(state.save_steps));
    control.should_training_stop |= last;
}

/// What the arguments ask for after an epoch.
pub(super) fn after_epoch(args: &TrainingArguments, control: &mut TrainerControl) {
    control.should_log |= args.logging_strategy == IntervalStrategy::Epoch;
    control.should_evaluate |= args.eval_strategy == IntervalStrategy::Epoch;
    control.should_save |= args.save_strategy == SaveStrategy::Epoch;
}
