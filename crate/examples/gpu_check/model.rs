//! Whole models on the card against the CPU: logits, losses, every adapter's gradient; recorded passes
//! against those that are not; overflow; generation.

use std::path::{Path, PathBuf};

use qlora_nb::{
    candle_core::{DType, Device, Tensor},
    collator::Batch,
    error::Result,
    model::CausalLM,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, DeviceMap, ModelOptions},
    peft::{LoraConfig, PeftModel, get_peft_model},
    pipeline::{GenerationConfig, generate},
    trainer::{PassOptions, Trainable},
};

use crate::check::Checks;

pub fn run(checks: &mut Checks) -> Result<()> {
    let folder = folder();
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 5e-3), (DType::BF16, 4e-2)] {
        for nf4 in [false, true] {
            compare(checks, &folder, &adapters(), dtype, nf4, tolerance)?;
        }
        let saved = Some(vec!["lm_head".to_string(), "word_embeddings".to_string()]);
        compare(checks, &folder, &LoraConfig { modules_to_save: saved, ..adapters() }, dtype, true, tolerance)?;
    }
    // The families beside BLOOM, and DoRA, as the parity tests have them: of sizes that take the plain kernels.
    for family in ["llama_tiny", "qwen2_tiny", "qwen3_tiny", "mistral_tiny"] {
        let folder = Path::new("tests/fixtures").join(family);
        if !folder.exists() {
            println!("  no {}: run it in the repository's folder", folder.display());
            continue;
        }
        let saved = Some(vec!["lm_head".to_string(), "embed_tokens".to_string()]);
        let config = LoraConfig { target_modules: ["q_proj"].into(), modules_to_save: saved, ..Default::default() };
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 1e-2), (DType::BF16, 8e-2)] {
            compare(checks, &folder, &config, dtype, true, tolerance)?;
        }
        for (use_dora, nf4) in [(false, false), (false, true), (true, false), (true, true)] {
            let config = LoraConfig { r: 8, target_modules: "all-linear".into(), use_dora, ..Default::default() };
            for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 1e-2), (DType::BF16, 8e-2)] {
                compare(checks, &folder, &config, dtype, nf4, tolerance)?;
            }
        }
    }
    Ok(())
}

/// LoRA on the linear layers of the bundled model; of another, which may be large, on one a block.
pub fn adapters() -> LoraConfig {
    let modules = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"];
    let modules = if std::env::var_os("QLORA_MODEL").is_some() { &modules[..1] } else { &modules[..] };
    LoraConfig { r: 8, target_modules: modules.to_vec().into(), ..Default::default() }
}

pub const BUNDLED: &str = "notebooks/models/poet-bloom-zh";

/// The bundled BLOOM, or the folder that QLORA_MODEL names.
fn folder() -> PathBuf {
    match std::env::var_os("QLORA_MODEL") {
        Some(folder) => folder.into(),
        None => BUNDLED.into(),
    }
}

/// A model in a dtype, or in NF4 with double quantization that computes in it.
pub fn options(dtype: DType, nf4: bool, device_map: DeviceMap) -> ModelOptions {
    let quantization = BitsAndBytesConfig {
        load_in_4bit: true,
        bnb_4bit_use_double_quant: true,
        bnb_4bit_compute_dtype: dtype,
        ..Default::default()
    };
    ModelOptions {
        torch_dtype: dtype,
        device_map,
        quantization_config: nf4.then_some(quantization),
        ..Default::default()
    }
}

pub fn load(folder: &Path, options: ModelOptions, config: &LoraConfig) -> Result<PeftModel> {
    let base = AutoModelForCausalLM::from_pretrained(folder, options)?;
    let model = get_peft_model(&base, config)?;
    // B starts at zero, and A's gradient with it: another start shows both.
    let params = model.trainable_parameters();
    for (i, p) in params.iter().enumerate().filter(|(_, p)| p.name().contains("lora_A") || p.name().contains("lora_B"))
    {
        let n = p.value().elem_count();
        let values: Vec<f32> = (0..n).map(|j| ((i * 7919 + j * 104_729) % 2003) as f32 / 2003.0 - 0.5).collect();
        p.set(&Tensor::from_vec(values, p.value().dims(), &Device::Cpu)?.affine(0.05, 0.0)?)?;
    }
    Ok(model)
}

