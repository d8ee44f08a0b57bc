//! Rotary position embedding beyond the lengths of the first training, as transformers' `modeling_rope_utils.py`.

use std::f64::consts::PI;

use serde_json::Value;

use super::config_size;
use crate::error::{Error, Result};

pub(super) const BAD_CONFIG: &str = "get the model's config.json again";

/// How the angles of positions beyond those of the first training are slowed down.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All by one factor.
    Linear { factor: f64 },
    /// Llama 3.1's: the slow angles by `factor`, the fast ones not, those between gradually.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
}

impl RopeScaling {
    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` (before).
    pub(crate) fn from_json(config: &Value, rope: &Value) -> Result<Self> {
        let unsupported = |what: &str, got: &Value, supported: &[&'static str]| {
            let got = got.as_str().map_or_else(|| got.to_string(), String::from);
            let remedy = "choose a model whose config.json has one of these";
            Error::unsupported(what, got, supported.iter().copied(), remedy)
        };
        for partial in [&rope["partial_rotary_factor"], &config["partial_rotary_factor"]] {
            if partial.as_f64().is_some_and(|f| f != 1.0) {
                return Err(unsupported("partial_rotary_factor", partial, &["1.0"]));
            }
        }
        let number = |name: &str| {
            rope[name].as_f64().filter(|v| *v > 0.0).ok_or_else(|| {
                let expected = "a positive number, which this rope_type needs";
                Error::argument(&format!("{name} of the RoPE parameters"), &rope[name], expected, BAD_CONFIG)
            })
        };
        let kind = if rope["rope_type"].is_null() { &rope["type"] } else { &rope["rope_type"] };
        Ok(match kind.as_str() {
            None if kind.is_null() => Self::Default,
            Some("default") => Self::Default,
            Some("linear") => Self::Linear { factor: number("factor")? },
            Some("llama3") => Self::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: match &rope["original_max_position_embeddings"] {
                    Value::Null => config_size(config, &["max_position_embeddings"])? as f64,
                    _ => number("original_max_position_embeddings")?,
                },
            },
            _ => return Err(unsupported("rope_type", kind, &["default", "linear", "llama3"])),
        })
    }

    /// What a frequency (radians a position) becomes.
    pub(crate) fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                // Turns that the angle makes over the first training's context.
                let turns = original_max_position_embeddings * frequency / (2.0 * PI);
                if turns > high_freq_factor {
                    frequency
                } else if turns < low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}
