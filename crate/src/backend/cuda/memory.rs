//! How much memory the card has, what to do when it is not enough.

use std::sync::atomic::Ordering::SeqCst;

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaSlice, DriverError,
    sys::{self, CUmemPool_attribute_enum as Attribute},
};

use super::{Gpu, driver_error};
use crate::error::Result;
pub(super) use crate::error::out_of_device_memory as out_of_memory;

pub(super) fn is_out_of_memory(e: &DriverError) -> bool {
    e.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY
}

/// Makes the memory that is freed stay with the process: asking the driver again would stop the stream. Gives a second
/// pool beside the device's own.
pub(super) fn pools(context: &CudaContext) -> Result<sys::CUmemoryPool> {
    context.bind_to_thread().map_err(driver_error("choosing the GPU"))?;
    let default = default_pool(context)?;
    let mut second = std::ptr::null_mut();
    // SAFETY: zeros are valid for what is not set; plain calls of the driver with valid places to read and write.
    unsafe {
        let mut properties: sys::CUmemPoolProps = std::mem::zeroed();
        properties.allocType = sys::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = context.cu_device();
        let keep = |pool| {
            let (mut all, what) = (u64::MAX, Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD);
            sys::cuMemPoolSetAttribute(pool, what, std::ptr::from_mut(&mut all).cast()).result()
        };
        sys::cuMemPoolCreate(&mut second, &properties)
            .result()
            .and_then(|()| keep(default))
            .and_then(|()| keep(second))
            .map_err(driver_error("setting its memory pools"))?;
    }
    Ok(second)
}

fn default_pool(context: &CudaContext) -> Result<sys::CUmemoryPool> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: a plain call with a place to write to.
    unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result() }
        .map_err(driver_error("asking for its memory pool"))?;
    Ok(pool)
}

/// While it lives, what this thread launches is recorded, and its new tensors are given from the memory of recorded
/// passes.
struct Recording<'a>(&'a Gpu);

impl<'a> Recording<'a> {
    fn begin(gpu: &'a Gpu) -> Self {
        *gpu.recording.lock().unwrap_or_else(|e| e.into_inner()) = Some(std::thread::current().id());
        Self(gpu)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        *self.0.recording.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}

impl Gpu {
    /// Free and total bytes of the card.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.stream.context().mem_get_info().map_err(driver_error("asking for its memory"))
    }

    /// The most device memory that tensors had at one time since [`Gpu::reset_peak`], bytes. What a recorded pass has
    /// comes on top of what is held when this is asked.
    pub fn peak(&self) -> Result<usize> {
        let pool = self.pool()?;
        let recorded = match self.recorded_peak.load(SeqCst) {
            0 => 0,
            bytes => self.of_pool(pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)? + bytes,
        };
        Ok(recorded.max(self.of_pool(pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?))
    }

    /// Forgets the peak so far.
    pub fn reset_peak(&self) -> Result<()> {
        self.recorded_peak.store(0, SeqCst);
        self.reset_high(self.pool()?)
    }

    fn reset_high(&self, pool: sys::CUmemoryPool) -> Result<()> {
        let (mut zero, what) = (0u64, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH);
        self.bind()?;
        // SAFETY: the attribute takes 64 bits.
        unsafe { sys::cuMemPoolSetAttribute(pool, what, std::ptr::from_mut(&mut zero).cast()).result() }
            .map_err(driver_error("asking for its memory"))
    }

    /// `n` numbers of the memory of recorded passes, in the order of a stream that nothing runs on.
    pub(super) fn alloc_recorded<T>(&self, n: usize) -> Result<CudaSlice<T>, DriverError> {
        let mut address = 0;
        // SAFETY: a place to write to; the pool and the stream live as long as the device; the memory has room for n
        // numbers, and nobody else frees it.
        unsafe {
            let (bytes, stream) = (n * size_of::<T>(), self.memory_stream.cu_stream());
            sys::cuMemAllocFromPoolAsync(&mut address, bytes, self.recorded_memory, stream).result()?;
            Ok(self.memory_stream.upgrade_device_ptr(address, n))
        }
    }

    /// Runs `work` with new tensors from the memory of recorded passes. They all share it: passes run one after
    /// another, and nothing in it outlives a pass. Also gives the most bytes that were held at a time.
    pub(super) fn with_recorded_memory<R>(&self, work: impl FnOnce() -> R) -> Result<(R, usize)> {
        self.reset_high(self.recorded_memory)?;
        let recording = Recording::begin(self);
        let done = work();
        drop(recording);
        Ok((done, self.of_pool(self.recorded_memory, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?))
    }

    /// Counts a run of a recorded pass that holds `bytes`.
    pub(super) fn count_recorded(&self, bytes: usize) {
        self.recorded_peak.fetch_max(bytes, SeqCst);
    }

    /// Bytes that tensors have; the memory of recorded passes is theirs as long as the process runs.
    pub fn used(&self) -> Result<usize> {
        use sys::CUgraphMem_attribute_enum as Graph;
        Ok(self.of_pool(self.pool()?, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?
            + self.of_pool(self.recorded_memory, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?
            + self.of_graphs(Graph::CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT)?)
    }

    /// Bytes that tensors can still have: what the card has free, and what this process keeps without using it.
    pub fn available(&self) -> Result<usize> {
        let reserved = self.of_pool(self.pool()?, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.of_pool(self.pool()?, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
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
                if self.is_recording() {
                    // What is given back belongs to passes that are over; the recording itself is made again.
                    self.no_room_to_record.store(true, SeqCst);
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
        self.no_room_to_record.swap(false, SeqCst)
    }

    fn pool(&self) -> Result<sys::CUmemoryPool> {
        self.bind()?;
        default_pool(self.stream.context())
    }
}
