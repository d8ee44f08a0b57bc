//! How a model is loaded.

use candle_core::{DType, Device};

use crate::{
    backend,
    error::{Error, Result},
    quantized::QuantType,
};

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
    /// are rounded through: F32 (the default), F16 or BF16. On the CPU arithmetic is in f32
    /// whatever this says: a CPU has no faster, and no more exact, way.
    pub torch_dtype: DType,
    /// Where the model goes.
    pub device_map: DeviceMap,
    /// Loading is always tensor by tensor, the model never exists twice; `false` changes nothing.
    pub low_cpu_mem_usage: bool,
    /// `Some`: the linear layers inside the blocks are quantized while they are read.
    pub quantization_config: Option<BitsAndBytesConfig>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            torch_dtype: DType::F32,
            device_map: DeviceMap::Auto,
            low_cpu_mem_usage: true,
            quantization_config: None,
        }
    }
}

/// How weights are quantized, under bitsandbytes' names.
#[derive(Clone, Debug, PartialEq)]
pub struct BitsAndBytesConfig {
    /// Quantize to 4 bits; `false` loads as if there were no configuration.
    pub load_in_4bit: bool,
    /// NF4 (the default here: QLoRA's type), FP4 or INT4. (transformers' own default is FP4.)
    pub bnb_4bit_quant_type: QuantType,
    /// Quantize the blocks' scales too: 4.127 bits a parameter instead of 4.5.
    pub bnb_4bit_use_double_quant: bool,
    /// The dtype of products with a dequantized weight, on a GPU, as bitsandbytes' `Linear4bit` has it: the input is
    /// cast to it, the result back to the activations' dtype, which is `torch_dtype`. F32, the default here as there, is
    /// slow beside a `torch_dtype` of 16 bits: then name that. The CPU computes in f32, see
    /// [`ModelOptions::torch_dtype`].
    pub bnb_4bit_compute_dtype: DType,
}

impl Default for BitsAndBytesConfig {
    fn default() -> Self {
        Self {
            load_in_4bit: false,
            bnb_4bit_quant_type: QuantType::Nf4,
            bnb_4bit_use_double_quant: false,
            bnb_4bit_compute_dtype: DType::F32,
        }
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
                return Err(Error::Unsupported {
                    what: name.into(),
                    got: format!("{dtype:?}"),
                    supported: float.iter().map(|d| format!("{d:?}")).collect(),
                    remedy: "use F16, as the walkthrough does".into(),
                });
            }
        }
        if self.quantization_config.as_ref().is_some_and(|q| q.bnb_4bit_quant_type == QuantType::Int8) {
            return Err(Error::argument(
                "bnb_4bit_quant_type",
                "Int8",
                "a 4-bit type: Nf4, Fp4 or Int4",
                "use QuantType::Nf4; Int8 is for quant::quantize_4bit's comparisons",
            ));
        }
        Ok(())
    }
}
