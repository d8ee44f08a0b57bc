//! Step 4: the model.

use std::{collections::HashMap, fmt, path::Path, sync::Arc};

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::{
    backend::kv_cache::KvCache,
    batch::Batch,
    display::{Forms, module_tree::ModuleNode, shown_by_forms},
    error::{Error, Result},
    hub::Snapshot,
    json_file::read_json,
    models::{
        self,
        causal_lm::Pass,
        gguf::{self, Gguf},
        weights::Weights,
    },
    names::debug_as_display,
    quantized::QuantizedTensor,
    safe_file::{replace, write_atomically},
};

pub use crate::models::{
    causal_lm::{CausalLM, Draw, Next},
    decoder::Decoder,
    memory::{MemoryReport, MemoryTerm, peak_resident_bytes, release_freed_memory, reset_peak, resident_bytes},
    options::{BitsAndBytesConfig, DeviceMap, ModelOptions},
    parameter::{Parameter, ParameterDType},
    perplexity,
};

/// Loads any supported causal language model.
pub struct AutoModelForCausalLM;

impl AutoModelForCausalLM {
    /// Loads a model from a folder in Hugging Face layout, or from the hub by its id.
    ///
    /// With `quantization_config` the linear layers inside the blocks are quantized while
    /// they are read, tensor by tensor: the memory needed is the 4-bit model and one tensor.
    /// A checkpoint that bitsandbytes saved in 4 bits is taken as it is.
    ///
    /// The path of a GGUF file, or of a folder with one, loads a Llama from there: its weights are
    /// widened to `torch_dtype`, or quantized anew as `quantization_config` says.
    ///
    /// # Errors
    /// A missing folder or file, a damaged file (named, with what is wrong), missing tensors
    /// or wrong shapes (named), an architecture that is not supported (with those that are).
    ///
    /// ```no_run
    /// use qlora_nb::prelude::*;
    /// # fn main() -> qlora_nb::error::Result<()> {
    /// let model = AutoModelForCausalLM::from_pretrained("notebooks/models/poet-bloom-zh", ModelOptions {
    ///     torch_dtype: DType::F16,
    ///     quantization_config: Some(BitsAndBytesConfig { load_in_4bit: true, ..Default::default() }),
    ///     ..Default::default()
    /// })?;
    /// println!("{}", model.dtype()); // torch.float16
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_pretrained(name_or_path: impl AsRef<Path>, options: ModelOptions) -> Result<Model> {
        Self::from_pretrained_path(name_or_path.as_ref(), options)
    }

    fn from_pretrained_path(name_or_path: &Path, options: ModelOptions) -> Result<Model> {
        options.validate()?;
        let (config, generation_config, weights) = match gguf::find(name_or_path, "config.json")? {
            Some(path) => {
                let gguf = Gguf::open(path)?;
                (gguf.config()?, Value::Null, Weights::of_gguf(gguf))
            }
            None => {
                let files = Snapshot::open(&name_or_path.to_string_lossy())?;
                let config = read_config(&files.file("config.json")?)?;
                models::check_supported(&config)?;
                let generation_config = match files.optional_file("generation_config.json")? {
                    Some(path) => read_config(&path)?,
                    None => Value::Null,
                };
                (config, generation_config, Weights::of(&files)?)
            }
        };
        let (device, choice) = options.device_map.device()?;
        let mut defaults = config.clone();
        if let (Value::Object(all), Value::Object(more)) = (&mut defaults, &generation_config) {
            all.extend(more.clone());
        }
        let (decoder, unexpected) = models::build(&config, weights.on(&device), &options)?;
        if !unexpected.is_empty() {
            let few = &unexpected[..unexpected.len().min(4)];
            crate::display::notice(&format!(
                "{} has {} tensors that the model does not use: {few:?}",
                name_or_path.display(),
                unexpected.len()
            ));
        }
        if let Some(choice) = choice {
            crate::display::notice_once(&choice);
        }
        Ok(Model(Arc::new(Inner {
            decoder,
            config,
            generation_config,
            defaults,
            options,
            name_or_path: name_or_path.display().to_string(),
        })))
    }
}

/// A configuration: a JSON file that holds an object.
fn read_config(path: &Path) -> Result<Value> {
    let value = read_json(path)?;
    if value.is_object() {
        return Ok(value);
    }
    let remedy = "the file is damaged or half downloaded: get it again";
    Err(Error::malformed(path, "JSON configuration", "the file holds no JSON object", remedy))
}

/// A causal language model. Cloning is cheap and shares the weights, which never change.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    decoder: Decoder,
    config: Value,
    generation_config: Value,
    /// config.json with generation_config.json over it.
    defaults: Value,
    options: ModelOptions,
    name_or_path: String,
}

impl Model {
    /// Logits `[B, T, vocab]` f32 of `input_ids` `[B, T]` (u32). Padding is marked by 0 in
    /// `attention_mask` `[B, T]`, on either side; logits there are 0.
    pub fn logits(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        self.0.decoder.logits(input_ids, attention_mask)
    }

    /// Sum of the cross-entropies of a batch's labels, and how many they are.
    pub fn loss(&self, batch: &Batch) -> Result<Pass> {
        self.0.decoder.loss(batch)
    }

    /// Every parameter with its name, in the reference's order; prints as PyTorch's:
    /// `for (name, p) in model.named_parameters() { println!("{name} {}", p.dtype()) }`.
    pub fn named_parameters(&self) -> Vec<(String, Parameter)> {
        self.0.decoder.named_parameters()
    }

