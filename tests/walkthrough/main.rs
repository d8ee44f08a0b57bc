//! The eight steps on the bundled model: it learns to follow instructions, in the memory that
//! was announced.
//!
//! `cargo nextest run --release -p qlora-nb-tests --test walkthrough --no-capture` shows the figures.

mod memory;
mod poet;
