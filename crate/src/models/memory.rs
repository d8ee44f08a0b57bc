//! Where memory goes, term by term: the weights as they are, a training step before it runs.

use candle_core::{DType, Tensor};

use super::{decoder::Decoder, needs::Needs};
pub use crate::display::{MemoryReport, MemoryTerm};
use crate::{
    backend::{self, cpu::bytes_of, operands::Weight},
    error::Result,
};

/// The largest micro-batch of a run, as far as memory is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepShape {
    /// Real tokens, padding not counted: padding takes no memory here.
    pub tokens: usize,
    /// Tokens with a label.
    pub labels: usize,
    pub gradient_checkpointing: bool,
}

impl MemoryReport {
    /// The weights of a network, where they are.
    pub fn of(decoder: &Decoder) -> Self {
        let mut report = Self::default();
        report.add("embeddings", bytes(&decoder.embedding.table));
        let (mut quantized, mut dense, mut small, mut adapters) = (0, 0, 0, 0);
        for linear in decoder.linears() {
            match linear.weight() {
                Weight::Quantized(q) => quantized += q.num_bytes(),
                Weight::Dense(_) if decoder.tied && linear.name == decoder.head.name => {}
                Weight::Dense(t) => dense += bytes(t),
            }
            small += linear.frozen.bias.as_ref().map_or(0, bytes);
            let params = linear.adapters().iter().flat_map(|(_, adapter)| adapter.parameters());
            adapters += params.map(|(_, param)| 2 * bytes(param.value())).sum::<usize>();
        }
        // A norm that is not in f32 has a copy that is.
        let norm = |t: &Tensor| bytes(t) + if t.dtype() == DType::F32 { 0 } else { 4 * t.elem_count() };
        small += decoder.norms().flat_map(|n| n.parameters()).map(|(_, t)| norm(t)).sum::<usize>();
        adapters += decoder.embedding.copies.all().iter().map(|(_, copy)| 2 * bytes(copy.value())).sum::<usize>();
        report.add("linear layers, 4-bit", quantized);
        report.add("linear layers", dense);
        report.add("norms and biases", small);
        report.add("adapters and their gradients", adapters);
        report
    }

    /// What a training step needs besides the weights: activations that wait for their backward, as a pass of a few
    /// tokens shows them, and the widest moment of the step. On a GPU activations are in the model's dtype, and so are
    /// the weights that are dequantized for a product.
    pub fn of_step(decoder: &Decoder, shape: StepShape) -> Result<Self> {
        let backend = backend::of(decoder.device())?;
        let padded = |rows: usize| rows.next_multiple_of(backend.row_padding());
        let (tokens, labels) = (padded(shape.tokens), padded(shape.labels));
        let mut report = Self::default();
        let (width, float) = (decoder.hidden_size(), decoder.activations().size_in_bytes());
        let needs = decoder.needs()?;
        let saved = |needs: &Needs| needs.saved * tokens;
        let widest = needs.iter().map(saved).max().unwrap_or(0);
        let working = needs.iter().map(|n| n.working).max().unwrap_or(0) * tokens * float;
        let vocab = padded(decoder.vocab_size());
        let rows = backend.logit_rows(decoder.vocab_size()).min(labels);
        let logits = if decoder.device().is_cpu() {
            // The final norm's input and output, and their gradient.
            let around_head = 3 * width * tokens * float;
            (rows * vocab + 2 * rows * width) * float + around_head
        } else {
            // The final norm's input and output; the rows with a label and their gradient; logits in f32 and
            // their gradient; a head that learns whole, in the dtype of the activations.
            let cast = decoder.head.adapter().is_some_and(|adapter| adapter.replaces_weight());
            let head = if cast { vocab * width * float } else { 0 };
            head + 2 * width * (tokens + labels) * float + rows * vocab * (size_of::<f32>() + float)
        };
        if shape.gradient_checkpointing {
            report.add("inputs of the blocks (gradient checkpointing)", needs.len() * width * tokens * float);
            // On a GPU a block's input is not there twice.
            let shared = if decoder.device().is_cpu() { 0 } else { width * tokens * float };
            let block = (widest + working).saturating_sub(shared);
            report.add("the widest moment: one block again, or the logits", logits.max(block));
        } else {
            report.add("activations of the blocks", needs.iter().map(saved).sum());
            report.add("the widest moment: a block's backward, or the logits", logits.max(working));
        }
        let gradients = decoder.params().iter().map(|param| bytes(param.grad())).sum();
        for (name, bytes) in backend.kept_bytes(decoder.largest_dequantized(), gradients) {
            report.add(name, bytes);
        }
        Ok(report)
    }

    /// What 4 bits, with double quantization, would save of the linear layers inside the blocks.
    pub(crate) fn saved_by_4bit(decoder: &Decoder) -> usize {
        let inside = decoder.blocks.iter().flat_map(|b| b.linears());
        let dense = inside.filter_map(|l| match l.weight() {
            Weight::Dense(t) => Some(bytes(t).saturating_sub(t.elem_count() * 4127 / 8000)),
            Weight::Quantized(_) => None,
        });
        dense.sum()
    }
}

/// Bytes that a tensor's memory has: on a GPU a table may have rows that are padding.
fn bytes(t: &Tensor) -> usize {
    backend::of(t.device()).map_or(0, |backend| backend.num_bytes(t))
}

/// This process's memory in RAM now, bytes (Linux; 0 elsewhere).
pub fn resident_bytes() -> usize {
    status_field("VmRSS:")
}

/// The most that this process ever had in RAM, bytes, since it began or [`reset_peak`].
pub fn peak_resident_bytes() -> usize {
    status_field("VmHWM:")
}

/// Forgets the peak so far, so that the next one is of what follows. Does nothing where the
/// system does not offer it.
pub fn reset_peak() {
    // "5" resets the high-water mark (proc(5)); a system that refuses keeps the older, larger one.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Gives memory that was freed back to the system, so that [`resident_bytes`] counts what is in use.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn status_field(name: &str) -> usize {
    bytes_of("/proc/self/status", name).unwrap_or(0)
}
