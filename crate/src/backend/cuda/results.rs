//! Numbers that the host waits for while later work is already on its way.

use candle_core::{
    Tensor,
    cuda_backend::cudarc::driver::{CudaEvent, result},
};

use super::{Gpu, address, driver_error};
use crate::error::Result;

/// Two places on the host for i32 that the card copies there.
pub struct Results {
    gpu: &'static Gpu,
    /// Pinned; `[2][count]`.
    host: *mut i32,
    count: usize,
    /// When each place has what was copied last.
    copied: [CudaEvent; 2],
}

// SAFETY: plain memory of the host, written by the card before the event that is waited for.
unsafe impl Send for Results {}

impl Results {
    pub fn new(gpu: &'static Gpu, count: usize) -> Result<Self> {
        let event = || gpu.stream().context().new_event(None).map_err(driver_error("making an event"));
        let copied = [event()?, event()?];
        // SAFETY: room for two places, for one number at least; read only after the card has written them.
        let host = unsafe { result::malloc_host((2 * count).max(1) * size_of::<i32>(), 0) };
        let host = host.map_err(driver_error("asking for pinned memory"))?.cast();
        Ok(Self { gpu, host, count, copied })
    }

    /// Copies `from` i32 `[count]` to a place, in the order of the GPU's stream.
    pub fn copy(&mut self, from: &Tensor, place: usize) -> Result<()> {
        let stream = self.gpu.stream();
        self.gpu.bind()?;
        // SAFETY: the place has as many numbers; nobody reads it before the event.
        let to = unsafe { std::slice::from_raw_parts_mut(self.host.add(place * self.count), self.count) };
        // SAFETY: the memory lives until the stream has come past the copy: see `drop`.
        unsafe { result::memcpy_dtoh_async(to, address(from)?, stream.cu_stream()) }
            .map_err(driver_error("reading the tokens"))?;
        self.copied[place].record(stream).map_err(driver_error("reading the tokens"))
    }

    /// What was copied to a place last, as soon as it is there.
    pub fn wait(&self, place: usize) -> Result<Vec<i32>> {
        self.copied[place].synchronize().map_err(driver_error("waiting for the tokens"))?;
        // SAFETY: written by the copy that the event stands behind.
        Ok(unsafe { std::slice::from_raw_parts(self.host.add(place * self.count), self.count) }.to_vec())
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        // Memory that the card might still write to stays; an error here has nobody to go to.
        let done = self.copied.iter().all(|event| event.synchronize().is_ok());
        if done && self.gpu.bind().is_ok() {
            // SAFETY: it was made by malloc_host, and nothing uses it any more.
            let _ = unsafe { result::free_host(self.host.cast()) };
        }
    }
}
