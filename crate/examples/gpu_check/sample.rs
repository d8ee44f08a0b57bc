//! Tokens chosen on the card against the CPU's processors and sampler.

use qlora_nb::{
    candle_core::{DType, Device, Tensor},
    error::Result,
    internals::backend::{
        cuda::{self, HostInputs, InputDraw, Inputs, Scalars, ops::sample},
        sequences::Sequences,
    },
    internals::generation::{
        processors::{self, Scratch},
        sampling,
    },
};

use crate::check::Checks;

pub fn run(checks: &mut Checks) -> Result<()> {
    for vocab in [1, 37, 1000, 46_145, 250_880] {
        for top_k in [1, 5, 50, 256] {
            for (temperature, top_p) in [(1.0, 1.0), (0.7, 0.9), (2.5, 0.5), (1.0, 1e-6)] {
                compare(checks, vocab, top_k, temperature, top_p)?;
            }
        }
    }
    faults(checks)
}

/// The card's choice for each draw.
fn on_card(checks: &Checks, logits: &Tensor, draws: &[InputDraw]) -> Result<Vec<i32>> {
    let sequences = Sequences::new(vec![1; logits.dims()[0]]);
    let ids = vec![0u32; logits.dims()[0]];
    let host =
        HostInputs { ids: &ids, targets: &[], sequences: &sequences, cache: None, scalars: Scalars::default(), draws };
    let inputs = Inputs::new(checks.gpu, host.shape(false))?;
    inputs.fill(checks.gpu, &host)?;
    let chosen = cuda::uninit(checks.gpu, draws.len(), DType::I32)?;
    sample(&logits.to_device(&checks.device)?, &inputs, &chosen, false)?;
    Ok(chosen.to_vec1()?)
}

fn on_cpu(logits: &[f32], draw: &InputDraw, u: f64) -> i32 {
    let (mut logits, mut scratch) = (logits.to_vec(), Scratch::default());
    if draw.top_k == 1 {
        return sampling::greedy(&logits) as i32;
    }
    processors::temperature(&mut logits, f64::from(draw.temperature));
    processors::top_k(&mut logits, draw.top_k as usize, &mut scratch);
    processors::top_p(&mut logits, draw.top_p, &mut scratch);
    sampling::sample(&logits, u, &mut scratch) as i32
}

fn compare(checks: &mut Checks, vocab: usize, top_k: i32, temperature: f32, top_p: f64) -> Result<()> {
    let rows = 3;
    // Some equal ones, some that cannot come.
    let value = |rng: &mut crate::check::Rng| match rng.below(50) {
        0 => f32::NEG_INFINITY,
        1 => 1.5,
        _ => rng.normal() * 3.0,
    };
    let mut numbers: Vec<f32> = (0..rows * vocab).map(|_| value(&mut checks.rng)).collect();
    (0..rows).for_each(|row| numbers[row * vocab] = 0.25);
    let draws: Vec<InputDraw> = (0..24)
        .map(|i| InputDraw { row: i % rows as i32, top_k, temperature, top_p, u: f64::from(checks.rng.uniform()) })
        .collect();
    let logits = Tensor::from_slice(&numbers, (rows, vocab), &Device::Cpu)?;
    checks.poison(1 << 20)?;
    let chosen = on_card(checks, &logits, &draws)?;
    let case = |(got, draw): (i32, &InputDraw)| {
        let row = &numbers[draw.row as usize * vocab..][..vocab];
        // Sums of probabilities differ in their last bits: at a boundary either token is right.
        let near = [draw.u, (draw.u - 1e-5).max(0.0), (draw.u + 1e-5).min(1.0 - 1e-9)];
        let right = near.map(|u| on_cpu(row, draw, u));
        (!right.contains(&got)).then(|| format!("token {got}, expected {} at u {}", right[0], draw.u))
    };
    let cases: Vec<Option<String>> = chosen.into_iter().zip(&draws).map(case).collect();
    checks.equal(&format!("sample, vocabulary {vocab}, k {top_k}, t {temperature}, p {top_p}"), &cases);
    Ok(())
}

/// What the card leaves to the host, which gives the error.
fn faults(checks: &mut Checks) -> Result<()> {
    let vocab = 5000;
    let plain: Vec<f32> = (0..vocab).map(|_| checks.rng.normal()).collect();
    let with = |value: f32| {
        let mut row = plain.clone();
        row[4321] = value;
        row
    };
    let rows = [with(f32::NAN), with(f32::INFINITY), vec![f32::NEG_INFINITY; vocab], vec![0.5; vocab], plain.clone()];
    let logits = Tensor::from_vec(rows.concat(), (rows.len(), vocab), &Device::Cpu)?;
    let draws: Vec<InputDraw> =
        (0..5).map(|row| InputDraw { row, top_k: 50, temperature: 1.0, top_p: 1.0, u: 0.5 }).collect();
    let chosen = on_card(checks, &logits, &draws)?;
    let expected = [-1, -1, -1, -1, on_cpu(&plain, &draws[4], 0.5)];
    let case = |(got, want): (i32, i32)| (got != want).then(|| format!("{got}, expected {want}"));
    let cases: Vec<Option<String>> = chosen.into_iter().zip(expected).map(case).collect();
    checks.equal("sample, logits that the host must look at", &cases);
    Ok(())
}
