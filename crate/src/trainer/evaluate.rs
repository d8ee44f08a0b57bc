//! Evaluation: the loss on rows that are not trained on.

use std::time::Instant;

use super::{Trainer, run::speed_metrics, state::LogEntry, view::View};
use crate::{
    error::{Error, Result},
    interrupt,
    training_args::SaveStrategy,
};

impl Trainer {
    /// `eval_loss` is transformers': each batch's mean loss a token, weighted by its rows.
    /// Batches without a label have no mean and are left out.
    pub(super) fn evaluate_and_log(&mut self, view: &mut View) -> Result<LogEntry> {
        let Some(rows) = &self.eval_rows else {
            let remedy = "add .with_eval_dataset(&ds)? to the trainer";
            return Err(Error::argument("eval_dataset", "none", "a dataset to evaluate on", remedy));
        };
        let begin = Instant::now();
        let order: Vec<usize> = (0..rows.len()).collect();
        let batches = order.chunks(self.args.per_device_eval_batch_size);
        let (steps, mut loss, mut counted) = (batches.len(), 0.0, 0);
        for chunk in batches {
            interrupt::check("evaluation")?;
            let pass = self.model.loss(&rows.batch(chunk)?)?;
            if pass.num_label_tokens > 0 {
                loss += pass.loss_sum / pass.num_label_tokens as f64 * chunk.len() as f64;
                counted += chunk.len();
            }
        }
        let loss = loss / counted as f64;
        if !loss.is_finite() {
            let (step, checkpoint) = (self.state.global_step, self.last_checkpoint.clone());
            return Err(Error::NotFinite { what: "the evaluation loss".into(), value: loss, step, checkpoint });
        }
        let mut metrics = LogEntry::new([("eval_loss", loss)]);
        for (name, value) in speed_metrics("eval", begin, rows.len() as f64, steps as f64).iter() {
            metrics.push(name, value);
        }
        self.log(metrics.clone(), view);
        metrics.push("epoch", self.state.epoch);
        self.tell(|c, args, state, control| c.on_evaluate(args, state, control, &metrics));
        Ok(metrics)
    }

    /// Evaluates, and says whether the loss is the lowest so far where the arguments ask for the best.
    pub(super) fn evaluate_and_compare(&mut self, view: &mut View) -> Result<bool> {
        let metrics = self.evaluate_and_log(view)?;
        if !self.args.load_best_model_at_end && self.args.save_strategy != SaveStrategy::Best {
            return Ok(false);
        }
        let loss = metrics.get("eval_loss").unwrap_or(f64::INFINITY);
        let is_best = self.state.best_metric.is_none_or(|best| loss < best);
        if is_best {
            self.state.best_metric = Some(loss);
            self.state.best_global_step = Some(self.state.global_step);
        }
        Ok(is_best)
    }
}
