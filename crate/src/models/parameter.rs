//! A model's parameters as they are listed.

use std::fmt;

use candle_core::{DType, Tensor};

use crate::{
    backend::{
        operands::{Norm, Weight},
        param::Param,
    },
    layers::{Embedding, Linear},
    names::debug_as_display,
};

/// The dtype of a parameter; prints as PyTorch does: `torch.float16`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ParameterDType(pub DType);

impl fmt::Display for ParameterDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            DType::F32 => "torch.float32",
            DType::F16 => "torch.float16",
            DType::BF16 => "torch.bfloat16",
            DType::U8 => "torch.uint8",
            other => return f.write_str(other.as_str()),
        })
    }
}

debug_as_display!(ParameterDType);

impl PartialEq<DType> for ParameterDType {
    fn eq(&self, other: &DType) -> bool {
        self.0 == *other
    }
}

/// A parameter as it is stored: a quantized weight is its packed bytes.
#[derive(Clone, Debug)]
pub struct Parameter {
    tensor: Tensor,
    elements: usize,
    requires_grad: bool,
}

impl Parameter {
    pub fn new(tensor: &Tensor) -> Self {
        Self { tensor: tensor.clone(), elements: tensor.elem_count(), requires_grad: false }
    }

    fn of_weight(weight: &Weight) -> Self {
        match weight {
            Weight::Dense(t) => Self::new(t),
            Weight::Quantized(q) => {
                let elements = q.shape().iter().product();
                Self { tensor: q.packed().clone(), elements, requires_grad: false }
            }
        }
    }

    /// A norm's, `path` its own in the model.
    pub(super) fn of_norm(path: &str, norm: &Norm) -> Vec<(String, Self)> {
        norm.parameters().into_iter().map(|(part, tensor)| (format!("{path}.{part}"), Self::new(tensor))).collect()
    }

    /// A linear layer's, with their names in the model, its adapter's behind them. `prefix`: PEFT's, for a model with
    /// adapters.
    pub(super) fn of_linear(prefix: &str, linear: &Linear) -> Vec<(String, Self)> {
        let base = match linear.adapters().first() {
            None => "",
            Some((_, adapter)) if adapter.replaces_weight() => ".original_module",
            Some(_) => ".base_layer",
        };
        let module = format!("{prefix}{}", linear.name);
        let mut all = vec![(format!("{module}{base}.weight"), Self::of_weight(linear.weight()))];
        all.extend(linear.frozen.bias.as_ref().map(|bias| (format!("{module}{base}.bias"), Self::new(bias))));
        let learning = linear.trainable();
        let learns = |param: &Param| learning.iter().any(|(_, active)| active.is(param));
        let mut parts = Vec::new();
        for (order, (name, adapter)) in linear.adapters().iter().enumerate() {
            for (place, (part, param)) in adapter.parameters().into_iter().enumerate() {
                let parameter = Self { requires_grad: learns(param), ..Self::new(param.value()) };
                parts.push((place, order, (format!("{module}.{part}.{name}.weight"), parameter)));
            }
        }
        // Part by part, in each the adapters in their order.
        parts.sort_by_key(|(place, order, _)| (*place, *order));
        all.extend(parts.into_iter().map(|(_, _, named)| named));
        all
    }

    /// An embedding table's, its copies' behind it.
    pub(super) fn of_embedding(prefix: &str, embedding: &Embedding) -> Vec<(String, Self)> {
        let (module, copies) = (format!("{prefix}{}", embedding.name), embedding.copies.all());
        let base = if copies.is_empty() { "" } else { ".original_module" };
        let mut all = vec![(format!("{module}{base}.weight"), Self::new(&embedding.table))];
        for (name, copy) in copies {
            let requires_grad = embedding.copies.active().is_some_and(|active| active.is(copy));
            let parameter = Self { requires_grad, ..Self::new(copy.value()) };
            all.push((format!("{module}.modules_to_save.{name}.weight"), parameter));
        }
        all
    }

    /// Prints as PyTorch does: `torch.float16`, `torch.uint8` for a quantized weight.
    pub fn dtype(&self) -> ParameterDType {
        ParameterDType(self.tensor.dtype())
    }

    /// The stored tensor; `[ceil(n / 2), 1]` uint8 for a quantized weight.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The stored tensor's dimensions.
    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    /// Numbers that it stands for: a quantized weight counts its elements, not its bytes.
    pub fn numel(&self) -> usize {
        self.elements
    }

    /// Whether it learns.
    pub fn requires_grad(&self) -> bool {
        self.requires_grad
    }
}
