//! A cell as text: its statements, the variables that it binds, and whether it is whole.

use std::collections::HashMap;

use ra_ap_rustc_lexer::{FrontmatterAllowed, TokenKind, tokenize};
use ra_ap_syntax::ast::{self, AstNode, HasName};
use ra_ap_syntax::{Edition, Parse, SourceFile, SyntaxKind, SyntaxNode, SyntaxToken, TextSize};
use serde::Serialize;

const BEFORE: &str = "fn cell() {";

/// A cell as the body of a function, which can be parsed. evcxr's own lines become blanks.
pub fn as_function(code: &str) -> String {
    let begin = rust_begins(code);
    format!("{BEFORE}{}{}\n}}", " ".repeat(begin), &code[begin..])
}

/// The place in the cell of a place in [`as_function`]'s text.
pub fn place_in_cell(offset: TextSize) -> usize {
    usize::from(offset).saturating_sub(BEFORE.len())
}

/// The place in [`as_function`]'s text of a place in the cell.
pub fn place_in_function(at: usize) -> Option<TextSize> {
    TextSize::try_from(at + BEFORE.len()).ok()
}

pub fn parse(text: &str) -> SyntaxNode {
    parsed(text).syntax_node()
}

/// A text that [`is_too_deep`] counts as blanks, as many.
fn parsed(text: &str) -> Parse<SourceFile> {
    match is_too_deep(text) {
        true => SourceFile::parse(&" ".repeat(text.len()), Edition::Edition2024),
        false => SourceFile::parse(text, Edition::Edition2024),
    }
}

/// How deep a text may nest: the parser calls itself for each level, and would use up the stack. Nobody writes so deep.
const DEEPEST: usize = 200;

/// Whether brackets, type arguments or signs before an expression nest deeper than the parser can follow.
pub fn is_too_deep(text: &str) -> bool {
    use TokenKind::{
        And, Bang, BlockComment, CloseBrace, CloseBracket, CloseParen, Comma, Gt, LineComment, Lt, Minus, OpenBrace,
        OpenBracket, OpenParen, Or, Semi, Star, Whitespace,
    };
    let (mut brackets, mut arguments, mut signs) = (0usize, 0usize, 0usize);
    tokenize(text, FrontmatterAllowed::No).any(|token| {
        match token.kind {
            Whitespace | LineComment { .. } | BlockComment { .. } => return false,
            OpenParen | OpenBracket | OpenBrace => brackets += 1,
            CloseParen | CloseBracket | CloseBrace => brackets = brackets.saturating_sub(1),
            Lt => arguments += 1,
            Gt => arguments = arguments.saturating_sub(1),
            _ => {}
        }
        if matches!(token.kind, Semi | Comma | OpenBrace | CloseBrace) {
            arguments = 0;
        }
        signs = if matches!(token.kind, Minus | Bang | And | Star | Or) { signs + 1 } else { 0 };
        brackets.max(arguments).max(signs) > DEEPEST
    })
}

/// The statements in a parsed text of [`as_function`].
pub fn statements_in(file: &SyntaxNode) -> Option<ast::StmtList> {
    file.children().find_map(ast::Fn::cast)?.body()?.stmt_list()
}

pub fn statements(code: &str) -> Option<ast::StmtList> {
    statements_in(&parse(&as_function(code)))
}

/// The text with `name![...]` as `name (...)`, of the same length: what stands in a macro's brackets is then parsed, too.
pub fn as_a_call(text: &str, call: &ast::MacroCall) -> Option<String> {
    let tree = call.token_tree()?;
    let tokens = [(call.excl_token(), " "), (tree.left_delimiter_token(), "("), (tree.right_delimiter_token(), ")")];
    let mut text = text.to_owned();
    for (token, with) in tokens {
        let range = token.map(|token| token.text_range());
        range.into_iter().for_each(|range| text.replace_range(std::ops::Range::<usize>::from(range), with));
    }
    Some(text)
}

/// Where the Rust code of a cell begins: behind evcxr's own lines (`:dep`, `!ls`) and leading comments.
pub fn rust_begins(code: &str) -> usize {
    let is_rust = |line: &&str| {
        let start = line.trim_start();
        let is_comment = line.starts_with("//") && !line.starts_with("///");
        !(start.is_empty() || start.starts_with(':') || line.starts_with('!') || is_comment)
    };
    code.split_inclusive('\n').take_while(|line| !is_rust(line)).map(str::len).sum()
}

