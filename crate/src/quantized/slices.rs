//! Tensors as slices and back, with errors instead of panics.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use half::{bf16, f16};

use super::Element;
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
        _ => Err(Error::Unsupported {
            what: "device of a tensor that is read on the CPU".into(),
            got: "GPU".into(),
            supported: vec!["cpu".into()],
            remedy: "move the tensor to the CPU first: tensor.to_device(&Device::Cpu)?".into(),
        }),
    }
}

/// `f` for a slice of any of the three float types.
pub(crate) trait ForFloats {
    type Output;
    fn call<T: Element>(self, x: &[T]) -> Self::Output;
}

/// Runs `f` on the elements of an f32, f16 or bf16 CPU tensor.
pub(crate) fn for_floats<F: ForFloats>(x: &Tensor, f: F) -> Result<F::Output> {
    match x.dtype() {
        DType::F32 => with_slice::<f32, _>(x, |x| f.call(x)),
        DType::F16 => with_slice::<f16, _>(x, |x| f.call(x)),
        DType::BF16 => with_slice::<bf16, _>(x, |x| f.call(x)),
        other => Err(not_float(other)),
    }
}

pub(crate) fn not_float(dtype: DType) -> Error {
    Error::Unsupported {
        what: "dtype to quantize".into(),
        got: dtype.as_str().into(),
        supported: ["f32", "f16", "bf16"].map(String::from).into(),
        remedy: "quantize the float weight; a uint8 weight is quantized already".into(),
    }
}

/// Runs `f` on the elements of a float tensor as f32.
pub(crate) fn with_f32<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    struct AsF32<F>(F);
    impl<R, F: FnOnce(&[f32]) -> R> ForFloats for AsF32<F> {
        type Output = R;
        fn call<T: Element>(self, x: &[T]) -> R {
            let mut buffer = vec![0f32; if size_of::<T>() == 4 { 0 } else { x.len() }];
            (self.0)(T::as_f32(x, &mut buffer))
        }
    }
    for_floats(x, AsF32(f))
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
