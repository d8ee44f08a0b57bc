//! Step 4b: the adapters, as PEFT makes, prints and saves them.

pub mod config;
pub mod config_file;
mod init;
mod modules_to_save;
mod target_modules;
pub mod targets;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::{
    backend::{dropout, kv_cache::KvCache},
    batch::Batch,
    display::{
        Forms,
        module_tree::{ModuleNode, trainable_parameters_text},
        shown_by_forms,
    },
    error::{Error, Result, ensure},
    hub::Snapshot,
    interrupt,
    layers::custom_loss::LossFn,
    model::Model,
    models::{
        causal_lm::{CausalLM, Draw, LossScale, Next, Pass, PassOptions, Trainable},
        decoder::Decoder,
        memory::MemoryReport,
        parameter::Parameter,
        weights::Weights,
    },
    names::debug_as_display,
    tensor_file::save_tensors,
};

pub use crate::{
    adapters::{DoraAdapter, LoraAdapter, SavedModule},
    backend::{
        operands::{Lora, Weight},
        param::Param,
    },
    layers::{Adapter, Embedding, Linear},
};
pub use config::{InitLoraWeights, LoraConfig, TaskType};
pub use targets::TargetModules;

const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// The seed of A's first values when none is given: transformers' `TrainingArguments.seed`.
pub const DEFAULT_SEED: u64 = 42;

/// Puts LoRA adapters on `model`. The model is borrowed and stays as it is: its weights are
/// shared, not copied, and several adapted models can stand on one base.
///
/// A starts with the numbers that PEFT gives it after `torch.manual_seed(42)`, B with zeros.
///
/// # Errors
/// `target_modules` that name no linear layer (with the near names), values outside their domain.
///
/// ```no_run
/// use qlora_nb::prelude::*;
/// # fn main() -> qlora_nb::error::Result<()> {
/// let model = AutoModelForCausalLM::from_pretrained("notebooks/models/poet-bloom-zh", ModelOptions::default())?;
/// let config = LoraConfig { r: 8, target_modules: ["query_key_value"].into(), ..Default::default() };
/// let model = get_peft_model(&model, &config)?;
/// model.print_trainable_parameters();
/// # Ok(())
/// # }
/// ```
pub fn get_peft_model(model: &Model, config: &LoraConfig) -> Result<PeftModel> {
    get_peft_model_seeded(model, config, DEFAULT_SEED)
}

/// [`get_peft_model`] with another seed for A.
pub fn get_peft_model_seeded(model: &Model, config: &LoraConfig, seed: u64) -> Result<PeftModel> {
    let config = LoraConfig { base_model_name_or_path: Some(model.name_or_path().into()), ..config.clone() };
    PeftModel::build(model, &config, seed)
}

/// The adapter that [`get_peft_model`] makes.
const DEFAULT_ADAPTER: &str = "default";

/// A model with adapters on some of its linear layers, one of them active: applied, and learning. Cloning is cheap and
/// shares weights and adapters, and so does every method that gives another `PeftModel`.
#[derive(Clone)]
pub struct PeftModel(Arc<Inner>);

struct Inner {
    base: Model,
    decoder: Decoder,
    /// By name, in the order in which they were added.
    adapters: Vec<(String, LoraConfig)>,
    /// Its number among them; `None`: the model computes as the base does.
    active: Option<usize>,
}

impl PeftModel {
    fn build(base: &Model, config: &LoraConfig, seed: u64) -> Result<Self> {
        let inner = Inner { base: base.clone(), decoder: base.decoder().clone(), adapters: Vec::new(), active: None };
        Self(Arc::new(inner)).with_adapter(DEFAULT_ADAPTER, config, seed)?.set_adapter(DEFAULT_ADAPTER)
    }

    /// The same model with one more adapter beside those that it has; the active one stays active.
    ///
    /// # Errors
    /// Those of [`get_peft_model`], and a name that an adapter has already.
    ///
    /// ```no_run
    /// # use qlora_nb::prelude::*;
    /// # fn f(model: PeftModel) -> Result<()> {
    /// let model = model.add_adapter("poems", &LoraConfig { r: 4, ..Default::default() })?;
    /// let poems = model.set_adapter("poems")?; // train this one
    /// let plain = model.disable_adapter(); // the base's logits
    /// # Ok(())
    /// # }
    /// ```
    pub fn add_adapter(&self, name: &str, config: &LoraConfig) -> Result<Self> {
        let base = Some(self.0.base.name_or_path().into());
        self.with_adapter(name, &LoraConfig { base_model_name_or_path: base, ..config.clone() }, DEFAULT_SEED)
    }