/// Whether the cell's last expression has a value to show. evcxr would compile a cell twice to find out that a loop's
/// cannot be shown.
pub fn ends_in_expression(code: &str) -> bool {
    let Some(list) = statements(code) else { return false };
    match list.syntax().children().last().and_then(ast::Expr::cast) {
        None | Some(ast::Expr::ForExpr(_) | ast::Expr::WhileExpr(_)) => false,
        Some(ast::Expr::IfExpr(branch)) => branch.else_branch().is_some(),
        Some(_) => true,
    }
}

/// The items at a cell's top level.
pub fn items(code: &str) -> impl Iterator<Item = ast::Item> {
    let statements = statements(code).into_iter().flat_map(|list| list.statements());
    statements.filter_map(|statement| if let ast::Stmt::Item(item) = statement { Some(item) } else { None })
}

/// Whether a cell defines a static that can change.
pub fn has_changing_static(code: &str) -> bool {
    let changes = |ty: String| ["Atomic", "Mutex", "Lock", "Cell"].iter().any(|word| ty.contains(word));
    items(code).any(|item| {
        let ast::Item::Static(item) = item else { return false };
        item.mut_token().is_some() || item.ty().is_some_and(|ty| changes(ty.syntax().text().to_string()))
    })
}

/// The types, traits, constants and modules that a cell defines, each with what decides how its values lie in memory: its
/// text without comments, bodies of functions, and attributes other than `repr`.
pub fn definitions(code: &str) -> impl Iterator<Item = (String, String)> {
    let is_idle = |node: SyntaxNode| {
        let is_body =
            ast::BlockExpr::can_cast(node.kind()) && node.parent().is_some_and(|of| ast::Fn::can_cast(of.kind()));
        is_body || ast::Attr::can_cast(node.kind()) && !node.text().to_string().contains("repr")
    };
    items(code).filter(|item| !matches!(item, ast::Item::Fn(_) | ast::Item::Static(_))).filter_map(move |item| {
        let name = ast::AnyHasName::cast(item.syntax().clone())?.name()?.text().to_string();
        let tokens = item.syntax().descendants_with_tokens().filter_map(|element| element.into_token());
        let tokens = tokens.filter(|token| {
            !token.kind().is_trivia()
                && token.text() != ","
                && !token.parent_ancestors().take_while(|node| node != item.syntax()).any(is_idle)
        });
        Some((name, tokens.map(|token| token.text().to_owned()).collect::<Vec<_>>().join(" ")))
    })
}

/// Whether one of the names stands in a text.
pub fn mentions(text: &str, names: &[String]) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| names.iter().any(|name| name == word))
}

/// What the parser says of a cell that is no Rust, and where in the cell; None if it is.
pub fn error(code: &str) -> Option<(String, usize)> {
    let parsed = parsed(&as_function(code));
    let error = parsed.errors().into_iter().next()?;
    Some((error.to_string(), place_in_cell(error.range().start()).min(code.trim_end().len())))
}

/// A variable that a cell binds at its top level.
#[derive(Debug, PartialEq)]
pub struct Binding {
    pub name: String,
    /// Whether the type is written there.
    pub is_typed: bool,
    is_mut: bool,
    /// Byte offset in the cell, behind the `let` statement that binds it last.
    end: usize,
    /// Behind the name, where a type can be written; None in a larger pattern, and where a part of a type stands.
    type_place: Option<usize>,
}

/// The variables of a cell, in the order of the statements that bind them last.
pub fn bindings(code: &str) -> Vec<Binding> {
    let Some(list) = statements(code) else { return Vec::new() };
    let mut found: Vec<Binding> = Vec::new();
    for statement in list.statements() {
        let ast::Stmt::LetStmt(statement) = statement else { continue };
        let Some(pattern) = statement.pat() else { continue };
        let inferred = |ty: ast::Type| ty.syntax().descendants().any(|node| ast::InferType::can_cast(node.kind()));
        let typed = statement.ty().is_some_and(|ty| !inferred(ty));
        let end = place_in_cell(statement.syntax().text_range().end());
        for binding in pattern.syntax().descendants().filter_map(ast::IdentPat::cast) {
            let Some(name) = binding.name().map(|name| name.text().to_string()) else { continue };
            // A name with a capital is a constant or a unit struct in a pattern, not a variable.
            if name.starts_with(char::is_uppercase) {
                continue;
            }
            found.retain(|earlier| earlier.name != name);
            let is_plain = matches!(&pattern, ast::Pat::IdentPat(_));
            // What is declared only, evcxr infers; the types of a pattern's parts are written nowhere.
            let is_typed = statement.initializer().is_none() || (typed && is_plain);
            let behind_name = binding.name().map(|name| place_in_cell(name.syntax().text_range().end()));
            let type_place = behind_name.filter(|_| is_plain && statement.ty().is_none());
            found.push(Binding { name, is_typed, is_mut: binding.mut_token().is_some(), end, type_place });
        }
    }
    found
}

