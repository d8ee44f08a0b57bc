//! Losses of training, step by step: the card's against the CPU's, and against PEFT's where its files are.

use std::{collections::HashMap, path::Path};

use qlora_nb::{
    candle_core::{DType, Device, Tensor, safetensors},
    collator::Batch,
    error::Result,
    model::CausalLM,
    model::{AutoModelForCausalLM, DeviceMap, ModelOptions},
    optim::{AdamW, Optim},
    peft::{LoraConfig, PeftModel, get_peft_model},
    trainer::{PassOptions, Trainable},
};

use crate::{
    check::Checks,
    model::{BUNDLED, adapters, batch, load, options},
};

const STEPS: usize = 20;

pub fn run(checks: &mut Checks) -> Result<()> {
    against_cpu(checks)?;
    match std::env::var_os("QLORA_GOLDEN") {
        Some(golden) => against_peft(checks, Path::new(&golden)),
        None => {
            println!(
                "note: PEFT's losses skipped; QLORA_GOLDEN names no folder with lora_same.safetensors, bloom_tiny"
            );
            Ok(())
        }
    }
}

/// The losses of `STEPS` updates, the batches taken in turn.
fn losses(model: &PeftModel, batches: &[Batch], gradient_checkpointing: bool, learning_rate: f64) -> Result<Vec<f64>> {
    let params = model.trainable_parameters();
    let mut optimizer = AdamW::new(Optim::PagedAdamW32bit, &params, (0.9, 0.999), 1e-8, 0.0)?;
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let batch = &batches[step % batches.len()];
        params.iter().try_for_each(|p| p.zero_grad())?;
        let options =
            PassOptions { num_items: batch.num_label_tokens() as f64, gradient_checkpointing, dropout_key: 0 };
        losses.push(model.forward_backward(batch, &options)?.loss_sum / options.num_items);
        optimizer.step(learning_rate, 1.0)?;
    }
    Ok(losses)
}

fn compare(checks: &mut Checks, what: &str, got: Vec<f64>, want: &[f64], tolerance: f64) -> Result<()> {
    let tensor = |v: &[f64]| Tensor::new(v, &Device::Cpu);
    checks.close(what, &tensor(&got)?, &tensor(want)?, tolerance)
}

fn against_cpu(checks: &mut Checks) -> Result<()> {
    // In 16 bits the card's activations are rounded where the CPU's are not, and twenty updates part the two further. Ten
    // times this rate multiplies what a sum in another order changes by up to a hundred, for one batch in three.
    let learning_rate = 1e-3;
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 5e-4), (DType::BF16, 5e-3)] {
        let cpu = load(BUNDLED.as_ref(), options(dtype, true, DeviceMap::Cpu), &adapters())?;
        let mut batches = Vec::new();
        for _ in 0..4 {
            let lengths: Vec<usize> = (0..4).map(|_| 20 + checks.rng.below(60)).collect();
            batches.push(batch(checks, cpu.vocab_size(), &lengths)?);
        }
        let want = losses(&cpu, &batches, true, learning_rate)?;
        for checkpointing in [false, true] {
            let gpu = load(BUNDLED.as_ref(), options(dtype, true, DeviceMap::Cuda(0)), &adapters())?;
            let what =
                format!("{STEPS} losses, {} NF4, checkpointing {checkpointing}, against the CPU", dtype.as_str());
            compare(checks, &what, losses(&gpu, &batches, checkpointing, learning_rate)?, &want, tolerance)?;
        }
    }
    Ok(())
}

/// The files of PEFT's twenty steps on a tiny BLOOM in f32.
fn against_peft(checks: &mut Checks, golden: &Path) -> Result<()> {
    let t: HashMap<String, Tensor> = safetensors::load(golden.join("lora_same.safetensors"), &Device::Cpu)?;
    let options = ModelOptions { device_map: DeviceMap::Cuda(0), ..Default::default() };
    let base = AutoModelForCausalLM::from_pretrained(golden.join("bloom_tiny"), options)?;
    let config = LoraConfig { r: 8, lora_alpha: 8, target_modules: ["query_key_value"].into(), ..Default::default() };
    let batches = (0..STEPS).map(|step| {
        let ids = t["batches"].get(step)?.to_dtype(DType::U32)?;
        Batch::new(ids.clone(), ids.ones_like()?, ids.to_dtype(DType::I64)?)
    });
    let batches = batches.collect::<Result<Vec<_>>>()?;
    let want: Vec<f64> = t["losses"].to_dtype(DType::F64)?.to_vec1()?;
    for checkpointing in [false, true] {
        let model = get_peft_model(&base, &config)?;
        for param in model.trainable_parameters() {
            param.set(&t[&format!("init.{}", param.name().replace(".weight", ".default.weight"))])?;
        }
        let what = format!("{STEPS} losses, f32, checkpointing {checkpointing}, against PEFT");
        compare(checks, &what, losses(&model, &batches, checkpointing, 1e-2)?, &want, 1e-5)?;
    }
    Ok(())
}
