//! The optimizer on a GPU, by `kernels/adamw.cu`: one launch for all parameters, bit-equal to the CPU's.

use candle_core::{DType, Device, Tensor};

use super::{self as cuda, Gpu, KernelArg, Managed, Place, address};
use crate::{
    backend::param::Param,
    error::Result,
    optim::{
        kernel::{Rule, Step},
        state::Form,
    },
    quantized::DynamicMap,
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
    /// `moments`: addresses of the first and second moment and of their maxima (0: none), one row a parameter.
    fn new(gpu: &Gpu, params: &[&Param], moments: &[[u64; 4]]) -> Result<Self> {
        let (mut entries, mut blocks): (Vec<i64>, Vec<u32>) = (Vec::new(), Vec::new());
        for (index, (param, [m, v, absmax1, absmax2])) in params.iter().zip(moments).enumerate() {
            let count = param.value().elem_count();
            let (value, grad) = (address(param.value())?, address(param.grad())?);
            let entry: Entry = [value, grad, *m, *v, *absmax1, *absmax2, count as u64, blocks.len() as u64];
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
pub struct States {
    gpu: &'static Gpu,
    memory: Memory,
    /// Byte in the block at which each part begins, in the order of the forms.
    offsets: Vec<Vec<usize>>,
    bytes: usize,
    table: Table,
}

impl States {
    /// Zeros. `paged`: in memory that the driver moves to the host when the card has no room for it.
    pub fn new(params: &[Param], forms: &[Vec<Form>], paged: bool) -> Result<Self> {
        let gpu = cuda::of(params[0].value().device())?;
        let mut bytes = 0;
        let mut place = |form: &Form| {
            let at = bytes;
            bytes = (bytes + form.num_bytes()).next_multiple_of(ALIGNMENT);
            at
        };
        let offsets: Vec<Vec<usize>> = forms.iter().map(|forms| forms.iter().map(&mut place).collect()).collect();
        let memory = match paged {
            true => Memory::Paged(Managed::zeros(gpu, bytes)?),
            false => Memory::Card(cuda::zeros(gpu, bytes, DType::U8)?),
        };
        let base = memory.address()?;
        let moments: Vec<[u64; 4]> = (offsets.iter())
            .map(|parts| std::array::from_fn(|i| parts.get(i).map_or(0, |offset| base + *offset as u64)))
            .collect();
        let table = Table::new(gpu, &params.iter().collect::<Vec<_>>(), &moments)?;
        Ok(Self { gpu, memory, offsets, bytes, table })
    }

    /// One step of all parameters; `step` makes the scalars of a rule.
    pub fn step(&self, full: Rule, step: impl Fn(Rule) -> Step) -> Result<()> {
        if self.table.num_blocks == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        if let Memory::Paged(block) = &self.memory {
            block.prefetch(Place::Card)?;
        }
        let (full, quantized) = (StepArg::new(&step(full)), StepArg::new(&step(Rule::Bnb8)));
        let (signed, unsigned) = (DynamicMap::signed(), DynamicMap::unsigned());
        let maps = self.gpu.constant(&[signed.value, signed.above, unsigned.value, unsigned.above].concat())?;
        let (entries, blocks) = (address(&self.table.entries)?, address(&self.table.blocks)?);
        let args: [&dyn KernelArg; 5] = [&entries, &blocks, &full, &quantized, &maps];
        self.gpu.launch("adamw", (self.table.num_blocks, 1, 1), THREADS, 0, &args)
    }

    /// Copies of the parts on the CPU, in the order of the forms.
    pub fn copies(&self, forms: &[Vec<Form>]) -> Result<Vec<Vec<Tensor>>> {
        let mut bytes = vec![0u8; self.bytes];
        cuda::copy_to_host(self.gpu, self.memory.address()?, &mut bytes)?;
        let part = |(form, at): (&Form, &usize)| {
            let bytes = &bytes[*at..at + form.num_bytes()];
            Ok(Tensor::from_raw_buffer(bytes, form.dtype, &form.shape, &Device::Cpu)?)
        };
        let parts = |(forms, offsets): (&Vec<Form>, &Vec<usize>)| forms.iter().zip(offsets).map(part).collect();
        forms.iter().zip(&self.offsets).map(parts).collect()
    }

    /// Puts other values in their place: `parts` are of the forms, on the CPU.
    pub fn replace(&self, parts: &[Vec<Tensor>]) -> Result<()> {
        let mut bytes = vec![0u8; self.bytes];
        for (tensor, at) in parts.iter().flatten().zip(self.offsets.iter().flatten()) {
            let flat = tensor.flatten_all()?;
            let values: Vec<u8> = match flat.dtype() {
                DType::U8 => flat.to_vec1()?,
                _ => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_ne_bytes).collect(),
            };
            bytes[*at..at + values.len()].copy_from_slice(&values);
        }
        cuda::write(self.gpu, self.memory.address()?, &bytes)
    }

    /// Moves a paged state to the host.
    pub fn page_out(&self) -> Result<()> {
        self.gpu.bind()?;
        match &self.memory {
            Memory::Paged(block) => block.prefetch(Place::Host),
            Memory::Card(_) => Ok(()),
        }
    }

    /// Where the state is; None when it is not paged, or the driver does not say.
    pub fn place(&self) -> Result<Option<Place>> {
        self.gpu.bind()?;
        match &self.memory {
            Memory::Paged(block) => block.place(),
            Memory::Card(_) => Ok(None),
        }
    }

    pub fn is_paged(&self) -> bool {
        matches!(self.memory, Memory::Paged(_))
    }
}

/// The kernels' `Step`.
#[repr(C)]
struct StepArg {
    moment: i32,
    fused_update: i32,
    scalars: [f32; 9],
}

impl StepArg {
    fn new(s: &Step) -> Self {
        let moment = match s.rule {
            Rule::Torch if s.one_minus_beta1 < 0.5 => 0,
            Rule::Torch => 1,
            Rule::Bnb32 | Rule::Bnb8 => 2,
        };
        let scalars = [
            s.grad_scale,
            s.decay,
            s.beta1,
            s.one_minus_beta1,
            s.beta2,
            s.one_minus_beta2,
            s.correction2,
            s.eps,
            s.step_size,
        ];
        Self { moment, fused_update: i32::from(s.rule == Rule::Bnb32), scalars }
    }
}

impl KernelArg for StepArg {
    fn pointer(&self) -> *mut std::ffi::c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}
