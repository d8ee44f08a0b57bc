//! Reads a checkpoint's tensors one at a time, from one safetensors file or several.
//!
//! Files are read, not mapped: a mapped page that was touched counts as the process's
//! memory, and the point of 4-bit loading is that the whole model never sits there. The most
//! that exists at once besides the model is one tensor in the model's own dtype. A GPU's tensors
//! go to it in pieces: nothing of their size is ever in the process's memory.

#[cfg(feature = "cuda")]
mod cuda;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::Dtype as FileDtype;

use crate::{
    error::{Error, Result},
    hub::Snapshot,
    models::{gguf::Gguf, options::BitsAndBytesConfig},
    quant::QuantizedTensor,
};

/// Elements converted at a time: a buffer that does not count beside a tensor.
const CHUNK: usize = 1 << 16;

/// Tensors of at most so many bytes are converted here before they go to a GPU: a launch would take longer.
#[cfg(feature = "cuda")]
const SMALL: u64 = 64 << 10;

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    dtype: FileDtype,
    shape: Vec<usize>,
    /// First and last byte in the file.
    bytes: (u64, u64),
}

/// The tensors of a checkpoint, by name.
pub struct Weights {
    files: Vec<PathBuf>,
    entries: BTreeMap<String, Entry>,
    /// Instead of `entries`.
    gguf: Option<Gguf>,
    used: BTreeSet<String>,
    missing: Vec<String>,
    prefix: &'static str,
    device: Device,
    /// Made when the first large tensor is read to a GPU.
    #[cfg(feature = "cuda")]
    reader: std::cell::OnceCell<cuda::Reader>,
}

impl Weights {
    /// Finds a model's weights: one file, or the shards that an index lists.
    pub fn of(snapshot: &Snapshot) -> Result<Self> {
        if let Some(path) = snapshot.optional_file("model.safetensors")? {
            return Self::open(vec![path]);
        }
        let index = snapshot.file("model.safetensors.index.json")?;
        let bytes = std::fs::read(&index).map_err(Error::io("read", &index))?;
        let bad = |detail: String| Error::Malformed {
            path: index.clone(),
            format: "index of safetensors shards",
            detail,
            remedy: "the file is damaged or half downloaded: get it again".into(),
        };
        let index: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        let map = index["weight_map"].as_object().ok_or_else(|| bad("there is no weight_map".into()))?;
        let shards: BTreeSet<&str> = map.values().filter_map(|v| v.as_str()).collect();
        Self::open(shards.into_iter().map(|name| snapshot.file(name)).collect::<Result<_>>()?)
    }

