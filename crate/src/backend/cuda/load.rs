//! Tensors read straight to a GPU: converted and looked through there (`kernels/convert.cu`).

use candle_core::{DType, Tensor};

use super::{self as cuda, Gpu, KernelArg, Piece, Staging, address, dtype_suffix};
use crate::{
    backend::{DeviceReader, FileTensor},
    error::Result,
};

/// Elements that a block of threads converts.
const CONVERTED: usize = 8 * 256;

pub(super) struct Reader {
    gpu: &'static Gpu,
    staging: Staging,
    /// i64: `!index` of the first element that is not finite, in the file or in the dtype asked for; else 0.
    bad: Tensor,
}

impl Reader {
    pub fn new(gpu: &'static Gpu) -> Result<Self> {
        Ok(Self { staging: Staging::new(gpu)?, bad: cuda::zeros(gpu, 1, DType::I64)?, gpu })
    }
}

impl DeviceReader for Reader {
    fn read(&self, file: &FileTensor, dtype: DType, elements: usize) -> Result<Option<Tensor>> {
        let (gpu, from) = (self.gpu, file.dtype);
        let count: usize = file.shape.iter().product();
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
        self.staging.read(file.path, file.begin, count * width, !in_place, &send)?;
        if from != DType::U8 {
            let mut found = [0i64];
            cuda::copy_to_host(gpu, bad, &mut found)?;
            if found[0] != 0 {
                cuda::fill_zero(&self.bad)?;
                return Ok(None);
            }
        }
        Ok(Some(out.narrow(0, 0, count)?.reshape(file.shape)?))
    }
}
