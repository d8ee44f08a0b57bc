//! What a run will need, before it runs.

use super::Trainer;
use crate::{
    error::Result,
    models::memory::{MemoryReport, StepShape, resident_bytes},
};

impl Trainer {
    /// The peak of this process's memory during training, term by term: what is in RAM now (the
    /// program, the data, the model) and what the largest micro-batch of the run will add.
    ///
    /// Exact to about 10%: the allocator keeps some freed memory, and a step's small buffers are
    /// not listed.
    ///
    /// ```no_run
    /// # fn f(trainer: qlora_nb::trainer::Trainer) -> qlora_nb::error::Result<()> {
    /// println!("{}", trainer.memory_plan()?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn memory_plan(&self) -> Result<MemoryReport> {
        let weights = self.model.memory_of_weights();
        let mut report = MemoryReport::default();
        report.add("the process, data and tokenizer", resident_bytes().saturating_sub(weights.total()));
        report.extend(weights);
        report.add(format!("optimizer state ({})", self.args.optim), self.optimizer.num_bytes());
        report.extend(self.model.memory_of_step(self.largest_micro_batch()));
        Ok(report)
    }

    /// The micro-batch with the most real tokens, of all that the run will see.
    fn largest_micro_batch(&self) -> StepShape {
        let mut sampler = super::Sampler::new(&self.args);
        let gradient_checkpointing = self.args.gradient_checkpointing;
        let mut largest = StepShape { gradient_checkpointing, ..Default::default() };
        for step in 0..self.plan.max_steps {
            for batch in sampler.update(&self.plan, step) {
                let sizes = batch.rows.iter().map(|&row| self.train_rows.size(row));
                let (tokens, labels) = sizes.fold((0, 0), |(t, l), (tokens, labels)| (t + tokens, l + labels));
                if (tokens, labels) > (largest.tokens, largest.labels) {
                    largest = StepShape { tokens, labels, gradient_checkpointing };
                }
            }
        }
        largest
    }
}
