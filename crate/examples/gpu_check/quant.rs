//! Quantization on the card against the CPU's: every bit.

use qlora_nb::{
    candle_core::{DType, Device, Tensor},
    error::Result,
    internals::backend::cuda::{self, dequantize_into},
    quant::{
        BlockwiseState, QuantType, QuantizedTensor, dequantize_4bit, dequantize_blockwise, quantize_4bit,
        quantize_blockwise,
    },
};

use crate::check::{Checks, Rng, difference};

const TYPES: [QuantType; 4] = [QuantType::Nf4, QuantType::Fp4, QuantType::Int4, QuantType::Int8];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Of one element to many blocks of threads; whole and partial blocks of weights, odd counts.
const SIZES: [usize; 14] = [1, 2, 7, 31, 64, 65, 129, 1000, 4096, 4097, 16_384, 16_385, 70_001, 1 << 20];

pub fn run(checks: &mut Checks) -> Result<()> {
    for quant_type in TYPES {
        for dtype in DTYPES {
            for nested in [false, true] {
                quantize(checks, quant_type, dtype, nested)?;
                dequantize(checks, quant_type, dtype, nested)?;
            }
        }
    }
    means(checks)?;
    for dtype in DTYPES {
        blockwise(checks, dtype)?;
    }
    not_finite(checks)?;
    large(checks)?;
    between_devices(checks)
}

/// Weights of all magnitudes, with zeros, denormals, and whole stretches of either.
fn weights(rng: &mut Rng, n: usize, dtype: DType) -> Result<Tensor> {
    let mut scale = 1f32;
    let values: Vec<f32> = (0..n)
        .map(|i| {
            if i % 64 == 0 {
                scale = [1.0, 1.0, 1.0, 0.02, 3e4, 0.0, 1e-40, 1e-7][rng.below(8)];
            }
            let value = match rng.below(12) {
                0 => [0.0, -0.0, 1.0, -1.0][rng.below(4)],
                // Often exactly on a threshold or on a value of the code book, when the block's maximum is 1.
                1 => [0.861_478_4, -0.848_096_4, 0.0859375, 0.5 / 7.0, -0.583333, 0.039_790_15][rng.below(6)],
                2 => rng.uniform() * 2.0 - 1.0,
                _ => rng.normal() * 0.3,
            };
            value * scale
        })
        .collect();
    Ok(Tensor::from_vec(values, n, &Device::Cpu)?.to_dtype(dtype)?)
}

fn blocksize(rng: &mut Rng) -> usize {
    // 64 most often: the blocksize of QLoRA.
    [64, 64, 64, 32, 128, 256, 512, 1024, 2048, 4096][rng.below(10)]
}

/// None when both have the same bits in every part.
fn same_state(got: &QuantizedTensor, expected: &QuantizedTensor) -> Result<Option<String>> {
    let (a, b) = (got.state(), expected.state());
    let mut found = difference("codes", got.packed(), expected.packed())?;
    found = found.or(difference("absmax", &a.absmax, &b.absmax)?);
    if a.offset.map(f32::to_bits) != b.offset.map(f32::to_bits) {
        found = found.or(Some(format!("offset {:?}, expected {:?}", a.offset, b.offset)));
    }
    if let (Some(a), Some(b)) = (&a.state2, &b.state2) {
        found = found.or(difference("nested absmax", &a.absmax, &b.absmax)?);
        found = found.or(difference("nested code", &a.code, &b.code)?);
    }
    if (a.shape != b.shape) || (a.dtype, a.blocksize, a.quant_type) != (b.dtype, b.blocksize, b.quant_type) {
        found = found.or(Some(format!("state {a:?}, expected {b:?}")));
    }
    Ok(found)
}

fn quantize(checks: &mut Checks, quant_type: QuantType, dtype: DType, nested: bool) -> Result<()> {
    let mut cases = Vec::new();
    for size in SIZES {
        let blocksize = blocksize(&mut checks.rng);
        // A view that begins at some element is not aligned for wide loads.
        let skip = if checks.rng.below(3) == 0 { 1 + checks.rng.below(7) } else { 0 };
        let whole = weights(&mut checks.rng, size + skip, dtype)?;
        let on_card = whole.to_device(&checks.device)?.narrow(0, skip, size)?;
        let expected = QuantizedTensor::quantize(&whole.narrow(0, skip, size)?, quant_type, blocksize, nested)?;
        checks.poison(size)?;
        let got = QuantizedTensor::quantize(&on_card, quant_type, blocksize, nested)?;
        let found = same_state(&got, &expected)?;
        cases.push(found.map(|f| format!("{size} elements from {skip}, blocks of {blocksize}: {f}")));
    }
    checks.equal(&format!("quantize {quant_type} {}{}", dtype.as_str(), suffix(nested)), &cases);
    Ok(())
}

