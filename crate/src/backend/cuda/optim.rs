//! Optimizers that update each element by itself on a GPU, by `kernels/adamw.cu`: one launch for all parameters,
//! bit-equal to the CPU's.

use candle_core::{DType, Device, Tensor};

use super::{self as cuda, Gpu, KernelArg, Managed, Place, address};
use crate::{
    backend::{
        optimizer::{Argument, Part, States, Step},
        param::Param,
    },
    error::Result,
};

/// Elements that a block of threads works on.
const CHUNK: usize = 2048;
const THREADS: usize = 256;

/// Parts of a state begin at a multiple of this many bytes.
const ALIGNMENT: usize = 256;

/// The kernels' `Entry`, as words.
type Entry = [u64; 8];

/// Where the parameters and their states are, and which of them each block of threads works on.
struct Table {
    entries: Tensor,
    blocks: Tensor,
    num_blocks: usize,
}

impl Table {
    /// `states`: addresses of the first and second moment and of their maxima (0: none), one row a parameter.
    fn new(gpu: &Gpu, params: &[&Param], states: &[[u64; 4]]) -> Result<Self> {
        let (mut entries, mut blocks): (Vec<i64>, Vec<u32>) = (Vec::new(), Vec::new());
        for (index, (param, [moment1, moment2, absmax1, absmax2])) in params.iter().zip(states).enumerate() {
            let count = param.value().elem_count();
            let (value, grad) = (address(param.value())?, address(param.grad())?);
            let entry: Entry = [value, grad, *moment1, *moment2, *absmax1, *absmax2, count as u64, blocks.len() as u64];
            entries.extend(entry.map(|word| word as i64));
            blocks.extend(std::iter::repeat_n(index as u32, count.div_ceil(CHUNK)));
        }
        let (device, num_blocks, words) = (gpu.device(), blocks.len(), entries.len());
        Ok(Self {
            entries: Tensor::from_vec(entries, words, &device)?,
            blocks: Tensor::from_vec(blocks, num_blocks, &device)?,
            num_blocks,
        })
    }
}

/// The sum of the squares of the gradients, which are on this GPU; in f64 and in an order that does not change.
pub(super) fn sum_of_squares(gpu: &Gpu, params: &[&Param]) -> Result<f64> {
    let table = Table::new(gpu, params, &vec![[0; 4]; params.len()])?;
    if table.num_blocks == 0 {
        return Ok(0.0);
    }
    // The sums of the blocks, and behind them their own.
    let sums = cuda::uninit(gpu, table.num_blocks + 1, DType::F64)?;
    let (entries, blocks, sums_at) = (address(&table.entries)?, address(&table.blocks)?, address(&sums)?);
    gpu.launch("square_sums", (table.num_blocks, 1, 1), THREADS, 0, &[&entries, &blocks, &sums_at])?;
    let (count, out) = (table.num_blocks as i32, sums_at + 8 * table.num_blocks as u64);
    gpu.launch("sum_of_sums", (1, 1, 1), THREADS, 0, &[&sums_at, &count, &out])?;
    let mut sum = [0f64];
    cuda::copy_to_host(gpu, out, &mut sum)?;
    Ok(sum[0])
}

/// Where the states are.
enum Memory {
    Card(Tensor),
    Paged(Managed),
}

impl Memory {
    fn address(&self) -> Result<u64> {
        match self {
            Self::Card(tensor) => address(tensor),
            Self::Paged(block) => Ok(block.address()),
        }
    }
}

/// The states of all parameters, in one block of memory.
pub(super) struct StatesOnCard {
    gpu: &'static Gpu,
    memory: Memory,
    parts: Vec<Vec<Part>>,
    /// Byte in the block at which each part begins.
    offsets: Vec<Vec<usize>>,
    bytes: usize,
    table: Table,
}

