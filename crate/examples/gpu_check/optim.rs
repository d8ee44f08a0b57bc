//! The optimizers on the card against the CPU's, bit for bit (Adafactor and SGD: to 1e-6); the norm of the gradients;
//! paging.

use qlora_nb::{
    candle_core::{DType, Device, Tensor},
    error::Result,
    internals::backend::param::{Param, modify_f32, read_f32},
    optim::{self, GradNorm, Hyperparameters, Optim, Optimizer, clip_grad_norm},
};

use crate::check::{Checks, Rng, difference};

/// Those that are equal bit for bit.
const OPTIMS: [Optim; 8] = [
    Optim::AdamWTorch,
    Optim::PagedAdamW32bit,
    Optim::AdamW8bit,
    Optim::PagedAdamW8bit,
    Optim::Lion32bit,
    Optim::PagedLion32bit,
    Optim::Lion8bit,
    Optim::PagedLion8bit,
];
/// Those of candle's operations.
const NEAR: [Optim; 2] = [Optim::Adafactor, Optim::Sgd];
/// Around the sizes of a thread's, a warp's and a block's part, and of the smallest 8-bit state.
const SIZES: [usize; 15] = [1, 7, 8, 31, 255, 256, 257, 2047, 2048, 2049, 4095, 4096, 4097, 16_384, 70_001];
/// The first moment of the last pair is computed from its other end.
const BETAS: [(f64, f64); 3] = [(0.9, 0.999), (0.8, 0.95), (0.3, 0.9)];
const STEPS: usize = 5;

pub fn run(checks: &mut Checks) -> Result<()> {
    params(checks)?;
    for optim in OPTIMS {
        for (i, betas) in BETAS.into_iter().enumerate() {
            steps(checks, optim, betas, [0.0, 0.1, 0.01][i])?;
        }
    }
    norms(checks)?;
    paging(checks)?;
    for optim in OPTIMS {
        checkpoints(checks, optim)?;
    }
    for optim in NEAR {
        near(checks, optim)?;
    }
    refused(checks)
}

fn new(optim: Optim, params: &[Param], betas: (f64, f64), weight_decay: f64) -> Result<Box<dyn Optimizer>> {
    optim::new(optim, params, &Hyperparameters { betas, weight_decay, ..Default::default() })
}

/// The same parameters on the CPU and on the card.
struct Twins {
    cpu: Vec<Param>,
    gpu: Vec<Param>,
}

impl Twins {
    fn new(checks: &mut Checks, sizes: &[usize]) -> Result<Self> {
        Self::of_shapes(checks, &sizes.iter().map(|&n| vec![n]).collect::<Vec<_>>())
    }

    fn of_shapes(checks: &mut Checks, shapes: &[Vec<usize>]) -> Result<Self> {
        let (mut cpu, mut gpu) = (Vec::new(), Vec::new());
        for (i, shape) in shapes.iter().enumerate() {
            let n = shape.iter().product();
            let value = Tensor::from_vec(numbers(&mut checks.rng, n), shape.as_slice(), &Device::Cpu)?;
            cpu.push(Param::new(format!("p{i}"), &value)?);
            checks.poison(8 * n)?;
            gpu.push(Param::new(format!("p{i}"), &value.to_device(&checks.device)?)?);
        }
        Ok(Self { cpu, gpu })
    }

    fn draw_grads(&self, rng: &mut Rng) -> Result<()> {
        for (cpu, gpu) in self.cpu.iter().zip(&self.gpu) {
            let grad = numbers(rng, cpu.value().elem_count());
            modify_f32(cpu.grad(), |g| g.copy_from_slice(&grad))?;
            modify_f32(gpu.grad(), |g| g.copy_from_slice(&grad))?;
        }
        Ok(())
    }

    fn difference(&self) -> Result<Option<String>> {
        let mut found = None;
        for (cpu, gpu) in self.cpu.iter().zip(&self.gpu) {
            found = found.or(difference(cpu.name(), gpu.value(), cpu.value())?);
            found = found.or(difference(&format!("gradient of {}", cpu.name()), gpu.grad(), cpu.grad())?);
        }
        Ok(found)
    }
}

/// Numbers of many magnitudes, whole stretches of one, with zeros and denormals.
fn numbers(rng: &mut Rng, n: usize) -> Vec<f32> {
    let mut scale = 1f32;
    let mut one = |i: usize| {
        if i.is_multiple_of(64) {
            scale = [1.0, 1.0, 1.0, 1e-2, 1e-4, 1e3, 0.0, 1e-40][rng.below(8)];
        }
        let value = if rng.below(16) == 0 { [0.0, -0.0, 1.0, -1.0][rng.below(4)] } else { rng.normal() };
        value * scale
    };
    (0..n).map(&mut one).collect()
}

