//! Code books: the values that a code stands for, and the thresholds between them.
//!
//! Every type is one sorted list of values with one threshold between neighbours, so
//! quantizing is counting how many thresholds lie below `x / absmax`, and a permutation
//! for the types (FP4, Int4) whose codes are not in the order of their values.

use std::sync::LazyLock;

use candle_core::{Device, Tensor};

use crate::{
    error::{Error, Result},
    names::named,
};

/// How a block's values are coded, each relative to the block's `absmax`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// NormalFloat4 (QLoRA, arXiv:2305.14314): quantiles of the normal distribution.
    Nf4,
    /// A 4-bit float: sign, 2 exponent bits, 1 mantissa bit.
    Fp4,
    /// -7..7, evenly spaced. For comparison with the two above; bitsandbytes cannot read it.
    Int4,
    /// -127..127, evenly spaced, one byte an element. bitsandbytes cannot read it in this form.
    Int8,
}

// As in checkpoints and in `bnb_4bit_quant_type`.
named!(QuantType: "quantization type", "use \"nf4\"; QLoRA was made for it" {
    Nf4 => "nf4",
    Fp4 => "fp4",
    Int4 => "int4",
    Int8 => "int8",
});

impl QuantType {
    /// Bits a weight, without the statistics.
    pub fn bits(self) -> usize {
        if self == Self::Int8 { 8 } else { 4 }
    }

    /// Bytes that hold `elements` codes: two 4-bit codes a byte, an odd count padded.
    pub fn packed_len(self, elements: usize) -> usize {
        if self == Self::Int8 { elements } else { elements.div_ceil(2) }
    }

    /// The values that the codes stand for, in the order of the codes: 16, or 256 for `Int8`.
    pub fn values(self) -> &'static [f32] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
            Self::Int4 => &INT4,
            Self::Int8 => &*INT8,
        }
    }

    /// `values()` as the tensor that a checkpoint calls `quant_map`; one tensor for all weights.
    /// FP4's second zero is -0 when it is dequantized, but not there.
    pub(crate) fn code(self) -> Result<Tensor> {
        static CODES: LazyLock<candle_core::Result<Vec<Tensor>>> = LazyLock::new(|| {
            QuantType::ALL.into_iter().map(|t| Tensor::new(t.values(), &Device::Cpu)? + 0.0).collect()
        });
        match &*CODES {
            Ok(codes) => Ok(codes[self as usize].clone()),
            Err(e) => Err(Error::Tensor(candle_core::Error::Msg(e.to_string()))),
        }
    }
}

/// 15 thresholds between 16 values in ascending order; `code[rank]` is the code of the
/// value above `rank` of them. A type with fewer values has thresholds at infinity.
pub(crate) struct Thresholds {
    pub above: [f32; 15],
    pub code: [u8; 16],
}

impl QuantType {
    /// The 4-bit types' decision thresholds; a value equal to one belongs below it.
    pub(crate) fn thresholds(self) -> &'static Thresholds {
        static FP4_THRESHOLDS: LazyLock<Thresholds> = LazyLock::new(fp4_thresholds);
        match self {
            Self::Fp4 => &FP4_THRESHOLDS,
            Self::Int4 | Self::Int8 => &INT4_THRESHOLDS,
            Self::Nf4 => &NF4_THRESHOLDS,
        }
    }
}

#[rustfmt::skip]
static NF4: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

#[rustfmt::skip]
static NF4_THRESHOLDS: Thresholds = Thresholds {
    above: [
        -0.848_096_4, -0.610_632_9, -0.459_995_27, -0.339_679_42, -0.234_607_4, -0.137_911_74, -0.045_525_018,
        0.039_790_15, 0.120_255_25, 0.203_521_25, 0.292_013_76, 0.389_312_54, 0.501_663_45, 0.642_786_9, 0.861_478_4,
    ],
    code: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
};

/// 0, 1/16, 8, 12, 4, 6, 2, 3, and the same negated, over 12: the order of the bit patterns.
#[rustfmt::skip]
static FP4: [f32; 16] = [
    0.0, 0.0625 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 0.5, 2.0 / 12.0, 0.25,
    -0.0, -0.0625 / 12.0, -8.0 / 12.0, -1.0, -4.0 / 12.0, -0.5, -2.0 / 12.0, -0.25,
];

/// bitsandbytes decides on |x|, with these seven roundings of the midpoints, and takes the
/// sign apart: on the negative side a tie belongs above the threshold, hence the step down.
fn fp4_thresholds() -> Thresholds {
    const MAGNITUDES: [f32; 7] = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];
    let mut above = [0.0; 15];
    for (i, m) in MAGNITUDES.into_iter().enumerate() {
        above[8 + i] = m;
        above[6 - i] = (-m).next_down();
    }
    above[7] = 0f32.next_down();
    Thresholds { above, code: [11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3] }
}

