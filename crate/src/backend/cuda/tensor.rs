//! candle tensors on the GPU as addresses, and new ones from its memory.

use candle_core::{
    CudaStorage, DType, Shape, Storage, Tensor,
    cuda_backend::{
        CudaStorageSlice,
        cudarc::driver::{self, DevicePtr},
    },
    op::BackpropOp,
};
use half::{bf16, f16};

use super::Gpu;
use crate::error::Result;

/// Where the first element of a contiguous tensor is.
pub fn address(tensor: &Tensor) -> Result<u64> {
    Ok(alloc(tensor)?.0)
}

/// Where the first element of a contiguous tensor is, and how many elements of its dtype there are
/// from there to the end of its memory: more than the tensor has, when it is the head of a padded one.
pub fn alloc(tensor: &Tensor) -> Result<(u64, usize)> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(CudaStorage { slice, device }) = &*storage else {
        return Err(candle_core::Error::Msg("expected a tensor on the GPU, got one on the CPU".into()).bt().into());
    };
    let Some((start, _)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::Msg(format!("expected a contiguous tensor, got {layout:?}")).bt().into());
    };
    let stream = device.cuda_stream();
    macro_rules! at {
        ($($kind:ident),*) => {
            match slice {
                $(CudaStorageSlice::$kind(s) => {
                    let (pointer, _guard) = s.device_ptr(&stream);
                    Ok((pointer + (start * tensor.dtype().size_in_bytes()) as u64, s.len() - start))
                })*
                _ => Err(candle_core::Error::Msg(format!("no kernel takes {:?}", tensor.dtype())).bt().into()),
            }
        };
    }
    at!(U8, U32, I32, I64, F16, BF16, F32, F64)
}

/// A tensor whose elements are whatever was there.
pub fn uninit(gpu: &Gpu, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    make(gpu, shape.into(), dtype, false)
}

/// A tensor of zeros.
pub fn zeros(gpu: &Gpu, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    make(gpu, shape.into(), dtype, true)
}

fn make(gpu: &Gpu, shape: Shape, dtype: DType, zeroed: bool) -> Result<Tensor> {
    // The driver gives no empty piece of memory.
    let n = shape.elem_count().max(1);
    macro_rules! of {
        ($($dtype:ident: $t:ty),*) => {
            match dtype {
                $(DType::$dtype => {
                    let doing = format!("asking for {:.1} MiB", (n * size_of::<$t>()) as f64 / (1 << 20) as f64);
                    let slice = gpu.with_room(|| match zeroed {
                        true => gpu.stream.alloc_zeros::<$t>(n),
                        false if gpu.is_recording() => gpu.alloc_recorded::<$t>(n),
                        // SAFETY: any bits are a number of this type; the caller writes before it reads.
                        false => unsafe { gpu.stream.alloc::<$t>(n) },
                    });
                    CudaStorageSlice::$dtype(slice.map_err(super::driver_error(&doing))?)
                })*
                other => return Err(candle_core::Error::Msg(format!("no kernel makes {other:?}")).bt().into()),
            }
        };
    }
    let slice = of!(U8: u8, U32: u32, I32: i32, I64: i64, F16: f16, BF16: bf16, F32: f32, F64: f64);
    let storage = Storage::Cuda(CudaStorage { slice, device: gpu.device.clone() });
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// Sets a contiguous tensor's elements to zero, in place.
pub fn fill_zero(tensor: &Tensor) -> Result<()> {
    let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
    clear(super::of(tensor.device())?, address(tensor)?, bytes)
}

/// Sets bytes at an address to zero.
pub(crate) fn clear(gpu: &Gpu, at: u64, bytes: usize) -> Result<()> {
    gpu.bind()?;
    // SAFETY: the callers give memory of as many bytes.
    unsafe { driver::result::memset_d8_async(at, 0, bytes, gpu.working_stream().cu_stream()) }
        .map_err(super::driver_error("clearing memory"))
}

/// Copies numbers of the host to an address, in the order of the stream.
pub(crate) fn write<T: Copy>(gpu: &Gpu, to: u64, values: &[T]) -> Result<()> {
    if values.is_empty() {
        return Ok(());
    }
    gpu.bind()?;
    // SAFETY: the callers give memory of as many numbers; a copy from pageable memory is staged before the call
    // returns.
    unsafe { driver::result::memcpy_htod_async(to, values, gpu.stream.cu_stream()) }
        .map_err(super::driver_error("copying to the GPU"))
}

/// Copies numbers from an address to the host, when all that was launched before is done.
pub fn copy_to_host<T: Copy>(gpu: &Gpu, from: u64, values: &mut [T]) -> Result<()> {
    if !values.is_empty() {
        gpu.bind()?;
        // SAFETY: the callers give memory of as many numbers; the host reads them after the stream has come to its end.
        unsafe { driver::result::memcpy_dtoh_async(values, from, gpu.stream.cu_stream()) }
            .map_err(super::driver_error("copying from the GPU"))?;
    }
    gpu.synchronize()
}

/// The end of a kernel's name for a dtype.
pub fn dtype_suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => Err(candle_core::Error::Msg(format!("no kernel computes in {other:?}")).bt().into()),
    }
}

/// Copies bytes on the card, in the order of what is launched.
pub(crate) fn copy_on_card(gpu: &Gpu, from: u64, to: u64, bytes: usize) -> Result<()> {
    gpu.bind()?;
    // SAFETY: the callers give memory of as many bytes.
    unsafe { driver::result::memcpy_dtod_async(to, from, bytes, gpu.working_stream().cu_stream()) }
        .map_err(super::driver_error("copying on the GPU"))
}

/// The numbers of an f32 tensor, on the CPU.
pub(super) fn copy_f32(gpu: &Gpu, tensor: &Tensor) -> Result<Vec<f32>> {
    if tensor.dtype() != DType::F32 {
        return Err(crate::backend::internal(format!("expected f32, got {:?}", tensor.dtype())));
    }
    let mut values = vec![0f32; tensor.elem_count()];
    copy_to_host(gpu, address(tensor)?, &mut values)?;
    Ok(values)
}
