//! What learns on a linear layer, one adapter a file: its parameters, forward, backward, merging and printed form.

mod dora;
mod lora;
mod saved_module;

pub use dora::DoraAdapter;
pub use lora::LoraAdapter;
pub use saved_module::SavedModule;
