//! What belongs to a quantized weight besides its codes.

use candle_core::{DType, Device, Tensor};

use super::{AbsmaxCpu, BlockwiseState, QuantType, QuantizedCpu, check_blocksize, code_on, with_slice};
use crate::error::{Error, Result, ensure};

/// What undoes `quantize_4bit`: the fields of bitsandbytes' `QuantState`. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct QuantState {
    /// One a block: f32, or uint8 codes when `state2` is there (double quantization).
    pub absmax: Tensor,
    /// The shape of the weight.
    pub shape: Vec<usize>,
    /// The dtype of the weight, and of the dequantized one.
    pub dtype: DType,
    /// Elements a block, row-major.
    pub blocksize: usize,
    pub quant_type: QuantType,
    /// The values of the codes, f32: 16, or 256 for `Int8`; on the CPU, wherever the weight is.
    pub code: Tensor,
    /// The mean of the block maxima, subtracted before they were quantized.
    pub offset: Option<f32>,
    /// How the block maxima were quantized.
    pub state2: Option<BlockwiseState>,
}

impl QuantState {
    /// Elements of the weight.
    pub fn elem_count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the statistics: the block maxima and, when nested, theirs and the offset. The
    /// code books are constants that all weights share.
    pub fn num_bytes(&self) -> usize {
        let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        bytes(&self.absmax) + self.state2.as_ref().map_or(0, |s| bytes(&s.absmax) + size_of::<f32>())
    }

    /// Checks that the parts fit together and belong to `packed`, so that the kernels need not.
    pub(crate) fn validate(&self, packed: &Tensor) -> Result<()> {
        check_blocksize(self.blocksize)?;
        let n = self.elem_count();
        let blocks = n.div_ceil(self.blocksize);
        expect("packed weight", packed, DType::U8, self.quant_type.packed_len(n))?;
        let beside = |name: &str, tensor: &Tensor| same_device(name, tensor, packed);
        beside("absmax", &self.absmax)?;
        if let Some(state2) = &self.state2 {
            beside("nested_absmax", &state2.absmax)?;
        }
        expect("quant_map", &self.code, DType::F32, self.quant_type.values().len())?;
        match (&self.state2, self.offset) {
            (None, _) => expect("absmax", &self.absmax, DType::F32, blocks),
            (Some(state2), Some(_)) => {
                check_blocksize(state2.blocksize)?;
                expect("absmax", &self.absmax, DType::U8, blocks)?;
                expect("nested_absmax", &state2.absmax, DType::F32, blocks.div_ceil(state2.blocksize))?;
                expect("nested_quant_map", &state2.code, DType::F32, 256)
            }
            (Some(_), None) => {
                let remedy = "the quantization state is incomplete: quantize again, or get the checkpoint again";
                let expected = "a number, because absmax is quantized itself";
                Err(Error::argument("nested_offset", "nothing", expected, remedy))
            }
        }
    }
}

pub(crate) fn expect(name: &str, tensor: &Tensor, dtype: DType, elements: usize) -> Result<()> {
    let remedy = "the quantization state does not belong to this weight: get the checkpoint again";
    let (got, name_of_dtype) = (tensor.dtype(), format!("dtype of {name}"));
    ensure(got == dtype, &name_of_dtype, got.as_str(), dtype.as_str(), remedy)?;
    if tensor.elem_count() != elements {
        return Err(Error::shape(name, None, &[elements], tensor.dims(), remedy));
    }
    Ok(())
}

pub(crate) fn same_device(name: &str, tensor: &Tensor, packed: &Tensor) -> Result<()> {
    let (here, there) = (tensor.device(), packed.device());
    let (got, expected) =
        (format!("{:?}", here.location()), format!("{:?}, as of the packed weight", there.location()));
    let remedy = "move the weight and its state to one device: QuantizedTensor::to_device";
    ensure(here.same_device(there), &format!("device of {name}"), got, &expected, remedy)
}

/// A weight in 4 bits (or 8): the codes and their state. Cloning is cheap and shares both.
#[derive(Clone, Debug)]
pub struct QuantizedTensor {
    packed: Tensor,
    state: QuantState,
}

impl QuantizedTensor {
    /// Puts together what `quantize_4bit` gave, or what a checkpoint holds; fails where the
    /// parts do not fit together.
    pub fn new(packed: &Tensor, state: &QuantState) -> Result<Self> {
        state.validate(packed)?;
        let contiguous = |t: &Tensor| -> Result<Tensor> { Ok(t.contiguous()?) };
        let mut state = state.clone();
        state.absmax = contiguous(&state.absmax)?;
        if let Some(state2) = &mut state.state2 {
            state2.absmax = contiguous(&state2.absmax)?;
            state2.code = contiguous(&code_on(&state2.code, packed.device())?)?;
        }
        Ok(Self { packed: contiguous(packed)?, state })
    }

    /// The same weight on another device; no copy when it is there already.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut state = self.state.clone();
        state.absmax = state.absmax.to_device(device)?;
        if let Some(state2) = &mut state.state2 {
            state2.absmax = state2.absmax.to_device(device)?;
            state2.code = code_on(&state2.code, device)?;
        }
        Self::new(&self.packed.to_device(device)?, &state)
    }

    /// Where the codes and their state are.
    pub fn device(&self) -> &Device {
        self.packed.device()
    }

    /// The codes: uint8 [(n+1)/2, 1], or [n, 1] for `Int8`.
    pub fn packed(&self) -> &Tensor {
        &self.packed
    }

    pub fn state(&self) -> &QuantState {
        &self.state
    }

    /// The shape of the weight, not of the codes.
    pub fn shape(&self) -> &[usize] {
        &self.state.shape
    }

    /// The dtype of the dequantized weight.
    pub fn dtype(&self) -> DType {
        self.state.dtype
    }

    /// Bytes of the codes and the statistics.
    pub fn num_bytes(&self) -> usize {
        self.packed.elem_count() + self.state.num_bytes()
    }

    /// Runs `f` on the weight as slices, for `dequantize_range`. The view may be shared among
    /// threads inside `f`.
    pub fn with_cpu<R>(&self, f: impl FnOnce(&QuantizedCpu<'_>) -> R) -> Result<R> {
        with_slice::<u8, _>(&self.packed, |packed| {
            let run = |absmax: AbsmaxCpu<'_>| {
                f(&QuantizedCpu {
                    packed,
                    absmax,
                    quant_type: self.state.quant_type,
                    blocksize: self.state.blocksize,
                    dtype: self.state.dtype,
                    len: self.state.elem_count(),
                })
            };
            match (&self.state.state2, self.state.offset) {
                (Some(state2), Some(offset)) => with_slice::<u8, _>(&self.state.absmax, |codes| {
                    with_slice::<f32, _>(&state2.absmax, |absmax| {
                        with_slice::<f32, _>(&state2.code, |code| {
                            let code = code.first_chunk::<256>().unwrap_or(&[0.0; 256]);
                            run(AbsmaxCpu::Nested { codes, code, absmax, blocksize: state2.blocksize, offset })
                        })
                    })
                })??,
                _ => with_slice::<f32, _>(&self.state.absmax, |absmax| run(AbsmaxCpu::Plain(absmax))),
            }
        })?
    }
}
