//! Quantization against bitsandbytes: its CUDA backend's bytes (tests/fixtures/quant_cuda.safetensors, made by
//! scripts/fixtures/quant_cuda.py on an H100), a checkpoint that it wrote (`QLORA_SHARED`), and its published errors.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    error::{Error, Result},
    quant::{
        QuantState, QuantType, QuantizedTensor, create_dynamic_map, dequantize_4bit, dequantize_blockwise, oracle,
        quantize_4bit, quantize_blockwise,
    },
};

type Tensors = HashMap<String, Tensor>;

fn fixture(name: &str) -> Tensors {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// A file of the reference collection, or None (and a word about it) where that is absent.
fn shared(name: &str) -> Option<Tensors> {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let path = std::env::var_os("QLORA_SHARED").map_or(default, PathBuf::from).join(name);
    if !path.exists() {
        println!("skipped: no {}", path.display());
        return None;
    }
    Some(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
}

/// Bit patterns, so that -0 differs from 0 and nothing is rounded away.
fn bits(t: &Tensor) -> Vec<u32> {
    let t = t.flatten_all().unwrap();
    match t.dtype() {
        DType::U8 => t.to_vec1::<u8>().unwrap().into_iter().map(u32::from).collect(),
        _ => t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect(),
    }
}

#[track_caller]
fn assert_bits(what: &str, got: &Tensor, expected: &Tensor) {
    assert_eq!(got.dtype(), expected.dtype(), "{what}");
    let (got, expected) = (bits(got), bits(expected));
    assert_eq!(got.len(), expected.len(), "{what}");
    let wrong: Vec<usize> = (0..got.len()).filter(|&i| got[i] != expected[i]).collect();
    assert!(wrong.is_empty(), "{what}: {} of {} differ, first at {:?}", wrong.len(), got.len(), wrong.first());
}

fn floats(t: &Tensor) -> Vec<f32> {
    bits(t).into_iter().map(f32::from_bits).collect()
}

fn scalar(t: &Tensor) -> f32 {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
}

#[test]
fn golden_weight_is_bit_equal() {
    let Some(g) = shared("golden/nf4_64x256.safetensors") else { return };
    let (packed, state) = quantize_4bit(&g["weight"], QuantType::Nf4, 64, true).unwrap();
    assert_eq!(packed.dims(), g["packed"].dims());
    assert_bits("packed", &packed, &g["packed"]);
    assert_bits("code", &state.code, &g["nf4_code"]);
    assert_bits("absmax", &state.absmax, &g["absmax_u8"]);
    let state2 = state.state2.as_ref().unwrap();
    assert_bits("nested absmax", &state2.absmax, &g["nested_absmax"]);
    assert_bits("nested code", &state2.code, &g["nested_code"]);
    assert_eq!(state.offset.unwrap(), scalar(&g["offset"]));
    assert_bits("dequant", &dequantize_4bit(&packed, &state).unwrap(), &g["dequant"]);

    let (packed, state) = quantize_4bit(&g["weight"], QuantType::Nf4, 64, false).unwrap();
    assert_bits("single packed", &packed, &g["single_packed"]);
    assert_bits("single absmax", &state.absmax, &g["single_absmax"]);
    assert_bits("single dequant", &dequantize_4bit(&packed, &state).unwrap(), &g["single_dequant"]);
}

#[test]
fn golden_checkpoint_is_written_and_read() {
    let Some(g) = shared("golden/nf4_64x256_bnb_statedict.safetensors") else { return };
    let weight = &shared("golden/nf4_64x256.safetensors").unwrap()["weight"];
    let quantized = QuantizedTensor::quantize(weight, QuantType::Nf4, 64, true).unwrap();
    let written: Tensors = quantized.to_tensors("weight").unwrap().into_iter().collect();
    assert_eq!(written.len(), g.len());
    for (name, expected) in &g {
        let got = written.get(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(got.dims(), expected.dims(), "{name}");
        assert_bits(name, got, expected);
    }
    let read = QuantizedTensor::from_tensors("weight", |name| Ok(g.get(name).cloned())).unwrap().unwrap();
    assert_eq!((read.shape(), read.dtype()), (&[64, 256][..], DType::F16));
    assert_bits("dequant", &read.dequantize().unwrap(), &quantized.dequantize().unwrap());
}

/// n values in [0, 1), exact in f32: the formula of scripts/fixtures/quant_cuda.py.
fn uniform(n: usize, seed: u64) -> Vec<f32> {
    let value = |i: u64| (((i * 2654435761) & 0xffff_ffff) ^ ((i * 40503) & 0xffff)) >> 8;
    (0..n as u64).map(|i| value(i + seed) as f32 / (1 << 24) as f32).collect()
}

fn bell(n: usize, seed: u64) -> Vec<f32> {
    let [a, b, c, d] = [0, 7919, 15838, 23757].map(|s| uniform(n, seed + s));
    (0..n).map(|i| a[i] + b[i] - c[i] - d[i]).collect()
}

#[test]
fn cuda_fixture_is_bit_equal() {
    let f = fixture("quant_cuda.safetensors");
    let mut wide = bell(300 * 128, 8000);
    wide.iter_mut().enumerate().for_each(|(i, x)| *x *= (1 << ((i / 128) % 7)) as f32);
    let wide = Tensor::from_vec(wide, (300, 128), &Device::Cpu).unwrap();

    let mut cases = 0;
    for (name, blocksize) in [
        ("f16", 64),
        ("bf16", 64),
        ("f32", 64),
        ("f32_odd", 64),
        ("f16_odd", 32),
        ("f32_32", 32),
        ("f32_128", 128),
        ("f32_4096", 4096),
        ("f32_wide", 32),
    ] {
        let x = f.get(&format!("{name}.x")).unwrap_or(&wide);
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for nested in [false, true] {
                let key = format!("{name}.{quant_type}{}", if nested { ".nested" } else { "" });
                let Some(packed) = f.get(&format!("{key}.packed")) else { continue };
                cases += 1;
                let of = |part: &str| &f[&format!("{key}.{part}")];
                let (got, state) = quantize_4bit(x, quant_type, blocksize, nested).unwrap();
                // The GPU gives the second block of f32_odd, all zeros, code 0 (-1 in NF4); here it keeps zero's code.
                let zeros = if name == "f32_odd" { 32..64 } else { 0..0 };
                for (i, (got, expected)) in bits(&got).into_iter().zip(bits(packed)).enumerate() {
                    if zeros.contains(&i) {
                        assert_eq!(got, if quant_type == QuantType::Nf4 { 0x77 } else { 0 }, "{key} byte {i}");
                    } else {
                        assert_eq!(got, expected, "{key} byte {i}");
                    }
                }
                assert_bits(&format!("{key}.absmax"), &state.absmax, of("absmax"));
                if let Some(state2) = &state.state2 {
                    assert_eq!(state.offset.unwrap(), scalar(of("offset")), "{key}");
                    assert_bits(&format!("{key}.nested_absmax"), &state2.absmax, of("nested_absmax"));
                }
                if let Some(dequant) = f.get(&format!("{key}.dequant")) {
                    assert_bits(&key, &dequantize_4bit(packed, &state).unwrap(), dequant);
                    let ours = dequantize_4bit(&got, &state).unwrap();
                    if name == "f32_odd" {
                        let zeros = ours.flatten_all().unwrap().narrow(0, 64, 64).unwrap();
                        assert!(
                            bits(&zeros).iter().all(|b| b & 0x7fff_ffff == 0),
                            "{key}: a zero came back as another"
                        );
                    } else {
                        assert_bits(&key, &ours, dequant);
                    }
                }
            }
        }
    }
    assert_eq!(cases, 8 * 4 + 1);
}

#[test]
fn cuda_blockwise_is_bit_equal() {
    let f = fixture("quant_cuda.safetensors");
    let map = |signed| Tensor::new(&create_dynamic_map(signed), &Device::Cpu).unwrap();
    assert_bits("signed map", &map(true), &f["dynamic_map.signed"]);
    assert_bits("unsigned map", &map(false), &f["dynamic_map.unsigned"]);
    let (q, state) = quantize_blockwise(&f["blockwise.x"], 256).unwrap();
    assert_bits("absmax", &state.absmax, &f["blockwise.absmax"]);
    assert_bits("codes", &q, &f["blockwise.q"]);
    assert_bits("dequant", &dequantize_blockwise(&q, &state).unwrap(), &f["blockwise.dequant"]);
}

#[test]
fn code_books_are_those_of_bitsandbytes() {
    let f = fixture("quant_cuda.safetensors");
    let ones = Tensor::ones(64, DType::F32, &Device::Cpu).unwrap();
    assert_bits("fp4", &quantize_4bit(&ones, QuantType::Fp4, 64, false).unwrap().1.code, &f["fp4.code"]);
    // The published decimals of NF4; a literal of f32 is rounded by clippy's taste, so here in f64.
    let nf4 = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0f64,
    ];
    assert_eq!(QuantType::Nf4.values(), nf4.map(|x| x as f32));
    for (code, threshold) in [
        -0.8480964004993439,
        -0.6106329262256622,
        -0.4599952697753906,
        -0.33967943489551544,
        -0.23460740596055984,
        -0.13791173323988914,
        -0.045525018125772476,
        0.03979014977812767,
        0.1202552504837513,
        0.2035212516784668,
        0.2920137718319893,
        0.3893125355243683,
        0.5016634166240692,
        0.6427869200706482,
        0.8614784178118011f64,
    ]
    .into_iter()
    .enumerate()
    {
        let t = threshold as f32;
        assert_eq!(oracle::encode(t, QuantType::Nf4) as usize, code, "a tie takes the lower code");
        assert_eq!(oracle::encode(t.next_up(), QuantType::Nf4) as usize, code + 1);
    }
}

/// bitsandbytes without a GPU (scripts/fixtures/nf4.py). It differs from its CUDA backend, which is the reference here,
/// where a value lies within an ulp of a threshold, in the sign of FP4's zero, and in the order of a sum.
#[test]
fn cpu_fixture_is_equal_but_for_its_own_ways() {
    let f = fixture("nf4.safetensors");
    let mut cases = 0;
    for (key, packed) in f.iter().filter(|(k, _)| k.ends_with(".packed") && k.split('.').count() == 4) {
        let [name, quant_type, blocksize, _] = key.split('.').collect::<Vec<_>>()[..] else { unreachable!() };
        let (quant_type, blocksize): (QuantType, usize) = (quant_type.parse().unwrap(), blocksize.parse().unwrap());
        let of = |part: &str| f.get(&format!("{name}.{quant_type}.{blocksize}.{part}"));
        let (got, state) = quantize_4bit(&f[&format!("{name}.weight")], quant_type, blocksize, false).unwrap();
        assert_bits(key, &state.absmax, of("absmax").unwrap());
        // Small positive numbers are FP4's second zero (-0) there.
        let zero = |code: u32| if quant_type == QuantType::Fp4 && code == 8 { 0 } else { code };
        let codes = |t: &Tensor| bits(t).into_iter().flat_map(|b| [zero(b >> 4), zero(b & 15)]).collect::<Vec<_>>();
        let (got, mut expected) = (codes(&got), codes(packed));
        if name == "ties" {
            // Its midpoint of the two highest values is an ulp above the CUDA kernel's threshold.
            expected[14] = 15;
        }
        assert_eq!(got, expected, "{key}");
        if let Some(expected) = of("dequant") {
            let got = dequantize_4bit(packed, &state).unwrap();
            assert_eq!(floats(&got), floats(expected), "{key}");
        }
        cases += 1;
    }
    assert_eq!(cases, 4 * 2 + 2 + 2 + 8);

    let (packed, state) = quantize_4bit(&f["double.weight"], QuantType::Nf4, 32, true).unwrap();
    assert_bits("packed", &packed, &f["double.packed"]);
    let offset = state.offset.unwrap();
    assert!((offset / scalar(&f["double.offset"]) - 1.0).abs() < 1e-6, "{offset}");
    let absmax = (&f["double.absmax"] - f64::from(scalar(&f["double.offset"]))).unwrap();
    let (codes, state2) = quantize_blockwise(&absmax, 256).unwrap();
    assert_bits("nested absmax", &state2.absmax, &f["double.nested_absmax"]);
    assert_bits("nested codes", &codes, &f["double.absmax_u8"]);

    let get = |name: &str| Ok(f.get(if name == "statedict" { "statedict.packed" } else { name }).cloned());
    let read = QuantizedTensor::from_tensors("statedict", get).unwrap().unwrap();
    let error = (read.dequantize().unwrap() - &f["statedict.weight"]).unwrap().abs().unwrap();
    assert!(floats(&error).into_iter().fold(0.0, f32::max) < 0.5);
}

/// Numbers of the normal distribution (Box-Muller over a counter).
fn normal(n: usize, mut seed: u64) -> Vec<f32> {
    let mut uniform = || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        let (radius, angle) = ((-2.0 * (1.0 - uniform()).ln()).sqrt(), std::f64::consts::TAU * uniform());
        values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    values.truncate(n);
    values
}

#[test]
fn errors_are_as_published() {
    let weight = Tensor::from_vec(normal(1 << 20, 7), (1024, 1024), &Device::Cpu).unwrap();
    for (quant_type, blocksize, mean_abs, sigma, mean_rel) in [
        (QuantType::Nf4, 32, 0.067746, 0.000069, Some(0.189726)),
        (QuantType::Nf4, 64, 0.072798, 0.000074, Some(0.203339)),
        (QuantType::Nf4, 128, 0.076831, 0.000091, Some(0.215237)),
        (QuantType::Nf4, 256, 0.080337, 0.000102, None),
        (QuantType::Fp4, 64, 0.096543, 0.000128, Some(0.260125)),
    ] {
        let (packed, state) = quantize_4bit(&weight, quant_type, blocksize, true).unwrap();
        let back = dequantize_4bit(&packed, &state).unwrap();
        let error = (&back - &weight).unwrap().abs().unwrap();
        let mean = |t: &Tensor| f64::from(t.mean_all().unwrap().to_scalar::<f32>().unwrap());
        let abs = mean(&error);
        assert!((abs - mean_abs).abs() < 7.0 * sigma, "{quant_type} {blocksize}: {abs}, published {mean_abs}");
        if let Some(mean_rel) = mean_rel {
            let rel = mean(&(&error / (weight.abs().unwrap() + 1e-8).unwrap()).unwrap());
            assert!((rel / mean_rel - 1.0).abs() < 0.01, "{quant_type} {blocksize}: {rel}, published {mean_rel}");
        }
    }
}

#[test]
fn a_parameter_takes_4_127_bits() {
    let weight = Tensor::from_vec(normal(1 << 20, 8), (1024, 1024), &Device::Cpu).unwrap();
    let bits = |nested| {
        let q = QuantizedTensor::quantize(&weight, QuantType::Nf4, 64, nested).unwrap();
        q.num_bytes() as f64 * 8.0 / (1 << 20) as f64
    };
    assert_eq!(format!("{:.3} {:.3}", bits(true), bits(false)), "4.127 4.500");
}

#[test]
fn a_state_is_written_and_read_for_every_type() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let weight = Tensor::from_vec(normal(33 * 5, 9), (33, 5), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        for quant_type in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4, QuantType::Int8] {
            for nested in [false, true] {
                let q = QuantizedTensor::quantize(&weight, quant_type, 32, nested).unwrap();
                let tensors: Tensors = q.to_tensors("a.b.weight").unwrap().into_iter().collect();
                let get = |name: &str| Ok(tensors.get(name).cloned());
                let read = QuantizedTensor::from_tensors("a.b.weight", get).unwrap().unwrap();
                assert_eq!(read.dtype(), dtype);
                assert_bits("dequant", &read.dequantize().unwrap(), &q.dequantize().unwrap());
                let other = QuantizedTensor::from_tensors("a.c.weight", get).unwrap();
                assert!(other.is_none(), "an unquantized weight is no error");
            }
        }
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let weight = Tensor::from_vec(normal(4096, 10), (64, 64), &Device::Cpu).unwrap();
    let q = QuantizedTensor::quantize(&weight, QuantType::Nf4, 64, true).unwrap();
    let tensors: Tensors = q.to_tensors("w").unwrap().into_iter().collect();
    let read = |name: &str, tensor: Option<Tensor>| -> Result<_> {
        let mut tensors = tensors.clone();
        match tensor {
            Some(tensor) => tensors.insert(name.to_string(), tensor),
            None => tensors.remove(name),
        };
        QuantizedTensor::from_tensors("w", |name| Ok(tensors.get(name).cloned()))
    };
    let text = |r: Result<Option<QuantizedTensor>>| r.unwrap_err().to_string();
    for name in ["w", "w.absmax", "w.quant_map", "w.nested_absmax", "w.nested_quant_map"] {
        assert!(text(read(name, None)).contains(&format!("{name:?}")), "{name}");
    }
    let json = |s: &str| Some(Tensor::new(s.as_bytes(), &Device::Cpu).unwrap());
    let state = "w.quant_state.bitsandbytes__nf4";
    assert!(text(read(state, json("{\"quant_type\": \"nf4\""))).contains("EOF"));
    let other = "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"int32\", \"shape\": [64, 64]}";
    assert!(text(read(state, json(other))).contains("int32"));
    let small = Tensor::zeros(7, DType::U8, &Device::Cpu).unwrap();
    assert!(matches!(read("w", Some(small.clone())), Err(Error::Shape { .. })));
    assert!(matches!(read("w.absmax", Some(small)), Err(Error::Shape { .. })));
    let map = Tensor::zeros(16, DType::F32, &Device::Cpu).unwrap();
    assert!(text(read("w.quant_map", Some(map))).contains("code book"));
}

