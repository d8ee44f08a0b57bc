//! `TargetModules`: layers by name, by regular expression, or all of them.

use std::fmt;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    py_repr::{commas, py_str},
};

/// The layers to adapt, as PEFT's `target_modules`.
///
/// ```
/// use qlora_nb::peft::TargetModules;
/// let by_name: TargetModules = ["query_key_value"].into();
/// let all: TargetModules = "all-linear".into();
/// let by_regex: TargetModules = r".*\.h\.[0-3]\..*dense".into();
/// assert_eq!((all, by_name.to_string()), (TargetModules::AllLinear, "{'query_key_value'}".into()));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "InFile", into = "InFile")]
pub enum TargetModules {
    /// PEFT's choice for the architecture: `query_key_value` of BLOOM, `q_proj` and `v_proj` of Llama.
    #[default]
    ModelDefault,
    /// Every linear layer but the output head.
    AllLinear,
    /// The layers whose name is one of these, or ends in a dot and one of these.
    Names(Vec<String>),
    /// The layers whose whole name this regular expression matches.
    Regex(String),
}

/// What `adapter_config.json` has in its place.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum InFile {
    Null,
    Text(String),
    Names(Vec<String>),
}

impl From<InFile> for TargetModules {
    fn from(modules: InFile) -> Self {
        match modules {
            InFile::Null => Self::ModelDefault,
            InFile::Text(text) => text.into(),
            InFile::Names(names) => Self::Names(names),
        }
    }
}

impl From<TargetModules> for InFile {
    fn from(modules: TargetModules) -> Self {
        match modules {
            TargetModules::ModelDefault => Self::Null,
            TargetModules::AllLinear => Self::Text("all-linear".into()),
            TargetModules::Regex(pattern) => Self::Text(pattern),
            TargetModules::Names(names) => Self::Names(names),
        }
    }
}

impl From<&str> for TargetModules {
    /// `"all-linear"`, or a regular expression.
    fn from(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") { Self::AllLinear } else { Self::Regex(text.into()) }
    }
}

impl From<String> for TargetModules {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(names: [S; N]) -> Self {
        Vec::from(names).into()
    }
}

impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(names: Vec<S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

/// Names as the set that PEFT makes of them, in the order given.
impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ModelDefault => f.write_str("None"),
            Self::AllLinear => f.write_str("'all-linear'"),
            Self::Regex(pattern) => f.write_str(&py_str(pattern)),
            Self::Names(names) if names.is_empty() => f.write_str("set()"),
            Self::Names(names) => write!(f, "{{{}}}", commas(names.iter().map(|name| py_str(name)))),
        }
    }
}

/// Whether a layer is meant, by its dotted path.
pub(super) type Matcher<'a> = Box<dyn Fn(&str) -> bool + 'a>;

impl TargetModules {
    /// `field` is for messages.
    pub(super) fn matcher(&self, field: &str) -> Result<Matcher<'_>> {
        Ok(match self {
            Self::AllLinear => Box::new(|name| !is_output_head(name)),
            Self::Names(names) => Box::new(|name| names.iter().any(|target| is_suffix(target, name))),
            Self::Regex(pattern) => {
                let whole = compile(&format!("^(?:{pattern})$"), field)?;
                Box::new(move |name| whole.is_match(name))
            }
            Self::ModelDefault => {
                let expected = "names, a regular expression or \"all-linear\"";
                let remedy = "name the layers, e.g. [\"query_key_value\"].into()";
                return Err(Error::argument(field, "none", expected, remedy));
            }
        })
    }
}

pub(super) fn compile(pattern: &str, field: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| {
        let expected = format!("a regular expression ({})", e.to_string().replace('\n', " "));
        Error::argument(field, pattern, &expected, "correct it; look-around and back-references are not supported")
    })
}

/// Whether a path ends in `target`, from a dot or the start on.
pub(super) fn is_suffix(target: &str, name: &str) -> bool {
    name.strip_suffix(target).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// The names under which architectures keep the layer that makes the logits.
pub(super) fn is_output_head(name: &str) -> bool {
    ["lm_head", "embed_out"].iter().any(|head| is_suffix(head, name))
}
