//! The tree of a model's modules, printed as PyTorch and PEFT print theirs.
//!
//! The text form is compared line by line with the reference's own print in the tests;
//! a notebook gets the same tree with foldable branches.

use std::fmt;

use super::{
    format::{escape_html, thousands},
    theme::{FAINT, LEARNED},
};
use crate::py_repr::{py_bool, py_float};

/// A module: its name in its parent, what it is, and what it is made of.
///
/// ```
/// use qlora_nb::display::module_tree::ModuleNode;
/// let mlp = ModuleNode::new("mlp", "BloomMLP", vec![
///     ModuleNode::linear("dense_h_to_4h", "Linear", 64, 256, true),
///     ModuleNode::leaf("gelu_impl", "BloomGelu()"),
/// ]);
/// assert_eq!(mlp.to_string(), "BloomMLP(
///   (dense_h_to_4h): Linear(in_features=64, out_features=256, bias=True)
///   (gelu_impl): BloomGelu()
/// )");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleNode {
    /// The name by which the parent knows it; the root has none.
    pub name: String,
    /// The class of a module with children (`BloomBlock`), the whole line of one without
    /// (`Embedding(512, 64)`, `BloomGelu()`).
    pub label: String,
    /// Its modules, in their order.
    pub children: Vec<ModuleNode>,
}

impl ModuleNode {
    /// A module made of others. Without children it prints `Label()`.
    pub fn new(name: impl Into<String>, class: impl Into<String>, children: Vec<ModuleNode>) -> Self {
        let mut label: String = class.into();
        if children.is_empty() {
            label.push_str("()");
        }
        Self { name: name.into(), label, children }
    }

    /// A module without children; `label` is the whole line.
    pub fn leaf(name: impl Into<String>, label: impl Into<String>) -> Self {
        Self { name: name.into(), label: label.into(), children: Vec::new() }
    }

    /// `Linear(...)`, `Linear4bit(...)`: a class of linear layers from `in_features` to `out_features`.
    pub fn linear(name: impl Into<String>, class: &str, in_features: usize, out_features: usize, bias: bool) -> Self {
        let bias = py_bool(bias);
        Self::leaf(name, format!("{class}(in_features={in_features}, out_features={out_features}, bias={bias})"))
    }

    /// `Embedding(num_embeddings, embedding_dim)`, with the id that stands for padding if there is one.
    pub fn embedding(name: &str, num_embeddings: usize, embedding_dim: usize, padding: Option<usize>) -> Self {
        let padding = padding.map(|id| format!(", padding_idx={id}")).unwrap_or_default();
        Self::leaf(name, format!("Embedding({num_embeddings}, {embedding_dim}{padding})"))
    }

    /// `LlamaRMSNorm((width,), eps=...)`.
    pub fn rms_norm(name: impl Into<String>, class: &str, width: usize, eps: f64) -> Self {
        Self::leaf(name, format!("{class}(({width},), eps={})", py_float(eps)))
    }

    /// `LayerNorm((width,), eps=..., ...)` with a weight and a bias.
    pub fn layer_norm(name: impl Into<String>, width: usize, eps: f64) -> Self {
        let eps = py_float(eps);
        Self::leaf(name, format!("LayerNorm(({width},), eps={eps}, elementwise_affine=True, bias=True)"))
    }

    /// `Dropout(p=..., inplace=False)`.
    pub fn dropout(name: impl Into<String>, p: f64) -> Self {
        Self::leaf(name, format!("Dropout(p={}, inplace=False)", py_float(p)))
    }

    /// A `ModuleList` of modules numbered from 0; neighbours that are alike print as one.
    pub fn list(name: impl Into<String>, modules: Vec<ModuleNode>) -> Self {
        let numbered = modules.into_iter().enumerate().map(|(i, m)| m.named(i.to_string())).collect();
        Self::new(name, "ModuleList", numbered)
    }

    /// A linear layer wrapped in LoRA by an adapter of a name: `base` as printed without the adapter becomes its `base_layer`.
    pub fn lora_linear(
        base: ModuleNode,
        adapter: &str,
        in_features: usize,
        out_features: usize,
        r: usize,
        dropout: f64,
    ) -> Self {
        let default = |name: &str, module: ModuleNode| Self::new(name, "ModuleDict", vec![module.named(adapter)]);
        let dropout = match dropout {
            0.0 => Self::leaf("", "Identity()"),
            p => Self::dropout("", p),
        };
        let class = base.label.split('(').next().unwrap_or_default();
        let (name, class) = (base.name.clone(), format!("lora.{class}"));
        let modules = vec![
            base.named("base_layer"),
            default("lora_dropout", dropout),
            default("lora_A", Self::linear("", "Linear", in_features, r, false)),
            default("lora_B", Self::linear("", "Linear", r, out_features, false)),
            Self::leaf("lora_embedding_A", "ParameterDict()"),
            Self::leaf("lora_embedding_B", "ParameterDict()"),
            Self::leaf("lora_magnitude_vector", "ModuleDict()"),
        ];
        Self::new(name, class, modules)
    }

