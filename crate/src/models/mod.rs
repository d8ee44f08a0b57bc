//! Architectures, one file each, and what they have in common.
pub mod causal_lm;
