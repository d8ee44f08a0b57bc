//! 4-bit weights: NF4 and its relatives, bit-equal to bitsandbytes.
//!
//! A weight is cut into blocks (64 elements by default, row-major). Each block stores its
//! largest magnitude, `absmax`, and for every element a 4-bit code: the nearest of 16 fixed
//! values to `x / absmax`. Double quantization stores the `absmax` themselves in 8 bits, in
//! blocks of 256, which brings a parameter from 4.5 to 4.127 bits.
//!
//! ```
//! use qlora_nb::quant::{QuantType, dequantize_4bit, quantize_4bit};
//! # use candle_core::{Device, Tensor};
//! let weight = Tensor::randn(0f32, 1f32, (64, 64), &Device::Cpu)?;
//! let (packed, state) = quantize_4bit(&weight, QuantType::Nf4, 64, true)?;
//! assert_eq!(packed.dims(), [64 * 64 / 2, 1]);
//! assert_eq!(dequantize_4bit(&packed, &state)?.dims(), [64, 64]);
//! # Ok::<(), qlora_nb::error::Error>(())
//! ```
//!
//! The functions take tensors and look at where they are; what runs on the CPU works on slices
//! (`encode` to quantize, `cpu` to dequantize, `simd` beneath both), with `oracle` as their
//! plain definition. The model's layers read weights through [`dequantize_range`]. On a GPU
//! (`cuda`) kernels do the same and give the same bits.

mod blockwise;
mod checkpoint;
mod code;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod encode;
mod mean;
pub mod oracle;
#[cfg(test)]
mod properties;
pub(crate) mod simd;
mod state;
pub(crate) mod tensor;

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

pub(crate) use blockwise::DynamicMap;
pub use blockwise::{BLOCKSIZE as NESTED_BLOCKSIZE, BlockwiseState, dequantize_blockwise, quantize_blockwise};
pub use code::{QuantType, create_dynamic_map};
pub(crate) use cpu::round_all;
pub use cpu::{AbsmaxCpu, QuantizedCpu, dequantize_range};
#[cfg(feature = "cuda")]
pub(crate) use cuda::{AbsmaxArgs, values};
#[cfg(feature = "cuda")]
pub use cuda::{dequantize_into, dequantize_transposed_into, transposes};
pub use state::{QuantState, QuantizedTensor};

use crate::error::{Error, Result};
pub(crate) use encode::Element;

/// Quantizes a weight in blocks of `blocksize` elements.
///
/// - `weight`: f32, f16 or bf16, any shape, at least one element, all finite.
/// - `blocksize`: 32, 64, ... 4096; the last block may be partial.
/// - `compress_statistics`: double quantization.
///
/// Returns the codes, uint8 `[(n+1)/2, 1]` with the first element of each two in the high
/// nibble (`[n, 1]` for `Int8`), and the state that undoes it; both where `weight` is. Fails on a NaN or infinite
/// element, naming its index in the flattened weight.
pub fn quantize_4bit(
    weight: &Tensor,
    quant_type: QuantType,
    blocksize: usize,
    compress_statistics: bool,
) -> Result<(Tensor, QuantState)> {
    check_weight(weight.elem_count(), blocksize)?;
    #[cfg(feature = "cuda")]
    if weight.device().is_cuda() {
        return cuda::quantize(weight, quant_type, blocksize, compress_statistics);
    }
    let (mut packed, mut absmax) = room(weight.elem_count(), quant_type, blocksize);
    let job = Quantize { quant_type, blocksize, packed: &mut packed, absmax: &mut absmax };
    tensor::for_floats(weight, job)??;
    finish(packed, absmax, weight.dims(), weight.dtype(), quant_type, blocksize, compress_statistics)
}

/// Fills a slice with the elements of a weight from an index on. Several threads call it, for a piece each.
pub(crate) type Read<'a> = dyn Fn(usize, &mut [f32]) -> Result<()> + Sync + 'a;

/// [`quantize_4bit`] of a weight that is nowhere in memory, to the CPU. What `read` gives are numbers of `dtype`.
pub(crate) fn quantize_4bit_read(
    shape: &[usize],
    dtype: DType,
    quant_type: QuantType,
    blocksize: usize,
    compress_statistics: bool,
    read: &Read<'_>,
) -> Result<(Tensor, QuantState)> {
    check_float(dtype)?;
    let n = shape.iter().product();
    check_weight(n, blocksize)?;
    let (mut packed, mut absmax) = room(n, quant_type, blocksize);
    encode::quantize_read(n, read, quant_type, blocksize, &mut packed, &mut absmax)?;
    finish(packed, absmax, shape, dtype, quant_type, blocksize, compress_statistics)
}