/// Rows of random ids, padded on the left, labels on the second half.
pub fn batch(checks: &mut Checks, vocab: usize, lengths: &[usize]) -> Result<Batch> {
    let t = lengths.iter().copied().max().unwrap_or(1);
    let (mut ids, mut mask, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for &n in lengths {
        for i in 0..t {
            let real = i >= t - n;
            let id = if real { checks.rng.below(vocab) as u32 } else { 0 };
            ids.push(id);
            mask.push(u32::from(real));
            labels.push(if real && i >= t - n / 2 { i64::from(id) } else { -100 });
        }
    }
    let shape = (lengths.len(), t);
    let cpu = &Device::Cpu;
    Batch::new(
        Tensor::from_vec(ids, shape, cpu)?,
        Tensor::from_vec(mask, shape, cpu)?,
        Tensor::from_vec(labels, shape, cpu)?,
    )
}

fn gradients(model: &PeftModel, batch: &Batch, gradient_checkpointing: bool) -> Result<(f64, Vec<Tensor>)> {
    let params = model.trainable_parameters();
    params.iter().try_for_each(|p| p.zero_grad())?;
    let options = PassOptions { num_items: batch.num_label_tokens() as f64, gradient_checkpointing, dropout_key: 3 };
    let pass = model.forward_backward(batch, &options)?;
    let grads = params.iter().map(|p| Ok(p.grad().to_device(&Device::Cpu)?.copy()?)).collect::<Result<_>>()?;
    Ok((pass.loss_sum / options.num_items, grads))
}

fn joined(grads: &[Tensor]) -> Result<Tensor> {
    let flat: Vec<Tensor> = grads.iter().map(|g| g.flatten_all()).collect::<Result<_, _>>()?;
    Ok(Tensor::cat(&flat, 0)?)
}

fn compare(
    checks: &mut Checks,
    folder: &Path,
    config: &LoraConfig,
    dtype: DType,
    nf4: bool,
    tolerance: f64,
) -> Result<()> {
    let cpu = load(folder, options(dtype, nf4, DeviceMap::Cpu), config)?;
    let gpu = load(folder, options(dtype, nf4, DeviceMap::Cuda(0)), config)?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let (bits, dora) = (if nf4 { " NF4" } else { "" }, if config.use_dora { " DoRA" } else { "" });
    let saved = config.modules_to_save.as_ref().map(|names| format!(" and {}", names.join(", "))).unwrap_or_default();
    let what = format!("{name} {}{bits}{dora}{saved}", dtype.as_str());
    let lengths: Vec<usize> = (0..4).map(|_| 20 + checks.rng.below(100)).collect();
    let batch = batch(checks, cpu.vocab_size(), &lengths)?;
    let logits = |m: &PeftModel| m.logits(&batch.input_ids, Some(&batch.attention_mask));
    checks.close(&format!("model {what}: logits"), &logits(&gpu)?, &logits(&cpu)?, tolerance)?;

    let scalar = |v: f64| Tensor::new(&[v], &Device::Cpu);
    let (loss, want) = gradients(&cpu, &batch, false)?;
    for checkpointing in [false, true] {
        let mut first = None;
        // Launched one by one, recorded, repeated.
        for pass in 0..3 {
            let (got_loss, got) = gradients(&gpu, &batch, checkpointing)?;
            let case = format!("model {what}, checkpointing {checkpointing}, pass {pass}");
            checks.close(&format!("{case}: loss"), &scalar(got_loss)?, &scalar(loss)?, tolerance / 4.0)?;
            let all = joined(&got)?;
            checks.close(&format!("{case}: gradients"), &all, &joined(&want)?, 2.0 * tolerance)?;
            if pass == 0 {
                let worst = got.iter().zip(&want).map(|(g, w)| relative(g, w)).collect::<Result<Vec<_>>>()?;
                let worst = worst.into_iter().fold(0.0, f64::max);
                checks.close(
                    &format!("{case}: worst gradient"),
                    &scalar(1.0 + worst)?,
                    &scalar(1.0)?,
                    6.0 * tolerance,
                )?;
            }
            match &first {
                None => first = Some(all),
                Some(first) => {
                    let same = (first - &all)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0;
                    checks.equal(&format!("{case}: as the first"), &[(!same).then(|| "bits differ".to_string())]);
                }
            }
        }
    }
    decode(checks, &what, &cpu, &gpu, tolerance)
}

fn relative(got: &Tensor, want: &Tensor) -> Result<f64> {
    let norm = |t: &Tensor| -> Result<f64> { Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())) };
    Ok(norm(&(got - want)?)? / norm(want)?.max(1e-12))
}

