//! Whether code is whole, for clients that decide by it what the Enter key does.

use ra_ap_syntax::ast::AstToken;
use ra_ap_syntax::{Edition, SourceFile, SyntaxKind, ast};
use serde_json::{Value, json};

use crate::types;

#[derive(Debug, Clone, PartialEq)]
pub enum Completeness {
    Complete,
    /// More must follow, indented so.
    Incomplete(String),
    Invalid,
}

impl Completeness {
    pub fn to_json(&self) -> Value {
        match self {
            Completeness::Complete => json!({ "status": "complete" }),
            Completeness::Incomplete(indent) => json!({ "status": "incomplete", "indent": indent }),
            Completeness::Invalid => json!({ "status": "invalid" }),
        }
    }
}

/// Judges a cell by its brackets, strings and comments, and by what rust-analyzer's parser says of the rest.
pub fn is_complete(code: &str) -> Completeness {
    let rust = &code[types::rust_begins(code)..];
    let open = match open_brackets(rust) {
        Some(open) => open,
        None => return Completeness::Invalid,
    };
    if open > 0 {
        return Completeness::Incomplete("    ".repeat(open));
    }
    if has_open_literal(rust) || ends_in_the_middle(rust) {
        return Completeness::Incomplete(String::new());
    }
    let file = SourceFile::parse(&format!("fn cell() {{{rust}\n}}"), Edition::Edition2024);
    match file.errors().is_empty() {
        true => Completeness::Complete,
        false => Completeness::Invalid,
    }
}

/// How many brackets are open at the end; None if one is closed that was not open.
fn open_brackets(code: &str) -> Option<usize> {
    let mut open = Vec::new();
    for token in tokens(code) {
        match token.kind() {
            SyntaxKind::L_CURLY | SyntaxKind::L_PAREN | SyntaxKind::L_BRACK => open.push(token.kind()),
            SyntaxKind::R_CURLY => (open.pop() == Some(SyntaxKind::L_CURLY)).then_some(())?,
            SyntaxKind::R_PAREN => (open.pop() == Some(SyntaxKind::L_PAREN)).then_some(())?,
            SyntaxKind::R_BRACK => (open.pop() == Some(SyntaxKind::L_BRACK)).then_some(())?,
            _ => {}
        }
    }
    Some(open.len())
}

/// A string or a block comment without an end.
fn has_open_literal(code: &str) -> bool {
    tokens(code).iter().any(|token| {
        let text = token.text();
        match token.kind() {
            SyntaxKind::STRING => match ast::String::cast(token.clone()) {
                Some(_) if text.starts_with('r') => {
                    let hashes = text[1..].chars().take_while(|c| *c == '#').count();
                    let end = format!("\"{}", "#".repeat(hashes));
                    text.len() < 2 * (hashes + 1) + 1 || !text.ends_with(&end)
                }
                _ => text.len() < 2 || !text.ends_with('"') || ends_escaped(text),
            },
            SyntaxKind::COMMENT => text.starts_with("/*") && !text.ends_with("*/"),
            _ => false,
        }
    })
}

/// Whether the closing quote is none, for a backslash stands before it.
fn ends_escaped(text: &str) -> bool {
    text[..text.len() - 1].chars().rev().take_while(|c| *c == '\\').count() % 2 == 1
}

/// An operator, a dot or a comma at the end wants more.
fn ends_in_the_middle(code: &str) -> bool {
    let tokens = tokens(code);
    let last = tokens.iter().rev().find(|token| !token.kind().is_trivia());
    last.is_some_and(|token| matches!(token.text(), "." | "," | "=" | "+" | "-" | "/" | "::" | "->" | "=>" | "&&"))
}

fn tokens(code: &str) -> Vec<ra_ap_syntax::SyntaxToken> {
    let file = SourceFile::parse(code, Edition::Edition2024);
    file.syntax_node().descendants_with_tokens().filter_map(|element| element.into_token()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_whole_code_from_code_that_goes_on() {
        let more = |indent: &str| Completeness::Incomplete(indent.into());
        for (code, expected) in [
            ("", Completeness::Complete),
            ("let a = 1;", Completeness::Complete),
            ("a + 1", Completeness::Complete),
            ("fn f() -> u8 { 1 }", Completeness::Complete),
            ("println!(\"{}\", '{');", Completeness::Complete),
            (":dep regex = \"1\"\nlet a = 1;", Completeness::Complete),
            ("fn f() {", more("    ")),
            ("f(vec![1,", more("        ")),
            ("let a =", more("")),
            ("ds.", more("")),
            ("let s = \"two", more("")),
            ("let s = \"two\\\"", more("")),
            ("let s = r#\"two\"", more("")),
            ("let s = r#\"two\"#;", Completeness::Complete),
            ("/* so", more("")),
            ("a)", Completeness::Invalid),
            ("f(1]", Completeness::Invalid),
            ("let 1 2", Completeness::Invalid),
        ] {
            assert_eq!(is_complete(code), expected, "{code:?}");
        }
    }
}
