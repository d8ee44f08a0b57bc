//! Tensors read straight to a GPU: converted and looked through there (`kernels/cuda/convert.cu`); whether the
//! card has room for them all.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype as FileDtype;

use super::{BLOCKSIZE, Entry, Weights, finite_error, not_float, unsupported};
use crate::{
    cuda::{self, Gpu, KernelArg, Piece, Staging, address, dtype_suffix},
    error::{Error, Result},
    models::options::{BitsAndBytesConfig, ModelOptions},
    quant::{NESTED_BLOCKSIZE, QuantType},
};

/// Elements that a block of threads converts.
const CONVERTED: usize = 8 * 256;

pub(super) struct Reader {
    gpu: Arc<Gpu>,
    staging: Staging,
    /// i64: `!index` of the first element that is not finite.
    bad: Tensor,
}

impl Reader {
    pub fn new(device: &Device) -> Result<Self> {
        let gpu = cuda::of(device)?;
        Ok(Self { staging: Staging::new(&gpu)?, bad: cuda::zeros(&gpu, 1, DType::I64)?, gpu })
    }

    /// A tensor in `dtype`, in memory of at least `elements` elements: those behind its own are zeros.
    pub fn read(&self, path: &Path, key: &str, entry: &Entry, dtype: DType, elements: usize) -> Result<Tensor> {
        let gpu = &*self.gpu;
        let count: usize = entry.shape.iter().product();
        let from = match (entry.dtype, dtype) {
            (_, DType::U8) => DType::U8,
            (_, other) if !matches!(other, DType::F32 | DType::F16 | DType::BF16) => return Err(unsupported(other)),
            (FileDtype::F32, _) => DType::F32,
            (FileDtype::F16, _) => DType::F16,
            (FileDtype::BF16, _) => DType::BF16,
            (other, _) => return Err(not_float(path, key, other)),
        };
        let out = cuda::uninit(gpu, elements.max(count), dtype)?;
        let (to, bad, width, in_place) = (address(&out)?, address(&self.bad)?, from.size_in_bytes(), from == dtype);
        if elements > count {
            cuda::fill_zero(&out.narrow(0, count, elements - count)?)?;
        }
        let send = |piece: &Piece| -> Result<()> {
            let (first, n) = (piece.at / width, piece.bytes.len() / width);
            let place = to + (first * dtype.size_in_bytes()) as u64;
            let (source, target) = if in_place { (place, 0) } else { (piece.card, place) };
            cuda::write(gpu, source, piece.bytes)?;
            if from == DType::U8 {
                return Ok(());
            }
            let (n_arg, first) = (n as i64, first as i64);
            let args: [&dyn KernelArg; 5] = [&source, &target, &n_arg, &first, &bad];
            let kernel = format!("convert_{}_{}", dtype_suffix(from)?, dtype_suffix(dtype)?);
            gpu.launch(&kernel, (n.div_ceil(CONVERTED), 1, 1), 256, 0, &args)
        };
        self.staging.read(path, entry.bytes.0, count * width, !in_place, &send)?;
        if from != DType::U8 {
            let mut found = [0i64];
            cuda::copy_to_host(gpu, bad, &mut found)?;
            if found[0] != 0 {
                cuda::fill_zero(&self.bad)?;
                return Err(finite_error(path, key, !found[0] as usize, count));
            }
        }
        Ok(out.narrow(0, 0, count)?.reshape(entry.shape.as_slice())?)
    }
}

