//! What the name at the cursor is: its type or signature, and its documentation.

use pulldown_cmark::{Event, HeadingLevel, Parser, Tag, TagEnd};
use ra_ap_syntax::ast::{self, AstNode};
use ra_ap_syntax::{Edition, SyntaxKind};

use crate::api::{Item, Member};
use crate::scope::{Cell, Place, Scope};
use crate::std_names;

/// The same text in the forms that Jupyter's frontends show.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Inspection {
    pub plain: String,
    pub markdown: String,
    pub html: String,
}

/// Inspects the name at or just before a cursor that counts bytes; between the brackets of a call, what is called.
pub(crate) fn inspect(scope: &Scope, code: &str, cursor: usize) -> Option<Inspection> {
    let cursor = (0..=cursor.min(code.len())).rev().find(|at| code.is_char_boundary(*at))?;
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    // The name's first byte: the same token whether the cursor is in front of it, in it or behind it.
    let back = code[..cursor].trim_end_matches(is_name).len();
    let is_number = code[back..].starts_with(|c: char| c.is_ascii_digit());
    let own = Some(back).filter(|at| code[*at..].starts_with(is_name) && !is_number);
    let named = |at: usize| {
        let cell = Cell::token_at(code, at)?;
        let kind = cell.token.kind();
        (kind == SyntaxKind::IDENT || kind.is_keyword(Edition::Edition2024)).then_some(cell)
    };
    // A name in a string is none.
    let cell = own.and_then(named).or_else(|| named(called(code, cursor)?))?;
    let name = cell.token.text().to_owned();
    let found = match cell.place() {
        Place::MemberOf(receiver) => {
            let owner = scope.type_of_or_ask(&cell, &receiver)?;
            of_member(&owner, &scope.member(&owner, &name)?)
        }
        Place::Path(qualifier) => {
            let whole = format!("{qualifier}::{name}");
            match scope.module(&qualifier).and_then(|module| scope.api.item(module.get(&name)?)) {
                Some(item) => of_item(item),
                None => match scope.member(&qualifier, &name) {
                    Some(member) => of_member(&qualifier, &member),
                    None => of_item(scope.item(&whole)?),
                },
            }
        }
        Place::FieldIn(literal) => {
            let owner = literal.path()?.syntax().text().to_string();
            of_member(&owner, scope.item(&owner)?.member(&name)?)
        }
        Place::Plain | Place::NewName => of_name(scope, &cell, &name)?,
    };
    Some(rendered(&found))
}

