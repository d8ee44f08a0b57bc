//! Weights read straight to the card against those that the CPU reads: every bit.

use std::{collections::HashMap, path::Path, path::PathBuf};

use qlora_nb::{
    candle_core::{DType, Device, Tensor, safetensors},
    error::Result,
    internals::{
        backend::{cuda, operands::Weight},
        models::weights::Weights,
    },
    model::BitsAndBytesConfig,
    quant::QuantizedTensor,
};

use crate::check::{Checks, bytes, difference};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

pub fn run(checks: &mut Checks) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("qlora-nb-gpu-check-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(qlora_nb::error::Error::io("write", &folder))?;
    let done = tensors(checks, &folder)
        .and_then(|()| tables(checks, &folder))
        .and_then(|()| quantized(checks, &folder))
        .and_then(|()| damaged(checks, &folder));
    // What is left of a failed run is small.
    let _ = std::fs::remove_dir_all(&folder);
    done
}

/// Any finite f32, in the dtype, that `to` can hold: denormals, the largest numbers, both zeros.
fn any(checks: &mut Checks, n: usize, dtype: DType, to: DType) -> Result<Tensor> {
    let rng = &mut checks.rng;
    let values: Vec<f32> = (0..n)
        .map(|_| match rng.below(4) {
            0 => f32::from_bits(rng.next() as u32),
            1 => [0.0, -0.0, 65504.0, 65519.9, 65520.0, -65536.0, 6e-8, 3e-39][rng.below(8)],
            _ => rng.normal(),
        })
        .map(|v| if v.is_finite() { v } else { 1.0 })
        .collect();
    let x = Tensor::from_vec(values, n, &Device::Cpu)?.to_dtype(dtype)?;
    // What is too large for the dtype has become infinite.
    let largest = match (dtype, to) {
        (DType::F16, _) | (_, DType::F16) => 60000f32,
        (DType::BF16, _) | (_, DType::BF16) => 3.3e38,
        _ => return Ok(x),
    };
    Ok(x.to_dtype(DType::F32)?.clamp(-largest, largest)?.to_dtype(dtype)?)
}

fn save(folder: &Path, name: &str, tensors: &HashMap<String, Tensor>) -> Result<PathBuf> {
    let path = folder.join(name);
    safetensors::save(tensors, &path)?;
    Ok(path)
}

fn both(checks: &Checks, path: &Path) -> Result<(Weights, Weights)> {
    Ok((Weights::open(vec![path.into()])?, Weights::open(vec![path.into()])?.on(&checks.device)))
}

/// From one element to many pieces, in every pair of dtypes.
fn tensors(checks: &mut Checks, folder: &Path) -> Result<()> {
    for from in DTYPES {
        let random = 1 + checks.rng.below(3_000_000);
        // The second is the largest that the CPU converts; a piece has 2 MiB.
        let sizes = [1, 16_384, 16_385, 32_769, 100_003, 1 << 20, (1 << 20) + 1, random, 20_000_003];
        for to in DTYPES {
            let mut file = HashMap::new();
            for (i, n) in sizes.into_iter().enumerate() {
                file.insert(format!("t{i}"), any(checks, n, from, to)?);
            }
            let path = save(folder, "tensors.safetensors", &file)?;
            let (mut cpu, mut gpu) = both(checks, &path)?;
            let mut cases = Vec::new();
            for (i, n) in sizes.into_iter().enumerate() {
                let name = format!("t{i}");
                let expected = cpu.tensor(&name, &[n], to)?;
                checks.poison(n * 4)?;
                let got = gpu.tensor(&name, &[n], to)?;
                cases.push(difference(&name, &got, &expected)?.map(|f| format!("{n} elements: {f}")));
            }
            checks.equal(&format!("load {} as {}", from.as_str(), to.as_str()), &cases);
        }
    }
    Ok(())
}

/// Tables have rows of zeros behind them.
fn tables(checks: &mut Checks, folder: &Path) -> Result<()> {
    let mut cases = Vec::new();
    for from in DTYPES {
        let (rows, width) = (1 + checks.rng.below(3000), 8 * (1 + checks.rng.below(64)));
        for to in DTYPES {
            let table = any(checks, rows * width, from, to)?.reshape((rows, width))?;
            let path = save(folder, "table.safetensors", &HashMap::from([("table".to_string(), table)]))?;
            let (mut cpu, mut gpu) = both(checks, &path)?;
            let expected = cpu.table("table", &[rows, width], to)?;
            let padded = rows.next_multiple_of(64);
            checks.poison(padded * width * 4)?;
            let got = gpu.table("table", &[rows, width], to)?;
            let mut found = difference("table", &got, &expected)?;
            let (at, elements) = cuda::alloc(&got)?;
            if elements != padded * width {
                found = found.or(Some(format!("its memory has {elements} elements, expected {}", padded * width)));
            } else {
                let mut raw = vec![0xffu8; padded * width * to.size_in_bytes()];
                cuda::copy_to_host(checks.gpu, at, &mut raw)?;
                let own = rows * width * to.size_in_bytes();
                found = found.or((raw[..own] != bytes(&expected)?).then(|| "its memory is another's".into()));
                found = found.or(raw[own..].iter().any(|b| *b != 0).then(|| "the padding is not zero".into()));
            }
            cases.push(found.map(|f| format!("{rows} x {width} {} as {}: {f}", from.as_str(), to.as_str())));
        }
    }
    checks.equal("load tables with padding", &cases);
    Ok(())
}

