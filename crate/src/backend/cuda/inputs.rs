//! What a pass over a batch reads besides activations and weights: ids, labels, where sequences lie.
//!
//! One buffer on the device, filled by one copy. Its places depend on the shape alone, so a CUDA
//! graph that was captured for a shape serves every batch of that shape. Rows are padded to a
//! multiple of [`ROWS`]: the padding is a sequence of its own, without labels.

use candle_core::{DType, Tensor};

use super::{Gpu, address, driver_error, uninit};
use crate::{
    backend::sequences::{IGNORE_INDEX, Sequences},
    error::Result,
};

/// Rows of a batch, and rows with a label, are padded to a multiple of this.
pub const ROWS: usize = 64;

/// Rows of queries that a block of the attention kernels takes.
pub const TILE: usize = 64;

/// Words of a draw.
const DRAW: usize = 8;

/// What the places in the buffer depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InputShape {
    /// Packed rows M, with padding.
    pub rows: usize,
    /// Rows with a label, with padding; 0 where nothing is learned.
    pub labels: usize,
    /// Sequences, without the one that is padding.
    pub sequences: usize,
    /// Tokens to be chosen.
    pub draws: usize,
}

/// Numbers that change from batch to batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scalars {
    pub dropout_key: u64,
    /// What gradients of adapters are multiplied by before they are added up.
    pub grad_scale: f32,
    /// What the gradient of the loss is multiplied by, so that small ones survive f16.
    pub loss_scale: f32,
}

/// A batch on the host, before it is copied.
pub struct HostInputs<'a> {
    pub ids: &'a [u32],
    /// One a row, or -100; may be empty.
    pub targets: &'a [i64],
    pub sequences: &'a Sequences,
    /// Of a key-value cache: rows held of each sequence, and rows that it has for each.
    pub cache: Option<(&'a [usize], usize)>,
    pub scalars: Scalars,
    /// How tokens are chosen.
    pub draws: &'a [InputDraw],
}

/// How a token is chosen: see `models::causal_lm::Draw`.
#[derive(Clone, Copy, Debug)]
pub struct InputDraw {
    pub row: i32,
    pub top_k: i32,
    pub temperature: f32,
    pub top_p: f64,
    pub u: f64,
}

/// The buffer on the device.
pub struct Inputs {
    pub shape: InputShape,
    buffer: Tensor,
    base: u64,
}

fn padded(n: usize) -> usize {
    n.next_multiple_of(ROWS)
}

impl HostInputs<'_> {
    /// The shape, with or without padding of the rows.
    pub fn shape(&self, pad: bool) -> InputShape {
        let labels = self.targets.iter().filter(|t| **t != IGNORE_INDEX).count();
        let rows = if pad { padded(self.ids.len()) } else { self.ids.len() };
        InputShape { rows, labels: padded(labels), sequences: self.sequences.len(), draws: self.draws.len() }
    }
}

/// Where each part begins, in 4-byte words.
struct Places {
    ids: usize,
    positions: usize,
    keys: usize,
    after: usize,
    cache_rows: usize,
    slots: usize,
    label_rows: usize,
    targets: usize,
    tiles: usize,
    draws: usize,
    end: usize,
}

impl InputShape {
    /// Tiles of queries: an upper bound, the rest are marked empty.
    pub fn tiles(&self) -> usize {
        self.rows / TILE + self.sequences + 1
    }

    fn places(&self) -> Places {
        let mut at = 4;
        let mut take = |words: usize| {
            let here = at;
            at = (at + words).next_multiple_of(4);
            here
        };
        Places {
            ids: take(self.rows),
            positions: take(self.rows),
            keys: take(2 * self.rows),
            after: take(self.rows),
            cache_rows: take(self.rows),
            slots: take(self.rows),
            label_rows: take(self.labels),
            targets: take(self.labels),
            tiles: take(4 * self.tiles()),
            draws: take(DRAW * self.draws),
            end: at,
        }
    }
}

impl Inputs {
    pub fn new(gpu: &Gpu, shape: InputShape) -> Result<Self> {
        let buffer = uninit(gpu, shape.places().end, DType::I32)?;
        let base = address(&buffer)?;
        Ok(Self { shape, buffer, base })
    }

    /// Copies a batch of this shape.
    pub fn fill(&self, gpu: &Gpu, host: &HostInputs) -> Result<()> {
        self.copy(gpu, 0, &self.words(host))
    }

    /// The same but for the ids, which the card has put there itself.
    pub fn fill_behind_ids(&self, gpu: &Gpu, host: &HostInputs) -> Result<()> {
        let first = self.shape.places().positions;
        self.copy(gpu, first, &self.words(host)[first..])
    }

    fn copy(&self, gpu: &Gpu, first: usize, words: &[i32]) -> Result<()> {
        let (storage, _) = self.buffer.storage_and_layout();
        let candle_core::Storage::Cuda(storage) = &*storage else { return Ok(()) };
        // Immutable by candle's rules, a place to write to by ours: nothing else holds this tensor.
        use candle_core::cuda_backend::cudarc::driver::{DevicePtr, result};
        let slice = storage.as_cuda_slice::<i32>()?;
        let stream = gpu.stream();
        let (pointer, _guard) = slice.device_ptr(stream);
        stream.context().bind_to_thread().map_err(driver_error("choosing the GPU"))?;
        // SAFETY: the buffer has as many words; a copy from pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(pointer + 4 * first as u64, words, stream.cu_stream()) }
            .map_err(driver_error("copying a batch"))
    }

