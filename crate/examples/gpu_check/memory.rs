//! The memory that was planned and the memory that was used; a card without room, and other machines that cannot
//! be used: an error that says what to do, and a process that lives on.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use qlora_nb::{
    candle_core::{Device, Tensor},
    internals::backend::cuda::{self, check_capability, check_driver},
    prelude::*,
};

use crate::{
    check::Checks,
    model::{BUNDLED as TOKENIZER, options},
};

/// The argument of the child process that must see no GPU, and of one that measures what was planned.
pub const WITHOUT_GPU: &str = "--without-gpu";
pub const PLAN: &str = "--memory-plan";

pub fn run(checks: &mut Checks) -> Result<()> {
    unusable(checks)?;
    let folder = std::env::temp_dir().join(format!("qlora-nb-gpu-check-memory-{}", std::process::id()));
    let done = std::fs::create_dir_all(&folder)
        .and_then(|()| write_bloom(&folder, &mut checks.rng))
        .map_err(qlora_nb::error::Error::io("write", &folder))
        .and_then(|()| plans(checks, &folder))
        .and_then(|()| no_room_to_load(checks, &folder))
        .and_then(|()| no_room_to_train(checks, &folder));
    // What is left of a failed run is in the system's own folder for such files.
    let _ = std::fs::remove_dir_all(&folder);
    done
}

/// What a text lacks of the words that it must have.
fn lacks(text: &str, words: &[&str]) -> Option<String> {
    let missing: Vec<&&str> = words.iter().filter(|w| !text.contains(**w)).collect();
    (!missing.is_empty()).then(|| format!("{missing:?} is not in: {text}"))
}

fn text<T>(result: Result<T>) -> String {
    result.map_or_else(|e| e.to_string(), |_| "no error".into())
}

fn unusable(checks: &mut Checks) -> Result<()> {
    let mut cases = vec![
        lacks(
            &text(DeviceMap::Cuda(99).device()),
            &["cuda:99 cannot be used", "the driver shows", "what to do", "DeviceMap"],
        ),
        lacks(&text(check_driver(0, 11_080)), &["CUDA 11.8", "this build for CUDA", "update the driver"]),
        lacks(&text(check_driver(0, 99_000)), &["no error"]),
        lacks(&text(check_capability(0, (7, 5))), &["7.5", "8.0", "DeviceMap::Cpu"]),
        lacks(&text(check_capability(0, (8, 0))), &["no error"]),
        lacks(&text(check_capability(0, (12, 1))), &["no error"]),
    ];
    let (_, choice) = DeviceMap::Auto.device()?;
    cases.push(lacks(&choice.unwrap_or_default(), &["device_map auto: cuda:0", &checks.gpu.name()]));
    // A machine whose driver shows no GPU.
    let program = std::env::current_exe().map_err(qlora_nb::error::Error::io("read", "the program"))?;
    let child = std::process::Command::new(program).arg(WITHOUT_GPU).env("CUDA_VISIBLE_DEVICES", "").output();
    let said = child.map_or_else(
        |e| e.to_string(),
        |output| {
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            format!("{}{out}{err}", output.status)
        },
    );
    let words = [
        "exit status: 0",
        "cuda:0 cannot be used: the driver shows no GPU",
        "device_map auto: cpu (the driver shows no GPU)",
    ];
    cases.push(lacks(&said, &words));
    checks.equal("GPUs that cannot be used", &cases);
    Ok(())
}

/// What the child process does.
pub fn without_gpu() -> Result<()> {
    println!("{}", text(DeviceMap::Cuda(0).device()));
    let (device, choice) = DeviceMap::Auto.device()?;
    println!("{}", choice.unwrap_or_default());
    assert!(device.is_cpu());
    Ok(())
}

const HIDDEN: usize = 1024;
const LAYERS: usize = 6;
const VOCAB: usize = 46_145;

