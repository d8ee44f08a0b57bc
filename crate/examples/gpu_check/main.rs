//! Every kernel of `backend/cuda/kernels` against its CPU oracle, on a card:
//! `cargo run --release --features cuda --example gpu_check -- [seed] [quant ...]`.
//!
//! Inputs are drawn anew from a seed, which is printed; outputs are poisoned first. One line a
//! check; the exit status is 1 if any failed.

mod check;
mod curve;
mod layers;
mod load;
mod memory;
mod model;
mod optim;
mod quant;
mod sample;

use check::Checks;
use qlora_nb::error::Result;

type Group = (&'static str, fn(&mut Checks) -> Result<()>);

const GROUPS: [Group; 8] = [
    ("quant", quant::run),
    ("load", load::run),
    ("layers", layers::run),
    ("optim", optim::run),
    ("sample", sample::run),
    ("model", model::run),
    ("curve", curve::run),
    ("memory", memory::run),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(memory::WITHOUT_GPU) => return memory::without_gpu(),
        Some(memory::PLAN) => return memory::plan(&arguments[1..]),
        _ => {}
    }
    let (mut seed, mut names) = (None, Vec::new());
    for argument in arguments {
        match argument.parse::<u64>() {
            Ok(number) => seed = Some(number),
            Err(_) => names.push(argument),
        }
    }
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = seed.unwrap_or_else(|| clock.map_or(1, |t| t.as_nanos() as u64 % 1_000_000_007));
    let mut checks = Checks::new(seed)?;
    println!("{}, seed {seed}", checks.gpu.name());
    for (name, run) in GROUPS {
        let chosen = names.is_empty() || names.iter().any(|n| n == name);
        if chosen && let Err(e) = run(&mut checks) {
            checks.fail(name, &format!("stopped: {e}"));
        }
    }
    println!("{} checks, {} failed (seed {seed})", checks.count, checks.failed);
    if checks.failed > 0 || checks.count == 0 {
        std::process::exit(1);
    }
    Ok(())
}
