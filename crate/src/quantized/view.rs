//! A quantized weight as slices, for the CPU.

use candle_core::DType;

use super::QuantType;

/// A quantized weight as slices: what the kernels read. Cheap to copy and to share with threads.
#[derive(Clone, Copy)]
pub struct QuantizedCpu<'a> {
    /// Codes: two a byte, the first element in the high nibble; `Int8` one a byte.
    pub packed: &'a [u8],
    pub absmax: AbsmaxCpu<'a>,
    pub quant_type: QuantType,
    /// Elements that share one `absmax`; a power of two, at least 32.
    pub blocksize: usize,
    /// The dtype that dequantized values are rounded to: F32, F16 or BF16.
    pub dtype: DType,
    /// Elements of the weight.
    pub len: usize,
}

/// The block maxima, plain or double-quantized.
#[derive(Clone, Copy)]
pub enum AbsmaxCpu<'a> {
    Plain(&'a [f32]),
    /// `code[codes[block]] * absmax[block / blocksize] + offset`, blocksize a power of two.
    Nested {
        codes: &'a [u8],
        code: &'a [f32; 256],
        absmax: &'a [f32],
        blocksize: usize,
        offset: f32,
    },
}

impl AbsmaxCpu<'_> {
    /// The maximum of one block, f32. Double quantization may return a small negative number
    /// for a block that is nearly zero, as in bitsandbytes.
    #[inline(always)]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Nested { codes, code, absmax, blocksize, offset } => {
                code[codes[block] as usize] * absmax[block >> blocksize.trailing_zeros()] + offset
            }
        }
    }
}
