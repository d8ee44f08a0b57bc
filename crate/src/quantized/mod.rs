//! What a quantized weight is: code books, the state that undoes quantization, views of both. Data, wherever it lies;
//! what works on it is [`crate::backend`]'s, and [`crate::quant`] is what users call.

pub(crate) mod absmax_mean;
mod code;
mod dynamic_map;
mod element;
pub(crate) mod slices;
pub(crate) mod state;
mod view;

use candle_core::DType;

pub(crate) use code::Thresholds;
pub use code::{QuantType, create_dynamic_map};
pub use dynamic_map::{BLOCKSIZE as NESTED_BLOCKSIZE, BlockwiseState};
pub(crate) use dynamic_map::{DynamicMap, code_on, signed_code};
pub(crate) use element::{filled, round_all, round_to};
pub(crate) use slices::{not_finite, tensor_f32, with_f32, with_slice};
pub use state::{QuantState, QuantizedTensor};
pub use view::{AbsmaxCpu, QuantizedCpu};

use crate::error::{Error, Result, ensure};

/// Fills a slice with the elements of a weight from an index on. Several threads call it, for a piece each.
pub(crate) type Read<'a> = dyn Fn(usize, &mut [f32]) -> Result<()> + Sync + 'a;

pub(crate) fn check_blocksize(blocksize: usize) -> Result<()> {
    let fine = blocksize.is_power_of_two() && (32..=4096).contains(&blocksize);
    ensure(fine, "blocksize", blocksize, "a power of two from 32 to 4096", "use 64, as QLoRA does")
}

/// Whether weights come in it.
pub(crate) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

pub(crate) fn check_float(dtype: DType) -> Result<()> {
    if is_float(dtype) {
        return Ok(());
    }
    let remedy = "use DType::F16 or DType::BF16 as bnb_4bit_compute_dtype";
    Err(Error::unsupported("dtype of a dequantized weight", dtype.as_str(), ["f32", "f16", "bf16"], remedy))
}