    /// Opens the files and reads their headers.
    pub fn open(files: Vec<PathBuf>) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for (file, path) in files.iter().enumerate() {
            read_header(path, file, &mut entries)?;
        }
        Ok(Self { entries, ..Self::empty(files) })
    }

    /// The tensors of a GGUF file, under Hugging Face's names.
    pub fn of_gguf(gguf: Gguf) -> Self {
        let files = vec![gguf.path().to_path_buf()];
        Self { gguf: Some(gguf), ..Self::empty(files) }
    }

    fn empty(files: Vec<PathBuf>) -> Self {
        Self {
            files,
            entries: BTreeMap::new(),
            gguf: None,
            used: BTreeSet::new(),
            missing: Vec::new(),
            prefix: "",
            device: Device::Cpu,
            #[cfg(feature = "cuda")]
            reader: Default::default(),
        }
    }

    /// The same, read to `device`.
    pub fn on(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// A table of embeddings `[rows, width]`. On a GPU its memory has zero rows up to a multiple of
    /// 64 behind it, because a head of an odd size makes slow products.
    pub fn table(&mut self, name: &str, &[rows, width]: &[usize; 2], dtype: DType) -> Result<Tensor> {
        let padded = if self.device.is_cpu() { rows } else { rows.next_multiple_of(64) };
        self.padded(name, &[rows, width], dtype, padded * width)
    }

    /// Accepts names with or without `prefix` in the file: the model asks with it.
    pub fn optional_prefix(&mut self, prefix: &'static str) {
        if self.gguf.is_none() && !self.entries.keys().any(|k| k.starts_with(prefix)) {
            self.prefix = prefix;
        }
    }

    fn key<'a>(&self, name: &'a str) -> &'a str {
        name.strip_prefix(self.prefix).unwrap_or(name)
    }

    /// Whether the checkpoint has this tensor.
    pub fn contains(&self, name: &str) -> bool {
        match &self.gguf {
            Some(gguf) => gguf.names().iter().any(|n| n == name),
            None => self.entries.contains_key(self.key(name)),
        }
    }

    /// A tensor in `dtype`, of the given shape. A tensor that is not there is noted and
    /// reported with all others by [`Weights::finish`]; meanwhile zeros stand for it.
    pub fn tensor(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.padded(name, shape, dtype, 0)
    }

    /// [`Weights::tensor`], in memory of at least `elements` elements; on a GPU only.
    fn padded(&mut self, name: &str, shape: &[usize], dtype: DType, elements: usize) -> Result<Tensor> {
        let key = self.key(name).to_string();
        if let Some(gguf) = &self.gguf {
            let Some(tensor) = gguf.tensor(&key, shape, dtype)? else {
                self.missing.push(key);
                return Ok(Tensor::zeros(shape, dtype, &self.device)?);
            };
            self.used.insert(key);
            return self.with_padding(&tensor, elements);
        }
        let Some(entry) = self.entries.get(&key) else {
            self.missing.push(key);
            return Ok(Tensor::zeros(shape, dtype, &self.device)?);
        };
        if entry.shape != shape {
            return Err(Error::Shape {
                name: key,
                path: Some(self.files[entry.file].clone()),
                expected: shape.to_vec(),
                got: entry.shape.clone(),
                remedy: "config.json and the weights must come from the same model".into(),
            });
        }
        let tensor = self.read(&key, entry, dtype, elements)?;
        self.used.insert(key);
        Ok(tensor)
    }

    /// A copy on the device, which has room for `elements` elements there: those behind its own are zeros.
    fn with_padding(&self, tensor: &Tensor, elements: usize) -> Result<Tensor> {
        let n = tensor.elem_count();
        if self.device.is_cpu() || elements <= n {
            return Ok(tensor.to_device(&self.device)?);
        }
        let padded = Tensor::zeros(elements, tensor.dtype(), &self.device)?;
        padded.slice_set(&tensor.to_device(&self.device)?.flatten_all()?, 0, 0)?;
        Ok(padded.narrow(0, 0, n)?.reshape(tensor.shape())?)
    }

    fn read(&self, key: &str, entry: &Entry, dtype: DType, elements: usize) -> Result<Tensor> {
        let path = &self.files[entry.file];
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() && (entry.bytes.1 - entry.bytes.0 > SMALL || elements > 0) {
            let reader = match self.reader.get() {
                Some(reader) => reader,
                None => {
                    let made = cuda::Reader::new(&self.device)?;
                    self.reader.get_or_init(|| made)
                }
            };
            return reader.read(path, key, entry, dtype, elements);
        }
        let _ = elements;
        Ok(read(path, key, entry, dtype)?.to_device(&self.device)?)
    }

    /// A linear layer's weight `[out, in]`, quantized as it is read when `quantization` says
    /// so. A checkpoint that is already quantized is taken as it is.
    pub fn linear(
        &mut self,
        module: &str,
        (out, input): (usize, usize),
        dtype: DType,
        quantization: Option<&BitsAndBytesConfig>,
    ) -> Result<crate::layers::linear::Weight> {
        use crate::layers::linear::Weight;
        let name = format!("{module}.weight");
        if let Some(quantized) = self.prequantized(&name, (out, input))? {
            return Ok(Weight::Quantized(quantized));
        }
        let dense = self.tensor(&name, &[out, input], dtype)?;
        let Some(config) = quantization.filter(|q| q.load_in_4bit) else { return Ok(Weight::Dense(dense)) };
        let (kind, double) = (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant);
        Ok(Weight::Quantized(QuantizedTensor::quantize(&dense, kind, BLOCKSIZE, double)?))
    }

    /// A weight that bitsandbytes saved in 4 bits.
    fn prequantized(&mut self, name: &str, shape: (usize, usize)) -> Result<Option<QuantizedTensor>> {
        let key = self.key(name).to_string();
        let mut used = Vec::new();
        let quantized = QuantizedTensor::from_tensors(&key, |name| {
            let Some(entry) = self.entries.get(name) else { return Ok(None) };
            used.push(name.to_string());
            let dtype = if entry.dtype == FileDtype::U8 { DType::U8 } else { DType::F32 };
            self.read(name, entry, dtype, 0).map(Some)
        })?;
        let Some(quantized) = quantized else { return Ok(None) };
        if quantized.shape() != [shape.0, shape.1] {
            return Err(Error::Shape {
                name: key,
                path: None,
                expected: vec![shape.0, shape.1],
                got: quantized.shape().to_vec(),
                remedy: "config.json and the weights must come from the same model".into(),
            });
        }
        self.used.extend(used);
        Ok(Some(quantized))
    }

    /// Marks a tensor as known though it is not read (a tied copy, a buffer that is computed).
    pub fn ignore(&mut self, name: &str) {
        let key = self.key(name).to_string();
        self.used.insert(key);
    }

    /// Fails if anything was missing; gives the names that the model did not ask for.
    pub fn finish(self) -> Result<Vec<String>> {
        let names = self.gguf.iter().flat_map(Gguf::names).chain(self.entries.into_keys());
        let unexpected: Vec<String> = names.filter(|k| !self.used.contains(k)).collect();
        if self.missing.is_empty() {
            return Ok(unexpected);
        }
        let path = self.files.into_iter().next().unwrap_or_default();
        let remedy = "download the checkpoint again, or check that config.json belongs to it".into();
        Err(Error::KeyMismatch { path, missing: self.missing, unexpected, remedy })
    }
}

