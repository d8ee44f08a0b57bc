//! Step 4b: the adapters, as PEFT makes, prints and saves them.

pub mod config;
pub mod config_file;
mod init;
mod target_modules;
pub mod targets;

use std::{collections::HashMap, fmt, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::{
    batch::Batch,
    display::{Forms, shown_by_forms},
    error::{Error, Result},
    hub::Snapshot,
    layers::{
        dropout,
        kv_cache::KvCache,
        linear::{Linear, Lora, Weight},
        own_loss::LossFn,
        param::Param,
    },
    model::{Model, module_tree},
    models::{
        causal_lm::{CausalLM, Draw, Next, Pass, PassOptions, Trainable},
        decoder::{Decoder, Parameter},
        memory::MemoryReport,
    },
    module_tree::{ModuleNode, trainable_parameters_text},
    safe_file::write_atomically,
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

/// A model with LoRA adapters on some of its linear layers. Cloning is cheap and shares
/// weights and adapters.
#[derive(Clone)]
pub struct PeftModel(Arc<Inner>);

struct Inner {
    base: Model,
    decoder: Decoder,
    config: LoraConfig,
}

impl PeftModel {
    fn build(base: &Model, config: &LoraConfig, seed: u64) -> Result<Self> {
        let names: Vec<String> = base.decoder().linears().iter().map(|l| l.name.clone()).collect();
        let model_type = base.config()["model_type"].as_str().unwrap_or_default();
        let (config, targets) = config.prepare(model_type, &names)?;
        let mut init = init::LoraInit::new(seed, config.init_lora_weights);
        let mut index = 0;
        let device = base.device();
        let decoder = base.decoder().map_linears(|linear| {
            let chosen = targets.contains(&index);
            index += 1;
            if !chosen {
                return Ok(linear.clone());
            }
            let (out, input) = linear.weight.dims2()?;
            let r = config.rank_of(&linear.name)?;
            let (a, b) = init.next(r, input, out)?;
            let name = |part: &str| format!("base_model.model.{}.{part}.weight", linear.name);
            Ok(linear.with_lora(Lora {
                a: Param::new(name("lora_A"), &a.to_device(device)?)?,
                b: Param::new(name("lora_B"), &b.to_device(device)?)?,
                scaling: config.scaling_of(&linear.name)?,
                dropout: config.lora_dropout,
                id: dropout::mix(index as u64),
            }))
        })?;
        Ok(Self(Arc::new(Inner { base: base.clone(), decoder, config })))
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
        let files = Snapshot::open(&folder.to_string_lossy())?;
        let config = files.file("adapter_config.json")?;
        let folder = config.parent().unwrap_or(folder);
        let config = LoraConfig::from_pretrained(folder)?;
        files.file(WEIGHTS_FILE)?;
        let this = Self::build(model, &config, DEFAULT_SEED)?;
        this.load_adapter_weights(folder)?;
        Ok(this)
    }

    /// Replaces the adapters' values by those in `folder`; all or none.
    pub fn load_adapter_weights(&self, folder: &Path) -> Result<()> {
        let path = folder.join(WEIGHTS_FILE);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let mut found: HashMap<String, Tensor> =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| Error::Malformed {
                path: path.clone(),
                format: "safetensors file",
                detail: e.to_string(),
                remedy: "the file is damaged: save the adapter again".into(),
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
                return Err(Error::Malformed {
                    path,
                    format: "adapter",
                    detail: format!("{} has a NaN or an infinity", param.name()),
                    remedy: "load an earlier checkpoint".into(),
                });
            }
        }
        params.iter().zip(&values).try_for_each(|(param, value)| param.set(value))
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads. Each file
    /// is written beside its place and then renamed: what was there stays until then.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_pretrained_path(folder.as_ref())
    }

    fn save_pretrained_path(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        let params = self.trainable_parameters();
        let tensors: Vec<(&str, &Tensor)> = params.iter().map(|p| (p.name(), p.value())).collect();
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let path = folder.join(WEIGHTS_FILE);
        let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|e| Error::Malformed {
            path: path.clone(),
            format: "safetensors file",
            detail: e.to_string(),
            remedy: "report this as a bug".into(),
        })?;
        write_atomically(&path, &bytes)?;
        LoraConfig { inference_mode: true, ..self.0.config.clone() }.save_pretrained(folder)
    }

    /// The base model with the adapters added into its weights: W + scaling * B A, in f32, then
    /// rounded to `torch_dtype`.
    ///
    /// A quantized layer becomes a dense one: quantizing the sum again would throw away much of
    /// what the adapter learned.
    pub fn merge_and_unload(&self) -> Result<Model> {
        let mut tied = self.0.decoder.tied;
        let mut decoder = self.0.decoder.map_linears(|linear| {
            let Some(lora) = &linear.lora else { return Ok(linear.clone()) };
            tied &= linear.name != self.0.decoder.head.name;
            let weight = linear.weight.dequantize()?;
            let update = (lora.b.value().matmul(lora.a.value())? * lora.scaling)?;
            let merged = (weight.to_dtype(DType::F32)? + update)?.to_dtype(weight.dtype())?;
            Ok(Linear { weight: Weight::Dense(merged), lora: None, ..linear.clone() })
        })?;
        decoder.tied = tied;
        Ok(self.0.base.with_decoder(decoder))
    }

    /// Logits `[B, T, vocab]` f32, adapters included; see [`Model::logits`].
    pub fn logits(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        self.0.decoder.logits(input_ids, attention_mask)
    }

    /// The configuration, its layers named.
    pub fn config(&self) -> &LoraConfig {
        &self.0.config
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
    /// can be exchanged. Values are not part of it.
    pub fn fingerprint(&self) -> String {
        let mut hash = dropout::mix(0);
        for (name, p) in self.named_parameters() {
            let shape = format!("{name} {:?} {:?}", p.dims(), p.dtype());
            hash = shape.bytes().fold(hash, |h, byte| dropout::mix(h ^ u64::from(byte)));
            // A frozen parameter is the base's: a sample of its values tells two bases apart.
            if !p.requires_grad() {
                let flat = p.tensor().flatten_all().and_then(|t| t.narrow(0, 0, t.elem_count().min(64)));
                let sample = flat.and_then(|t| t.to_dtype(DType::F64)?.to_vec1::<f64>()).unwrap_or_default();
                hash = sample.iter().fold(hash, |h, v| dropout::mix(h ^ v.to_bits()));
            }
        }
        format!("{hash:016x}")
    }

    /// The tree of modules, as PyTorch prints PEFT's.
    pub fn module_tree(&self) -> ModuleNode {
        ModuleNode::peft_model(module_tree(&self.0.decoder))
    }

    /// What a notebook shows: the tree with foldable branches, the adapters marked.
    pub fn forms(&self) -> Forms {
        let tree = self.module_tree();
        vec![("text/html", tree.to_html(5)), ("text/plain", tree.to_string())]
    }
}

shown_by_forms!(PeftModel);

impl fmt::Display for PeftModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.module_tree().fmt(f)
    }
}

impl fmt::Debug for PeftModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

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
        let adapters = self.0.decoder.linears().into_iter().filter_map(|l| l.lora.as_ref());
        adapters.flat_map(|l| [l.a.clone(), l.b.clone()]).collect()
    }

    fn forward_backward(&self, batch: &Batch, options: &PassOptions) -> Result<Pass> {
        self.0.decoder.forward_backward(batch, options)
    }

    fn forward_backward_with(&self, batch: &Batch, options: &PassOptions, loss: &LossFn) -> Result<Pass> {
        self.0.decoder.forward_backward_with(batch, options, loss)
    }

    fn loss(&self, batch: &Batch) -> Result<Pass> {
        self.0.decoder.loss(batch)
    }
}