impl Weights {
    /// Runs `load`, which reads a model, if the card has room for it. The error of one that has not says what
    /// would need less.
    pub(in crate::models) fn with_room<T>(
        self,
        options: &ModelOptions,
        load: impl FnOnce(Self) -> Result<T>,
    ) -> Result<T> {
        if !self.device.is_cuda() {
            return load(self);
        }
        let gpu = cuda::of(&self.device)?;
        let needed = self.needed(options);
        let ordinal = gpu.stream().context().ordinal();
        let doing = format!("loading {:.2} GiB of weights to cuda:{ordinal}, {}", gib(needed), gpu.name());
        let remedy = self.smaller(options, needed);
        let available = gpu.available()?;
        if needed > available {
            let doing = format!("{doing}: {:.2} of its {:.2} GiB are free", gib(available), gib(gpu.memory()?.1));
            return Err(Error::OutOfDeviceMemory { doing, remedy });
        }
        load(self).map_err(|e| match e {
            Error::OutOfDeviceMemory { doing: what, .. } => {
                Error::OutOfDeviceMemory { doing: format!("{doing}: {what}"), remedy }
            }
            other => other,
        })
    }

    /// What needs less than `now`, and how much.
    fn smaller(&self, options: &ModelOptions, now: usize) -> String {
        let in_4bit = BitsAndBytesConfig {
            load_in_4bit: true,
            bnb_4bit_use_double_quant: true,
            ..options.quantization_config.clone().unwrap_or_default()
        };
        let f16 = ModelOptions { torch_dtype: DType::F16, ..options.clone() };
        let others = [
            ("torch_dtype: DType::F16", f16.clone()),
            (
                "load_in_4bit and bnb_4bit_use_double_quant, with torch_dtype: DType::F16,",
                ModelOptions { quantization_config: Some(in_4bit), ..f16 },
            ),
        ];
        let others = others.iter().map(|(what, options)| (what, self.needed(options)));
        let less = others.filter(|(_, needed)| *needed < now - now / 50);
        let mut remedy: String = less.map(|(what, needed)| format!("{what} needs {:.2} GiB; ", gib(needed))).collect();
        remedy += "other programs that use the card (nvidia-smi shows them) can be ended; DeviceMap::Cpu needs no card";
        remedy
    }

    /// Bytes of the card that the checkpoint takes with these options, its largest moment included.
    fn needed(&self, options: &ModelOptions) -> usize {
        let width = options.torch_dtype.size_in_bytes();
        let quantization = options.quantization_config.as_ref().filter(|q| q.load_in_4bit);
        // Names and shapes; bytes of those that stay as they are.
        let mut all: Vec<(String, &[usize], Option<usize>)> = Vec::new();
        for (name, entry) in &self.entries {
            let is_float = matches!(entry.dtype, FileDtype::F32 | FileDtype::F16 | FileDtype::BF16);
            // bitsandbytes puts statistics beside a weight: `weight.absmax`.
            let stays = !is_float || name.contains(".weight.");
            all.push((name.clone(), &entry.shape, stays.then(|| (entry.bytes.1 - entry.bytes.0) as usize)));
        }
        all.extend(self.gguf.iter().flat_map(|g| g.shapes()).map(|(name, shape)| (name, shape, None)));
        let (mut sum, mut beside) = (0, 0);
        for (name, shape, raw) in all {
            let n: usize = shape.iter().product();
            sum += match (quantization, raw) {
                (_, Some(raw)) => raw,
                (Some(config), _) if shape.len() == 2 && is_inside_block(&name) => {
                    // While it is quantized, it is there too.
                    beside = beside.max(n * width);
                    quantized_bytes(n, config)
                }
                _ => n * width,
            };
        }
        sum + beside
    }
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Whether a module's path has a number: `h.0.mlp.dense_h_to_4h`.
fn is_inside_block(name: &str) -> bool {
    name.split('.').any(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

fn quantized_bytes(n: usize, config: &BitsAndBytesConfig) -> usize {
    let blocks = n.div_ceil(BLOCKSIZE);
    let statistics = match config.bnb_4bit_use_double_quant {
        true => blocks + 4 * blocks.div_ceil(NESTED_BLOCKSIZE),
        false => 4 * blocks,
    };
    QuantType::packed_len(config.bnb_4bit_quant_type, n) + statistics
}
