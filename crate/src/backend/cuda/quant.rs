//! Quantized weights on the GPU, by `kernels/quantize_4bit.cu` and `dequantize_4bit.cu`: bit-equal
//! to those of the CPU.

use std::sync::Mutex;

use candle_core::{DType, Tensor};

use super::{self as cuda, CudaStream, Gpu, KernelArg, address, dtype_suffix};
use crate::{
    backend::internal,
    error::Result,
    quantized::{
        BlockwiseState, DynamicMap, NESTED_BLOCKSIZE, QuantState, QuantType, QuantizedTensor,
        absmax_mean::{Grid, vectorized},
        check_blocksize, check_float, code_on, not_finite, signed_code,
        slices::not_float,
        state::{expect, same_device},
    },
};

/// Elements a thread decodes: four words of eight 4-bit codes, or eight bytes.
const DECODED_4BIT: usize = 32;
const DECODED_INT8: usize = 8;

/// Above this many elements large blocks of threads pay; below, many blocks do.
const LARGE: usize = 1 << 24;

/// Writes the weight to `out`, the address of as many elements of `dtype` as it has, row-major:
/// each `code * absmax` rounded to the weight's own dtype, as the CPU does, then
/// to `dtype`. Launches one kernel and allocates nothing, so a CUDA graph may record it.
pub fn dequantize_into(gpu: &Gpu, stream: &CudaStream, weight: &QuantizedTensor, out: u64, dtype: DType) -> Result<()> {
    check_float(dtype)?;
    let state = weight.state();
    let (n, packed) = (state.elem_count(), address(weight.packed())?);
    if n == 0 {
        return Ok(());
    }
    let absmax = AbsmaxArgs::new(state)?;
    let via = match state.dtype {
        own if own == dtype => 0i32,
        DType::F16 => 1,
        DType::BF16 => 2,
        _ => 0,
    };
    // Words of codes and vectors of weights are read and written whole where they lie well.
    let aligned = i32::from(packed.is_multiple_of(8) && out.is_multiple_of(16));
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
    gpu.launch_on(stream, &format!("{kernel}_{}", dtype_suffix(dtype)?), grid, threads, 0, &args)
}

/// Whether [`dequantize_transposed_into`] serves.
pub fn transposes(weight: &QuantizedTensor, dtype: DType) -> bool {
    let whole = matches!(weight.shape(), [n, k] if n % 64 == 0 && k % 64 == 0);
    whole && weight.state().quant_type != QuantType::Int8 && matches!(dtype, DType::F16 | DType::BF16)
}

/// Writes the transpose of a weight `[n, k]` to `out`: `[k, n]` of `dtype`, the values that [`dequantize_into`]
/// gives. For weights that [`transposes`] allows.
pub fn dequantize_transposed_into(
    gpu: &Gpu,
    stream: &CudaStream,
    weight: &QuantizedTensor,
    out: u64,
    dtype: DType,
) -> Result<()> {
    let state = weight.state();
    let &[n, k] = weight.shape() else { return Err(internal("not a matrix")) };
    let (packed, a, code) = (address(weight.packed())?, AbsmaxArgs::new(state)?, values(state.quant_type));
    let (n_arg, k_arg) = (n as i32, k as i32);
    let args: [&dyn KernelArg; 11] =
        [&packed, &a.at, &a.absmax2, &a.code2, &a.offset, &a.log_block, &a.log_block2, &code, &out, &n_arg, &k_arg];
    let (to, via) = (dtype_suffix(dtype)?, dtype_suffix(state.dtype)?);
    let kernel = format!("dequantize_4bit_transposed_{to}_via_{via}");
    gpu.launch_on(stream, &kernel, (k / 64, n / 64, 1), 256, 0, &args)
}

/// How the kernels find a block's maximum.
pub(crate) struct AbsmaxArgs {
    pub at: u64,
    pub absmax2: u64,
    pub code2: u64,
    pub offset: f32,
    pub log_block: i32,
    pub log_block2: i32,
}

fn log(blocksize: usize) -> i32 {
    blocksize.trailing_zeros() as i32
}

impl AbsmaxArgs {
    pub fn new(state: &QuantState) -> Result<Self> {
        let (mut absmax2, mut code2, mut log_block2) = (0, 0, 0);
        if let Some(state2) = &state.state2 {
            (absmax2, code2, log_block2) = (address(&state2.absmax)?, address(&state2.code)?, log(state2.blocksize));
        }
        let (at, offset) = (address(&state.absmax)?, state.offset.unwrap_or(0.0));
        Ok(Self { at, absmax2, code2, offset, log_block: log(state.blocksize), log_block2 })
    }
}

/// The 16 values of a 4-bit type; of no use to `Int8`.
pub(crate) fn values(quant_type: QuantType) -> [f32; 16] {
    quant_type.values().first_chunk().copied().unwrap_or_default()
}

