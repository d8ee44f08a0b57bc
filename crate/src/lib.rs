//! QLoRA fine-tuning in Rust, cell by cell in Jupyter.
pub mod display;
pub mod error;
pub mod interrupt;
pub mod layers;
pub mod module_tree;
pub mod peft;
pub mod py_repr;
pub mod batch;
pub mod collator;
pub mod dataset;
pub mod features;
pub mod hub;
pub mod prelude;
pub mod tokenizer;
