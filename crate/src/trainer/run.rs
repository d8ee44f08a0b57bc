//! The loop: update, log, evaluate, save, until the run ends or somebody asks to stop.

use std::time::Instant;

use super::{
    Trainer,
    callback::{TrainerCallback, after_epoch, after_step},
    state::{LogEntry, TrainOutput, TrainerControl, TrainerState},
    view::{End, View},
};
use crate::{
    backend::dropout::mix,
    display::{self, format::rate},
    error::{Error, Result},
    interrupt,
    models::{causal_lm::PassOptions, memory::release_freed_memory},
    optim::clip_grad_norm,
    training_args::{SaveStrategy, TrainingArguments},
};

/// Where a call began: throughput is the call's own.
struct Begin {
    at: Instant,
    step: usize,
    tokens: usize,
    loss_of_run: f64,
}

impl Trainer {
    pub(super) fn run(&mut self, limit: Option<usize>) -> Result<TrainOutput> {
        if let Some(output) = &self.output {
            let steps = self.state.max_steps;
            display::notice(&format!("all {steps} steps are done; to train again make a new Trainer"));
            return Ok(output.clone());
        }
        self.check_evaluation()?;
        self.check_room()?;
        let _guard = interrupt::Guard::new()?;
        let begin = Begin {
            at: Instant::now(),
            step: self.state.global_step,
            tokens: self.state.num_input_tokens_seen,
            loss_of_run: self.progress.loss_of_run,
        };
        self.control.should_training_stop = false;
        self.tell(|c, args, state, control| c.on_train_begin(args, state, control));
        let never_evaluated = self.state.global_step == 0 && self.state.curve("eval_loss").is_empty();
        self.control.should_evaluate |= self.args.eval_on_start && never_evaluated;
        let mut view = if self.args.disable_tqdm { View::silent() } else { View::new(&self.state) };
        let end = match self.advance(limit, &begin, &mut view) {
            Err(Error::Interrupted { .. }) => Ok(End::Interrupted),
            other => other,
        };
        // A pass on the CPU asks for freed memory to be kept for the next.
        release_freed_memory();
        view.end(*end.as_ref().unwrap_or(&End::Failed), &self.state);
        let mut output = self.conclude(end?, limit.is_none(), &begin)?;
        output.curve_is_above = view.has_curve();
        self.tell(|c, args, state, control| c.on_train_end(args, state, control));
        Ok(output)
    }

    /// Calls a hook of every callback.
    pub(super) fn tell(
        &mut self,
        hook: impl Fn(&mut dyn TrainerCallback, &TrainingArguments, &TrainerState, &mut TrainerControl),
    ) {
        for callback in &mut self.callbacks {
            hook(callback.as_mut(), &self.args, &self.state, &mut self.control);
        }
    }

    fn advance(&mut self, limit: Option<usize>, begin: &Begin, view: &mut View) -> Result<End> {
        loop {
            // First what an earlier call may have left undone: a save that found the disk full,
            // an evaluation that was interrupted.
            self.settle(view)?;
            let done = self.state.global_step;
            let stopping = self.control.should_training_stop || done >= self.state.max_steps;
            // A stop ends the epoch, too, as in transformers.
            if (self.plan.ends_epoch(done) || stopping) && self.progress.epoch_end_step != done {
                self.progress.epoch_end_step = done;
                after_epoch(&self.args, &mut self.control);
                self.tell(|c, args, state, control| c.on_epoch_end(args, state, control));
                continue;
            }
            if stopping {
                return Ok(End::Complete);
            }
            if limit.is_some_and(|n| done - begin.step >= n) {
                return Ok(End::Limit);
            }
            self.update(view)?;
            after_step(&self.args, &self.state, &mut self.control);
            self.tell(|c, args, state, control| c.on_step_end(args, state, control));
            view.bar.set(self.state.global_step, self.message(begin));
        }
    }

