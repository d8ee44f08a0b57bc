//! Learning-rate schedules, as transformers' `get_*_schedule`.

use std::f64::consts::PI;

use crate::names::named;

/// How the learning rate changes over a run, after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SchedulerType {
    /// Down to 0 in a straight line.
    #[default]
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
    /// The same throughout, without warm-up.
    Constant,
    /// The same throughout, after the warm-up.
    ConstantWithWarmup,
}

named!(SchedulerType: "lr_scheduler_type", "use \"linear\", the default, or \"cosine\"" {
    Linear => "linear",
    Cosine => "cosine",
    Constant => "constant",
    ConstantWithWarmup => "constant_with_warmup",
});

/// What the learning rate of optimizer step `step` (from 0) is multiplied with, in [0, 1].
///
/// `warmup_steps` climb in a straight line from 0 (`Constant` ignores them); `training_steps`
/// counts them too. Beyond the end the factor is 0 (1 for the constant ones; a cosine rises
/// again, as in transformers).
pub fn lr_at(kind: SchedulerType, step: usize, warmup_steps: usize, training_steps: usize) -> f64 {
    let (step, warmup, total) = (step as f64, warmup_steps as f64, training_steps as f64);
    if step < warmup && kind != SchedulerType::Constant {
        return step / warmup.max(1.0);
    }
    match kind {
        SchedulerType::Constant | SchedulerType::ConstantWithWarmup => 1.0,
        SchedulerType::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
        SchedulerType::Cosine => {
            let progress = (step - warmup) / (total - warmup).max(1.0);
            (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
        }
    }
}

/// The number of warm-up steps of a `warmup_ratio`: a share of all steps, rounded up.
pub fn warmup_steps(warmup_ratio: f64, training_steps: usize) -> usize {
    (training_steps as f64 * warmup_ratio).ceil() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_and_end_where_they_should() {
        use SchedulerType::*;
        for kind in SchedulerType::ALL {
            let at = |step| lr_at(kind, step, 10, 110);
            assert_eq!(at(5), if kind == Constant { 1.0 } else { 0.5 }, "{kind}");
            assert_eq!(at(10), 1.0, "{kind}");
            assert_eq!(at(110) < 1e-9, matches!(kind, Linear | Cosine), "{kind}");
            assert_eq!(kind.as_str().parse::<SchedulerType>().unwrap(), kind);
        }
        assert_eq!(lr_at(Linear, 60, 10, 110), 0.5);
        assert_eq!(lr_at(Linear, 200, 10, 110), 0.0);
        assert_eq!(lr_at(Linear, 0, 0, 0), 0.0, "no steps, no division by zero");
        assert!("polynomial".parse::<SchedulerType>().unwrap_err().to_string().contains("cosine"));
        assert_eq!((warmup_steps(0.03, 100), warmup_steps(0.03, 101), warmup_steps(0.0, 9)), (3, 4, 0));
    }
}
