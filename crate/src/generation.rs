//! From a prompt to text, token by token: logits, processors, a choice, until the end.
//!
//! The settings, their defaults and the order of the processors are those of
//! `transformers`' `generate`.

pub mod config;
pub mod processors;
pub mod sampling;

use candle_core::{Device, Tensor};

pub use self::config::GenerationConfig;
use self::{
    config::Settings,
    processors::{Scratch, SeenTokens},
    sampling::Rng,
};
use crate::{
    backend::{cpu::math::max_of, param::read_f32},
    error::{Error, Result, ensure},
    interrupt,
    models::causal_lm::{CausalLM, Draw, Next},
};

/// The largest `top_k` with which the model's own device can choose a token.
const MOST_DRAWN_FROM: usize = 256;

/// New tokens that the cache has room for from the beginning; beyond them it grows.
const ROOM_FOR: usize = 256;

/// What was generated from one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the prompt; the end token, if it came, is the last.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub finish_reason: FinishReason,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model chose an end token.
    Eos,
    /// `max_length` or `max_new_tokens` was reached.
    Length,
    /// The user asked to stop.
    Interrupted,
}

/// Continues each prompt. `on_token(i, id)` is called for every token as it is chosen, `i` being
/// the index of its sequence in the result: the sequences of the first prompt, then those of
/// the second, and so on.
///
/// All prompts run as one batch, of any lengths; a sequence that is done leaves it. With a seed
/// a prompt becomes the same text in any batch, as far as the rounding of the model's logits
/// allows; the n-th of `num_return_sequences` draws from the n-th stream of the seed.
///
/// # Errors
/// `InvalidArgument` for settings outside their domain, an empty prompt and one that leaves no
/// room under `max_length`; `TokenId`; `LogitsNotFinite`.
pub fn generate(
    model: &dyn CausalLM,
    prompts: &[Vec<u32>],
    config: &GenerationConfig,
    on_token: &mut dyn FnMut(usize, u32),
) -> Result<Vec<Generated>> {
    let settings = Settings::new(config, model.generation_defaults())?;
    let mut sequences = start_sequences(prompts, &settings, model.vocab_size())?;
    if sequences.is_empty() {
        return Ok(Vec::new());
    }
    let guard = interrupt::Guard::new()?;
    let mut chooser = Chooser { settings, logits: Vec::new(), scratch: Scratch::default() };
    let mut cache = model.new_cache(prompts.len())?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let new = sequences.iter().map(|s| s.max_new_tokens).max().unwrap_or(0);
    cache.make_room(longest + new.min(ROOM_FOR))?;
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    // The sequences that go on, each with its row in the logits and the cache. A prompt is read
    // once, however many sequences begin with it.
    let copies = chooser.settings.num_return_sequences;
    let mut active: Vec<(usize, usize)> = (0..sequences.len()).map(|i| (i, i / copies)).collect();
    let mut rows = prompts.len();
    let mut next = model.next_tokens(&prompts, &mut cache, &chooser.draws(&active, &mut sequences));
    // A pass that was stopped is an error that nobody looks at: what there is so far is given back.
    while !interrupt::requested() {
        let now = next?;
        for (place, &(i, row)) in active.iter().enumerate() {
            let id = match &now {
                Next::Ids(ids) => ids[place],
                Next::Logits(logits) => chooser.choose(logits, row, &sequences[i])?,
            };
            sequences[i].push(id, &chooser.settings);
            on_token(i, id);
        }
        active.retain(|&(i, _)| sequences[i].finish_reason.is_none());
        if active.is_empty() {
            break;
        }
        let keep: Vec<usize> = active.iter().map(|&(_, row)| row).collect();
        if !keep.iter().copied().eq(0..rows) {
            cache.keep_sequences(&keep)?;
        }
        rows = keep.len();
        active.iter_mut().enumerate().for_each(|(row, sequence)| sequence.1 = row);
        let draws = chooser.draws(&active, &mut sequences);
        cache.expect(chooser.draws_after(&active, &sequences));
        let last: Vec<&[u32]> = active.iter().map(|&(i, _)| sequences[i].last()).collect();
        next = model.next_tokens(&last, &mut cache, &draws);
    }
    drop(guard);
    Ok(sequences.into_iter().map(Sequence::finish).collect())
}

/// A sequence on its way.
struct Sequence {
    prompt: usize,
    prompt_length: usize,
    ids: Vec<u32>,
    max_new_tokens: usize,
    rng: Rng,
    /// Uniform in [0, 1): picks the next token from the cumulative probabilities. Drawn before the logits are known, so
    /// that the device which makes them can choose.
    u: f64,
    /// What a repetition penalty looks at, if there is one.
    seen: Option<SeenTokens>,
    finish_reason: Option<FinishReason>,
}

impl Sequence {
    fn last(&self) -> &[u32] {
        &self.ids[self.ids.len().saturating_sub(1)..]
    }

    fn push(&mut self, id: u32, settings: &Settings) {
        self.ids.push(id);
        if let Some(seen) = &mut self.seen {
            seen.insert(id);
        }
        if settings.eos_token_id.contains(&id) {
            self.finish_reason = Some(FinishReason::Eos);
        } else if self.ids.len() >= self.max_new_tokens {
            self.finish_reason = Some(FinishReason::Length);
        }
    }

    fn finish(self) -> Generated {
        Generated { ids: self.ids, finish_reason: self.finish_reason.unwrap_or(FinishReason::Interrupted) }
    }
}

