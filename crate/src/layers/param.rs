//! Trainable parameters: a value and a gradient that live as long as training does.
//!
//! Only LoRA's matrices are trained, so there are few of them; both tensors are
//! allocated once and changed in place, which keeps a training step free of
//! allocation and lets a CUDA graph replay it.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor};

use crate::error::{Error, Result};

/// A named trainable f32 tensor and its gradient. Cloning is cheap and shares both.
#[derive(Clone)]
pub struct Param(Arc<Inner>);

struct Inner {
    name: String,
    value: Tensor,
    grad: Tensor,
}

impl Param {
    /// Copies `value` (any float dtype) to f32 and starts with a zero gradient.
    pub fn new(name: impl Into<String>, value: &Tensor) -> Result<Self> {
        let value = value.to_dtype(DType::F32)?.force_contiguous()?;
        let grad = value.zeros_like()?;
        Ok(Self(Arc::new(Inner { name: name.into(), value, grad })))
    }

    /// The module path, as PEFT names it: `base_model.model....lora_A.weight`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The value, f32. It changes in place at each optimizer step; `.copy()` it to keep it.
    pub fn value(&self) -> &Tensor {
        &self.0.value
    }

    /// The accumulated gradient, f32, the shape of the value.
    pub fn grad(&self) -> &Tensor {
        &self.0.grad
    }

    /// Forgets the accumulated gradient.
    pub fn zero_grad(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.0.grad.device().is_cuda() {
            return crate::cuda::fill_zero(&self.0.grad);
        }
        modify_f32(&self.0.grad, |g| g.fill(0.0))
    }

    /// Overwrites the value in place (loading an adapter or a checkpoint).
    pub fn set(&self, value: &Tensor) -> Result<()> {
        if value.dims() != self.0.value.dims() {
            return Err(Error::Shape {
                name: self.0.name.clone(),
                path: None,
                expected: self.0.value.dims().to_vec(),
                got: value.dims().to_vec(),
                remedy: "use an adapter made for this model and this rank".into(),
            });
        }
        let value = value.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        modify_f32(&self.0.value, |v| v.copy_from_slice(&value))
    }
}

/// Runs `f` on the elements of a contiguous f32 tensor, in place: those on a GPU are copied to the CPU and back.
pub fn modify_f32(tensor: &Tensor, f: impl FnOnce(&mut [f32])) -> Result<()> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        let mut values = copy_f32(tensor)?;
        f(&mut values);
        return crate::cuda::write(&*crate::cuda::of(tensor.device())?, crate::cuda::address(tensor)?, &values);
    }
    struct Op<F>(std::sync::Mutex<Option<F>>);
    impl<F: FnOnce(&mut [f32])> InplaceOp1 for Op<F> {
        fn name(&self) -> &'static str {
            "modify_f32"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
                candle_core::bail!("modify_f32: expected a contiguous f32 tensor");
            };
            if let Some(f) = self.0.lock().ok().and_then(|mut f| f.take()) {
                f(&mut data[start..end]);
            }
            Ok(())
        }
    }
    Ok(tensor.inplace_op1(&Op(std::sync::Mutex::new(Some(f))))?)
}

/// Runs `f` on the elements of a contiguous f32 tensor: those on a GPU are copied to the CPU.
pub fn read_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        return Ok(f(&copy_f32(tensor)?));
    }
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(data)), Some((start, end))) => Ok(f(&data[start..end])),
        _ => Err(candle_core::Error::Msg("read_f32: expected a contiguous f32 tensor".into()).bt().into()),
    }
}

#[cfg(feature = "cuda")]
fn copy_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    if tensor.dtype() != DType::F32 {
        return Err(candle_core::Error::Msg(format!("expected f32, got {:?}", tensor.dtype())).bt().into());
    }
    let mut values = vec![0f32; tensor.elem_count()];
    crate::cuda::copy_to_host(&*crate::cuda::of(tensor.device())?, crate::cuda::address(tensor)?, &mut values)?;
    Ok(values)
}