    /// The dtype of the weights that are not quantized: `torch.float16`.
    pub fn dtype(&self) -> ParameterDType {
        ParameterDType(self.0.options.torch_dtype)
    }

    /// Where the model is.
    pub fn device(&self) -> &Device {
        self.0.decoder.device()
    }

    /// How many numbers the model has; a quantized weight counts its elements.
    pub fn num_parameters(&self) -> usize {
        self.named_parameters().iter().map(|(_, p)| p.numel()).sum()
    }

    /// Where the model's memory goes, term by term.
    pub fn memory_report(&self) -> MemoryReport {
        MemoryReport::of(&self.0.decoder)
    }

    /// config.json.
    pub fn config(&self) -> &Value {
        &self.0.config
    }

    /// The folder or hub id that the model came from.
    pub fn name_or_path(&self) -> &str {
        &self.0.name_or_path
    }

    /// How the model was loaded.
    pub fn options(&self) -> &ModelOptions {
        &self.0.options
    }

    /// Whether the linear layers inside the blocks are quantized.
    pub fn is_quantized(&self) -> bool {
        self.0.decoder.linears().iter().any(|l| l.weight().quantized().is_some())
    }

    /// The network: for those who want to look inside.
    pub fn decoder(&self) -> &Decoder {
        &self.0.decoder
    }

    /// The tree of modules, as PyTorch prints it.
    pub fn module_tree(&self) -> ModuleNode {
        self.0.decoder.module_tree()
    }

    /// Writes `config.json`, `generation_config.json` and `model.safetensors`, which transformers
    /// and [`AutoModelForCausalLM`] read; quantized weights as bitsandbytes writes them. Each
    /// file is written beside its place and then renamed.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_pretrained_path(folder.as_ref())
    }

    fn save_pretrained_path(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        let quantized: HashMap<String, &QuantizedTensor> = (self.0.decoder.linears().into_iter())
            .filter_map(|l| Some((format!("{}.weight", l.name), l.weight().quantized()?)))
            .collect();
        let mut tensors = Vec::new();
        for (name, parameter) in self.0.decoder.named_parameters() {
            match quantized.get(&name) {
                Some(q) => tensors.extend(q.to_tensors(&name)?),
                None => tensors.push((name, parameter.tensor().clone())),
            }
        }
        let path = folder.join("model.safetensors");
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        replace(&path, |temporary| {
            safetensors::serialize_to_file(tensors, Some(metadata), temporary).map_err(|e| match e {
                safetensors::SafeTensorError::IoError(e) => Error::io("write", temporary)(e),
                other => Error::io("write", temporary)(std::io::Error::other(other)),
            })
        })?;
        let mut config = self.0.config.clone();
        config["dtype"] = self.dtype().to_string().trim_start_matches("torch.").into();
        config["tie_word_embeddings"] = self.0.decoder.tied.into();
        if let Some(object) = config.as_object_mut() {
            object.remove("torch_dtype");
            object.remove("quantization_config");
        }
        if let Some(quantization) = self.quantization() {
            config["quantization_config"] = quantization;
        }
        for (name, value) in [("config.json", &config), ("generation_config.json", &self.0.generation_config)] {
            if !value.is_null() {
                write_atomically(&folder.join(name), format!("{value:#}\n").as_bytes())?;
            }
        }
        Ok(())
    }

    /// `quantization_config` of config.json, as the weights are: they may come from a checkpoint in 4 bits, and some of
    /// them may be dense again.
    fn quantization(&self) -> Option<Value> {
        let linears = self.0.decoder.linears();
        let state = linears.iter().find_map(|l| Some(l.weight().quantized()?.state()))?;
        let dense: Vec<&str> =
            linears.iter().filter(|l| l.weight().quantized().is_none()).map(|l| l.name.as_str()).collect();
        let asked = self.0.options.quantization_config.as_ref();
        let asked = asked.map(|q| ParameterDType(q.bnb_4bit_compute_dtype).to_string());
        let loaded = self.0.config["quantization_config"]["bnb_4bit_compute_dtype"].as_str();
        Some(serde_json::json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": state.quant_type.as_str(),
            "bnb_4bit_use_double_quant": state.state2.is_some(),
            "bnb_4bit_compute_dtype": asked.as_deref().or(loaded).unwrap_or("float32").trim_start_matches("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense,
        }))
    }

    /// The same model around another network (merged weights).
    pub(crate) fn with_decoder(&self, decoder: Decoder) -> Self {
        Self(Arc::new(Inner { decoder, ..(*self.0).clone() }))
    }

    /// What a notebook shows: the tree with foldable branches.
    pub fn forms(&self) -> Forms {
        let tree = self.module_tree();
        vec![("text/html", tree.to_html(3)), ("text/plain", tree.to_string())]
    }
}

shown_by_forms!(Model);

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.module_tree().fmt(f)
    }
}

debug_as_display!(Model);

impl CausalLM for Model {
    fn vocab_size(&self) -> usize {
        self.0.decoder.vocab_size()
    }

    fn generation_defaults(&self) -> &Value {
        &self.0.defaults
    }

    fn new_cache(&self, sequences: usize) -> Result<KvCache> {
        self.0.decoder.new_cache(sequences)
    }

    fn next_token_logits(&self, new_tokens: &[&[u32]], cache: &mut KvCache) -> Result<Tensor> {
        self.0.decoder.next_token_logits(new_tokens, cache)
    }

    fn next_tokens(&self, new_tokens: &[&[u32]], cache: &mut KvCache, draws: &[Draw]) -> Result<Next> {
        self.0.decoder.next_tokens(new_tokens, cache, draws)
    }
}
