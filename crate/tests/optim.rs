//! Optimizers and schedules against torch and transformers (tests/fixtures/optim.safetensors, scripts/fixtures/optim.py)
//! and bitsandbytes, on the CPU (adamw.safetensors, adamw.py) and on CUDA (optim_cuda.safetensors, quant_cuda.py); Lion,
//! Adafactor and SGD as the Trainer makes them (optimizers.safetensors, optimizers.py).

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    error::Error,
    internals::backend::param::{Param, modify_f32},
    optim::{self, AdamW, Hyperparameters, Optim, Optimizer, SchedulerType, clip_grad_norm, lr_scheduler::lr_at},
    quant::create_dynamic_map,
};

type Tensors = HashMap<String, Tensor>;

fn fixture(name: &str) -> Tensors {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bytes(t: &Tensor) -> Vec<u8> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The formulas of scripts/fixtures/optim.py.
fn uniform(n: usize, seed: u64) -> Vec<f32> {
    let value = |i: u64| (((i * 2654435761) & 0xffff_ffff) ^ ((i * 40503) & 0xffff)) >> 8;
    (0..n as u64).map(|i| value(i + seed) as f32 / (1 << 24) as f32).collect()
}

fn bell(n: usize, seed: u64) -> Vec<f32> {
    let [a, b, c, d] = [0, 7919, 15838, 23757].map(|s| uniform(n, seed + s));
    (0..n).map(|i| a[i] + b[i] - c[i] - d[i]).collect()
}

fn param(name: &str, value: Vec<f32>, shape: &[usize]) -> Param {
    Param::new(name, &Tensor::from_vec(value, shape, &Device::Cpu).unwrap()).unwrap()
}

fn set_grad(p: &Param, grad: &[f32]) {
    modify_f32(p.grad(), |g| g.copy_from_slice(grad)).unwrap();
}

const SHAPES: [&[usize]; 4] = [&[8, 12], &[3, 5, 7], &[1], &[70, 64]];

fn start(shapes: &[&[usize]]) -> Vec<Param> {
    let one = |(k, s): (usize, &&[usize])| param(&format!("p{k}"), bell(s.iter().product(), 11), s);
    shapes.iter().enumerate().map(one).collect()
}

#[test]
fn adamw_torch_is_torchs() {
    let f = fixture("optim.safetensors");
    let (totals, scales) = (floats(&f["clip.total"]), floats(&f["clip.scale"]));
    for decay in [0.0, 0.1] {
        let params = start(&SHAPES);
        let mut optimizer = AdamW::new(Optim::AdamWTorch, &params, (0.9, 0.999), 1e-8, decay).unwrap();
        for step in 0..6 {
            for (k, p) in params.iter().enumerate() {
                let scale = 2f32.powi(-8 * (step as i32 % 3));
                let grad = bell(p.value().elem_count(), (100 * step + k) as u64);
                set_grad(p, &grad.iter().map(|g| g * scale).collect::<Vec<_>>());
            }
            let norm = clip_grad_norm(&params, 1.0).unwrap();
            assert!((norm.total as f32 / totals[step] - 1.0).abs() < 1e-6, "step {step}: {norm:?}, {}", totals[step]);
            assert!((norm.scale / scales[step] - 1.0).abs() < 1e-6, "step {step}: {norm:?}, {}", scales[step]);
            // With torch's own scale the moments must be equal to the bit.
            optimizer.step(1e-2 * 0.9f64.powi(step as i32), scales[step]).unwrap();
        }
        let state = optimizer.state_dict().unwrap();
        for (k, p) in params.iter().enumerate() {
            for part in ["exp_avg", "exp_avg_sq"] {
                let (got, expected) =
                    (floats(&state[&format!("p{k}.{part}")]), floats(&f[&format!("torch.{decay:?}.{k}.{part}")]));
                assert_eq!(got, expected, "decay {decay}, parameter {k}, {part}");
            }
            // torch's square root is off by an ulp now and then.
            let off = largest_difference(&floats(p.value()), &floats(&f[&format!("torch.{decay:?}.{k}.param")]));
            assert!(off < 5e-7, "decay {decay}, parameter {k} is off by {off}");
        }
    }
}

/// Five steps of one parameter of 4160 elements, as scripts/fixtures/adamw.py makes them.
fn five_steps(f: &Tensors, optim: Optim, elements: usize) -> (Param, AdamW) {
    let p = param("p", floats(&f["start"])[..elements].to_vec(), &[elements]);
    let mut optimizer = AdamW::new(optim, std::slice::from_ref(&p), (0.9, 0.999), 1e-8, 0.1).unwrap();
    for step in 1..=5 {
        set_grad(&p, &floats(&f[&format!("grad_{step}")])[..elements]);
        optimizer.step(1e-2, 1.0).unwrap();
    }
    (p, optimizer)
}

#[test]
fn paged_adamw_32bit_is_that_of_bitsandbytes() {
    let f = fixture("adamw.safetensors");
    let (p, optimizer) = five_steps(&f, Optim::PagedAdamW32bit, 4160);
    let off = largest_difference(&floats(p.value()), &floats(&f["adamw32.param"]));
    assert!(off < 1e-7, "off by {off}");
    assert_eq!(optimizer.num_bytes(), 8 * 4160);
}

#[test]
fn adamw_8bit_is_that_of_bitsandbytes() {
    let f = fixture("adamw.safetensors");
    for optim in [Optim::AdamW8bit, Optim::PagedAdamW8bit] {
        let (p, optimizer) = five_steps(&f, optim, 4160);
        let state = optimizer.state_dict().unwrap();
        for (part, map) in [("state1", "map_signed"), ("state2", "map_unsigned")] {
            assert_eq!(floats(&f[map]), create_dynamic_map(map == "map_signed"));
            let (got, expected) = (bytes(&state[&format!("p.{part}")]), bytes(&f[&format!("adamw8.{part}")]));
            let differ = got.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{part}");
        }
        for part in ["absmax1", "absmax2"] {
            assert_eq!(floats(&state[&format!("p.{part}")]), floats(&f[&format!("adamw8.{part}")]), "{part}");
        }
        // In the first step two moments lie just between two codes: this reference takes the lower one, the CUDA
        // kernels (and we) the even one, so these two weights go another way for a while.
        let (got, expected) = (floats(p.value()), floats(&f["adamw8.param"]));
        let off: Vec<usize> = (0..got.len()).filter(|&i| (got[i] - expected[i]).abs() > 1e-7).collect();
        assert_eq!(off, [2858, 3563]);
        assert_eq!(optimizer.num_bytes(), 2 * 4160 + 2 * 17 * 4);
    }
    // A small tensor keeps 32-bit states, and their arithmetic.
    let (p, optimizer) = five_steps(&f, Optim::AdamW8bit, 4095);
    assert_eq!(optimizer.num_bytes(), 8 * 4095);
    let off = largest_difference(&floats(p.value()), &floats(&f["adamw32.param"])[..4095]);
    assert!(off < 1e-7, "off by {off}");
}

/// The CUDA kernels divide approximately and decay after the update, so they are near, not equal.
#[test]
fn cuda_states_are_near() {
    let f = fixture("optim_cuda.safetensors");
    for (name, optim) in [("paged32", Optim::PagedAdamW32bit), ("adamw8", Optim::AdamW8bit)] {
        let params = start(&[SHAPES[0], SHAPES[3]]);
        let mut optimizer = AdamW::new(optim, &params, (0.9, 0.999), 1e-8, 0.1).unwrap();
        for step in 0..6 {
            for (k, p) in params.iter().enumerate() {
                let scale = 10f64.powi(-(step as i32 % 3)) as f32;
                let grad = bell(p.value().elem_count(), (100 * step + k) as u64);
                set_grad(p, &grad.iter().map(|g| g * scale).collect::<Vec<_>>());
            }
            optimizer.step(1e-2, 1.0).unwrap();
        }
        let state = optimizer.state_dict().unwrap();
        for (k, p) in params.iter().enumerate() {
            let off = largest_difference(&floats(p.value()), &floats(&f[&format!("{name}.{k}.p")]));
            assert!(off < 1e-4, "{name}: parameter {k} is off by {off}");
            for part in ["state1", "state2"] {
                let Some(expected) = f.get(&format!("{name}.{k}.{part}")) else { continue };
                if let Some(full) =
                    state.get(&format!("p{k}.{}", if part == "state1" { "exp_avg" } else { "exp_avg_sq" }))
                {
                    assert!(largest_difference(&floats(full), &floats(expected)) < 1e-6, "{name}.{k}.{part}");
                } else {
                    let (got, expected) = (bytes(&state[&format!("p{k}.{part}")]), bytes(expected));
                    let differ = got.iter().zip(&expected).filter(|(a, b)| a != b).count();
                    assert!(differ * 100 < got.len(), "{name}.{k}.{part}: {differ} codes differ");
                    assert!(got.iter().zip(&expected).all(|(a, b)| a.abs_diff(*b) <= 1), "{name}.{k}.{part}");
                }
            }
        }
    }
}

#[test]
fn schedules_are_those_of_transformers() {
    let f = fixture("optim.safetensors");
    for name in ["linear", "cosine", "constant", "constant_with_warmup"] {
        let kind: SchedulerType = name.parse().unwrap();
        let expected = f[&format!("lr.{name}")].to_vec1::<f64>().unwrap();
        for (step, expected) in expected.into_iter().enumerate() {
            let got = lr_at(kind, step, 7, 60);
            assert!((got - expected).abs() <= 1e-16, "{name}, step {step}: {got}, transformers {expected}");
        }
    }
}

#[test]
fn a_run_that_is_saved_and_loaded_goes_on_bit_for_bit() {
    for optim in [Optim::AdamWTorch, Optim::PagedAdamW32bit, Optim::AdamW8bit] {
        let step = |params: &[Param], optimizer: &mut AdamW, t: u64| {
            params.iter().enumerate().for_each(|(k, p)| set_grad(p, &bell(p.value().elem_count(), t * 31 + k as u64)));
            optimizer.step(3e-3, 0.5).unwrap();
        };
        let new = |params: &[Param]| AdamW::new(optim, params, (0.9, 0.99), 1e-8, 0.01).unwrap();
        let params = start(&SHAPES);
        let mut optimizer = new(&params);
        (0..3).for_each(|t| step(&params, &mut optimizer, t));

        let saved = optimizer.state_dict().unwrap();
        let copies: Vec<Param> = params.iter().map(|p| param(p.name(), floats(p.value()), p.value().dims())).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        candle_core::safetensors::save(&saved, file.path()).unwrap();
        let read = candle_core::safetensors::load(file.path(), &Device::Cpu).unwrap();
        let mut resumed = new(&copies);
        resumed.load_state_dict(&read).unwrap();
        assert_eq!(resumed.steps(), 3);

        (3..6).for_each(|t| step(&params, &mut optimizer, t));
        (3..6).for_each(|t| step(&copies, &mut resumed, t));
        for (a, b) in params.iter().zip(&copies) {
            assert_eq!(floats(a.value()), floats(b.value()), "{optim} {}", a.name());
        }
    }
}

#[test]
fn a_state_of_another_run_is_refused_and_changes_nothing() {
    let params = start(&SHAPES);
    let mut optimizer = AdamW::new(Optim::PagedAdamW32bit, &params, (0.9, 0.999), 1e-8, 0.0).unwrap();
    params.iter().for_each(|p| set_grad(p, &bell(p.value().elem_count(), 5)));
    optimizer.step(1e-3, 1.0).unwrap();
    let good = optimizer.state_dict().unwrap();

    let mut missing = good.clone();
    missing.remove("p1.exp_avg");
    let error = optimizer.load_state_dict(&missing).unwrap_err();
    assert!(matches!(&error, Error::KeyMismatch { missing, .. } if missing == &["p1.exp_avg"]), "{error}");

    let other = AdamW::new(Optim::AdamW8bit, &params, (0.9, 0.999), 1e-8, 0.0).unwrap().state_dict().unwrap();
    let error = optimizer.load_state_dict(&other).unwrap_err();
    assert!(
        matches!(&error, Error::KeyMismatch { unexpected, .. } if unexpected.contains(&"p3.state1".into())),
        "{error}"
    );

    let mut shape = good.clone();
    shape.insert("p3.exp_avg".into(), Tensor::zeros((64, 70), DType::F32, &Device::Cpu).unwrap());
    assert!(matches!(optimizer.load_state_dict(&shape), Err(Error::Shape { .. })));
    let mut dtype = good.clone();
    dtype.insert("p3.exp_avg".into(), Tensor::zeros((70, 64), DType::F16, &Device::Cpu).unwrap());
    assert!(matches!(optimizer.load_state_dict(&dtype), Err(Error::InvalidArgument { .. })));

    let after = optimizer.state_dict().unwrap();
    assert!(good.iter().filter(|(name, _)| *name != "step").all(|(name, t)| floats(t) == floats(&after[name])));
    assert_eq!(optimizer.steps(), 1);
}

#[test]
fn bad_arguments_are_refused() {
    let params = start(&SHAPES);
    let new = |params: &[Param], betas, eps, decay| AdamW::new(Optim::AdamWTorch, params, betas, eps, decay);
    assert!(new(&params, (0.9, 0.999), 1e-8, 0.0).is_ok());
    for (betas, eps, decay, name) in [
        ((1.0, 0.999), 1e-8, 0.0, "adam_beta1"),
        ((0.9, -0.1), 1e-8, 0.0, "adam_beta2"),
        ((0.9, 0.999), f64::NAN, 0.0, "adam_epsilon"),
        ((0.9, 0.999), 1e-8, -1.0, "weight_decay"),
    ] {
        let error = new(&params, betas, eps, decay).err().unwrap();
        assert!(error.to_string().starts_with(name), "{error}");
    }
    assert!(new(&[], (0.9, 0.999), 1e-8, 0.0).is_err());
    let twice = [params[0].clone(), params[0].clone()];
    assert!(new(&twice, (0.9, 0.999), 1e-8, 0.0).err().unwrap().to_string().contains("p0"));
    let mut optimizer = new(&params, (0.9, 0.999), 1e-8, 0.0).unwrap();
    assert!(optimizer.step(f64::NAN, 1.0).is_err());
    for optim in [Optim::AdamWTorch, Optim::PagedAdamW32bit, Optim::AdamW8bit, Optim::PagedAdamW8bit] {
        assert_eq!(optim.as_str().parse::<Optim>().unwrap(), optim);
    }
    assert_eq!("adamw_bnb_8bit".parse::<Optim>().unwrap(), Optim::AdamW8bit);
    assert!("rmsprop".parse::<Optim>().unwrap_err().to_string().contains("paged_adamw_32bit"));
}

/// Five steps of the parameter `name` at lr 1e-3, as scripts/fixtures/optimizers.py makes them; `check` looks at each.
fn five_checked(f: &Tensors, optim: Optim, name: &str, decay: f64, check: impl Fn(usize, &Param, &Tensors)) {
    let p = Param::new("p", &f[&format!("start.{name}")]).unwrap();
    let mut optimizer = new(optim, std::slice::from_ref(&p), decay);
    for step in 1..=5 {
        set_grad(&p, &floats(&f[&format!("grad_{step}.{name}")]));
        optimizer.step(1e-3, 1.0).unwrap();
        check(step, &p, &optimizer.state_dict().unwrap());
    }
    assert_eq!(optimizer.steps(), 5);
}

fn new(optim: Optim, params: &[Param], weight_decay: f64) -> Box<dyn Optimizer> {
    optim::new(optim, params, &Hyperparameters { weight_decay, ..Default::default() }).unwrap()
}

/// The largest of |a - b| / |b|, where b is not 0.
fn largest_ratio(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let ratio = |(a, b): (&f32, &f32)| if b == a { 0.0 } else { (a - b).abs() / b.abs() };
    a.iter().zip(b).map(ratio).fold(0.0, f32::max)
}

/// `parts` of the state and the weights after each of five steps, by `ratio` at most from the reference's.
fn is_the_reference(optim: Optim, reference: &str, parts: fn(&str) -> &'static [&'static str], ratio: f32) {
    let f = fixture("optimizers.safetensors");
    for name in ["matrix", "vector", "late"] {
        for decay in [0.0, 0.1] {
            five_checked(&f, optim, name, decay, |step, p, state| {
                let expected = &f[&format!("{reference}.{decay:?}.{name}.param_{step}")];
                let off = largest_ratio(&floats(p.value()), &floats(expected));
                assert!(off <= ratio, "{optim}, decay {decay}, {name}, step {step}: off by {off}");
                assert_eq!(state.len(), 1 + parts(name).len());
                for part in parts(name) {
                    let (got, expected) =
                        (&state[&format!("p.{part}")], &f[&format!("{reference}.{name}.{part}_{step}")]);
                    assert_eq!(got.dims(), expected.dims(), "{optim}, {name}, {part}");
                    let off = largest_ratio(&floats(got), &floats(expected));
                    assert!(off <= ratio, "{optim}, decay {decay}, {name}, {part}_{step}: off by {off}");
                }
            });
        }
    }
}

