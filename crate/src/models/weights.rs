//! Reads a checkpoint's tensors one at a time, from one safetensors file or several.
//!
//! Files are read, not mapped: a mapped page that was touched counts as the process's
//! memory, and the point of 4-bit loading is that the whole model never sits there. All threads
//! read, a piece each: what becomes 4-bit is quantized piece by piece, what goes to a GPU goes to it
//! piece by piece, and nothing of a tensor's size exists besides the model. (A GGUF file's tensors are
//! decoded one at a time.)

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use safetensors::Dtype as FileDtype;

use crate::{
    backend::{self, DeviceReader, FileTensor, operands::Weight},
    error::{Error, Result},
    hub::Snapshot,
    interrupt,
    models::{
        gguf::Gguf,
        options::{BitsAndBytesConfig, ModelOptions},
    },
    quantized::{NESTED_BLOCKSIZE, QuantType, QuantizedTensor, filled, is_float, round_all},
    safe_file::is_inside,
};

/// Tensors of at most so many bytes are converted here before they go to a GPU: a launch would take longer.
const SMALL: u64 = 64 << 10;

/// What an interrupt stops.
const LOADING: &str = "loading the model";
/// Of a remedy.
const DAMAGED: &str = "the file is damaged or half downloaded: get it again";
const OTHER_MODEL: &str = "config.json and the weights must come from the same model";

/// An error names a number that is not finite among so many.
const CHUNK: usize = 1 << 16;
/// Elements that are read and converted at a time: their bytes stay in the cache.
const PIECE: usize = 1 << 14;

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
    /// Reads straight to a GPU; made when the first large tensor is read.
    reader: OnceCell<Option<Box<dyn DeviceReader>>>,
}

impl Weights {
    /// Finds a model's weights: one file, or the shards that an index lists.
    pub fn of(snapshot: &Snapshot) -> Result<Self> {
        if let Some(path) = snapshot.optional_file("model.safetensors")? {
            return Self::open(vec![path]);
        }
        let index = snapshot.file("model.safetensors.index.json")?;
        let bytes = std::fs::read(&index).map_err(Error::io("read", &index))?;
        let bad = |detail: String| Error::malformed(&index, "index of safetensors shards", detail, DAMAGED);
        let content: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        let map = content["weight_map"].as_object().ok_or_else(|| bad("there is no weight_map".into()))?;
        let shard = |(tensor, name): (&String, &'_ serde_json::Value)| {
            let name = name.as_str().filter(|name| is_inside(name));
            name.map(String::from).ok_or_else(|| bad(format!("{tensor} is in no file of the model's folder")))
        };
        let shards: BTreeSet<String> = map.iter().map(shard).collect::<Result<_>>()?;
        Self::open(shards.iter().map(|name| snapshot.file(name)).collect::<Result<_>>()?)
    }

