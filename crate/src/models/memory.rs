//! Where memory goes, term by term: the weights as they are, a training step before it runs.

use candle_core::{DType, Tensor};

use super::decoder::Decoder;
pub use crate::display::{MemoryReport, MemoryTerm};
use crate::layers::{
    cross_entropy::{GPU_CHUNK_ROWS, chunk_rows},
    linear::Weight,
};

/// What a block needs for each token of a pass that learns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Activations that wait for their backward, in the dtype that is computed in (the CPU's is f32).
    pub saved: usize,
    /// Numbers in f32 that wait with them: statistics and, on a GPU, what adapters keep.
    pub statistics: usize,
    /// Activations that exist for a while, at the widest point of the backward.
    pub working: usize,
}

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
        report.add("embeddings", bytes(&decoder.embedding.weight));
        let (mut quantized, mut dense, mut small, mut adapters) = (0, 0, 0, 0);
        for linear in decoder.linears() {
            match &linear.weight {
                Weight::Quantized(q) => quantized += q.num_bytes(),
                Weight::Dense(_) if decoder.tied && linear.name == decoder.head.name => {}
                Weight::Dense(t) => dense += bytes(t),
            }
            small += linear.bias.as_ref().map_or(0, bytes);
            if let Some(lora) = &linear.lora {
                adapters += 2 * (bytes(lora.a.value()) + bytes(lora.b.value()));
            }
        }
        // A norm that is not in f32 has a copy that is.
        let norm = |t: &Tensor| bytes(t) + if t.dtype() == DType::F32 { 0 } else { 4 * t.elem_count() };
        let in_blocks = decoder.blocks.iter().flat_map(|b| b.other_parameters());
        small += in_blocks.map(|(_, _, t)| norm(&t)).sum::<usize>();
        small += decoder.embedding_norm.iter().map(|n| norm(&n.weight) + norm(&n.bias)).sum::<usize>();
        small += decoder.final_norm.parameters().into_iter().map(|(_, t)| norm(t)).sum::<usize>();
        report.add("linear layers, 4-bit", quantized);
        report.add("linear layers", dense);
        report.add("norms and biases", small);
        report.add("adapters and their gradients", adapters);
        report
    }

    /// What a training step needs besides the weights, from the shapes of the layers alone:
    /// activations that wait for their backward, and the widest moment of the step. On a GPU
    /// activations are in the model's dtype, and so are the weights that are dequantized for a product.
    pub fn of_step(decoder: &Decoder, shape: StepShape) -> Self {
        let gpu = decoder.device().is_cuda().then(|| decoder.embedding.weight.dtype());
        let StepShape { mut tokens, mut labels, gradient_checkpointing } = shape;
        if gpu.is_some() {
            (tokens, labels) = (tokens.next_multiple_of(GPU_ROWS), labels.next_multiple_of(GPU_ROWS));
        }
        let mut report = Self::default();
        let (width, float) = (decoder.hidden_size(), gpu.unwrap_or(DType::F32).size_in_bytes());
        let lowest = decoder.blocks.iter().position(|b| b.linears().iter().any(|l| l.lora.is_some()));
        let learning = &decoder.blocks[lowest.unwrap_or(decoder.blocks.len())..];
        let needs: Vec<Needs> = learning.iter().map(|b| b.needs(gpu)).collect();
        let saved = |needs: &Needs| (needs.saved * float + needs.statistics * size_of::<f32>()) * tokens;
        let widest = needs.iter().map(saved).max().unwrap_or(0);
        let working = needs.iter().map(|n| n.working).max().unwrap_or(0) * tokens * float;
        let logits = match gpu {
            None => {
                // The final norm's input and output, and their gradient.
                let around_head = 3 * width * tokens * float;
                let rows = chunk_rows(decoder.vocab_size()).min(labels);
                (rows * decoder.vocab_size() + 2 * rows * width) * float + around_head
            }
            Some(_) => {
                // The final norm's input and output; the rows with a label and their gradient; logits in f32 and
                // their gradient.
                let rows = GPU_CHUNK_ROWS.min(labels);
                let vocab = decoder.vocab_size().next_multiple_of(GPU_ROWS);
                2 * width * (tokens + labels) * float + rows * vocab * (size_of::<f32>() + float)
            }
        };
        if gradient_checkpointing {
            report.add("inputs of the blocks (gradient checkpointing)", learning.len() * width * tokens * float);
            // On a GPU a block's input is not there twice.
            let shared = if gpu.is_some() { width * tokens * float } else { 0 };
            let block = (widest + working).saturating_sub(shared);
            report.add("the widest moment: one block again, or the logits", logits.max(block));
        } else {
            report.add("activations of the blocks", needs.iter().map(saved).sum());
            report.add("the widest moment: a block's backward, or the logits", logits.max(working));
        }
        #[cfg(feature = "cuda")]
        if gpu.is_some() {
            report.extend(Self::of_gpu(decoder, float));
        }
        report
    }

    /// What a GPU keeps for all passes.
    #[cfg(feature = "cuda")]
    fn of_gpu(decoder: &Decoder, float: usize) -> Self {
        let mut report = Self::default();
        let (mut largest, mut gradients) = (0, 0);
        for linear in decoder.linears() {
            if let Weight::Quantized(q) = &linear.weight {
                largest = largest.max(q.shape().iter().product::<usize>() * float);
            }
            gradients += linear.lora.as_ref().map_or(0, |lora| bytes(lora.a.grad()) + bytes(lora.b.grad()));
        }
        report.add("room for dequantized weights", crate::cuda::PLACES * largest);
        report.add("copy of the gradients", gradients);
        report.add("workspace of the matrix products", crate::cuda::WORKSPACE);
        report
    }

    /// What 4 bits, with double quantization, would save of the linear layers inside the blocks.
    pub(crate) fn saved_by_4bit(decoder: &Decoder) -> usize {
        let inside = decoder.blocks.iter().flat_map(|b| b.linears());
        let dense = inside.filter_map(|l| match &l.weight {
            Weight::Dense(t) => Some(bytes(t).saturating_sub(t.elem_count() * 4127 / 8000)),
            Weight::Quantized(_) => None,
        });
        dense.sum()
    }
}

/// Rows of a batch on a GPU are padded to a multiple of this, as are those of an embedding table.
const GPU_ROWS: usize = 64;

/// Bytes that a tensor's memory has: on a GPU a table may have rows that are padding.
fn bytes(t: &Tensor) -> usize {
    let width = t.dtype().size_in_bytes();
    #[cfg(feature = "cuda")]
    if let (true, Ok((_, elements))) = (t.device().is_cuda(), crate::cuda::alloc(t)) {
        return elements * width;
    }
    t.elem_count() * width
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
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap_or(0) * 1024
}
