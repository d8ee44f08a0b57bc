//! How a dataset looks: Hugging Face's text, and a table in a notebook.

use std::fmt;

use super::{Dataset, DatasetDict, Example, Value};
use crate::{
    display::{
        Forms,
        format::escape_html,
        shown_by_forms,
        theme::{CELL, FAINT, TABLE},
    },
    py_repr::{commas, py_dict, py_str},
};

/// A table shows so many rows, and so many characters of a cell.
const MAX_ROWS: usize = 10;
const MAX_CHARS: usize = 160;

/// `Dataset({ features: [...], num_rows: ... })`; a slice prints its rows as a dict of lists.
impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.prints_rows {
            return f.write_str(&summary(self));
        }
        let values = |name: &str| commas(self.iter().map(|example| example.value(name).unwrap_or_default()));
        let names = self.column_names();
        f.write_str(&py_dict(names.iter().map(|name| (name, format!("[{}]", values(name))))))
    }
}

impl Dataset {
    /// What a notebook shows: the first rows as a table.
    pub fn forms(&self) -> Forms {
        let text = if self.len() > MAX_ROWS { summary(self) } else { self.to_string() };
        vec![("text/html", self.to_html()), ("text/plain", text)]
    }

    /// The first rows as an HTML table, readable on a light and on a dark page.
    pub fn to_html(&self) -> String {
        let (names, features) = (self.column_names(), self.features());
        let head = |name: &String| {
            let (name, dtype) = (escape_html(name), escape_html(&features.get(name).unwrap_or_default()));
            format!("<th style=\"{CELL}\">{name}<br><small style=\"{FAINT}\">{dtype}</small></th>")
        };
        let row = |(i, example): (usize, Example)| {
            let cells: String = names.iter().map(|name| cell(&example.value(name).unwrap_or_default())).collect();
            format!("<tr><td style=\"{CELL};{FAINT}\">{i}</td>{cells}</tr>")
        };
        let heads: String = names.iter().map(head).collect();
        let rows: String = self.iter().take(MAX_ROWS).enumerate().map(row).collect();
        let s = if self.len() == 1 { "" } else { "s" };
        let shown = if self.len() > MAX_ROWS { format!(", the first {MAX_ROWS} shown") } else { String::new() };
        format!(
            "<div class=\"qlora-dataset\" style=\"overflow-x:auto\"><table style=\"{TABLE}\">\
             <tr><th style=\"{CELL}\"></th>{heads}</tr>{rows}</table>\
             <small style=\"{FAINT}\">{} row{s}{shown}</small></div>",
            self.len()
        )
    }
}

shown_by_forms!(Dataset, DatasetDict);

fn cell(value: &Value) -> String {
    let (text, more_style) = match value {
        Value::Text(text) => (text.clone(), ""),
        Value::Null => ("None".into(), FAINT),
        other => (other.to_string(), ""),
    };
    let mut chars = text.chars();
    let start: String = chars.by_ref().take(MAX_CHARS).collect();
    let more = match chars.count() {
        0 => String::new(),
        n => format!("<span style=\"{FAINT}\"> … +{n} characters</span>"),
    };
    format!("<td style=\"{CELL};{more_style}\">{}{more}</td>", escape_html(&start))
}

pub(super) fn dict_html(dict: &DatasetDict) -> String {
    dict.iter().map(|(name, dataset)| format!("<p><b>{}</b></p>{}", escape_html(name), dataset.to_html())).collect()
}

pub(super) fn summary(dataset: &Dataset) -> String {
    let names = commas(dataset.column_names().iter().map(|name| py_str(name)));
    format!("Dataset({{\n    features: [{names}],\n    num_rows: {}\n}})", dataset.len())
}
