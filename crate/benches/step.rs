//! Tokens/s of a QLoRA training step and of generation on the bundled model: the same prompts,
//! batches and settings as `scripts/bench_torch.py`, in the same form (one JSON line a
//! measurement), so that `scripts/bench` can put the two beside each other. Where SmolLM2-135M is
//! (`scripts/setup smollm2`), also a step on 4 x 128 tokens with adapters on q_proj, k_proj and v_proj, and
//! generation, of that model.
//!
//! cargo bench -p qlora-nb --bench step [-- --repeats 7] [-- --only smollm2_train]
//!
//! Seen on 2 cores of an AMD EPYC (Zen 5), tokens/s, programs in turn, each change on top of the one before:
//! - `gemm` with its AVX-512 kernels: training in NF4 9,400 to 10,600 became 12,800 to 15,000; SmolLM2 checkpointed
//!   220 became 330 to 380.
//! - A new token's pass on rayon's own threads: generation in NF4 700 to 785 became 950 to 1,055, in f32 725 to 845
//!   became 1,040 to 1,170. Passes that learn, there too: 10 to 30% faster, and up to 1.5 times the memory (the bundled
//!   model 62 MiB became 94), since each thread's heap keeps what was freed and the pass is not always on the same one.
//!
//! On 2 cores of an AMD EPYC (Zen 4: AVX-512, bf16, no AMX; a fused multiply-add of 512 bits a cycle), SmolLM2, tokens/s.
//! The machine's neighbours move single figures by 10 to 20 %.
//!
//! What the machine can do: 112 GFLOP/s a core in f32 and 224 in bf16 (a loop of the tile alone, in L2), 30 GB/s a core,
//! 46 both. A step of 4 x 128 is 276 GFLOP (385 with checkpointing, less 15 % for what is not computed again), so that
//! 224 GFLOP/s are 415 tokens/s, and 830 in bf16. A new token reads 53 MB of codes and 57 MB of head: 2.4 ms at 46 GB/s.
//!
//! - Tiles of 12 x 32 that read strips unpacked for them, in place of `gemm` on tiles of row-major f32: predicted 1.5 times,
//!   seen none at first (182 became 195): four fifths of a step were elsewhere. The tile ran at 104 GFLOP/s a thread.
//! - Freed memory kept (`mallopt`): predicted 5 %, seen 195 to 271: the system cleared a gigabyte of pages a step, with
//!   both threads waiting for one lock.
//! - Threads that wait awake and a caller who works, norms and sums on all threads, twice the rows of logits at a time,
//!   `down_proj` not computed again: 271 to 308, with checkpointing 206 to 238. The tile is 77 % of the time then.
//! - bf16: predicted 1.6 times, seen 1.45: 440, with checkpointing 357. The tile is half of the time; the rest is LoRA and
//!   attention in f32 (8 %), the head's bf16 widened and rounded again (5 %), zeroed memory, one thread at a time (5 %).
//! - Decoding: 66 at first. A division by the number of groups in a block, made for each group: no difference, it was
//!   hidden. Closures handed to `array::map` are not inlined where instructions are enabled by `target_feature`: 66 became
//!   53, and 67 with loops. Four rows at a time 76; fetched 4 KiB ahead, since a row of codes ends before the processor
//!   has noticed it, 80 to 99. Block maxima read by runs: no difference seen.
//!
//! On 2 cores of an AMD EPYC (Zen 5: two fused multiply-adds of 512 bits a cycle), SmolLM2, tokens/s:
//!
//! - The same program that reached torch's 1.5 times on Zen 4 was behind torch here: 267, 487 in bf16 (torch 309, 574), with
//!   90 % of the time in the tile. Its disassembly showed why: each of the 24 sums was stored at every step of the depth,
//!   since the loop that writes them out takes the array's address. A Zen 4 does a multiply-add and a store a cycle and hid
//!   it. Handing the array to a function of its own: no difference. Copying it first, element by element: predicted twice,
//!   seen 684 and 977, with checkpointing 214 and 383 became 529 and 810.
//! - Decoding: 159 to 180 became 175 to 188 when the products of codes became functions of their own, with block maxima made
//!   before: 90 vectors on the stack, now none. The loop alone takes 34 G codes a second and thread, half of which is seen.
//!   A loop over pointers in place of slices: 10 % slower.
//! - Left: four tenths of a token's time are not in products; a step in bf16 twice as fast as torch's asks for LoRA and attention in
//!   bf16 and a strip packed in it at once. No machine with AMX was at hand.

