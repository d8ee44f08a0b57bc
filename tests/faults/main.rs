//! Bad input gets a typed error that names the place and the remedy, and costs nothing.

mod files;
mod interrupts;
mod kills;
mod limits;
mod model;
mod power;