    /// `loss 2.1034, 1,234 tokens/s`.
    fn message(&self, begin: &Begin) -> String {
        let tokens = self.state.num_input_tokens_seen - begin.tokens;
        let per_second = tokens as f64 / begin.at.elapsed().as_secs_f64();
        let loss = (self.progress.loss_of_run - begin.loss_of_run) / (self.state.global_step - begin.step) as f64;
        let recent = match self.state.global_step - self.progress.step_logged {
            0 => self.state.log_history.iter().rev().find_map(|e| e.get("loss")).unwrap_or(loss),
            n => self.progress.loss_since_log / n as f64,
        };
        format!("loss {recent:.4}, {} tokens/s", rate(per_second))
    }

    /// One update, or an error, an interrupt among them, that leaves everything as it was.
    fn update(&mut self, view: &View) -> Result<()> {
        let result = self.accumulate_and_step(view).map_err(|e| self.explain_memory(e));
        if result.is_err() {
            // Gradients of a window that is not finished would be counted twice.
            self.params.iter().try_for_each(|p| p.zero_grad())?;
        }
        result
    }

    fn accumulate_and_step(&mut self, view: &View) -> Result<()> {
        let step = self.state.global_step;
        let learning_rate = self.learning_rate(step)?;
        let window = self.sampler.update(&self.plan, step);
        let batches = window.iter().map(|micro| self.train_rows.batch(&micro.rows)).collect::<Result<Vec<_>>>()?;
        let num_items: usize = batches.iter().map(|b| b.num_label_tokens()).sum();
        self.params.iter().try_for_each(|p| p.zero_grad())?;
        let mut loss = 0.0;
        for (micro, batch) in window.iter().zip(&batches) {
            interrupt::check("training")?;
            let options = PassOptions {
                num_items: num_items.max(1) as f64,
                gradient_checkpointing: self.args.gradient_checkpointing,
                dropout_key: mix(mix(self.args.seed) ^ micro.number as u64),
            };
            let pass = match &self.loss {
                None => self.model.forward_backward(batch, &options)?,
                Some(loss) => self.model.forward_backward_with(batch, &options, loss.as_ref())?,
            };
            loss += pass.loss_sum / options.num_items;
            self.check_finite("the loss", loss)?;
            view.bar.tick();
        }
        let max_norm = if self.args.max_grad_norm > 0.0 { self.args.max_grad_norm } else { f64::INFINITY };
        let norm = clip_grad_norm(&self.params, max_norm)?;
        self.check_finite("the gradient norm", norm.total)?;
        // Without a label there is nothing to learn, but AdamW's momentum would move the weights.
        if num_items > 0 {
            self.optimizer.step(learning_rate, norm.scale)?;
        }
        self.params.iter().try_for_each(|p| p.zero_grad())?;

        self.state.global_step = step + 1;
        self.state.epoch = self.plan.epoch_after(step + 1);
        self.state.num_input_tokens_seen += batches.iter().map(|b| b.len() * b.seq_len()).sum::<usize>();
        self.progress.loss_since_log += loss;
        self.progress.loss_of_run += loss;
        self.progress.grad_norm = norm.total;
        self.progress.learning_rate = learning_rate;
        Ok(())
    }

    fn check_finite(&self, what: &str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let (step, checkpoint) = (self.state.global_step + 1, self.last_checkpoint.clone());
        Err(Error::NotFinite { what: what.into(), value, step, checkpoint })
    }

    /// Logs, evaluates and saves if asked; each request is cleared when it is done.
    fn settle(&mut self, view: &mut View) -> Result<()> {
        if self.control.should_log {
            self.control.should_log = false;
            self.log_training_loss(view);
        }
        if self.control.should_evaluate {
            let is_best = self.evaluate_and_compare(view)?;
            self.control.should_evaluate = false;
            if self.args.save_strategy == SaveStrategy::Best {
                self.control.should_save = is_best;
            }
        }
        if self.control.should_save {
            let folder = self.save_checkpoint()?;
            self.control.should_save = false;
            self.tell(|c, args, state, control| c.on_save(args, state, control, &folder));
        }
        Ok(())
    }

