//! The only place that knows of devices: what layers, optimizers and quantization ask of one.
//!
//! [`of`] gives the [`Backend`] of a device; a pass carries it in its [`Run`], and layers call it. [`cpu`] is plain Rust,
//! f32 throughout, each fast routine beside its oracle; `cuda` (behind the feature of that name) has kernels of our own
//! and cuBLASLt. What an operation is told is plain data ([`operands`]).
//!
//! One call at a time works on a device: [`Backend::pass`], [`Backend::learn`] and [`Backend::next_tokens`] hold its
//! lock, and so does whoever changes parameters ([`Backend::lock`]). A thread that trains and a cell that generates take
//! turns, a pass each.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dropout;
pub mod kv_cache;
pub mod operands;
pub mod optimizer;
#[cfg(test)]
mod oracle;
pub mod param;
#[cfg(test)]
mod properties;
pub mod run;
pub mod sequences;
mod slices;

use std::{
    any::Any,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use candle_core::{DType, Device, Tensor};

use crate::{
    error::{Error, Result},
    quantized::{BlockwiseState, QuantState, QuantType, QuantizedTensor},
};
use kv_cache::KvCache;
use operands::{Around, Attention, Frozen, HeadLayout, Input, Lora, Norm, Rope};
use optimizer::{Part, States};
use param::Param;
use parking_lot::ReentrantMutexGuard;
use run::Run;
use sequences::Sequences;

/// The tokens of a pass: packed rows, one after another.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    pub ids: &'a [u32],
    /// For each token the label of the next, or -100; empty where nothing is asked of labels.
    pub targets: &'a [i64],
    pub sequences: &'a Sequences,
}

/// What a pass that learns is told.
pub struct Learning<'a> {
    pub tokens: Tokens<'a>,
    /// What the gradient of the summed loss is multiplied by.
    pub grad_scale: f64,
    pub dropout_key: u64,
    pub gradient_checkpointing: bool,
    /// What the device keeps between the passes of this model.
    pub kept: &'a Kept,
    /// Everything that learns; asked for when nothing is kept yet.
    pub params: &'a dyn Fn() -> Vec<Param>,
    /// Bytes of the largest weight once it is dequantized.
    pub largest_dequantized: usize,
    /// The dtype of the activations.
    pub activations: DType,
}

/// What a device keeps between the passes of one model; forgotten with the last clone. Empty on the CPU.
#[derive(Clone, Default)]
pub struct Kept(Arc<KeptInner>);

#[derive(Default)]
struct KeptInner {
    on_device: Mutex<Option<Box<dyn Any + Send>>>,
    loss_scale: Mutex<Option<LossScale>>,
}

impl Kept {
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the CPU keeps nothing"))]
    fn on_device(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.0.on_device.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The scale of the loss; `None` before the first pass in f16.
    pub fn loss_scale(&self) -> Option<LossScale> {
        *self.0.loss_scale.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Puts a scale in place of the present one: a run that begins, or is resumed.
    pub fn set_loss_scale(&self, scale: Option<LossScale>) {
        *self.0.loss_scale.lock().unwrap_or_else(|e| e.into_inner()) = scale;
    }
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

/// What the loss is multiplied by so that small gradients survive f16; as `torch.amp.GradScaler`, but a pass whose
/// gradients overflow is made again at a quarter of the scale instead of being skipped.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LossScale {
    pub scale: f32,
    /// Passes without an overflow since the scale last changed.
    pub good_passes: usize,
}

impl Default for LossScale {
    /// A probability of 1e-5 is a normal number then.
    fn default() -> Self {
        Self { scale: 256.0, good_passes: 0 }
    }
}

impl LossScale {
    /// Where the search for a scale that does not overflow ends.
    const MIN: f32 = 1.0 / 65536.0;
    /// `GradScaler`'s first scale.
    const MAX: f32 = 65536.0;
    /// `GradScaler`'s `growth_interval`.
    const GROWTH_INTERVAL: usize = 2000;

    /// After a pass that did not overflow: twice as large after 2000 of them.
    pub fn after_good_pass(self) -> Self {
        match self.good_passes + 1 {
            n if n >= Self::GROWTH_INTERVAL => Self { scale: (2.0 * self.scale).min(Self::MAX), good_passes: 0 },
            good_passes => Self { good_passes, ..self },
        }
    }

    /// After one that did; `None` where a smaller scale is no remedy.
    pub fn after_overflow(self) -> Option<Self> {
        (self.scale > Self::MIN).then_some(Self { scale: self.scale / 4.0, good_passes: 0 })
    }
}

/// How a token is chosen from a row of logits: divided by `temperature`, the `top_k` highest of them, of those the most
/// likely that together reach `top_p`, of those the one at `u` of their cumulative probability in the order of ids.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// The row of the logits.
    pub row: usize,
    /// 1 is the highest logit, whatever else is said.
    pub top_k: usize,
    pub temperature: f32,
    pub top_p: f64,
    /// In [0, 1).
    pub u: f64,
}

/// What comes after the tokens that were appended.
#[derive(Clone, Debug)]
pub enum Next {
    /// The token of each draw.
    Ids(Vec<u32>),
    /// f32 `[sequences, vocab]`: choose yourself.
    Logits(Tensor),
}

/// A tensor in a file.
pub struct FileTensor<'a> {
    pub path: &'a std::path::Path,
    /// Its first byte.
    pub begin: u64,
    /// U8, F32, F16 or BF16.
    pub dtype: DType,
    pub shape: &'a [usize],
}

