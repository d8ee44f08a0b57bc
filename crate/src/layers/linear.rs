//! Linear layers: any weight, with or without LoRA.
//!
//! The base weight is frozen: its gradient is never computed, and its backward is the one
//! product dx = dy W. A LoRA adapter (arXiv:2106.09685) can stand on any of them, so a
//! model's file knows nothing of LoRA.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use super::{
    cpu::{
        F32View,
        matmul::{Mat, WeightView, gemm_f32, matmul_nn, matmul_nt},
    },
    dropout, gelu,
    norm::Normed,
    only_cpu,
    param::{Param, modify_f32},
    run::Run,
};
use crate::{error::Result, quant::QuantizedTensor};

/// A frozen weight `[out, in]`, as it is stored.
#[derive(Clone)]
pub enum Weight {
    /// f32, f16 or bf16.
    Dense(Tensor),
    /// Packed codes and their statistics.
    Quantized(QuantizedTensor),
}

impl Weight {
    /// `[out, in]`.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        Ok(match self {
            Self::Dense(t) => t.dims2()?,
            Self::Quantized(q) => (q.shape()[0], q.shape()[1]),
        })
    }

    /// The weight in the dtype that it was quantized from.
    pub fn dequantize(&self) -> Result<Tensor> {
        match self {
            Self::Dense(t) => Ok(t.clone()),
            Self::Quantized(q) => q.dequantize(),
        }
    }

    /// Bytes that the weight takes, statistics included.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Dense(t) => t.elem_count() * t.dtype().size_in_bytes(),
            Self::Quantized(q) => q.num_bytes(),
        }
    }

    fn with_view<R>(&self, f: impl FnOnce(&WeightView) -> R) -> Result<R> {
        let tensor = match self {
            Self::Quantized(q) => return q.with_cpu(|view| f(&WeightView::Quantized(*view))),
            Self::Dense(t) => t,
        };
        let (storage, layout) = tensor.storage_and_layout();
        let range = layout.contiguous_offsets().map(|(start, end)| start..end);
        match (&*storage, range) {
            (Storage::Cpu(CpuStorage::F32(w)), Some(r)) => Ok(f(&WeightView::F32(&w[r]))),
            (Storage::Cpu(CpuStorage::F16(w)), Some(r)) => Ok(f(&WeightView::F16(&w[r]))),
            (Storage::Cpu(CpuStorage::BF16(w)), Some(r)) => Ok(f(&WeightView::Bf16(&w[r]))),
            _ => Err(candle_core::Error::Msg(format!("weight: {:?} is not computed with", tensor.dtype())).bt().into()),
        }
    }
}

/// A low-rank update: y += scaling * B A dropout(x).
#[derive(Clone)]
pub struct Lora {
    /// `[r, in]`, f32.
    pub a: Param,
    /// `[out, r]`, f32.
    pub b: Param,
    /// alpha / r, or alpha / sqrt(r) under rsLoRA.
    pub scaling: f64,
    /// Probability that an element of x is dropped in training.
    pub dropout: f64,
    /// Distinguishes the dropout masks of the layers of one pass.
    pub id: u64,
}

/// y = x W^T + bias (+ LoRA), x `[M, in]`, y `[M, out]`.
#[derive(Clone)]
pub struct Linear {
    /// The module's path in the model: `transformer.h.0.mlp.dense_4h_to_h`.
    pub name: String,
    pub weight: Weight,
    /// `[out]`, in the checkpoint's dtype.
    pub bias: Option<Tensor>,
    pub lora: Option<Lora>,
}

impl Linear {
    pub fn new(name: impl Into<String>, weight: Weight, bias: Option<Tensor>) -> Self {
        Self { name: name.into(), weight, bias, lora: None }
    }

    /// The same layer with an adapter on it; the weight is shared.
    pub fn with_lora(&self, lora: Lora) -> Self {
        Self { lora: Some(lora), ..self.clone() }
    }