fn start_sequences(prompts: &[Vec<u32>], settings: &Settings, vocab_size: usize) -> Result<Vec<Sequence>> {
    let mut sequences = Vec::new();
    for (p, prompt) in prompts.iter().enumerate() {
        let remedy = "begin with some text, or with tokenizer.bos_token()";
        ensure(!prompt.is_empty(), &format!("prompt {p}"), "0 tokens", "at least one token", remedy)?;
        if let Some(position) = prompt.iter().position(|&id| id as usize >= vocab_size) {
            return Err(Error::TokenId { row: p, position, id: prompt[position].into(), vocab_size });
        }
        let max_new_tokens = settings.max_new_tokens(p, prompt.len())?;
        let seen = (settings.repetition_penalty != 1.0).then(|| {
            let mut seen = SeenTokens::new(vocab_size);
            prompt.iter().for_each(|&id| seen.insert(id));
            seen
        });
        for copy in 0..settings.num_return_sequences {
            sequences.push(Sequence {
                prompt: p,
                prompt_length: prompt.len(),
                ids: Vec::new(),
                max_new_tokens,
                rng: Rng::new(settings.seed, copy as u64),
                u: 0.0,
                seen: seen.clone(),
                finish_reason: None,
            });
        }
    }
    Ok(sequences)
}

/// Chooses tokens; keeps the buffers for that.
struct Chooser {
    settings: Settings,
    logits: Vec<f32>,
    scratch: Scratch,
}

impl Chooser {
    /// How the model's own device should choose the next token of each sequence. Empty when it cannot: for a processor
    /// that only [`Chooser::choose`] has, or for more tokens to draw from than [`MOST_DRAWN_FROM`].
    fn draws(&self, active: &[(usize, usize)], sequences: &mut [Sequence]) -> Vec<Draw> {
        let settings = &self.settings;
        if settings.sampling.is_some() {
            active.iter().for_each(|&(i, _)| sequences[i].u = sequences[i].rng.uniform());
        }
        self.draws_at(active, sequences, 0, &|sequence| sequence.u)
    }

    /// What [`Chooser::draws`] will give after the next token if no sequence ends with it; empty if one certainly does.
    fn draws_after(&self, active: &[(usize, usize)], sequences: &[Sequence]) -> Vec<Draw> {
        if active.iter().any(|&(i, _)| sequences[i].ids.len() + 1 >= sequences[i].max_new_tokens) {
            return Vec::new();
        }
        let sampled = self.settings.sampling.is_some();
        self.draws_at(active, sequences, 1, &|s| if sampled { s.rng.clone().uniform() } else { s.u })
    }

    /// The draws once each sequence has `more` tokens than now, at these places of the cumulative probability.
    fn draws_at(
        &self,
        active: &[(usize, usize)],
        sequences: &[Sequence],
        more: usize,
        u: &dyn Fn(&Sequence) -> f64,
    ) -> Vec<Draw> {
        let settings = &self.settings;
        let (temperature, top_k, top_p) = settings.sampling.unwrap_or((1.0, 1, 1.0));
        let plain = |&(i, _): &(usize, usize)| {
            let sequence = &sequences[i];
            let forbids = sequence.ids.len() + more < settings.min_new_tokens && !settings.eos_token_id.is_empty();
            sequence.seen.is_none() && !forbids
        };
        if !(1..=MOST_DRAWN_FROM).contains(&top_k) || !active.iter().all(plain) {
            return Vec::new();
        }
        let draw = |&(i, row): &(usize, usize)| Draw {
            row,
            top_k,
            temperature: temperature as f32,
            top_p,
            u: u(&sequences[i]),
        };
        active.iter().map(draw).collect()
    }

    /// The next token of a sequence, from its row of the logits `[rows, vocab]`.
    fn choose(&mut self, logits: &Tensor, row: usize, sequence: &Sequence) -> Result<u32> {
        self.logits.clear();
        let row = logits.get(row)?.to_device(&Device::Cpu)?.contiguous()?;
        read_f32(&row, |row| self.logits.extend_from_slice(row))?;
        refuse_not_finite(&self.logits, sequence)?;
        self.process(sequence);
        Ok(match self.settings.sampling {
            None => sampling::greedy(&self.logits),
            Some(_) => sampling::sample(&self.logits, sequence.u, &mut self.scratch),
        })
    }

    /// The processors that the settings ask for, in the reference's order.
    fn process(&mut self, sequence: &Sequence) {
        let Self { settings, logits, scratch } = self;
        if let Some(seen) = &sequence.seen {
            processors::repetition_penalty(logits, seen, settings.repetition_penalty);
        }
        if sequence.ids.len() < settings.min_new_tokens {
            processors::forbid(logits, &settings.eos_token_id);
        }
        if let Some((temperature, top_k, top_p)) = settings.sampling {
            if temperature != 1.0 {
                processors::temperature(logits, temperature);
            }
            processors::top_k(logits, top_k, scratch);
            processors::top_p(logits, top_p, scratch);
        }
    }
}

/// -inf is a token that cannot come; NaN, +inf, and no token at all are faults.
fn refuse_not_finite(logits: &[f32], sequence: &Sequence) -> Result<()> {
    // A fold without early exit runs in SIMD; the slow search is for the message.
    let ok = logits.iter().fold(true, |ok, x| ok & (*x < f32::INFINITY));
    if ok && max_of(logits) > f32::NEG_INFINITY {
        return Ok(());
    }
    let value = logits.iter().copied().find(|x| x.is_nan() || *x == f32::INFINITY).unwrap_or(f32::NEG_INFINITY);
    let position = sequence.prompt_length + sequence.ids.len();
    Err(Error::LogitsNotFinite { prompt: sequence.prompt, position, value })
}

#[cfg(test)]
mod tests;
