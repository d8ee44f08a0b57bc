//! A block as the list of its named parts. What PyTorch prints, the names of parameters, loading, replacing linear layers
//! by adapted ones: all of it is a walk over that list.

use std::sync::Arc;

use candle_core::DType;

use super::{options::BitsAndBytesConfig, parameter::Parameter, weights::Weights};
use crate::{
    backend::{internal, operands::Norm},
    display::module_tree::ModuleNode,
    error::Result,
    layers::Linear,
};

/// A part, before it is loaded: its name in the module that it belongs to, and what it is.
#[derive(Clone, Debug)]
pub enum Part {
    /// Its shape `[out, in]`, and whether it has a bias.
    Linear(&'static str, (usize, usize), bool),
    /// Its width.
    Norm(&'static str, usize, NormKind),
    /// Its class and what it is made of.
    Module(&'static str, String, Vec<Part>),
    /// A module without parameters, as PyTorch prints it: `BloomGelu()`.
    Plain(&'static str, String),
}

/// Which norm, and how PyTorch prints it.
#[derive(Clone, Debug)]
pub enum NormKind {
    /// Layer normalization, with a bias.
    Layer { eps: f64 },
    /// RMS normalization, `class` its class: `LlamaRMSNorm`.
    Rms { eps: f64, class: String },
}

impl NormKind {
    /// Reads the norm `name` (a path in the checkpoint).
    pub fn load(&self, name: &str, width: usize, weights: &mut Weights, dtype: DType) -> Result<Norm> {
        let weight = weights.tensor(&format!("{name}.weight"), &[width], dtype)?;
        match *self {
            Self::Layer { eps } => {
                let bias = weights.tensor(&format!("{name}.bias"), &[width], dtype)?;
                Norm::new(weight, Some(bias), eps)
            }
            Self::Rms { eps, .. } => Norm::new(weight, None, eps),
        }
    }

    pub fn module_tree(&self, name: &str, width: usize) -> ModuleNode {
        match self {
            Self::Layer { eps } => ModuleNode::layer_norm(name, width, *eps),
            Self::Rms { eps, class } => ModuleNode::rms_norm(name, class, width, *eps),
        }
    }
}

/// A block's parts, loaded. Cloning shares them.
#[derive(Clone)]
pub struct Parts {
    /// `BloomBlock`, and what it is made of.
    description: Arc<(String, Vec<Part>)>,
    /// The block's path in the model: `transformer.h.0`.
    path: String,
    /// In the order of the description.
    linears: Vec<(&'static str, Linear)>,
    norms: Vec<(&'static str, Norm)>,
}

impl Parts {
    /// Reads the parts of the block at `path`.
    pub fn load(
        description: &Arc<(String, Vec<Part>)>,
        path: String,
        weights: &mut Weights,
        dtype: DType,
        quantization: Option<&BitsAndBytesConfig>,
    ) -> Result<Self> {
        let mut parts =
            Self { description: description.clone(), path: path.clone(), linears: Vec::new(), norms: Vec::new() };
        for (prefix, part) in leaves(&description.1) {
            let full = |name: &str| format!("{path}.{prefix}{name}");
            match part {
                Part::Linear(name, shape, bias) => {
                    let path = full(name);
                    let weight = weights.linear(&path, *shape, dtype, quantization)?;
                    let bias_name = format!("{path}.bias");
                    let bias = bias.then(|| weights.tensor(&bias_name, &[shape.0], dtype)).transpose()?;
                    let mut linear = Linear::new(path, weight, bias);
                    linear.frozen.compute_dtype = quantization.map(|q| q.bnb_4bit_compute_dtype);
                    parts.linears.push((name, linear));
                }
                Part::Norm(name, width, kind) => {
                    parts.norms.push((name, kind.load(&full(name), *width, weights, dtype)?));
                }
                Part::Module(..) | Part::Plain(..) => {}
            }
        }
        Ok(parts)
    }

    /// The linear layer of that name.
    pub fn linear(&self, name: &str) -> Result<&Linear> {
        let found = self.linears.iter().find(|(n, _)| *n == name);
        found.map(|(_, linear)| linear).ok_or_else(|| internal(format!("{} has no linear layer {name}", self.path)))
    }

    /// The norm of that name.
    pub fn norm(&self, name: &str) -> Result<&Norm> {
        self.optional_norm(name).ok_or_else(|| internal(format!("{} has no norm {name}", self.path)))
    }

    /// The norm of that name, in an architecture that has it.
    pub fn optional_norm(&self, name: &str) -> Option<&Norm> {
        self.norms.iter().find(|(n, _)| *n == name).map(|(_, norm)| norm)
    }

    /// The linear layers, in the order of the modules.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.linears.iter().map(|(_, linear)| linear)
    }

    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        self.norms.iter().map(|(_, norm)| norm)
    }

    /// The same block with other linear layers.
    pub fn map_linears(&self, change: &mut dyn FnMut(&Linear) -> Result<Linear>) -> Result<Self> {
        let linears = self.linears.iter().map(|(name, linear)| Ok((*name, change(linear)?))).collect::<Result<_>>()?;
        Ok(Self { linears, ..self.clone() })
    }

    /// Every parameter with its name in the model, in the order of the modules; `prefix` is PEFT's.
    pub fn named_parameters(&self, prefix: &str) -> Vec<(String, Parameter)> {
        let (mut linears, mut norms) = (self.linears(), self.norms());
        let mut all = Vec::new();
        for (module, part) in leaves(&self.description.1) {
            match part {
                Part::Linear(..) => {
                    all.extend(linears.next().into_iter().flat_map(|l| Parameter::of_linear(prefix, l)))
                }
                Part::Norm(name, ..) => {
                    let path = format!("{prefix}{}.{module}{name}", self.path);
                    all.extend(norms.next().into_iter().flat_map(|norm| Parameter::of_norm(&path, norm)));
                }
                Part::Module(..) | Part::Plain(..) => {}
            }
        }
        all
    }

    /// The modules as PyTorch prints them.
    pub fn module_tree(&self) -> ModuleNode {
        let mut linears = self.linears.iter().map(|(_, linear)| linear);
        let (class, parts) = &*self.description;
        ModuleNode::new("", class, parts.iter().map(|part| part_tree(part, &mut linears)).collect())
    }
}

fn part_tree(part: &Part, linears: &mut dyn Iterator<Item = &Linear>) -> ModuleNode {
    match part {
        Part::Linear(name, shape, bias) => match linears.next() {
            Some(linear) => linear.module_tree(name),
            None => ModuleNode::linear(*name, "Linear", shape.1, shape.0, *bias),
        },
        Part::Norm(name, width, kind) => kind.module_tree(name, *width),
        Part::Module(name, class, parts) => {
            ModuleNode::new(*name, class, parts.iter().map(|part| part_tree(part, linears)).collect())
        }
        Part::Plain(name, label) => ModuleNode::leaf(*name, label),
    }
}

/// Every part that is no module, with the path of the one that it is in: `self_attn.`.
fn leaves(parts: &[Part]) -> Vec<(String, &Part)> {
    let mut all = Vec::new();
    for part in parts {
        match part {
            Part::Module(name, _, parts) => {
                all.extend(leaves(parts).into_iter().map(|(path, part)| (format!("{name}.{path}"), part)));
            }
            leaf => all.push((String::new(), leaf)),
        }
    }
    all
}
