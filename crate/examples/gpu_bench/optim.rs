//! The optimizer's step and the norm of the gradients, for the adapters of BLOOM-1b4: rank 8 on query_key_value.

use qlora_nb::{
    candle_core::Tensor,
    error::Result,
    internals::backend::param::{Param, modify_f32},
    optim::{self, Hyperparameters, Optim, clip_grad_norm},
};

use crate::bench::Bench;

pub fn run(bench: &Bench) -> Result<()> {
    let mut params = Vec::new();
    for layer in 0..24 {
        for (part, shape) in [("A", (8, 2048)), ("B", (6144, 8))] {
            let param = Param::new(format!("{layer}.{part}"), &Tensor::randn(0f32, 0.02, shape, &bench.device)?)?;
            modify_f32(param.grad(), |g| g.iter_mut().enumerate().for_each(|(i, g)| *g = (i % 97) as f32 * 1e-4))?;
            params.push(param);
        }
    }
    let elements: usize = params.iter().map(|p| p.value().elem_count()).sum();
    let norm = bench.host(|_| clip_grad_norm(&params, 1.0).map(drop))?;
    norm.print("norm of the gradients, with the host's wait", 4 * elements);
    for optim in [
        Optim::AdamWTorch,
        Optim::PagedAdamW32bit,
        Optim::AdamW8bit,
        Optim::PagedAdamW8bit,
        Optim::Lion32bit,
        Optim::Lion8bit,
        Optim::Adafactor,
        Optim::Sgd,
    ] {
        let mut optimizer = optim::new(optim, &params, &Hyperparameters::default())?;
        // Read: weight, gradient, state; written: weight, state.
        let bytes = 12 * elements + 2 * optimizer.num_bytes();
        bench.card(|_| optimizer.step(1e-5, 1.0))?.print(&format!("{optim}, {elements} elements"), bytes);
        bench.host(|_| optimizer.step(1e-5, 1.0))?.print(&format!("{optim}, one step on the host's clock"), bytes);
    }
    Ok(())
}