    /// A module with a copy that learns in its place, under the name of an adapter.
    pub fn saved_module(original: ModuleNode, adapter: &str) -> Self {
        let name = original.name.clone();
        let copy = Self::new("modules_to_save", "ModuleDict", vec![original.clone().named(adapter)]);
        Self::new(name, "ModulesToSaveWrapper", vec![original.named("original_module"), copy])
    }

    /// The wrapping that `get_peft_model` gives a causal model: `PeftModelForCausalLM(LoraModel(model))`.
    pub fn peft_model(model: ModuleNode) -> Self {
        let lora = Self::new("base_model", "LoraModel", vec![model.named("model")]);
        Self::new("", "PeftModelForCausalLM", vec![lora])
    }

    /// This wrapping of a linear layer with the adapters of another beside its own.
    pub fn merged(mut self, other: Self) -> Self {
        for (own, more) in self.children.iter_mut().zip(other.children) {
            if more.label.starts_with("ModuleDict") && !more.children.is_empty() {
                own.label = more.label;
                own.children.extend(more.children);
            }
        }
        self
    }

    /// The same module under another name.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The tree as HTML whose branches fold; the first `open` levels are unfolded. What LoRA
    /// learns is marked.
    pub fn to_html(&self, open: usize) -> String {
        let mut html = format!("<div style=\"font-family:{MONOSPACE};line-height:1.6\">");
        self.write_html(&mut html, "", open);
        if self.has_lora() {
            html.push_str(&format!("<small><span style=\"{LEARNED};padding:0 .3em\">learned by LoRA</span></small>"));
        }
        html.push_str("</div>");
        html
    }

    fn has_lora(&self) -> bool {
        self.is_lora() || self.children.iter().any(Self::has_lora)
    }

    /// Whether it holds the numbers of an adapter.
    fn is_lora(&self) -> bool {
        let learns = ["lora_A", "lora_B", "modules_to_save"].contains(&self.name.as_str());
        learns && self.label.starts_with("ModuleDict")
    }

    /// A highlighted adapter, a faint placeholder, or nothing special.
    fn html_style(&self) -> &'static str {
        match () {
            () if self.is_lora() => LEARNED,
            () if self.children.is_empty() && self.label.ends_with("Dict()") => FAINT,
            () => "",
        }
    }

    fn write_html(&self, html: &mut String, title: &str, open: usize) {
        let (label, style) = (escape_html(&self.label), self.html_style());
        if self.children.is_empty() {
            // As far to the right as a branch's own title, which has a triangle before it.
            html.push_str(&format!("<div style=\"margin-left:1.1em;{style}\">{title}{label}</div>"));
            return;
        }
        let state = if open > 0 { " open" } else { "" };
        let line = match style {
            "" => format!("{title}<b>{label}</b>"),
            style => format!("<span style=\"{style}\">{title}<b>{label}</b></span>"),
        };
        html.push_str(&format!("<details{state}><summary style=\"cursor:pointer\">{line}</summary>"));
        html.push_str("<div style=\"margin-left:1.5em\">");
        for (child, title) in self.groups() {
            child.write_html(html, &escape_html(&title), open.saturating_sub(1));
        }
        html.push_str("</div></details>");
    }

    fn write_text(&self, f: &mut fmt::Formatter<'_>, indent: usize) -> fmt::Result {
        f.write_str(&self.label)?;
        if self.children.is_empty() {
            return Ok(());
        }
        f.write_str("(\n")?;
        for (child, title) in self.groups() {
            write!(f, "{:indent$}{title}", "", indent = indent + 2)?;
            child.write_text(f, indent + 2)?;
            f.write_str("\n")?;
        }
        write!(f, "{:indent$})", "")
    }

    /// The children with what is printed before each: `(mlp): `. Of a list, neighbours that
    /// differ only in their number are one entry, `(0-23): 24 x `.
    fn groups(&self) -> Vec<(&ModuleNode, String)> {
        let alike = |a: &Self, b: &Self| self.label == "ModuleList" && a.label == b.label && a.children == b.children;
        let title = |group: &[Self]| match group {
            [first, .., last] => format!("({}-{}): {} x ", first.name, last.name, group.len()),
            _ => format!("({}): ", group[0].name),
        };
        self.children.chunk_by(alike).map(|group| (&group[0], title(group))).collect()
    }
}

impl fmt::Display for ModuleNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_text(f, 0)
    }
}

/// `trainable params: 36,864 || all params: 3,886,464 || trainable%: 0.9485`
pub fn trainable_parameters_text(trainable: usize, all: usize) -> String {
    let percent = if all == 0 { 0.0 } else { 100.0 * trainable as f64 / all as f64 };
    let (trainable, all) = (thousands(trainable), thousands(all));
    format!("trainable params: {trainable} || all params: {all} || trainable%: {percent:.4}")
}

