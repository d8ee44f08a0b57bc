//! Prints a hash of everything that the engine computes on the CPU for the bundled models: logits, losses, gradients,
//! generated tokens, files written. `scripts/same-numbers` compares what two checkouts print.
//!
//!     cargo run --release --example same_numbers -- REPOSITORY

use std::{error::Error, hash::Hasher, path::Path};

use qlora_nb::{
    prelude::*,
    trainer::{PassOptions, Trainable},
};

fn main() -> Result<(), Box<dyn Error>> {
    let root = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let root = Path::new(&root);
    let models = ["notebooks/models/poet-bloom-zh", "tests/fixtures/bloom_tiny", "tests/fixtures/llama_tiny"];
    for name in models {
        for (kind, options) in options() {
            one_model(&root.join(name), &format!("{name} {kind}"), options)?;
        }
    }
    training(root)
}

fn options() -> Vec<(&'static str, ModelOptions)> {
    let quantized = |torch_dtype, bnb_4bit_quant_type, bnb_4bit_use_double_quant| ModelOptions {
        torch_dtype,
        device_map: DeviceMap::Cpu,
        quantization_config: Some(BitsAndBytesConfig {
            load_in_4bit: true,
            bnb_4bit_quant_type,
            bnb_4bit_use_double_quant,
            ..Default::default()
        }),
        ..Default::default()
    };
    let plain = |torch_dtype| ModelOptions { torch_dtype, device_map: DeviceMap::Cpu, ..Default::default() };
    vec![
        ("f32", plain(DType::F32)),
        ("bf16", plain(DType::BF16)),
        ("f16, NF4 twice", quantized(DType::F16, QuantType::Nf4, true)),
        ("f32, FP4", quantized(DType::F32, QuantType::Fp4, false)),
    ]
}

/// FNV-1a: the same in every build, which the standard library's hash does not promise.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    }
}

fn say(name: &str, bytes: impl IntoIterator<Item = u8>) {
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    bytes.into_iter().for_each(|b| hash.write(&[b]));
    println!("{:016x} {name}", hash.finish());
}

fn numbers(name: &str, tensor: &Tensor) -> Result<(), Box<dyn Error>> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    say(name, values.into_iter().flat_map(f32::to_le_bytes));
    Ok(())
}

