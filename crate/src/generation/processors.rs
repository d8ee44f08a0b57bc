//! What happens to logits before a token is chosen: the processors and warpers of
//! `transformers`, on one row of logits, in place. What may not be chosen becomes -inf.
//!
//! The order is the reference's: `repetition_penalty`, `forbid` (min_new_tokens), and when
//! sampling `temperature`, `top_k`, `top_p`.

/// Buffers that the processors and the sampler use again and again, so that a token costs no
/// allocation.
#[derive(Debug, Default)]
pub struct Scratch {
    values: Vec<f32>,
    pub(super) candidates: Vec<(f32, u32)>,
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
    let Scratch { values, .. } = scratch;
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let room = 256.max(4 * k);
    let mut bar = f32::NEG_INFINITY;
    values.clear();
    for &x in logits.iter() {
        if x > bar {
            values.push(x);
            if values.len() == room {
                bar = *values.select_nth_unstable_by(k - 1, descending).1;
                values.truncate(k);
            }
        }
    }
    if values.len() < k {
        return;
    }
    let last = *values.select_nth_unstable_by(k - 1, descending).1;
    logits.iter_mut().filter(|x| **x < last).for_each(|x| *x = f32::NEG_INFINITY);
}

/// Keeps the smallest set of most likely tokens whose probabilities reach `p`; at least one.
/// Of equal logits at the edge those with the lower id stay, so that a tiny `p` is greedy (the
/// reference leaves that to its sort).
pub fn top_p(logits: &mut [f32], p: f64, scratch: &mut Scratch) {
    if p >= 1.0 {
        return;
    }
    let max = highest(logits);
    // A token more than `depth` below the highest cannot stay: all such tokens together have
    // less than 1 - p, for each is below exp(-depth) of the most likely one.
    let depth = (logits.len() as f64 / (1.0 - p)).ln() as f32;
    let Scratch { candidates, .. } = scratch;
    candidates.clear();
    let mut total = 0f64;
    for (id, &x) in logits.iter().enumerate() {
        let below = max - x;
        // Beyond 30 all 250,000 tokens of a large vocabulary together are lost in f32 rounding.
        if below < 30.0 {
            total += f64::from((-below).exp());
            if below <= depth {
                candidates.push((x, id as u32));
            }
        }
    }
    let kept = kept_by_top_p(candidates, max, total, p);
    logits.fill(f32::NEG_INFINITY);
    for &(x, id) in &candidates[..kept] {
        logits[id as usize] = x;
    }
}

/// Brings the tokens that stay to the front of `candidates` and counts them. Sorts a few at a
/// time from the top, because the set is usually small and the vocabulary is not.
fn kept_by_top_p(candidates: &mut [(f32, u32)], max: f32, total: f64, p: f64) -> usize {
    let descending = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let edge = (1.0 - p) as f32;
    let (mut kept, mut above, mut chunk) = (0, 0f64, 64);
    while kept < candidates.len() {
        let rest = &mut candidates[kept..];
        let n = chunk.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, descending);
        }
        rest[..n].sort_unstable_by(descending);
        for &(x, _) in &rest[..n] {
            // The probability of this token and all below it; the reference drops what does
            // not raise that sum, taken from the bottom, above 1 - p.
            let from_below = ((total - above) / total) as f32;
            if from_below <= edge && kept > 0 {
                return kept;
            }
            above += f64::from((x - max).exp());
            kept += 1;
        }
        chunk *= 4;
    }
    kept
}

pub(super) fn highest(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}