fn suffix(nested: bool) -> &'static str {
    if nested { " double" } else { "" }
}

/// To each dtype, into the middle of poisoned memory, of which the rest must stay as it was.
fn dequantize(checks: &mut Checks, quant_type: QuantType, dtype: DType, nested: bool) -> Result<()> {
    const MARGIN: usize = 64;
    let mut cases = Vec::new();
    for size in SIZES {
        let blocksize = blocksize(&mut checks.rng);
        let weight = weights(&mut checks.rng, size, dtype)?;
        let weight = QuantizedTensor::quantize(&weight, quant_type, blocksize, nested)?;
        let on_card = weight.to_device(&checks.device)?;
        let expected = weight.dequantize()?;
        checks.poison(size * 4)?;
        let mut found = difference("its own dtype", &on_card.dequantize()?, &expected)?;
        let state = on_card.state();
        found = found.or(difference("dequantize_4bit", &dequantize_4bit(on_card.packed(), state)?, &expected)?);
        for out in DTYPES {
            let start = MARGIN + [0, 0, 1, 3][checks.rng.below(4)];
            let poison = Tensor::full(f32::NAN, size + 2 * MARGIN, &Device::Cpu)?.to_dtype(out)?;
            let memory = poison.to_device(&checks.device)?;
            let at = cuda::address(&memory.narrow(0, start, size)?)?;
            dequantize_into(checks.gpu, checks.gpu.stream(), &on_card, at, out)?;
            let end = 2 * MARGIN - start;
            let parts = [poison.narrow(0, 0, start)?, expected.to_dtype(out)?, poison.narrow(0, 0, end)?];
            let what = format!("into {} at {start}", out.as_str());
            found = found.or(difference(&what, &memory, &Tensor::cat(&parts, 0)?)?);
        }
        cases.push(found.map(|f| format!("{size} elements, blocks of {blocksize}: {f}")));
    }
    checks.equal(&format!("dequantize {quant_type} {}{}", dtype.as_str(), suffix(nested)), &cases);
    Ok(())
}

/// Numbers of maxima at which the order of PyTorch's sum changes.
fn means(checks: &mut Checks) -> Result<()> {
    let mut cases = Vec::new();
    let sizes = [1, 2, 3, 5, 64, 127, 128, 131, 255, 512, 1023, 2047, 2048, 2051, 65_536, 131_071, 131_072, 1_000_003];
    let random = [1 + checks.rng.below(5000), 1 + checks.rng.below(500_000), 4_500_001];
    for maxima in sizes.into_iter().chain(random) {
        let rng = &mut checks.rng;
        let values: Vec<f32> = (0..maxima * 32).map(|_| rng.normal()).collect();
        let weight = Tensor::from_vec(values, maxima * 32, &Device::Cpu)?.to_dtype(DType::F16)?;
        let expected = QuantizedTensor::quantize(&weight, QuantType::Nf4, 32, true)?;
        let weight = weight.to_device(&checks.device)?;
        checks.poison(maxima * 4)?;
        let got = QuantizedTensor::quantize(&weight, QuantType::Nf4, 32, true)?;
        cases.push(same_state(&got, &expected)?.map(|f| format!("{maxima} maxima: {f}")));
    }
    checks.equal("mean of the maxima", &cases);
    Ok(())
}

fn blockwise(checks: &mut Checks, dtype: DType) -> Result<()> {
    let (mut forth, mut back) = (Vec::new(), Vec::new());
    for size in SIZES {
        let blocksize = [256, blocksize(&mut checks.rng)][checks.rng.below(2)];
        let x = weights(&mut checks.rng, size, dtype)?;
        let (codes, state) = quantize_blockwise(&x, blocksize)?;
        let x = x.to_device(&checks.device)?;
        checks.poison(size)?;
        let (got, got_state) = quantize_blockwise(&x, blocksize)?;
        let found = difference("codes", &got, &codes)?;
        let found = found.or(difference("absmax", &got_state.absmax, &state.absmax)?);
        forth.push(found.map(|f| format!("{size} elements, blocks of {blocksize}: {f}")));

        let on_card = BlockwiseState { absmax: state.absmax.to_device(&checks.device)?, ..state.clone() };
        let got = dequantize_blockwise(&codes.to_device(&checks.device)?, &on_card)?;
        let found = difference("values", &got, &dequantize_blockwise(&codes, &state)?)?;
        back.push(found.map(|f| format!("{size} elements, blocks of {blocksize}: {f}")));
    }
    checks.equal(&format!("quantize_blockwise {}", dtype.as_str()), &forth);
    checks.equal(&format!("dequantize_blockwise {}", dtype.as_str()), &back);
    Ok(())
}

