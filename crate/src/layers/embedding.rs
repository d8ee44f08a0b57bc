//! The table of embeddings.

use candle_core::Tensor;

use super::adapters::Adapters;
use crate::{
    backend::{param::Param, run::Run},
    display::module_tree::ModuleNode,
    error::Result,
};

/// Rows of a table by token ids. The table is frozen; a copy of it can learn in its place (PEFT's `modules_to_save`).
#[derive(Clone)]
pub struct Embedding {
    /// The module's path in the model: `transformer.word_embeddings`.
    pub name: String,
    /// `[vocab, C]`, in the checkpoint's dtype.
    pub table: Tensor,
    /// The id of padding, whose row gets no gradient.
    pub padding_idx: Option<usize>,
    /// Copies `[vocab, C]`, f32.
    pub copies: Adapters<Param>,
}

impl Embedding {
    pub fn new(name: String, table: Tensor, padding_idx: Option<usize>) -> Self {
        Self { name, table, padding_idx, copies: Adapters::default() }
    }

    /// Whether a copy learns.
    pub fn learns(&self) -> bool {
        self.copies.active().is_some()
    }

    /// `[M, C]` of the run's ids, in the dtype of the activations.
    pub fn forward(&self, run: &Run) -> Result<Tensor> {
        let activations = run.backend.activations(self.table.dtype());
        run.backend.embed(self.copies.active().map_or(&self.table, Param::value), activations, run)
    }

    /// Adds to the gradient of the copy that learns, if one does.
    pub fn backward(&self, dx: &Tensor, run: &Run) -> Result<()> {
        let Some(copy) = self.copies.active() else { return Ok(()) };
        run.backend.embed_backward(dx, copy, self.padding_idx, run)
    }

    /// The table as PyTorch prints it, under `name`; with copies as PEFT does.
    pub fn module_tree(&self, name: &str) -> ModuleNode {
        let (vocab, width) = self.table.dims2().unwrap_or_default();
        let table = ModuleNode::embedding(name, vocab, width, self.padding_idx);
        let trees = self.copies.all().iter().map(|(copy, _)| ModuleNode::saved_module(table.clone(), copy));
        trees.reduce(ModuleNode::merged).unwrap_or(table)
    }
}
