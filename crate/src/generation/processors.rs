//! What happens to logits before a token is chosen: the processors and warpers of
//! `transformers`, on one row of logits, in place. What may not be chosen becomes -inf.
//!
//! The order is the reference's: `repetition_penalty`, `forbid` (min_new_tokens), and when
//! sampling `temperature`, `top_k`, `top_p`.

use crate::backend::cpu::math::{softmax, sum_f64};

/// Buffers that the processors and the sampler use again and again, so that a token costs no
/// allocation.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The tokens that may still be chosen, in the order of ids.
    pub(super) ids: Vec<u32>,
    /// Their logits or probabilities.
    pub(super) values: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    probability: f32,
    id: u32,
}

impl Scratch {
    /// Gathers the tokens that may be chosen, `values` being their probabilities.
    pub(super) fn softmax(&mut self, logits: &[f32]) {
        self.ids.clear();
        self.values.clear();
        let Self { ids, values, .. } = self;
        above(logits, &mut { f32::NEG_INFINITY }, |id, x, _| {
            ids.push(id);
            values.push(x);
        });
        softmax(values);
    }
}

/// Calls `f` for every logit above `bar`, which `f` may raise. Blocks with none are passed over
/// at the speed of SIMD.
fn above(logits: &[f32], bar: &mut f32, mut f: impl FnMut(u32, f32, &mut f32)) {
    const BLOCK: usize = 64;
    for (b, block) in logits.chunks(BLOCK).enumerate() {
        let limit = *bar;
        if !block.iter().fold(false, |any, x| any | (*x > limit)) {
            continue;
        }
        for (i, &x) in block.iter().enumerate() {
            if x > *bar {
                f((b * BLOCK + i) as u32, x, bar);
            }
        }
    }
}

/// The distinct tokens of a sequence, prompt and answer.
#[derive(Clone, Debug)]
pub struct SeenTokens {
    ids: Vec<u32>,
    seen: Vec<bool>,
}

impl SeenTokens {
    pub fn new(vocab_size: usize) -> Self {
        Self { ids: Vec::new(), seen: vec![false; vocab_size] }
    }

    /// Notes a token. An id beyond the vocabulary has no logit and is left out.
    pub fn insert(&mut self, id: u32) {
        if let Some(seen) = self.seen.get_mut(id as usize)
            && !std::mem::replace(seen, true)
        {
            self.ids.push(id);
        }
    }
}

/// Makes tokens that were there already less likely (`penalty` above 1) or more likely (below
/// 1): a positive logit is divided by it, a negative one multiplied. Once a token, however
/// often it was there.
pub fn repetition_penalty(logits: &mut [f32], seen: &SeenTokens, penalty: f64) {
    let penalty = penalty as f32;
    for &id in &seen.ids {
        let logit = &mut logits[id as usize];
        *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
    }
}

/// These tokens may not be chosen: the end tokens, until there are `min_new_tokens`.
pub fn forbid(logits: &mut [f32], ids: &[u32]) {
    for &id in ids {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Flattens (above 1) or sharpens (below 1) the distribution.
pub fn temperature(logits: &mut [f32], temperature: f64) {
    let temperature = temperature as f32;
    logits.iter_mut().for_each(|x| *x /= temperature);
}

/// Keeps the `k` highest logits, and those equal to the last of them. 0 keeps all.
pub fn top_k(logits: &mut [f32], k: usize, scratch: &mut Scratch) {
    if k == 0 || k >= logits.len() {
        return;
    }
    // One pass with a rising bar: after the first few hundred logits hardly any is above it.
    let values = &mut scratch.values;
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let room = 256.max(4 * k);
    values.clear();
    above(logits, &mut { f32::NEG_INFINITY }, |_, x, bar| {
        values.push(x);
        if values.len() == room {
            *bar = *values.select_nth_unstable_by(k - 1, descending).1;
            values.truncate(k);
        }
    });
    if values.len() < k {
        return;
    }
    let last = *values.select_nth_unstable_by(k - 1, descending).1;
    logits.iter_mut().for_each(|x| *x = if *x < last { f32::NEG_INFINITY } else { *x });
}

/// Keeps the smallest set of most likely tokens whose probabilities reach `p`; at least one.
/// Of equal logits at the edge those with the lower id stay, so that a tiny `p` is greedy (the
/// reference leaves that to its sort).
pub fn top_p(logits: &mut [f32], p: f64, scratch: &mut Scratch) {
    if p >= 1.0 {
        return;
    }
    scratch.softmax(logits);
    let Scratch { ids, values: probabilities, candidates } = scratch;
    // The tokens at or below this probability have no more than 1 - p together, so none of them
    // stays; a hair less, because equal probabilities must not fall to rounding.
    let floor = ((1.0 - p) / ids.len() as f64 * 0.9999) as f32;
    candidates.clear();
    above(probabilities, &mut { floor }, |i, probability, _| {
        let id = ids[i as usize];
        candidates.push(Candidate { logit: logits[id as usize], probability, id });
    });
    let kept = kept_by_top_p(candidates, sum_f64(probabilities, |p| p), p);
    logits.fill(f32::NEG_INFINITY);
    for &Candidate { logit, id, .. } in &candidates[..kept] {
        logits[id as usize] = logit;
    }
}

/// Brings the tokens that stay to the front of `candidates` and counts them. Sorts a few at a
/// time from the top, because the set is usually small and the vocabulary is not.
fn kept_by_top_p(candidates: &mut [Candidate], total: f64, p: f64) -> usize {
    let descending = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id));
    let edge = (1.0 - p) as f32;
    let (mut kept, mut above, mut chunk) = (0, 0f64, 64);
    while kept < candidates.len() {
        let rest = &mut candidates[kept..];
        let n = chunk.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, descending);
        }
        rest[..n].sort_unstable_by(descending);
        for candidate in &rest[..n] {
            // The probability of this token and all below it; the reference drops what does
            // not raise that sum, taken from the bottom, above 1 - p.
            let from_below = ((total - above) / total) as f32;
            if from_below <= edge && kept > 0 {
                return kept;
            }
            above += f64::from(candidate.probability);
            kept += 1;
        }
        chunk *= 4;
    }
    kept
}
