//! A training step of the folder that QLORA_MODEL names: NF4 with double quantization, f16, rank 8 on
//! query_key_value, batches of 4 x 256, as `bloom.py` measures the Hugging Face stack.

use std::time::Instant;

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

use crate::bench::Bench;

pub fn load() -> Result<Option<PeftModel>> {
    let Some(folder) = std::env::var_os("QLORA_MODEL") else {
        println!("step, generation: skipped; QLORA_MODEL names no folder of a model");
        return Ok(None);
    };
    let quantization = BitsAndBytesConfig {
        load_in_4bit: true,
        bnb_4bit_use_double_quant: true,
        bnb_4bit_compute_dtype: DType::F16,
        ..Default::default()
    };
    let options = ModelOptions {
        torch_dtype: DType::F16,
        device_map: DeviceMap::Cuda(0),
        quantization_config: Some(quantization),
        ..Default::default()
    };
    let begin = Instant::now();
    let base = AutoModelForCausalLM::from_pretrained(std::path::Path::new(&folder), options)?;
    println!("load to NF4 on the card {:.2} s", begin.elapsed().as_secs_f64());
    let config = LoraConfig { r: 8, target_modules: ["query_key_value"].into(), ..Default::default() };
    get_peft_model(&base, &config).map(Some)
}

/// Rows of the given lengths, every token with a label.
fn batch(seed: u64, vocab: usize, lengths: &[usize]) -> Result<Batch> {
    let t = lengths.iter().copied().max().unwrap_or(1);
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % (vocab as u64 - 5)) as u32 + 5
    };
    let (mut ids, mut mask, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for &n in lengths {
        for i in 0..t {
            let real = i >= t - n;
            let id = if real { next() } else { 3 };
            ids.push(id);
            mask.push(u32::from(real));
            labels.push(if real { i64::from(id) } else { -100 });
        }
    }
    let (shape, cpu) = ((lengths.len(), t), &Device::Cpu);
    Batch::new(
        Tensor::from_vec(ids, shape, cpu)?,
        Tensor::from_vec(mask, shape, cpu)?,
        Tensor::from_vec(labels, shape, cpu)?,
    )
}

pub fn run(bench: &Bench) -> Result<()> {
    let Some(model) = load()? else { return Ok(()) };
    let vocab = model.vocab_size();
    let fixed: Vec<Batch> = (0..8).map(|i| batch(i, vocab, &[256; 4])).collect::<Result<_>>()?;
    let ragged: Vec<Batch> = (0..64usize)
        .map(|i| {
            let lengths: Vec<usize> = (0..4).map(|j| 32 + (i * 131 + j * 71) * 2_654_435_761 % 225).collect();
            batch(i as u64, vocab, &lengths)
        })
        .collect::<Result<_>>()?;
    for (name, batches) in [("4 x 256", &fixed), ("4 x 32..256", &ragged)] {
        for checkpointing in [true, false] {
            measure(bench, &model, name, batches, checkpointing)?;
        }
    }
    Ok(())
}

/// One recorded pass between the profiler's marks, for
/// `ncu --profile-from-start off --metrics gpu__time_duration.sum --csv gpu_bench profile`.
pub fn profile(bench: &Bench) -> Result<()> {
    use qlora_nb::candle_core::cuda_backend::cudarc::driver::sys::{cuProfilerStart, cuProfilerStop};
    let Some(model) = load()? else { return Ok(()) };
    let what = std::env::var("QLORA_PROFILE").unwrap_or_default();
    if what == "decode" {
        let mut cache = model.new_cache(1)?;
        let prompt: Vec<u32> = (100..332).collect();
        model.next_token_logits(&[&prompt], &mut cache)?;
        for i in 0..4 {
            // SAFETY: marks for a profiler; nothing else.
            unsafe { if i == 3 { cuProfilerStart() } else { cuProfilerStop() } };
            model.next_token_logits(&[&[7]], &mut cache)?;
        }
    } else {
        let batch = batch(1, model.vocab_size(), &[256; 4])?;
        let gradient_checkpointing = what == "checkpointing";
        let options = PassOptions { num_items: 1020.0, gradient_checkpointing, dropout_key: 1 };
        for i in 0..3 {
            // SAFETY: as above.
            unsafe { if i == 2 { cuProfilerStart() } else { cuProfilerStop() } };
            model.forward_backward(&batch, &options)?;
        }
    }
    bench.gpu.synchronize()
}

/// Windows of eight micro-batches, as accumulation makes them.
fn measure(bench: &Bench, model: &PeftModel, name: &str, batches: &[Batch], checkpointing: bool) -> Result<()> {
    let params = model.trainable_parameters();
    let pass = |batch: &Batch| {
        let options = PassOptions { num_items: 8.0 * 1020.0, gradient_checkpointing: checkpointing, dropout_key: 1 };
        model.forward_backward(batch, &options)
    };
    // Once launched, once recorded.
    for _ in 0..3 {
        batches.iter().try_for_each(|b| pass(b).map(drop))?;
    }
    bench.gpu.synchronize()?;
    bench.gpu.reset_peak()?;
    let mut samples = Vec::new();
    let mut loss = 0.0;
    for _ in 0..(if batches.len() > 8 { 5 } else { 15 }) {
        params.iter().try_for_each(|p| p.zero_grad())?;
        let begin = Instant::now();
        for batch in batches {
            loss = pass(batch)?.loss_sum;
        }
        samples.push(begin.elapsed().as_secs_f64() * 1e3 / batches.len() as f64);
    }
    samples.sort_by(f64::total_cmp);
    let mut tokens = 0f64;
    for batch in batches {
        tokens += f64::from(batch.attention_mask.sum_all()?.to_scalar::<u32>()?);
    }
    let median = samples[samples.len() / 2];
    println!(
        "step {name}, checkpointing {checkpointing}: {median:.2} ms a micro-batch ({:.2} to {:.2}), {:.0} tokens/s, peak {} MiB, loss {:.3}",
        samples[0],
        samples[samples.len() - 1],
        tokens / batches.len() as f64 / median * 1e3,
        bench.gpu.peak()? >> 20,
        loss / 1020.0,
    );
    Ok(())
}

/// Batch 1, 32 tokens of prompt and 200 new ones: sampled as `pipeline` does by default, greedy, and with a penalty, for
/// which all logits come to the CPU.
pub fn generation(_: &Bench) -> Result<()> {
    let Some(model) = load()? else { return Ok(()) };
    let prompt = [(100..132).collect::<Vec<u32>>()];
    let base = GenerationConfig {
        max_new_tokens: Some(200),
        eos_token_id: Some(Vec::new()),
        seed: Some(1),
        ..Default::default()
    };
    let sampled = GenerationConfig { do_sample: true, ..base.clone() };
    let penalty = GenerationConfig { repetition_penalty: Some(1.2), ..sampled.clone() };
    for (name, config) in [("sampled", &sampled), ("greedy", &base), ("with a penalty", &penalty)] {
        let mut samples = Vec::new();
        for _ in 0..6 {
            let begin = Instant::now();
            let made = generate(&model, &prompt, config, &mut |_, _| ())?;
            samples.push(made[0].ids.len() as f64 / begin.elapsed().as_secs_f64());
        }
        // The first also loads kernels.
        samples.remove(0);
        samples.sort_by(f64::total_cmp);
        println!("generation, {name}: {:.0} tokens/s ({:.0} to {:.0})", samples[2], samples[0], samples[4]);
    }
    Ok(())
}
