//! QLoRA fine-tuning in Rust, cell by cell in Jupyter.
pub mod display;
pub mod error;
pub mod interrupt;
pub mod layers;
pub mod module_tree;
pub mod peft;
pub mod py_repr;
