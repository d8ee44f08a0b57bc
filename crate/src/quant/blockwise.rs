//! 8-bit blockwise quantization with a dynamic code book: for the statistics of the 4-bit
//! types (double quantization) and for the states of the 8-bit optimizers.

use candle_core::Tensor;

use crate::{
    backend,
    error::{Error, Result},
    quantized::{BlockwiseState, check_blocksize},
};

/// Quantizes to 8 bits with the signed dynamic map (`bitsandbytes.functional.quantize_blockwise`).
///
/// `x`: f32, f16 or bf16, any shape; the result is uint8 of the same shape. `blocksize`: a
/// power of two, 32 to 4096; the last block may be partial. The result is where `x` is.
pub fn quantize_blockwise(x: &Tensor, blocksize: usize) -> Result<(Tensor, BlockwiseState)> {
    check_blocksize(blocksize)?;
    backend::of(x.device())?.quantize_blockwise(x, blocksize)
}

/// `code[q] * absmax[block]` in the state's dtype, of the shape of `q`.
pub fn dequantize_blockwise(q: &Tensor, state: &BlockwiseState) -> Result<Tensor> {
    let blocks = q.elem_count().div_ceil(state.blocksize.max(1));
    if state.absmax.elem_count() != blocks || state.code.elem_count() != 256 {
        let remedy = "dequantize with the state that quantize_blockwise gave for this tensor";
        return Err(Error::shape("absmax of the blockwise state", None, &[blocks], state.absmax.dims(), remedy));
    }
    backend::of(q.device())?.dequantize_blockwise(q, state)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        quant::oracle,
        quantized::{DynamicMap, create_dynamic_map},
    };

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
