//! Quantized weights on the GPU, by `kernels/cuda/{de,}quantize_4bit.cu`: bit-equal to the CPU's.

use candle_core::{DType, Tensor};

use super::{QuantState, QuantType, QuantizedTensor, check_float};
use crate::{
    cuda::{self, Gpu, KernelArg, address, dtype_suffix},
    error::Result,
};

/// Elements a thread decodes: four words of eight 4-bit codes, or eight bytes.
const DECODED_4BIT: usize = 32;
const DECODED_INT8: usize = 8;

/// Above this many elements large blocks of threads pay; below, many blocks do.
const LARGE: usize = 1 << 24;

/// Writes the weight to `out`, the address of as many elements of `dtype` as it has, row-major:
/// each `code * absmax` rounded to the weight's own dtype, as [`super::dequantize_range`] does, then
/// to `dtype`. Launches one kernel and allocates nothing, so a CUDA graph may record it.
pub fn dequantize_into(gpu: &Gpu, weight: &QuantizedTensor, out: u64, dtype: DType) -> Result<()> {
    check_float(dtype)?;
    let state = weight.state();
    let (n, packed) = (state.elem_count(), address(weight.packed())?);
    let absmax = AbsmaxArgs::new(state)?;
    let via = match state.dtype {
        own if own == dtype => 0i32,
        DType::F16 => 1,
        DType::BF16 => 2,
        _ => 0,
    };
    // Words of codes and vectors of weights are read and written whole where they lie well.
    let aligned = i32::from(packed % 8 == 0 && out % 16 == 0);
    let (code, n_arg) = (values(state.quant_type), n as i64);
    let threads = if n >= LARGE { 256 } else { 128 };
    let AbsmaxArgs { at, absmax2, code2, offset, log_block, log_block2 } = &absmax;
    let args: [&dyn KernelArg; 12] =
        [&packed, at, absmax2, code2, offset, log_block, log_block2, &code, &out, &n_arg, &via, &aligned];
    let (kernel, decoded) = match (state.quant_type, via) {
        (QuantType::Int8, _) => ("dequantize_int8", DECODED_INT8),
        (_, 0) => ("dequantize_4bit", DECODED_4BIT),
        _ => ("dequantize_4bit_via", DECODED_4BIT),
    };
    let grid = (n.div_ceil(decoded * threads), 1, 1);
    gpu.launch(&format!("{kernel}_{}", dtype_suffix(dtype)?), grid, threads, 0, &args)
}

/// How the kernels find a block's maximum.
struct AbsmaxArgs {
    at: u64,
    absmax2: u64,
    code2: u64,
    offset: f32,
    log_block: i32,
    log_block2: i32,
}

impl AbsmaxArgs {
    fn new(state: &QuantState) -> Result<Self> {
        let log = |blocksize: usize| blocksize.trailing_zeros() as i32;
        let (mut absmax2, mut code2, mut log_block2) = (0, 0, 0);
        if let Some(state2) = &state.state2 {
            (absmax2, code2, log_block2) = (address(&state2.absmax)?, address(&state2.code)?, log(state2.blocksize));
        }
        let (at, offset) = (address(&state.absmax)?, state.offset.unwrap_or(0.0));
        Ok(Self { at, absmax2, code2, offset, log_block: log(state.blocksize), log_block2 })
    }
}

/// The 16 values of a 4-bit type; of no use to `Int8`.
fn values(quant_type: QuantType) -> [f32; 16] {
    quant_type.values().first_chunk().copied().unwrap_or_default()
}

/// `dequantize_4bit` for a weight on the GPU.
pub(super) fn dequantize(weight: &QuantizedTensor) -> Result<Tensor> {
    let gpu = cuda::of(weight.packed().device())?;
    let out = cuda::uninit(&gpu, weight.shape(), weight.dtype())?;
    dequantize_into(&gpu, weight, address(&out)?, weight.dtype())?;
    Ok(out)
}
