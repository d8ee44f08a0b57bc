//! A stand-in for a model, small enough to check by hand and easy to make fail.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::trained_model::TrainedModel;
use crate::{
    backend::{
        dropout::mix,
        kv_cache::KvCache,
        param::{Param, modify_f32, read_f32},
    },
    batch::Batch,
    collator::DataCollatorForSeq2Seq,
    dataset::Dataset,
    error::{Error, Result},
    features::{Features, IGNORE_INDEX},
    layers::custom_loss::LossFn,
    models::{
        causal_lm::{CausalLM, LossScale, Pass, PassOptions, Trainable},
        memory::{MemoryReport, StepShape},
    },
    tokenizer::PaddingSide,
};

pub(super) const VOCAB: usize = 11;
const R: usize = 4;

type Hook = Box<dyn FnMut(usize) -> f64 + Send>;

/// Logits of the next token = (A[token] * dropout mask) B: a bigram model of rank 4.
pub(super) struct Double {
    a: Param,
    b: Param,
    dropout: bool,
    pub lora_r: usize,
    passes: AtomicUsize,
    options: Mutex<Vec<PassOptions>>,
    /// Called with the number of the pass before it is made; what it returns is added to the loss.
    hook: Mutex<Option<Hook>>,
}

impl Double {
    pub fn new() -> Arc<Self> {
        Self::with(false)
    }

    pub fn with(dropout: bool) -> Arc<Self> {
        let numbers = |n: usize, seed: u64| -> Vec<f32> {
            (0..n).map(|i| (mix(seed ^ mix(i as u64)) >> 40) as f32 / (1u32 << 24) as f32 - 0.5).collect()
        };
        let param = |name: &str, shape: (usize, usize), seed| {
            Param::new(name, &Tensor::from_vec(numbers(shape.0 * shape.1, seed), shape, &Device::Cpu).unwrap()).unwrap()
        };
        Arc::new(Self {
            a: param("lora_A.weight", (VOCAB, R), 1),
            b: param("lora_B.weight", (R, VOCAB), 2),
            dropout,
            lora_r: R,
            passes: AtomicUsize::new(0),
            options: Mutex::new(Vec::new()),
            hook: Mutex::new(None),
        })
    }

