//! Models in one GGUF file (llama.cpp's format): configuration, tokenizer and weights.
//!
//! candle reads the format and undoes its quantizations. What is ours: the names and the
//! configuration as Hugging Face has them, and the rows of q_proj and k_proj put back in their
//! order, which llama.cpp changes to rotate neighbouring elements.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek},
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::gguf_file::{Content, Value as Field},
};
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    quantized::with_f32,
};

/// Types of tensors that can be read.
const READABLE: [&str; 13] =
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

/// ggml's numbers of the types that candle does not know.
const OTHER_TYPES: [(u32, &str); 16] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
];

/// Where a path, or a folder, means a GGUF file: a file of that ending, or a folder that holds
/// one such file and no `instead` (`config.json`: then it is a folder in Hugging Face layout).
///
/// # Errors
/// [`Error::NotFound`] for a file that is not there, [`Error::InvalidArgument`] for a folder with
/// several.
pub fn find(name_or_path: &Path, instead: &str) -> Result<Option<PathBuf>> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if is_gguf(name_or_path) && !name_or_path.is_dir() {
        if name_or_path.is_file() {
            return Ok(Some(name_or_path.into()));
        }
        let remedy = "check the path; a relative path starts at the notebook's folder";
        return Err(Error::not_found("GGUF file", name_or_path, remedy));
    }
    if !name_or_path.is_dir() || name_or_path.join(instead).exists() {
        return Ok(None);
    }
    let entries = std::fs::read_dir(name_or_path).map_err(Error::io("read", name_or_path))?;
    let mut found: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| is_gguf(p)).collect();
    found.sort();
    match found.len() {
        0 => Ok(None),
        1 => Ok(found.pop()),
        n => {
            let names: Vec<_> = found.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy()).collect();
            let expected = format!("one GGUF file, there are {n}: {}", names.join(", "));
            let remedy = "give the path of one of them";
            Err(Error::argument("the model's folder", name_or_path.display(), &expected, remedy))
        }
    }
}

/// An opened GGUF file.
///
/// ```no_run
/// use qlora_nb::internals::models::gguf::Gguf;
/// let gguf = Gguf::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// println!("{:#}", gguf.config()?); // as the config.json of the same model
/// println!("{:?}", gguf.types()); // {"F32": 61, "Q4_1": 210, "Q8_0": 1}
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
pub struct Gguf {
    path: PathBuf,
    content: Content,
}

