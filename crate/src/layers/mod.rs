//! Layers with an explicit forward and backward.
//!
//! The base is frozen and only adapters learn, so there is no tape: a layer's `forward` pushes what its `backward` will
//! need on a labelled stack ([`Saved`](crate::backend::run::Saved)), and `backward` pops it in reverse order. Nothing is
//! computed or kept for a weight that does not learn, and what is kept can be counted before training starts.
//!
//! Activations are packed: `[M, C]` with M the real tokens of all sequences, one after another. Padding exists only at
//! the borders of the engine ([`Packed`](crate::backend::sequences::Packed)), so no arithmetic is spent on it and no mask
//! is needed inside.
//!
//! A layer says what is computed; the arithmetic is that of the pass's device ([`crate::backend`]).

pub mod adapters;
mod attention;
pub mod custom_loss;
pub mod embedding;
pub mod linear;
pub mod loss;
mod norm;

pub use attention::alibi_slopes;
pub use embedding::Embedding;
pub use linear::{Adapter, Linear};