/// Adds to a cell the types of its variables. The additions stand behind the statements, on the same line, so
/// that the compiler's messages keep their lines and columns.
pub fn annotate(code: &str, variables: &[Binding], types: &HashMap<String, String>) -> String {
    with_types_at(|_| None, code, variables, types)
}

/// The cell as somebody would write it who has to name the types: for stock evcxr, which cannot find them out.
pub fn with_types(code: &str, variables: &[Binding], types: &HashMap<String, String>) -> String {
    with_types_at(|variable| variable.type_place, code, variables, types)
}

/// Writes types where `place` says, and elsewhere as `let x: T = x;` behind the statement.
fn with_types_at(
    place: impl Fn(&Binding) -> Option<usize>,
    code: &str,
    variables: &[Binding],
    types: &HashMap<String, String>,
) -> String {
    let mut insertions = Vec::new();
    for variable in variables.iter().filter(|variable| !variable.is_typed) {
        let Binding { name, is_mut, end, .. } = variable;
        let Some(ty) = types.get(name) else { continue };
        let is_mut = if *is_mut { "mut " } else { "" };
        insertions.push(match place(variable) {
            Some(place) => (place, format!(": {ty}")),
            None => (*end, format!(" let {is_mut}{name}: {ty} = {name};")),
        });
    }
    insertions.sort_by_key(|(place, _)| *place);
    let mut typed = code.to_owned();
    insertions.iter().rev().for_each(|(place, text)| typed.insert_str(*place, text));
    typed
}

/// In the words of the protocol's `is_complete_reply`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Completeness {
    Complete,
    /// More must follow.
    Incomplete {
        indent: String,
    },
    Invalid,
}

/// Judges a cell, for clients that decide by it what the Enter key does, by its brackets and its last token, and by what
/// rust-analyzer's parser says of the rest.
pub fn is_complete(code: &str) -> Completeness {
    if is_too_deep(code) {
        return Completeness::Invalid;
    }
    let file = parse(&code[rust_begins(code)..]);
    let tokens = file.descendants_with_tokens().filter_map(|element| element.into_token());
    let tokens: Vec<SyntaxToken> = tokens.filter(|token| !token.kind().is_trivia()).collect();
    let Some(open) = open_brackets(&tokens) else { return Completeness::Invalid };
    if open > 0 {
        return Completeness::Incomplete { indent: "    ".repeat(open) };
    }
    let parsed = parsed(&as_function(code));
    let errors: Vec<String> = parsed.errors().iter().map(|error| error.to_string()).collect();
    // What the parser says of a string and of a block comment without an end.
    const OPEN: [&str; 3] = ["Missing trailing `\"`", "Missing trailing `*/`", "Invalid raw string literal"];
    let is_open = |error: &String| OPEN.iter().any(|open| error.starts_with(open));
    if errors.iter().any(is_open) || ends_in_the_middle(&tokens) {
        return Completeness::Incomplete { indent: String::new() };
    }
    if errors.is_empty() { Completeness::Complete } else { Completeness::Invalid }
}