    fn log_training_loss(&mut self, view: &mut View) {
        let updates = self.state.global_step - self.progress.step_logged;
        if updates == 0 {
            return;
        }
        let entry = LogEntry::new([
            ("loss", self.progress.loss_since_log / updates as f64),
            ("grad_norm", self.progress.grad_norm),
            ("learning_rate", self.progress.learning_rate),
        ]);
        self.progress.loss_since_log = 0.0;
        self.progress.step_logged = self.state.global_step;
        self.log(entry, view);
    }

    /// Adds epoch and step to `entry` and the whole to the history.
    pub(super) fn log(&mut self, mut entry: LogEntry, view: &mut View) {
        entry.push("epoch", self.state.epoch);
        view.bar.line(&entry.brief());
        entry.push("step", self.state.global_step as f64);
        self.state.log_history.push(entry.clone());
        view.logged(&self.state);
        self.tell(|c, args, state, control| c.on_log(args, state, control, &entry));
    }

    /// The output of the call and, if the run is over, its last log entry.
    fn conclude(&mut self, end: End, whole_run: bool, begin: &Begin) -> Result<TrainOutput> {
        let updates = self.state.global_step - begin.step;
        let per = |total: f64, n: usize| if n == 0 { 0.0 } else { total / n as f64 };
        let training_loss = if whole_run {
            per(self.progress.loss_of_run, self.state.global_step)
        } else {
            per(self.progress.loss_of_run - begin.loss_of_run, updates)
        };
        let samples = self.plan.total_samples(&self.args) as f64 * updates as f64 / self.state.max_steps as f64;
        let mut metrics = speed_metrics("train", begin.at, samples, updates as f64);
        metrics.push("train_loss", training_loss);
        if end == End::Complete {
            // The summary is for the reader of the returned value; no second copy on the screen.
            self.log(metrics.clone(), &mut View::silent());
        }
        metrics.push("epoch", self.state.epoch);
        let finished = self.state.global_step >= self.state.max_steps && end == End::Complete;
        if finished {
            self.load_best()?;
        }
        let output = TrainOutput {
            global_step: self.state.global_step,
            training_loss,
            metrics,
            interrupted: end == End::Interrupted,
            finished,
            curve: self.state.loss_curve(),
            curve_is_above: false,
        };
        if finished {
            self.output = Some(output.clone());
        }
        Ok(output)
    }

    fn load_best(&mut self) -> Result<()> {
        let Some(best) = self.state.best_model_checkpoint.clone().filter(|_| self.args.load_best_model_at_end) else {
            return Ok(());
        };
        if let Err(error) = self.model.load_adapter(best.as_ref()) {
            display::warning(&format!("the weights are those of the last step, not of the best checkpoint: {error}"));
            return Ok(());
        }
        match self.args.save_total_limit {
            // While training, the newest was kept beside the best for resuming.
            Some(1) => self.rotate(1, None),
            _ => Ok(()),
        }
    }
}

/// Run time and throughput, rounded as transformers rounds them.
pub(super) fn speed_metrics(split: &str, begin: Instant, samples: f64, steps: f64) -> LogEntry {
    let seconds = begin.elapsed().as_secs_f64();
    let round = |x: f64, decimals: i32| (x * 10f64.powi(decimals)).round() / 10f64.powi(decimals);
    let mut metrics = LogEntry::default();
    metrics.push(&format!("{split}_runtime"), round(seconds, 4));
    if seconds > 0.0 {
        metrics.push(&format!("{split}_samples_per_second"), round(samples / seconds, 3));
        metrics.push(&format!("{split}_steps_per_second"), round(steps / seconds, 3));
    }
    metrics
}