/// A BLOOM of small random weights in f16: 123 million parameters.
fn write_bloom(folder: &Path, rng: &mut crate::check::Rng) -> std::io::Result<()> {
    let c = HIDDEN;
    let config = format!(
        "{{\"model_type\": \"bloom\", \"vocab_size\": {VOCAB}, \"hidden_size\": {c}, \"n_layer\": {LAYERS}, \
         \"n_head\": 16, \"layer_norm_epsilon\": 1e-5, \"eos_token_id\": 2, \"pad_token_id\": 3}}"
    );
    std::fs::write(folder.join("config.json"), config)?;
    let mut tensors = vec![("word_embeddings.weight".to_string(), vec![VOCAB, c])];
    let mut both = |name: String, shape: Vec<usize>| {
        tensors.push((format!("{name}.bias"), vec![shape[0]]));
        tensors.push((format!("{name}.weight"), shape));
    };
    both("word_embeddings_layernorm".into(), vec![c]);
    for i in 0..LAYERS {
        both(format!("h.{i}.input_layernorm"), vec![c]);
        both(format!("h.{i}.self_attention.query_key_value"), vec![3 * c, c]);
        both(format!("h.{i}.self_attention.dense"), vec![c, c]);
        both(format!("h.{i}.post_attention_layernorm"), vec![c]);
        both(format!("h.{i}.mlp.dense_h_to_4h"), vec![4 * c, c]);
        both(format!("h.{i}.mlp.dense_4h_to_h"), vec![c, 4 * c]);
    }
    both("ln_f".into(), vec![c]);
    let mut end = 0;
    let entries: Vec<String> = (tensors.iter())
        .map(|(name, shape)| {
            let begin = end;
            end += 2 * shape.iter().product::<usize>();
            format!("\"{name}\": {{\"dtype\": \"F16\", \"shape\": {shape:?}, \"data_offsets\": [{begin}, {end}]}}")
        })
        .collect();
    let header = format!("{{{}}}", entries.join(", "));
    let mut file = std::io::BufWriter::new(std::fs::File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (name, shape) in &tensors {
        let is_norm = name.contains("layernorm.weight") || name == "ln_f.weight";
        for _ in 0..shape.iter().product::<usize>().div_ceil(4) {
            // Signs and mantissas; the exponent is that of 1, or of 2^-6.
            let bits = if is_norm {
                0x3c00_3c00_3c00_3c00
            } else {
                rng.next() & 0x83ff_83ff_83ff_83ff | 0x2400_2400_2400_2400
            };
            file.write_all(&bits.to_le_bytes())?;
        }
    }
    file.flush()
}

fn load(folder: &Path, dtype: DType, nf4: bool) -> Result<Model> {
    AutoModelForCausalLM::from_pretrained(folder, options(dtype, nf4, DeviceMap::Cuda(0)))
}

/// Four rows of 250 tokens, all with labels, a micro-batch.
fn trainer(model: &PeftModel, output: PathBuf, gradient_checkpointing: bool) -> Result<Trainer> {
    let tokenizer = AutoTokenizer::from_pretrained(TOKENIZER)?;
    let rows: Vec<Features> = (0..24)
        .map(|r| {
            let ids: Vec<u32> = (0..250).map(|i| (r * 7919 + i * 104_729) % VOCAB as u32).collect();
            let labels = ids.iter().map(|&i| i64::from(i)).collect();
            Features { attention_mask: vec![1; ids.len()], labels, input_ids: ids }
        })
        .collect();
    let source = Dataset::from_columns([("row", (0..24i64).collect::<Vec<_>>())])?;
    let tokenized = source.map(|ex| Ok(rows[ex.int("row")? as usize].clone()))?;
    let args = TrainingArguments {
        output_dir: output,
        per_device_train_batch_size: 4,
        max_steps: 6,
        gradient_checkpointing,
        optim: Optim::AdamWTorch,
        save_strategy: SaveStrategy::No,
        disable_tqdm: true,
        ..Default::default()
    };
    Trainer::new(model, args, &tokenized, DataCollatorForSeq2Seq::new(&tokenizer))
}

fn adapted(base: &Model, modules: &[&str]) -> Result<PeftModel> {
    let (whole, linears): (Vec<&str>, Vec<&str>) = modules.iter().partition(|name| WHOLE.contains(*name));
    let modules_to_save = Some(whole.into_iter().map(String::from).collect());
    get_peft_model(base, &LoraConfig { r: 8, target_modules: linears.into(), modules_to_save, ..Default::default() })
}

const MODULES: [&str; 4] = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"];
/// Modules that learn whole.
const WHOLE: [&str; 2] = ["lm_head", "word_embeddings"];

/// What is loaded and trained: dtype, in 4 bits, adapted modules, gradient checkpointing.
const PLANS: [(DType, bool, &[&str], bool); 7] = [
    (DType::F16, true, MODULES.split_at(1).0, true),
    (DType::F16, true, MODULES.split_at(1).0, false),
    (DType::F16, false, MODULES.split_at(1).0, true),
    (DType::BF16, true, &MODULES, false),
    (DType::F32, true, &MODULES, true),
    (DType::F32, false, MODULES.split_at(1).0, false),
    (DType::F16, true, &["dense", "lm_head", "word_embeddings"], true),
];

/// Each in a process of its own: the peak of recorded passes is the process's.
fn plans(checks: &mut Checks, folder: &Path) -> Result<()> {
    let program = std::env::current_exe().map_err(qlora_nb::error::Error::io("read", "the program"))?;
    for (i, (dtype, nf4, modules, checkpointing)) in PLANS.into_iter().enumerate() {
        let child = std::process::Command::new(&program).arg(PLAN).arg(i.to_string()).arg(folder).output();
        let output = child.map_err(qlora_nb::error::Error::io("read", &program))?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_string();
        let numbers: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let off = |planned: f64, measured: f64| (planned / measured - 1.0).abs();
        let found = match numbers[..] {
            [loaded, reported, planned, peak] => {
                let text = format!(
                    "loaded {loaded:.1} MiB, reported {reported:.1}; peak {peak:.1} MiB, planned {planned:.1} ({:+.1}%)",
                    100.0 * (planned / peak - 1.0)
                );
                println!("       {text}");
                (off(reported, loaded) > 0.03 || off(planned, peak) > 0.1).then_some(text)
            }
            _ => Some(format!("{} {said} {}", output.status, String::from_utf8_lossy(&output.stderr))),
        };
        let (bits, count) = (if nf4 { " NF4" } else { "" }, modules.len());
        let what = format!("memory plan, {}{bits}, {count} adapted, checkpointing {checkpointing}", dtype.as_str());
        checks.equal(&what, &[found]);
    }
    Ok(())
}

/// What the child process does: MiB that the model took and was reported to take, that a run was planned to take
/// and took at most.
pub fn plan(arguments: &[String]) -> Result<()> {
    let [which, folder] = arguments else { return Ok(()) };
    let (folder, which) = (Path::new(folder), which.parse().unwrap_or(0));
    let (dtype, nf4, modules, checkpointing) = PLANS[which];
    let gpu = cuda::of(&cuda::device(0)?)?;
    let before = gpu.used()?;
    let base = load(folder, dtype, nf4)?;
    let (loaded, reported) = (gpu.used()? - before, base.memory_report().total());
    let model = adapted(&base, modules)?;
    let mut trainer = trainer(&model, folder.join("out"), checkpointing)?;
    let plan = trainer.memory_plan()?;
    // Launched, then recorded, then repeated.
    trainer.train_steps(3)?;
    gpu.reset_peak()?;
    trainer.train_steps(3)?;
    let peak = gpu.peak()?;
    eprintln!("{plan}");
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    println!("{} {} {} {}", mib(loaded), mib(reported), mib(plan.total()), mib(peak));
    Ok(())
}

/// Takes the card's memory until about `leave` bytes are left.
fn ballast(checks: &Checks, leave: usize) -> Result<Vec<Tensor>> {
    let mut pieces = Vec::new();
    let mut size = checks.gpu.available()?.saturating_sub(leave);
    while size >= 1 << 20 && checks.gpu.available()? > leave {
        match cuda::uninit(checks.gpu, size.min(checks.gpu.available()? - leave), DType::U8) {
            Ok(piece) => pieces.push(piece),
            Err(_) => size /= 2,
        }
    }
    Ok(pieces)
}

fn no_room_to_load(checks: &mut Checks, folder: &Path) -> Result<()> {
    let mut cases = Vec::new();
    {
        let _ballast = ballast(checks, 64 << 20)?;
        for (dtype, words) in [
            (DType::F16, &["loading", "GiB are free", "load_in_4bit and bnb_4bit_use_double_quant", "what to do"][..]),
            (DType::F32, &["DType::F16 needs 0.2", "load_in_4bit", "nvidia-smi"][..]),
        ] {
            cases.push(lacks(&text(load(folder, dtype, false)), words));
        }
        // Other tensors.
        let other = Tensor::zeros(1 << 28, DType::F32, &checks.device).map_err(qlora_nb::error::Error::from);
        cases.push(lacks(&text(other), &["the GPU is out of memory", "what to do"]));
        let other = cuda::zeros(checks.gpu, 1 << 28, DType::F32);
        cases.push(lacks(&text(other), &["the GPU is out of memory", "1024.0 MiB", "are free"]));
    }
    checks.gpu.trim()?;
    cases.push(load(folder, DType::F16, false).err().map(|e| format!("with room again: {e}")));
    checks.equal("no room to load, and room again", &cases);
    Ok(())
}

fn no_room_to_train(checks: &mut Checks, folder: &Path) -> Result<()> {
    let base = load(folder, DType::F16, true)?;
    let values = |model: &PeftModel| -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for p in qlora_nb::trainer::Trainable::trainable_parameters(model) {
            all.extend(p.value().to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(all)
    };
    let model = adapted(&base, &["query_key_value"])?;
    trainer(&model, folder.join("out"), false)?.train()?;
    let expected = values(&model)?;

    let model = adapted(&base, &["query_key_value"])?;
    let mut trainer = trainer(&model, folder.join("out"), false)?;
    let words = [
        "the GPU is out of memory",
        "memory_plan() says",
        "gradient_checkpointing: true saves",
        "per_device_train_batch_size: 2",
    ];
    let mut cases = Vec::new();
    {
        let _ballast = ballast(checks, 8 << 20)?;
        cases.push(lacks(&text(trainer.train()), &[&words[..], &["in update 1"]].concat()));
    }
    // The first update is launched. The second is recorded, in memory that the first has given back: that may be enough.
    trainer.train_steps(1)?;
    {
        let _ballast = ballast(checks, 8 << 20)?;
        cases.push(match trainer.train_steps(1) {
            Ok(_) => None,
            failed => lacks(&text(failed), &[&words[..], &["in update 2"]].concat()),
        });
    }
    trainer.train()?;
    let steps = trainer.state().global_step;
    cases.push((steps != 6).then(|| format!("{steps} updates")));
    let differ = values(&model)?.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    cases.push((differ > 0).then(|| format!("{differ} weights differ from those of a run with room")));
    checks.equal("no room to train, and room again", &cases);
    Ok(())
}
