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
//! The functions take tensors and look at where they are: a CPU and a GPU give the same bits.
//! [`oracle`] is the plain definition of both.

mod blockwise;
mod checkpoint;
pub mod oracle;
#[cfg(test)]
mod properties;

use candle_core::{DType, Tensor};

use crate::{
    backend::{self, cpu::quantize_4bit_read},
    error::{Result, ensure},
    quantized::{Read, check_blocksize, check_float},
};

pub use crate::{
    backend::cpu::dequantize_range,
    quantized::{
        AbsmaxCpu, BlockwiseState, NESTED_BLOCKSIZE, QuantState, QuantType, QuantizedCpu, QuantizedTensor,
        create_dynamic_map,
    },
};
pub use blockwise::{dequantize_blockwise, quantize_blockwise};

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
    check_blocksize(blocksize)?;
    let n = weight.elem_count();
    ensure(n > 0, "elements of the weight", n, "at least 1", "leave empty weights as they are")?;
    backend::of(weight.device())?.quantize(weight, quant_type, blocksize, compress_statistics)
}

/// The weight that `packed` and `state` stand for: of the state's dtype (f32, f16 or bf16)
/// and shape, each element `code * absmax` rounded once. It is where `packed` is.
pub fn dequantize_4bit(packed: &Tensor, state: &QuantState) -> Result<Tensor> {
    check_float(state.dtype)?;
    QuantizedTensor::new(packed, state)?.dequantize()
}

impl QuantizedTensor {
    /// Quantizes a float weight (see `quantize_4bit`).
    pub fn quantize(
        weight: &Tensor,
        quant_type: QuantType,
        blocksize: usize,
        compress_statistics: bool,
    ) -> Result<Self> {
        let (packed, state) = quantize_4bit(weight, quant_type, blocksize, compress_statistics)?;
        Self::new(&packed, &state)
    }

    /// Quantizes a weight as it is read, a piece at a time (see [`QuantizedTensor::quantize`]), to the CPU; what `read`
    /// gives are numbers of `dtype`.
    pub(crate) fn quantize_read(
        shape: &[usize],
        dtype: DType,
        quant_type: QuantType,
        blocksize: usize,
        compress_statistics: bool,
        read: &Read<'_>,
    ) -> Result<Self> {
        let (packed, state) = quantize_4bit_read(shape, dtype, quant_type, blocksize, compress_statistics, None, read)?;
        Self::new(&packed, &state)
    }

    /// The weight as floats (see [`dequantize_4bit`]).
    pub fn dequantize(&self) -> Result<Tensor> {
        check_float(self.dtype())?;
        backend::of(self.device())?.dequantize(self)
    }
}