/// Reads tensors from files straight to a device, and converts and looks through them there.
pub trait DeviceReader {
    /// A tensor in `dtype`, in memory of at least `elements` elements: those behind its own are zeros. `None`: a number is
    /// not finite, in the file or in `dtype`.
    fn read(&self, from: &FileTensor, dtype: DType, elements: usize) -> Result<Option<Tensor>>;
}

/// The work of a pass.
pub type Work<'a> = &'a mut dyn FnMut(&mut Run) -> Result<()>;

/// A device: all that is asked of one. Activations are `[M, C]`, M the packed rows, in the dtype that the device computes
/// in; on a GPU M is padded (see `cuda::inputs`). Operations that have a backward save what it takes in [`Run::saved`],
/// under a label.
pub trait Backend:
    Passes + Rows + Norms + Linears + Dora + SavedModules + Activations + Attends + Losses + Parameters + Quantizes + Memory
{
}

impl<
    T: Passes
        + Rows
        + Norms
        + Linears
        + Dora
        + SavedModules
        + Activations
        + Attends
        + Losses
        + Parameters
        + Quantizes
        + Memory,
> Backend for T
{
}

/// Passes over a batch, one at a time.
pub trait Passes: Send + Sync {
    /// `cuda:0, NVIDIA H100 80GB HBM3`.
    fn name(&self) -> String;

    /// Whether it computes where it is called.
    fn is_cpu(&self) -> bool {
        false
    }

    /// Holds off every other thread that works on the device; the one that holds it may ask again, as a custom loss does
    /// that needs another model.
    fn lock(&self) -> ReentrantMutexGuard<'_, ()>;

    /// The dtype of activations for a model stored in `dtype`.
    fn activations(&self, dtype: DType) -> DType;

    /// One pass that keeps nothing; gives the summed loss, if `work` asked for one.
    fn pass(&self, tokens: &Tokens, work: Work) -> Result<f64>;

    /// One pass whose work adds to gradients; gives the summed loss.
    fn learn(&self, learning: &Learning, work: Work) -> Result<f64>;

    /// One pass that appends to the cache. `logits` gives those after the last token of each sequence,
    /// `[sequences, vocab]` or wider; what follows is a token a draw or, without draws and where the device could not
    /// choose, those logits on the CPU.
    fn next_tokens(
        &self,
        tokens: &Tokens,
        vocab_size: usize,
        cache: &mut KvCache,
        draws: &[Draw],
        logits: &mut (dyn FnMut(&mut Run) -> Result<Tensor> + Send),
    ) -> Result<Next>;
}

/// Rows of tokens and sequences.
pub trait Rows {
    /// Rows of `table` `[vocab, C]` by the ids of the run, in the dtype of the activations.
    fn embed(&self, table: &Tensor, activations: DType, run: &Run) -> Result<Tensor>;

    /// The last row of each sequence.
    fn last_rows(&self, x: &Tensor, run: &Run) -> Result<Tensor>;

    /// `x` without padding, f32 on the CPU, its first `columns` columns.
    fn to_host(&self, x: &Tensor, columns: usize, run: &Run) -> Result<Tensor>;

    /// a + b, of one shape.
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor>;
}

/// Layer and RMS normalization.
pub trait Norms {
    /// `[M, C]` to `[M, C]`, over the last dimension.
    fn norm(&self, norm: &Norm, x: &Tensor, run: &mut Run) -> Result<Tensor>;