/// Block of 4-bit quantization; bitsandbytes' `Linear4bit` has no other.
const BLOCKSIZE: usize = 64;

/// Reads one tensor in `dtype`.
fn read(path: &Path, key: &str, entry: &Entry, dtype: DType) -> Result<Tensor> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    file.seek(SeekFrom::Start(entry.bytes.0)).map_err(Error::io("read", path))?;
    let count: usize = entry.shape.iter().product();
    let mut source = Source { file, path, key, dtype: entry.dtype, buffer: Vec::new() };
    let shape = entry.shape.as_slice();
    Ok(match dtype {
        DType::F32 => Tensor::from_vec(source.all(count, |v: f32| v)?, shape, &Device::Cpu)?,
        DType::F16 => Tensor::from_vec(source.all(count, f16::from_f32)?, shape, &Device::Cpu)?,
        DType::BF16 => Tensor::from_vec(source.all(count, bf16::from_f32)?, shape, &Device::Cpu)?,
        DType::U8 => Tensor::from_vec(source.raw(count)?, shape, &Device::Cpu)?,
        other => return Err(unsupported(other)),
    })
}

fn unsupported(dtype: DType) -> Error {
    Error::Unsupported {
        what: "torch_dtype".into(),
        got: format!("{dtype:?}"),
        supported: ["F32", "F16", "BF16"].map(String::from).into(),
        remedy: "load the model in one of these".into(),
    }
}

/// A tensor's bytes in its file.
struct Source<'a> {
    file: File,
    path: &'a Path,
    key: &'a str,
    dtype: FileDtype,
    buffer: Vec<u8>,
}