use std::{path::PathBuf, time::Instant};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    collator::Batch,
    collator::DataCollatorForSeq2Seq,
    dataset::{Dataset, Example},
    error::Result,
    model::CausalLM,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, ModelOptions},
    optim::{AdamW, Optim, clip_grad_norm},
    peft::{LoraConfig, PeftModel, get_peft_model},
    tokenizer::Features,
    tokenizer::{AutoTokenizer, Tokenizer},
    trainer::{PassOptions, Trainable},
};

const NEW_TOKENS: usize = 120;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).map(String::as_str);
    let repeats = value("--repeats").and_then(|n| n.parse().ok()).unwrap_or(7);
    let bench = Bench { repeats, only: value("--only").unwrap_or("").to_owned() };
    let notebooks = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../notebooks");
    let folder = notebooks.join("models/poet-bloom-zh");
    let tokenizer = AutoTokenizer::from_pretrained(&folder)?;
    let dataset = Dataset::load_from_disk(notebooks.join("data/poems_zh"))?;
    let batches = batches(&tokenizer, &dataset)?;
    for (name, nf4, checkpointing) in
        [("train_nf4_f32", true, false), ("train_nf4_f32_checkpointing", true, true), ("train_f32", false, false)]
    {
        train(name, &load(&folder, nf4)?, &batches, checkpointing, &bench)?;
    }
    let prompt = tokenizer.encode("Human: 写一首七言律诗。\n题目：江上对月\n\nAssistant: ")?.input_ids;
    for (name, nf4) in [("generate_f32_lora", false), ("generate_nf4_lora", true)] {
        let model = load(&folder, nf4)?;
        bench.measure(name, || generate(&model, &prompt))?;
    }
    let smollm2 = notebooks.join("models/SmolLM2-135M-Instruct");
    if smollm2.exists() {
        real(&smollm2, &bench)?;
    }
    std::env::var_os("QLORA_MODEL").map_or(Ok(()), |folder| another(&folder.into(), &bench))
}

/// A step of any BLOOM.
fn another(folder: &PathBuf, bench: &Bench) -> Result<()> {
    for (kind, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let options = ModelOptions { torch_dtype: dtype, quantization_config: Some(nf4(dtype)), ..Default::default() };
        let base = AutoModelForCausalLM::from_pretrained(folder, options)?;
        let model =
            get_peft_model(&base, &LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() })?;
        for (checkpointing, how) in [(false, ""), (true, "_checkpointing")] {
            train(&format!("model_train_nf4_{kind}{how}"), &model, &[batch_of_4()?], checkpointing, bench)?;
        }
    }
    Ok(())
}

fn nf4(bnb_4bit_compute_dtype: DType) -> BitsAndBytesConfig {
    BitsAndBytesConfig {
        load_in_4bit: true,
        bnb_4bit_use_double_quant: true,
        bnb_4bit_compute_dtype,
        ..Default::default()
    }
}

/// 4 rows of 128 tokens.
fn batch_of_4() -> Result<Batch> {
    let ids: Vec<u32> = (0..4 * 128).map(|i| 17 + i * 7919 % 49_000).collect();
    let ids = Tensor::from_vec(ids, (4, 128), &Device::Cpu)?;
    Batch::new(ids.clone(), ids.ones_like()?, ids.to_dtype(DType::I64)?)
}

fn real(folder: &PathBuf, bench: &Bench) -> Result<()> {
    let batch = batch_of_4()?;
    let prompt: Vec<u32> = (0..32).map(|i| 17 + i * 7919 % 49_000).collect();
    for (name, torch_dtype, quantization_config) in [
        ("nf4", DType::F16, Some(nf4(DType::F32))),
        ("nf4_bf16", DType::BF16, Some(nf4(DType::BF16))),
        ("f16", DType::F16, None),
    ] {
        let options = ModelOptions { torch_dtype, quantization_config, ..Default::default() };
        let base = AutoModelForCausalLM::from_pretrained(folder, options)?;
        let targets = ["q_proj", "k_proj", "v_proj"].into();
        let model = get_peft_model(&base, &LoraConfig { target_modules: targets, ..Default::default() })?;
        for (checkpointing, how) in [(false, ""), (true, "_checkpointing")] {
            train(&format!("smollm2_train_{name}{how}"), &model, std::slice::from_ref(&batch), checkpointing, bench)?;
        }
        bench.measure(&format!("smollm2_generate_{name}_lora"), || generate(&model, &prompt))?;
        let long: Vec<u32> = (0..512).map(|i| 17 + i * 7919 % 49_000).collect();
        bench.measure(&format!("smollm2_prefill_{name}_lora"), || {
            model.next_token_logits(&[&long], &mut model.new_cache(1)?)?;
            Ok(long.len() as f64)
        })?;
    }
    Ok(())
}