    /// dy to dx, plus `residual`: the gradient that reaches x past the norm.
    fn norm_backward(&self, norm: &Norm, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor>;
}

/// Products with weights, and LoRA.
pub trait Linears {
    /// x W^T + bias, plus scaling B A dropout(x) with `lora`, and what stands around it.
    fn linear(&self, frozen: &Frozen, lora: Option<&Lora>, x: &Input, around: &Around, run: &mut Run)
    -> Result<Tensor>;

    /// Saves what [`Linears::linear`] saves for `lora`, without the result.
    fn remember_lora(&self, lora: &Lora, x: &Tensor, run: &mut Run) -> Result<()>;

    /// dy to dx; adds to the gradients of `lora`. With `need_dx` false (nothing below learns) dx is not computed.
    fn linear_backward(
        &self,
        frozen: &Frozen,
        lora: Option<&Lora>,
        dy: &Tensor,
        need_dx: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>>;
}

/// What DoRA adds to LoRA.
pub trait Dora {
    /// The lengths of the rows of W + scaling * B A, `[out]` f32. `weight_norms2`: the squared lengths of those of W.
    /// `dtype`: that of the activations.
    fn dora_norms(
        &self,
        frozen: &Frozen,
        lora: &Lora,
        weight_norms2: &Tensor,
        dtype: DType,
        run: &mut Run,
    ) -> Result<Tensor>;

    /// z times magnitude / norms, column by column (each `[out]`, f32), plus `bias` `[out]` and `residual` `[M, out]`.
    fn scale_columns(
        &self,
        z: &Tensor,
        magnitude_and_norms: [&Tensor; 2],
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor>;

    /// The gradient of z; adds to that of the magnitude.
    fn scale_columns_backward(
        &self,
        dy: &Tensor,
        z: &Tensor,
        magnitude: &Param,
        norms: &Tensor,
        run: &Run,
    ) -> Result<Tensor>;
}

/// Modules that learn whole: PEFT's `modules_to_save`.
pub trait SavedModules {
    /// The weight `[out, in]` of a linear layer in the dtype of the activations, for products with it.
    fn cast_weight(&self, weight: &Param, activations: DType) -> Result<Tensor>;

    /// Adds dy^T x to the gradient of a weight `[out, in]`; x `[M, in]`, dy `[M, out]` or wider.
    fn weight_backward(&self, x: &Tensor, dy: &Tensor, weight: &Param, run: &Run) -> Result<()>;

    /// Adds each row of dx `[M, C]` to the gradient of the row of `table` `[vocab, C]` that [`Rows::embed`] took; nothing
    /// to that of `padding_idx`.
    fn embed_backward(&self, dx: &Tensor, table: &Param, padding_idx: Option<usize>, run: &Run) -> Result<()>;
}

/// Gelu and SwiGLU.
pub trait Activations {
    /// Saves x.
    fn gelu(&self, x: &Tensor, run: &mut Run) -> Result<Tensor>;
    fn gelu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor>;

    /// silu(gate) * up; saves both.
    fn swiglu(&self, gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor>;
    /// dy to the gradients of gate and up.
    fn swiglu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)>;
}

/// Attention and the positions that it turns by.
pub trait Attends {
    /// q, k and v side by side in rows of `layout`, q and k turned to their positions; saves nothing.
    fn rope(&self, rope: &Rope, qkv: [&Tensor; 3], layout: &HeadLayout, run: &Run) -> Result<Tensor>;
    /// The gradient of what [`Attends::rope`] gave to those of q, k and v.
    fn rope_backward(&self, rope: &Rope, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]>;

    /// `projected` `[M, row]` to `[M, heads * head_dim]`.
    fn attention(&self, attention: &Attention, projected: &Tensor, run: &mut Run) -> Result<Tensor>;
    /// dy to the gradient of `projected`.
    fn attention_backward(&self, attention: &Attention, dy: &Tensor, run: &mut Run) -> Result<Tensor>;
}

/// The rows with a label, and their loss.
pub trait Losses {
    /// Rows of logits that exist at a time, of so many words.
    fn logit_rows(&self, vocab_size: usize) -> usize;
    /// Rows with a label, padded as the device has them.
    fn num_labelled(&self, run: &Run) -> usize;
    /// The rows with a label, from one of them to another.
    fn labelled_rows(&self, x: &Tensor, range: Range<usize>, run: &Run) -> Result<Tensor>;
    /// Adds the cross-entropies of these labelled rows to the run's loss and, with `learn`, makes their gradient by the
    /// logits, times the scale of the run.
    fn cross_entropy(
        &self,
        logits: Tensor,
        vocab_size: usize,
        range: Range<usize>,
        learn: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>>;
    /// Gradients of the labelled rows, chunk after chunk, to those of all rows: zero where there is no label.
    fn unlabelled_rows(&self, chunks: Vec<Tensor>, run: &Run) -> Result<Tensor>;
}

/// Parameters and their gradients, in place.
pub trait Parameters {
    /// Sets a parameter or gradient to zero, in place.
    fn fill_zero(&self, tensor: &Tensor) -> Result<()>;
    /// The numbers of an f32 tensor.
    fn read_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&[f32])) -> Result<()>;
    /// Changes the numbers of an f32 tensor in place.
    fn modify_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&mut [f32])) -> Result<()>;
    /// The sum of the squares of the gradients, in f64 and in an order that does not change.
    fn sum_of_squares(&self, params: &[&Param]) -> Result<f64>;
    /// Room for the states of these parameters, zeros: of each parameter the `moments` of an optimizer and, in 8 bits,
    /// their maxima. `paged`: in memory that may leave the device. `None`: the device has no kernels for it, its memory
    /// is the process's.
    fn optimizer_states(
        &self,
        params: &[Param],
        parts: Vec<Vec<Part>>,
        moments: usize,
        paged: bool,
    ) -> Result<Option<Box<dyn States>>>;
}

