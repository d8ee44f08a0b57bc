//! Named amounts of memory: as text, and as a table with bars.

use std::fmt;

use super::{
    Forms,
    format::escape_html,
    rich::shown_by_forms,
    theme::{BLUE, CELL, FAINT, NUMBER, TABLE, TEXT, TRACK},
};

/// One term of a report.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryTerm {
    pub name: String,
    pub bytes: usize,
}

/// Named amounts of memory that add up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryReport {
    pub terms: Vec<MemoryTerm>,
}

impl MemoryReport {
    /// Adds a term unless it is nothing.
    pub fn add(&mut self, name: impl Into<String>, bytes: usize) {
        if bytes > 0 {
            self.terms.push(MemoryTerm { name: name.into(), bytes });
        }
    }

    /// Appends the terms of another report.
    pub fn extend(&mut self, other: Self) {
        self.terms.extend(other.terms);
    }

    /// The sum of the terms.
    pub fn total(&self) -> usize {
        self.terms.iter().map(|t| t.bytes).sum()
    }

    /// The terms as an HTML table, each with its share of the total as a bar.
    pub fn to_html(&self) -> String {
        let total = self.total();
        let row = |name: &str, bytes: usize, style: &str, bar: &str| {
            let mib = mib(bytes);
            format!(
                "<tr style=\"background:transparent;{style}\"><td style=\"{CELL}\">{}</td>\
                 <td style=\"{NUMBER}\">{mib:.2} MiB</td><td style=\"{CELL};min-width:12em\">{bar}</td></tr>",
                escape_html(name)
            )
        };
        let terms = self.terms.iter().map(|term| {
            let percent = 100.0 * term.bytes as f64 / total.max(1) as f64;
            let bar = format!(
                "<div style=\"display:flex;align-items:center;gap:.6em\">\
                 <div style=\"{TRACK};height:8px;flex:1\">\
                 <div style=\"width:{percent:.1}%;height:100%;background:{BLUE}\"></div></div>\
                 <span style=\"{FAINT};font-variant-numeric:tabular-nums\">{percent:.1}%</span></div>"
            );
            row(&term.name, term.bytes, "", &bar)
        });
        let terms: String = terms.collect();
        let sum = row("total", total, "font-weight:bold", "");
        format!("<div style=\"{TEXT};overflow-x:auto\"><table style=\"{TABLE}\">{terms}{sum}</table></div>")
    }

    /// What a notebook shows.
    pub fn forms(&self) -> Forms {
        vec![("text/html", self.to_html()), ("text/plain", self.to_string())]
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.terms.iter().map(|t| t.name.chars().count()).max().unwrap_or(0).max(5);
        for MemoryTerm { name, bytes } in &self.terms {
            writeln!(f, "{name:<width$}  {:>9.2} MiB", mib(*bytes))?;
        }
        write!(f, "{:<width$}  {:>9.2} MiB", "total", mib(self.total()))
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

shown_by_forms!(MemoryReport);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_a_table_whose_bars_are_shares_of_the_total() {
        let mut report = MemoryReport::default();
        report.add("weights <4-bit>", 3 << 20);
        report.add("activations", 1 << 20);
        let html = report.to_html();
        for part in ["weights &lt;4-bit&gt;", "3.00 MiB", "width:75.0%", "width:25.0%", "total", "4.00 MiB"] {
            assert!(html.contains(part), "{part} is missing from {html}");
        }
        assert_eq!(html.matches("<tr").count(), 3);
        assert_eq!(report.forms()[1].1, report.to_string());
        assert!(MemoryReport::default().to_html().contains("0.00 MiB"), "an empty report divides nothing by zero");
    }
}