    fn with_adapter(&self, name: &str, config: &LoraConfig, seed: u64) -> Result<Self> {
        let inner = &self.0;
        if name.is_empty() || name.contains(['.', '/']) || inner.adapters.iter().any(|(known, _)| known == name) {
            let expected = format!("a name without . or / that no adapter has; there are {:?}", self.adapter_names());
            return Err(Error::argument("adapter", format!("{name:?}"), &expected, "choose another name"));
        }
        if config.use_dora && config.lora_dropout > 0.0 {
            let remedy = "set lora_dropout to 0.0, or use_dora to false";
            return Err(Error::argument("lora_dropout", config.lora_dropout, "0.0 with use_dora", remedy));
        }
        let names: Vec<String> = inner.decoder.linears().iter().map(|l| l.name.clone()).collect();
        let model_type = inner.base.config()["model_type"].as_str().unwrap_or_default();
        let (config, targets) = config.prepare(model_type, &names)?;
        let saved = config.saved_modules(inner.base.decoder())?;
        let mut init = init::LoraInit::new(seed, config.init_lora_weights);
        let mut index = 0;
        let device = inner.base.device();
        let mut decoder = inner.decoder.map_linears(|linear| {
            let chosen = targets.contains(&index);
            index += 1;
            if saved.contains(&linear.name) {
                let weight = copy_to_learn(&linear.name, &linear.weight().dequantize()?)?;
                return Ok(linear.with_adapter(name, Arc::new(SavedModule { weight })));
            }
            if !chosen {
                return Ok(linear.clone());
            }
            let (out, input) = linear.weight().dims2()?;
            let r = config.rank_of(&linear.name)?;
            let (a, b) = init.next(r, input, out)?;
            let path = |part: &str| format!("base_model.model.{}.{part}", linear.name);
            let lora = Lora {
                a: Param::new(path("lora_A.weight"), &a.to_device(device)?)?,
                b: Param::new(path("lora_B.weight"), &b.to_device(device)?)?,
                scaling: config.scaling_of(&linear.name)?,
                dropout: config.lora_dropout,
                id: dropout::mix(index as u64),
            };
            let adapter: Arc<dyn Adapter> = if config.use_dora {
                Arc::new(DoraAdapter::new(lora, linear.weight(), path("lora_magnitude_vector"))?)
            } else {
                Arc::new(LoraAdapter(lora))
            };
            Ok(linear.with_adapter(name, adapter))
        })?;
        let mut embedding = decoder.embedding.clone();
        if saved.contains(&embedding.name) {
            embedding.copies.push(name, copy_to_learn(&embedding.name, &embedding.table)?);
            decoder = decoder.with_embedding(embedding);
        }
        if let Some(both) = decoder.linears().into_iter().find(|linear| linear.has_mixed_adapters()) {
            let expected = format!("no name of {}, which another adapter adapts in another way", both.name);
            let remedy = "adapt it in the same way, or put the adapter on another PeftModel of the same base";
            return Err(Error::argument("modules_to_save", format!("{saved:?}"), &expected, remedy));
        }
        let mut adapters = inner.adapters.clone();
        adapters.push((name.into(), config));
        Ok(Self(Arc::new(Inner { base: inner.base.clone(), decoder, adapters, active: inner.active })))
    }

    /// The same model with the adapter of that name active: it alone is applied, learns and is merged.
    ///
    /// # Errors
    /// A name that no adapter has.
    pub fn set_adapter(&self, name: &str) -> Result<Self> {
        match self.0.adapters.iter().position(|(known, _)| known == name) {
            Some(index) => self.with_active(Some(index)),
            None => {
                let expected = format!("one of {:?}", self.adapter_names());
                let remedy = "add it with add_adapter or load_adapter";
                Err(Error::argument("adapter", format!("{name:?}"), &expected, remedy))
            }
        }
    }

    /// The same model without any adapter applied: it computes what the base does, and nothing learns.
    pub fn disable_adapter(&self) -> Result<Self> {
        self.with_active(None)
    }