#[test]
fn lion_32bit_is_that_of_bitsandbytes_bit_for_bit() {
    // What is small keeps 32-bit states under the names of 8-bit optimizers.
    for optim in [Optim::Lion32bit, Optim::PagedLion32bit, Optim::Lion8bit, Optim::PagedLion8bit] {
        is_the_reference(optim, "lion_32bit", |_| &["state1"], 0.0);
    }
}

#[test]
fn lion_8bit_is_that_of_bitsandbytes_bit_for_bit() {
    let f = fixture("optimizers.safetensors");
    for optim in [Optim::Lion8bit, Optim::PagedLion8bit] {
        for decay in [0.0, 0.1] {
            five_checked(&f, optim, "wide", decay, |step, p, state| {
                let expected = |part: &str| &f[&format!("lion_8bit.wide.{part}_{step}")];
                let absmax = floats(&state["p.absmax1"]);
                assert_eq!(absmax, floats(expected("absmax1")), "step {step}");
                let (got, expected) = (bytes(&state["p.state1"]), bytes(expected("state1")));
                // A block of zeros may have any code; it has 0 here, and that of 0 in the reference.
                let same = |i: usize| if absmax[i / 256] == 0.0 { got[i] == 0 } else { got[i] == expected[i] };
                let differ: Vec<usize> = (0..got.len()).filter(|&i| !same(i)).collect();
                assert_eq!(differ, [0usize; 0], "step {step}");
                assert_eq!(absmax.iter().filter(|a| **a == 0.0).count(), if step == 1 { 4 } else { 1 });
                if step == 5 {
                    let expected = &f[&format!("lion_8bit.{decay:?}.wide.param_5")];
                    assert_eq!(floats(p.value()), floats(expected), "decay {decay}");
                }
            });
        }
        let p = Param::new("p", &f["start.wide"]).unwrap();
        assert_eq!(new(optim, &[p], 0.0).num_bytes(), 4160 + 17 * 4);
    }
}