/// How many brackets are open at the end; None if one is closed that was not open.
fn open_brackets(tokens: &[SyntaxToken]) -> Option<usize> {
    let mut open = Vec::new();
    for token in tokens {
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

/// An operator, a dot or a comma at the end wants more.
fn ends_in_the_middle(tokens: &[SyntaxToken]) -> bool {
    let is_unfinished =
        |last: &SyntaxToken| matches!(last.text(), "." | "," | "=" | "+" | "-" | "/" | "::" | "->" | "=>" | "&&");
    tokens.last().is_some_and(is_unfinished)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nests_too_deep_is_not_parsed() {
        for (begin, part, end) in [
            ("", "[", ""),
            ("", "(", ")"),
            ("f(", "-", "1)"),
            ("&", "& ", "x"),
            ("let x: ", "Box<", ""),
            ("", "{ /* */ ", "}"),
        ] {
            let deep = |times: usize| format!("{begin}{}{end}", part.repeat(times));
            assert!(!is_too_deep(&deep(DEEPEST - 2)) && is_too_deep(&deep(100_000)), "{part}");
            let _ = (is_complete(&deep(100_000)), error(&deep(100_000)), bindings(&deep(100_000)));
            let _ = (is_complete(&deep(DEEPEST - 2)), error(&deep(DEEPEST - 2)), bindings(&deep(DEEPEST - 2)));
        }
        let long = format!(
            "{}let x = [{}];\n// {}\nprintln!(\"{}\");",
            "f(1 << 3);\n".repeat(999),
            "1 << 2, ".repeat(999),
            "-".repeat(999),
            "(".repeat(999)
        );
        assert!(!is_too_deep(&long));
    }

    #[test]
    fn tells_whole_code_from_code_that_goes_on() {
        let more = |indent: &str| Completeness::Incomplete { indent: indent.into() };
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

    fn names(code: &str) -> Vec<String> {
        bindings(code).into_iter().filter(|variable| !variable.is_typed).map(|variable| variable.name).collect()
    }

    #[test]
    fn finds_the_variables_that_need_a_type() {
        assert_eq!(names("let a = 1; let b: u8 = 2; let (mut c, Some(d)) = f() else { panic!() };"), ["a", "c", "d"]);
        assert_eq!(
            names(":dep x = \"1\"\n// note\nlet a = 1;\nif true { let hidden = 2; }\nfn f() { let g = 3; }"),
            ["a"]
        );
        assert_eq!(names("let v: Vec<_> = it.collect();\nlet w;\nw = 1;\n"), ["v"]);
        assert!(names("}} not rust {{ let").is_empty());
    }

    #[test]
    fn a_definition_is_what_decides_of_memory() {
        let one = |code: &str| definitions(code).next().expect("a definition");
        assert_eq!(one("/// Docs.\n#[derive(Debug)]\nstruct S {\n    n: i32, // why\n}"), one("struct S { n: i32, }"));
        assert_ne!(one("struct S(i32);"), one("struct S(i64);"));
        assert_ne!(one("#[repr(C)] struct S(i32);"), one("struct S(i32);"));
        assert_eq!(one("trait T { fn f() { 1 } }"), one("trait T { fn f() { 2 } }"));
        assert_eq!(definitions("fn f() {} impl S {} let x = 1; use a::b;").count(), 0);
        assert!(has_changing_static("static mut N: u8 = 0;") && has_changing_static("static N: Mutex<u8> = f();"));
        assert!(!has_changing_static("static NAME: &str = \"x\";"));
    }

    #[test]
    fn annotates_the_last_binding_of_a_name() {
        let code = "// two\nlet a = 1; let a = \"x\"; // shadows\nlet (b, mut c) = f()?;\nb";
        let types = [("a", "&str"), ("b", "u8"), ("c", "u16")];
        let types = types.map(|(name, ty)| (name.to_owned(), ty.to_owned())).into();
        let expected = "// two\nlet a = 1; let a = \"x\"; let a: &str = a; // shadows\n\
                        let (b, mut c) = f()?; let b: u8 = b; let mut c: u16 = c;\nb";
        assert_eq!(annotate(code, &bindings(code), &types), expected);
    }

    #[test]
    fn writes_types_where_people_do() {
        let code = "let mut a = 1; // 诗\nlet (b, c): (_, u8) = f()?;\nlet d: u8 = 1;\nlet e = 2;";
        let types = [("a", "i32"), ("b", "&str"), ("c", "u8"), ("e", "i32")];
        let types = types.map(|(name, ty)| (name.to_owned(), ty.to_owned())).into();
        let expected = "let mut a: i32 = 1; // 诗\nlet (b, c): (_, u8) = f()?; let b: &str = b; let c: u8 = c;\n\
                        let d: u8 = 1;\nlet e: i32 = 2;";
        assert_eq!(with_types(code, &bindings(code), &types), expected);
    }

    #[test]
    fn tells_a_shown_expression_from_a_statement() {
        assert!(ends_in_expression("let a = 1;\na"));
        assert!(ends_in_expression("ds.head(3)? // shown\n"));
        assert!(ends_in_expression("if a { 1 } else { 2 }"));
        assert!(ends_in_expression("loop { break 1 }"));
        assert!(!ends_in_expression("for a in 0..3 { println!(\"{a}\"); } // no value"));
        assert!(!ends_in_expression("while f() {}"));
        assert!(!ends_in_expression("if let Some(a) = f() { g(a) }"));
        assert!(!ends_in_expression("a;"));
        assert!(!ends_in_expression("fn f() {}"));
        assert!(!ends_in_expression(""));
    }
}