/// Weights in 4 bits, statistics in 8.
pub trait Quantizes {
    /// See [`crate::quant::quantize_4bit`].
    fn quantize(
        &self,
        weight: &Tensor,
        quant_type: QuantType,
        blocksize: usize,
        compress_statistics: bool,
    ) -> Result<(Tensor, QuantState)>;
    /// See [`crate::quant::dequantize_4bit`].
    fn dequantize(&self, weight: &QuantizedTensor) -> Result<Tensor>;
    /// See [`crate::quant::quantize_blockwise`].
    fn quantize_blockwise(&self, x: &Tensor, blocksize: usize) -> Result<(Tensor, BlockwiseState)>;
    /// See [`crate::quant::dequantize_blockwise`]; the state has the right number of maxima.
    fn dequantize_blockwise(&self, q: &Tensor, state: &BlockwiseState) -> Result<Tensor>;
}

/// What lies in the device's memory.
pub trait Memory {
    /// What reads large tensors to it, if it is not the CPU.
    fn reader(&self) -> Result<Option<Box<dyn DeviceReader>>>;

    /// Rows that a batch, its labels and an embedding table are padded to a multiple of.
    fn row_padding(&self) -> usize;
    /// Bytes of the memory that a tensor has, padding included.
    fn num_bytes(&self, tensor: &Tensor) -> usize;
    /// Bytes that tensors can still have, where that is known beforehand.
    fn available_bytes(&self) -> Result<Option<usize>>;
    /// What it keeps for all passes besides the model: names and bytes. `largest_dequantized` as in [`Learning`];
    /// `gradients`: bytes of the model's gradients.
    fn kept_bytes(&self, largest_dequantized: usize, gradients: usize) -> Vec<(&'static str, usize)>;
}

/// The backend of a device.
///
/// # Errors
/// A device that this build has no kernels for, and a CUDA device that was not made by [`gpu`].
pub fn of(device: &Device) -> Result<&'static dyn Backend> {
    match device {
        Device::Cpu => Ok(&cpu::Cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => Ok(cuda::of(device)?),
        other => Err(Error::Unsupported {
            what: "device".into(),
            got: format!("{:?}", other.location()),
            supported: vec!["cpu".into()],
            remedy: "load the model with device_map: DeviceMap::Cpu".into(),
        }),
    }
}

/// The GPU of that number.
pub fn gpu(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return cuda::device(ordinal);
    #[cfg(not(feature = "cuda"))]
    Err(Error::Unsupported {
        what: "device_map".into(),
        got: format!("Cuda({ordinal})"),
        supported: vec!["Cpu".into(), "Auto".into()],
        remedy: "this build has no CUDA kernels: use DeviceMap::Auto".into(),
    })
}

/// The first GPU that can be used, otherwise the CPU, and what to say of the choice.
pub fn first_device() -> (Device, String) {
    #[cfg(feature = "cuda")]
    return match cuda::first() {
        Ok((index, gpu)) => (gpu.device(), format!("device_map auto: cuda:{index} ({})", gpu.name())),
        Err(why) => (Device::Cpu, format!("device_map auto: cpu ({why})")),
    };
    #[cfg(not(feature = "cuda"))]
    (Device::Cpu, "device_map auto: cpu (this build has no CUDA kernels)".into())
}

/// An error of the engine itself, not of its user.
pub(crate) fn internal(what: impl Into<String>) -> Error {
    candle_core::Error::Msg(what.into()).bt().into()
}