#[test]
fn adafactor_is_that_of_transformers() {
    let parts = |name: &str| -> &'static [&'static str] {
        if name == "vector" { &["exp_avg_sq"] } else { &["exp_avg_sq_row", "exp_avg_sq_col"] }
    };
    is_the_reference(Optim::Adafactor, "adafactor", parts, 1e-6);
    let params = [param("p", vec![0.0; 2 * 3 * 5], &[2, 3, 5]), param("q", vec![0.0; 7], &[7])];
    let optimizer = new(Optim::Adafactor, &params, 0.0);
    assert_eq!(optimizer.num_bytes(), 4 * (2 * 3 + 2 * 5 + 7));
    assert_eq!(optimizer.state_dict().unwrap()["p.exp_avg_sq_col"].dims(), [2, 5]);
}

#[test]
fn sgd_is_that_of_torch() {
    is_the_reference(Optim::Sgd, "sgd", |_| &[], 2e-7);
    assert_eq!(new(Optim::Sgd, &start(&SHAPES), 0.1).num_bytes(), 0);
}

#[test]
fn every_optimizer_goes_on_bit_for_bit_from_a_file() {
    let step = |params: &[Param], optimizer: &mut dyn Optimizer, t: u64| {
        params.iter().enumerate().for_each(|(k, p)| set_grad(p, &bell(p.value().elem_count(), t * 31 + k as u64)));
        optimizer.step(3e-3, 0.5).unwrap();
    };
    for &optim in Optim::ALL {
        let params = start(&SHAPES);
        let mut optimizer = new(optim, &params, 0.01);
        (0..3).for_each(|t| step(&params, &mut *optimizer, t));
        let copies: Vec<Param> = params.iter().map(|p| param(p.name(), floats(p.value()), p.value().dims())).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        candle_core::safetensors::save(&optimizer.state_dict().unwrap(), file.path()).unwrap();
        let mut resumed = new(optim, &copies, 0.01);
        resumed.load_state_dict(&candle_core::safetensors::load(file.path(), &Device::Cpu).unwrap()).unwrap();
        (3..6).for_each(|t| step(&params, &mut *optimizer, t));
        (3..6).for_each(|t| step(&copies, &mut *resumed, t));
        assert_eq!((resumed.steps(), resumed.is_paged(), resumed.is_paged_out().unwrap()), (6, false, false));
        for (a, b) in params.iter().zip(&copies) {
            assert_eq!(floats(a.value()), floats(b.value()), "{optim} {}", a.name());
        }
        let (a, b) = (optimizer.state_dict().unwrap(), resumed.state_dict().unwrap());
        assert_eq!(a.len(), b.len());
        assert!(a.iter().all(|(name, t)| floats(t) == floats(&b[name])), "{optim}");
    }
}

