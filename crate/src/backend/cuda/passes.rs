//! Passes on a GPU.
//!
//! A pass is a few hundred short launches, and launching them takes the CPU longer than running them
//! takes the GPU. So the second pass of a shape is recorded as a CUDA graph, and from then on the shape
//! is one launch ([`Repeated`]). What changes from batch to batch is in memory that the recorded launches
//! read ([`Inputs`]). Nothing is allocated when a graph runs.

use std::collections::{HashMap, hash_map::Entry};

use candle_core::{DType, Device, Tensor};

use super::{
    Gpu, Grads, HostInputs, InputDraw, InputShape, Inputs, Outputs, PLACES, Repeated, Results, Scalars, address,
    ops::{self, Order, Weights},
    uninit,
};
use crate::{
    backend::{
        Draw, Learning, LossScale, Next, Tokens, Work, internal,
        kv_cache::KvCache,
        run::{Run, Saved},
    },
    error::{Error, Result},
};

/// Shapes that are kept; beyond it the oldest are forgotten, all at once.
const MAX_SHAPES: usize = 128;

/// What a batch is on the card, for the operations of a pass.
#[derive(Clone, Copy)]
pub struct OnCard<'a> {
    pub inputs: &'a Inputs,
    /// How a pass that is repeated comes by its quantized weights.
    pub weights: Option<&'a Weights>,
    /// f32, one a row with a label.
    pub losses: &'a Tensor,
    /// The dtype of the activations in a pass that learns: that of the gradient of the logits.
    pub activations: DType,
}

/// What is kept between the passes of a model that learns.
struct Training {
    grads: Grads,
    outputs: Outputs,
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

/// The work of a pass that decodes.
type Logits<'a> = &'a mut (dyn FnMut(&mut Run) -> Result<Tensor> + Send);

fn host_inputs<'a>(tokens: &Tokens<'a>, scalars: Scalars) -> HostInputs<'a> {
    let Tokens { ids, targets, sequences } = *tokens;
    HostInputs { ids, targets, sequences, cache: None, scalars, draws: &[] }
}

/// A run of these tokens on the card.
fn run_of<'a>(gpu: &'static Gpu, tokens: &Tokens<'a>, card: OnCard<'a>) -> Run<'a> {
    let mut run = Run::new(gpu, tokens);
    run.card = Some(card);
    run
}

impl Gpu {
    pub(super) fn pass_on_card(&self, tokens: &Tokens, work: Work) -> Result<f64> {
        let (_one, gpu) = (self.hold(), self.forever()?);
        let host = host_inputs(tokens, Scalars { grad_scale: 1.0, loss_scale: 1.0, dropout_key: 0 });
        let inputs = Inputs::new(gpu, host.shape(true))?;
        inputs.fill(gpu, &host)?;
        let (outputs, losses) = (Outputs::new(gpu)?, ops::losses(gpu, inputs.shape.labels)?);
        let card = OnCard { inputs: &inputs, weights: None, losses: &losses, activations: DType::F32 };
        work(&mut run_of(gpu, tokens, card))?;
        self.sum_losses(&inputs, &losses, &outputs)?;
        Ok(outputs.read(gpu)?.0)
    }

    fn sum_losses(&self, inputs: &Inputs, losses: &Tensor, outputs: &Outputs) -> Result<()> {
        let (losses, loss, n) = (address(losses)?, outputs.loss()?, inputs.shape.labels as i32);
        self.launch("sum_f64", (1, 1, 1), 256, 0, &[&losses, &loss, &n])
    }

