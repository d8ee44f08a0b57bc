//! A decoder's passes on a GPU.
//!
//! A pass is a few hundred short launches, and launching them takes the CPU longer than running them
//! takes the GPU. So the second pass of a shape is recorded as a CUDA graph, and from then on the shape
//! is one launch. What changes from batch to batch is in memory that the recorded launches read
//! ([`Inputs`]). Nothing is allocated when a graph runs.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
};

use candle_core::{DType, Device, Tensor};

use super::{
    causal_lm::{Pass, PassOptions},
    decoder::Decoder,
};
use crate::{
    cuda::{self, Gpu, Grads, Graph, HostInputs, InputShape, Inputs, Outputs, Scalars},
    error::Result,
    layers::{
        cuda as layers,
        kv_cache::KvCache,
        run::Run,
        sequences::{IGNORE_INDEX, Packed, Sequences},
    },
};

/// Gradients of the loss are multiplied by this in f16: a probability of 1e-5 is then a normal number.
const F16_LOSS_SCALE: f32 = 256.0;
/// Where the search for a scale that does not overflow ends.
const MIN_LOSS_SCALE: f32 = 1.0 / 65536.0;
/// Shapes that are kept; beyond it the oldest are forgotten, all at once.
const MAX_SHAPES: usize = 128;

/// What is kept between the passes of one model.
#[derive(Clone, Default)]
pub struct Recorded(Arc<Mutex<Option<Training>>>);

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorded")
    }
}

struct Training {
    grads: Grads,
    outputs: Outputs,
    loss_scale: f32,
    shapes: HashMap<(InputShape, bool), Shape>,
}

struct Shape {
    inputs: Inputs,
    passes: usize,
    graph: Option<Graph>,
}

/// The pass of one new token a sequence, recorded.
pub(crate) struct Decode {
    inputs: Inputs,
    logits: Tensor,
    passes: usize,
    graph: Option<Graph>,
}

impl Decoder {
    fn gpu(&self) -> Result<Arc<Gpu>> {
        cuda::of(self.device())
    }

    /// The embeddings of the inputs' ids.
    fn embed_on_gpu(&self, inputs: &Inputs, run: &mut Run) -> Result<Tensor> {
        let x = layers::rows(&self.embedding.weight, inputs.ids(), inputs.shape.rows)?;
        match &self.embedding_norm {
            None => Ok(x),
            Some(norm) => norm.forward(&x, run),
        }
    }

    fn blocks_on_gpu(&self, inputs: &Inputs, run: &mut Run) -> Result<Tensor> {
        let mut x = self.embed_on_gpu(inputs, run)?;
        for (i, block) in self.blocks.iter().enumerate() {
            run.block = i;
            x = block.forward(&x, run)?;
        }
        Ok(x)
    }

    /// A batch on the device, for a pass that is not recorded.
    fn inputs_of(&self, gpu: &Gpu, packed: &Packed) -> Result<Inputs> {
        let host = HostInputs {
            ids: &packed.ids,
            targets: &packed.targets,
            sequences: &packed.sequences,
            cache: None,
            scalars: Scalars { grad_scale: 1.0, loss_scale: 1.0, dropout_key: 0 },
        };
        let inputs = Inputs::new(gpu, host.shape(true))?;
        inputs.fill(gpu, &host)?;
        Ok(inputs)
    }

    /// f32 on the CPU, `[M, vocab]` of the real rows.
    pub(super) fn logits_on_gpu(&self, packed: &Packed) -> Result<Tensor> {
        let gpu = self.gpu()?;
        let inputs = self.inputs_of(&gpu, packed)?;
        let mut run = Run { inputs: Some(&inputs), ..Run::inference(&packed.sequences) };
        let x = self.blocks_on_gpu(&inputs, &mut run)?;
        let x = self.final_norm.forward(&x, &mut run)?;
        let logits = layers::head_logits(&self.head, &x, &mut run)?;
        self.to_cpu(&logits, packed.ids.len(), self.vocab_size())
    }