#[test]
fn a_state_of_another_optimizer_is_refused_and_changes_nothing() {
    for &optim in Optim::ALL {
        let params = start(&SHAPES);
        let mut optimizer = new(optim, &params, 0.0);
        params.iter().for_each(|p| set_grad(p, &bell(p.value().elem_count(), 5)));
        optimizer.step(1e-3, 1.0).unwrap();
        let good = optimizer.state_dict().unwrap();
        let mut damaged = Vec::new();
        for &other in Optim::ALL {
            let state = new(other, &start(&SHAPES), 0.0).state_dict().unwrap();
            if state.keys().any(|name| !good.contains_key(name)) || state.len() != good.len() {
                damaged.push(state);
            }
        }
        assert!(damaged.len() >= 6, "{optim}");
        for (name, tensor) in &good {
            let mut bad = good.clone();
            bad.remove(name);
            damaged.push(bad.clone());
            // `step` is one number in any shape; its sign is what can be wrong.
            let other = if name == "step" {
                Tensor::new(&[-1i64], &Device::Cpu).unwrap()
            } else {
                Tensor::zeros(tensor.elem_count() + 1, tensor.dtype(), &Device::Cpu).unwrap()
            };
            bad.insert(name.clone(), other);
            damaged.push(bad.clone());
            if name != "step" {
                bad.insert(name.clone(), tensor.to_dtype(DType::F64).unwrap());
                damaged.push(bad);
            }
        }
        for bad in damaged {
            let error = optimizer.load_state_dict(&bad).unwrap_err();
            let refused =
                matches!(error, Error::KeyMismatch { .. } | Error::Shape { .. } | Error::InvalidArgument { .. });
            assert!(refused, "{optim}: {error}");
        }
        let after = optimizer.state_dict().unwrap();
        assert!(good.iter().all(|(name, t)| floats(t) == floats(&after[name])), "{optim}");
        assert_eq!(optimizer.steps(), 1);
    }
}

