//! What a run will need, before it runs.

use super::Trainer;
use crate::{
    backend,
    error::{Error, Result},
    interrupt,
    models::{
        causal_lm::PassOptions,
        memory::{MemoryReport, StepShape, release_freed_memory, resident_bytes},
    },
    optim,
};

/// What no list of tensors shows: the matrix product's packing buffers, threads' stacks, memory
/// that the allocator keeps between steps of different lengths. Measured with two threads and
/// glibc; it matters for a model of a few megabytes only.
const OVERHEAD: usize = 2 << 20;

impl Trainer {
    /// The peak of memory during training, term by term: what is there now and what the largest micro-batch of the run
    /// will add.
    ///
    /// On the CPU it is this process's memory: the program, the data, the model. The shortest row goes through the
    /// model once, forward and back, so that the program's code, the threads' stacks and the matrix product's own
    /// buffers are in RAM and counted; its gradients are forgotten. Exact to about 10% (20% for a model of a few
    /// megabytes): memory that was freed before and that the allocator keeps is counted as the process's, though the
    /// run uses it again, and a step's small buffers are not listed.
    ///
    /// On a GPU it is the memory of the card's tensors, to about 10%. What CUDA itself takes (its context and
    /// libraries, about 0.5 GiB) is not in it.
    ///
    /// ```no_run
    /// # fn f(trainer: qlora_nb::trainer::Trainer) -> qlora_nb::error::Result<()> {
    /// println!("{}", trainer.memory_plan()?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn memory_plan(&self) -> Result<MemoryReport> {
        interrupt::stoppable("memory_plan", || self.plan())
    }

    fn plan(&self) -> Result<MemoryReport> {
        if self.is_on_gpu() {
            return self.plan_of(self.largest_micro_batch());
        }
        self.warm_up()?;
        release_freed_memory();
        let mut report = MemoryReport::default();
        let listed = self.model.memory_of_weights().total() + self.optimizer.num_bytes();
        report.add("the process, data and tokenizer", resident_bytes().saturating_sub(listed));
        report.extend(self.plan_of(self.largest_micro_batch())?);
        report.add("buffers of threads and allocator", OVERHEAD);
        Ok(report)
    }

    fn is_on_gpu(&self) -> bool {
        self.params.iter().any(|p| p.value().device().is_cuda())
    }

    /// Weights, optimizer and a step of this shape.
    fn plan_of(&self, shape: StepShape) -> Result<MemoryReport> {
        let mut report = self.model.memory_of_weights();
        let managed = if self.optimizer.is_paged() { ", may move to the host" } else { "" };
        report.add(format!("optimizer state ({}{managed})", self.args.optim), self.optimizer.num_bytes());
        report.extend(self.model.memory_of_step(shape)?);
        Ok(report)
    }

    /// The error of a card without room, with the plan of this run and what each argument would save.
    pub(super) fn explain_memory(&self, error: Error) -> Error {
        let Error::OutOfDeviceMemory { doing, .. } = error else { return error };
        let largest = self.largest_micro_batch();
        // What a block keeps was seen before the run began: nothing runs here.
        let plan = self.plan_of(largest).unwrap_or_default().total();
        let remedy = format!(
            "trainer.memory_plan() says {} MiB. {}Nothing is lost: the next call goes on from the last update",
            plan >> 20,
            self.savings(largest)
        );
        Error::OutOfDeviceMemory { doing: format!("{doing}, in update {}", self.state.global_step + 1), remedy }
    }

    /// What would make the run smaller, the most first: sentences, each with a space behind it.
    fn savings(&self, now: StepShape) -> String {
        let step = |shape| self.model.memory_of_step(shape).unwrap_or_default().total();
        let saved = |shape| step(now).saturating_sub(step(shape));
        let (batch, accumulation) = (self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps);
        let mut all = vec![(
            "the model loaded with load_in_4bit and bnb_4bit_use_double_quant".to_string(),
            self.model.memory_saved_by_4bit(),
        )];
        if !now.gradient_checkpointing {
            let shape = StepShape { gradient_checkpointing: true, ..now };
            all.push(("gradient_checkpointing: true".into(), saved(shape)));
        }
        if batch > 1 {
            let half = batch.div_ceil(2);
            let part = |n: usize| n * half / batch;
            let shape = StepShape { tokens: part(now.tokens), labels: part(now.labels), ..now };
            let what = format!(
                "per_device_train_batch_size: {half} with gradient_accumulation_steps: {}",
                accumulation * batch / half
            );
            all.push((what, saved(shape)));
        }
        let smallest = self.args.optim.smallest();
        let smaller = self.optimizer.num_bytes().saturating_sub(optim::num_bytes(smallest, &self.params));
        all.push((format!("optim: Optim::{smallest:?}"), smaller));
        all.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let sentence = |(what, bytes): &(String, usize)| format!("{what} saves {} MiB. ", bytes >> 20);
        all.iter().filter(|(_, bytes)| *bytes >= 1 << 20).map(sentence).collect()
    }

    /// Says so when the card seems to have too little room for the run: the largest micro-batch may come late.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] on a CPU, where the process would be killed. A fifth more than is free passes: a plan errs.
    pub(super) fn check_room(&self) -> Result<()> {
        let Some(available) = backend::of(self.params[0].value().device())?.available_bytes()? else { return Ok(()) };
        let largest = self.largest_micro_batch();
        let needed = self.model.memory_of_step(largest)?.total();
        let doing = format!("the largest micro-batch needs about {} MiB, {} are free", needed >> 20, available >> 20);
        if !self.is_on_gpu() {
            let fits = needed < available + available / 5;
            return if fits { Ok(()) } else { Err(Error::OutOfMemory { doing, remedy: self.savings(largest) }) };
        }
        if needed > available {
            crate::display::notice_once(&format!("the card is small: {doing}. {}", self.savings(largest)));
        }
        Ok(())
    }

    fn warm_up(&self) -> Result<()> {
        let with_labels = (0..self.train_rows.len()).filter(|&row| self.train_rows.size(row).1 > 0);
        let Some(row) = with_labels.min_by_key(|&row| self.train_rows.size(row).0) else { return Ok(()) };
        let options = PassOptions { num_items: 1.0, gradient_checkpointing: true, dropout_key: 0 };
        let done = self.model.forward_backward(&self.train_rows.batch(&[row])?, &options);
        self.params.iter().try_for_each(|p| p.zero_grad())?;
        done.map(drop)
    }

    /// The micro-batch with the most real tokens, of all that the run will see.
    fn largest_micro_batch(&self) -> StepShape {
        if let Some(largest) = self.largest.get() {
            return *largest;
        }
        let mut sampler = super::Sampler::new(&self.args);
        let gradient_checkpointing = self.args.gradient_checkpointing;
        let mut largest = StepShape { gradient_checkpointing, ..Default::default() };
        for step in (0..self.plan.max_steps).take_while(|_| !interrupt::requested()) {
            for batch in sampler.update(&self.plan, step) {
                let sizes = batch.rows.iter().map(|&row| self.train_rows.size(row));
                let (tokens, labels) = sizes.fold((0, 0), |(t, l), (tokens, labels)| (t + tokens, l + labels));
                if (tokens, labels) > (largest.tokens, largest.labels) {
                    largest = StepShape { tokens, labels, gradient_checkpointing };
                }
            }
        }
        if !interrupt::requested() {
            // It is the same at each call.
            let _ = self.largest.set(largest);
        }
        largest
    }
}
