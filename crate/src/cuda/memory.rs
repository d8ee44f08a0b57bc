//! How much memory the card has, what to do when it is not enough.

use std::sync::atomic::Ordering::Relaxed;

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
    /// Bytes that tensors have; the memory of recorded passes is theirs as long as the process runs.
    pub fn used(&self) -> Result<usize> {
        use sys::{CUgraphMem_attribute_enum as Graph, CUmemPool_attribute_enum as Pool};
        Ok(self.of_pool(self.pool()?, Pool::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?
            + self.of_pool(self.recorded_memory, Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?
            + self.of_graphs(Graph::CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT)?)
    }

    /// Bytes that tensors can still have: what the card has free, and what this process keeps without using it.
    pub fn available(&self) -> Result<usize> {
        use sys::CUmemPool_attribute_enum as Pool;
        let reserved = self.of_pool(self.pool()?, Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.of_pool(self.pool()?, Pool::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(self.memory()?.0 + reserved.saturating_sub(used))
    }

    fn of_pool(&self, pool: sys::CUmemoryPool, what: sys::CUmemPool_attribute) -> Result<usize> {
        let mut bytes = 0u64;
        self.bind()?;
        // SAFETY: the attributes that are asked for are 64-bit numbers.
        unsafe { sys::cuMemPoolGetAttribute(pool, what, std::ptr::from_mut(&mut bytes).cast()) }
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
        // A tensor that was dropped keeps its memory until the stream has come there.
        self.synchronize()?;
        let pool = self.pool()?;
        // SAFETY: nothing works on what is not in use. Recorded passes keep theirs, whose addresses they have.
        unsafe { sys::cuMemPoolTrimTo(pool, 0) }.result().map_err(driver_error("giving memory back"))
    }

    /// Runs `work`, and once more with all that can be given back when the card has no room for it.
    pub(super) fn with_room<T>(&self, work: impl Fn() -> Result<T, DriverError>) -> Result<T, DriverError> {
        match work() {
            Err(e) if is_out_of_memory(&e) => {
                if self.is_capturing().unwrap_or(true) {
                    // Waiting for the stream would end the recording.
                    self.no_room_to_record.store(true, Relaxed);
                    return Err(e);
                }
                // The error that counts is the first one.
                self.trim().map_err(|_| e)?;
                work()
            }
            other => other,
        }
    }

    /// Whether a recording failed for lack of memory since this was last asked: after [`Gpu::trim`] it may succeed.
    pub(crate) fn take_no_room_to_record(&self) -> bool {
        self.no_room_to_record.swap(false, Relaxed)
    }

    fn pool(&self) -> Result<sys::CUmemoryPool> {
        self.bind()?;
        super::default_pool(self.stream.context())
    }
}