    fn with_active(&self, active: Option<usize>) -> Result<Self> {
        let Inner { base, decoder, adapters, .. } = &*self.0;
        let name = active.and_then(|i| adapters.get(i)).map(|(name, _)| name.as_str());
        let mut embedding = decoder.embedding.clone();
        embedding.copies.activate(name);
        let decoder = decoder.map_linears(|linear| Ok(linear.with_active(name)))?.with_embedding(embedding);
        Ok(Self(Arc::new(Inner { base: base.clone(), decoder, adapters: adapters.clone(), active })))
    }

    /// The adapters' names, in the order in which they were added.
    pub fn adapter_names(&self) -> Vec<&str> {
        self.0.adapters.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The name of the active adapter; `None` when it is disabled.
    pub fn active_adapter(&self) -> Option<&str> {
        self.0.active.and_then(|i| self.0.adapters.get(i)).map(|(name, _)| name.as_str())
    }

    /// The same model with the adapter in `folder` beside those that it has; the active one stays active.
    ///
    /// # Errors
    /// Those of [`PeftModel::from_pretrained`], and a name that an adapter has already.
    pub fn load_adapter(&self, folder: impl AsRef<Path>, name: &str) -> Result<Self> {
        self.load_adapter_path(folder.as_ref(), name)
    }

    fn load_adapter_path(&self, folder: &Path, name: &str) -> Result<Self> {
        let folder = adapter_folder(folder)?;
        let this = self.with_adapter(name, &saved_config(&folder)?, DEFAULT_SEED)?;
        this.set_adapter(name)?.load_adapter_weights(&folder)?;
        Ok(this)
    }

    /// Loads an adapter that PEFT or [`PeftModel::save_pretrained`] wrote, onto `model`, which
    /// is borrowed and stays as it is.
    ///
    /// # Errors
    /// A missing folder or file, a damaged one, an adapter for another model: the keys that do
    /// not fit are named. An adapter never loads in part.
    pub fn from_pretrained(model: &Model, folder: impl AsRef<Path>) -> Result<Self> {
        Self::from_pretrained_path(model, folder.as_ref())
    }

    fn from_pretrained_path(model: &Model, folder: &Path) -> Result<Self> {
        let folder = adapter_folder(folder)?;
        let this = Self::build(model, &saved_config(&folder)?, DEFAULT_SEED)?;
        this.load_adapter_weights(&folder)?;
        Ok(this)
    }

    /// Replaces the active adapter's values by those in `folder`; all or none.
    pub fn load_adapter_weights(&self, folder: &Path) -> Result<()> {
        let path = folder.join(WEIGHTS_FILE);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let mut found: HashMap<String, Tensor> =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| {
                Error::malformed(&path, "safetensors file", e, "the file is damaged: save the adapter again")
            })?;
        let params = self.trainable_parameters();
        let mut values = Vec::with_capacity(params.len());
        let mut missing = Vec::new();
        for param in &params {
            match found.remove(param.name()) {
                None => missing.push(param.name().to_string()),
                Some(value) if value.dims() != param.value().dims() => {
                    return Err(Error::Shape {
                        name: param.name().into(),
                        path: Some(path),
                        expected: param.value().dims().to_vec(),
                        got: value.dims().to_vec(),
                        remedy: "load the adapter on the base model that it was trained on".into(),
                    });
                }
                Some(value) => values.push(value),
            }
        }
        if !missing.is_empty() || !found.is_empty() {
            let mut unexpected: Vec<String> = found.into_keys().collect();
            unexpected.sort();
            let remedy = "load the adapter on the base model that it was trained on, with its own adapter_config.json";
            return Err(Error::KeyMismatch { path, missing, unexpected, remedy: remedy.into() });
        }
        for (param, value) in params.iter().zip(&values) {
            let finite = value.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.iter().all(|v| v.is_finite());
            if !finite {
                let detail = format!("{} has a NaN or an infinity", param.name());
                return Err(Error::malformed(path, "adapter", detail, "load an earlier checkpoint"));
            }
        }
        params.iter().zip(&values).try_for_each(|(param, value)| param.set(value))
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads: those of the adapter `default` to
    /// `folder`, of any other to a folder of its name in there. Each file is written beside its place and then renamed:
    /// what was there stays until then.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_pretrained_path(folder.as_ref())
    }

    fn save_pretrained_path(&self, folder: &Path) -> Result<()> {
        for (name, config) in &self.0.adapters {
            let folder = if name == DEFAULT_ADAPTER { folder.to_path_buf() } else { folder.join(name) };
            self.save_adapter_to(name, config, &folder)?;
        }
        Ok(())
    }

