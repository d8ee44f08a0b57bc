//! Where memory goes, term by term: the weights as they are, a training step before it runs.

use std::fmt;

use super::decoder::Decoder;
use crate::layers::{cross_entropy::chunk_rows, linear::Weight};

/// Bytes of an activation: the CPU computes in f32.
const FLOAT: usize = size_of::<f32>();

/// The largest micro-batch of a run, as far as memory is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepShape {
    /// Real tokens, padding not counted: padding takes no memory here.
    pub tokens: usize,
    /// Tokens with a label.
    pub labels: usize,
    pub gradient_checkpointing: bool,
}

/// One term of a report.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryTerm {
    pub name: String,
    pub bytes: usize,
}

/// Named amounts of memory that add up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryReport {
    pub terms: Vec<MemoryTerm>,
}

impl MemoryReport {
    /// The weights of a network.
    pub fn of(decoder: &Decoder) -> Self {
        let mut report = Self::default();
        let bytes = |t: &candle_core::Tensor| t.elem_count() * t.dtype().size_in_bytes();
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
        let others = decoder.blocks.iter().flat_map(|b| b.other_parameters());
        small += others.map(|(_, _, t)| bytes(&t)).sum::<usize>();
        report.add("linear layers, 4-bit", quantized);
        report.add("linear layers", dense);
        report.add("norms and biases", small);
        report.add("adapters and their gradients", adapters);
        report
    }

    /// What a training step needs besides the weights, from the shapes of the layers alone:
    /// activations that wait for their backward, and the widest moment of the step.
    pub fn of_step(decoder: &Decoder, shape: StepShape) -> Self {
        let StepShape { tokens, labels, gradient_checkpointing } = shape;
        let mut report = Self::default();
        let width = decoder.hidden_size();
        let lowest = decoder.blocks.iter().position(|b| b.linears().iter().any(|l| l.lora.is_some()));
        let learning = &decoder.blocks[lowest.unwrap_or(decoder.blocks.len())..];
        let saved = |i: usize| learning[i].saved_floats_per_token() * tokens * FLOAT;
        let widest = (0..learning.len()).map(saved).max().unwrap_or(0);
        let working = learning.iter().map(|b| b.working_floats_per_token()).max().unwrap_or(0) * tokens * FLOAT;
        // The final norm's input and output, and their gradient.
        let around_head = 3 * width * tokens * FLOAT;
        let rows = chunk_rows(decoder.vocab_size()).min(labels);
        let logits = (rows * decoder.vocab_size() + 2 * rows * width) * FLOAT + around_head;
        if gradient_checkpointing {
            report.add("inputs of the blocks (gradient checkpointing)", learning.len() * width * tokens * FLOAT);
            report.add("the widest moment: one block again, or the logits", logits.max(widest + working));
        } else {
            report.add("activations of the blocks", (0..learning.len()).map(saved).sum());
            report.add("the widest moment: a block's backward, or the logits", logits.max(working));
        }
        report
    }

    /// Adds a term unless it is nothing.
    pub fn add(&mut self, name: impl Into<String>, bytes: usize) {
        if bytes > 0 {
            self.terms.push(MemoryTerm { name: name.into(), bytes });
        }
    }

    /// Appends the terms of another report.
    pub fn extend(&mut self, other: Self) {
        self.terms.extend(other.terms);
    }

    /// The sum of the terms.
    pub fn total(&self) -> usize {
        self.terms.iter().map(|t| t.bytes).sum()
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.terms.iter().map(|t| t.name.chars().count()).max().unwrap_or(0).max(5);
        for MemoryTerm { name, bytes } in &self.terms {
            writeln!(f, "{name:<width$}  {:>9.2} MiB", mib(*bytes))?;
        }
        write!(f, "{:<width$}  {:>9.2} MiB", "total", mib(self.total()))
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / (1 << 20) as f64
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
