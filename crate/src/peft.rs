//! Step 4b: adapters, as PEFT makes and saves them.
pub mod config;
pub mod config_file;
pub mod targets;
