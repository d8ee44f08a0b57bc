//! Quantization as its definition says, one element at a time: what the fast code (and the
//! CUDA kernels) must equal bit for bit.

use candle_core::DType;

use crate::quantized::{QuantType, round_to};

/// The code of one value relative to its block's maximum (`x` in [-1, 1]).
pub fn encode(x: f32, quant_type: QuantType) -> u8 {
    if quant_type == QuantType::Int8 {
        return (x * 127.0).round_ties_even() as i8 as u8;
    }
    let thresholds = quant_type.thresholds();
    thresholds.code[thresholds.above.iter().filter(|t| x > **t).count()]
}

/// Codes (one a byte, not packed) and block maxima of `x`.
pub fn quantize(x: &[f32], quant_type: QuantType, blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(x.len());
    let mut maxima = Vec::new();
    for block in x.chunks(blocksize) {
        let absmax = block.iter().fold(0f32, |max, v| max.max(v.abs()));
        codes.extend(block.iter().map(|v| encode(v * (1.0 / absmax.max(1e-38)), quant_type)));
        maxima.push(absmax);
    }
    (codes, maxima)
}

/// Two codes a byte, the first in the high nibble, an odd count padded with the code of zero.
pub fn pack(codes: &[u8], quant_type: QuantType) -> Vec<u8> {
    if quant_type == QuantType::Int8 {
        return codes.to_vec();
    }
    let pad = encode(0.0, quant_type);
    codes.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&pad)).collect()
}

/// `value[code] * absmax`, rounded to `dtype`.
pub fn dequantize(codes: &[u8], maxima: &[f32], quant_type: QuantType, blocksize: usize, dtype: DType) -> Vec<f32> {
    let value = |(i, code): (usize, &u8)| quant_type.values()[*code as usize] * maxima[i / blocksize];
    codes.iter().enumerate().map(|c| round_to(dtype, value(c))).collect()
}

/// The nearest entry of a sorted 8-bit map, as bitsandbytes' GPU search finds it: at equal
/// distance the entry with the even index.
pub fn encode_dynamic(x: f32, map: &[f32; 256]) -> u8 {
    let (mut pivot, mut below, mut above) = (127usize, 0usize, 255usize);
    for step in [64, 32, 16, 8, 4, 2, 1] {
        if x > map[pivot] {
            below = pivot;
            pivot += step;
        } else {
            above = pivot;
            pivot -= step;
        }
    }
    if x > map[pivot] {
        if x > (map[above] + map[pivot]) * 0.5 { above as u8 } else { pivot as u8 }
    } else if x < (map[below] + map[pivot]) * 0.5 {
        below as u8
    } else {
        pivot as u8
    }
}
