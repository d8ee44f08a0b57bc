//! Speed of the kernels of `src/backend/cuda/kernels`: `cargo run --release --features cuda --example gpu_bench -- [quant ...]`.
//!
//! Prints the median, and the least and the most, of many measurements. Buffers rotate, so that the
//! card's cache does not hold them.

mod bench;
mod load;
mod optim;
mod quant;
mod step;

use bench::Bench;
use qlora_nb::error::Result;

type Group = (&'static str, fn(&Bench) -> Result<()>);

const GROUPS: [Group; 6] = [
    ("quant", quant::run),
    ("load", load::run),
    ("optim", optim::run),
    ("step", step::run),
    ("generation", step::generation),
    ("profile", step::profile),
];

fn main() -> Result<()> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let bench = Bench::new()?;
    println!("{}", bench.gpu.name());
    for (name, run) in GROUPS {
        let chosen = if names.is_empty() { name != "profile" } else { names.iter().any(|n| n == name) };
        if chosen {
            run(&bench)?;
        }
    }
    Ok(())
}
