//! How a model is loaded.

use candle_core::{DType, Device};

use crate::{
    backend,
    error::{Error, Result, ensure},
    names::with_defaults,
    quantized::QuantType,
};

with_defaults! {
/// Arguments of `AutoModelForCausalLM::from_pretrained`, under transformers' names.
///
/// ```
/// use qlora_nb::prelude::*;
/// let options = ModelOptions {
///     torch_dtype: DType::F16,
///     quantization_config: Some(BitsAndBytesConfig { load_in_4bit: true, ..Default::default() }),
///     ..Default::default()
/// };
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ModelOptions {
    /// The dtype in which weights that are not quantized are stored, and that quantized ones
    /// are rounded through: F32 (the default), F16 or BF16. On the CPU arithmetic is in f32 whatever this says, unless
    /// `bnb_4bit_compute_dtype` asks for BF16.
    pub torch_dtype: DType = DType::F32,
    /// Where the model goes.
    pub device_map: DeviceMap = DeviceMap::Auto,
    /// Loading is always tensor by tensor, the model never exists twice; `false` changes nothing.
    pub low_cpu_mem_usage: bool = true,
    /// `Some`: the linear layers inside the blocks are quantized while they are read.
    pub quantization_config: Option<BitsAndBytesConfig> = None,
}
}

with_defaults! {
/// How weights are quantized, under bitsandbytes' names.
#[derive(Clone, Debug, PartialEq)]
pub struct BitsAndBytesConfig {
    /// Quantize to 4 bits; `false` loads as if there were no configuration.
    pub load_in_4bit: bool = false,
    /// NF4 (the default here: QLoRA's type), FP4 or INT4. (transformers' own default is FP4.)
    pub bnb_4bit_quant_type: QuantType = QuantType::Nf4,
    /// Quantize the blocks' scales too: 4.127 bits a parameter instead of 4.5.
    pub bnb_4bit_use_double_quant: bool = false,
    /// The dtype of products with a dequantized weight, on a GPU, as bitsandbytes' `Linear4bit` has it: the input is
    /// cast to it, the result back to the activations' dtype, which is `torch_dtype`. F32, the default here as there, is
    /// slow beside a `torch_dtype` of 16 bits: then name that.
    ///
    /// On the CPU BF16 means that both operands of these products are rounded to it and the sums are f32; activations stay
    /// f32. With `torch_dtype: BF16` the output head's products are made so too. It is faster on processors with
    /// AVX-512 BF16; others give nearly the same numbers in the time that f32 takes. Passes of up to four tokens, as
    /// generation makes them, are in f32: reading the weight takes their time. F16 is computed in f32.
    pub bnb_4bit_compute_dtype: DType = DType::F32,
}
}

/// Where a model goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceMap {
    /// The first GPU that this build can use, otherwise the CPU; it says which it took.
    #[default]
    Auto,
    Cpu,
    /// The GPU of that number; an error when there is none.
    Cuda(usize),
}

impl DeviceMap {
    /// The device, and what to say of the choice when it was ours.
    pub fn device(self) -> Result<(Device, Option<String>)> {
        match self {
            Self::Cpu => Ok((Device::Cpu, None)),
            Self::Cuda(index) => Ok((backend::gpu(index)?, None)),
            Self::Auto => {
                let (device, choice) = backend::first_device();
                Ok((device, Some(choice)))
            }
        }
    }
}

impl ModelOptions {
    /// Refuses what cannot be loaded.
    pub fn validate(&self) -> Result<()> {
        let float = [DType::F32, DType::F16, DType::BF16];
        let compute = self.quantization_config.as_ref().map_or(DType::F32, |q| q.bnb_4bit_compute_dtype);
        for (name, dtype) in [("torch_dtype", self.torch_dtype), ("bnb_4bit_compute_dtype", compute)] {
            if !float.contains(&dtype) {
                let supported = float.map(|d| format!("{d:?}"));
                let remedy = "use F16, as the walkthrough does";
                return Err(Error::unsupported(name, format!("{dtype:?}"), supported, remedy));
            }
        }
        let fine = self.quantization_config.as_ref().is_none_or(|q| q.bnb_4bit_quant_type != QuantType::Int8);
        let remedy = "use QuantType::Nf4; Int8 is for quant::quantize_4bit's comparisons";
        ensure(fine, "bnb_4bit_quant_type", "Int8", "a 4-bit type: Nf4, Fp4 or Int4", remedy)
    }
}