#[test]
fn bad_input_is_refused() {
    let ok = Tensor::new(&[1f32; 100], &Device::Cpu).unwrap();
    for blocksize in [0, 1, 16, 33, 48, 8192] {
        assert!(matches!(quantize_4bit(&ok, QuantType::Nf4, blocksize, true), Err(Error::InvalidArgument { .. })));
    }
    let u8s = Tensor::new(&[1u8; 100], &Device::Cpu).unwrap();
    assert!(matches!(quantize_4bit(&u8s, QuantType::Nf4, 64, true), Err(Error::Unsupported { .. })));
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(quantize_4bit(&empty, QuantType::Nf4, 64, true), Err(Error::InvalidArgument { .. })));
    let (packed, state) = quantize_4bit(&ok, QuantType::Nf4, 64, true).unwrap();
    let state = QuantState { dtype: DType::U32, ..state };
    assert!(matches!(dequantize_4bit(&packed, &state), Err(Error::Unsupported { .. })));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for index in [0, 63, 64, 99_999, 199_999] {
            let mut values = vec![0.5f32; 200_000];
            values[index] = bad;
            let x = Tensor::new(values, &Device::Cpu).unwrap();
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let e = quantize_4bit(&x.to_dtype(dtype).unwrap(), QuantType::Nf4, 64, true).unwrap_err();
                assert!(e.to_string().contains(&format!("element {index} of")), "{e}");
            }
        }
    }
}

#[test]
fn a_transposed_weight_is_quantized_in_its_own_order() {
    let weight = Tensor::from_vec(normal(96 * 64, 11), (96, 64), &Device::Cpu).unwrap();
    let (a, _) = quantize_4bit(&weight.t().unwrap(), QuantType::Nf4, 64, false).unwrap();
    let (b, _) = quantize_4bit(&weight.t().unwrap().force_contiguous().unwrap(), QuantType::Nf4, 64, false).unwrap();
    assert_bits("packed", &a, &b);
    let (c, _) = quantize_4bit(&weight.narrow(0, 32, 64).unwrap(), QuantType::Nf4, 64, false).unwrap();
    let whole = quantize_4bit(&weight, QuantType::Nf4, 64, false).unwrap().0;
    assert_bits("a view with an offset", &c, &whole.narrow(0, 32 * 32, 64 * 32).unwrap());
}