    /// Writes the active adapter alone to `folder`, whatever its name.
    pub(crate) fn save_active_adapter(&self, folder: &Path) -> Result<()> {
        let active = self.0.active.and_then(|i| self.0.adapters.get(i));
        active.map_or(Ok(()), |(name, config)| self.save_adapter_to(name, config, folder))
    }

    fn save_adapter_to(&self, name: &str, config: &LoraConfig, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        let decoder = &self.0.decoder;
        let of_name = decoder.linears().into_iter().flat_map(|l| l.adapters()).filter(|(adapter, _)| adapter == name);
        let params = of_name.flat_map(|(_, a)| a.parameters()).map(|(_, param)| param);
        let copies = decoder.embedding.copies.all().iter().filter(|(adapter, _)| adapter == name);
        let params: Vec<&Param> = copies.map(|(_, copy)| copy).chain(params).collect();
        let tensors = params.iter().map(|p| (p.name().to_string(), p.value().clone())).collect();
        // Small, and part of a checkpoint that an interrupt must not spoil.
        save_tensors(&folder.join(WEIGHTS_FILE), tensors, &|| Ok(()))?;
        LoraConfig { inference_mode: true, ..config.clone() }.save_pretrained(folder)
    }

    /// The base model with the active adapter added into its weights: W + scaling * B A, in f32, then
    /// rounded to `torch_dtype`.
    ///
    /// A quantized layer becomes a dense one: quantizing the sum again would throw away much of
    /// what the adapter learned. A module of `modules_to_save` takes the place of the original; where the output head was
    /// the table of embeddings, the two are apart from then on.
    pub fn merge_and_unload(&self) -> Result<Model> {
        interrupt::stoppable("merging the adapter", || self.merged())
    }

    fn merged(&self) -> Result<Model> {
        let mut tied = self.0.decoder.tied;
        let mut decoder = self.0.decoder.map_linears(|linear| {
            interrupt::check("merging the adapter")?;
            let Some(adapter) = linear.adapter() else { return Ok(linear.without_adapters()) };
            tied &= linear.name != self.0.decoder.head.name;
            let weight = linear.weight().dequantize()?;
            let merged = adapter.merge(&weight.to_dtype(DType::F32)?)?.to_dtype(weight.dtype())?;
            Ok(Linear::new(&linear.name, Weight::Dense(merged), linear.frozen.bias.clone()))
        })?;
        let Embedding { name, table, padding_idx, copies } = &self.0.decoder.embedding;
        let merged = match copies.active() {
            None => table.clone(),
            Some(copy) => copy.value().copy()?.to_dtype(table.dtype())?,
        };
        decoder.tied = tied && copies.active().is_none();
        Ok(self.0.base.with_decoder(decoder.with_embedding(Embedding::new(name.clone(), merged, *padding_idx))))
    }

    /// Logits `[B, T, vocab]` f32, adapters included; see [`Model::logits`].
    pub fn logits(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        self.0.decoder.logits(input_ids, attention_mask)
    }

    /// The configuration of the active adapter (of the first, when it is disabled), its layers named.
    pub fn config(&self) -> &LoraConfig {
        &self.0.adapters[self.0.active.unwrap_or(0)].1
    }

    /// The model without its adapters.
    pub fn base_model(&self) -> &Model {
        &self.0.base
    }

    /// The network: for those who want to look inside.
    pub fn decoder(&self) -> &Decoder {
        &self.0.decoder
    }

    /// Every parameter with its name, in PEFT's order and names.
    pub fn named_parameters(&self) -> Vec<(String, Parameter)> {
        self.0.decoder.named_parameters()
    }

    /// (numbers that learn, numbers in all); a quantized weight counts its elements.
    pub fn num_parameters(&self) -> (usize, usize) {
        let all = self.named_parameters();
        let count = |learn: bool| all.iter().filter(|(_, p)| !learn || p.requires_grad()).map(|(_, p)| p.numel()).sum();
        (count(true), count(false))
    }

    /// Prints `trainable params: 36,864 || all params: 3,886,464 || trainable%: 0.9485`.
    pub fn print_trainable_parameters(&self) {
        let (trainable, all) = self.num_parameters();
        crate::display::line(&trainable_parameters_text(trainable, all));
    }

    /// Where the memory of the model and its adapters goes, term by term.
    pub fn memory_report(&self) -> MemoryReport {
        MemoryReport::of(&self.0.decoder)
    }

