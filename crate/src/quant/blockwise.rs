//! 8-bit blockwise quantization with a dynamic code book: for the statistics of the 4-bit
//! types (double quantization) and for the states of the 8-bit optimizers.

use std::sync::{LazyLock, Mutex};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    check_blocksize,
    code::create_dynamic_map,
    cpu::round_to,
    tensor::{not_finite, tensor_f32, with_f32, with_slice},
};
use crate::error::{Error, Result};

/// The blocksize of bitsandbytes' nested statistics and of its 8-bit optimizer states.
pub const BLOCKSIZE: usize = 256;

/// What undoes `quantize_blockwise`.
#[derive(Clone, Debug)]
pub struct BlockwiseState {
    /// f32, one a block.
    pub absmax: Tensor,
    /// f32, 256 values, sorted.
    pub code: Tensor,
    /// Elements a block; a power of two.
    pub blocksize: usize,
    /// The dtype of the quantized tensor, and of the dequantized one.
    pub dtype: DType,
}

/// A sorted 8-bit map made ready for searching.
pub(crate) struct DynamicMap {
    pub value: [f32; 256],
    /// `code = number of entries below x`; padded with infinity to a power of two.
    pub above: [f32; 256],
}

impl DynamicMap {
    /// For numbers of either sign.
    pub fn signed() -> &'static Self {
        static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(create_dynamic_map(true)));
        &MAP
    }

    /// For numbers that are not negative.
    pub fn unsigned() -> &'static Self {
        static MAP: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(create_dynamic_map(false)));
        &MAP
    }

    fn new(value: [f32; 256]) -> Self {
        // The even code takes a value in the middle: from an odd code's midpoint on, up.
        let above = std::array::from_fn(|i| match i {
            255 => f32::INFINITY,
            _ if i % 2 == 1 => ((value[i + 1] + value[i]) * 0.5).next_down(),
            _ => (value[i + 1] + value[i]) * 0.5,
        });
        Self { value, above }
    }

    /// The codes of `N` values. The searches run side by side: each waits for its own loads.
    #[inline(always)]
    fn encode<const N: usize>(&self, x: [f32; N]) -> [u8; N] {
        let mut code = [0u32; N];
        for step in [128, 64, 32, 16, 8, 4, 2, 1] {
            for (c, x) in code.iter_mut().zip(x) {
                *c += step * u32::from(x > self.above[(*c + step - 1) as usize & 255]);
            }
        }
        code.map(|c| c as u8)
    }

    /// The values of one block's codes.
    pub fn decode_block(&self, codes: &[u8], absmax: f32, out: &mut [f32]) {
        for (o, c) in out.iter_mut().zip(codes) {
            *o = self.value[*c as usize] * absmax;
        }
    }

    /// Quantizes one block; returns its maximum. A block of zeros gets code 0, as in bitsandbytes.
    pub fn encode_block(&self, x: &[f32], codes: &mut [u8]) -> f32 {
        // Magnitudes order like integers, which vectorizes.
        let absmax = f32::from_bits(x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff)));
        if absmax == 0.0 {
            codes.fill(0);
            return 0.0;
        }
        let inverse = 1.0 / absmax.max(1e-38);
        let ((x, x_rest), (codes, codes_rest)) = (x.as_chunks::<16>(), codes.as_chunks_mut::<16>());
        for (c, x) in codes.iter_mut().zip(x) {
            *c = self.encode(x.map(|v| v * inverse));
        }
        for (c, v) in codes_rest.iter_mut().zip(x_rest) {
            [*c] = self.encode([v * inverse]);
        }
        absmax
    }
}

/// The signed map as a tensor; one a device for all weights.
pub(crate) fn signed_code(device: &Device) -> Result<Tensor> {
    static CODES: Mutex<Vec<Tensor>> = Mutex::new(Vec::new());
    let mut codes = CODES.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(code) = codes.iter().find(|code| code.device().same_device(device)) {
        return Ok(code.clone());
    }
    let code = Tensor::new(&DynamicMap::signed().value, device)?;
    codes.push(code.clone());
    Ok(code)
}

