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

    /// Those of `first` and the blocks after it.
    #[inline(always)]
    pub fn read(&self, first: usize, out: &mut [f32]) {
        match self {
            Self::Plain(absmax) => out.copy_from_slice(&absmax[first..][..out.len()]),
            Self::Nested { codes, code, absmax, blocksize, offset } => {
                let (mut codes, mut out, mut at) = (&codes[first..][..out.len()], out, first);
                while !out.is_empty() {
                    // Blocks that share a scale.
                    let n = out.len().min(blocksize - (at & (blocksize - 1)));
                    let scale = absmax[at >> blocksize.trailing_zeros()];
                    let (now, rest) = out.split_at_mut(n);
                    now.iter_mut().zip(codes).for_each(|(out, c)| *out = code[usize::from(*c)] * scale + offset);
                    (codes, out, at) = (&codes[n..], rest, at + n);
                }
            }
        }
    }
}
