//! Steps 6 and 7: the trainer, with the semantics of transformers' `Trainer`.
//!
//! All of a run's state is a count of updates and the loss not yet logged; the order of the rows
//! and the dropout masks are functions of the seed and that count. So stopping, resuming and
//! going on are one thing, and give the numbers of an uninterrupted run bit for bit.

mod callback;
mod checked_rows;
mod checkpoint;
#[cfg(test)]
mod double;
mod evaluate;
mod memory;
mod run;
mod sampler;
mod state;
#[cfg(test)]
mod tests;
mod trained_model;
mod view;

use std::{
    cell::OnceCell,
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::Tensor;
use serde_json::{Value, json};

use self::{
    checked_rows::CheckedRows,
    checkpoint::Progress,
    sampler::{Plan, Sampler},
    trained_model::TrainedModel,
    view::View,
};
use crate::{
    backend::{dropout::mix, param::Param},
    collator::DataCollatorForSeq2Seq,
    dataset::Dataset,
    display,
    error::{Error, Result, ensure},
    interrupt,
    models::memory::StepShape,
    names::debug_as_display,
    optim::{self, Hyperparameters, Optimizer, lr_scheduler::lr_at},
    peft::PeftModel,
    training_args::{IntervalStrategy, SaveStrategy, TrainingArguments},
};

pub use crate::models::causal_lm::{LossScale, Pass, PassOptions, Trainable};
pub use callback::TrainerCallback;
pub use sampler::randperm;
pub use state::{LogEntry, TrainOutput, TrainerControl, TrainerState};

/// The learning rate of update `step` (from 0).
type Schedule = Box<dyn Fn(usize) -> f64 + Send>;

/// [`LossFn`](crate::layers::custom_loss::LossFn), sendable.
type Loss = Box<dyn Fn(&Tensor, &Tensor) -> Result<Tensor> + Send>;

/// Trains the adapters of a model on a tokenized dataset.
///
/// ```no_run
/// use qlora_nb::{peft::PeftModel, prelude::*};
/// # fn f(model: PeftModel, tokenized_ds: Dataset, tokenizer: Tokenizer) -> Result<()> {
/// let args = TrainingArguments { output_dir: "out/qlora".into(), max_steps: 200, ..Default::default() };
/// let mut trainer = Trainer::new(&model, args, &tokenized_ds, DataCollatorForSeq2Seq::new(&tokenizer))?;
/// trainer.train()?;
/// trainer.loss_curve().save("out/loss.svg")?;
/// # Ok(())
/// # }
/// ```
pub struct Trainer {
    model: Arc<dyn TrainedModel>,
    params: Vec<Param>,
    args: TrainingArguments,
    collator: DataCollatorForSeq2Seq,
    train_rows: CheckedRows,
    eval_rows: Option<CheckedRows>,
    plan: Plan,
    sampler: Sampler,
    optimizer: Box<dyn Optimizer>,
    schedule: Option<Schedule>,
    loss: Option<Loss>,
    callbacks: Vec<Box<dyn TrainerCallback>>,
    state: TrainerState,
    control: TrainerControl,
    progress: Progress,
    last_checkpoint: Option<PathBuf>,
    /// What the finished run gave.
    output: Option<TrainOutput>,
    /// See [`Trainer::largest_micro_batch`]: every call of train asks for it.
    largest: OnceCell<StepShape>,
}

impl Trainer {
    /// Checks everything that can be checked before training. The model and the dataset are
    /// borrowed: the trainer keeps cheap handles, and the model that learns is the caller's.
    ///
    /// # Errors
    /// Arguments outside their domain; rows that cannot be trained on (empty, ids beyond the
    /// vocabulary, no label anywhere), with their number; an `output_dir` that cannot be written.
    pub fn new(
        model: &PeftModel,
        args: TrainingArguments,
        train_dataset: &Dataset,
        data_collator: DataCollatorForSeq2Seq,
    ) -> Result<Self> {
        Self::on(Arc::new(model.clone()), args, train_dataset, data_collator)
    }

    fn on(
        model: Arc<dyn TrainedModel>,
        args: TrainingArguments,
        train_dataset: &Dataset,
        collator: DataCollatorForSeq2Seq,
    ) -> Result<Self> {
        interrupt::stoppable("Trainer::new", || Self::prepare(model, args, train_dataset, collator))
    }

    fn prepare(
        model: Arc<dyn TrainedModel>,
        args: TrainingArguments,
        train_dataset: &Dataset,
        collator: DataCollatorForSeq2Seq,
    ) -> Result<Self> {
        args.validate()?;
        let params = model.trainable_parameters();
        let remedy = "train what get_peft_model returns";
        ensure(!params.is_empty(), "model", "no parameter that learns", "a model with adapters", remedy)?;
        let train_rows = CheckedRows::check(train_dataset, &collator, model.vocab_size())?;
        let Some(plan) = Plan::new(train_rows.len(), &args) else {
            let got =
                format!("true with {} rows and batches of {}", train_rows.len(), args.per_device_train_batch_size);
            let remedy = "set it to false, or per_device_train_batch_size lower";
            return Err(Error::argument("dataloader_drop_last", got, "at least one whole batch", remedy));
        };
        if args.save_strategy != SaveStrategy::No {
            check_writable(&args.output_dir())?;
        }
        // Another run's search for a scale is no part of this one.
        model.set_loss_scale(None);
        let betas = (args.adam_beta1, args.adam_beta2);
        let (eps, weight_decay) = (args.adam_epsilon, args.weight_decay);
        let optimizer = optim::new(args.optim, &params, &Hyperparameters { betas, eps, weight_decay })?;
        if params.iter().any(|p| p.value().device().is_cuda()) {
            // What a block keeps is seen in a pass, and the error of a card without room is to say it.
            model.memory_of_step(StepShape::default())?;
        }
        let state = TrainerState {
            max_steps: plan.max_steps,
            num_train_epochs: plan.num_train_epochs,
            logging_steps: args.logging_steps,
            eval_steps: args.eval_steps(),
            save_steps: args.save_steps,
            train_batch_size: args.per_device_train_batch_size,
            ..Default::default()
        };
        Ok(Self {
            model,
            params,
            collator,
            train_rows,
            eval_rows: None,
            plan,
            sampler: Sampler::new(&args),
            optimizer,
            schedule: None,
            loss: None,
            callbacks: Vec::new(),
            state,
            control: TrainerControl::default(),
            progress: Progress::default(),
            last_checkpoint: None,
            output: None,
            largest: OnceCell::new(),
            args,
        })
    }

    /// The rows to evaluate on.
    ///
    /// # Errors
    /// As [`Trainer::new`] checks the training rows.
    pub fn with_eval_dataset(mut self, dataset: &Dataset) -> Result<Self> {
        let check = || CheckedRows::check(dataset, &self.collator, self.model.vocab_size());
        self.eval_rows = Some(interrupt::stoppable("with_eval_dataset", check)?);
        Ok(self)
    }

    /// Adds hooks; they are called in the order in which they were added.
    pub fn with_callback(mut self, callback: impl TrainerCallback + 'static) -> Self {
        self.callbacks.push(Box::new(callback));
        self
    }

    /// An own schedule: `schedule(step)` is the learning rate of update `step`, from 0, in place
    /// of `learning_rate`, `lr_scheduler_type` and the warm-up.
    pub fn with_lr_schedule(mut self, schedule: impl Fn(usize) -> f64 + Send + 'static) -> Self {
        self.schedule = Some(Box::new(schedule));
        self
    }

    /// An own loss in place of the cross-entropy. `loss(logits, labels)` gets the logits `[N, vocab]` f32 of
    /// the positions that have a label and those labels `[N]` u32, and returns the SUM of the positions'
    /// losses as a tensor of one element; candle differentiates it by the logits, the rest of the way back is
    /// the library's. Loss and gradient are divided by the labels of the update, as always. Evaluation stays
    /// with the cross-entropy, so that runs can be compared. The logits of a micro-batch exist as a whole, which
    /// the memory plan does not count.
    ///
    /// ```no_run
    /// use qlora_nb::prelude::*;
    /// /// Cross-entropy in which tokens that are nearly certain count less (focal loss, gamma 2).
    /// fn focal(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    ///     let logits = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    ///     let log_p = logits.broadcast_sub(&logits.exp()?.sum_keepdim(1)?.log()?)?;
    ///     let log_p = log_p.gather(&labels.unsqueeze(1)?, 1)?;
    ///     Ok(((1.0 - log_p.exp()?)?.sqr()? * log_p)?.sum_all()?.neg()?)
    /// }
    /// # fn f(trainer: Trainer) -> Result<()> {
    /// let mut trainer = trainer.with_loss(focal);
    /// trainer.train()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_loss(mut self, loss: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + 'static) -> Self {
        self.loss = Some(Box::new(loss));
        self
    }

    /// Trains to the end of the run. After an interrupt, an error, `train_steps` or
    /// [`load_checkpoint`](Self::load_checkpoint) it goes on where the run stands; after the end
    /// it gives the same output again.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a loss or gradient that is NaN or infinite: the update is not
    /// made. [`Error::Io`] when a checkpoint cannot be written: nothing half-written stays. In
    /// both cases the trainer and the model are as after the last update.
    pub fn train(&mut self) -> Result<TrainOutput> {
        self.run(None)
    }

    /// At most `n` more updates; the run stays open, so `train` goes on from there.
    pub fn train_steps(&mut self, n: usize) -> Result<TrainOutput> {
        self.run(Some(n))
    }

    /// Puts the run where `checkpoint` was saved, and trains to its end: weights, losses, data
    /// order and dropout are those of a run that was never stopped.
    ///
    /// # Errors
    /// Those of [`load_checkpoint`](Self::load_checkpoint) and [`train`](Self::train).
    pub fn resume_from_checkpoint(&mut self, checkpoint: impl AsRef<Path>) -> Result<TrainOutput> {
        self.resume_from_checkpoint_path(checkpoint.as_ref())
    }

    fn resume_from_checkpoint_path(&mut self, checkpoint: &Path) -> Result<TrainOutput> {
        self.load_checkpoint(checkpoint)?;
        self.train()
    }

    /// Puts the run where `checkpoint` was saved, without training.
    ///
    /// # Errors
    /// A missing or damaged checkpoint, and [`Error::CheckpointMismatch`] for one of another
    /// run: other data, model, adapter configuration, or an argument that changes the numbers.
    /// The trainer and the model stay as they were.
    pub fn load_checkpoint(&mut self, checkpoint: impl AsRef<Path>) -> Result<()> {
        self.load_checkpoint_path(checkpoint.as_ref())
    }

    fn load_checkpoint_path(&mut self, folder: &Path) -> Result<()> {
        let loaded = checkpoint::load(folder, &self.identity()?)?;
        let before = self.params.iter().map(|p| Ok(p.value().copy()?)).collect::<Result<Vec<_>>>()?;
        self.model.load_adapter(folder)?;
        if let Err(error) = self.optimizer.load_state_dict(&loaded.optimizer) {
            self.params.iter().zip(&before).try_for_each(|(p, value)| p.set(value))?;
            return Err(error);
        }
        let (logging_steps, eval_steps, save_steps) =
            (self.state.logging_steps, self.state.eval_steps, self.state.save_steps);
        self.state = TrainerState { logging_steps, eval_steps, save_steps, ..loaded.state };
        if let Some(best) = &mut self.state.best_model_checkpoint {
            *best = checkpoint::beside(folder, best);
        }
        self.model.set_loss_scale(loaded.progress.loss_scale);
        self.progress = loaded.progress;
        self.control = TrainerControl::default();
        self.last_checkpoint = Some(folder.to_owned());
        self.output = None;
        Ok(())
    }

    /// Mean loss over the evaluation dataset, without dropout: `eval_loss`, its run time and
    /// throughput. The result is logged.
    ///
    /// # Errors
    /// Without an evaluation dataset; [`Error::Interrupted`]; [`Error::NotFinite`].
    pub fn evaluate(&mut self) -> Result<LogEntry> {
        let _guard = interrupt::Guard::new()?;
        self.evaluate_and_log(&mut View::silent())
    }

    /// Saves a `checkpoint-N` in `output_dir` now, and gives its folder.
    ///
    /// # Errors
    /// [`Error::Io`], with nothing half-written left behind.
    pub fn save_checkpoint(&mut self) -> Result<PathBuf> {
        let folder = self.args.output_dir().join(format!("{}{}", checkpoint::PREFIX, self.state.global_step));
        let mut state = self.state.clone();
        if state.best_global_step == Some(state.global_step) {
            state.best_model_checkpoint = Some(folder.to_string_lossy().into_owned());
        }
        let content = checkpoint::Content {
            state: state.to_json(&self.control),
            progress: &Progress { loss_scale: self.model.loss_scale(), ..self.progress.clone() },
            optimizer: self.optimizer.state_dict()?,
            scheduler: json!({
                "last_epoch": self.state.global_step,
                "base_lrs": [self.args.learning_rate],
                "_last_lr": [self.learning_rate(self.state.global_step)?],
            }),
            rng: json!({
                "seed": self.args.seed,
                "data_seed": self.args.data_seed.unwrap_or(self.args.seed),
                "next_micro_batch": self.plan.micro_batches_before(self.state.global_step),
            }),
            arguments: self.args.to_json(),
            identity: self.identity()?,
        };
        checkpoint::save(&folder, |f| self.model.save_adapter(f), &content)?;
        self.state = state;
        self.last_checkpoint = Some(folder.clone());
        if let Some(limit) = self.args.save_total_limit {
            self.rotate(limit, Some(&folder))?;
        }
        Ok(folder)
    }

    /// Saves the adapter alone, as `PeftModel::save_pretrained` does.
    pub fn save_model(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_model_path(folder.as_ref())
    }

    fn save_model_path(&self, folder: &Path) -> Result<()> {
        self.model.save_adapter(folder)
    }

    /// Where the run stands.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// All entries logged so far.
    pub fn log_history(&self) -> &[LogEntry] {
        &self.state.log_history
    }

    /// Training and evaluation loss over the updates, as a picture.
    pub fn loss_curve(&self) -> display::Svg {
        self.state.loss_curve()
    }

    /// The arguments of the run.
    pub fn args(&self) -> &TrainingArguments {
        &self.args
    }

    /// The checkpoint that was saved or loaded last.
    pub fn last_checkpoint(&self) -> Option<&Path> {
        self.last_checkpoint.as_deref()
    }

    fn rotate(&self, limit: usize, newest: Option<&Path>) -> Result<()> {
        let best = self.state.best_model_checkpoint.as_deref().map(Path::new);
        let keep: Vec<&Path> = newest.into_iter().chain(best).collect();
        checkpoint::rotate(&self.args.output_dir(), limit, &keep)
    }

    fn learning_rate(&self, step: usize) -> Result<f64> {
        let Some(schedule) = &self.schedule else {
            let warmup = self.args.warmup_steps(self.plan.max_steps);
            let factor = lr_at(self.args.lr_scheduler_type, step, warmup, self.plan.max_steps);
            return Ok(self.args.learning_rate * factor);
        };
        let (lr, name) = (schedule(step), format!("the learning rate schedule at step {step}"));
        let remedy = "check the function given to with_lr_schedule";
        ensure(lr.is_finite() && lr >= 0.0, &name, lr, "a number of 0 or more", remedy)?;
        Ok(lr)
    }

    /// What two runs must agree on for a checkpoint of one to be resumed by the other.
    fn identity(&self) -> Result<Vec<(String, Value)>> {
        const FIELDS: [&str; 10] = [
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "seed",
            "train_sampling_strategy",
            "dataloader_drop_last",
        ];
        let args = self.args.to_json();
        let mut identity = self.model.identity()?;
        identity.push(("data".into(), self.train_rows.fingerprint.clone().into()));
        identity.push(("data_collator".into(), self.train_rows.collator().into()));
        identity.extend(FIELDS.iter().map(|&name| (name.to_owned(), args[name].clone())));
        identity.push(("optim".into(), args["optim"].clone()));
        identity.push(("data_seed".into(), self.args.data_seed.unwrap_or(self.args.seed).into()));
        identity.push(("max_steps".into(), self.plan.max_steps.into()));
        // A function has no name to compare, but whether there is one can be.
        identity.push(("own_loss".into(), self.loss.as_ref().map_or(Value::Null, |_| true.into())));
        if self.schedule.is_none() {
            identity.extend(["learning_rate", "lr_scheduler_type"].map(|name| (name.to_owned(), args[name].clone())));
            identity.push(("warmup_steps".into(), self.args.warmup_steps(self.plan.max_steps).into()));
            identity.push(("lr_schedule".into(), Value::Null));
        } else {
            // A function has no name to compare; its values have.
            let hash = (0..self.plan.max_steps.min(100_000))
                .try_fold(0, |h, step| Ok::<_, Error>(mix(h ^ self.learning_rate(step)?.to_bits())))?;
            identity.push(("lr_schedule".into(), format!("{hash:016x}").into()));
        }
        Ok(identity)
    }

    fn check_evaluation(&self) -> Result<()> {
        let (strategy, remedy) = (self.args.eval_strategy, "add .with_eval_dataset(&ds)?, or set eval_strategy to No");
        let asked = strategy != IntervalStrategy::No || self.args.eval_on_start;
        let fine = self.eval_rows.is_some() || !asked;
        ensure(fine, "eval_strategy", strategy, "an evaluation dataset beside it", remedy)
    }
}

/// Fails now rather than at the first checkpoint.
fn check_writable(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
    let probe = folder.join(format!(".writable.{}.tmp", std::process::id()));
    fs::write(&probe, "").map_err(Error::io("write", folder))?;
    fs::remove_file(&probe).map_err(Error::io("write", folder))
}

impl fmt::Display for Trainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, of) = (self.state.global_step, self.state.max_steps);
        write!(f, "Trainer(global_step={step}, max_steps={of}, num_rows={})", self.train_rows.len())
    }
}

debug_as_display!(Trainer);
