//! Where memory goes, term by term.

use std::fmt;

use super::decoder::Decoder;
use crate::layers::linear::Weight;

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

    /// Adds a term unless it is nothing.
    pub fn add(&mut self, name: impl Into<String>, bytes: usize) {
        if bytes > 0 {
            self.terms.push(MemoryTerm { name: name.into(), bytes });
        }
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