fn same_state(got: &dyn Optimizer, expected: &dyn Optimizer) -> Result<Option<String>> {
    let (got, expected) = (got.state_dict()?, expected.state_dict()?);
    let mut names: Vec<&String> = expected.keys().collect();
    names.sort();
    let mut found = (got.len() != expected.len()).then(|| format!("{} parts, expected {}", got.len(), expected.len()));
    for name in names {
        found = match got.get(name) {
            None => found.or(Some(format!("{name} is missing"))),
            Some(tensor) => found.or(difference(name, tensor, &expected[name])?),
        };
    }
    Ok(found)
}

fn norm_difference(got: GradNorm, expected: GradNorm) -> Option<String> {
    // Both sums are in f64, in different orders.
    let same = (got.total / expected.total - 1.0).abs() < 1e-12 && (got.scale / expected.scale - 1.0).abs() < 1e-6;
    (!same).then(|| format!("norm {got:?}, expected {expected:?}"))
}

/// Param's own operations.
fn params(checks: &mut Checks) -> Result<()> {
    let mut cases = Vec::new();
    for n in SIZES {
        let twins = Twins::new(checks, &[n])?;
        let gpu = &twins.gpu[0];
        let mut found = twins.difference()?;
        twins.draw_grads(&mut checks.rng)?;
        found = found.or(twins.difference()?);
        let other = Tensor::from_vec(numbers(&mut checks.rng, n), n, &Device::Cpu)?;
        for value in [other.clone(), other.to_device(&checks.device)?] {
            gpu.set(&value.zeros_like()?)?;
            gpu.set(&value)?;
            found = found.or(difference("set", gpu.value(), &other)?);
        }
        gpu.zero_grad()?;
        let zeros = read_f32(gpu.grad(), |g| g.iter().all(|v| v.to_bits() == 0))?;
        found = found.or((!zeros).then(|| "zero_grad left something".into()));
        cases.push(found.map(|f| format!("{n} elements: {f}")));
    }
    checks.equal("parameters on the card", &cases);
    Ok(())
}

fn steps(checks: &mut Checks, optim: Optim, betas: (f64, f64), decay: f64) -> Result<()> {
    let random = 1 + checks.rng.below(300_000);
    let sizes = [&SIZES[..], &[random]].concat();
    let twins = Twins::new(checks, &sizes)?;
    let mut cpu = new(optim, &twins.cpu, betas, decay)?;
    checks.poison(8 * sizes.iter().sum::<usize>())?;
    let mut gpu = new(optim, &twins.gpu, betas, decay)?;
    let mut cases = vec![same_state(&*gpu, &*cpu)?.map(|f| format!("before the first step: {f}"))];
    for step in 0..STEPS {
        twins.draw_grads(&mut checks.rng)?;
        let max_norm = if step % 2 == 0 { 1.0 } else { f64::INFINITY };
        let norm = clip_grad_norm(&twins.cpu, max_norm)?;
        let mut found = norm_difference(clip_grad_norm(&twins.gpu, max_norm)?, norm);
        let lr = 1e-2 * 0.7f64.powi(step as i32);
        cpu.step(lr, norm.scale)?;
        gpu.step(lr, norm.scale)?;
        found = found.or(twins.difference()?).or(same_state(&*gpu, &*cpu)?);
        cases.push(found.map(|f| format!("step {step}: {f}")));
    }
    let sizes_differ = gpu.num_bytes() != cpu.num_bytes();
    cases.push(sizes_differ.then(|| format!("{} bytes, expected {}", gpu.num_bytes(), cpu.num_bytes())));
    checks.equal(&format!("{optim}, betas {betas:?}, decay {decay}"), &cases);
    Ok(())
}

fn norms(checks: &mut Checks) -> Result<()> {
    let random = 1 + checks.rng.below(3_000_000);
    let twins = Twins::new(checks, &[1, 2047, 2049, 500_000, random])?;
    twins.draw_grads(&mut checks.rng)?;
    let (first, again) = (clip_grad_norm(&twins.gpu, 1.0)?, clip_grad_norm(&twins.gpu, 1.0)?);
    let same = first.total.to_bits() == again.total.to_bits();
    let mut cases = vec![
        norm_difference(first, clip_grad_norm(&twins.cpu, 1.0)?),
        (!same).then(|| format!("{first:?}, and again {again:?}")),
    ];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (which, index) = (checks.rng.below(5), checks.rng.below(1 << 30));
        let grad = twins.gpu[which].grad();
        let mut old = 0.0;
        modify_f32(grad, |g| old = std::mem::replace(&mut g[index % g.len()], bad))?;
        let norm = clip_grad_norm(&twins.gpu, 1.0)?;
        cases.push(norm.is_finite().then(|| format!("{bad} in gradient {which}: {norm:?}")));
        modify_f32(grad, |g| {
            let at = index % g.len();
            g[at] = old;
        })?;
    }
    checks.equal("norm of the gradients", &cases);
    Ok(())
}

