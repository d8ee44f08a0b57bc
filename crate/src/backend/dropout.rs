//! Dropout whose mask is a function of a key, so that it can be computed again.
//!
//! Gradient checkpointing runs a block's forward twice and resuming runs a step in another
//! process; both must drop the same elements. A counter-based generator (SplitMix64's
//! finalizer over key and element index) needs no state to save.

/// What an element is multiplied by: 0, or 1 / (1 - p).
#[inline]
fn factor(key: u64, index: usize, p: f64) -> f32 {
    let bits = mix(key ^ mix(index as u64)) >> 11;
    let uniform = bits as f64 / (1u64 << 53) as f64;
    if uniform < p { 0.0 } else { (1.0 / (1.0 - p)) as f32 }
}

/// SplitMix64's finalizer: every input bit reaches every output bit.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Multiplies `x` by the mask that `key` names. The same call is its own backward.
pub fn apply(x: &mut [f32], key: u64, p: f64) {
    for (i, v) in x.iter_mut().enumerate() {
        *v *= factor(key, i, p);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn drops_a_share_p_and_keeps_the_mean() {
        let mut x = vec![1f32; 100_000];
        super::apply(&mut x, 7, 0.1);
        let dropped = x.iter().filter(|v| **v == 0.0).count();
        assert!((9_500..10_500).contains(&dropped), "{dropped}");
        assert!((x.iter().sum::<f32>() / 1e5 - 1.0).abs() < 0.01);
        let mut again = vec![1f32; 100_000];
        super::apply(&mut again, 7, 0.1);
        assert_eq!(x, again);
        super::apply(&mut again, 8, 0.1);
        assert_ne!(x, again);
    }
}