impl Source<'_> {
    fn raw(&mut self, bytes: usize) -> Result<Vec<u8>> {
        let mut data = vec![0u8; bytes];
        self.file.read_exact(&mut data).map_err(Error::io("read", self.path))?;
        Ok(data)
    }

    /// Reads `count` numbers a chunk at a time, converting each. f16 to f16 and bf16 to bf16
    /// pass through f32 unchanged.
    fn all<T>(&mut self, count: usize, convert: impl Fn(f32) -> T) -> Result<Vec<T>> {
        let mut out = Vec::with_capacity(count);
        while out.len() < count {
            let n = CHUNK.min(count - out.len());
            let width = match self.dtype {
                FileDtype::F32 => 4,
                FileDtype::F16 | FileDtype::BF16 => 2,
                other => return Err(not_float(self.path, self.key, other)),
            };
            self.buffer.resize(n * width, 0);
            self.file.read_exact(&mut self.buffer).map_err(Error::io("read", self.path))?;
            let first = out.len();
            let mut finite = true;
            let mut push = |v: f32| {
                finite &= v.is_finite();
                out.push(convert(v));
            };
            let two = self.buffer.chunks_exact(2).map(|b| [b[0], b[1]]);
            match self.dtype {
                FileDtype::F32 => {
                    self.buffer.chunks_exact(4).for_each(|b| push(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                }
                FileDtype::F16 => two.for_each(|b| push(f16::from_le_bytes(b).to_f32())),
                _ => two.for_each(|b| push(bf16::from_le_bytes(b).to_f32())),
            }
            if !finite {
                return Err(finite_error(self.path, self.key, first, count));
            }
        }
        Ok(out)
    }
}

fn not_float(path: &Path, key: &str, dtype: FileDtype) -> Error {
    malformed(path, format!("{key} holds {dtype:?}, not floating point"))
}

/// Of `count` elements, one near `index` is not finite.
fn finite_error(path: &Path, key: &str, index: usize, count: usize) -> Error {
    let first = index / CHUNK * CHUNK;
    let end = count.min(first + CHUNK);
    malformed(path, format!("{key} has a NaN or an infinity among elements {first}..{end}"))
}

fn malformed(path: &Path, detail: String) -> Error {
    Error::Malformed {
        path: path.into(),
        format: "safetensors file",
        detail,
        remedy: "the file is damaged or half downloaded: get it again".into(),
    }
}

/// Reads the header of one file: 8 bytes of length, then JSON.
fn read_header(path: &Path, index: usize, entries: &mut BTreeMap<String, Entry>) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let size = file.metadata().map_err(Error::io("read", path))?.len();
    let mut length = [0u8; 8];
    if size < 8 {
        return Err(malformed(path, format!("{size} bytes are too few for a header")));
    }
    file.read_exact(&mut length).map_err(Error::io("read", path))?;
    let length = u64::from_le_bytes(length);
    if length > size - 8 {
        return Err(malformed(path, format!("the header says {length} bytes, the file has {size}")));
    }
    let mut header = vec![0u8; length as usize];
    file.read_exact(&mut header).map_err(Error::io("read", path))?;
    let metadata: safetensors::tensor::Metadata =
        serde_json::from_slice(&header).map_err(|e| malformed(path, format!("header: {e}")))?;
    let data = 8 + length;
    let mut end = data;
    for (name, info) in metadata.tensors() {
        let bytes = (data + info.data_offsets.0 as u64, data + info.data_offsets.1 as u64);
        let elements: usize = info.shape.iter().product();
        if bytes.1 > size {
            return Err(malformed(path, format!("{name} ends at byte {}, the file has {size}", bytes.1)));
        }
        if (elements * info.dtype.bitsize()).div_ceil(8) as u64 != bytes.1.saturating_sub(bytes.0) {
            return Err(malformed(path, format!("{name}: shape {:?} does not fill its bytes", info.shape)));
        }
        end = end.max(bytes.1);
        let entry = Entry { file: index, dtype: info.dtype, shape: info.shape.clone(), bytes };
        entries.insert(name, entry);
    }
    if end != size {
        return Err(malformed(path, format!("the tensors end at byte {end}, the file has {size}")));
    }
    Ok(())
}
