//! Which rows come when: the order in which transformers' Trainer would feed them.
//!
//! The rows of an update follow from the seed and the number of the update alone, so a resumed
//! run needs no fast-forward and cannot lose its place.

use std::ops::Range;

use rand_mt::Mt;

use crate::training_args::{SamplingStrategy, TrainingArguments};

/// `torch.randperm(n, generator=torch.Generator().manual_seed(seed))`.
///
/// PyTorch draws `random() % (n - i)` for each place but the last and swaps; its generator
/// is the 32-bit Mersenne Twister, seeded with the low half of `seed`.
pub fn randperm(n: usize, seed: u64) -> Vec<usize> {
    let mut rng = Mt::new(seed as u32);
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..n.saturating_sub(1) {
        order.swap(i, i + rng.next_u32() as usize % (n - i));
    }
    order
}

/// How an epoch is cut into micro-batches and updates, and a run into epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    rows: usize,
    batch_size: usize,
    accumulation: usize,
    /// Micro-batches in an epoch; the last may have fewer rows.
    pub batches_per_epoch: usize,
    /// Updates in an epoch; the last may have fewer micro-batches.
    pub updates_per_epoch: usize,
    /// Updates in the whole run.
    pub max_steps: usize,
    /// Epochs begun in the whole run.
    pub num_train_epochs: usize,
}

impl Plan {
    /// None when an epoch would have no micro-batch.
    pub fn new(rows: usize, args: &TrainingArguments) -> Option<Self> {
        let (batch_size, accumulation) = (args.per_device_train_batch_size, args.gradient_accumulation_steps);
        let batches_per_epoch = if args.dataloader_drop_last { rows / batch_size } else { rows.div_ceil(batch_size) };
        if batches_per_epoch == 0 {
            return None;
        }
        let updates_per_epoch = batches_per_epoch.div_ceil(accumulation);
        let max_steps = match usize::try_from(args.max_steps) {
            Ok(steps) if steps > 0 => steps,
            _ => args.num_train_epochs * updates_per_epoch,
        };
        let num_train_epochs = max_steps.div_ceil(updates_per_epoch);
        Some(Self { rows, batch_size, accumulation, batches_per_epoch, updates_per_epoch, max_steps, num_train_epochs })
    }

    /// The epoch, from 0, to which update `step` (from 0) belongs.
    pub fn epoch_of(&self, step: usize) -> usize {
        step / self.updates_per_epoch
    }

    /// The micro-batches of update `step`, as numbers within their epoch.
    fn batches_of(&self, step: usize) -> Range<usize> {
        let first = step % self.updates_per_epoch * self.accumulation;
        first..(first + self.accumulation).min(self.batches_per_epoch)
    }

    /// The epoch as a fraction once `steps` updates are done.
    pub fn epoch_after(&self, steps: usize) -> f64 {
        match steps.checked_sub(1) {
            None => 0.0,
            Some(last) => self.epoch_of(last) as f64 + self.batches_of(last).end as f64 / self.batches_per_epoch as f64,
        }
    }

    /// Whether an epoch is complete after `steps` updates.
    pub fn ends_epoch(&self, steps: usize) -> bool {
        steps > 0 && steps.is_multiple_of(self.updates_per_epoch)
    }

    /// Micro-batches of the run before update `step`.
    pub fn micro_batches_before(&self, step: usize) -> usize {
        self.epoch_of(step) * self.batches_per_epoch + self.batches_of(step).start
    }

    /// CheckedRows that a whole run takes, as the Trainer counts them for its throughput.
    pub fn total_samples(&self, args: &TrainingArguments) -> usize {
        match args.max_steps {
            1.. => self.max_steps * self.batch_size * self.accumulation,
            _ if args.dataloader_drop_last => self.batches_per_epoch * self.batch_size * args.num_train_epochs,
            _ => self.rows * args.num_train_epochs,
        }
    }
}

/// The order of one epoch at a time.
#[derive(Debug)]
pub struct Sampler {
    seed: u64,
    strategy: SamplingStrategy,
    epoch: Option<usize>,
    order: Vec<usize>,
}

/// One micro-batch: its number in the whole run and its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    pub number: usize,
    pub rows: Vec<usize>,
}

impl Sampler {
    pub fn new(args: &TrainingArguments) -> Self {
        let seed = args.data_seed.unwrap_or(args.seed);
        Self { seed, strategy: args.train_sampling_strategy, epoch: None, order: Vec::new() }
    }

