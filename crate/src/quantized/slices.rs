//! Tensors as slices and back, with errors instead of panics.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};

use super::is_float;
use crate::error::{Error, Result};

/// Runs `f` on the elements of a CPU tensor of element type `T`, row-major.
pub(crate) fn with_slice<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let data = cpu(&storage)?.as_slice::<T>()?;
    // A contiguous layout always has offsets.
    let (start, end) = layout.contiguous_offsets().unwrap_or((0, 0));
    Ok(f(&data[start..end]))
}

/// The storage as a CPU one.
pub(crate) fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => {
            let remedy = "move the tensor to the CPU first: tensor.to_device(&Device::Cpu)?";
            Err(Error::unsupported("device of a tensor that is read on the CPU", "GPU", ["cpu"], remedy))
        }
    }
}

pub(crate) fn not_float(dtype: DType) -> Error {
    let remedy = "quantize the float weight; a uint8 weight is quantized already";
    Error::unsupported("dtype to quantize", dtype.as_str(), ["f32", "f16", "bf16"], remedy)
}

/// Runs `f` on the elements of a float tensor as f32.
pub(crate) fn with_f32<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    if !is_float(x.dtype()) {
        return Err(not_float(x.dtype()));
    }
    with_slice::<f32, _>(&x.to_dtype(DType::F32)?, f)
}

/// A 1-dimensional CPU tensor.
pub(crate) fn tensor_f32(values: Vec<f32>) -> Result<Tensor> {
    let n = values.len();
    Ok(Tensor::from_vec(values, n, &Device::Cpu)?)
}

pub(crate) fn not_finite(index: usize, value: f32) -> Error {
    Error::argument(
        &format!("element {index} of the tensor to quantize"),
        value,
        "a finite number",
        "the checkpoint is damaged, or overflowed when it was converted to f16: get it again, or convert it to bf16",
    )
}
