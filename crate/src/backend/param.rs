//! Trainable parameters: a value and a gradient that live as long as training does.
//!
//! Only LoRA's matrices are trained, so there are few of them; both tensors are
//! allocated once and changed in place, which keeps a training step free of
//! allocation and lets a CUDA graph replay it.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

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

    /// Whether both are one parameter.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Forgets the accumulated gradient; waits for a pass that another thread makes on the device.
    pub fn zero_grad(&self) -> Result<()> {
        let backend = super::of(self.0.grad.device())?;
        let _one = backend.lock();
        backend.fill_zero(&self.0.grad)
    }

    /// Overwrites the value in place (loading an adapter or a checkpoint); waits as [`Param::zero_grad`] does.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        if value.dims() != self.0.value.dims() {
            let remedy = "use an adapter made for this model and this rank";
            return Err(Error::shape(self.name(), None, self.0.value.dims(), value.dims(), remedy));
        }
        let value = value.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let _one = super::of(self.0.value.device())?.lock();
        modify_f32(&self.0.value, |v| v.copy_from_slice(&value))
    }
}

/// Runs `f` on the elements of a contiguous f32 tensor, in place: those on a GPU are copied to the CPU and back.
pub fn modify_f32(tensor: &Tensor, f: impl FnOnce(&mut [f32])) -> Result<()> {
    let mut f = Some(f);
    super::of(tensor.device())?.modify_f32(tensor, &mut |data| {
        if let Some(f) = f.take() {
            f(data);
        }
    })
}

/// Runs `f` on the elements of a contiguous f32 tensor: those on a GPU are copied to the CPU.
pub fn read_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (mut f, mut done) = (Some(f), None);
    super::of(tensor.device())?.read_f32(tensor, &mut |data| done = f.take().map(|f| f(data)))?;
    done.ok_or_else(|| super::internal("read_f32 read nothing"))
}
