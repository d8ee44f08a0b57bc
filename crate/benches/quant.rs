//! Speed of quantization on one core and on all: `cargo bench -p qlora-nb --bench quant`.
//!
//! Seen on 2 cores of an AMD EPYC (Zen 4, AVX-512), in elements/s of one core:
//! - NF4 quantization of f32: 880 M; of f16 640 M, of bf16 690 M; FP4 540 to 640 M (goal 300 M).
//! - `dequantize_range` in cache: 11.4 to 13.4 G; over a whole weight: 9 to 11 G (goal 4 G).
//! - A weight to an f16 tensor, both cores: 3.4 G; 0.35 G before it was converted within the tasks.

use std::{hint::black_box, time::Instant};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    error::Result,
    quant::{QuantType, QuantizedTensor, dequantize_range},
};

/// Seconds of the fastest of several runs.
fn best(mut f: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    let started = Instant::now();
    while started.elapsed().as_secs_f64() < 0.4 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

fn main() -> Result<()> {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(|e| e.to_string());
    let Ok(one) = one else { return Ok(()) };
    let (rows, columns) = (2048, 2048);
    let n = (rows * columns) as f64;
    let weight = Tensor::randn(0f32, 1f32, (rows, columns), &Device::Cpu)?;

    println!("quantize {rows}x{columns}, blocks of 64, double quantization");
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let weight = weight.to_dtype(dtype)?;
            let quantize = || drop(black_box(QuantizedTensor::quantize(&weight, quant_type, 64, true)));
            let (core, all) = (best(|| one.install(quantize)), best(quantize));
            let read = n * dtype.size_in_bytes() as f64;
            println!(
                "  {quant_type} {:4}  one core {:6.0} M elements/s {:5.1} GB/s read   all {:6.0} M elements/s",
                dtype.as_str(),
                n / core / 1e6,
                read / core / 1e9,
                n / all / 1e6
            );
        }
    }

    println!("dequantize_range to f32, one core");
    for (what, range) in
        [("in cache (16 K elements a call)", 1 << 14), ("from and to memory (whole weight)", rows * columns)]
    {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for nested in [false, true] {
                let q = QuantizedTensor::quantize(&weight.to_dtype(dtype)?, QuantType::Nf4, 64, nested)?;
                let mut out = vec![0f32; range];
                let calls = if range == 1 << 14 { 64 } else { 1 };
                let seconds = q.with_cpu(|view| {
                    best(|| {
                        for _ in 0..calls {
                            dequantize_range(view, black_box(0), &mut out);
                            black_box(&mut out);
                        }
                    })
                })?;
                let elements = (range * calls) as f64 / seconds;
                println!(
                    "  {what}: {:4} {}  {:6.2} G elements/s {:6.1} GB/s written",
                    dtype.as_str(),
                    if nested { "nested" } else { "single" },
                    elements / 1e9,
                    elements * 4.0 / 1e9
                );
            }
        }
    }
    let q = QuantizedTensor::quantize(&weight.to_dtype(DType::F16)?, QuantType::Nf4, 64, true)?;
    let seconds = best(|| drop(black_box(q.dequantize())));
    println!("dequantize to an f16 tensor, all cores: {:.2} G elements/s", n / seconds / 1e9);
    Ok(())
}
