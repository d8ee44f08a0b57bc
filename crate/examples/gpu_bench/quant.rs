//! Quantizing and dequantizing on the card; a copy of as many bytes beside them, which is the limit.

use qlora_nb::{
    candle_core::{DType, Error as TensorError, Tensor, cuda_backend::cudarc::driver::result},
    error::Result,
    internals::backend::cuda::{address, dequantize_into, uninit},
    quant::{QuantType, QuantizedTensor},
};

use crate::bench::Bench;

pub fn run(bench: &Bench) -> Result<()> {
    copy(bench)?;
    for (rows, columns) in [(8192, 8192), (6144, 2048), (2048, 2048), (8192, 2048)] {
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            for nested in [true, false] {
                if rows * columns == 1 << 26 || (dtype == DType::F16 && nested) {
                    dequantize(bench, rows, columns, dtype, nested)?;
                }
            }
        }
    }
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for nested in [true, false] {
            quantize(bench, dtype, nested)?;
        }
    }
    Ok(())
}

fn weight(bench: &Bench, rows: usize, columns: usize, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 0.05, (rows, columns), &bench.device)?.to_dtype(dtype)?)
}

/// The bytes of a quantized weight of n elements, as the kernels read or write them.
fn quantized_bytes(n: usize, nested: bool) -> usize {
    let blocks = n / 64;
    n / 2 + if nested { blocks + blocks / 256 * 4 } else { blocks * 4 }
}

fn copy(bench: &Bench) -> Result<()> {
    let n = 1usize << 26;
    let buffers = [weight(bench, 8192, 8192, DType::F16)?, weight(bench, 8192, 8192, DType::F16)?];
    let out = weight(bench, 8192, 8192, DType::F16)?;
    let time = bench.card(|i| {
        let (from, to) = (address(&buffers[i % 2])?, address(&out)?);
        // SAFETY: both are n elements of two bytes.
        let copied = unsafe { result::memcpy_dtod_async(to, from, n * 2, bench.gpu.stream().cu_stream()) };
        Ok(copied.map_err(|e| TensorError::Msg(e.to_string()))?)
    })?;
    time.print("copy of 128 MiB", n * 4);
    Ok(())
}

fn dequantize(bench: &Bench, rows: usize, columns: usize, dtype: DType, nested: bool) -> Result<()> {
    let n = rows * columns;
    // Together at least 256 MiB are read and written before a buffer comes again.
    let sets = (1usize << 28).div_ceil(n * 2).clamp(2, 16);
    let q = QuantizedTensor::quantize(&weight(bench, rows, columns, dtype)?, QuantType::Nf4, 64, nested)?;
    let weights = (0..sets)
        .map(|_| {
            let packed = q.packed().copy()?;
            QuantizedTensor::new(&packed, q.state())
        })
        .collect::<Result<Vec<_>>>()?;
    let outs = (0..sets).map(|_| uninit(bench.gpu, n, dtype)).collect::<Result<Vec<_>>>()?;
    let time = bench.card(|i| {
        dequantize_into(bench.gpu, bench.gpu.stream(), &weights[i % sets], address(&outs[i % sets])?, dtype)
    })?;
    let what = format!("dequantize {rows} x {columns} {}{}", dtype.as_str(), if nested { " double" } else { "" });
    time.print(&what, n * dtype.size_in_bytes() + quantized_bytes(n, nested));
    Ok(())
}

/// All of it: allocation, the check for NaN, the mean that comes back to the host.
fn quantize(bench: &Bench, dtype: DType, nested: bool) -> Result<()> {
    let weights = [weight(bench, 8192, 8192, dtype)?, weight(bench, 8192, 8192, dtype)?];
    let mut keep = [None, None];
    let time = bench.host(|i| {
        keep[i % 2] = None;
        keep[i % 2] = Some(QuantizedTensor::quantize(&weights[i % 2], QuantType::Nf4, 64, nested)?);
        Ok(())
    })?;
    let n = 1usize << 26;
    let what = format!("quantize 8192 x 8192 {}{}, in all", dtype.as_str(), if nested { " double" } else { "" });
    time.print(&what, n * dtype.size_in_bytes() + quantized_bytes(n, nested));
    Ok(())
}
