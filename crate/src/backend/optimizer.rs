//! What an optimizer that changes each element by itself asks of a device: room for its state, and steps by kernels.

use std::{ffi::c_void, marker::PhantomData};

use candle_core::{DType, Tensor};

use crate::error::Result;

/// A part of a parameter's state.
#[derive(Clone)]
pub struct Part {
    /// In a checkpoint, behind the parameter's name.
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl Part {
    pub fn new(name: impl Into<String>, dtype: DType, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    pub fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }
}

/// One step, as a kernel takes it.
pub struct Step<'a> {
    /// The kernel's name.
    pub kernel: &'static str,
    /// The kernel's struct, for moments in 32 and in 8 bits.
    pub arguments: [Argument<'a>; 2],
    /// The values of the moments' 8-bit codes, and the thresholds between them, one moment after another.
    pub maps: Vec<f32>,
}

/// A value as it lies in memory, for a kernel whose struct has the same fields.
#[derive(Clone, Copy)]
pub struct Argument<'a> {
    pointer: *const c_void,
    borrowed: PhantomData<&'a c_void>,
}

impl<'a> Argument<'a> {
    /// `T` must be `repr(C)`.
    pub fn new<T: Copy>(value: &'a T) -> Self {
        Self { pointer: std::ptr::from_ref(value).cast(), borrowed: PhantomData }
    }

    /// Where it lies.
    pub fn pointer(&self) -> *const c_void {
        self.pointer
    }
}

/// The states of all parameters of an optimizer, in the memory of a device that has kernels for it.
pub trait States: Send {
    /// One step of all parameters.
    fn step(&self, step: &Step) -> Result<()>;

    /// Copies of the parts on the CPU.
    fn copies(&self) -> Result<Vec<Vec<Tensor>>>;

    /// Puts other values in their place: tensors on the CPU, of the parts' forms.
    fn replace(&self, states: &[Vec<Tensor>]) -> Result<()>;

    /// Whether the driver may move the state to the host.
    fn is_paged(&self) -> bool;

    /// Moves a paged state to the host.
    fn page_out(&self) -> Result<()>;

    /// Whether the state was moved to the host, and not back yet.
    fn is_paged_out(&self) -> Result<bool>;
}