    /// Names the model and the form of its adapters: equal for two models whose checkpoints
    /// can be exchanged. The adapters' values are not part of it.
    ///
    /// # Errors
    /// Those of reading a GPU's memory.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = dropout::mix(0);
        // Equal codes mean other weights with other statistics.
        for state in self.0.decoder.linears().iter().filter_map(|l| Some(l.weight().quantized()?.state())) {
            let form = format!("{} {} {:?} {}", state.quant_type, state.blocksize, state.dtype, state.state2.is_some());
            hash = form.bytes().fold(hash, |h, byte| dropout::mix(h ^ u64::from(byte)));
        }
        for (name, p) in self.named_parameters() {
            let shape = format!("{name} {:?} {:?}", p.dims(), p.dtype());
            hash = shape.bytes().fold(hash, |h, byte| dropout::mix(h ^ u64::from(byte)));
            // A frozen parameter is the base's: a sample of its values tells two bases apart.
            if !p.requires_grad() {
                let flat = p.tensor().flatten_all().and_then(|t| t.narrow(0, 0, t.elem_count().min(64)));
                let sample = flat.and_then(|t| t.to_dtype(DType::F64)?.to_vec1::<f64>())?;
                hash = sample.iter().fold(hash, |h, v| dropout::mix(h ^ v.to_bits()));
            }
        }
        Ok(format!("{hash:016x}"))
    }

    /// The tree of modules, as PyTorch prints PEFT's.
    pub fn module_tree(&self) -> ModuleNode {
        ModuleNode::peft_model(self.0.decoder.module_tree())
    }

    /// What a notebook shows: the tree with foldable branches, the adapters marked.
    pub fn forms(&self) -> Forms {
        let tree = self.module_tree();
        vec![("text/html", tree.to_html(5)), ("text/plain", tree.to_string())]
    }
}

/// A copy of a module's weight that learns, called as in an adapter's file.
fn copy_to_learn(module: &str, weight: &Tensor) -> Result<Param> {
    Param::new(format!("base_model.model.{module}.weight"), weight)
}

/// The folder that the files of an adapter are in, fetched if it is an id of the hub.
fn adapter_folder(folder: &Path) -> Result<PathBuf> {
    let files = Snapshot::open(&folder.to_string_lossy())?;
    let config = files.file("adapter_config.json")?;
    files.file(WEIGHTS_FILE)?;
    Ok(config.parent().unwrap_or(folder).to_path_buf())
}

/// adapter_config.json, whose ranks the weights beside it have: what is made for a rank of a damaged file may be larger
/// than the memory.
fn saved_config(folder: &Path) -> Result<LoraConfig> {
    let config = LoraConfig::from_pretrained(folder)?;
    let longest = Weights::open(vec![folder.join(WEIGHTS_FILE)])?.longest_side();
    let largest = config.rank_pattern.values().copied().fold(config.r, usize::max);
    let expected = format!("a rank that {WEIGHTS_FILE} has, which is at most {longest}");
    ensure(largest <= longest, "r", largest, &expected, "load the adapter with its own adapter_config.json")?;
    Ok(config)
}

shown_by_forms!(PeftModel);

impl fmt::Display for PeftModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.module_tree().fmt(f)
    }
}

debug_as_display!(PeftModel);

impl CausalLM for PeftModel {
    fn vocab_size(&self) -> usize {
        self.0.decoder.vocab_size()
    }

    fn generation_defaults(&self) -> &Value {
        self.0.base.generation_defaults()
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

impl Trainable for PeftModel {
    fn trainable_parameters(&self) -> Vec<Param> {
        self.0.decoder.params()
    }

    fn forward_backward(&self, batch: &Batch, options: &PassOptions) -> Result<Pass> {
        self.0.decoder.forward_backward(batch, options, None)
    }

    fn forward_backward_with(&self, batch: &Batch, options: &PassOptions, loss: &LossFn) -> Result<Pass> {
        self.0.decoder.forward_backward(batch, options, Some(loss))
    }

    fn loss_scale(&self) -> Option<LossScale> {
        self.0.decoder.kept().loss_scale()
    }

    fn set_loss_scale(&self, scale: Option<LossScale>) {
        self.0.decoder.kept().set_loss_scale(scale);
    }

    fn loss(&self, batch: &Batch) -> Result<Pass> {
        self.0.decoder.loss(batch)
    }
}