const MONOSPACE: &str = "var(--jp-code-font-family,monospace)";

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> ModuleNode {
        let attention = vec![
            ModuleNode::linear("query_key_value", "Linear4bit", 64, 192, true),
            ModuleNode::linear("dense", "Linear4bit", 64, 64, true),
            ModuleNode::dropout("attention_dropout", 0.0),
        ];
        let children = vec![
            ModuleNode::layer_norm("input_layernorm", 64, 1e-5),
            ModuleNode::new("self_attention", "BloomAttention", attention),
        ];
        ModuleNode::new("", "BloomBlock", children)
    }

    // The lines are those that PEFT 0.21 and PyTorch 2.15 print for the same modules.
    #[test]
    fn a_lora_linear_prints_as_in_peft() {
        let base = ModuleNode::linear("query_key_value", "Linear4bit", 64, 192, true);
        let expected = "\
lora.Linear4bit(
  (base_layer): Linear4bit(in_features=64, out_features=192, bias=True)
  (lora_dropout): ModuleDict(
    (default): Identity()
  )
  (lora_A): ModuleDict(
    (default): Linear(in_features=64, out_features=8, bias=False)
  )
  (lora_B): ModuleDict(
    (default): Linear(in_features=8, out_features=192, bias=False)
  )
  (lora_embedding_A): ParameterDict()
  (lora_embedding_B): ParameterDict()
  (lora_magnitude_vector): ModuleDict()
)";
        assert_eq!(ModuleNode::lora_linear(base.clone(), "default", 64, 192, 8, 0.0).to_string(), expected);
        let dropout = ModuleNode::lora_linear(base, "default", 64, 192, 8, 0.1).to_string();
        assert!(dropout.contains("(default): Dropout(p=0.1, inplace=False)"), "{dropout}");
    }

    #[test]
    fn equal_neighbours_of_a_list_print_once() {
        let mut other = block();
        other.children.pop();
        let list = ModuleNode::list("h", vec![block(), block(), other, block()]);
        let expected = "\
ModuleList(
  (0-1): 2 x BloomBlock(
    (input_layernorm): LayerNorm((64,), eps=1e-05, elementwise_affine=True, bias=True)
    (self_attention): BloomAttention(
      (query_key_value): Linear4bit(in_features=64, out_features=192, bias=True)
      (dense): Linear4bit(in_features=64, out_features=64, bias=True)
      (attention_dropout): Dropout(p=0.0, inplace=False)
    )
  )
  (2): BloomBlock(
    (input_layernorm): LayerNorm((64,), eps=1e-05, elementwise_affine=True, bias=True)
  )
  (3): BloomBlock(
    (input_layernorm): LayerNorm((64,), eps=1e-05, elementwise_affine=True, bias=True)
    (self_attention): BloomAttention(
      (query_key_value): Linear4bit(in_features=64, out_features=192, bias=True)
      (dense): Linear4bit(in_features=64, out_features=64, bias=True)
      (attention_dropout): Dropout(p=0.0, inplace=False)
    )
  )
)";
        assert_eq!(list.to_string(), expected);
    }

    #[test]
    fn the_html_form_has_the_same_modules_and_folds() {
        let html = ModuleNode::peft_model(ModuleNode::list("", vec![block(), block()])).to_html(2);
        assert_eq!(html.matches("<details open>").count(), 2);
        assert_eq!(html.matches("<details").count(), html.matches("</details>").count());
        assert!(html.contains("(0-1): 2 x <b>BloomBlock</b>"), "{html}");
        assert!(!html.contains(LEARNED), "nothing learns here");
        assert!(ModuleNode::leaf("", "a<b>").to_html(0).contains("a&lt;b&gt;"));
    }

    #[test]
    fn the_html_form_marks_what_lora_learns() {
        let base = ModuleNode::linear("query_key_value", "Linear4bit", 64, 192, true);
        let html = ModuleNode::lora_linear(base, "default", 64, 192, 8, 0.0).to_html(5);
        // A, B and the legend; not the base, the dropout or the empty dictionaries.
        assert_eq!(html.matches(LEARNED).count(), 3, "{html}");
        assert!(html.contains(&format!("{LEARNED}\">(lora_A): <b>ModuleDict</b>")), "{html}");
        assert!(html.contains(&format!("{FAINT}\">(lora_embedding_A): ParameterDict()")), "{html}");
        assert_eq!(html.matches("<div").count(), html.matches("</div>").count());
    }

    #[test]
    fn trainable_parameters_read_as_in_peft() {
        let text = trainable_parameters_text(36_864, 3_886_464);
        assert_eq!(text, "trainable params: 36,864 || all params: 3,886,464 || trainable%: 0.9485");
    }
}
