//! The mean of the block maxima, summed in the order of PyTorch's CUDA reduction.
//!
//! Double quantization stores `absmax - mean(absmax)`; a sum in f32 depends on its order, and
//! another order moves the last bits of every dequantized weight. Checkpoints are made on
//! GPUs, so theirs is the order to reproduce. It is a tree of fixed shape (threads, then
//! warps, then blocks), seen bit-equal on an H100 for 36 sizes from 1 to 5,000,011
//! (tests/fixtures/quant_cuda.safetensors).

const MAX_THREADS: usize = 512;
/// Running sums that a thread keeps: four neighbours, or four strided values when there are few.
const LANES: usize = 4;

/// Threads of a block and number of blocks that PyTorch gives to a sum of `n` values.
pub(crate) struct Grid {
    pub threads: usize,
    pub blocks: usize,
}

impl Grid {
    pub fn new(n: usize) -> Self {
        let work = if vectorized(n) { n / LANES } else { n };
        let threads = if work < MAX_THREADS { previous_power_of_two(work) } else { MAX_THREADS };
        let per_thread = n.div_ceil(threads);
        // A block is 512 x 1 threads, so there is no second dimension to split across. PyTorch caps the blocks by the
        // GPU's size (528 on an H100), which 280 million weights of one tensor do not reach.
        let blocks = if per_thread >= 256 { per_thread.div_ceil(16) } else { 1 };
        Self { threads, blocks: blocks.min(H100_BLOCKS.max(per_thread.div_ceil(256))) }
    }
}

const H100_BLOCKS: usize = 132 * (2048 / MAX_THREADS);

/// Whether its threads read four neighbours at a time.
pub(crate) fn vectorized(n: usize) -> bool {
    n >= 128
}

fn previous_power_of_two(n: usize) -> usize {
    1 << n.max(1).ilog2()
}

/// `values.mean()` as PyTorch computes it on an NVIDIA GPU; 0 for no values.
pub(crate) fn cuda_mean(values: &[f32]) -> f32 {
    let n = values.len();
    if n == 0 {
        return 0.0;
    }
    let Grid { threads, blocks } = Grid::new(n);
    let stride = threads * blocks;
    let mut sums = vec![[0f32; LANES]; stride];
    if vectorized(n) {
        let (groups, tail) = values.as_chunks::<LANES>();
        for row in groups.chunks(stride) {
            for (sum, group) in sums.iter_mut().zip(row) {
                for (s, v) in sum.iter_mut().zip(group) {
                    *s += v;
                }
            }
        }
        for (sum, v) in sums.iter_mut().zip(tail) {
            sum[0] += v;
        }
    } else {
        for row in values.chunks(stride * LANES) {
            for (lane, part) in row.chunks(stride).enumerate() {
                for (sum, v) in sums.iter_mut().zip(part) {
                    sum[lane] += v;
                }
            }
        }
    }
    let mut sums: Vec<f32> = sums.into_iter().map(|[a, b, c, d]| a + b + c + d).collect();
    let block_sums: Vec<f32> = sums.chunks_mut(threads).map(tree).collect();
    let sum = match &block_sums[..] {
        [one] => *one,
        many => {
            let mut last_block = vec![0f32; threads];
            for row in many.chunks(threads) {
                for (sum, v) in last_block.iter_mut().zip(row) {
                    *sum += v;
                }
            }
            tree(&mut last_block)
        }
    };
    sum * (1.0 / n as f32)
}

/// Adds the upper half to the lower until one is left; `sums` has a power of two of entries.
fn tree(sums: &mut [f32]) -> f32 {
    let mut len = sums.len();
    while len > 1 {
        len /= 2;
        let (low, high) = sums.split_at_mut(len);
        for (l, h) in low.iter_mut().zip(high) {
            *l += *h;
        }
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The formula of scripts/fixtures/quant_cuda.py.
    fn uniform(n: usize, seed: u64) -> Vec<f32> {
        let value = |i: u64| (((i * 2654435761) & 0xffff_ffff) ^ ((i * 40503) & 0xffff)) >> 8;
        (0..n as u64).map(|i| value(i + seed) as f32 / (1 << 24) as f32).collect()
    }

    #[test]
    fn means_are_those_of_an_h100() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/quant_cuda.safetensors");
        let f = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let sizes = f["mean.size"].to_vec1::<i64>().unwrap();
        let values = f["mean.value"].to_vec1::<f32>().unwrap();
        assert_eq!(sizes.len(), 36);
        for (n, expected) in sizes.into_iter().zip(values) {
            assert_eq!(cuda_mean(&uniform(n as usize, 3)), expected, "{n} values");
        }
    }

    #[test]
    fn means_of_exact_sums_are_exact() {
        for n in [1usize, 2, 5, 127, 128, 131, 1000, 200_000] {
            let values: Vec<f32> = (0..n).map(|i| (i % 8) as f32).collect();
            let sum: f32 = (0..n).map(|i| (i % 8) as f32).sum();
            assert_eq!(cuda_mean(&values), sum * (1.0 / n as f32), "{n}");
        }
        assert_eq!(cuda_mean(&[]), 0.0);
    }
}
