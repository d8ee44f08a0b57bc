//! Gradients of modules that learn whole.

use candle_core::{DType, Tensor};

use super::{
    super::{
        SavedModules,
        param::{Param, modify_f32},
        run::Run,
    },
    Cpu, F32View, math,
    matmul::gemm_f32,
    tile::Mat,
};
use crate::error::Result;

impl SavedModules for Cpu {
    fn cast_weight(&self, weight: &Param, _activations: DType) -> Result<Tensor> {
        Ok(weight.value().clone())
    }

    fn weight_backward(&self, x: &Tensor, dy: &Tensor, weight: &Param, _run: &Run) -> Result<()> {
        let ((m, k), (_, n)) = (x.dims2()?, dy.dims2()?);
        let (x, dy) = (F32View::new(x)?, F32View::new(dy)?);
        modify_f32(weight.grad(), |dw| {
            gemm_f32((n, k, m), 1.0, Mat::rows(&dy, n).t(), Mat::rows(&x, k), dw, k, true, true);
        })
    }

    fn embed_backward(&self, dx: &Tensor, table: &Param, padding_idx: Option<usize>, run: &Run) -> Result<()> {
        let (_, c) = dx.dims2()?;
        let dx = F32View::new(dx)?;
        modify_f32(table.grad(), |grad| {
            for (row, &id) in dx.chunks_exact(c).zip(run.ids) {
                let id = id as usize;
                if Some(id) != padding_idx {
                    math::axpy(1.0, row, &mut grad[id * c..(id + 1) * c]);
                }
            }
        })
    }
}