    fn to_cpu(&self, x: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
        let x = x.narrow(0, 0, rows)?.narrow(1, 0, columns)?.contiguous()?;
        Ok(x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
    }

    pub(super) fn hidden_states_on_gpu(&self, packed: &Packed) -> Result<Vec<Tensor>> {
        let gpu = self.gpu()?;
        let inputs = self.inputs_of(&gpu, packed)?;
        let mut run = Run { inputs: Some(&inputs), ..Run::inference(&packed.sequences) };
        let (rows, width) = (packed.ids.len(), self.hidden_size());
        let mut x = self.embed_on_gpu(&inputs, &mut run)?;
        let mut states = vec![self.to_cpu(&x, rows, width)?];
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &mut run)?;
            if i + 1 == self.blocks.len() {
                x = self.final_norm.forward(&x, &mut run)?;
            }
            states.push(self.to_cpu(&x, rows, width)?);
        }
        Ok(states)
    }

    pub(super) fn loss_on_gpu(&self, packed: &Packed) -> Result<Pass> {
        let gpu = self.gpu()?;
        let inputs = self.inputs_of(&gpu, packed)?;
        let outputs = Outputs::new(&gpu)?;
        let mut run = Run { inputs: Some(&inputs), ..Run::inference(&packed.sequences) };
        let x = self.blocks_on_gpu(&inputs, &mut run)?;
        let x = self.final_norm.forward(&x, &mut run)?;
        layers::head_and_loss(&x, &self.head, false, outputs.loss()?, &run)?;
        Ok(Pass { loss_sum: outputs.read(&gpu)?.0, num_label_tokens: labels(packed) })
    }

    /// Adds to the gradient of every adapter. A gradient that overflowed f16 adds nothing: the pass is
    /// made again with a smaller scale of the loss.
    pub(super) fn forward_backward_on_gpu(&self, packed: &Packed, options: &PassOptions) -> Result<Pass> {
        let gpu = self.gpu()?;
        let mut kept = self.recorded.0.lock().unwrap_or_else(|e| e.into_inner());
        let training = match &mut *kept {
            Some(training) => training,
            empty => empty.insert(self.new_training(&gpu)?),
        };
        let num_label_tokens = labels(packed);
        loop {
            let loss_scale = training.loss_scale;
            let scalars = Scalars {
                dropout_key: options.dropout_key,
                grad_scale: (1.0 / (options.num_items * f64::from(loss_scale))) as f32,
                loss_scale,
            };
            let host = HostInputs {
                ids: &packed.ids,
                targets: &packed.targets,
                sequences: &packed.sequences,
                cache: None,
                scalars,
            };
            let (loss_sum, overflow) = self.pass_on_gpu(&gpu, training, &host, options.gradient_checkpointing)?;
            if !overflow || loss_scale <= MIN_LOSS_SCALE || !loss_sum.is_finite() {
                return Ok(Pass { loss_sum, num_label_tokens });
            }
            training.grads.restore(&gpu)?;
            training.loss_scale /= 4.0;
        }
    }

    fn new_training(&self, gpu: &Gpu) -> Result<Training> {
        let lora = self.linears().into_iter().filter_map(|l| l.lora.as_ref());
        let params: Vec<_> = lora.flat_map(|l| [l.a.clone(), l.b.clone()]).collect();
        // bf16 and f32 have the exponents for the smallest gradients.
        let is_f16 = self.embedding.weight.dtype() == DType::F16;
        Ok(Training {
            grads: Grads::new(gpu, &params)?,
            outputs: Outputs::new(gpu)?,
            loss_scale: if is_f16 { F16_LOSS_SCALE } else { 1.0 },
            shapes: HashMap::new(),
        })
    }

    /// The summed loss, and whether a gradient is not finite.
    fn pass_on_gpu(
        &self,
        gpu: &Gpu,
        training: &mut Training,
        host: &HostInputs,
        checkpointing: bool,
    ) -> Result<(f64, bool)> {
        let key = (host.shape(true), checkpointing);
        if training.shapes.len() >= MAX_SHAPES && !training.shapes.contains_key(&key) {
            training.shapes.clear();
        }
        let shape = match training.shapes.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Shape { inputs: Inputs::new(gpu, key.0)?, passes: 0, graph: None })
            }
        };
        shape.inputs.fill(gpu, host)?;
        let (inputs, grads, outputs) = (&shape.inputs, &training.grads, &training.outputs);
        let work = || self.launch_pass(gpu, inputs, grads, outputs, host, checkpointing);
        // The first pass also chooses algorithms and loads kernels, which cannot be recorded.
        match (&shape.graph, shape.passes) {
            (Some(graph), _) => graph.launch(gpu)?,
            (None, 0) => work()?,
            (None, _) => {
                let graph = Graph::record(gpu, work)?;
                graph.launch(gpu)?;
                shape.graph = Some(graph);
            }
        }
        shape.passes += 1;
        outputs.read(gpu)
    }

    fn launch_pass(
        &self,
        gpu: &Gpu,
        inputs: &Inputs,
        grads: &Grads,
        outputs: &Outputs,
        host: &HostInputs,
        checkpointing: bool,
    ) -> Result<()> {
        let key = Some(host.scalars.dropout_key);
        let run = |saves: bool| Run {
            inputs: Some(inputs),
            dropout_key: key,
            saved: saves.then(Default::default),
            ..Run::inference(host.sequences)
        };
        grads.save(gpu)?;
        let embedded = self.embed_on_gpu(inputs, &mut run(false))?;
        self.learn(embedded, checkpointing, &run, |x, run| {
            let dx = layers::head_and_loss(x, &self.head, true, outputs.loss()?, run)?;
            Ok(dx.filter(|_| inputs.shape.labels > 0))
        })?;
        grads.check(gpu, outputs.flag()?)
    }

    /// Logits after the last new token of each sequence, f32 `[sequences, vocab]` on the CPU.
    pub(super) fn next_token_logits_on_gpu(
        &self,
        ids: &[u32],
        sequences: &Sequences,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let gpu = self.gpu()?;
        let count = sequences.len();
        let lengths = cache.lengths().to_vec();
        let host = HostInputs {
            ids,
            targets: &[],
            sequences,
            cache: Some((&lengths, cache.capacity())),
            scalars: Scalars::default(),
        };
        let shape = host.shape(false);
        // One token a sequence, with something before it: the pass that generation repeats.
        if ids.len() == count && lengths.iter().all(|held| *held > 0) {
            let mut decode = match cache.recorded.take() {
                Some(decode) => decode,
                None => Decode {
                    inputs: Inputs::new(&gpu, shape)?,
                    logits: cuda::uninit(&gpu, (count, self.vocab_size()), DType::F32)?,
                    passes: 0,
                    graph: None,
                },
            };
            decode.inputs.fill(&gpu, &host)?;
            let mut work = || {
                let logits = self.new_rows(&decode.inputs, sequences, cache)?;
                layers::copy_rows(&logits, &decode.logits)
            };
            match (&decode.graph, decode.passes) {
                (Some(graph), _) => graph.launch(&gpu)?,
                (None, 0) => work()?,
                (None, _) => {
                    let graph = Graph::record(&gpu, work)?;
                    graph.launch(&gpu)?;
                    decode.graph = Some(graph);
                }
            }
            decode.passes += 1;
            let logits = decode.logits.to_device(&Device::Cpu)?;
            cache.recorded = Some(decode);
            return Ok(logits);
        }
        let inputs = Inputs::new(&gpu, shape)?;
        inputs.fill(&gpu, &host)?;
        let logits = self.new_rows(&inputs, sequences, cache)?;
        self.to_cpu(&logits, count, self.vocab_size())
    }

    /// Appends the rows of `inputs` to the cache; logits of the last row of each sequence.
    fn new_rows(&self, inputs: &Inputs, sequences: &Sequences, cache: &mut KvCache) -> Result<Tensor> {
        let x = {
            let mut run = Run { inputs: Some(inputs), cache: Some(cache), ..Run::inference(sequences) };
            self.blocks_on_gpu(inputs, &mut run)?
        };
        let x = if sequences.len() == sequences.num_tokens() {
            x
        } else {
            let last: Vec<u32> = sequences.ranges().map(|r| r.end as u32 - 1).collect();
            x.index_select(&Tensor::new(last, x.device())?, 0)?
        };
        let mut run = Run { inputs: Some(inputs), ..Run::inference(sequences) };
        let x = self.final_norm.forward(&x, &mut run)?;
        layers::head_logits(&self.head, &x, &mut run)
    }
}

fn labels(packed: &Packed) -> usize {
    packed.targets.iter().filter(|t| **t != IGNORE_INDEX).count()
}