impl Gguf {
    /// Reads the header: metadata, and where the tensors are.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged file, [`Error::Unsupported`] for a tensor type that cannot
    /// be read and for one part of a model that is split into several files.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_path(path.as_ref())
    }

    fn open_path(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map(BufReader::new).map_err(Error::io("read", path))?;
        check_metadata(&mut file).map_err(|e| malformed(path, format!("its metadata: {e}")))?;
        file.rewind().map_err(Error::io("read", path))?;
        let content = Content::read(&mut file).map_err(|e| header_error(path, &first_line(&e)))?;
        let this = Self { path: path.into(), content };
        if this.number("split.count").is_some_and(|n| n > 1.0) {
            let got = format!("{}: one part of several", path.display());
            let remedy = "join the parts with llama.cpp's llama-gguf-split --merge";
            return Err(Error::unsupported("GGUF file", got, ["models in one file"], remedy));
        }
        Ok(this)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many tensors there are of each type.
    pub fn types(&self) -> std::collections::BTreeMap<String, usize> {
        let mut types = std::collections::BTreeMap::new();
        for info in self.content.tensor_infos.values() {
            *types.entry(type_name(info.ggml_dtype)).or_default() += 1;
        }
        types
    }

    /// config.json as Hugging Face has it for this model.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture other than llama, [`Error::Malformed`] for metadata
    /// that are missing.
    pub fn config(&self) -> Result<Value> {
        let architecture = self.text("general.architecture").unwrap_or_default();
        let experts = self.number("llama.expert_count").is_some_and(|n| n > 0.0);
        if architecture != "llama" || experts {
            let what = format!("architecture of {}", self.path.display());
            let got = if experts { "llama with experts" } else { &architecture };
            return Err(Error::unsupported(&what, got, ["llama"], "choose a model of a supported architecture"));
        }
        let need = |key: &str| {
            self.number(&format!("llama.{key}"))
                .ok_or_else(|| self.malformed(format!("there is no number llama.{key}")))
        };
        let size = |key: &str| need(key).map(|n| n as u64);
        let optional = |key: &str| self.number(&format!("llama.{key}"));
        let vocab = self.content.tensor_infos.get("token_embd.weight").and_then(|t| t.shape.dims().first().copied());
        let (heads, hidden) = (size("attention.head_count")?, size("embedding_length")?);
        let kv_heads = optional("attention.head_count_kv").map_or(heads, |n| n as u64);
        let head_dim = optional("attention.key_length").map_or(hidden / heads.max(1), |n| n as u64);
        let mut rope = self.rope_parameters(head_dim as usize)?;
        if let Some(rotated) = optional("rope.dimension_count").filter(|rotated| *rotated != head_dim as f64) {
            rope["partial_rotary_factor"] = (rotated / head_dim as f64).into();
        }
        let has = |name: &str| self.content.tensor_infos.contains_key(name);
        let layers = size("block_count")?;
        if !has(&format!("blk.{}.attn_norm.weight", layers.saturating_sub(1))) {
            return Err(self.malformed(format!("llama.block_count is {layers}, but that many blocks are not there")));
        }
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab.ok_or_else(|| self.malformed("there is no token_embd.weight".into()))?,
            "hidden_size": hidden,
            "intermediate_size": size("feed_forward_length")?,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": size("context_length")?,
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon")?,
            "rope_parameters": rope,
            "tie_word_embeddings": !has("output.weight"),
            "attention_bias": has("blk.0.attn_q.bias"),
            "mlp_bias": has("blk.0.ffn_up.bias"),
        });
        for (key, name) in
            [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id"), ("unknown", "unk_token_id")]
        {
            if let Some(id) = self.number(&format!("tokenizer.ggml.{key}_token_id")) {
                config[name] = (id as u64).into();
            }
        }
        Ok(config)
    }

    /// `rope_parameters` of config.json. A Llama 3.1 has its scaling as a tensor of factors.
    fn rope_parameters(&self, head_dim: usize) -> Result<Value> {
        let theta = self.number("llama.rope.freq_base").unwrap_or(10_000.0);
        // As llama.cpp has it: linear unless it is said, and a factor of 0 is none.
        let kind = self.text("llama.rope.scaling.type").unwrap_or_else(|| "linear".into());
        let factor = self.number("llama.rope.scaling.factor").or(self.number("llama.rope.scale_linear"));
        let factor = factor.filter(|factor| *factor != 0.0);
        let mut rope = json!({ "rope_theta": theta, "rope_type": "default" });
        if kind != "none" && (kind != "linear" || factor.is_some()) {
            (rope["rope_type"], rope["factor"]) = (kind.into(), factor.into());
        }
        let is_scaled = rope["rope_type"] != "default" && factor != Some(1.0);
        if let Some(factors) = self.read("rope_freqs.weight")? {
            let factors = factors.flatten_all()?.to_vec1::<f32>()?;
            let factor = factors.iter().copied().fold(1f32, f32::max);
            for (key, value) in [
                ("rope_type", json!("llama3")),
                ("factor", factor.into()),
                ("low_freq_factor", 1.0.into()),
                ("high_freq_factor", 4.0.into()),
                ("original_max_position_embeddings", 8192.into()),
            ] {
                rope[key] = value;
            }
            let ours = super::rope_scaling::RopeScaling::from_json(&Value::Null, &rope)?;
            let same = |(f, want): (&f32, &f32)| {
                (f64::from(*f) / ours.apply(f64::from(*f)) / f64::from(*want) - 1.0).abs() < 1e-3
            };
            // head_dim may be any number until the length is known to be that.
            let plain = || crate::backend::operands::Rope::frequencies(theta, head_dim);
            if is_scaled || factors.len() != head_dim / 2 || !plain().iter().zip(&factors).all(same) {
                let what = format!("rope_freqs.weight of {}", self.path.display());
                let remedy = "load the model from its folder in Hugging Face layout";
                return Err(Error::unsupported(&what, "other factors", ["those of Llama 3.1 to 3.3"], remedy));
            }
        }
        Ok(rope)
    }

    /// The names, as Hugging Face has them, of the tensors that have one.
    pub fn names(&self) -> Vec<String> {
        self.content.tensor_infos.keys().filter_map(|name| hf_name(name)).collect()
    }

    /// Those names, with the tensors' shapes.
    pub(super) fn shapes(&self) -> Vec<(String, &[usize])> {
        let infos = self.content.tensor_infos.iter();
        infos.filter_map(|(name, info)| Some((hf_name(name)?, info.shape.dims()))).collect()
    }

    /// A tensor by the name that Hugging Face has for it, in `dtype`; none if the file has no such
    /// tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] for another shape, [`Error::Unsupported`] for a type that cannot be read,
    /// [`Error::Malformed`] for one that goes beyond the file's end or holds a NaN.
    pub fn tensor(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Option<Tensor>> {
        let Some(gguf) = gguf_name(name) else { return Ok(None) };
        let Some(info) = self.content.tensor_infos.get(&gguf) else { return Ok(None) };
        if info.shape.dims() != shape {
            let (name, remedy) = (format!("{gguf} ({name})"), "the file is damaged: get it again");
            return Err(Error::shape(name, Some(&self.path), shape, info.shape.dims(), remedy));
        }
        let Some(mut tensor) = self.read(&gguf)? else { return Ok(None) };
        let heads = match () {
            () if gguf.contains(".attn_q.") => self.number("llama.attention.head_count"),
            () if gguf.contains(".attn_k.") => {
                self.number("llama.attention.head_count_kv").or(self.number("llama.attention.head_count"))
            }
            () => None,
        };
        if let Some(heads) = heads.map(|n| n as usize).filter(|n| *n > 0 && shape[0].is_multiple_of(2 * n)) {
            let rows = shape[0];
            // (heads, head_dim / 2, 2, in): neighbours are a pair; Hugging Face has the halves apart.
            let pairs = tensor.reshape((heads, rows / heads / 2, 2, shape[1..].iter().product::<usize>()))?;
            tensor = pairs.transpose(1, 2)?.contiguous()?.reshape(shape)?;
        }
        Ok(Some(tensor.to_dtype(dtype)?))
    }

    /// A tensor by its own name, in f32.
    fn read(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(info) = self.content.tensor_infos.get(name) else { return Ok(None) };
        let kind = type_name(info.ggml_dtype);
        if !READABLE.contains(&kind.as_str()) {
            return Err(unreadable(&self.path, name, &kind));
        }
        // candle multiplies the dimensions unchecked.
        let elements = info.shape.dims().iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if elements.is_none_or(|n| n == 0 || n > 1 << 40) {
            return Err(self.malformed(format!("{name} has the shape {:?}", info.shape.dims())));
        }
        let mut file = File::open(&self.path).map_err(Error::io("read", &self.path))?;
        let read = self.content.tensor(&mut file, name, &Device::Cpu).and_then(|t| t.dequantize(&Device::Cpu));
        let tensor = read.map_err(|e| self.malformed(format!("{name}: {}", first_line(&e))))?;
        if !with_f32(&tensor, |x| x.iter().fold(true, |ok, v| ok & v.is_finite()))? {
            return Err(self.malformed(format!("{name} has a NaN or an infinity")));
        }
        Ok(Some(tensor))
    }

    /// A string of the metadata.
    pub fn text(&self, key: &str) -> Option<String> {
        match self.content.metadata.get(key)? {
            Field::String(text) => Some(text.clone()),
            _ => None,
        }
    }

    /// A number of the metadata, whatever its width; true is 1.
    pub fn number(&self, key: &str) -> Option<f64> {
        number(self.content.metadata.get(key)?)
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Option<Vec<&str>> {
        let Field::Array(list) = self.content.metadata.get(key)? else { return None };
        list.iter().map(|v| if let Field::String(text) = v { Some(text.as_str()) } else { None }).collect()
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Option<Vec<f64>> {
        let Field::Array(list) = self.content.metadata.get(key)? else { return None };
        list.iter().map(number).collect()
    }

    pub(crate) fn malformed(&self, detail: String) -> Error {
        malformed(&self.path, detail)
    }
}

fn number(field: &Field) -> Option<f64> {
    Some(match field {
        Field::U8(v) => f64::from(*v),
        Field::I8(v) => f64::from(*v),
        Field::U16(v) => f64::from(*v),
        Field::I16(v) => f64::from(*v),
        Field::U32(v) => f64::from(*v),
        Field::I32(v) => f64::from(*v),
        Field::U64(v) => *v as f64,
        Field::I64(v) => *v as f64,
        // The shortest decimal: 1e-5 is written as an f32, and meant.
        Field::F32(v) => v.to_string().parse().ok()?,
        Field::F64(v) => *v,
        Field::Bool(v) => f64::from(u8::from(*v)),
        Field::String(_) | Field::Array(_) => return None,
    })
}

fn malformed(path: &Path, detail: String) -> Error {
    Error::malformed(path, "GGUF file", detail, "the file is damaged or half downloaded: get it again")
}

fn unreadable(path: &Path, tensor: &str, kind: &str) -> Error {
    let what = format!("type of {tensor} in {}", path.display());
    let remedy = "get the model in one of these types, Q4_1 or Q8_0 for example, or make them with llama-quantize";
    Error::unsupported(&what, kind, READABLE, remedy)
}

/// candle's message without its backtrace.
fn first_line(e: &candle_core::Error) -> String {
    e.to_string().lines().next().unwrap_or_default().into()
}

fn header_error(path: &Path, message: &str) -> Error {
    let unknown = message.strip_prefix("unknown dtype for tensor ").and_then(|n| n.trim().parse::<u32>().ok());
    match unknown {
        None => malformed(path, message.into()),
        Some(id) => {
            let name = OTHER_TYPES.iter().find(|(n, _)| *n == id).map(|(_, name)| name.to_string());
            unreadable(path, "a tensor", &name.unwrap_or_else(|| format!("ggml type {id}")))
        }
    }
}

/// More than the metadata, tokens and merges of any model.
const MOST_VALUES: u64 = 1 << 22;

/// Walks over the metadata for what candle does not check: that the alignment, by which it divides, is not 0, and that
/// there are not too many values, which take 32 bytes each in memory. All else it leaves to candle.
fn check_metadata(file: &mut BufReader<File>) -> io::Result<()> {
    const TEXT: u32 = 8;
    const LIST: u32 = 9;
    let [_magic, version] = [number_of(4, file)?, number_of(4, file)?];
    let length = |file: &mut BufReader<File>| number_of(if version == 1 { 4 } else { 8 }, file);
    let [_tensors, entries] = [length(file)?, length(file)?];
    let mut values = entries;
    for _ in 0..entries {
        let key_length = length(file)?;
        let key = taken(key_length, file)?;
        let key = String::from_utf8_lossy(&key);
        let key = key.trim_end_matches('\0');
        let (kind, count) = match number_of(4, file)? as u32 {
            LIST => (number_of(4, file)? as u32, length(file)?),
            kind => (kind, 1),
        };
        values = values.saturating_add(count);
        if kind == LIST || values > MOST_VALUES {
            let expected = format!("expected no list of lists, and at most {MOST_VALUES} values in the whole file");
            return Err(io::Error::other(format!("{key} has {count} values: {expected}")));
        }
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            _ => 0,
        };
        let value = taken(width * count, file)?;
        if key == "general.alignment" && width > 0 && value.iter().all(|byte| *byte == 0) {
            return Err(io::Error::other("general.alignment is 0"));
        }
        for _ in 0..if kind == TEXT { count } else { 0 } {
            let text_length = length(file)?;
            taken(text_length, file)?;
        }
    }
    Ok(())
}

/// The next bytes; fewer at the file's end.
fn taken(count: u64, file: &mut BufReader<File>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(count).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A number of so many bytes.
fn number_of(width: usize, file: &mut BufReader<File>) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes[..width])?;
    Ok(u64::from_le_bytes(bytes))
}