    /// The micro-batches of update `step` (from 0).
    pub fn update(&mut self, plan: &Plan, step: usize) -> Vec<MicroBatch> {
        let epoch = plan.epoch_of(step);
        if self.epoch != Some(epoch) {
            self.order = match self.strategy {
                SamplingStrategy::Random => randperm(plan.rows, self.seed.wrapping_add(epoch as u64)),
                SamplingStrategy::Sequential => (0..plan.rows).collect(),
            };
            self.epoch = Some(epoch);
        }
        let rows = |i: usize| &self.order[i * plan.batch_size..((i + 1) * plan.batch_size).min(plan.rows)];
        plan.batches_of(step)
            .map(|i| MicroBatch { number: epoch * plan.batches_per_epoch + i, rows: rows(i).to_vec() })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(batch: usize, accumulation: usize, epochs: usize, max_steps: isize) -> TrainingArguments {
        TrainingArguments {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            num_train_epochs: epochs,
            max_steps,
            ..Default::default()
        }
    }

    #[test]
    fn the_order_is_that_of_the_reference() {
        // scripts/fixtures/trainer_order.py: torch.randperm and the batches that a Trainer was given.
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/fixtures/trainer_order.json")).unwrap();
        let list = |v: &serde_json::Value| -> Vec<usize> {
            v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect()
        };
        for case in fixture["randperm"].as_array().unwrap() {
            let (n, seed) = (case["n"].as_u64().unwrap() as usize, case["seed"].as_u64().unwrap());
            let order = randperm(n, seed);
            assert_eq!(order[..order.len().min(20)], list(&case["first"]), "n {n}, seed {seed}");
            assert_eq!(order[order.len().saturating_sub(5)..], list(&case["last"]), "n {n}, seed {seed}");
        }
        for case in fixture["trainer"].as_array().unwrap() {
            let number = |key: &str| case[key].as_u64().unwrap() as usize;
            let args = TrainingArguments {
                data_seed: case["data_seed"].as_u64(),
                seed: case["seed"].as_u64().unwrap(),
                dataloader_drop_last: case["dataloader_drop_last"].as_bool().unwrap(),
                train_sampling_strategy: match case["train_sampling_strategy"].as_str().unwrap() {
                    "random" => SamplingStrategy::Random,
                    _ => SamplingStrategy::Sequential,
                },
                ..args(
                    number("per_device_train_batch_size"),
                    number("gradient_accumulation_steps"),
                    number("num_train_epochs"),
                    case["max_steps"].as_i64().unwrap() as isize,
                )
            };
            let plan = Plan::new(number("rows"), &args).unwrap();
            assert_eq!(plan.max_steps, number("global_step"), "{case}");
            assert_eq!(plan.num_train_epochs, number("state_num_train_epochs"), "{case}");
            let mut sampler = Sampler::new(&args);
            let expected = case["updates"].as_array().unwrap();
            for (step, update) in expected.iter().enumerate() {
                let got: Vec<_> = sampler.update(&plan, step).into_iter().map(|b| b.rows).collect();
                let expected: Vec<_> = update["batches"].as_array().unwrap().iter().map(list).collect();
                assert_eq!(got, expected, "update {step} of {case}");
                assert_eq!(plan.epoch_after(step + 1), update["epoch"].as_f64().unwrap(), "update {step} of {case}");
            }
            assert_eq!(plan.max_steps, expected.len());
        }
    }

    #[test]
    fn micro_batches_are_numbered_through_the_run() {
        let args = args(2, 3, 2, -1);
        let plan = Plan::new(9, &args).unwrap(); // 5 micro-batches: 3 and 2 an epoch
        let mut sampler = Sampler::new(&args);
        let numbers: Vec<Vec<usize>> =
            (0..4).map(|s| sampler.update(&plan, s).iter().map(|b| b.number).collect()).collect();
        assert_eq!(numbers, [vec![0, 1, 2], vec![3, 4], vec![5, 6, 7], vec![8, 9]]);
        assert!(plan.ends_epoch(2) && plan.ends_epoch(4) && !plan.ends_epoch(3) && !plan.ends_epoch(0));
    }

    #[test]
    fn any_update_can_be_asked_for_first() {
        let args = args(4, 2, 3, -1);
        let plan = Plan::new(50, &args).unwrap();
        let mut in_order = Sampler::new(&args);
        for step in 0..plan.max_steps {
            assert_eq!(Sampler::new(&args).update(&plan, step), in_order.update(&plan, step));
        }
    }

    #[test]
    fn an_epoch_needs_a_batch() {
        assert_eq!(Plan::new(0, &args(2, 1, 1, -1)), None);
        assert_eq!(Plan::new(3, &TrainingArguments { dataloader_drop_last: true, ..args(4, 1, 1, -1) }), None);
    }
}
