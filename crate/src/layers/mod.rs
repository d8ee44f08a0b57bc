//! Layers with an explicit forward and backward.
pub mod param;
