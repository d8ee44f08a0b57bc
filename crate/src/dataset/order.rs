//! The row orders that `shuffle(seed)` and `train_test_split(seed)` give.
//!
//! They are numpy's, because `datasets` draws its permutations from
//! `numpy.random.default_rng(seed)`: one seed chooses the same rows here and in Python, so
//! a split can be checked, or a training run repeated, in either language.

use rand_pcg::rand_core::Rng;

/// `numpy.random.default_rng(seed).permutation(len)`.
pub(super) fn permutation(len: usize, seed: u64) -> Vec<usize> {
    let mut rng = Numpy::new(seed);
    let mut order: Vec<usize> = (0..len).collect();
    for i in (1..len).rev() {
        order.swap(i, rng.at_most(i as u64) as usize);
    }
    order
}

/// numpy's default generator.
struct Numpy {
    rng: rand_pcg::Pcg64,
    /// The upper half of the last 64-bit draw: a 32-bit draw uses one half at a time.
    spare: Option<u32>,
}

impl Numpy {
    fn new(seed: u64) -> Self {
        let [a, b, c, d] = seed_words(seed).map(u128::from);
        Self { rng: rand_pcg::Pcg64::new(a << 64 | b, c << 64 | d), spare: None }
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(half) = self.spare.take() {
            return half;
        }
        let draw = self.rng.next_u64();
        self.spare = Some((draw >> 32) as u32);
        draw as u32
    }

    /// A uniform integer in `0..=max`: draws of just enough bits until one is not beyond `max`, of
    /// 32 bits where they suffice, as numpy's `shuffle` does.
    fn at_most(&mut self, max: u64) -> u64 {
        if max == 0 {
            return 0;
        }
        let mask = u64::MAX >> max.leading_zeros();
        loop {
            let draw = if max <= u64::from(u32::MAX) { u64::from(self.next_u32()) } else { self.rng.next_u64() };
            if draw & mask <= max {
                return draw & mask;
            }
        }
    }
}

/// numpy's `SeedSequence(seed).generate_state(4, uint64)` (O'Neill's seed_seq_fe): spreads a
/// small seed over the whole state.
fn seed_words(seed: u64) -> [u64; 4] {
    const XSHIFT: u32 = 16;
    let hash = |constant: &mut u32, multiplier: u32, value: u32| {
        let value = value ^ *constant;
        *constant = constant.wrapping_mul(multiplier);
        let value = value.wrapping_mul(*constant);
        value ^ value >> XSHIFT
    };
    let mix = |x: u32, y: u32| {
        let value = 0xca01_f9dd_u32.wrapping_mul(x).wrapping_sub(0x4973_f715_u32.wrapping_mul(y));
        value ^ value >> XSHIFT
    };
    let mut constant = 0x43b0_d7e5;
    let mut pool = [seed as u32, (seed >> 32) as u32, 0, 0].map(|word| hash(&mut constant, 0x931e_8875, word));
    for source in 0..4 {
        for target in 0..4 {
            if source != target {
                pool[target] = mix(pool[target], hash(&mut constant, 0x931e_8875, pool[source]));
            }
        }
    }
    let mut constant = 0x8b51_f9dd;
    let mut word = |i: usize| u64::from(hash(&mut constant, 0x58f3_8ded, pool[i % 4]));
    std::array::from_fn(|i| word(2 * i) | word(2 * i + 1) << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    // >>> numpy.random.default_rng(seed).permutation(n)
    #[test]
    fn permutations_are_numpys() {
        assert_eq!(permutation(10, 42), [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]);
        assert_eq!(permutation(5, 7), [2, 0, 4, 1, 3]);
        assert_eq!(permutation(12, 123_456_789_012), [4, 7, 6, 8, 1, 11, 3, 0, 10, 5, 2, 9]);
        assert_eq!(permutation(1000, 42)[..8], [978, 933, 859, 916, 127, 608, 856, 260]);
        assert_eq!(permutation(1, 0), [0]);
        assert_eq!(permutation(0, 0), Vec::<usize>::new());
    }
}
