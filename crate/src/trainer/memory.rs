//! What a run will need, before it runs.

use super::Trainer;
use crate::{
    error::Result,
    models::{
        causal_lm::PassOptions,
        memory::{MemoryReport, StepShape, release_freed_memory, resident_bytes},
    },
};

/// What no list of tensors shows: the matrix product's packing buffers, threads' stacks, memory
/// that the allocator keeps between steps of different lengths. Measured with two threads and
/// glibc; it matters for a model of a few megabytes only.
const OVERHEAD: usize = 6 << 20;

impl Trainer {
    /// The peak of this process's memory during training, term by term: what is in RAM now (the
    /// program, the data, the model) and what the largest micro-batch of the run will add.
    ///
    /// The shortest row goes through the model once, forward and back, so that the program's code,
    /// the threads' stacks and the matrix product's own buffers are in RAM and counted; its
    /// gradients are forgotten. Exact to about 10% (20% for a model of a few megabytes): the allocator keeps some freed memory, and a
    /// step's small buffers are not listed.
    ///
    /// ```no_run
    /// # fn f(trainer: qlora_nb::trainer::Trainer) -> qlora_nb::error::Result<()> {
    /// println!("{}", trainer.memory_plan()?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn memory_plan(&self) -> Result<MemoryReport> {
        self.warm_up()?;
        release_freed_memory();
        let weights = self.model.memory_of_weights();
        let mut report = MemoryReport::default();
        report.add("the process, data and tokenizer", resident_bytes().saturating_sub(weights.total()));
        report.extend(weights);
        let managed = if self.optimizer.is_paged() { ", may move to the host" } else { "" };
        report.add(format!("optimizer state ({}{managed})", self.args.optim), self.optimizer.num_bytes());
        report.extend(self.model.memory_of_step(self.largest_micro_batch()));
        report.add("buffers of threads and allocator", OVERHEAD);
        Ok(report)
    }

    fn warm_up(&self) -> Result<()> {
        let with_labels = (0..self.train_rows.len()).filter(|&row| self.train_rows.size(row).1 > 0);
        let Some(row) = with_labels.min_by_key(|&row| self.train_rows.size(row).0) else { return Ok(()) };
        let options = PassOptions { num_items: 1.0, gradient_checkpointing: true, dropout_key: 0 };
        self.model.forward_backward(&self.train_rows.batch(&[row])?, &options)?;
        self.params.iter().try_for_each(|p| p.zero_grad())
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
