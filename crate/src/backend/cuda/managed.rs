//! Memory that the driver may move between the card and the host: what a paged optimizer keeps its state in.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};

use super::{Gpu, driver_error};
use crate::error::{Error, Result};

/// A block of managed memory.
pub struct Managed {
    stream: Arc<CudaStream>,
    address: u64,
    bytes: usize,
    /// Whether the driver moves it ahead of its use.
    moves: bool,
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Card,
    Host,
}

impl Managed {
    /// `bytes` zeros, on the card as long as there is room.
    pub fn zeros(gpu: &Gpu, bytes: usize) -> Result<Self> {
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS as CONCURRENT, CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY as MANAGED,
        };
        gpu.bind()?;
        let stream = gpu.stream().clone();
        let attribute = |which| stream.context().attribute(which).map_err(driver_error("asking for managed memory"));
        if attribute(MANAGED)? == 0 {
            return Err(Error::Unsupported {
                what: "memory of a paged optimizer".into(),
                got: format!("managed memory on {}", gpu.name()),
                supported: vec!["memory of the card".into()],
                remedy: "use optim: Optim::AdamWTorch, or Optim::AdamW8bit, which takes a quarter".into(),
            });
        }
        let moves = attribute(CONCURRENT)? != 0;
        let doing = format!("asking for {:.1} MiB of managed memory", bytes as f64 / (1 << 20) as f64);
        // SAFETY: the block is written before it is read.
        let address = unsafe { result::malloc_managed(bytes.max(1), sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL) }
            .map_err(driver_error(&doing))?;
        let this = Self { stream, address, bytes: bytes.max(1), moves };
        this.prefetch(Place::Card)?;
        // SAFETY: the block has as many bytes.
        unsafe { result::memset_d8_async(address, 0, this.bytes, this.stream.cu_stream()) }
            .map_err(driver_error("clearing managed memory"))?;
        Ok(this)
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    /// Moves it, in the order of the stream. Does nothing where the driver moves it only when it is used.
    pub fn prefetch(&self, to: Place) -> Result<()> {
        if !self.moves {
            return Ok(());
        }
        let ordinal = self.stream.context().ordinal() as i32;
        let (kind, id) = match to {
            Place::Card => (sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, ordinal),
            Place::Host => (sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST, 0),
        };
        // SAFETY: the struct is two 32-bit words, the kind and the number, whose field has another name in newer
        // toolkits; the block is as long as it was when it was made.
        unsafe {
            let mut location: sys::CUmemLocation = std::mem::zeroed();
            location.type_ = kind;
            std::ptr::from_mut(&mut location).cast::<i32>().add(1).write(id);
            result::mem_prefetch_async(self.address, self.bytes, location, self.stream.cu_stream())
        }
        .map_err(driver_error("moving the optimizer's state"))
    }

    /// Where it was moved last; None before the first move.
    pub fn place(&self) -> Result<Option<Place>> {
        let mut place = 0i32;
        let what = sys::CUmem_range_attribute::CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION;
        // SAFETY: the attribute is a 32-bit number, the block as long as it was when it was made.
        unsafe {
            sys::cuMemRangeGetAttribute(std::ptr::from_mut(&mut place).cast(), 4, what, self.address, self.bytes)
        }
        .result()
        .map_err(driver_error("asking where the optimizer's state is"))?;
        Ok(match place {
            -1 => Some(Place::Host),
            at if at >= 0 => Some(Place::Card),
            _ => None,
        })
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        // An error here has nobody to go to; the process's end frees what is left.
        if self.stream.context().bind_to_thread().is_ok() && self.stream.synchronize().is_ok() {
            // SAFETY: nothing that was launched uses it any more.
            let _ = unsafe { result::memory_free(self.address) };
        }
    }
}
