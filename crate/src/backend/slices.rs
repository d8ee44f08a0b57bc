//! Tensors on the CPU as slices of f32.

use std::{
    cell::RefCell,
    ops::{Deref, Range},
};

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, StorageRef, Tensor};

use super::internal;
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
            _ => Err(internal(format!(
                "expected a contiguous f32 tensor on the CPU, got {:?} {:?} on {:?}",
                tensor.dtype(),
                tensor.shape(),
                tensor.device()
            ))),
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

    /// A pointer to elements that are the caller's for as long as this is used.
    ///
    /// # Safety
    /// As [`SharedMut::at`], of all elements that are reached through it.
    pub unsafe fn from_ptr(data: *mut f32) -> Self {
        Self(data)
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

impl<'a> SharedMut {
    /// Elements `range`.
    ///
    /// # Safety
    /// As [`SharedMut::at`], of these elements, for as long as the slice is used.
    pub unsafe fn slice(self, range: Range<usize>) -> &'a mut [f32] {
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

type Change<'a> = &'a mut dyn FnMut(&mut [f32]);

/// Runs `f` on the elements of a contiguous f32 tensor, in place.
pub(super) fn modify_f32(tensor: &Tensor, f: Change) -> Result<()> {
    struct Op<'a>(RefCell<Change<'a>>);
    impl InplaceOp1 for Op<'_> {
        fn name(&self) -> &'static str {
            "modify_f32"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
                candle_core::bail!("modify_f32: expected a contiguous f32 tensor");
            };
            (self.0.borrow_mut())(&mut data[start..end]);
            Ok(())
        }
    }
    Ok(tensor.inplace_op1(&Op(RefCell::new(f)))?)
}