    pub fn before_pass(&self, hook: impl FnMut(usize) -> f64 + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    pub fn no_hook(&self) {
        *self.hook.lock().unwrap() = None;
    }

    /// How each pass was asked for.
    pub fn options(&self) -> Vec<PassOptions> {
        self.options.lock().unwrap().clone()
    }

    /// All weights.
    pub fn weights(&self) -> Vec<f32> {
        [&self.a, &self.b].iter().flat_map(|p| p.value().flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
    }

    fn pass(
        &self,
        batch: &Batch,
        dropout_key: Option<u64>,
        mut backward: impl FnMut(usize, usize, [f32; R], &[f32]),
    ) -> Result<Pass> {
        let a = self.a.value().to_vec2::<f32>()?;
        let b = self.b.value().to_vec2::<f32>()?;
        let (ids, labels) = (batch.input_ids.to_vec2::<u32>()?, batch.labels.to_vec2::<i64>()?);
        let mut pass = Pass::default();
        for (row, (ids, labels)) in ids.iter().zip(&labels).enumerate() {
            for t in 0..ids.len() - 1 {
                if labels[t + 1] == IGNORE_INDEX {
                    continue;
                }
                let (token, next) = (ids[t] as usize, labels[t + 1] as usize);
                let mut hidden: [f32; R] = std::array::from_fn(|k| a[token][k]);
                if let Some(key) = dropout_key.filter(|_| self.dropout) {
                    for (k, h) in hidden.iter_mut().enumerate() {
                        *h *= if mix(key ^ mix((row * 1000 + t * 10 + k) as u64)) < u64::MAX / 4 {
                            0.0
                        } else {
                            4.0 / 3.0
                        };
                    }
                }
                let logits: Vec<f32> = (0..VOCAB).map(|v| (0..R).map(|k| hidden[k] * b[k][v]).sum()).collect();
                let total: f32 = logits.iter().map(|l| l.exp()).sum();
                pass.loss_sum += f64::from(total.ln() - logits[next]);
                pass.num_label_tokens += 1;
                let mut dlogits: Vec<f32> = logits.iter().map(|l| l.exp() / total).collect();
                dlogits[next] -= 1.0;
                backward(token, row, hidden, &dlogits);
            }
        }
        Ok(pass)
    }
}

impl CausalLM for Double {
    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn generation_defaults(&self) -> &Value {
        &Value::Null
    }
    fn new_cache(&self, _: usize) -> Result<KvCache> {
        Err(Error::Tokenizer("the double does not generate".into()))
    }
    fn next_token_logits(&self, _: &[&[u32]], _: &mut KvCache) -> Result<Tensor> {
        Err(Error::Tokenizer("the double does not generate".into()))
    }
}

impl Trainable for Double {
    fn trainable_parameters(&self) -> Vec<Param> {
        vec![self.a.clone(), self.b.clone()]
    }

    fn forward_backward_with(&self, _: &Batch, _: &PassOptions, _: &LossFn) -> Result<Pass> {
        Err(Error::Tokenizer("the double has its own loss".into()))
    }

    fn forward_backward(&self, batch: &Batch, options: &PassOptions) -> Result<Pass> {
        let number = self.passes.fetch_add(1, SeqCst);
        self.options.lock().unwrap().push(options.clone());
        let extra = self.hook.lock().unwrap().as_mut().map_or(0.0, |hook| hook(number));
        let b = self.b.value().to_vec2::<f32>()?;
        let (mut da, mut db) = (vec![0f32; VOCAB * R], vec![0f32; R * VOCAB]);
        let scale = 1.0 / options.num_items as f32;
        let mut pass = self.pass(batch, Some(options.dropout_key), |token, _, hidden, dlogits| {
            for k in 0..R {
                for v in 0..VOCAB {
                    db[k * VOCAB + v] += hidden[k] * dlogits[v] * scale;
                    da[token * R + k] += b[k][v] * dlogits[v] * scale;
                }
            }
        })?;
        modify_f32(self.a.grad(), |g| g.iter_mut().zip(&da).for_each(|(g, d)| *g += d))?;
        modify_f32(self.b.grad(), |g| g.iter_mut().zip(&db).for_each(|(g, d)| *g += d))?;
        pass.loss_sum += extra;
        Ok(pass)
    }

    fn loss_scale(&self) -> Option<LossScale> {
        None
    }

    fn set_loss_scale(&self, _: Option<LossScale>) {}

    fn loss(&self, batch: &Batch) -> Result<Pass> {
        self.pass(batch, None, |_, _, _, _| {})
    }
}

impl TrainedModel for Double {
    fn save_adapter(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        let tensors = HashMap::from([("a", self.a.value().clone()), ("b", self.b.value().clone())]);
        let path = folder.join("adapter_model.safetensors");
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).map_err(Error::io("write", &path))
    }

    fn load_adapter(&self, folder: &Path) -> Result<()> {
        let tensors = candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu)?;
        self.a.set(&tensors["a"])?;
        self.b.set(&tensors["b"])
    }

    fn identity(&self) -> Result<Vec<(String, Value)>> {
        Ok(vec![("LoraConfig.r".into(), json!(self.lora_r)), ("model".into(), json!("double"))])
    }

    fn memory_of_weights(&self) -> MemoryReport {
        MemoryReport::default()
    }

    fn memory_of_step(&self, _: StepShape) -> Result<MemoryReport> {
        Ok(MemoryReport::default())
    }
}

/// Whether all gradients are zero.
pub(super) fn gradients_are_zero(model: &Double) -> bool {
    model.trainable_parameters().iter().all(|p| read_f32(p.grad(), |g| g.iter().all(|x| *x == 0.0)).unwrap())
}

/// Rows of different lengths, the first tokens without labels.
pub(super) fn rows(n: usize) -> Vec<Features> {
    let row = |i: usize| {
        let ids: Vec<u32> = (0..3 + i % 4).map(|t| (mix((i * 31 + t) as u64) % VOCAB as u64) as u32).collect();
        let labels = ids.iter().enumerate().map(|(t, &id)| if t < 1 + i % 2 { IGNORE_INDEX } else { i64::from(id) });
        Features { labels: labels.collect(), attention_mask: vec![1; ids.len()], input_ids: ids }
    };
    (0..n).map(row).collect()
}

pub(super) fn dataset(rows: &[Features]) -> Dataset {
    let list = |f: fn(&Features) -> Vec<i64>| rows.iter().map(f).collect::<Vec<_>>();
    Dataset::from_columns([
        ("input_ids", list(|r| r.input_ids.iter().map(|&x| i64::from(x)).collect())),
        ("attention_mask", list(|r| r.attention_mask.iter().map(|&x| i64::from(x)).collect())),
        ("labels", list(|r| r.labels.clone())),
    ])
    .unwrap()
}

pub(super) fn collator() -> DataCollatorForSeq2Seq {
    DataCollatorForSeq2Seq {
        padding_side: PaddingSide::Left,
        pad_token_id: Some(0),
        pad_to_multiple_of: None,
        label_pad_token_id: IGNORE_INDEX,
    }
}