    /// Adds to the gradients. Gradients that overflowed f16 add nothing: the pass is made again with a smaller scale of
    /// the loss.
    pub(super) fn learn_on_card(&self, learning: &Learning, work: Work) -> Result<f64> {
        let _one = self.hold();
        let mut kept = learning.kept.on_device();
        if !kept.as_ref().is_some_and(|kept| kept.is::<Training>()) {
            *kept = Some(Box::new(self.new_training(learning)?));
        }
        let training = kept.as_mut().and_then(|kept| kept.downcast_mut::<Training>());
        let training = training.ok_or_else(|| internal("what was kept is gone"))?;
        // bf16 and f32 have the exponents for the smallest gradients.
        let scales = learning.activations == DType::F16;
        loop {
            let scale = if scales { Some(learning.kept.loss_scale().unwrap_or_default()) } else { None };
            let loss_scale = scale.map_or(1.0, |scale| scale.scale);
            let scalars = Scalars {
                dropout_key: learning.dropout_key,
                grad_scale: (learning.grad_scale / f64::from(loss_scale)) as f32,
                loss_scale,
            };
            let host = host_inputs(&learning.tokens, scalars);
            let (loss_sum, overflow) = self.with_room_to_record(|| self.repeat(training, learning, &host, work))?;
            let next = match scale {
                Some(scale) if overflow && loss_sum.is_finite() => scale.after_overflow(),
                _ => None,
            };
            let Some(smaller) = next else {
                if scales && !overflow {
                    learning.kept.set_loss_scale(scale.map(LossScale::after_good_pass));
                }
                return Ok(loss_sum);
            };
            training.grads.restore(self)?;
            learning.kept.set_loss_scale(Some(smaller));
        }
    }

    /// Runs `pass`, and once more when there was no room to record it: a pass that was only launched before leaves
    /// memory that can be given back, and a recording that failed has changed nothing.
    fn with_room_to_record<T>(&self, mut pass: impl FnMut() -> Result<T>) -> Result<T> {
        let done = pass();
        if matches!(done, Err(Error::OutOfDeviceMemory { .. })) && self.take_no_room_to_record() {
            self.trim()?;
            return pass();
        }
        done
    }

    fn new_training(&self, learning: &Learning) -> Result<Training> {
        // All places for dequantized weights as large as they must be, so that none is outgrown.
        if learning.largest_dequantized > 0 {
            (0..PLACES).try_for_each(|place| self.scratch(place, learning.largest_dequantized).map(drop))?;
        }
        let grads = Grads::new(self, &(learning.params)())?;
        Ok(Training { grads, outputs: Outputs::new(self)?, shapes: HashMap::new() })
    }

    /// The summed loss, and whether a gradient is not finite.
    fn repeat(
        &self,
        training: &mut Training,
        learning: &Learning,
        host: &HostInputs,
        work: &mut dyn FnMut(&mut Run) -> Result<()>,
    ) -> Result<(f64, bool)> {
        let key = (host.shape(true), learning.gradient_checkpointing);
        if training.shapes.len() >= MAX_SHAPES && !training.shapes.contains_key(&key) {
            training.shapes.clear();
        }
        let Shape { inputs, pass, order } = match training.shapes.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let inputs = Inputs::new(self, key.0)?;
                entry.insert(Shape { inputs, pass: Repeated::default(), order: Order::default() })
            }
        };
        inputs.fill(self, host)?;
        let (grads, outputs, inputs, gpu) = (&training.grads, &training.outputs, &*inputs, self.forever()?);
        pass.run(self, || {
            let weights = Weights::new(gpu, order)?;
            grads.save(gpu)?;
            let losses = ops::losses(gpu, inputs.shape.labels)?;
            let card = OnCard { inputs, weights: Some(&weights), losses: &losses, activations: learning.activations };
            let mut run = run_of(gpu, &learning.tokens, card);
            (run.saved, run.dropout_key) = (Some(Saved::default()), Some(learning.dropout_key));
            work(&mut run)?;
            self.sum_losses(inputs, &losses, outputs)?;
            weights.end()?;
            grads.check(gpu, outputs.flag()?)
        })?;
        outputs.read(self)
    }

    /// What follows the last new token of each sequence: a token a draw or, without draws and where the GPU could not
    /// choose, logits on the CPU.
    ///
    /// Where [`KvCache::expect`] has said what comes next, that pass is launched before this one's tokens are waited
    /// for: it finds them in its inputs. A call that asks for something else leaves its results alone, and writes what
    /// it has put into the cache, one token behind all that count, anew.
    pub(super) fn next_tokens_on_card(
        &self,
        tokens: &Tokens,
        vocab_size: usize,
        cache: &mut KvCache,
        draws: &[Draw],
        work: Logits,
    ) -> Result<Next> {
        let (_one, gpu) = (self.hold(), self.forever()?);
        self.with_room_to_record(|| next_tokens(gpu, tokens, vocab_size, cache, draws, work))
    }
}