/// A code book on `device`: the shared one there, if it is the shared one here.
pub(crate) fn code_on(code: &Tensor, device: &Device) -> Result<Tensor> {
    if code.device().same_device(device) {
        return Ok(code.clone());
    }
    if code.id() == signed_code(code.device())?.id() {
        return signed_code(device);
    }
    Ok(code.to_device(device)?)
}

/// Quantizes to 8 bits with the signed dynamic map (`bitsandbytes.functional.quantize_blockwise`).
///
/// `x`: f32, f16 or bf16, any shape; the result is uint8 of the same shape. `blocksize`: a
/// power of two, 32 to 4096; the last block may be partial. The result is where `x` is.
pub fn quantize_blockwise(x: &Tensor, blocksize: usize) -> Result<(Tensor, BlockwiseState)> {
    check_blocksize(blocksize)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::quantize_blockwise(x, blocksize);
    }
    let map = DynamicMap::signed();
    let mut codes = vec![0u8; x.elem_count()];
    let mut absmax = vec![0f32; x.elem_count().div_ceil(blocksize)];
    with_f32(x, |x| {
        if let Some(i) = x.iter().position(|v| !v.is_finite()) {
            return Err(not_finite(i, x[i]));
        }
        let blocks = x.par_chunks(blocksize).zip(codes.par_chunks_mut(blocksize)).zip(&mut absmax);
        blocks.for_each(|((x, codes), absmax)| *absmax = map.encode_block(x, codes));
        Ok(())
    })??;
    let state =
        BlockwiseState { absmax: tensor_f32(absmax)?, code: signed_code(&Device::Cpu)?, blocksize, dtype: x.dtype() };
    Ok((Tensor::from_vec(codes, x.shape(), &Device::Cpu)?, state))
}

/// `code[q] * absmax[block]` in the state's dtype, of the shape of `q`.
pub fn dequantize_blockwise(q: &Tensor, state: &BlockwiseState) -> Result<Tensor> {
    let n = q.elem_count();
    let blocks = n.div_ceil(state.blocksize.max(1));
    if state.absmax.elem_count() != blocks || state.code.elem_count() != 256 {
        return Err(Error::Shape {
            name: "absmax of the blockwise state".into(),
            path: None,
            expected: vec![blocks],
            got: state.absmax.dims().to_vec(),
            remedy: "dequantize with the state that quantize_blockwise gave for this tensor".into(),
        });
    }
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return super::cuda::dequantize_blockwise(q, state);
    }
    let mut out = vec![0f32; n];
    with_slice::<u8, _>(q, |q| {
        with_slice::<f32, _>(&state.absmax, |absmax| {
            with_slice::<f32, _>(&state.code, |code| {
                let blocks = out.chunks_mut(state.blocksize).zip(q.chunks(state.blocksize)).zip(absmax);
                for ((out, q), absmax) in blocks {
                    for (o, q) in out.iter_mut().zip(q) {
                        *o = round_to(state.dtype, code[*q as usize] * absmax);
                    }
                }
            })
        })
    })???;
    Ok(Tensor::from_vec(out, q.shape(), &Device::Cpu)?.to_dtype(state.dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::oracle;

    #[test]
    fn the_search_equals_the_oracle_at_every_midpoint() {
        for signed in [true, false] {
            let map = create_dynamic_map(signed);
            let fast = if signed { DynamicMap::signed() } else { DynamicMap::unsigned() };
            let middles = map.windows(2).map(|w| (w[1] + w[0]) * 0.5);
            for x in map.into_iter().chain(middles).chain([0.0, -1.0, 1.0, 1.5, -1.5]) {
                for x in [x.next_down(), x, x.next_up()] {
                    assert_eq!(fast.encode([x]), [oracle::encode_dynamic(x, &map)], "{x} signed {signed}");
                }
            }
        }
    }

    #[test]
    fn a_state_of_another_tensor_is_refused() {
        let x = Tensor::new(&[1f32; 100], &Device::Cpu).unwrap();
        let (q, mut state) = quantize_blockwise(&x, 64).unwrap();
        state.absmax = state.absmax.narrow(0, 0, 1).unwrap();
        assert!(matches!(dequantize_blockwise(&q, &state), Err(Error::Shape { .. })));
    }
}
