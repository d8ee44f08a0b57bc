//! Keys and values of the tokens that were seen, so that each new token costs one row.

use candle_core::{DType, Device, Tensor};

use super::Draw;
use crate::error::Result;

/// The cache of all blocks for a set of sequences of any lengths.
pub struct KvCache {
    /// One (keys, values) a block, each `[sequences, capacity, width]`.
    blocks: Vec<(Tensor, Tensor)>,
    /// Tokens held of each sequence.
    lengths: Vec<usize>,
    capacity: usize,
    width: usize,
    /// On a GPU, the pass of one token a sequence, recorded for the tensors above; forgotten when they change.
    #[cfg(feature = "cuda")]
    pub(super) recorded: Option<super::cuda::Decode>,
    /// See [`KvCache::expect`].
    expected: Vec<Draw>,
}

impl KvCache {
    /// An empty cache; `width` is the width of a key row (heads × head_dim).
    /// `dtype` is that of the activations.
    pub fn new(blocks: usize, sequences: usize, width: usize, dtype: DType, device: &Device) -> Result<Self> {
        let capacity = 64;
        let blocks = (0..blocks)
            .map(|_| {
                let part = || zeros((sequences, capacity, width), dtype, device);
                Ok((part()?, part()?))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            blocks,
            lengths: vec![0; sequences],
            capacity,
            width,
            #[cfg(feature = "cuda")]
            recorded: None,
            expected: Vec::new(),
        })
    }

    /// Announces the draws of the next step, if every sequence goes on with its token, so that a GPU can launch that pass
    /// before the host has seen the tokens. Nothing else may change what the pass reads, the weights above all, as long
    /// as it is expected. Empty: nothing is expected.
    pub(crate) fn expect(&mut self, draws: Vec<Draw>) {
        self.expected = draws;
    }

    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the CPU begins no pass ahead"))]
    pub(super) fn take_expected(&mut self) -> Vec<Draw> {
        std::mem::take(&mut self.expected)
    }

    /// Tokens held of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Keeps the sequences named, in that order: finished ones leave a batch.
    pub fn keep_sequences(&mut self, keep: &[usize]) -> Result<()> {
        self.forget();
        let index: Vec<u32> = keep.iter().map(|&i| i as u32).collect();
        for (k, v) in &mut self.blocks {
            let index = Tensor::new(index.as_slice(), k.device())?;
            *k = k.index_select(&index, 0)?;
            *v = v.index_select(&index, 0)?;
        }
        self.lengths = keep.iter().map(|&i| self.lengths[i]).collect();
        Ok(())
    }

    /// Makes room for `new` more tokens a sequence; called once a step, before the blocks run.
    pub(crate) fn reserve(&mut self, new: &[usize]) -> Result<()> {
        self.make_room(self.lengths.iter().zip(new).map(|(l, n)| l + n).max().unwrap_or(0))
    }

    /// Makes room for so many tokens a sequence, which a GPU's recorded pass then need not be recorded anew for.
    pub(crate) fn make_room(&mut self, needed: usize) -> Result<()> {
        if needed <= self.capacity {
            return Ok(());
        }
        self.forget();
        let capacity = needed.next_power_of_two();
        for (k, v) in &mut self.blocks {
            for t in [k, v] {
                let wider = zeros((self.lengths.len(), capacity, self.width), t.dtype(), t.device())?;
                wider.slice_set(t, 1, 0)?;
                *t = wider;
            }
        }
        self.capacity = capacity;
        Ok(())
    }

    /// Forgets what was recorded for the tensors that are about to change.
    fn forget(&mut self) {
        #[cfg(feature = "cuda")]
        {
            self.recorded = None;
        }
    }

    /// Counts the tokens that every block has appended; called once a step, after the blocks.
    pub(crate) fn advance(&mut self, new: &[usize]) {
        self.lengths.iter_mut().zip(new).for_each(|(l, n)| *l += n);
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn block(&self, block: usize) -> (&Tensor, &Tensor) {
        (&self.blocks[block].0, &self.blocks[block].1)
    }
}

fn zeros(shape: (usize, usize, usize), dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, dtype, device)?)
}