/// Where the callee's name begins, of the innermost call or macro whose brackets hold the cursor.
fn called(code: &str, cursor: usize) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in code[..cursor].char_indices().rev() {
        match c {
            ')' | ']' | '}' => depth += 1,
            '(' if depth == 0 => {
                let before = code[..at].trim_end_matches('!');
                let name = before.trim_end_matches(|c: char| c.is_alphanumeric() || c == '_').len();
                return (name < before.len()).then_some(name);
            }
            '(' | '[' | '{' => depth -= 1,
            ';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// A headline in Rust, documentation in Markdown, and lines of Rust that list what is inside.
#[derive(Default)]
struct Found {
    headline: String,
    docs: String,
    inside: Vec<String>,
}

fn of_member(owner: &str, member: &Member) -> Found {
    let headline = match member.kind.as_str() {
        "variant" => format!("{owner}::{}", member.signature),
        "field" => format!("{}  // of {owner}", member.signature),
        _ => member.signature.clone(),
    };
    Found { headline, docs: member.docs.clone(), inside: Vec::new() }
}

fn of_item(item: &Item) -> Found {
    let path = if item.path.contains("::") { format!("  // {}", item.path) } else { String::new() };
    Found { headline: item.signature.clone() + &path, docs: item.docs.clone(), inside: inside(item) }
}

/// Fields and variants with their meaning, then methods.
fn inside(item: &Item) -> Vec<String> {
    let is_data = |member: &&Member| matches!(member.kind.as_str(), "field" | "variant");
    let data = item.members.iter().filter(is_data).map(|member| {
        let meaning = member.docs.lines().next().unwrap_or_default();
        let meaning = if meaning.is_empty() { String::new() } else { format!("  // {meaning}") };
        format!("{},{meaning}", member.signature)
    });
    let functions = item.members.iter().filter(|member| !is_data(member)).map(|member| member.signature.clone());
    data.chain(functions).collect()
}

/// A name without a path: a variable, an item or a macro.
fn of_name(scope: &Scope, cell: &Cell, name: &str) -> Option<Found> {
    let parent = cell.token.parent()?;
    let is_macro = parent.ancestors().take(4).any(|node| ast::MacroCall::can_cast(node.kind()));
    let usage = std_names::macros().find(|(known, _)| known.strip_suffix('!') == Some(name));
    let usage = usage.map(|(_, usage)| Found { headline: usage.to_owned(), ..Default::default() });
    if is_macro && usage.is_some() {
        return usage;
    }
    let variable = match ast::Name::can_cast(parent.kind()) {
        true => {
            let bound = parent.ancestors().find_map(ast::LetStmt::cast);
            let written = bound.as_ref().and_then(|bound| bound.ty()).map(|ty| ty.syntax().text().to_string());
            written.or_else(|| scope.type_of_or_ask(cell, &bound?.initializer()?))
        }
        false => scope.type_of_variable(name, &parent),
    };
    if let Some(ty) = variable {
        let item = scope.type_at(&ty);
        let headline = format!("{name}: {ty}");
        let (docs, inside) = item.map(|item| (item.docs.clone(), inside(item))).unwrap_or_default();
        return Some(Found { headline, docs, inside });
    }
    if let Some(item) = scope.item(name) {
        return Some(of_item(item));
    }
    let inside: Vec<String> = std_names::members(name, &[], name).into_iter().map(|member| member.signature).collect();
    usage.or((!inside.is_empty()).then(|| Found { headline: name.to_owned(), docs: String::new(), inside }))
}

fn rendered(found: &Found) -> Inspection {
    let docs = shown(&found.docs);
    let inside = found.inside.join("\n");
    let parts = |parts: [String; 3]| parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n\n");
    let fenced = |code: &str| if code.is_empty() { String::new() } else { format!("```rust\n{code}\n```") };
    let block = |code: &str| if code.is_empty() { String::new() } else { format!("<pre>{}</pre>", escaped(code)) };
    Inspection {
        plain: parts([found.headline.clone(), docs.clone(), inside.clone()]),
        markdown: parts([fenced(&found.headline), docs.clone(), fenced(&inside)]),
        html: parts([block(&found.headline), html(&docs), block(&inside)]),
    }
}

/// Documentation as rustdoc shows it: without the lines that examples hide, and code marked as Rust.
fn shown(docs: &str) -> String {
    let mut out: Vec<&str> = Vec::new();
    let mut in_code = false;
    for line in docs.lines() {
        let is_fence = line.trim_start().starts_with("```");
        if is_fence {
            in_code = !in_code;
            let language = line.trim_start().trim_start_matches('`');
            let is_rust = language
                .split(',')
                .all(|word| matches!(word.trim(), "" | "rust" | "no_run" | "ignore" | "should_panic" | "compile_fail"));
            out.push(if in_code && is_rust { "```rust" } else { line });
        } else if !(in_code && (line.trim() == "#" || line.trim_start().starts_with("# "))) {
            out.push(line);
        }
    }
    out.join("\n").trim().to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Documentation as HTML. What looks like HTML in it is text, `Vec<T>` say; and headings are small, for a tooltip.
fn html(markdown: &str) -> String {
    let events = Parser::new(markdown).map(|event| match event {
        Event::Html(text) | Event::InlineHtml(text) => Event::Text(text),
        Event::Start(Tag::Heading { id, classes, attrs, .. }) => {
            Event::Start(Tag::Heading { level: HeadingLevel::H4, id, classes, attrs })
        }
        Event::End(TagEnd::Heading(_)) => Event::End(TagEnd::Heading(HeadingLevel::H4)),
        event => event,
    });
    let mut out = String::new();
    pulldown_cmark::html::push_html(&mut out, events);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::testing::with_scope;

    #[test]
    fn tells_what_a_name_is() {
        let table = [
            ("trai|ner", "trainer: qlora_nb::trainer::Trainer\n\nAbout Trainer."),
            ("trainer|.train()", "trainer: qlora_nb::trainer::Trainer"),
            (
                "trainer.train_st|eps(3)",
                "fn train_steps(&mut self, n: usize) -> Result<TrainOutput>\n\nAt most `n` more",
            ),
            ("trainer.train_steps(|3)", "fn train_steps(&mut self"),
            ("Trainer::new(\"mod|el\")", "fn new(model: &Model)"),
            ("println!(\"{}\", trainer.train_steps|(3));", "fn train_steps(&mut self"),
            ("trainer.train()?.loss|", "loss: f64"),
            ("Trainer::ne|w(&m)", "fn new(model: &Model) -> Result<Self>"),
            ("Train|er::new(&m)", "struct Trainer  // qlora_nb::trainer::Trainer\n\nAbout Trainer."),
            ("let out|put = trainer.train()?;", "output: TrainOutput"),
            ("let out = trainer.train()?;\nout|", "out: TrainOutput\n\nAbout TrainOutput."),
            ("qlora_nb::trainer::TrainOut|put", "struct TrainOutput"),
            ("TrainingArguments { opt|im: x }", "optim: Optim  // of TrainingArguments"),
            ("Optim::Ad|am", "Optim::Adam"),
            ("use qlora_nb::trainer::Train|er;", "struct Trainer"),
            ("print|ln!(\"\")", "println!("),
            ("fn own(a: u8) -> u8 { a }\now|n(1)", "fn own(a: u8) -> u8"),
            ("/// Mine.\nstruct Own { size: u8 }\nlet o = Own { size: 1 };\no|", "o: Own\n\nMine.\n\nsize: u8,"),
            ("Strin|g", "String\n\nfn new() -> String"),
            ("std::fs::rena|me", "fn rename(from: P, to: Q)"),
            ("printl|n", "println!("),
        ];
        for (code, begin) in table {
            let cursor = code.find('|').expect("a bar");
            let code = code.replacen('|', "", 1);
            let mut items = Vec::new();
            crate::own::learn(&mut items, &code);
            let found = with_scope(|scope| inspect(&Scope { items: &items, ..*scope }, &code, cursor));
            let plain = found.map(|found| found.plain).unwrap_or_default();
            assert!(plain.starts_with(begin), "{code}: {plain:?}");
        }
    }

    #[test]
    fn says_nothing_of_what_it_does_not_know() {
        for code in ["|", "1 + |2", "mystery|", "trainer.mystery|", "\"trainer|\"", "// trainer|", "let|", "江|"] {
            let cursor = code.find('|').expect("a bar");
            assert_eq!(with_scope(|scope| inspect(scope, &code.replacen('|', "", 1), cursor)), None, "{code}");
        }
    }

    #[test]
    fn documentation_loses_hidden_lines_and_becomes_html() {
        let docs =
            "Trains `n < 3`.\n\n```no_run\n# fn f() {\nlet a = 1 < 2;\n# }\n```\n# Errors\n- one\n- two\nmore\n\nEnd.";
        assert_eq!(
            shown(docs),
            "Trains `n < 3`.\n\n```rust\nlet a = 1 < 2;\n```\n# Errors\n- one\n- two\nmore\n\nEnd."
        );
        assert_eq!(
            html(&shown(docs)),
            "<p>Trains <code>n &lt; 3</code>.</p>\n<pre><code class=\"language-rust\">let a = 1 &lt; 2;\n</code></pre>\n\
             <h4>Errors</h4>\n<ul>\n<li>one</li>\n<li>two\nmore</li>\n</ul>\n<p>End.</p>\n"
        );
        assert_eq!(html("A Vec<T> of `u8`s"), "<p>A Vec&lt;T&gt; of <code>u8</code>s</p>\n");
    }
}
