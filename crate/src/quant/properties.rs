//! The fast code against the oracle, at every SIMD level that the processor has.

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::{QuantType, QuantizedTensor, oracle};
use crate::backend::cpu::{dequantize_at, encode_block_at, simd};

/// Weights of all magnitudes, with zeros, denormals, and values that lie on a threshold.
fn weights(len: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        8 => -1f32..1.0,
        1 => Just(0f32),
        1 => Just(-0f32),
        1 => (-1f32..1.0).prop_map(|x| x * 1e-39),
        1 => (-3f32..3.0).prop_map(|x| x * 1e4),
        1 => (0usize..15, any::<bool>()).prop_map(|(i, fp4)| {
            let t = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
            t.thresholds().above[i]
        }),
    ];
    // Scaling whole stretches makes blocks of zeros and of denormals likely.
    let scale = prop_oneof![6 => Just(1f32), 1 => Just(0f32), 1 => Just(1e-40f32)];
    (proptest::collection::vec(value, len), proptest::collection::vec(scale, 1..8)).prop_map(|(mut x, scales)| {
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= scales[(i / 64) % scales.len()]);
        x
    })
}

fn quant_types() -> impl Strategy<Value = QuantType> {
    (0usize..4).prop_map(|i| QuantType::ALL[i])
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 300 }, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_block_is_encoded_as_the_oracle_does(x in weights(1..300), quant_type in quant_types()) {
        let (codes, maxima) = oracle::quantize(&x, quant_type, 4096);
        let expected = oracle::pack(&codes, quant_type);
        for level in simd::available() {
            let mut packed = vec![0xAA; quant_type.packed_len(x.len())];
            let absmax = encode_block_at(level, &x, quant_type, &mut packed);
            prop_assert_eq!(absmax.to_bits(), maxima[0].to_bits());
            prop_assert_eq!(&packed, &expected, "{:?}", level);
        }
    }

    /// The second definition: no other code is nearer to the value. The thresholds are f32, so that next to the middle
    /// of two codes either may be taken.
    #[test]
    fn a_code_is_the_nearest(x in weights(1..300), quant_type in quant_types()) {
        let (codes, maxima) = oracle::quantize(&x, quant_type, 4096);
        let (values, scale) = (quant_type.values(), f64::from(1.0 / maxima[0].max(1e-38)));
        let far = |code: usize, x: f32| (f64::from(values[code]) - f64::from(x) * scale).abs();
        for (x, code) in x.iter().zip(codes) {
            let nearest = (0..values.len()).map(|code| far(code, *x)).fold(f64::INFINITY, f64::min);
            prop_assert!(far(code.into(), *x) <= nearest + 1e-6, "{}: {} at {}", quant_type, code, x);
        }
    }

    #[test]
    fn any_range_is_dequantized_as_the_oracle_does(
        x in weights(1..700),
        quant_type in quant_types(),
        dtype in dtypes(),
        blocksize in (5u32..9).prop_map(|log| 1usize << log),
        nested in any::<bool>(),
        (from, to) in (0f64..1.0, 0f64..=1.0),
    ) {
        let n = x.len();
        let weight = Tensor::new(x, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let q = QuantizedTensor::quantize(&weight, quant_type, blocksize, nested).unwrap();
        let rounded = weight.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        let (codes, maxima) = oracle::quantize(&rounded, quant_type, blocksize);
        let start = (from * n as f64) as usize;
        let len = (to * (n - start) as f64).ceil() as usize;
        q.with_cpu(|view| {
            let stored: Vec<f32> = (0..maxima.len()).map(|b| view.absmax.get(b)).collect();
            if !nested {
                prop_assert_eq!(&stored, &maxima);
            }
            let whole = oracle::dequantize(&codes, &stored, quant_type, blocksize, dtype);
            for level in simd::available().into_iter().filter(|_| quant_type != QuantType::Int8) {
                let mut out = vec![f32::NAN; len];
                dequantize_at(level, view, start, &mut out);
                let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&out), bits(&whole[start..start + len]), "{:?} {}..+{}", level, start, len);
            }
            let mut out = vec![f32::NAN; len];
            super::dequantize_range(view, start, &mut out);
            prop_assert_eq!(&out[..], &whole[start..start + len]);
            Ok(())
        }).unwrap()?;
    }

    /// What a user sees: the tensor that comes back is the oracle's, and an element moves by at
    /// most half the widest gap of the code book.
    #[test]
    fn a_tensor_comes_back_within_the_code_book(x in weights(1..500), quant_type in quant_types()) {
        let weight = Tensor::new(x.as_slice(), &Device::Cpu).unwrap();
        let (packed, state) = super::quantize_4bit(&weight, quant_type, 64, false).unwrap();
        let back = super::dequantize_4bit(&packed, &state).unwrap().to_vec1::<f32>().unwrap();
        let maxima = state.absmax.to_vec1::<f32>().unwrap();
        let half_gap = match quant_type {
            QuantType::Nf4 => 0.1520,
            QuantType::Fp4 => 0.1668,
            QuantType::Int4 => 0.5 / 7.0,
            QuantType::Int8 => 0.5 / 127.0,
        };
        for (i, (x, y)) in x.iter().zip(&back).enumerate() {
            let absmax = maxima[i / 64];
            // A maximum below 1e-38 is not divided by: such a block may come back as nothing.
            let bound = absmax * if absmax < 1e-38 { 1.0 } else { half_gap * 1.001 };
            prop_assert!((x - y).abs() <= bound, "{i}: {x} came back as {y}, absmax {absmax}");
            prop_assert!(*x != 0.0 || quant_type == QuantType::Int8 || *y == 0.0);
        }
    }
}