impl StatesOnCard {
    /// Zeros, for an optimizer of that many moments: parts are the moments and, in 8 bits, their maxima. `paged`: in
    /// memory that the driver moves to the host when the card has no room for it.
    pub fn new(
        gpu: &'static Gpu,
        params: &[Param],
        parts: Vec<Vec<Part>>,
        moments: usize,
        paged: bool,
    ) -> Result<Self> {
        let mut bytes = 0;
        let mut place = |part: &Part| {
            let at = bytes;
            bytes = (bytes + part.num_bytes()).next_multiple_of(ALIGNMENT);
            at
        };
        let offsets: Vec<Vec<usize>> = parts.iter().map(|parts| parts.iter().map(&mut place).collect()).collect();
        let memory = match paged {
            true => Memory::Paged(Managed::zeros(gpu, bytes)?),
            false => Memory::Card(cuda::zeros(gpu, bytes, DType::U8)?),
        };
        let base = memory.address()?;
        // A row has room for two moments and two maxima.
        let row = |offsets: &Vec<usize>| {
            let part = |i: usize| offsets.get(i / 2 * moments + i % 2).filter(|_| i % 2 < moments);
            std::array::from_fn(|i| part(i).map_or(0, |offset| base + *offset as u64))
        };
        let rows: Vec<[u64; 4]> = offsets.iter().map(row).collect();
        let table = Table::new(gpu, &params.iter().collect::<Vec<_>>(), &rows)?;
        Ok(Self { gpu, memory, parts, offsets, bytes, table })
    }
}

impl States for StatesOnCard {
    fn step(&self, step: &Step) -> Result<()> {
        if self.table.num_blocks == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        if let Memory::Paged(block) = &self.memory {
            block.prefetch(Place::Card)?;
        }
        let maps = self.gpu.constant(&step.maps)?;
        let (entries, blocks) = (address(&self.table.entries)?, address(&self.table.blocks)?);
        let [full, quantized] = &step.arguments;
        let args: [&dyn KernelArg; 5] = [&entries, &blocks, full, quantized, &maps];
        self.gpu.launch(step.kernel, (self.table.num_blocks, 1, 1), THREADS, 0, &args)
    }

    fn copies(&self) -> Result<Vec<Vec<Tensor>>> {
        let mut bytes = vec![0u8; self.bytes];
        cuda::copy_to_host(self.gpu, self.memory.address()?, &mut bytes)?;
        let copy = |(part, at): (&Part, &usize)| {
            let bytes = &bytes[*at..at + part.num_bytes()];
            Ok(Tensor::from_raw_buffer(bytes, part.dtype, &part.shape, &Device::Cpu)?)
        };
        let copies = |(parts, offsets): (&Vec<Part>, &Vec<usize>)| parts.iter().zip(offsets).map(copy).collect();
        self.parts.iter().zip(&self.offsets).map(copies).collect()
    }

    fn replace(&self, states: &[Vec<Tensor>]) -> Result<()> {
        let mut bytes = vec![0u8; self.bytes];
        for (tensor, at) in states.iter().flatten().zip(self.offsets.iter().flatten()) {
            let flat = tensor.flatten_all()?;
            let values: Vec<u8> = match flat.dtype() {
                DType::U8 => flat.to_vec1()?,
                _ => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_ne_bytes).collect(),
            };
            bytes[*at..at + values.len()].copy_from_slice(&values);
        }
        cuda::write(self.gpu, self.memory.address()?, &bytes)
    }

    fn page_out(&self) -> Result<()> {
        self.gpu.bind()?;
        match &self.memory {
            Memory::Paged(block) => block.prefetch(Place::Host),
            Memory::Card(_) => Ok(()),
        }
    }

    fn is_paged_out(&self) -> Result<bool> {
        self.gpu.bind()?;
        match &self.memory {
            Memory::Paged(block) => Ok(block.place()? == Some(Place::Host)),
            Memory::Card(_) => Ok(false),
        }
    }

    fn is_paged(&self) -> bool {
        matches!(self.memory, Memory::Paged(_))
    }
}

impl KernelArg for Argument<'_> {
    fn pointer(&self) -> *mut std::ffi::c_void {
        Argument::pointer(self).cast_mut()
    }
}
