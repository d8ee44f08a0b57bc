//! What learns on a linear layer, one adapter a file: its parameters, forward, backward, merging and printed form.

mod dora;
mod lora;

pub use dora::DoraAdapter;
pub use lora::LoraAdapter;