/// Rows of different lengths, padded on the left, the first quarter without labels.
fn batch(vocab: usize) -> Result<Batch, Box<dyn Error>> {
    let (rows, length) = (3, 90);
    let (mut ids, mut mask, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..rows {
        let real = [90, 71, 13][row];
        for t in 0..length {
            let id = ((row * 977 + t * 131) % (vocab - 4) + 4) as u32;
            let there = t >= length - real;
            ids.push(if there { id } else { 3 });
            mask.push(u32::from(there));
            labels.push(if there && t > length - real * 3 / 4 { i64::from(id) } else { -100 });
        }
    }
    let shape = (rows, length);
    let (ids, mask) = (Tensor::from_vec(ids, shape, &Device::Cpu)?, Tensor::from_vec(mask, shape, &Device::Cpu)?);
    Ok(Batch::new(ids, mask, Tensor::from_vec(labels, shape, &Device::Cpu)?)?)
}

fn one_model(folder: &Path, name: &str, options: ModelOptions) -> Result<(), Box<dyn Error>> {
    let base = AutoModelForCausalLM::from_pretrained(folder, options)?;
    let batch = batch(base.vocab_size())?;
    numbers(&format!("{name}: logits"), &base.logits(&batch.input_ids, Some(&batch.attention_mask))?)?;
    let config = LoraConfig { r: 4, lora_dropout: 0.1, target_modules: "all-linear".into(), ..Default::default() };
    let model = get_peft_model(&base, &config)?;
    for param in model.trainable_parameters().iter().filter(|p| p.name().contains("lora_B")) {
        let values: Vec<f32> = (0..param.value().elem_count()).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
        param.set(&Tensor::from_vec(values, param.value().dims(), &Device::Cpu)?)?;
    }
    for gradient_checkpointing in [false, true] {
        let options = PassOptions { num_items: 100.0, gradient_checkpointing, dropout_key: 7 };
        let pass = model.forward_backward(&batch, &options)?;
        say(&format!("{name}: loss, checkpointing {gradient_checkpointing}"), pass.loss_sum.to_le_bytes());
        for param in model.trainable_parameters() {
            numbers(&format!("{name}: gradient of {}, {gradient_checkpointing}", param.name()), param.grad())?;
            param.zero_grad()?;
        }
    }
    say(&format!("{name}: evaluation"), model.loss(&batch)?.loss_sum.to_le_bytes());
    let prompts: Vec<Vec<u32>> = vec![(5..25).collect(), (30..33).collect(), vec![9]];
    for (how, config) in [
        ("greedy", GenerationConfig { max_new_tokens: Some(40), ..Default::default() }),
        (
            "sampled",
            GenerationConfig {
                max_new_tokens: Some(40),
                do_sample: true,
                seed: Some(7),
                top_p: Some(0.9),
                repetition_penalty: Some(1.2),
                ..Default::default()
            },
        ),
    ] {
        let made = qlora_nb::pipeline::generate(&model, &prompts, &config, &mut |_, _| {})?;
        say(&format!("{name}: {how} tokens"), format!("{made:?}").into_bytes());
    }
    let out = tempfile::tempdir()?;
    model.save_pretrained(out.path().join("adapter"))?;
    model.merge_and_unload()?.save_pretrained(out.path().join("merged"))?;
    base.save_pretrained(out.path().join("base"))?;
    files(name, out.path())?;
    say(&format!("{name}: printed"), format!("{base}\n{model}\n{}", model.memory_report()).into_bytes());
    let listed: Vec<String> = model
        .named_parameters()
        .iter()
        .map(|(n, p)| format!("{n} {} {:?} {}", p.dtype(), p.dims(), p.requires_grad()))
        .collect();
    say(&format!("{name}: parameters"), listed.join("\n").into_bytes());
    Ok(())
}

/// Every file below a folder; what depends on the time or the place is left out.
fn files(name: &str, folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(|e| e.file_name());
    for entry in entries {
        let path = entry.path();
        let name = format!("{name}/{}", entry.file_name().to_string_lossy());
        if path.is_dir() {
            files(&name, &path)?;
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            say(&name, std::fs::read(&path)?);
        }
    }
    Ok(())
}

/// Twelve updates on the bundled poems, each optimizer.
fn training(root: &Path) -> Result<(), Box<dyn Error>> {
    let tokenizer = AutoTokenizer::from_pretrained(root.join("notebooks/models/poet-bloom-zh"))?;
    let rows = Dataset::load_from_disk(root.join("notebooks/data/poems_zh"))?;
    let rows = rows.slice(0..96);
    let rows = rows.map(|ex: &Example| {
        let prompt = tokenizer.encode(&format!("Human: {}\n\nAssistant: ", ex.text("instruction")?))?;
        let answer = tokenizer.encode(&format!("{}{}", ex.text("output")?, tokenizer.eos_token()))?;
        Ok(Features::supervised(&prompt, &answer, 128))
    })?;
    for optim in [Optim::AdamWTorch, Optim::PagedAdamW32bit, Optim::AdamW8bit] {
        let (_, options) = options().swap_remove(2);
        let base = AutoModelForCausalLM::from_pretrained(root.join("notebooks/models/poet-bloom-zh"), options)?;
        let model =
            get_peft_model(&base, &LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() })?;
        let out = tempfile::tempdir()?;
        let args = TrainingArguments {
            output_dir: out.path().into(),
            per_device_train_batch_size: 4,
            gradient_accumulation_steps: 2,
            max_steps: 12,
            save_steps: 12,
            logging_steps: 1,
            learning_rate: 1e-3,
            gradient_checkpointing: true,
            disable_tqdm: true,
            optim,
            ..Default::default()
        };
        let mut trainer = Trainer::new(&model, args, &rows, DataCollatorForSeq2Seq::new(&tokenizer))?;
        trainer.train()?;
        let losses: Vec<String> =
            trainer.log_history().iter().map(|e| format!("{:?} {:?}", e.get("loss"), e.get("grad_norm"))).collect();
        say(&format!("training with {optim}: log"), losses.join("\n").into_bytes());
        files(&format!("training with {optim}"), out.path())?;
    }
    Ok(())
}