/// Two sequences, token by token with the cache, one of them leaving half-way.
fn decode(checks: &mut Checks, what: &str, cpu: &PeftModel, gpu: &PeftModel, tolerance: f64) -> Result<()> {
    let vocab = cpu.vocab_size();
    let mut ids = |n: usize| (0..n).map(|_| checks.rng.below(vocab) as u32).collect::<Vec<_>>();
    let (a, b) = (ids(70), ids(40));
    let (mut c, mut g) = (cpu.new_cache(2)?, gpu.new_cache(2)?);
    let mut both = |new: &[&[u32]], drop_one: bool| -> Result<(Tensor, Tensor)> {
        if drop_one {
            c.keep_sequences(&[1])?;
            g.keep_sequences(&[1])?;
        }
        Ok((gpu.next_token_logits(new, &mut g)?, cpu.next_token_logits(new, &mut c)?))
    };
    let mut results = vec![("prompt".to_string(), both(&[&a[..50], &b[..20]], false)?)];
    for i in 0..10 {
        results.push((format!("token {i}"), both(&[&a[50 + i..51 + i], &b[20 + i..21 + i]], false)?));
    }
    for i in 10..14 {
        results.push((format!("token {i} of one"), both(&[&b[20 + i..21 + i]], i == 10)?));
    }
    results.push(("three at once".into(), both(&[&b[34..37]], false)?));
    for (which, (got, want)) in results {
        checks.close(&format!("model {what}, with the cache: {which}"), &got, &want, tolerance)?;
    }
    generation(checks, what, gpu, &[a[..7].into(), b[..20].into(), a[30..60].into()])
}

/// Generation, whose passes begin before the host has seen the tokens, against pass by pass; and whether a sequence that
/// ends changes one that goes on.
fn generation(checks: &mut Checks, what: &str, gpu: &PeftModel, prompts: &[Vec<u32>]) -> Result<()> {
    const NEW: usize = 50;
    let greedy = GenerationConfig {
        max_new_tokens: Some(NEW),
        eos_token_id: Some(Vec::new()),
        seed: Some(5),
        ..Default::default()
    };
    let made = |config: &GenerationConfig| -> Result<Vec<Vec<u32>>> {
        Ok(generate(gpu, prompts, config, &mut |_, _| ())?.into_iter().map(|made| made.ids).collect())
    };
    let mut cache = gpu.new_cache(prompts.len())?;
    let mut step_by_step = vec![Vec::new(); prompts.len()];
    let mut new = prompts.to_vec();
    for _ in 0..NEW {
        let rows: Vec<&[u32]> = new.iter().map(Vec::as_slice).collect();
        let best = gpu.next_token_logits(&rows, &mut cache)?.argmax(1)?.to_vec1::<u32>()?;
        step_by_step.iter_mut().zip(&best).for_each(|(ids, id)| ids.push(*id));
        new = best.into_iter().map(|id| vec![id]).collect();
    }
    let differs = |got: &[Vec<u32>], want: &[Vec<u32>]| (got != want).then(|| format!("{got:?}, expected {want:?}"));
    checks.equal(&format!("model {what}: generation, pass by pass"), &[differs(&made(&greedy)?, &step_by_step)]);

    let sampled = GenerationConfig { do_sample: true, temperature: Some(1.5), ..greedy };
    let whole = made(&sampled)?;
    let end = whole[1][20];
    let until_end = |ids: &Vec<u32>| ids.iter().position(|id| *id == end).map_or(ids.clone(), |at| ids[..=at].to_vec());
    let want: Vec<Vec<u32>> = whole.iter().map(until_end).collect();
    let got = made(&GenerationConfig { eos_token_id: Some(vec![end]), ..sampled })?;
    checks.equal(&format!("model {what}: generation, ends at {end}"), &[differs(&got, &want)]);
    Ok(())
}