/// `dequantize_4bit` for a weight on the GPU.
pub(super) fn dequantize(weight: &QuantizedTensor) -> Result<Tensor> {
    let gpu = cuda::of(weight.packed().device())?;
    let out = cuda::uninit(gpu, weight.shape(), weight.dtype())?;
    dequantize_into(gpu, gpu.working_stream(), weight, address(&out)?, weight.dtype())?;
    Ok(out)
}

/// Elements a thread encodes at a time.
const ENCODED: usize = 8;

/// What is being quantized, and where it goes: the arguments that all encoding kernels begin with.
struct Encode<'a> {
    gpu: &'a Gpu,
    x: &'a Tensor,
    blocksize: usize,
    codes: &'a Tensor,
    absmax: &'a Tensor,
    /// Address of an i64 that becomes `!index` of the first element that is not finite.
    bad: u64,
}

impl Encode<'_> {
    /// Launches `kernel` with `more` arguments behind the common ones.
    fn launch(&self, kernel: &str, threads: usize, more: &[&dyn KernelArg]) -> Result<()> {
        let (x, n) = (address(self.x)?, self.x.elem_count());
        if n == 0 {
            return Ok(());
        }
        // As the kernel says: so many groups of eight a thread.
        let units = if self.x.dtype().size_in_bytes() == 2 { 4 } else { 2 };
        let (codes, absmax) = (address(self.codes)?, address(self.absmax)?);
        let (n_arg, log_block, aligned) = (n as i64, log(self.blocksize), i32::from(x.is_multiple_of(16)));
        let common: [&dyn KernelArg; 7] = [&x, &codes, &absmax, &n_arg, &log_block, &self.bad, &aligned];
        let args = [&common[..], more].concat();
        let grid = (n.div_ceil(ENCODED * units * threads), 1, 1);
        self.gpu.launch(&format!("{kernel}_{}", dtype_suffix(self.x.dtype())?), grid, threads, 0, &args)
    }
}

/// Where kernels leave what the caller must know: two indices (see `Encode::bad`), of the weight and of
/// its maxima, and the mean. Read once, when all kernels are launched.
struct Report(Tensor);

impl Report {
    fn new(gpu: &Gpu) -> Result<Self> {
        cuda::zeros(gpu, 3, DType::I64).map(Self)
    }

    fn address(&self, field: u64) -> Result<u64> {
        Ok(address(&self.0)? + field * 8)
    }

    /// Waits for the kernels. The mean; an error for the first element of `x` or of the maxima that
    /// is not finite.
    fn read(&self, x: &Tensor, maxima: Option<&Tensor>) -> Result<f32> {
        let fields = self.0.to_vec1::<i64>()?;
        let mean = f32::from_bits(fields[2] as u32);
        let value = |x: &Tensor, index: usize| -> Result<f32> {
            Ok(x.flatten_all()?.narrow(0, index, 1)?.to_dtype(DType::F32)?.to_vec1::<f32>()?[0])
        };
        if fields[0] != 0 {
            let index = !fields[0] as usize;
            return Err(not_finite(index, value(x, index)?));
        }
        if let Some(maxima) = maxima.filter(|_| fields[1] != 0) {
            let index = !fields[1] as usize;
            return Err(not_finite(index, value(maxima, index)? - mean));
        }
        Ok(mean)
    }
}

fn floats(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 | DType::F16 | DType::BF16 => Ok(x.contiguous()?),
        other => Err(not_float(other)),
    }
}

/// `quantize_4bit` for a weight on the GPU.
pub(super) fn quantize(
    weight: &Tensor,
    quant_type: QuantType,
    blocksize: usize,
    compress_statistics: bool,
) -> Result<(Tensor, QuantState)> {
    let gpu = cuda::of(weight.device())?;
    let (shape, x) = (weight.dims().to_vec(), floats(weight)?);
    let (n, report) = (x.elem_count(), Report::new(gpu)?);
    let packed = cuda::uninit(gpu, (quant_type.packed_len(n), 1), DType::U8)?;
    let absmax = cuda::uninit(gpu, n.div_ceil(blocksize), DType::F32)?;
    // A block of weights belongs to one block of threads.
    let threads = (blocksize / ENCODED).max(256);
    let encode = Encode { gpu, x: &x, blocksize, codes: &packed, absmax: &absmax, bad: report.address(0)? };
    match quant_type {
        QuantType::Int8 => encode.launch("quantize_int8", threads, &[])?,
        _ => {
            let thresholds = quant_type.thresholds();
            let mut above = [f32::INFINITY; 16];
            above[..15].copy_from_slice(&thresholds.above);
            let codes = thresholds.code.iter().rev().fold(0u64, |all, code| all << 4 | u64::from(*code));
            let in_order = thresholds.code.iter().enumerate().all(|(rank, code)| rank == *code as usize);
            let kernel = if in_order { "quantize_in_order" } else { "quantize_permuted" };
            encode.launch(kernel, threads, &[&above, &codes])?;
        }
    }
    let nested = match compress_statistics {
        true => Some(compress(gpu, &absmax, &report)?),
        false => None,
    };
    let mean = report.read(&x, nested.is_some().then_some(&absmax))?;
    let offset = nested.is_some().then_some(mean);
    let (absmax, state2) = match nested {
        Some((codes, state2)) => (codes, Some(state2)),
        None => (absmax, None),
    };
    let (dtype, code) = (weight.dtype(), quant_type.code()?);
    Ok((packed, QuantState { absmax, shape, dtype, blocksize, quant_type, code, offset, state2 }))
}

