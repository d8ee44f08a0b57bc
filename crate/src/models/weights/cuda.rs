//! Tensors read straight to a GPU: converted and looked through there (`kernels/cuda/convert.cu`).

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype as FileDtype;

use super::{Entry, finite_error, not_float, unsupported};
use crate::{
    cuda::{self, Gpu, KernelArg, Piece, Staging, address, dtype_suffix},
    error::Result,
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
