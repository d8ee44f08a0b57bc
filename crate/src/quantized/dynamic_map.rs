//! The 8-bit code book of double quantization and of the 8-bit optimizers: a sorted map of 256 values, searched.

use std::sync::{LazyLock, Mutex};

use candle_core::{DType, Device, Tensor};

use super::code::create_dynamic_map;
use crate::error::Result;

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
    pub(crate) fn encode<const N: usize>(&self, x: [f32; N]) -> [u8; N] {
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
