//! QLoRA fine-tuning in Rust, cell by cell in Jupyter.
//!
//! A base model in 4-bit NF4 stays frozen; small LoRA adapters on its linear layers learn
//! (QLoRA, arXiv:2305.14314). The library offers the eight steps of the well-known Hugging Face
//! walkthrough under Hugging Face's names, with the reference programs' numbers and no Python:
//!
//! 1. `use qlora_nb::prelude::*;`
//! 2. [`dataset`]: load the data
//! 3. [`tokenizer`]: turn text into ids and labels
//! 4. [`model`], [`peft`]: load the model in 4 bits, put adapters on it
//! 5. [`training_args`]: choose the training's arguments
//! 6. [`collator`], [`trainer`]: make the trainer
//! 7. [`Trainer::train`](trainer::Trainer::train): train
//! 8. [`pipeline`](mod@pipeline): generate text
//!
//! The modules from the ground up; each imports those before it alone, which a test holds:
//!
//! - the ground: `error`, `py_repr`, `json_file`, `safe_file`, `names`, `interrupt`, `tensor_file`;
//! - what people look at, and where files come from: `display`, `hub`;
//! - quantized weights as data: `quantized`;
//! - the only place that knows of devices: `backend`, a CPU and a GPU behind one trait;
//! - what learns, and how: `optim`, `layers`, `adapters`;
//! - models, described by families and run once for all devices: `quant`, `batch`, `models`;
//! - steps 2 and 3: `features`, `dataset`, `tokenizer`;
//! - steps 4 and 5: `model`, `peft`, `training_args`;
//! - steps 6 to 8: `collator`, `generation`, `pipeline`, `trainer`;
//! - everything: `prelude`.
//!
//! A notebook's cell compiles anew whatever is generic. So public functions that take `impl AsRef<Path>` or a closure
//! hand over to one that is not, at once: a cell that loads a tokenizer took 9 seconds without that, and 0.8 with it.

// 2
pub mod dataset;
// 3
mod features;
pub mod tokenizer;
// 4
pub mod model;
pub mod peft;
// 5
pub mod training_args;
// 6 and 7
pub mod collator;
pub mod trainer;
// 8
pub mod pipeline;

// What notebooks use besides.
pub mod display;
pub mod error;
pub mod interrupt;
pub mod optim;
pub mod prelude;
pub mod quant;

// Beneath the steps.
mod adapters;
mod backend;
mod batch;
mod generation;
mod hub;
mod json_file;
mod layers;
mod models;
mod names;
mod py_repr;
mod quantized;
mod safe_file;
mod tensor_file;

/// What lies beneath the steps, for this repository's own checks, tests and benchmarks; it may change at any time.
#[doc(hidden)]
pub mod internals {
    pub mod adapters {
        pub use crate::adapters::*;
    }
    pub mod backend {
        pub use crate::backend::*;
    }
    pub mod generation {
        pub use crate::generation::*;
    }
    pub mod hub {
        pub use crate::hub::*;
    }
    pub mod layers {
        pub use crate::layers::*;
    }
    pub mod models {
        pub use crate::models::*;
    }
}

// Users must never depend on candle beside us: two copies of it would count tensor ids apart.
pub use candle_core;
