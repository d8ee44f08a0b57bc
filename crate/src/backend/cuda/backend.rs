//! The [`Backend`](crate::backend::Backend) that a GPU is.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use parking_lot::ReentrantMutexGuard;

use super::{
    Gpu, PLACES, WORKSPACE, address, alloc, fill_zero, load,
    ops::{self, Product},
    optim, quant,
    tensor::{copy_f32, write},
};
use crate::{
    backend::{
        Activations, Attends, DeviceReader, Dora, Draw, Learning, Linears, Losses, Memory, Next, Norms, Parameters,
        Passes, Quantizes, Rows, SavedModules, Tokens, Work,
        kv_cache::KvCache,
        operands::{Around, Attention, Frozen, HeadLayout, Input, Lora, Norm, Rope},
        optimizer::{Part, States},
        param::Param,
        run::Run,
    },
    error::Result,
    quantized::{BlockwiseState, QuantState, QuantType, QuantizedTensor},
};

/// Rows of a batch, and those of an embedding table, are padded to a multiple of this: a head of an odd size makes slow
/// products.
const ROWS: usize = super::inputs::ROWS;

impl Passes for Gpu {
    fn name(&self) -> String {
        format!("cuda:{}, {}", self.ordinal, Gpu::name(self))
    }

    fn lock(&self) -> ReentrantMutexGuard<'_, ()> {
        self.hold()
    }

    fn activations(&self, dtype: DType) -> DType {
        dtype
    }

    fn pass(&self, tokens: &Tokens, work: Work) -> Result<f64> {
        self.pass_on_card(tokens, work)
    }

    fn learn(&self, learning: &Learning, work: Work) -> Result<f64> {
        self.learn_on_card(learning, work)
    }

    fn next_tokens(
        &self,
        tokens: &Tokens,
        vocab_size: usize,
        cache: &mut KvCache,
        draws: &[Draw],
        logits: &mut (dyn FnMut(&mut Run) -> Result<Tensor> + Send),
    ) -> Result<Next> {
        self.next_tokens_on_card(tokens, vocab_size, cache, draws, logits)
    }
}

impl Rows for Gpu {
    fn embed(&self, table: &Tensor, activations: DType, run: &Run) -> Result<Tensor> {
        ops::embed(table, activations, run)
    }

    fn last_rows(&self, x: &Tensor, run: &Run) -> Result<Tensor> {
        if run.sequences.len() == run.ids.len() {
            return Ok(x.clone());
        }
        Ok(x.index_select(&Tensor::new(run.sequences.last_rows(), x.device())?, 0)?)
    }

    fn to_host(&self, x: &Tensor, columns: usize, run: &Run) -> Result<Tensor> {
        let x = x.narrow(0, 0, run.ids.len())?.narrow(1, 0, columns)?.contiguous()?;
        Ok(x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        ops::add(a, b)
    }
}

impl Norms for Gpu {
    fn norm(&self, norm: &Norm, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        ops::norm_forward(norm, x, run)
    }

    fn norm_backward(&self, norm: &Norm, dy: &Tensor, residual: Option<&Tensor>, run: &mut Run) -> Result<Tensor> {
        ops::norm_backward(norm, dy, residual, run)
    }
}

impl Linears for Gpu {
    fn linear(
        &self,
        frozen: &Frozen,
        lora: Option<&Lora>,
        x: &Input,
        around: &Around,
        run: &mut Run,
    ) -> Result<Tensor> {
        ops::linear_forward(&Product { frozen, lora }, x, around, run)
    }

    fn remember_lora(&self, lora: &Lora, x: &Tensor, run: &mut Run) -> Result<()> {
        ops::lora_down(self, lora, x, run).map(drop)
    }

    fn linear_backward(
        &self,
        frozen: &Frozen,
        lora: Option<&Lora>,
        dy: &Tensor,
        need_dx: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>> {
        ops::linear_backward(&Product { frozen, lora }, dy, need_dx, run)
    }
}

impl SavedModules for Gpu {
    fn cast_weight(&self, weight: &Param, activations: DType) -> Result<Tensor> {
        ops::cast_weight(self, weight, activations)
    }

    fn weight_backward(&self, x: &Tensor, dy: &Tensor, weight: &Param, run: &Run) -> Result<()> {
        ops::weight_backward(self, x, dy, weight, run)
    }

    fn embed_backward(&self, dx: &Tensor, table: &Param, padding_idx: Option<usize>, run: &Run) -> Result<()> {
        ops::embed_backward(self, dx, table, padding_idx, run)
    }
}

impl Dora for Gpu {
    fn dora_norms(
        &self,
        frozen: &Frozen,
        lora: &Lora,
        weight_norms2: &Tensor,
        dtype: DType,
        run: &mut Run,
    ) -> Result<Tensor> {
        ops::dora_norms(frozen, lora, weight_norms2, dtype, run)
    }

    fn scale_columns(
        &self,
        z: &Tensor,
        magnitude_and_norms: [&Tensor; 2],
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        ops::scale_columns(z, magnitude_and_norms, bias, residual)
    }

