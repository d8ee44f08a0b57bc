//! Quantized weights in checkpoints, in the form that bitsandbytes writes and reads.
//!
//! For a weight `w`: `w` (uint8 codes), `w.absmax`, `w.quant_map`, with double quantization
//! `w.nested_absmax` and `w.nested_quant_map`, and `w.quant_state.bitsandbytes__nf4`, the
//! bytes of a JSON object with what is not a tensor.

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use crate::{
    error::{Error, Result},
    py_repr::py_float,
    quantized::{BlockwiseState, QuantState, QuantType, QuantizedTensor, create_dynamic_map, signed_code, with_slice},
};

#[derive(Deserialize)]
struct Json {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl QuantState {
    /// The state's tensors under their checkpoint names, for the weight named `prefix`
    /// (`model.layers.0.mlp.up_proj.weight`), on the CPU. Equal to bitsandbytes' byte for byte.
    pub fn to_tensors(&self, prefix: &str) -> Result<Vec<(String, Tensor)>> {
        let key = |suffix: &str| format!("{prefix}.{suffix}");
        let mut tensors = vec![(key("absmax"), on_cpu(&self.absmax)?), (key("quant_map"), on_cpu(&self.code)?)];
        if let Some(state2) = &self.state2 {
            tensors.push((key("nested_absmax"), on_cpu(&state2.absmax)?));
            tensors.push((key("nested_quant_map"), on_cpu(&state2.code)?));
        }
        let json = self.json();
        let json = Tensor::from_slice(json.as_bytes(), json.len(), &Device::Cpu)?;
        tensors.push((key(&format!("quant_state.bitsandbytes__{}", self.quant_type)), json));
        Ok(tensors)
    }

    /// As Python's `json.dumps` lays it out.
    fn json(&self) -> String {
        let mut json = format!(
            "{{\"quant_type\": \"{}\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": {:?}",
            self.quant_type,
            self.blocksize,
            torch_name(self.dtype),
            self.shape
        );
        if let (Some(state2), Some(offset)) = (&self.state2, self.offset) {
            json += &format!(
                ", \"nested_blocksize\": {}, \"nested_dtype\": \"{}\", \"nested_offset\": {}",
                state2.blocksize,
                torch_name(state2.dtype),
                py_float(f64::from(offset))
            );
        }
        json + "}"
    }

    /// Reads the state of the weight named `prefix`. `get` looks a tensor up by its name;
    /// `Ok(None)` when the weight has no such state, so it is not quantized. The state is where its
    /// tensors are.
    pub fn from_tensors(prefix: &str, mut get: impl FnMut(&str) -> Result<Option<Tensor>>) -> Result<Option<Self>> {
        let mut json = None;
        for quant_type in QuantType::ALL {
            let name = format!("{prefix}.quant_state.bitsandbytes__{quant_type}");
            if let Some(tensor) = get(&name)? {
                json = Some((name, tensor));
                break;
            }
        }
        let Some((name, json)) = json else { return Ok(None) };
        if json.dtype() != DType::U8 {
            return Err(malformed(&name, &format!("{:?}, expected the bytes of a JSON object", json.dtype())));
        }
        let bytes = with_slice::<u8, _>(&on_cpu(&json)?, <[u8]>::to_vec)?;
        let json: Json = serde_json::from_slice(&bytes).map_err(|e| malformed(&name, &e.to_string()))?;
        let dtype = dtype_of(&name, &json.dtype)?;
        let quant_type: QuantType = json.quant_type.parse()?;

        let mut need = |suffix: &str| {
            let name = format!("{prefix}.{suffix}");
            get(&name)?.ok_or_else(|| malformed(&name, "it is missing, though the weight has a quant_state"))
        };
        let absmax = need("absmax")?;
        same_values(&format!("{prefix}.quant_map"), &need("quant_map")?, quant_type.values())?;
        let device = absmax.device().clone();
        let mut state = QuantState {
            absmax,
            shape: json.shape,
            dtype,
            blocksize: json.blocksize,
            quant_type,
            // The values are the type's own, so that all weights share one tensor.
            code: quant_type.code()?,
            offset: None,
            state2: None,
        };
        if let (Some(blocksize), Some(offset)) = (json.nested_blocksize, json.nested_offset) {
            let code = need("nested_quant_map")?;
            same_values(&format!("{prefix}.nested_quant_map"), &code, &create_dynamic_map(true))?;
            state.offset = Some(offset as f32);
            state.state2 = Some(BlockwiseState {
                absmax: need("nested_absmax")?,
                code: signed_code(&device)?,
                blocksize,
                dtype: dtype_of(&name, json.nested_dtype.as_deref().unwrap_or("float32"))?,
            });
        }
        Ok(Some(state))
    }
}

impl QuantizedTensor {
    /// The codes under `prefix` itself, then the state's tensors; on the CPU.
    pub fn to_tensors(&self, prefix: &str) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = vec![(prefix.to_string(), on_cpu(self.packed())?)];
        tensors.extend(self.state().to_tensors(prefix)?);
        Ok(tensors)
    }

    /// Reads the quantized weight named `prefix`; `Ok(None)` when it is absent or not quantized.
    pub fn from_tensors(prefix: &str, mut get: impl FnMut(&str) -> Result<Option<Tensor>>) -> Result<Option<Self>> {
        let Some(state) = QuantState::from_tensors(prefix, &mut get)? else { return Ok(None) };
        let packed = get(prefix)?.ok_or_else(|| malformed(prefix, "it is missing, though its quant_state is there"))?;
        Self::new(&packed, &state).map(Some)
    }
}

fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_device(&Device::Cpu)?)
}

fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

fn dtype_of(name: &str, torch_name: &str) -> Result<DType> {
    match torch_name {
        "float16" => Ok(DType::F16),
        "bfloat16" => Ok(DType::BF16),
        "float32" => Ok(DType::F32),
        other => Err(malformed(name, &format!("dtype {other:?}, expected float16, bfloat16 or float32"))),
    }
}

fn malformed(tensor: &str, detail: &str) -> Error {
    Error::argument(
        &format!("tensor {tensor:?} of the checkpoint"),
        detail,
        "the quantization state that bitsandbytes writes",
        "get the checkpoint again, or load the unquantized one",
    )
}

/// A code book that differs would be used silently with the wrong values (bitsandbytes itself
/// ignores it for 4-bit types), so it must be the known one, but for rounding.
fn same_values(name: &str, tensor: &Tensor, expected: &[f32]) -> Result<()> {
    let same = |values: &[f32]| {
        values.len() == expected.len() && values.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-6)
    };
    if tensor.dtype() == DType::F32 && with_slice::<f32, _>(&on_cpu(tensor)?, same)? {
        return Ok(());
    }
    Err(malformed(name, "a code book with other values"))
}
