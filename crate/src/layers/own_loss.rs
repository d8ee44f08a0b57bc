//! The output head under a loss of the user's own, which candle differentiates.

use candle_core::{DType, Device, Tensor, Var};

use super::{
    cpu::F32View,
    linear::Linear,
    run::Run,
    sequences::{IGNORE_INDEX, Sequences},
};
use crate::error::{Error, Result};

/// A loss: logits `[N, vocab]` f32 of the N positions that have a label, and the labels `[N]` u32,
/// to the SUM of the positions' losses, a tensor of one element that candle can differentiate.
pub type LossFn = dyn Fn(&Tensor, &Tensor) -> Result<Tensor>;

/// As [`head_and_loss`](super::cross_entropy::head_and_loss) with `loss` in place of the cross-entropy.
/// The logits of all positions with a label exist at a time, some three times over: candle keeps
/// what its way back needs.
///
/// # Errors
/// What `loss` returns, and a value that is no single number or does not depend on the logits.
pub fn head_and_own_loss(
    hidden: &Tensor,
    head: &Linear,
    targets: &[i64],
    grad_scale: f64,
    dropout_key: Option<u64>,
    loss: &LossFn,
) -> Result<(f64, usize, Option<Tensor>)> {
    let (m, c) = hidden.dims2()?;
    let rows: Vec<usize> = (0..m).filter(|&i| targets[i] != IGNORE_INDEX).collect();
    if rows.is_empty() {
        return Ok((0.0, 0, None));
    }
    let n = rows.len();
    let view = F32View::new(hidden)?;
    let x: Vec<f32> = rows.iter().flat_map(|&i| view[i * c..(i + 1) * c].iter().copied()).collect();
    let labels: Vec<u32> = rows.iter().map(|&i| targets[i] as u32).collect();
    let sequences = Sequences::new([n]);
    let mut run = Run::training(&sequences, dropout_key);
    let logits = head.forward(&Tensor::from_vec(x, (n, c), &Device::Cpu)?, None, &mut run)?; // [N, vocab]
    let logits = Var::from_tensor(&logits)?;
    let value = loss(&logits, &Tensor::from_vec(labels, n, &Device::Cpu)?)?;
    if value.elem_count() != 1 {
        let got = format!("a tensor of shape {:?}", value.dims());
        return Err(Error::argument("loss", got, "one number, the sum over the positions", "end it with sum_all()?"));
    }
    let sum = value.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?[0];
    let gradients = value.backward()?;
    let Some(d_logits) = gradients.get(&logits) else {
        let remedy = "compute it from the first argument, with candle's operations alone";
        return Err(Error::argument("loss", "a number without a gradient", "one that depends on the logits", remedy));
    };
    let d_logits = (d_logits * grad_scale)?.contiguous()?;
    let Some(dx) = head.backward(&d_logits, true, &mut run)? else { return Ok((sum, n, None)) };
    let dx = F32View::new(&dx)?;
    let mut grad = vec![0f32; m * c];
    for (from, &i) in dx.chunks_exact(c).zip(&rows) {
        grad[i * c..(i + 1) * c].copy_from_slice(from);
    }
    Ok((sum, n, Some(Tensor::from_vec(grad, (m, c), &Device::Cpu)?)))
}

#[cfg(test)]
mod tests {
    use super::{super::cross_entropy::head_and_loss, *};
    use crate::layers::{linear::Lora, linear::Weight, param::Param};

    fn numbers(rows: usize, columns: usize, seed: f32) -> Tensor {
        let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 1.37 + seed).sin()).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn head() -> Linear {
        let lora = Lora {
            a: Param::new("a", &numbers(2, 4, 1.0)).unwrap(),
            b: Param::new("b", &numbers(7, 2, 2.0)).unwrap(),
            scaling: 2.0,
            dropout: 0.0,
            id: 0,
        };
        Linear::new("head", Weight::Dense(numbers(7, 4, 3.0)), None).with_lora(lora)
    }

    fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let log_p = logits.broadcast_sub(&logits.exp()?.sum_keepdim(1)?.log()?)?;
        Ok(log_p.gather(&labels.unsqueeze(1)?, 1)?.sum_all()?.neg()?)
    }

    #[test]
    fn cross_entropy_as_an_own_loss_is_the_built_in_one() {
        let (hidden, targets) = (numbers(5, 4, 0.0), [3, -100, 6, 0, -100]);
        let (one, other) = (head(), head());
        let (sum, n, dx) = head_and_loss(&hidden, &one, &targets, Some(0.5), None).unwrap();
        let own = head_and_own_loss(&hidden, &other, &targets, 0.5, None, &cross_entropy).unwrap();
        assert!((own.0 - sum).abs() < 1e-5 && own.1 == n, "{} and {sum}", own.0);
        let far =
            |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(far(&own.2.unwrap(), &dx.unwrap()) < 1e-6);
        let (one, other) = (one.lora.unwrap(), other.lora.unwrap());
        assert!(far(one.a.grad(), other.a.grad()) < 1e-6 && far(one.b.grad(), other.b.grad()) < 1e-6);
        assert!(one.a.grad().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 1e-3);
    }

    #[test]
    fn what_is_no_loss_is_refused() {
        let run =
            |targets: &[i64], loss: &LossFn| head_and_own_loss(&numbers(2, 4, 0.0), &head(), targets, 1.0, None, loss);
        let refused = |loss: &LossFn| run(&[1, 2], loss).unwrap_err().to_string();
        assert!(refused(&|logits, _| Ok(logits.clone())).contains("shape [2, 7]"));
        assert!(refused(&|_, _| Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?)).contains("without a gradient"));
        assert!(refused(&|_, _| Err(Error::argument("mine", 1, "2", "3"))).contains("mine"));
        assert_eq!(run(&[-100, -100], &cross_entropy).unwrap().0, 0.0);
    }
}