#[test]
fn a_range_beyond_the_weight_panics_like_an_index() {
    let weight = Tensor::new(&[1f32; 70], &Device::Cpu).unwrap();
    let q = QuantizedTensor::quantize(&weight, QuantType::Nf4, 64, true).unwrap();
    let beyond = |start| {
        q.with_cpu(|view| std::panic::catch_unwind(|| super::dequantize_range(view, start, &mut [0.0; 8])).is_err())
    };
    assert!(!beyond(62).unwrap() && beyond(63).unwrap() && beyond(usize::MAX).unwrap());
}

/// Values that lie in the middle between two of the compute dtype, and an ulp beside it.
#[test]
fn ties_are_rounded_to_even_at_every_level() {
    for dtype in [DType::BF16, DType::F16] {
        // The code of 1.0 in every place: the weight is the maximum itself, rounded.
        let packed = [0xffu8; 16];
        for upper in [0x3f80_0000u32, 0x3f81_0000, 0x3fff_0000, 0x4380_2000, 0x4380_4000, 0x3380_0000] {
            for lower in [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let absmax = [f32::from_bits(upper + lower)];
                let view = super::QuantizedCpu {
                    packed: &packed,
                    absmax: super::AbsmaxCpu::Plain(&absmax),
                    quant_type: QuantType::Nf4,
                    blocksize: 32,
                    dtype,
                    len: 32,
                };
                for level in simd::available() {
                    let mut out = [0f32; 32];
                    dequantize_at(level, &view, 0, &mut out);
                    assert_eq!(
                        out,
                        [crate::quantized::round_to(dtype, absmax[0]); 32],
                        "{level:?} {dtype:?} {absmax:?}"
                    );
                }
            }
        }
    }
}

/// The first failure of those that read is the one that is told, and a number that is not finite is named.
#[test]
fn what_cannot_be_read_is_not_quantized() {
    let quantize = |read: &super::Read<'_>| {
        let done = QuantizedTensor::quantize_read(&[5, 1 << 16], DType::F32, QuantType::Nf4, 64, true, read);
        done.map(|q| q.num_bytes()).map_err(|e| e.to_string())
    };
    let ones = |x: &mut [f32]| -> crate::error::Result<()> {
        x.fill(1.0);
        Ok(())
    };
    assert!(quantize(&|_, x| ones(x)).is_ok());
    let failing = quantize(&|first, x| match first >> 16 {
        0 | 1 => ones(x),
        task => Err(crate::error::Error::argument("piece", task, "another", "none")),
    });
    assert!(failing.as_ref().is_err_and(|e| e.starts_with("piece = 2")), "{failing:?}");
    let infinite = quantize(&|first, x| {
        ones(x)?;
        if first == 3 << 16 {
            x[70] = f32::INFINITY;
        }
        Ok(())
    });
    let index = (3 << 16) + 70;
    assert!(infinite.as_ref().is_err_and(|e| e.contains(&index.to_string())), "{infinite:?}");
}