/// The same error as on the CPU, which names the first such element.
fn not_finite(checks: &mut Checks) -> Result<()> {
    let mut cases = Vec::new();
    for case in 0..24 {
        let size = [50, 5000, 300_001][case % 3];
        let dtype = DTYPES[case / 3 % 3];
        let mut values = weights(&mut checks.rng, size, DType::F32)?.to_vec1::<f32>()?;
        for _ in 0..1 + case % 4 {
            let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][checks.rng.below(3)];
            values[checks.rng.below(size)] = bad;
        }
        let x = Tensor::from_vec(values, size, &Device::Cpu)?.to_dtype(dtype)?;
        let nested = case % 2 == 0;
        let run = |x: &Tensor| match case % 5 {
            0 => quantize_blockwise(x, 256).map(|_| ()),
            _ => quantize_4bit(x, TYPES[case % 4], 64, nested).map(|_| ()),
        };
        cases.push(same_error(&run(&x.to_device(&checks.device)?), &run(&x)));
    }
    // Maxima whose sum overflows.
    let huge = Tensor::full(3e38f32, 1000, &Device::Cpu)?;
    let run = |x: &Tensor| quantize_4bit(x, QuantType::Nf4, 64, true).map(|_| ());
    cases.push(same_error(&run(&huge.to_device(&checks.device)?), &run(&huge)));
    checks.equal("errors for NaN and infinity", &cases);
    Ok(())
}

fn same_error(got: &Result<()>, expected: &Result<()>) -> Option<String> {
    let text = |r: &Result<()>| r.as_ref().err().map_or("no error".to_string(), ToString::to_string);
    let (got, expected) = (text(got), text(expected));
    (got != expected || expected == "no error").then(|| format!("{got:?}, expected {expected:?}"))
}

/// A weight of the size that the timings are for.
fn large(checks: &mut Checks) -> Result<()> {
    let rng = &mut checks.rng;
    let values: Vec<half::f16> = (0..8192 * 8192).map(|_| half::f16::from_f32(rng.normal() * 0.05)).collect();
    let weight = Tensor::from_vec(values, (8192, 8192), &Device::Cpu)?;
    let expected = QuantizedTensor::quantize(&weight, QuantType::Nf4, 64, true)?;
    let weight = weight.to_device(&checks.device)?;
    checks.poison(weight.elem_count() * 2)?;
    let got = QuantizedTensor::quantize(&weight, QuantType::Nf4, 64, true)?;
    let found = same_state(&got, &expected)?;
    checks.equal("quantize nf4 f16 double, 8192 x 8192", &[found]);
    drop(weight);
    checks.poison(8192 * 8192 * 2)?;
    let found = difference("values", &got.dequantize()?, &expected.dequantize()?)?;
    checks.equal("dequantize nf4 f16 double, 8192 x 8192", &[found]);
    Ok(())
}

/// Saved from the card and read back; parts on two devices are refused.
fn between_devices(checks: &mut Checks) -> Result<()> {
    let mut cases = Vec::new();
    for nested in [false, true] {
        let weight = weights(&mut checks.rng, 10_001, DType::BF16)?;
        let cpu = QuantizedTensor::quantize(&weight, QuantType::Nf4, 64, nested)?;
        let card = QuantizedTensor::quantize(&weight.to_device(&checks.device)?, QuantType::Nf4, 64, nested)?;
        let (from_card, from_cpu) = (card.to_tensors("w")?, cpu.to_tensors("w")?);
        for ((name, got), (_, expected)) in from_card.iter().zip(&from_cpu) {
            cases.push(difference(name, got, expected)?);
            cases.push((!got.device().is_cpu()).then(|| format!("{name} is not on the CPU")));
        }
        let get = |device: Device| {
            let tensors = &from_card;
            move |name: &str| {
                let found = tensors.iter().find(|(n, _)| n == name);
                found.map(|(_, t)| t.to_device(&device)).transpose().map_err(Into::into)
            }
        };
        for device in [Device::Cpu, checks.device.clone()] {
            let read = QuantizedTensor::from_tensors("w", get(device.clone()))?;
            cases.push(match read {
                Some(read) if read.device().same_device(&device) => same_state(&read, &cpu)?,
                Some(read) => Some(format!("read to {:?}", read.device())),
                None => Some("not read back".into()),
            });
        }
        let back = card.to_device(&Device::Cpu)?;
        cases.push(same_state(&back, &cpu)?);
        cases.push(difference("moved and dequantized", &back.dequantize()?, &cpu.dequantize()?)?);
        let mixed = QuantizedTensor::new(card.packed(), cpu.state());
        cases.push(mixed.is_ok().then(|| "codes on the card with a state on the CPU were accepted".into()));
    }
    checks.equal("saving, moving, mixing devices", &cases);
    Ok(())
}
