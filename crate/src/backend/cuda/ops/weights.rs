//! Quantized weights as matrix products want them.
//!
//! A product takes its weight in 16 or 32 bits, so a quantized weight is dequantized just before it, to one of a few
//! places which all weights take in turn. In a recorded pass that happens beside the kernels between the products,
//! which leave some of the card idle: as soon as a product is done, a later weight may come to its place. In what
//! order weights are used, the pass that was only launched has written down.

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Tensor};

use super::super::{
    CudaEvent, CudaStream, Gpu, Operand, PLACES, address,
    quant::{dequantize_into, dequantize_transposed_into, transposes},
};
use crate::{
    backend::{internal, operands::Weight, run::Run},
    error::Result,
    quantized::QuantizedTensor,
};

/// The quantized weights of a pass in the order of their use.
#[derive(Clone, Default)]
pub struct Order(Arc<Mutex<Vec<Use>>>);

impl Order {
    fn uses(&self) -> MutexGuard<'_, Vec<Use>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A weight as a product wants it.
#[derive(Clone)]
struct Use {
    weight: QuantizedTensor,
    dtype: DType,
    transposed: bool,
}

impl Use {
    fn bytes(&self) -> usize {
        self.weight.shape().iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    /// To one of the places; gives its address.
    fn dequantize(&self, gpu: &Gpu, stream: &CudaStream, place: usize) -> Result<u64> {
        let at = gpu.scratch(place, self.bytes())?;
        match self.transposed {
            true => dequantize_transposed_into(gpu, stream, &self.weight, at, self.dtype)?,
            false => dequantize_into(gpu, stream, &self.weight, at, self.dtype)?,
        }
        Ok(at)
    }

    fn dequantize_beside(&self, gpu: &Gpu, after: &CudaEvent, place: usize) -> Result<CudaEvent> {
        gpu.beside(after, |stream| self.dequantize(gpu, stream, place).map(drop))
    }

    fn is(&self, other: &Self) -> Result<bool> {
        let same = address(self.weight.packed())? == address(other.weight.packed())?;
        Ok(same && self.transposed == other.transposed && self.dtype == other.dtype)
    }
}

/// The weights of one pass that is made again and again.
pub struct Weights {
    gpu: &'static Gpu,
    order: Order,
    /// In a pass that is recorded. One that is launched writes its order down.
    ahead: Option<Mutex<Ahead>>,
}

#[derive(Default)]
struct Ahead {
    /// Uses whose product was launched.
    done: usize,
    /// The ends of the dequantizations that were launched.
    ready: Vec<CudaEvent>,
}

impl Weights {
    /// For a pass that begins now.
    pub fn new(gpu: &'static Gpu, order: &Order) -> Result<Self> {
        let order = order.clone();
        if !gpu.is_recording() {
            order.uses().clear();
            return Ok(Self { gpu, order, ahead: None });
        }
        let (begin, mut ahead) = (gpu.mark()?, Ahead::default());
        for (i, wanted) in order.uses().iter().enumerate().take(PLACES) {
            ahead.ready.push(wanted.dequantize_beside(gpu, &begin, i)?);
        }
        Ok(Self { gpu, order, ahead: Some(Mutex::new(ahead)) })
    }

    /// Runs `product` with the address of a dequantized weight.
    fn with(&self, wanted: Use, product: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let (gpu, mut uses) = (self.gpu, self.order.uses());
        let Some(ahead) = &self.ahead else {
            let place = uses.len();
            product(wanted.dequantize(gpu, gpu.working_stream(), place)?)?;
            uses.push(wanted);
            return Ok(());
        };
        let mut ahead = ahead.lock().unwrap_or_else(|e| e.into_inner());
        let now = ahead.done;
        let (Some(noted), Some(ready)) = (uses.get(now), ahead.ready.get(now)) else {
            return Err(internal("a recorded pass uses more weights than the launched one"));
        };
        if !noted.is(&wanted)? {
            return Err(internal("a recorded pass uses another weight than the launched one"));
        }
        gpu.wait_for(ready)?;
        product(gpu.scratch(now, wanted.bytes())?)?;
        ahead.done += 1;
        if let Some(next) = uses.get(now + PLACES) {
            ahead.ready.push(next.dequantize_beside(gpu, &gpu.mark()?, now)?);
        }
        Ok(())
    }

    /// Ends the pass: all that was launched beside it belongs to it.
    pub fn end(&self) -> Result<()> {
        let Some(ahead) = &self.ahead else { return Ok(()) };
        let ahead = ahead.lock().unwrap_or_else(|e| e.into_inner());
        ahead.ready.last().map_or(Ok(()), |last| self.gpu.wait_for(last))
    }
}

/// Runs `product` with a weight `[n, k]` in `dtype`: as it is or, where `transpose` allows it and it costs nothing,
/// transposed to `[k, n]`, as the product is told. Of products with the same result those with both sides contiguous
/// along the sum are the fastest.
pub fn with_weight(
    gpu: &Gpu,
    weight: &Weight,
    dtype: DType,
    transpose: bool,
    run: &Run,
    product: impl FnOnce(Operand, bool) -> Result<()>,
) -> Result<()> {
    let (n, k) = weight.dims2()?;
    let dense = |t: &Tensor| -> Result<Operand> { Ok(Operand { address: address(t)?, row: k }) };
    match weight {
        Weight::Dense(t) if t.dtype() == dtype => product(dense(t)?, false),
        Weight::Dense(t) => product(dense(&t.to_dtype(dtype)?)?, false),
        Weight::Quantized(q) => {
            let transposed = transpose && transposes(q, dtype);
            let wanted = Use { weight: q.clone(), dtype, transposed };
            let row = if transposed { n } else { k };
            let product = |address| product(Operand { address, row }, transposed);
            match run.card.and_then(|card| card.weights) {
                Some(weights) => weights.with(wanted, product),
                None => product(wanted.dequantize(gpu, gpu.working_stream(), 0)?),
            }
        }
    }
}
