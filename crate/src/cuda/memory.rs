//! How much memory the card has, what to do when it is not enough.

use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};

use super::{Gpu, driver_error};
use crate::error::{Error, Result};

const REMEDY: &str = "gradient_checkpointing: true and a smaller per_device_train_batch_size (with more \
                      gradient_accumulation_steps) save most; model.memory_report() and trainer.memory_plan() show \
                      where the memory goes, nvidia-smi who else uses the card";

/// The error of a card that has no room for what was being done.
pub(super) fn out_of_memory(doing: &str) -> Error {
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let room = match result::mem_get_info() {
        Ok((free, total)) => format!(" ({:.2} of its {:.2} GiB are free)", gib(free), gib(total)),
        Err(_) => String::new(),
    };
    Error::OutOfDeviceMemory { doing: format!("{doing}{room}"), remedy: REMEDY.into() }
}

pub(super) fn is_out_of_memory(e: &DriverError) -> bool {
    e.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY
}

/// candle's error for a card without room as ours.
pub(crate) fn out_of_memory_in(error: &candle_core::Error) -> Option<Error> {
    let text = match error {
        candle_core::Error::WithBacktrace { inner, .. } | candle_core::Error::Context { inner, .. } => {
            return out_of_memory_in(inner);
        }
        candle_core::Error::Cuda(e) => e.to_string(),
        _ => return None,
    };
    let ours = text.contains("CUDA_ERROR_OUT_OF_MEMORY") || text.contains("STATUS_ALLOC_FAILED");
    ours.then(|| out_of_memory("making a tensor"))
}

impl Gpu {
    /// Bytes that tensors have.
    pub fn used(&self) -> Result<usize> {
        use sys::{CUgraphMem_attribute_enum as Graph, CUmemPool_attribute_enum as Pool};
        Ok(self.of_pool(Pool::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?
            + self.of_graphs(Graph::CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT)?)
    }

    /// Bytes that tensors can still have: what the card has free, and what this process keeps without using it.
    pub fn available(&self) -> Result<usize> {
        use sys::{CUgraphMem_attribute_enum as Graph, CUmemPool_attribute_enum as Pool};
        let reserved = self.of_pool(Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?
            + self.of_graphs(Graph::CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT)?;
        Ok(self.memory()?.0 + reserved.saturating_sub(self.used()?))
    }

    fn of_pool(&self, what: sys::CUmemPool_attribute) -> Result<usize> {
        let mut bytes = 0u64;
        // SAFETY: the attributes that are asked for are 64-bit numbers.
        unsafe { sys::cuMemPoolGetAttribute(self.pool()?, what, std::ptr::from_mut(&mut bytes).cast()) }
            .result()
            .map_err(driver_error("asking for its memory"))?;
        Ok(bytes as usize)
    }

    fn of_graphs(&self, what: sys::CUgraphMem_attribute) -> Result<usize> {
        let (mut bytes, device) = (0u64, self.stream.context().cu_device());
        // SAFETY: as above.
        unsafe { sys::cuDeviceGetGraphMemAttribute(device, what, std::ptr::from_mut(&mut bytes).cast()) }
            .result()
            .map_err(driver_error("asking for its memory"))?;
        Ok(bytes as usize)
    }

    /// Gives the memory that this process keeps without using it back to the driver, which takes a while.
    pub fn trim(&self) -> Result<()> {
        self.synchronize()?;
        let pool = self.pool()?;
        // SAFETY: plain calls of the driver; nothing that is in use goes.
        unsafe {
            sys::cuMemPoolTrimTo(pool, 0)
                .result()
                .and_then(|()| sys::cuDeviceGraphMemTrim(self.stream.context().cu_device()).result())
        }
        .map_err(driver_error("giving memory back"))
    }

    /// Runs `work`, and once more with all that can be given back when the card has no room for it.
    pub(super) fn with_room<T>(&self, work: impl Fn() -> Result<T, DriverError>) -> Result<T, DriverError> {
        match work() {
            Err(e) if is_out_of_memory(&e) && self.is_capturing().is_ok_and(|capturing| !capturing) => {
                // The error that counts is the first one.
                self.trim().map_err(|_| e)?;
                work()
            }
            other => other,
        }
    }

    fn pool(&self) -> Result<sys::CUmemoryPool> {
        self.bind()?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: a place for the result.
        unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, self.stream.context().cu_device()).result() }
            .map_err(driver_error("asking for its memory"))?;
        Ok(pool)
    }
}
