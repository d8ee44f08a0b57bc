//! Every reader of the library on damaged files: it loads them or refuses them with an error, and nothing else.
//!
//! `scripts/fuzz` runs many; what it prints of a failure gives the input again. The kernel's readers are tested so in its
//! own package, by the same `harness` and `mutate`.

mod corpus;
mod crashers;
mod harness;
mod mutate;
mod readers;