fn next_tokens(
    gpu: &'static Gpu,
    tokens: &Tokens,
    vocab_size: usize,
    cache: &mut KvCache,
    draws: &[Draw],
    work: &mut (dyn FnMut(&mut Run) -> Result<Tensor> + Send),
) -> Result<Next> {
    let (ids, sequences) = (tokens.ids, tokens.sequences);
    let lengths = cache.lengths().to_vec();
    let expected = cache.take_expected();
    let input_draws: Vec<InputDraw> = draws.iter().map(input_draw).collect();
    let cache_place = Some((lengths.as_slice(), cache.capacity()));
    let host = HostInputs { cache: cache_place, draws: &input_draws, ..host_inputs(tokens, Scalars::default()) };
    // One token a sequence, with something before it: the pass that generation repeats.
    let repeats = ids.len() == sequences.len() && lengths.iter().all(|held| *held > 0);
    let recorded = cache.recorded.take().filter(|decode| repeats && decode.inputs.shape == host.shape(false));
    let mut decode = match recorded {
        Some(decode) => decode,
        None => Decode::new(gpu, host.shape(false), vocab_size)?,
    };
    let asked = Begun { ids: ids.to_vec(), lengths: lengths.clone(), draws: draws.to_vec() };
    if decode.begun.take() != Some(asked) {
        decode.inputs.fill(gpu, &host)?;
        decode.launch(gpu, tokens, cache, repeats, work)?;
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
        decode.inputs.fill_behind_ids(gpu, &host)?;
        decode.launch(gpu, tokens, cache, true, work)?;
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
                decode.inputs.fill(gpu, &host)?;
                decode.launch(gpu, tokens, cache, repeats, work)?;
            }
            Next::Logits(decode.logits.to_device(&Device::Cpu)?)
        }
    };
    cache.recorded = repeats.then_some(decode);
    Ok(next)
}

impl Decode {
    fn new(gpu: &'static Gpu, shape: InputShape, vocab_size: usize) -> Result<Self> {
        Ok(Self {
            inputs: Inputs::new(gpu, shape)?,
            logits: uninit(gpu, (shape.sequences, vocab_size), DType::F32)?,
            chosen: uninit(gpu, shape.draws, DType::I32)?,
            results: Results::new(gpu, shape.draws)?,
            turn: 0,
            pass: Repeated::default(),
            begun: None,
        })
    }

    /// Launches the pass, and the copy of what it chooses to the next place of the results.
    fn launch(
        &mut self,
        gpu: &'static Gpu,
        tokens: &Tokens,
        cache: &mut KvCache,
        repeats: bool,
        logits_of: &mut (dyn FnMut(&mut Run) -> Result<Tensor> + Send),
    ) -> Result<()> {
        let Self { inputs, logits, chosen, pass, results, turn, .. } = self;
        let draws = inputs.shape.draws;
        let mut work = || {
            // No row has a label: the place for losses is any tensor.
            let card = OnCard { inputs, weights: None, losses: logits, activations: DType::F32 };
            let mut run = run_of(gpu, tokens, card);
            run.cache = Some(cache);
            ops::copy_rows(&logits_of(&mut run)?, logits)?;
            let to_inputs = repeats && draws == inputs.shape.rows;
            if draws == 0 { Ok(()) } else { ops::sample(logits, inputs, chosen, to_inputs) }
        };
        if repeats {
            pass.run(gpu, work)?
        } else {
            work()?
        };
        *turn = 1 - *turn;
        if draws > 0 { results.copy(chosen, *turn) } else { Ok(()) }
    }
}

fn input_draw(draw: &Draw) -> InputDraw {
    let &Draw { row, top_k, temperature, top_p, u } = draw;
    InputDraw { row: row as i32, top_k: top_k.min(i32::MAX as usize) as i32, temperature, top_p, u }
}
