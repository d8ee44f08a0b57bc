//! QLoRA fine-tuning in Rust, cell by cell in Jupyter.
pub mod error;
pub mod layers;