    fn words(&self, host: &HostInputs) -> Vec<i32> {
        let InputShape { rows, labels, .. } = self.shape;
        let p = self.shape.places();
        let mut w = vec![0i32; p.end];
        let s = host.scalars;
        (w[0], w[1]) = (s.dropout_key as i32, (s.dropout_key >> 32) as i32);
        (w[2], w[3]) = (s.grad_scale.to_bits() as i32, s.loss_scale.to_bits() as i32);
        let real = host.ids.len();
        for (to, id) in w[p.ids..].iter_mut().zip(host.ids) {
            *to = *id as i32;
        }
        let padding = (rows > real).then_some(real..rows);
        let ranges = host.sequences.ranges().chain(padding);
        let mut tiles = Vec::new();
        for (sequence, range) in ranges.enumerate() {
            let held = host.cache.and_then(|(lengths, _)| lengths.get(sequence)).copied().unwrap_or(0);
            let first_key = host.cache.map_or(range.start, |(_, capacity)| sequence * capacity);
            for (i, row) in range.clone().enumerate() {
                w[p.positions + row] = (held + i) as i32;
                w[p.keys + 2 * row] = first_key as i32;
                w[p.keys + 2 * row + 1] = (held + i + 1) as i32;
                w[p.after + row] = (range.end - row) as i32;
                w[p.cache_rows + row] = (first_key + held + i) as i32;
            }
            for begin in (0..range.len()).step_by(TILE) {
                tiles.push([range.start as i32, range.len() as i32, begin as i32, 0]);
            }
        }
        // By how many tiles follow in the sequence: those with the same work are neighbours, the backward's longest
        // first; the forward goes from the other end.
        tiles.sort_by_key(|[_, length, begin, _]| begin - length);
        for (to, tile) in w[p.tiles..].chunks_exact_mut(4).zip(tiles) {
            to.copy_from_slice(&tile);
        }
        for (to, draw) in w[p.draws..].chunks_exact_mut(DRAW).zip(host.draws) {
            let double = |x: f64| [x.to_bits() as i32, (x.to_bits() >> 32) as i32];
            let ([p0, p1], [u0, u1]) = (double(draw.top_p), double(draw.u));
            to.copy_from_slice(&[draw.row, draw.top_k, draw.temperature.to_bits() as i32, 0, p0, p1, u0, u1]);
        }
        w[p.slots..p.slots + rows].fill(-1);
        w[p.label_rows..p.label_rows + labels].fill(-1);
        w[p.targets..p.targets + labels].fill(-1);
        let labelled = host.targets.iter().enumerate().filter(|(_, t)| **t != IGNORE_INDEX);
        for (slot, (row, target)) in labelled.enumerate() {
            w[p.slots + row] = slot as i32;
            w[p.label_rows + slot] = row as i32;
            w[p.targets + slot] = *target as i32;
        }
        w
    }

    fn at(&self, word: usize) -> u64 {
        self.base + 4 * word as u64
    }

    /// u64.
    pub fn dropout_key(&self) -> u64 {
        self.at(0)
    }
    /// f32.
    pub fn grad_scale(&self) -> u64 {
        self.at(2)
    }
    /// f32.
    pub fn loss_scale(&self) -> u64 {
        self.at(3)
    }
    /// `[rows]` token ids.
    pub fn ids(&self) -> u64 {
        self.at(self.shape.places().ids)
    }
    /// `[rows]`: the position of a row in its sequence.
    pub fn positions(&self) -> u64 {
        self.at(self.shape.places().positions)
    }
    /// `[rows, 2]`: the row of the first key that a row sees, and how many they are.
    pub fn keys(&self) -> u64 {
        self.at(self.shape.places().keys)
    }
    /// `[rows]`: rows from this one to the end of its sequence.
    pub fn after(&self) -> u64 {
        self.at(self.shape.places().after)
    }
    /// `[rows]`: the row of the cache that a row's key goes to.
    pub fn cache_rows(&self) -> u64 {
        self.at(self.shape.places().cache_rows)
    }
    /// `[rows]`: the place of a row among those with a label, or -1.
    pub fn slots(&self) -> u64 {
        self.at(self.shape.places().slots)
    }
    /// `[labels]`: rows with a label; -1 is padding.
    pub fn label_rows(&self) -> u64 {
        self.at(self.shape.places().label_rows)
    }
    /// `[labels]`: their labels; -1 is padding.
    pub fn targets(&self) -> u64 {
        self.at(self.shape.places().targets)
    }
    /// `[draws]`, as the kernel has them.
    pub fn draws(&self) -> u64 {
        self.at(self.shape.places().draws)
    }
    /// `[tiles, 4]`: first row of the sequence, its length, first row of the tile within it.
    pub fn tiles(&self) -> u64 {
        self.at(self.shape.places().tiles)
    }
}