/// 7 down to -7 over 7, zero twice: the order of bitsandbytes' own (unused) "int4" table.
#[rustfmt::skip]
static INT4: [f32; 16] = [
    1.0, 6.0 / 7.0, 5.0 / 7.0, 4.0 / 7.0, 3.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0,
    -0.0, -1.0 / 7.0, -2.0 / 7.0, -3.0 / 7.0, -4.0 / 7.0, -5.0 / 7.0, -6.0 / 7.0, -1.0,
];

#[rustfmt::skip]
static INT4_THRESHOLDS: Thresholds = Thresholds {
    above: [
        -6.5 / 7.0, -5.5 / 7.0, -4.5 / 7.0, -3.5 / 7.0, -2.5 / 7.0, -1.5 / 7.0, -0.5 / 7.0,
        0.5 / 7.0, 1.5 / 7.0, 2.5 / 7.0, 3.5 / 7.0, 4.5 / 7.0, 5.5 / 7.0, 6.5 / 7.0, f32::INFINITY,
    ],
    code: [15, 14, 13, 12, 11, 10, 9, 7, 6, 5, 4, 3, 2, 1, 0, 0],
};

/// The byte is the integer in two's complement.
static INT8: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|i| f32::from(i as u8 as i8) / 127.0));

/// The 8-bit "dynamic" code book: 256 sorted values in [-1, 1], or [0, 1] when not `signed`.
///
/// A tree of exponents: seven decades, each with twice as many evenly spaced values as the
/// one below, so that small numbers keep a relative precision (arXiv:1511.04561). Bit-equal
/// to `bitsandbytes.functional.create_dynamic_map(signed)`.
pub fn create_dynamic_map(signed: bool) -> [f32; 256] {
    let mut data = Vec::with_capacity(256);
    for (exponent, decade) in [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0].into_iter().enumerate() {
        let boundaries = linspace(0.1, 1.0, (1 << (exponent + usize::from(!signed))) + 1);
        for pair in boundaries.windows(2) {
            let value = decade * ((pair[0] + pair[1]) / 2.0);
            data.push(value);
            if signed {
                data.push(-value);
            }
        }
    }
    data.extend([0.0, 1.0]);
    data.sort_by(f32::total_cmp);
    std::array::from_fn(|i| data[i])
}

/// torch.linspace on a CPU: from both ends to the middle, each value rounded once.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    let from_start = |i: usize| step.mul_add(i as f32, start);
    let from_end = |i: usize| (-step).mul_add((steps - 1 - i) as f32, end);
    (0..steps).map(|i| if i < steps / 2 { from_start(i) } else { from_end(i) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_padded() {
        assert_eq!(format!("{:5}|{}", QuantType::Nf4, QuantType::Int8), "nf4  |int8");
    }

    #[test]
    fn thresholds_ascend_and_codes_name_ascending_values() {
        for t in [QuantType::Nf4, QuantType::Fp4, QuantType::Int4] {
            let Thresholds { above, code } = t.thresholds();
            assert!(above.windows(2).all(|w| w[0] < w[1]), "{t}");
            let values: Vec<f32> = code.iter().map(|&c| t.values()[c as usize]).collect();
            assert!(values.windows(2).all(|w| w[0] <= w[1]), "{t}: {values:?}");
        }
    }

    /// bitsandbytes' kernel asks for the sign, then compares |x|; ties belong to the smaller magnitude.
    #[test]
    fn fp4_decides_on_the_magnitude() {
        let by_magnitude = |x: f32| {
            let steps =
                [(0.8333333, 3), (0.583333, 2), (0.4166667, 5), (0.29166667, 4), (0.20833333, 7), (0.0859375, 6)];
            let above = steps.into_iter().chain([(0.00260417, 1)]).find(|(t, _)| x.abs() > *t);
            above.map_or(0, |(_, code)| code) + if x < 0.0 { 8 } else { 0 }
        };
        for t in QuantType::Fp4.thresholds().above.into_iter().chain([0.0, -0.0, 1.0, -1.0]) {
            for x in [t, -t, t.next_up(), -t.next_up(), t.next_down(), -t.next_down()] {
                assert_eq!(crate::quant::oracle::encode(x, QuantType::Fp4), by_magnitude(x), "{x:e}");
            }
        }
    }

    #[test]
    fn dynamic_maps_have_256_distinct_values() {
        for signed in [true, false] {
            let map = create_dynamic_map(signed);
            assert!(map.windows(2).all(|w| w[0] < w[1]));
            assert_eq!(map[255], 1.0);
            assert_eq!(map[0] < 0.0, signed);
        }
    }

    #[test]
    fn names_are_read_back() {
        for t in QuantType::ALL {
            assert_eq!(t.as_str().parse::<QuantType>().unwrap(), t);
        }
        assert!("nf5".parse::<QuantType>().unwrap_err().to_string().contains("nf4, fp4"));
    }
}
