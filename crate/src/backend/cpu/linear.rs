//! Linear layers: any weight, with or without LoRA.

use std::ops::Deref;

use candle_core::{DType, Device, Tensor};

use super::{
    super::{
        Activations, Linears, dropout,
        operands::{Around, Frozen, Input, Lora, Weight},
        param::modify_f32,
        run::Run,
    },
    Cpu, F32View,
    dots::FEW_ROWS,
    math,
    matmul::{Compute, gemm_f32, product_nn, product_nt},
    tile::Mat,
};
use crate::error::Result;

const LORA_INPUT: &str = "lora: input";

impl Linears for Cpu {
    /// Saves x when an adapter needs it.
    fn linear(
        &self,
        frozen: &Frozen,
        lora: Option<&Lora>,
        input: &Input,
        around: &Around,
        run: &mut Run,
    ) -> Result<Tensor> {
        let x = input.tensor(run)?;
        let (m, _) = x.dims2()?;
        let (n, k) = frozen.weight.dims2()?;
        let bias = frozen.bias.as_ref().map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        let mut out = {
            let residual = around.residual.map(F32View::new).transpose()?;
            let bias = bias.as_ref().map(F32View::new).transpose()?;
            let around = [residual.as_deref(), bias.as_deref()];
            let x = F32View::new(x)?;
            frozen.weight.with_view(|w| product_nt((m, n, k), &x, w, around, compute(frozen)))?
        };
        if let Some(lora) = lora {
            run.save(LORA_INPUT, x);
            let x = lora.dropped(x, run)?;
            let (u, r, scale) = (lora.down(&x)?, lora.rank(), lora.scaling as f32);
            let b = F32View::new(lora.b.value())?;
            if m <= FEW_ROWS {
                for (u, out) in u.chunks_exact(r).zip(out.chunks_exact_mut(n)) {
                    math::add_products(scale, &b, u, out);
                }
            } else {
                gemm_f32((m, n, r), scale, Mat::rows(&u, r), Mat::rows(&b, r).t(), &mut out, n, true, true);
            }
        }
        let y = Tensor::from_vec(out, (m, n), &Device::Cpu)?;
        if around.gelu { self.gelu(&y, run) } else { Ok(y) }
    }

    fn remember_lora(&self, _lora: &Lora, x: &Tensor, run: &mut Run) -> Result<()> {
        run.save(LORA_INPUT, x);
        Ok(())
    }

    fn linear_backward(
        &self,
        frozen: &Frozen,
        lora: Option<&Lora>,
        dy: &Tensor,
        need_dx: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>> {
        let (m, n) = dy.dims2()?;
        let (_, k) = frozen.weight.dims2()?;
        let dyv = F32View::new(dy)?;
        let mut dx = Vec::new();
        if need_dx {
            dx = frozen.weight.with_view(|w| product_nn((m, n, k), &dyv, w, compute(frozen)))?;
        }
        if let Some(lora) = lora {
            let x = run.take(LORA_INPUT)?;
            let x = lora.dropped(&x, run)?;
            lora.backward((m, n, k), &x, &dyv, need_dx.then_some(&mut dx), run)?;
        }
        if !need_dx {
            return Ok(None);
        }
        Ok(Some(Tensor::from_vec(dx, (m, k), &Device::Cpu)?))
    }
}

/// bf16 where `bnb_4bit_compute_dtype` says so: for quantized weights, and for others that are stored in it.
fn compute(frozen: &Frozen) -> Compute {
    let stored = match &frozen.weight {
        Weight::Quantized(_) => DType::BF16,
        Weight::Dense(weight) => weight.dtype(),
    };
    if (frozen.compute_dtype, stored) == (Some(DType::BF16), DType::BF16) { Compute::Bf16 } else { Compute::F32 }
}

/// x as the adapter sees it: itself, or a copy with elements dropped.
enum Dropped<'a> {
    Same(F32View<'a>),
    Copy(Vec<f32>),
}

impl Deref for Dropped<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Same(view) => view,
            Self::Copy(data) => data,
        }
    }
}

impl Lora {
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
        if m <= FEW_ROWS {
            for (u, x) in u.chunks_exact_mut(r).zip(x.chunks_exact(k)) {
                u.iter_mut().zip(a.chunks_exact(k)).for_each(|(u, a)| *u = math::dot(x, a));
            }
            return Ok(u);
        }
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
                math::axpy(1.0, &through, dx);
            }
        }
        Ok(())
    }
}
