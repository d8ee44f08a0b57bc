//! QLoRA fine-tuning in Rust, cell by cell in Jupyter.

// 2
pub mod dataset;
// 3
pub mod collator;
pub mod features;
pub mod tokenizer;
// 4
pub mod model;
pub mod peft;
// 5
pub mod training_args;
// 6 and 7
pub mod trainer;
// 8
pub mod pipeline;

// Beneath the steps.
pub mod batch;
pub mod display;
pub mod error;
pub mod generation;
pub mod hub;
pub mod interrupt;
pub mod layers;
pub mod models;
pub mod module_tree;
pub mod optim;
pub mod prelude;
pub mod py_repr;
pub mod quant;
pub mod safe_file;