fn check_weight(elements: usize, blocksize: usize) -> Result<()> {
    check_blocksize(blocksize)?;
    if elements == 0 {
        return Err(Error::argument("elements of the weight", 0, "at least 1", "leave empty weights as they are"));
    }
    Ok(())
}

/// For the codes of n elements, and the maxima of their blocks.
fn room(n: usize, quant_type: QuantType, blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    (vec![0u8; quant_type.packed_len(n)], vec![0f32; n.div_ceil(blocksize)])
}

/// Codes and maxima as tensors, these quantized themselves with `compress_statistics`.
fn finish(
    packed: Vec<u8>,
    mut absmax: Vec<f32>,
    shape: &[usize],
    dtype: DType,
    quant_type: QuantType,
    blocksize: usize,
    compress_statistics: bool,
) -> Result<(Tensor, QuantState)> {
    let (absmax, offset, state2) = if compress_statistics {
        let offset = mean::cuda_mean(&absmax);
        absmax.iter_mut().for_each(|a| *a -= offset);
        let (codes, state2) = quantize_blockwise(&tensor::tensor_f32(absmax)?, NESTED_BLOCKSIZE)?;
        (codes, Some(offset), Some(state2))
    } else {
        (tensor::tensor_f32(absmax)?, None, None)
    };
    let code = quant_type.code()?;
    let state = QuantState { absmax, shape: shape.to_vec(), dtype, blocksize, quant_type, code, offset, state2 };
    let len = packed.len();
    Ok((Tensor::from_vec(packed, (len, 1), &Device::Cpu)?, state))
}

struct Quantize<'a> {
    quant_type: QuantType,
    blocksize: usize,
    packed: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl tensor::ForFloats for Quantize<'_> {
    type Output = Result<()>;

    fn call<T: Element>(self, x: &[T]) -> Result<()> {
        encode::quantize(x, self.quant_type, self.blocksize, self.packed, self.absmax).map_err(|index| {
            let mut buffer = [0f32; 1];
            tensor::not_finite(index, T::as_f32(&x[index..=index], &mut buffer)[0])
        })
    }
}

/// The weight that `packed` and `state` stand for: of the state's dtype (f32, f16 or bf16)
/// and shape, each element `code * absmax` rounded once. It is where `packed` is.
pub fn dequantize_4bit(packed: &Tensor, state: &QuantState) -> Result<Tensor> {
    check_float(state.dtype)?;
    let weight = QuantizedTensor::new(packed, state)?;
    #[cfg(feature = "cuda")]
    if packed.device().is_cuda() {
        return cuda::dequantize(&weight);
    }
    weight.with_cpu(|view| match state.dtype {
        DType::F16 => dequantize_to::<f16>(view, &state.shape),
        DType::BF16 => dequantize_to::<bf16>(view, &state.shape),
        _ => dequantize_to::<f32>(view, &state.shape),
    })?
}

fn dequantize_to<T: Element + WithDType>(view: &QuantizedCpu<'_>, shape: &[usize]) -> Result<Tensor> {
    // Whole blocks a task, and enough of them to be worth one; a buffer that stays in the cache.
    const TASK: usize = 1 << 16;
    const BUFFER: usize = 1 << 12;
    let mut out = vec![T::zero(); view.len];
    out.par_chunks_mut(TASK).enumerate().for_each(|(task, out)| {
        let mut buffer = [0f32; BUFFER];
        for (i, out) in out.chunks_mut(BUFFER).enumerate() {
            let buffer = &mut buffer[..out.len()];
            dequantize_range(view, task * TASK + i * BUFFER, buffer);
            T::from_f32s(buffer, out);
        }
    });
    Ok(Tensor::from_vec(out, shape, &Device::Cpu)?)
}

pub(crate) fn check_blocksize(blocksize: usize) -> Result<()> {
    if blocksize.is_power_of_two() && (32..=4096).contains(&blocksize) {
        return Ok(());
    }
    Err(Error::argument("blocksize", blocksize, "a power of two from 32 to 4096", "use 64, as QLoRA does"))
}

pub(crate) fn check_float(dtype: DType) -> Result<()> {
    if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: "dtype of a dequantized weight".into(),
        got: dtype.as_str().into(),
        supported: ["f32", "f16", "bf16"].map(String::from).into(),
        remedy: "use DType::F16 or DType::BF16 as bnb_4bit_compute_dtype".into(),
    })
}