    /// y, plus `residual` `[M, out]` when given; saves x when an adapter needs it.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::linear_forward(self, x, residual, run);
        }
        only_cpu("linear", x.device())?;
        let (m, _) = x.dims2()?;
        let (n, k) = self.weight.dims2()?;
        let mut out = match residual {
            Some(r) => F32View::new(r)?.to_vec(),
            None => vec![0f32; m * n],
        };
        if let Some(bias) = &self.bias {
            let bias = bias.to_dtype(DType::F32)?;
            let bias = F32View::new(&bias)?;
            out.chunks_exact_mut(n).for_each(|row| super::cpu::math::axpy(1.0, &bias, row));
        }
        {
            let x = F32View::new(x)?;
            self.weight.with_view(|w| matmul_nt((m, n, k), &x, w, &mut out))?;
        }
        if let Some(lora) = &self.lora {
            run.save(x);
            let x = lora.dropped(x, run)?;
            let u = lora.down(&x)?;
            let b = F32View::new(lora.b.value())?;
            let r = lora.rank();
            gemm_f32((m, n, r), lora.scaling as f32, Mat::rows(&u, r), Mat::rows(&b, r).t(), &mut out, n, true, true);
        }
        Ok(Tensor::from_vec(out, (m, n), &Device::Cpu)?)
    }

    /// gelu(y), without y in memory where that pays; saves what both save.
    pub fn forward_gelu(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::linear_gelu(self, x, run);
        }
        gelu::forward(&self.forward(x, None, run)?, run)
    }

    /// [`Linear::forward`] of a norm's output, without that in memory where it pays.
    pub fn forward_normed(&self, input: &Normed, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(y) = super::cuda::linear_normed(self, input, false, run)? {
            return Ok(y);
        }
        self.forward(input.tensor(run)?, None, run)
    }

    /// [`Linear::forward_gelu`] of a norm's output, without that in memory where it pays.
    pub fn forward_normed_gelu(&self, input: &Normed, run: &mut Run) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(y) = super::cuda::linear_normed(self, input, true, run)? {
            return Ok(y);
        }
        self.forward_gelu(input.tensor(run)?, run)
    }

    /// Saves what [`Linear::forward`] saves, without its result: for a block that is computed again on the way back.
    pub fn remember(&self, x: &Tensor, run: &mut Run) -> Result<()> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::linear_remember(self, x, run);
        }
        if self.lora.is_some() {
            run.save(x);
        }
        Ok(())
    }

    /// dy to dx; adds to the adapter's gradients. With `need_dx` false (nothing below learns)
    /// dx is not computed.
    pub fn backward(&self, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return super::cuda::linear_backward(self, dy, need_dx, run);
        }
        let (m, n) = dy.dims2()?;
        let (_, k) = self.weight.dims2()?;
        let dyv = F32View::new(dy)?;
        let mut dx = Vec::new();
        if need_dx {
            dx.resize(m * k, 0f32);
            self.weight.with_view(|w| matmul_nn((m, n, k), &dyv, w, &mut dx))?;
        }
        if let Some(lora) = &self.lora {
            let x = run.take()?;
            let x = lora.dropped(&x, run)?;
            lora.backward((m, n, k), &x, &dyv, need_dx.then_some(&mut dx), run)?;
        }
        if !need_dx {
            return Ok(None);
        }
        Ok(Some(Tensor::from_vec(dx, (m, k), &Device::Cpu)?))
    }
}

/// x as the adapter sees it: itself, or a copy with elements dropped.
enum Dropped<'a> {
    Same(F32View<'a>),
    Copy(Vec<f32>),
}

impl std::ops::Deref for Dropped<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Same(view) => view,
            Self::Copy(data) => data,
        }
    }
}

impl Lora {
    /// The rank r.
    pub fn rank(&self) -> usize {
        self.a.value().dims()[0]
    }

    fn mask_key(&self, run: &Run) -> Option<u64> {
        run.dropout_key.filter(|_| self.dropout > 0.0).map(|key| dropout::mix(key ^ self.id))
    }

    fn dropped<'a>(&self, x: &'a Tensor, run: &Run) -> Result<Dropped<'a>> {
        let view = F32View::new(x)?;
        Ok(match self.mask_key(run) {
            None => Dropped::Same(view),
            Some(key) => {
                let mut copy = view.to_vec();
                dropout::apply(&mut copy, key, self.dropout);
                Dropped::Copy(copy)
            }
        })
    }

    /// u = x A^T, `[M, r]`.
    fn down(&self, x: &[f32]) -> Result<Vec<f32>> {
        let (r, k) = self.a.value().dims2()?;
        let m = x.len() / k;
        let a = F32View::new(self.a.value())?;
        let mut u = vec![0f32; m * r];
        gemm_f32((m, r, k), 1.0, Mat::rows(x, k), Mat::rows(&a, k).t(), &mut u, r, false, true);
        Ok(u)
    }

    fn backward(
        &self,
        (m, n, k): (usize, usize, usize),
        x: &[f32],
        dy: &[f32],
        dx: Option<&mut Vec<f32>>,
        run: &Run,
    ) -> Result<()> {
        let (r, scale) = (self.rank(), self.scaling as f32);
        let u = self.down(x)?;
        let mut du = vec![0f32; m * r];
        {
            let b = F32View::new(self.b.value())?;
            gemm_f32((m, r, n), scale, Mat::rows(dy, n), Mat::rows(&b, r), &mut du, r, false, true);
        }
        modify_f32(self.b.grad(), |db| {
            gemm_f32((n, r, m), scale, Mat::rows(dy, n).t(), Mat::rows(&u, r), db, r, true, true);
        })?;
        modify_f32(self.a.grad(), |da| {
            gemm_f32((r, k, m), 1.0, Mat::rows(&du, r).t(), Mat::rows(x, k), da, k, true, true);
        })?;
        let Some(dx) = dx else { return Ok(()) };
        let a = F32View::new(self.a.value())?;
        match self.mask_key(run) {
            None => gemm_f32((m, k, r), 1.0, Mat::rows(&du, r), Mat::rows(&a, k), dx, k, true, true),
            Some(key) => {
                let mut through = vec![0f32; m * k];
                gemm_f32((m, k, r), 1.0, Mat::rows(&du, r), Mat::rows(&a, k), &mut through, k, false, true);
                dropout::apply(&mut through, key, self.dropout);
                super::cpu::math::axpy(1.0, &through, dx);
            }
        }
        Ok(())
    }
}