/// The state leaves the card before each step; nothing may change by that.
fn paging(checks: &mut Checks) -> Result<()> {
    for optim in OPTIMS.into_iter().filter(|o| o.as_str().starts_with("paged")) {
        // Two million elements: several of the driver's largest pages.
        let twins = Twins::new(checks, &[100, 100_000, 2_000_003])?;
        let new = |params| new(optim, params, BETAS[0], 0.01);
        let (mut cpu, mut gpu) = (new(&twins.cpu)?, new(&twins.gpu)?);
        let mut cases = Vec::new();
        for step in 0..STEPS {
            twins.draw_grads(&mut checks.rng)?;
            gpu.page_out()?;
            let out = gpu.is_paged_out()?;
            cpu.step(1e-3, 0.5)?;
            gpu.step(1e-3, 0.5)?;
            let back = !gpu.is_paged_out()?;
            let mut found = twins.difference()?;
            found = found.or((!out).then(|| "the state did not leave the card".into()));
            found = found.or((!back).then(|| "the state did not come back".into()));
            cases.push(found.map(|f| format!("step {step}: {f}")));
        }
        gpu.page_out()?;
        cases.push(same_state(&*gpu, &*cpu)?.map(|f| format!("read on the host: {f}")));
        checks.equal(&format!("{optim}, paged out before each step"), &cases);
    }
    Ok(())
}

/// Values and states after each step, the way through a checkpoint included.
fn near(checks: &mut Checks, optim: Optim) -> Result<()> {
    let shapes = [vec![7], vec![8, 12], vec![1, 1], vec![8, 2048], vec![6144, 8], vec![3, 40, 50]];
    let twins = Twins::of_shapes(checks, &shapes)?;
    let (mut cpu, mut gpu) = (new(optim, &twins.cpu, BETAS[0], 0.1)?, new(optim, &twins.gpu, BETAS[0], 0.1)?);
    for step in 0..STEPS {
        twins.draw_grads(&mut checks.rng)?;
        cpu.step(1e-2, 0.5)?;
        gpu.step(1e-2, 0.5)?;
        for (cpu, gpu) in twins.cpu.iter().zip(&twins.gpu) {
            checks.close(&format!("{optim}, step {step}, {}", cpu.name()), gpu.value(), cpu.value(), 1e-6)?;
        }
        let (got, expected) = (gpu.state_dict()?, cpu.state_dict()?);
        for (name, expected) in expected {
            match got.get(&name) {
                Some(got) => checks.close(&format!("{optim}, step {step}, {name}"), got, &expected, 1e-6)?,
                None => checks.fail(&format!("{optim}, step {step}, {name}"), "is missing"),
            }
        }
        let mut again = new(optim, &twins.gpu, BETAS[0], 0.1)?;
        again.load_state_dict(&got)?;
        let found = same_state(&*again, &*gpu)?;
        checks.equal(&format!("{optim}, step {step}, saved and loaded"), &[found]);
        gpu = again;
    }
    Ok(())
}

/// From the card to the CPU and back, in the middle of a run.
fn checkpoints(checks: &mut Checks, optim: Optim) -> Result<()> {
    let twins = Twins::new(checks, &[8, 4095, 5000, 40_000])?;
    let new = |params| new(optim, params, BETAS[0], 0.01);
    let (mut cpu, mut gpu) = (new(&twins.cpu)?, new(&twins.gpu)?);
    let mut cases = Vec::new();
    for step in 0..4 {
        twins.draw_grads(&mut checks.rng)?;
        cpu.step(1e-3, 1.0)?;
        gpu.step(1e-3, 1.0)?;
        let saved = gpu.state_dict()?;
        let mut missing = saved.clone();
        // p1 is small, so its state is in 32 bits.
        let part = if saved.contains_key("p1.exp_avg") { "p1.exp_avg" } else { "p1.state1" };
        missing.remove(part);
        let refused = gpu.load_state_dict(&missing).is_err();
        cases.push((!refused).then(|| format!("step {step}: a state without {part} was taken")));
        (cpu, gpu) = (new(&twins.cpu)?, new(&twins.gpu)?);
        cpu.load_state_dict(&saved)?;
        gpu.load_state_dict(&cpu.state_dict()?)?;
        let found = twins.difference()?.or(same_state(&*gpu, &*cpu)?);
        cases.push(found.map(|f| format!("step {step}: {f}")));
    }
    checks.equal(&format!("{optim}, saved and loaded"), &cases);
    Ok(())
}

fn refused(checks: &mut Checks) -> Result<()> {
    let value = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
    let mixed = [Param::new("here", &value)?, Param::new("there", &value.to_device(&checks.device)?)?];
    let error = new(Optim::AdamWTorch, &mixed, BETAS[0], 0.0).err().map(|e| e.to_string());
    let named = error.as_ref().is_some_and(|e| e.contains("there") && e.contains("same for all"));
    checks.equal("parameters on two devices are refused", &[(!named).then(|| format!("{error:?}"))]);
    Ok(())
}