/// `Q4_1`, `Q6_K`: as llama.cpp writes the type.
fn type_name(dtype: candle_core::quantized::GgmlDType) -> String {
    let name = format!("{dtype:?}");
    match name.strip_suffix('K').filter(|n| n.starts_with('Q') && !n.contains('_')) {
        Some(bits) => format!("{bits}_K"),
        None => name,
    }
}

/// (Hugging Face, GGUF) of the parts of a block.
const BLOCK: [Pair; 9] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];

/// (Hugging Face, GGUF) of the parts around the blocks.
const AROUND: [Pair; 3] = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// (Hugging Face, GGUF) of the list of blocks.
const BLOCKS: Pair = ("model.layers", "blk");

fn gguf_name(hf: &str) -> Option<String> {
    translated(hf, |pair| pair)
}

fn hf_name(gguf: &str) -> Option<String> {
    translated(gguf, |(hf, gguf)| (gguf, hf))
}

/// A tensor's name in the other language; `direction` turns a pair of names to (from, to).
fn translated(name: &str, direction: fn(Pair) -> Pair) -> Option<String> {
    let find = |pairs: &[Pair], name: &str| pairs.iter().map(|p| direction(*p)).find(|(from, _)| *from == name);
    let (module, part) = name.rsplit_once('.')?;
    if let Some((_, to)) = find(&AROUND, module) {
        return Some(format!("{to}.{part}"));
    }
    let (blocks, to_blocks) = direction(BLOCKS);
    let (layer, module) = module.strip_prefix(blocks)?.strip_prefix('.')?.split_once('.')?;
    let (_, to) = find(&BLOCK, module)?;
    Some(format!("{to_blocks}.{layer}.{to}.{part}"))
}

type Pair = (&'static str, &'static str);