    fn scale_columns_backward(
        &self,
        dy: &Tensor,
        z: &Tensor,
        magnitude: &Param,
        norms: &Tensor,
        run: &Run,
    ) -> Result<Tensor> {
        ops::scale_columns_backward(dy, z, magnitude, norms, run)
    }
}

impl Activations for Gpu {
    fn gelu(&self, x: &Tensor, run: &mut Run) -> Result<Tensor> {
        ops::gelu_forward(x, run)
    }

    fn gelu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        ops::gelu_backward(dy, run)
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor, run: &mut Run) -> Result<Tensor> {
        ops::swiglu_forward(gate, up, run)
    }

    fn swiglu_backward(&self, dy: &Tensor, run: &mut Run) -> Result<(Tensor, Tensor)> {
        ops::swiglu_backward(dy, run)
    }
}

impl Attends for Gpu {
    fn rope(&self, rope: &Rope, qkv: [&Tensor; 3], layout: &HeadLayout, run: &Run) -> Result<Tensor> {
        ops::rope_join(rope, qkv, layout, run)
    }

    fn rope_backward(&self, rope: &Rope, d: &Tensor, layout: &HeadLayout, run: &Run) -> Result<[Tensor; 3]> {
        ops::rope_split(rope, d, layout, run)
    }

    fn attention(&self, attention: &Attention, projected: &Tensor, run: &mut Run) -> Result<Tensor> {
        ops::attention_forward(attention, projected, run)
    }

    fn attention_backward(&self, attention: &Attention, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
        ops::attention_backward(attention, dy, run)
    }
}

impl Losses for Gpu {
    fn logit_rows(&self, _vocab_size: usize) -> usize {
        ops::CHUNK_ROWS
    }

    fn num_labelled(&self, run: &Run) -> usize {
        run.card.map_or(0, |card| card.inputs.shape.labels)
    }

    fn labelled_rows(&self, x: &Tensor, range: Range<usize>, run: &Run) -> Result<Tensor> {
        ops::labelled_rows(x, range, run)
    }

    fn cross_entropy(
        &self,
        logits: Tensor,
        vocab_size: usize,
        range: Range<usize>,
        learn: bool,
        run: &mut Run,
    ) -> Result<Option<Tensor>> {
        ops::cross_entropy(&logits, vocab_size, range, learn, run)
    }

    fn unlabelled_rows(&self, chunks: Vec<Tensor>, run: &Run) -> Result<Tensor> {
        ops::unlabelled_rows(&chunks, run)
    }
}

impl Parameters for Gpu {
    fn fill_zero(&self, tensor: &Tensor) -> Result<()> {
        fill_zero(tensor)
    }

    fn read_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        f(&copy_f32(self, tensor)?);
        Ok(())
    }

    fn modify_f32(&self, tensor: &Tensor, f: &mut dyn FnMut(&mut [f32])) -> Result<()> {
        let mut values = copy_f32(self, tensor)?;
        f(&mut values);
        write(self, address(tensor)?, &values)
    }

    fn sum_of_squares(&self, params: &[&Param]) -> Result<f64> {
        optim::sum_of_squares(self, params)
    }

    fn optimizer_states(
        &self,
        params: &[Param],
        parts: Vec<Vec<Part>>,
        moments: usize,
        paged: bool,
    ) -> Result<Option<Box<dyn States>>> {
        Ok(Some(Box::new(optim::StatesOnCard::new(self.forever()?, params, parts, moments, paged)?)))
    }
}

impl Quantizes for Gpu {
    fn quantize(
        &self,
        weight: &Tensor,
        quant_type: QuantType,
        blocksize: usize,
        compress_statistics: bool,
    ) -> Result<(Tensor, QuantState)> {
        quant::quantize(weight, quant_type, blocksize, compress_statistics)
    }

    fn dequantize(&self, weight: &QuantizedTensor) -> Result<Tensor> {
        quant::dequantize(weight)
    }

    fn quantize_blockwise(&self, x: &Tensor, blocksize: usize) -> Result<(Tensor, BlockwiseState)> {
        quant::quantize_blockwise(x, blocksize)
    }

    fn dequantize_blockwise(&self, q: &Tensor, state: &BlockwiseState) -> Result<Tensor> {
        quant::dequantize_blockwise(q, state)
    }
}

impl Memory for Gpu {
    fn reader(&self) -> Result<Option<Box<dyn DeviceReader>>> {
        Ok(Some(Box::new(load::Reader::new(self.forever()?)?)))
    }

    fn row_padding(&self) -> usize {
        ROWS
    }

    fn num_bytes(&self, tensor: &Tensor) -> usize {
        let elements = alloc(tensor).map_or(tensor.elem_count(), |(_, elements)| elements);
        elements * tensor.dtype().size_in_bytes()
    }

    fn available_bytes(&self) -> Result<Option<usize>> {
        self.available().map(Some)
    }

    fn kept_bytes(&self, largest_dequantized: usize, gradients: usize) -> Vec<(&'static str, usize)> {
        vec![
            ("room for dequantized weights", PLACES * largest_dequantized),
            ("copy of the gradients", gradients),
            ("workspace of the matrix products", WORKSPACE),
        ]
    }
}