/// Double quantization: the codes of the maxima less their mean, which goes to the report.
fn compress(gpu: &Gpu, maxima: &Tensor, report: &Report) -> Result<(Tensor, BlockwiseState)> {
    let n = maxima.elem_count();
    let Grid { threads, blocks } = Grid::new(n);
    let sums = cuda::uninit(gpu, blocks, DType::F32)?;
    let (maxima_at, sums_at) = (address(maxima)?, address(&sums)?);
    let (n_arg, vectorized) = (n as i64, i32::from(vectorized(n)));
    gpu.launch("absmax_sums", (blocks, 1, 1), threads, 0, &[&maxima_at, &n_arg, &vectorized, &sums_at])?;

    let codes = cuda::uninit(gpu, n, DType::U8)?;
    let absmax = cuda::uninit(gpu, n.div_ceil(NESTED_BLOCKSIZE), DType::F32)?;
    let above = above(gpu)?;
    let encode =
        Encode { gpu, x: maxima, blocksize: NESTED_BLOCKSIZE, codes: &codes, absmax: &absmax, bad: report.address(1)? };
    let (above, count, inverse, mean) = (address(&above)?, blocks as i32, 1.0 / n as f32, report.address(2)?);
    // PyTorch's last block of threads, which adds the sums up, has 512.
    encode.launch("quantize_dynamic", 512, &[&above, &sums_at, &count, &inverse, &mean])?;
    let code = signed_code(maxima.device())?;
    Ok((codes, BlockwiseState { absmax, code, blocksize: NESTED_BLOCKSIZE, dtype: DType::F32 }))
}

/// The signed map's thresholds; one tensor a GPU.
fn above(gpu: &Gpu) -> Result<Tensor> {
    static ABOVE: Mutex<Vec<Tensor>> = Mutex::new(Vec::new());
    let mut tensors = ABOVE.lock().unwrap_or_else(|e| e.into_inner());
    let device = gpu.device();
    if let Some(above) = tensors.iter().find(|t| t.device().same_device(&device)) {
        return Ok(above.clone());
    }
    let above = Tensor::new(&DynamicMap::signed().above, &device)?;
    tensors.push(above.clone());
    Ok(above)
}

/// `quantize_blockwise` for a tensor on the GPU.
pub(super) fn quantize_blockwise(x: &Tensor, blocksize: usize) -> Result<(Tensor, BlockwiseState)> {
    let gpu = cuda::of(x.device())?;
    let (shape, x) = (x.shape().clone(), floats(x)?);
    let report = Report::new(gpu)?;
    let codes = cuda::uninit(gpu, shape, DType::U8)?;
    let absmax = cuda::uninit(gpu, x.elem_count().div_ceil(blocksize), DType::F32)?;
    let above = above(gpu)?;
    let encode = Encode { gpu, x: &x, blocksize, codes: &codes, absmax: &absmax, bad: report.address(0)? };
    // Nothing is subtracted.
    let (above, sums, count, inverse, mean) = (address(&above)?, 0u64, 0i32, 0f32, 0u64);
    encode.launch("quantize_dynamic", 512, &[&above, &sums, &count, &inverse, &mean])?;
    report.read(&x, None)?;
    Ok((codes, BlockwiseState { absmax, code: signed_code(x.device())?, blocksize, dtype: x.dtype() }))
}

/// `dequantize_blockwise` for codes on the GPU, of which the state has the right number.
pub(super) fn dequantize_blockwise(q: &Tensor, state: &BlockwiseState) -> Result<Tensor> {
    check_float(state.dtype)?;
    check_blocksize(state.blocksize)?;
    let (device, n) = (q.device(), q.elem_count());
    expect("codes", q, DType::U8, n)?;
    expect("absmax", &state.absmax, DType::F32, n.div_ceil(state.blocksize))?;
    expect("code", &state.code, DType::F32, 256)?;
    same_device("absmax", &state.absmax, q)?;
    let gpu = cuda::of(device)?;
    let (q, absmax) = (q.contiguous()?, state.absmax.contiguous()?);
    let code = code_on(&state.code, device)?.contiguous()?;
    let out = cuda::uninit(gpu, q.shape(), state.dtype)?;
    if n > 0 {
        let (q, absmax, code, out) = (address(&q)?, address(&absmax)?, address(&code)?, address(&out)?);
        let (n_arg, log_block) = (n as i64, log(state.blocksize));
        let kernel = format!("dequantize_blockwise_{}", dtype_suffix(state.dtype)?);
        gpu.launch(&kernel, (n.div_ceil(256), 1, 1), 256, 0, &[&q, &absmax, &code, &out, &n_arg, &log_block])?;
    }
    Ok(out)
}
