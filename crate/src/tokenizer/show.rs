//! How tokenizers and tokens look.

use std::fmt;

use super::Tokenizer;
use crate::{
    display::{
        Forms, emit_value,
        format::escape_html,
        shown_by_forms,
        theme::{FAINT, LEARNED},
    },
    features::{Features, IGNORE_INDEX},
    names::debug_as_display,
    py_repr::{py_bool, py_dict, py_str},
};

/// As `repr(tokenizer)` prints it in Python.
impl fmt::Display for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let max_length = match self.model_max_length() {
            Some(n) => n.to_string(),
            // transformers' VERY_LARGE_INTEGER, int(1e30)
            None => "1000000000000000019884624838656".into(),
        };
        let special = py_dict(self.config.special.iter().map(|(name, token)| (name, py_str(token))));
        write!(
            f,
            "{}(name_or_path={}, vocab_size={}, model_max_length={max_length}, is_fast=True, padding_side='{}', \
             truncation_side='right', special_tokens={special}, clean_up_tokenization_spaces={})",
            self.config.class,
            py_str(self.name_or_path()),
            self.vocab_size(),
            self.padding_side(),
            py_bool(self.clean_up_tokenization_spaces()),
        )
    }
}

debug_as_display!(Tokenizer);

impl Tokenizer {
    /// What a notebook shows.
    pub fn forms(&self) -> Forms {
        vec![("text/plain", self.to_string())]
    }
}

shown_by_forms!(Tokenizer, LabelledTokens);

impl Features {
    /// Called by evcxr to show the value that ends a cell: the ids, with those that the loss
    /// counts marked. [`show`](Self::show) knows their text.
    pub fn evcxr_display(&self) {
        let piece = |i: usize, id: u32| Piece { kind: self.kind(i), text: id.to_string(), ids: vec![id] };
        let pieces = self.input_ids.iter().enumerate().map(|(i, &id)| piece(i, id)).collect();
        let ids = LabelledTokens { pieces, tokens: self.len() };
        emit_value(&[("text/html", ids.to_html()), ("text/plain", format!("{self:?}"))]);
    }

    /// The tokens as text, with those that the loss counts marked.
    ///
    /// ```no_run
    /// # use qlora_nb::{dataset::Dataset, tokenizer::Tokenizer};
    /// # fn f(tokenized_ds: Dataset, tokenizer: Tokenizer) -> qlora_nb::error::Result<()> {
    /// tokenized_ds.get(0)?.features()?.show(&tokenizer) // ends a cell: coloured tokens
    /// # ; Ok(())
    /// # }
    /// ```
    pub fn show(&self, tokenizer: &Tokenizer) -> LabelledTokens {
        let mut pieces: Vec<Piece> = Vec::new();
        for (i, &id) in self.input_ids.iter().enumerate() {
            let kind = self.kind(i);
            // A character that several tokens share is one piece.
            let shared = |last: &Piece| last.kind == kind && last.text.ends_with('\u{fffd}');
            let mut ids = pieces.pop_if(|last| shared(last)).map(|last| last.ids).unwrap_or_default();
            ids.push(id);
            pieces.push(Piece { kind, text: tokenizer.decode(&ids, false).unwrap_or_default(), ids });
        }
        LabelledTokens { pieces, tokens: self.len() }
    }

    fn kind(&self, i: usize) -> Kind {
        match (self.attention_mask.get(i), self.labels.get(i)) {
            (Some(0), _) => Kind::Padding,
            (_, Some(&label)) if label != IGNORE_INDEX => Kind::Learned,
            _ => Kind::Prompt,
        }
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
    fn count(&self, kind: Kind) -> usize {
        self.pieces.iter().filter(|p| p.kind == kind).map(|p| p.ids.len()).sum()
    }

    /// The tokens as coloured HTML, readable on a light and on a dark page; ids in the tooltips.
    pub fn to_html(&self) -> String {
        let mut html = String::from("<div style=\"line-height:2;white-space:pre-wrap;overflow-wrap:anywhere\">");
        for piece in &self.pieces {
            let text = escape_html(&piece.text.replace('\n', "⏎\n"));
            let style = piece.kind.style();
            html += &format!("<span title=\"{:?}\" style=\"{style};{TOKEN}\">{text}</span>", piece.ids);
        }
        html += &format!("</div><small><span style=\"{FAINT}\">{} tokens: </span>", self.tokens);
        for (kind, name) in [(Kind::Prompt, "read"), (Kind::Learned, "learned"), (Kind::Padding, "padding")] {
            match self.count(kind) {
                0 if kind == Kind::Padding => {}
                n => html += &format!("<span style=\"{};{TOKEN}\">{n} {name}</span> ", kind.style()),
            }
        }
        html + "</small>"
    }

    /// What a notebook shows: the coloured tokens.
    pub fn forms(&self) -> Forms {
        vec![("text/html", self.to_html()), ("text/plain", self.to_string())]
    }
}

const TOKEN: &str = "padding:.1em .15em;margin-right:1px";

impl Kind {
    fn style(self) -> &'static str {
        match self {
            Kind::Prompt => "background:rgba(128,128,128,.18);border-radius:.2em",
            // Not by colour alone: it is underlined, too.
            Kind::Learned => LEARNED,
            Kind::Padding => "opacity:.45",
        }
    }
}

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
        write!(f, "\n{} tokens, {} of them learned [in brackets]", self.tokens, self.count(Kind::Learned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(kind: Kind, text: &str, ids: &[u32]) -> Piece {
        Piece { kind, text: text.into(), ids: ids.to_vec() }
    }

    #[test]
    fn tokens_are_marked_by_what_the_loss_counts() {
        let pieces = vec![
            piece(Kind::Prompt, "题<b>", &[5]),
            piece(Kind::Prompt, "\n", &[6]),
            piece(Kind::Learned, "夜", &[7, 8]),
            piece(Kind::Padding, "<pad>", &[3]),
        ];
        let tokens = LabelledTokens { pieces, tokens: 5 };
        assert_eq!(tokens.to_string(), "题<b>|\\n[夜]|<pad>\n5 tokens, 2 of them learned [in brackets]");
        let html = tokens.to_html();
        for part in ["题&lt;b&gt;", "⏎\n", "title=\"[7, 8]\"", "2 read", "2 learned", "1 padding"] {
            assert!(html.contains(part), "{part} is missing from {html}");
        }
        // The token and the legend.
        assert_eq!(html.matches(LEARNED).count(), 2);
        assert_eq!(html.matches("<span").count(), html.matches("</span>").count());
    }

    #[test]
    fn the_kind_of_a_token_is_its_masks() {
        let features = Features {
            input_ids: vec![1, 2, 3, 4],
            attention_mask: vec![1, 1, 1, 0],
            labels: vec![IGNORE_INDEX, 2, 3, IGNORE_INDEX],
        };
        let kinds = [Kind::Prompt, Kind::Learned, Kind::Learned, Kind::Padding];
        assert_eq!([0, 1, 2, 3].map(|i| features.kind(i)), kinds);
    }
}