#[test]
fn every_optimizer_checks_its_arguments() {
    let params = start(&SHAPES);
    for &optim in Optim::ALL {
        let error = |params: &[Param], h: Hyperparameters| optim::new(optim, params, &h).err().unwrap().to_string();
        let h = Hyperparameters::default();
        assert!(error(&params, Hyperparameters { betas: (0.9, 1.0), ..h }).starts_with("adam_beta2"));
        assert!(error(&params, Hyperparameters { eps: -1.0, ..h }).starts_with("adam_epsilon"));
        assert!(error(&params, Hyperparameters { weight_decay: f64::INFINITY, ..h }).starts_with("weight_decay"));
        assert!(error(&[], h).contains("at least one"));
        assert!(error(&[params[0].clone(), params[0].clone()], h).contains("p0"));
        let mut optimizer = new(optim, &params, 0.0);
        assert!(optimizer.step(-1e-3, 1.0).unwrap_err().to_string().starts_with("learning_rate"));
        assert_eq!(optimizer.steps(), 0);
        let is_adamw = AdamW::new(optim, &params, h.betas, h.eps, 0.0).is_ok();
        assert_eq!(is_adamw, optim.as_str().contains("adamw"), "{optim}");
    }
    let error = AdamW::new(Optim::Sgd, &params, (0.9, 0.999), 1e-8, 0.0).err().unwrap().to_string();
    assert!(error.contains("paged_adamw_8bit") && !error.contains("lion"), "{error}");
}