    /// Opens the files and reads their headers.
    pub fn open(files: Vec<PathBuf>) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for (file, path) in files.iter().enumerate() {
            for (name, entry) in read_header(path, file)? {
                if let Some(earlier) = entries.insert(name.clone(), entry) {
                    let detail = format!("{name} is in {} too", files[earlier.file].display());
                    let remedy = "remove the file that does not belong to the model, or get the model again";
                    return Err(Error::malformed(path, "safetensors file", detail, remedy));
                }
            }
        }
        Ok(Self { entries, ..Self::empty(files) })
    }

    /// The largest dimension of a tensor.
    pub fn longest_side(&self) -> usize {
        self.entries.values().flat_map(|entry| entry.shape.iter().copied()).max().unwrap_or(0)
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
            reader: OnceCell::new(),
        }
    }

    /// The same, read to `device`.
    pub fn on(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    fn reader(&self) -> Result<Option<&dyn DeviceReader>> {
        if let Some(reader) = self.reader.get() {
            return Ok(reader.as_deref());
        }
        let made = backend::of(&self.device)?.reader()?;
        Ok(self.reader.get_or_init(|| made).as_deref())
    }

    /// A table of embeddings `[rows, width]`. On a GPU its memory has zero rows up to a multiple of
    /// 64 behind it, because a head of an odd size makes slow products.
    pub fn table(&mut self, name: &str, &[rows, width]: &[usize; 2], dtype: DType) -> Result<Tensor> {
        let padded = rows.next_multiple_of(backend::of(&self.device)?.row_padding());
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

    /// How many tensors the checkpoint has.
    pub fn count(&self) -> usize {
        self.gguf.as_ref().map_or(self.entries.len(), |gguf| gguf.names().len())
    }

    /// Whether the checkpoint has this tensor.
    pub fn contains(&self, name: &str) -> bool {
        match &self.gguf {
            Some(gguf) => gguf.names().iter().any(|n| n == name),
            None => self.entries.contains_key(self.key(name)),
        }
    }

    /// A tensor in `dtype`, of the given shape. A tensor that is not there is noted and
    /// reported with all others by [`Weights::finish`]; meanwhile a single zero stands for it.
    pub fn tensor(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.padded(name, shape, dtype, 0)
    }

    /// [`Weights::tensor`], in memory of at least `elements` elements; on a GPU only.
    fn padded(&mut self, name: &str, shape: &[usize], dtype: DType, elements: usize) -> Result<Tensor> {
        interrupt::check(LOADING)?;
        let key = self.key(name).to_string();
        let found = match &self.gguf {
            Some(gguf) => gguf.tensor(&key, shape, dtype)?.map(|tensor| self.with_padding(&tensor, elements)),
            None => self.entry(&key, shape)?.map(|entry| self.read(&key, entry, dtype, elements)),
        };
        let Some(tensor) = found else { return self.missing(key, shape, dtype) };
        self.used.insert(key);
        tensor
    }

    /// Where a tensor of this shape lies in its file.
    fn entry(&self, key: &str, shape: &[usize]) -> Result<Option<&Entry>> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        if entry.shape != shape {
            return Err(Error::shape(key, Some(&self.files[entry.file]), shape, &entry.shape, OTHER_MODEL));
        }
        Ok(Some(entry))
    }

    /// Notes a tensor that is not there. Of its shape only the rank is kept: what a configuration asks for and no file
    /// has may be of any size.
    fn missing(&mut self, key: String, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.missing.push(key);
        Ok(Tensor::zeros(vec![1; shape.len()], dtype, &self.device)?)
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
        interrupt::check(LOADING)?;
        let path = &self.files[entry.file];
        let large = entry.bytes.1 - entry.bytes.0 > SMALL || elements > 0;
        if let Some(reader) = if large { self.reader()? } else { None } {
            let source = FileTensor {
                path,
                begin: entry.bytes.0,
                dtype: file_dtype(path, key, entry.dtype, dtype)?,
                shape: &entry.shape,
            };
            if let Some(tensor) = reader.read(&source, dtype, elements)? {
                return Ok(tensor);
            }
            // Read once more here, which says what is wrong with which number.
        }
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
    ) -> Result<Weight> {
        let name = format!("{module}.weight");
        let shape = [out, input];
        if let Some(quantized) = self.prequantized(&name, shape)? {
            return Ok(Weight::Quantized(quantized));
        }
        let Some(config) = quantization.filter(|q| q.load_in_4bit) else {
            return Ok(Weight::Dense(self.tensor(&name, &shape, dtype)?));
        };
        let (kind, double) = (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant);
        if self.gguf.is_some() || !self.device.is_cpu() {
            let dense = self.tensor(&name, &shape, dtype)?;
            return Ok(Weight::Quantized(QuantizedTensor::quantize(&dense, kind, BLOCKSIZE, double)?));
        }
        let key = self.key(&name).to_string();
        let Some(entry) = self.entry(&key, &shape)? else {
            return Ok(Weight::Dense(self.missing(key, &shape, dtype)?));
        };
        let source = Source::open(&self.files[entry.file], &key, entry, dtype)?;
        let read = |first: usize, x: &mut [f32]| source.read(dtype, first, x);
        let quantized = QuantizedTensor::quantize_read(&shape, dtype, kind, BLOCKSIZE, double, &read)?;
        self.used.insert(key);
        Ok(Weight::Quantized(quantized))
    }

    /// A weight that bitsandbytes saved in 4 bits.
    fn prequantized(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<QuantizedTensor>> {
        let key = self.key(name).to_string();
        let mut used = Vec::new();
        let quantized = QuantizedTensor::from_tensors(&key, |name| {
            let Some(entry) = self.entries.get(name) else { return Ok(None) };
            used.push(name.to_string());
            let dtype = if entry.dtype == FileDtype::U8 { DType::U8 } else { DType::F32 };
            self.read(name, entry, dtype, 0).map(Some)
        })?;
        let Some(quantized) = quantized else { return Ok(None) };
        if quantized.shape() != shape {
            return Err(Error::shape(key, None, &shape, quantized.shape(), OTHER_MODEL));
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

impl Weights {
    /// Runs `load`, which reads a model, if the device has room for it. The error of one that has not says what
    /// would need less.
    pub(super) fn with_room<T>(self, options: &ModelOptions, load: impl FnOnce(Self) -> Result<T>) -> Result<T> {
        let backend = backend::of(&self.device)?;
        let Some(available) = backend.available_bytes()? else { return load(self) };
        let needed = self.needed(options);
        let doing = format!("loading {:.2} GiB of weights to {}", gib(needed), backend.name());
        let remedy = self.smaller(options, needed);
        if needed > available {
            let doing = format!("{doing}: {:.2} GiB are free", gib(available));
            return Err(match backend.is_cpu() {
                true => Error::OutOfMemory { doing, remedy },
                false => Error::OutOfDeviceMemory { doing, remedy },
            });
        }
        load(self).map_err(|e| match e {
            Error::OutOfDeviceMemory { doing: what, .. } => {
                Error::OutOfDeviceMemory { doing: format!("{doing}: {what}"), remedy }
            }
            other => other,
        })
    }

    /// What needs less than `now`, and how much.
    fn smaller(&self, options: &ModelOptions, now: usize) -> String {
        let in_4bit = BitsAndBytesConfig {
            load_in_4bit: true,
            bnb_4bit_use_double_quant: true,
            ..options.quantization_config.clone().unwrap_or_default()
        };
        let f16 = ModelOptions { torch_dtype: DType::F16, ..options.clone() };
        let others = [
            ("torch_dtype: DType::F16", f16.clone()),
            (
                "load_in_4bit and bnb_4bit_use_double_quant, with torch_dtype: DType::F16,",
                ModelOptions { quantization_config: Some(in_4bit), ..f16 },
            ),
        ];
        let others = others.iter().map(|(what, options)| (what, self.needed(options)));
        let less = others.filter(|(_, needed)| *needed < now - now / 50);
        let mut remedy: String = less.map(|(what, needed)| format!("{what} needs {:.2} GiB; ", gib(needed))).collect();
        remedy += match self.device.is_cpu() {
            true => "variables that hold a model and are not needed can be dropped (drop(model)), other programs ended",
            false => {
                "other programs that use the card (nvidia-smi shows them) can be ended; DeviceMap::Cpu needs no card"
            }
        };
        remedy
    }

    /// Bytes of the device that the checkpoint takes with these options, its largest moment included.
    fn needed(&self, options: &ModelOptions) -> usize {
        let width = options.torch_dtype.size_in_bytes();
        let quantization = options.quantization_config.as_ref().filter(|q| q.load_in_4bit);
        // Names and shapes; bytes of those that stay as they are.
        let mut all: Vec<(String, &[usize], Option<usize>)> = Vec::new();
        for (name, entry) in &self.entries {
            let is_float = matches!(entry.dtype, FileDtype::F32 | FileDtype::F16 | FileDtype::BF16);
            // bitsandbytes puts statistics beside a weight: `weight.absmax`.
            let stays = !is_float || name.contains(".weight.");
            all.push((name.clone(), &entry.shape, stays.then(|| (entry.bytes.1 - entry.bytes.0) as usize)));
        }
        all.extend(self.gguf.iter().flat_map(|g| g.shapes()).map(|(name, shape)| (name, shape, None)));
        let (mut sum, mut beside) = (0, 0);
        for (name, shape, raw) in all {
            let n: usize = shape.iter().product();
            sum += match (quantization, raw) {
                (_, Some(raw)) => raw,
                (Some(config), _) if shape.len() == 2 && is_inside_block(&name) => {
                    // While it is quantized, it is there too; a CPU quantizes as it reads.
                    beside = beside.max(if self.device.is_cpu() { 0 } else { n * width });
                    quantized_bytes(n, config)
                }
                _ => n * width,
            };
        }
        sum + beside
    }
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Whether a module's path has a number: `h.0.mlp.dense_h_to_4h`.
fn is_inside_block(name: &str) -> bool {
    name.split('.').any(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

fn quantized_bytes(n: usize, config: &BitsAndBytesConfig) -> usize {
    let blocks = n.div_ceil(BLOCKSIZE);
    let statistics = match config.bnb_4bit_use_double_quant {
        true => blocks + 4 * blocks.div_ceil(NESTED_BLOCKSIZE),
        false => 4 * blocks,
    };
    QuantType::packed_len(config.bnb_4bit_quant_type, n) + statistics
}

/// Block of 4-bit quantization; bitsandbytes' `Linear4bit` has no other.
const BLOCKSIZE: usize = 64;

/// The dtype that a tensor is read in to become `dtype`.
fn file_dtype(path: &Path, key: &str, from: FileDtype, dtype: DType) -> Result<DType> {
    match (from, dtype) {
        (_, DType::U8) => Ok(DType::U8),
        (_, other) if !is_float(other) => {
            let (got, remedy) = (format!("{other:?}"), "load the model in one of these");
            Err(Error::unsupported("torch_dtype", got, ["F32", "F16", "BF16"], remedy))
        }
        (FileDtype::F32, _) => Ok(DType::F32),
        (FileDtype::F16, _) => Ok(DType::F16),
        (FileDtype::BF16, _) => Ok(DType::BF16),
        (other, _) => Err(malformed(path, format!("{key} holds {other:?}, not floating point"))),
    }
}

/// Reads one tensor in `dtype`.
fn read(path: &Path, key: &str, entry: &Entry, dtype: DType) -> Result<Tensor> {
    let source = Source::open(path, key, entry, dtype)?;
    match dtype {
        DType::U8 => source.bytes(&entry.shape),
        _ => filled(&entry.shape, dtype, &|first, x| source.read(dtype, first, x)),
    }
}

/// A tensor's bytes in its file, for several threads to read.
struct Source<'a> {
    file: File,
    path: &'a Path,
    key: &'a str,
    dtype: DType,
    /// Its first byte in the file.
    start: u64,
    /// Elements.
    count: usize,
}

impl<'a> Source<'a> {
    /// Of a tensor that is to be read in `dtype`.
    fn open(path: &'a Path, key: &'a str, entry: &Entry, dtype: DType) -> Result<Self> {
        let dtype = file_dtype(path, key, entry.dtype, dtype)?;
        let file = File::open(path).map_err(Error::io("read", path))?;
        Ok(Self { file, path, key, dtype, start: entry.bytes.0, count: entry.shape.iter().product() })
    }

    fn bytes(&self, shape: &[usize]) -> Result<Tensor> {
        let mut data = vec![0u8; self.count];
        self.file.read_exact_at(&mut data, self.start).map_err(Error::io("read", self.path))?;
        Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
    }

    /// Fills x with the elements from `first` on, rounded to `dtype`; fails for one that is not finite, there or then.
    fn read(&self, dtype: DType, first: usize, x: &mut [f32]) -> Result<()> {
        let width = self.dtype.size_in_bytes();
        interrupt::check(LOADING)?;
        let mut bytes = [0u8; 4 * PIECE];
        for (piece, x) in x.chunks_mut(PIECE).enumerate() {
            let first = first + piece * PIECE;
            let bytes = &mut bytes[..width * x.len()];
            let at = self.start + (first * width) as u64;
            self.file.read_exact_at(bytes, at).map_err(Error::io("read", self.path))?;
            match self.dtype {
                DType::F32 => {
                    x.iter_mut().zip(bytes.as_chunks().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b));
                }
                DType::F16 => {
                    let mut halves = [f16::ZERO; PIECE];
                    let halves = &mut halves[..x.len()];
                    halves.iter_mut().zip(bytes.as_chunks().0).for_each(|(h, b)| *h = f16::from_le_bytes(*b));
                    halves.convert_to_f32_slice(x);
                }
                _ => x.iter_mut().zip(bytes.as_chunks().0).for_each(|(v, b)| *v = bf16::from_le_bytes(*b).to_f32()),
            }
            if !all_finite(x) {
                let chunk = first / CHUNK * CHUNK;
                let (key, end) = (self.key, self.count.min(chunk + CHUNK));
                return Err(malformed(
                    self.path,
                    format!("{key} has a NaN or an infinity among elements {chunk}..{end}"),
                ));
            }
            if dtype == self.dtype || dtype == DType::F32 {
                continue;
            }
            round_all(dtype, x);
            if !all_finite(x) {
                let expected = format!("one in which every number of {} is finite", self.key);
                let remedy = "load the model in DType::BF16 or DType::F32";
                return Err(Error::argument("torch_dtype", format!("{dtype:?}"), &expected, remedy));
            }
        }
        Ok(())
    }
}

fn all_finite(x: &[f32]) -> bool {
    x.iter().fold(true, |finite, v| finite & v.is_finite())
}

fn malformed(path: &Path, detail: String) -> Error {
    Error::malformed(path, "safetensors file", detail, DAMAGED)
}

/// What the reference's readers take for a header, in bytes.
const LONGEST_HEADER: u64 = 100_000_000;

/// Reads the header of one file, the `index`th: 8 bytes of length, then JSON.
fn read_header(path: &Path, index: usize) -> Result<Vec<(String, Entry)>> {
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
    if length > LONGEST_HEADER {
        return Err(malformed(path, format!("the header has {length} bytes, at most {LONGEST_HEADER} are allowed")));
    }
    let mut header = vec![0u8; length as usize];
    file.read_exact(&mut header).map_err(Error::io("read", path))?;
    let metadata: safetensors::tensor::Metadata =
        serde_json::from_slice(&header).map_err(|e| malformed(path, format!("header: {e}")))?;
    let data = 8 + length;
    let (mut end, mut entries) = (data, Vec::new());
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
        entries.push((name, entry));
    }
    if end != size {
        return Err(malformed(path, format!("the tensors end at byte {end}, the file has {size}")));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use candle_core::Shape;

    use super::*;
    use crate::backend::operands::Weight;

    /// A weight of several tasks, the last of them partial, in a file in `dtype`.
    fn file(folder: &Path, dtype: DType) -> (Weights, Tensor) {
        let weight = Tensor::randn(0f32, 1f32, (3, CHUNK - 77), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let path = folder.join("model.safetensors");
        candle_core::safetensors::save(&[("w.weight", weight.clone())].into(), &path).unwrap();
        (Weights::open(vec![path]).unwrap(), weight)
    }

    #[test]
    fn every_dtype_is_read_as_every_other() {
        let folder = tempfile::tempdir().unwrap();
        let floats = [DType::F32, DType::F16, DType::BF16];
        for (from, to) in floats.into_iter().flat_map(|from| floats.map(|to| (from, to))) {
            let (mut weights, weight) = file(folder.path(), from);
            let expected = weight.to_dtype(to).unwrap();
            let read = weights.tensor("w.weight", &[3, CHUNK - 77], to).unwrap();
            assert_eq!(read.dtype(), to);
            let bits = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(bits(&read) == bits(&expected), "{from:?} as {to:?}");
        }
    }

    #[test]
    fn a_weight_quantized_as_it_is_read_is_the_weight_quantized() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [
            (DType::F32, DType::F32, QuantType::Nf4, true),
            (DType::F32, DType::F16, QuantType::Nf4, false),
            (DType::F16, DType::F16, QuantType::Nf4, true),
            (DType::BF16, DType::F16, QuantType::Fp4, true),
            (DType::BF16, DType::BF16, QuantType::Int8, true),
        ];
        for (from, to, kind, double) in cases {
            let (mut weights, weight) = file(folder.path(), from);
            let config = BitsAndBytesConfig {
                load_in_4bit: true,
                bnb_4bit_quant_type: kind,
                bnb_4bit_use_double_quant: double,
                ..Default::default()
            };
            let Weight::Quantized(read) = weights.linear("w", (3, CHUNK - 77), to, Some(&config)).unwrap() else {
                panic!("not quantized")
            };
            let expected = QuantizedTensor::quantize(&weight.to_dtype(to).unwrap(), kind, BLOCKSIZE, double).unwrap();
            let all = |q: &QuantizedTensor| q.dequantize().unwrap().to_dtype(DType::F32).unwrap();
            let packed = |q: &QuantizedTensor| q.packed().flatten_all().unwrap().to_vec1::<u8>().unwrap();
            assert!(packed(&read) == packed(&expected), "{from:?} as {to:?}: codes");
            assert!(
                all(&read).to_vec2::<f32>().unwrap() == all(&expected).to_vec2::<f32>().unwrap(),
                "{from:?}: values"
            );
            assert_eq!((read.dtype(), read.shape()), (to, Shape::from((3, CHUNK - 77)).dims()));
        }
    }

    /// In 4 bits or not; the dtype that holds it loads it.
    #[test]
    fn a_number_too_large_for_the_dtype_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let weight = Tensor::new(&[[1f32, 1e6]], &Device::Cpu).unwrap();
        candle_core::safetensors::save(&[("w.weight", weight)].into(), &path).unwrap();
        let config = BitsAndBytesConfig { load_in_4bit: true, ..Default::default() };
        for config in [None, Some(&config)] {
            let load = |dtype| Weights::open(vec![path.clone()]).unwrap().linear("w", (1, 2), dtype, config);
            let error = load(DType::F16).err().unwrap().to_string();
            assert!(error.contains("F16") && error.contains("w.weight") && error.contains("BF16"), "{error}");
            assert!(load(DType::BF16).is_ok());
        }
    }
}
