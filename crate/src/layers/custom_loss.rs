//! The output head under a loss of the user's own, which candle differentiates.

use candle_core::{DType, Device, Tensor, Var};

use super::Linear;
use crate::{
    backend::{
        run::{Run, Saved},
        sequences::IGNORE_INDEX,
    },
    error::{Error, Result, ensure},
};

/// A loss: logits `[N, vocab]` f32 of the N positions that have a label, and the labels `[N]` u32,
/// to the SUM of the positions' losses, a tensor of one element that candle can differentiate.
pub type LossFn = dyn Fn(&Tensor, &Tensor) -> Result<Tensor>;

/// As [`head_and_loss`](super::loss::head_and_loss) with `loss` in place of the cross-entropy; on the CPU only. The
/// logits of all positions with a label exist at a time, some three times over: candle keeps what its way back needs.
///
/// # Errors
/// What `loss` returns, and a value that is no single number or does not depend on the logits.
pub fn head_and_custom_loss(hidden: &Tensor, head: &Linear, loss: &LossFn, run: &mut Run) -> Result<Option<Tensor>> {
    let backend = run.backend;
    let labels: Vec<u32> = run.targets.iter().filter(|t| **t != IGNORE_INDEX).map(|t| *t as u32).collect();
    let n = labels.len();
    if n == 0 {
        return Ok(None);
    }
    let x = backend.labelled_rows(hidden, 0..n, run)?;
    let dx = run.with_saved(Some(Saved::default()), |run| {
        let logits = Var::from_tensor(&head.forward_logits(&x, run)?)?; // (N, vocab)
        let value = loss(&logits, &Tensor::from_vec(labels, n, &Device::Cpu)?)?;
        let (got, expected) =
            (format!("a tensor of shape {:?}", value.dims()), "one number, the sum over the positions");
        ensure(value.elem_count() == 1, "loss", got, expected, "end it with sum_all()?")?;
        run.loss_sum += value.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?[0];
        let gradients = value.backward()?;
        let Some(d_logits) = gradients.get(&logits) else {
            let (got, expected) = ("a number without a gradient", "one that depends on the logits");
            let remedy = "compute it from the first argument, with candle's operations alone";
            return Err(Error::argument("loss", got, expected, remedy));
        };
        head.backward(&(d_logits * run.grad_scale)?.contiguous()?, true, run)
    })?;
    dx.map(|dx| backend.unlabelled_rows(vec![dx], run)).transpose()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        adapters::LoraAdapter,
        backend::{
            Tokens, cpu,
            operands::{Lora, Weight},
            param::Param,
            sequences::Sequences,
        },
        layers::loss::head_and_loss,
    };

    fn numbers(rows: usize, columns: usize, seed: f32) -> Tensor {
        let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 1.37 + seed).sin()).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn head() -> (Linear, Lora) {
        let lora = Lora {
            a: Param::new("a", &numbers(2, 4, 1.0)).unwrap(),
            b: Param::new("b", &numbers(7, 2, 2.0)).unwrap(),
            scaling: 2.0,
            dropout: 0.0,
            id: 0,
        };
        let linear = Linear::new("head", Weight::Dense(numbers(7, 4, 3.0)), None);
        (linear.with_adapter("default", Arc::new(LoraAdapter(lora.clone()))).with_active(Some("default")), lora)
    }

    fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let log_p = logits.broadcast_sub(&logits.exp()?.sum_keepdim(1)?.log()?)?;
        Ok(log_p.gather(&labels.unsqueeze(1)?, 1)?.sum_all()?.neg()?)
    }

    /// The loss and the gradient of `hidden` that `work` gives.
    fn pass(
        targets: &[i64],
        scale: f64,
        work: impl FnOnce(&mut Run) -> Result<Option<Tensor>>,
    ) -> Result<(f64, Option<Tensor>)> {
        let sequences = Sequences::new([targets.len()]);
        let ids = vec![0; targets.len()];
        let mut run = Run::new(&cpu::Cpu, &Tokens { ids: &ids, targets, sequences: &sequences });
        run.grad_scale = scale;
        let dx = work(&mut run)?;
        Ok((run.loss_sum, dx))
    }

    #[test]
    fn cross_entropy_as_a_custom_loss_is_the_built_in_one() {
        let (hidden, targets) = (numbers(5, 4, 0.0), [3, -100, 6, 0, -100]);
        let ((one, one_lora), (other, other_lora)) = (head(), head());
        let (sum, dx) = pass(&targets, 0.5, |run| head_and_loss(&hidden, &one, true, run)).unwrap();
        let custom = |run: &mut Run| head_and_custom_loss(&hidden, &other, &cross_entropy, run);
        let (custom_sum, custom_dx) = pass(&targets, 0.5, custom).unwrap();
        assert!((custom_sum - sum).abs() < 1e-5, "{custom_sum} and {sum}");
        let far =
            |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(far(&custom_dx.unwrap(), &dx.unwrap()) < 1e-6);
        assert!(far(one_lora.a.grad(), other_lora.a.grad()) < 1e-6);
        assert!(far(one_lora.b.grad(), other_lora.b.grad()) < 1e-6);
        assert!(one_lora.a.grad().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-3);
    }

    #[test]
    fn what_is_no_loss_is_refused() {
        let run = |targets: &[i64], loss: &LossFn| {
            pass(targets, 1.0, |run| head_and_custom_loss(&numbers(2, 4, 0.0), &head().0, loss, run))
        };
        let refused = |loss: &LossFn| run(&[1, 2], loss).unwrap_err().to_string();
        assert!(refused(&|logits, _| Ok(logits.clone())).contains("shape [2, 7]"));
        assert!(refused(&|_, _| Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?)).contains("without a gradient"));
        assert!(refused(&|_, _| Err(Error::argument("mine", 1, "2", "3"))).contains("mine"));
        assert_eq!(run(&[-100, -100], &cross_entropy).unwrap().0, 0.0);
    }
}