/// Quantized as they are read, and saved in 4 bits before.
fn quantized(checks: &mut Checks, folder: &Path) -> Result<()> {
    let mut cases = Vec::new();
    for double in [false, true] {
        let config = BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: double, ..Default::default() };
        let (out, input) = (64 * (1 + checks.rng.below(30)), 64 * (1 + checks.rng.below(30)));
        let values: Vec<f32> = (0..out * input).map(|_| checks.rng.normal()).collect();
        let weight = Tensor::from_vec(values, (out, input), &Device::Cpu)?.to_dtype(DType::F16)?;
        let four_bits = QuantizedTensor::quantize(&weight, config.bnb_4bit_quant_type, 64, double)?;
        let dense = HashMap::from([("m.weight".to_string(), weight)]);
        let packed = four_bits.to_tensors("m.weight")?.into_iter().collect();
        for (what, file) in [("dense", &dense), ("in 4 bits", &packed)] {
            let path = save(folder, "linear.safetensors", file)?;
            let (mut cpu, mut gpu) = both(checks, &path)?;
            checks.poison(out * input * 2)?;
            let got = gpu.linear("m", (out, input), DType::F16, Some(&config))?;
            let expected = cpu.linear("m", (out, input), DType::F16, Some(&config))?;
            let found = match (&got, &expected) {
                (Weight::Quantized(got), Weight::Quantized(expected)) => difference(
                    "codes",
                    got.packed(),
                    expected.packed(),
                )?
                .or(difference("weights", &got.dequantize()?, &expected.dequantize()?)?),
                _ => Some("not quantized".into()),
            };
            cases.push(found.map(|f| format!("{out} x {input} {what}, double {double}: {f}")));
        }
    }
    checks.equal("load linear layers in 4 bits", &cases);
    Ok(())
}

/// The same errors as on the CPU, wherever a number is not finite.
fn damaged(checks: &mut Checks, folder: &Path) -> Result<()> {
    let mut cases = Vec::new();
    for from in DTYPES {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let n = 40_000 + checks.rng.below(3_000_000);
            let at = checks.rng.below(n);
            let mut values: Vec<f32> = (0..n).map(|_| checks.rng.normal()).collect();
            values[at] = bad;
            // Another further on must not hide it.
            if let Some(last) = values.last_mut() {
                *last = bad;
            }
            let weight = Tensor::from_vec(values, n, &Device::Cpu)?.to_dtype(from)?;
            let path = save(folder, "bad.safetensors", &HashMap::from([("w".to_string(), weight)]))?;
            for to in DTYPES {
                let (mut cpu, mut gpu) = both(checks, &path)?;
                let message = |r: Result<Tensor>| r.map_or_else(|e| e.to_string(), |_| "no error".into());
                let (got, expected) = (message(gpu.tensor("w", &[n], to)), message(cpu.tensor("w", &[n], to)));
                let found = (got != expected || !got.contains("NaN or an infinity"))
                    .then(|| format!("{bad} at {at} of {n} {}: {got}, expected {expected}", from.as_str()));
                cases.push(found);
            }
        }
    }
    // A number that is finite in the file and not in the dtype.
    let n = 2_000_000;
    let mut values: Vec<f32> = (0..n).map(|_| checks.rng.normal()).collect();
    values[checks.rng.below(n)] = 1e6;
    let large = Tensor::from_vec(values, n, &Device::Cpu)?;
    let path = save(folder, "large.safetensors", &HashMap::from([("w".to_string(), large)]))?;
    let (mut cpu, mut gpu) = both(checks, &path)?;
    let message = |r: Result<Tensor>| r.map_or_else(|e| e.to_string(), |_| "no error".into());
    let (got, expected) = (message(gpu.tensor("w", &[n], DType::F16)), message(cpu.tensor("w", &[n], DType::F16)));
    cases.push((got != expected || !got.contains("BF16")).then(|| format!("too large: {got}, expected {expected}")));
    // A file that ends while it is read.
    let path = save(
        folder,
        "short.safetensors",
        &HashMap::from([("w".to_string(), any(checks, 4 << 20, DType::F32, DType::F16)?)]),
    )?;
    let (_, mut gpu) = both(checks, &path)?;
    let file =
        std::fs::OpenOptions::new().write(true).open(&path).map_err(qlora_nb::error::Error::io("write", &path))?;
    file.set_len(9 << 20).map_err(qlora_nb::error::Error::io("write", &path))?;
    let error = gpu.tensor("w", &[4 << 20], DType::F16).err().map(|e| e.to_string());
    let named = error.as_ref().is_some_and(|e| e.contains("could not read") && e.contains("short.safetensors"));
    cases.push((!named).then(|| format!("a file cut short: {error:?}")));
    checks.equal("load damaged weights", &cases);
    Ok(())
}
