//! Layers with an explicit forward and backward.
//!
//! The base is frozen and only adapters learn, so there is no tape: a layer's `forward`
//! pushes what its `backward` will need on a stack ([`run::Saved`]), and `backward` pops it
//! in reverse order. Nothing is computed or kept for a weight that does not learn, and what
//! is kept can be counted before training starts.
//!
//! Activations are packed: `[M, C]` with M the real tokens of all sequences, one after
//! another. Padding exists only at the borders of the engine ([`sequences::Packed`]), so no
//! arithmetic is spent on it and no mask is needed inside.
//!
//! Each layer is written against candle's `Tensor` and device; the CPU's arithmetic is in
//! [`cpu`].

pub mod attention;
pub mod cpu;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dropout;
pub mod embedding;
pub mod gelu;
pub mod kv_cache;
pub mod layer_norm;
pub mod linear;
pub mod norm;
pub mod own_loss;
pub mod param;
pub mod rms_norm;
pub mod rope;
pub mod run;
pub mod sequences;
pub mod swiglu;

use candle_core::Device;

use crate::error::{Error, Result};

/// The error of a layer that has no kernel for a device.
pub(crate) fn only_cpu(op: &str, device: &Device) -> Result<()> {
    match device {
        Device::Cpu => Ok(()),
        other => Err(Error::Unsupported {
            what: format!("{op} on device"),
            got: format!("{other:?}"),
            supported: vec!["cpu".into()],
            remedy: "load the model with device_map: DeviceMap::Cpu".into(),
        }),
    }
}