fn load(folder: &PathBuf, four_bits: bool) -> Result<PeftModel> {
    let options = ModelOptions { quantization_config: four_bits.then(|| nf4(DType::F32)), ..Default::default() };
    let base = AutoModelForCausalLM::from_pretrained(folder, options)?;
    get_peft_model(&base, &LoraConfig { r: 8, target_modules: ["query_key_value"].into(), ..Default::default() })
}

fn prompt(row: &Example) -> Result<String> {
    let question = format!("Human: {}\n{}", row.text("instruction")?, row.text("input")?);
    Ok(format!("{}\n\nAssistant: ", question.trim()))
}

/// The first 32 rows in batches of 4, padded to the longest.
fn batches(tokenizer: &Tokenizer, dataset: &Dataset) -> Result<Vec<Batch>> {
    let mut rows = Vec::new();
    for row in dataset.head(32).iter() {
        let answer = tokenizer.encode(&format!("{}{}", row.text("output")?, tokenizer.eos_token()))?;
        rows.push(Features::supervised(&tokenizer.encode(&prompt(&row)?)?, &answer, 256));
    }
    let collator = DataCollatorForSeq2Seq::new(tokenizer);
    rows.chunks(4).map(|rows| collator.collate(&rows.iter().collect::<Vec<_>>())).collect()
}

fn train(name: &str, model: &PeftModel, batches: &[Batch], gradient_checkpointing: bool, bench: &Bench) -> Result<()> {
    let params = model.trainable_parameters();
    let mut optimizer = AdamW::new(Optim::AdamWTorch, &params, (0.9, 0.999), 1e-8, 0.0)?;
    let mut tokens = 0f64;
    for batch in batches {
        tokens += f64::from(batch.attention_mask.sum_all()?.to_scalar::<u32>()?);
    }
    bench.measure(name, || {
        for batch in batches {
            params.iter().try_for_each(|p| p.zero_grad())?;
            let num_items = batch.num_label_tokens() as f64;
            model.forward_backward(batch, &PassOptions { num_items, gradient_checkpointing, dropout_key: 0 })?;
            let norm = clip_grad_norm(&params, 1.0)?;
            optimizer.step(1e-4, norm.scale)?;
        }
        Ok(tokens)
    })
}

/// Greedy, with the cache; the end token does not stop it.
fn generate(model: &PeftModel, prompt: &[u32]) -> Result<f64> {
    let mut cache = model.new_cache(1)?;
    let mut next = prompt.to_vec();
    for _ in 0..NEW_TOKENS {
        let logits = model.next_token_logits(&[&next], &mut cache)?.flatten_all()?.to_vec1::<f32>()?;
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        next = vec![best as u32];
    }
    Ok(NEW_TOKENS as f64)
}

struct Bench {
    repeats: usize,
    /// Names that begin so.
    only: String,
}

impl Bench {
    /// Prints the median tokens/s of so many calls, after one that warms up.
    fn measure(&self, name: &str, mut call: impl FnMut() -> Result<f64>) -> Result<()> {
        if !name.starts_with(&self.only) {
            return Ok(());
        }
        call()?;
        let mut rates = Vec::new();
        for _ in 0..self.repeats {
            let start = Instant::now();
            let tokens = call()?;
            rates.push(tokens / start.elapsed().as_secs_f64());
        }
        rates.sort_by(f64::total_cmp);
        let middle = rates[rates.len() / 2];
        let spread = (rates[rates.len() - 1] - rates[0]) / middle;
        println!("{{\"name\": \"{name}\", \"tokens_per_s\": {middle:.1}, \"spread\": {spread:.3}}}");
        Ok(())
    }
}
