//! Bad input gets a typed error that names the place and the remedy, and costs nothing.

mod files;
mod model;
