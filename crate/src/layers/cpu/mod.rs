//! The CPU's kernels: plain functions on slices, f32 throughout.
//!
//! A CPU has no fast f16 arithmetic, so whatever dtype the weights are stored in, they
//! are widened to f32 a tile at a time (values unchanged) and everything is computed in
//! f32: at least as exact as the reference's f16, and faster here.

pub mod attention;
pub mod math;
pub mod matmul;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Storage, StorageRef, Tensor};

use crate::error::Result;

/// The elements of a contiguous f32 CPU tensor, borrowed for a kernel.
pub struct F32View<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> F32View<'a> {
    /// Fails on another dtype, another device or strides: an engine bug, not a user's error.
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(Self { storage, range: start..end }),
            _ => Err(candle_core::Error::Msg(format!(
                "expected a contiguous f32 tensor on the CPU, got {:?} {:?} on {:?}",
                tensor.dtype(),
                tensor.shape(),
                tensor.device()
            ))
            .bt()
            .into()),
        }
    }
}

impl Deref for F32View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            _ => &[],
        }
    }
}

/// A pointer that several threads may write through, each to its own elements.
#[derive(Clone, Copy)]
pub struct SharedMut(*mut f32);

// SAFETY: every user hands out disjoint elements to its threads.
unsafe impl Send for SharedMut {}
unsafe impl Sync for SharedMut {}

impl SharedMut {
    pub fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// The pointer `offset` elements in.
    ///
    /// # Safety
    /// `offset` must lie inside the slice that made this, and no other thread may use
    /// the elements that the caller goes on to touch.
    pub unsafe fn at(self, offset: usize) -> *mut f32 {
        unsafe { self.0.add(offset) }
    }
}
