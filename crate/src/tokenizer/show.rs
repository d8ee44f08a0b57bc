//! How tokenizers and tokens look.

use std::fmt;

use super::Tokenizer;
use crate::{
    display::{emit, format::escape_html},
    features::{Features, IGNORE_INDEX},
    py_repr::{py_bool, py_str},
};

/// As `repr(tokenizer)` prints it in Python.
impl fmt::Display for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let max_length = match self.model_max_length() {
            Some(n) => n.to_string(),
            // transformers' VERY_LARGE_INTEGER, int(1e30)
            None => "1000000000000000019884624838656".into(),
        };
        let special: Vec<String> =
            self.config.special.iter().map(|(name, token)| format!("'{name}': {}", py_str(token))).collect();
        write!(
            f,
            "{}(name_or_path={}, vocab_size={}, model_max_length={max_length}, is_fast=True, padding_side='{}', \
             truncation_side='right', special_tokens={{{}}}, clean_up_tokenization_spaces={})",
            self.config.class,
            py_str(self.name_or_path()),
            self.vocab_size(),
            self.padding_side(),
            special.join(", "),
            py_bool(self.clean_up_tokenization_spaces()),
        )
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Tokenizer {
    /// Shows the tokenizer in a notebook.
    pub fn evcxr_display(&self) {
        emit(&[("text/plain", &self.to_string())]);
    }
}

impl Features {
    /// The tokens as text, with those that the loss counts marked.
    pub fn show(&self, tokenizer: &Tokenizer) -> LabelledTokens {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut ids: Vec<u32> = Vec::new();
        for (i, &id) in self.input_ids.iter().enumerate() {
            let kind = match (self.attention_mask.get(i), self.labels.get(i)) {
                (Some(0), _) => Kind::Padding,
                (_, Some(&label)) if label != IGNORE_INDEX => Kind::Learned,
                _ => Kind::Prompt,
            };
            let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap_or_default();
            // A character that several tokens share is one piece.
            match pieces.last_mut() {
                Some(last) if last.kind == kind && last.text.ends_with('\u{fffd}') => {
                    ids.push(id);
                    last.text = text(&ids);
                }
                _ => {
                    ids = vec![id];
                    pieces.push(Piece { kind, text: text(&ids), ids: Vec::new() });
                }
            }
            if let Some(last) = pieces.last_mut() {
                last.ids = ids.clone();
            }
        }
        LabelledTokens { pieces, tokens: self.len() }
    }
}

/// Tokens and what each is for; made by [`Features::show`].
#[derive(Clone, Debug)]
pub struct LabelledTokens {
    pieces: Vec<Piece>,
    tokens: usize,
}

#[derive(Clone, Debug)]
struct Piece {
    kind: Kind,
    text: String,
    ids: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Prompt,
    Learned,
    Padding,
}

impl LabelledTokens {
    fn learned(&self) -> usize {
        self.pieces.iter().filter(|p| p.kind == Kind::Learned).map(|p| p.ids.len()).sum()
    }

    /// Shows the coloured tokens in a notebook.
    pub fn evcxr_display(&self) {
        emit(&[("text/html", &self.to_html()), ("text/plain", &self.to_string())]);
    }

    /// The tokens as coloured HTML, readable on a light and on a dark page; ids in the tooltips.
    pub fn to_html(&self) -> String {
        let mut html = String::from("<div style=\"line-height:2;white-space:pre-wrap;overflow-wrap:anywhere\">");
        for piece in &self.pieces {
            let style = match piece.kind {
                Kind::Prompt => "background:rgba(128,128,128,.18)",
                Kind::Learned => "background:rgba(46,160,67,.35)",
                Kind::Padding => "opacity:.4",
            };
            let text = escape_html(&piece.text.replace('\n', "⏎\n"));
            html += &format!("<span title=\"{:?}\" style=\"{style};{TOKEN}\">{text}</span>", piece.ids);
        }
        html + &format!(
            "</div><small style=\"opacity:.6\">{} tokens, {} of them learned (green)</small>",
            self.tokens,
            self.learned()
        )
    }
}

const TOKEN: &str = "border-radius:.25em;padding:.1em .15em;margin-right:1px";

/// Tokens divided by `|`; those that the loss counts stand in brackets.
impl fmt::Display for LabelledTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, piece) in self.pieces.iter().enumerate() {
            let text = piece.text.replace('\n', "\\n");
            match piece.kind {
                Kind::Learned => write!(f, "[{text}]")?,
                _ => write!(f, "{}{text}", if i == 0 { "" } else { "|" })?,
            }
        }
        write!(f, "\n{} tokens, {} of them learned [in brackets]", self.tokens, self.learned())
    }
}
