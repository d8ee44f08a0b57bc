//! The gradients of all adapters as one: to keep a copy, to put it back, to ask whether all are finite.

use candle_core::{DType, Tensor};

use super::{Gpu, KernelArg, address, driver_error, tensor::clear, uninit};
use crate::{backend::param::Param, error::Result};

/// A table of where the gradients are, and room for a copy of them.
pub struct Grads {
    table: Tensor,
    backup: Tensor,
    count: usize,
    /// They are in `table` by address.
    _params: Vec<Param>,
}

/// Blocks that share a gradient.
const BLOCKS: usize = 8;

impl Grads {
    pub fn new(gpu: &Gpu, params: &[Param]) -> Result<Self> {
        let mut table = Vec::with_capacity(3 * params.len());
        let mut total = 0;
        for param in params {
            let n = param.grad().elem_count();
            table.extend([address(param.grad())? as i64, total as i64, n as i64]);
            total += n;
        }
        let count = params.len();
        let table = Tensor::from_vec(table, 3 * count, &gpu.device())?;
        Ok(Self { table, backup: uninit(gpu, total.max(1), DType::F32)?, count, _params: params.to_vec() })
    }

    /// Keeps a copy.
    pub fn save(&self, gpu: &Gpu) -> Result<()> {
        self.run(gpu, "grads_save")
    }

    /// Puts the copy back.
    pub fn restore(&self, gpu: &Gpu) -> Result<()> {
        self.run(gpu, "grads_restore")
    }

    fn run(&self, gpu: &Gpu, kernel: &str) -> Result<()> {
        let (table, backup) = (address(&self.table)?, address(&self.backup)?);
        if self.count == 0 {
            return Ok(());
        }
        gpu.launch(kernel, (BLOCKS, self.count, 1), 256, 0, &[&table, &backup])
    }

    /// Writes to `flag` (i32) whether any is NaN or infinite.
    pub fn check(&self, gpu: &Gpu, flag: u64) -> Result<()> {
        let table = address(&self.table)?;
        clear(gpu, flag, size_of::<i32>())?;
        if self.count == 0 {
            return Ok(());
        }
        let args: [&dyn KernelArg; 2] = [&table, &flag];
        gpu.launch("grads_check", (BLOCKS, self.count, 1), 256, 0, &args)
    }
}

/// What a pass leaves for the host: a sum and a flag.
pub struct Outputs {
    buffer: Tensor,
}

impl Outputs {
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self { buffer: super::zeros(gpu, 2, DType::F64)? })
    }

    /// Where the loss goes, f64.
    pub fn loss(&self) -> Result<u64> {
        address(&self.buffer)
    }

    /// Where the flag goes, i32.
    pub fn flag(&self) -> Result<u64> {
        Ok(address(&self.buffer)? + 8)
    }

    /// Waits for what was launched, and reads both.
    pub fn read(&self, gpu: &Gpu) -> Result<(f64, bool)> {
        use candle_core::cuda_backend::cudarc::driver::result;
        let mut words = [0u64; 2];
        // SAFETY: the buffer has as many bytes; the host reads them after the stream has come to its end.
        unsafe { result::memcpy_dtoh_async(&mut words, address(&self.buffer)?, gpu.stream().cu_stream()) }
            .map_err(driver_error("reading the loss"))?;
        gpu.synchronize()?;
        Ok((f64::from_bits(words[0]), words[1] as u32 != 0))
    }
}
