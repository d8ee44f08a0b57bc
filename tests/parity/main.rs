//! Our numbers against those of PyTorch, transformers, PEFT and bitsandbytes.
//!
//! The files in `tests/fixtures` were written by the reference programs
//! (`scripts/fixtures`); a larger set beside the repository is used where it is present.

mod adamw;
mod adapters;
mod at_once;
mod bloom;
mod compute_dtype;
mod engine;
mod families;
mod generation;
mod gguf;
mod llama;
mod lora;
mod modules_to_save;
mod prints;
mod trainer;
