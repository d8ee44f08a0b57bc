//! A decoder's passes on a GPU.
//!
//! A pass is a few hundred short launches, and launching them takes the CPU longer than running them
//! takes the GPU. So the second pass of a shape is recorded as a CUDA graph, and from then on the shape
//! is one launch ([`Repeated`]). What changes from batch to batch is in memory that the recorded launches
//! read ([`Inputs`]). Nothing is allocated when a graph runs.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    sync::{Arc, Mutex},
};

use candle_core::{DType, Device, Tensor};

use super::{
    causal_lm::{Draw, Next, Pass, PassOptions},
    decoder::Decoder,
};
use crate::{
    cuda::{self, Gpu, Grads, HostInputs, InputDraw, InputShape, Inputs, Outputs, Repeated, Results, Scalars},
    error::Result,
    layers::{
        cuda::{self as layers, Order, Weights},
        kv_cache::KvCache,
        linear::Weight,
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
    pass: Repeated,
    order: Order,
}

/// The pass of one new token a sequence, recorded.
pub(crate) struct Decode {
    inputs: Inputs,
    /// f32 `[sequences, vocab]`.
    logits: Tensor,
    /// i32, one a draw.
    chosen: Tensor,
    /// The same on the host, of the last two passes in turn.
    results: Results,
    turn: usize,
    pass: Repeated,
    /// A pass that was launched before it was asked for.
    begun: Option<Begun>,
}

/// What a pass that was launched beforehand was launched for.
#[derive(PartialEq)]
struct Begun {
    ids: Vec<u32>,
    lengths: Vec<usize>,
    draws: Vec<Draw>,
}

/// Whether the draws are one for each row, in order.
fn one_each(draws: &[Draw]) -> bool {
    draws.iter().enumerate().all(|(i, draw)| draw.row == i)
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
            draws: &[],
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
                draws: &[],
            };
            let (loss_sum, overflow) = self.pass_on_gpu(&gpu, training, &host, options.gradient_checkpointing)?;
            if !overflow || loss_scale <= MIN_LOSS_SCALE || !loss_sum.is_finite() {
                return Ok(Pass { loss_sum, num_label_tokens });
            }
            training.grads.restore(&gpu)?;
            training.loss_scale /= 4.0;
        }
    }

    /// Makes both places for dequantized weights as large as they must be, so that none is outgrown.
    fn reserve(&self, gpu: &Gpu) -> Result<()> {
        let width = self.embedding.weight.dtype().size_in_bytes();
        let largest = self.linears().into_iter().filter_map(|l| match &l.weight {
            Weight::Quantized(q) => Some(q.shape().iter().product::<usize>() * width),
            Weight::Dense(_) => None,
        });
        let Some(largest) = largest.max() else { return Ok(()) };
        (0..cuda::PLACES).try_for_each(|place| gpu.scratch(place, largest).map(drop))
    }

    fn new_training(&self, gpu: &Gpu) -> Result<Training> {
        self.reserve(gpu)?;
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
        let Shape { inputs, pass, order } = match training.shapes.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let inputs = Inputs::new(gpu, key.0)?;
                entry.insert(Shape { inputs, pass: Repeated::default(), order: Order::default() })
            }
        };
        inputs.fill(gpu, host)?;
        let (grads, outputs) = (&training.grads, &training.outputs);
        pass.run(gpu, || self.launch_pass(gpu, inputs, order, (grads, outputs), host, checkpointing))?;
        outputs.read(gpu)
    }

    fn launch_pass(
        &self,
        gpu: &Gpu,
        inputs: &Inputs,
        order: &Order,
        (grads, outputs): (&Grads, &Outputs),
        host: &HostInputs,
        checkpointing: bool,
    ) -> Result<()> {
        let key = Some(host.scalars.dropout_key);
        let weights = Weights::new(self.gpu()?, order)?;
        let run = |saves: bool| Run {
            inputs: Some(inputs),
            weights: Some(&weights),
            dropout_key: key,
            saved: saves.then(Default::default),
            ..Run::inference(host.sequences)
        };
        grads.save(gpu)?;
        let embedded = self.embed_on_gpu(inputs, &mut run(false))?;
        self.learn(embedded, checkpointing, &run, |x, run| {
            layers::head_and_loss(x, &self.head, true, outputs.loss()?, run)
        })?;
        weights.end()?;
        grads.check(gpu, outputs.flag()?)
    }

    /// What follows the last new token of each sequence: a token a draw or, without draws and where the GPU could not
    /// choose, logits on the CPU.
    ///
    /// Where [`KvCache::expect`] has said what comes next, that pass is launched before this one's tokens are waited
    /// for: it finds them in its inputs. A call that asks for something else leaves its results alone, and writes what
    /// it has put into the cache, one token behind all that count, anew.
    pub(super) fn next_tokens_on_gpu(
        &self,
        ids: &[u32],
        sequences: &Sequences,
        cache: &mut KvCache,
        draws: &[Draw],
    ) -> Result<Next> {
        let gpu = self.gpu()?;
        let lengths = cache.lengths().to_vec();
        let expected = std::mem::take(&mut cache.expected);
        let input_draws: Vec<InputDraw> = draws.iter().map(input_draw).collect();
        let host = HostInputs {
            ids,
            targets: &[],
            sequences,
            cache: Some((&lengths, cache.capacity())),
            scalars: Scalars::default(),
            draws: &input_draws,
        };
        // One token a sequence, with something before it: the pass that generation repeats.
        let repeats = ids.len() == sequences.len() && lengths.iter().all(|held| *held > 0);
        let recorded = cache.recorded.take().filter(|decode| repeats && decode.inputs.shape == host.shape(false));
        let mut decode = match recorded {
            Some(decode) => decode,
            None => self.new_decode(&gpu, host.shape(false))?,
        };
        let asked = Begun { ids: ids.to_vec(), lengths: lengths.clone(), draws: draws.to_vec() };
        if decode.begun.take() != Some(asked) {
            decode.inputs.fill(&gpu, &host)?;
            self.launch_decode(&gpu, &mut decode, sequences, cache, repeats)?;
        }
        if draws.is_empty() {
            let logits = decode.logits.to_device(&Device::Cpu)?;
            cache.recorded = repeats.then_some(decode);
            return Ok(Next::Logits(logits));
        }
        let result = decode.turn;
        // The pass that follows if every sequence goes on with its token, which the card already has in its inputs.
        let more: Vec<usize> = lengths.iter().map(|held| held + 1).collect();
        let fits = more.iter().all(|held| *held < cache.capacity());
        let begins = repeats && fits && expected.len() == draws.len() && one_each(draws) && one_each(&expected);
        if begins {
            let input_draws: Vec<InputDraw> = expected.iter().map(input_draw).collect();
            let cache_place = Some((more.as_slice(), cache.capacity()));
            let host = HostInputs { cache: cache_place, draws: &input_draws, ..host };
            decode.inputs.fill_behind_ids(&gpu, &host)?;
            self.launch_decode(&gpu, &mut decode, sequences, cache, true)?;
        }
        let chosen = decode.results.wait(result)?;
        let next = match chosen.iter().map(|&id| u32::try_from(id)).collect::<Result<Vec<u32>, _>>() {
            Ok(ids) => {
                decode.begun = begins.then(|| Begun { ids: ids.clone(), lengths: more, draws: expected });
                Next::Ids(ids)
            }
            Err(_) => {
                // The pass that has begun makes logits of its own.
                if begins {
                    decode.inputs.fill(&gpu, &host)?;
                    self.launch_decode(&gpu, &mut decode, sequences, cache, repeats)?;
                }
                Next::Logits(decode.logits.to_device(&Device::Cpu)?)
            }
        };
        cache.recorded = repeats.then_some(decode);
        Ok(next)
    }

    /// Launches the pass, and the copy of what it chooses to the next place of the results.
    fn launch_decode(
        &self,
        gpu: &Gpu,
        decode: &mut Decode,
        sequences: &Sequences,
        cache: &mut KvCache,
        repeats: bool,
    ) -> Result<()> {
        let Decode { inputs, logits, chosen, pass, results, turn, .. } = decode;
        let draws = inputs.shape.draws;
        let mut work = || {
            layers::copy_rows(&self.new_rows(inputs, sequences, cache)?, logits)?;
            let to_inputs = repeats && draws == inputs.shape.rows;
            if draws == 0 { Ok(()) } else { layers::sample(logits, inputs, chosen, to_inputs) }
        };
        if repeats {
            pass.run(gpu, work)?
        } else {
            work()?
        };
        *turn = 1 - *turn;
        if draws > 0 { results.copy(chosen, *turn) } else { Ok(()) }
    }

    fn new_decode(&self, gpu: &Arc<Gpu>, shape: InputShape) -> Result<Decode> {
        Ok(Decode {
            inputs: Inputs::new(gpu, shape)?,
            logits: cuda::uninit(gpu, (shape.sequences, self.vocab_size()), DType::F32)?,
            chosen: cuda::uninit(gpu, shape.draws, DType::I32)?,
            results: Results::new(gpu, shape.draws)?,
            turn: 0,
            pass: Repeated::default(),
            begun: None,
        })
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

fn input_draw(draw: &Draw) -> InputDraw {
    let &Draw { row, top_k, temperature, top_p, u } = draw;
    InputDraw { row: row as i32, top_k: top_k.min(i32::MAX as usize) as i32, temperature, top_p, u }
}

fn labels(packed: &Packed) -> usize {
    packed.targets.iter().filter(|t| **t != IGNORE_INDEX).count()
}
