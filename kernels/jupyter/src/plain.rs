//! Cells that no optimising can speed up, and which are therefore compiled without it.
//!
//! Most of a warm cell's time is LLVM's, which optimises the cell's own code. But a cell that loads, configures or
//! prints only calls the library, whose code is in its dylib, optimised long ago. [`is_plain`] finds such cells, and
//! the rustc [`wrapper`](crate::wrapper) compiles them at level 0: in half the time.
//!
//! In doubt a cell is not plain, for level 0 is ten times slower where time is spent. So a plain cell has no closure, and
//! no loop unless each turn prints; and it names nothing but the library and a little of std. What a user wrote is
//! compiled anew in each cell that uses it, at that cell's level, and what another crate has may be generic. What is left
//! runs once, over data that is in memory: of candle's generic functions, with 50 million numbers each, one took 0.2 s
//! longer at level 0 (`Tensor::arange`), and none of the others did.

use ra_ap_syntax::ast::{self, AstNode, HasLoopBody, HasName};
use ra_ap_syntax::{Edition, SourceFile, SyntaxKind, SyntaxNode};

use crate::api::Member;
use crate::scope::{Scope, qualifier_of};
use crate::{std_names, syntax};

const FUNCTIONS: [&str; 9] =
    ["Some", "None", "Ok", "Err", "drop", "Default::default", "String::new", "String::from", "Box::new"];
/// Methods of collections that take no time that grows with them.
const METHODS: [&str; 5] = ["enumerate", "first", "get", "iter", "last"];
/// Types of std whose methods take next to no time.
const QUICK: [&str; 5] = ["Option", "Result", "String", "Path", "f64"];
/// Crates whose code is in a dylib, and those of std.
const COMPILED: [&str; 5] = ["qlora_nb", "candle_core", "std", "core", "alloc"];

/// Whether a cell does nothing that optimising could speed up.
pub(crate) fn is_plain(scope: &Scope, code: &str) -> bool {
    let Some(list) = parse(code) else { return false };
    let is_item = |node: &SyntaxNode| ast::Item::can_cast(node.kind());
    let names = |node: &SyntaxNode| node.children().find_map(ast::Name::cast).map(|name| name.text().to_string());
    // Items of the cell itself do nothing until they are used.
    let own = list.syntax().children().filter(is_item).filter_map(|item| names(&item));
    let items: Vec<String> = own.chain(scope.items.iter().map(|item| item.path.clone())).collect();
    let variables = list.syntax().descendants().filter_map(ast::IdentPat::cast);
    let variables = variables.filter_map(|pattern| Some(pattern.name()?.text().to_string())).collect();
    let cell = PlainCell { scope, items, variables };
    list.syntax()
        .children()
        .filter(|node| !is_item(node))
        .flat_map(|node| node.descendants())
        .all(|node| cell.is_plain(&node))
}

/// The statements, with the macros that are known here as calls of functions: what stands in their brackets is then
/// parsed, too. None if something does not parse.
fn parse(code: &str) -> Option<ast::StmtList> {
    let mut text = syntax::as_function(code);
    loop {
        let file = SourceFile::parse(&text, Edition::Edition2024);
        if !file.errors().is_empty() {
            return None;
        }
        let root = file.syntax_node();
        let known = root.descendants().filter_map(ast::MacroCall::cast).find(|call| is_macro(call.path()));
        match known {
            Some(call) => text = syntax::as_a_call(&text, &call)?,
            None => return syntax::statements_in(&root).filter(|_| root.children().count() == 1),
        }
    }
}

fn is_macro(path: Option<ast::Path>) -> bool {
    path.is_some_and(|path| std_names::macros().any(|(name, _)| path.syntax().text() == name.trim_end_matches('!')))
}

struct PlainCell<'a> {
    scope: &'a Scope<'a>,
    /// Names of items of this cell and of earlier ones.
    items: Vec<String>,
    /// Names of the cell's own variables. What they hold is plain if the whole cell is.
    variables: Vec<String>,
}

impl PlainCell<'_> {
    /// Whether a node is, but for what is inside it.
    fn is_plain(&self, node: &SyntaxNode) -> bool {
        match node.kind() {
            SyntaxKind::FOR_EXPR => ast::ForExpr::cast(node.clone()).is_some_and(prints),
            SyntaxKind::WHILE_EXPR | SyntaxKind::LOOP_EXPR => false,
            SyntaxKind::CLOSURE_EXPR | SyntaxKind::MACRO_CALL => false,
            kind if ast::Item::can_cast(kind) => false,
            SyntaxKind::PATH_EXPR | SyntaxKind::RECORD_EXPR => {
                node.children().find_map(ast::Path::cast).is_some_and(|path| self.is_known(path))
            }
            SyntaxKind::METHOD_CALL_EXPR => {
                ast::MethodCallExpr::cast(node.clone()).is_some_and(|call| self.is_method(&call))
            }
            _ => true,
        }
    }

    /// A variable, or something that the library or std has.
    fn is_known(&self, path: ast::Path) -> bool {
        let name = path.syntax().text().to_string();
        if self.items.contains(&name) {
            return false;
        }
        if let Some((_, ty)) = self.scope.variables.iter().find(|(variable, _)| *variable == name) {
            return self.is_compiled(ty);
        }
        let owner = qualifier_of(&path).unwrap_or_else(|| name.clone());
        self.variables.contains(&name)
            || FUNCTIONS.contains(&name.as_str())
            || self.scope.item(&owner).is_some_and(|_| !self.items.contains(&owner))
            || is_macro(Some(path))
    }

    /// Whether a type is made of the library's and std's alone.
    fn is_compiled(&self, ty: &str) -> bool {
        let mut paths = ty.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
        paths.all(|path| {
            let is_of_user = self.items.iter().any(|item| item == path);
            !is_of_user && path.split_once("::").is_none_or(|(krate, _)| COMPILED.contains(&krate))
        })
    }

    /// Whether a method is the library's, or a quick one of std. A range with a method is a loop.
    fn is_method(&self, call: &ast::MethodCallExpr) -> bool {
        let Some(name) = call.name_ref().map(|name| name.text().to_string()) else { return false };
        let receiver = call.receiver();
        let is_range = receiver
            .is_some_and(|receiver| receiver.syntax().descendants().any(|node| ast::RangeExpr::can_cast(node.kind())));
        let has_it = |member: &Member| member.name == name;
        let is_std = || {
            METHODS.contains(&name.as_str())
                || QUICK.iter().any(|ty| std_names::members(ty, &[], "").iter().any(has_it))
        };
        !is_range && (self.scope.api.items.iter().flat_map(|item| &item.members).any(has_it) || is_std())
    }
}

/// Whether each turn of a loop prints, which costs more than all else in it.
fn prints(each: ast::ForExpr) -> bool {
    let body = each.loop_body().and_then(|body| body.stmt_list());
    let mut statements = body.into_iter().flat_map(|list| list.syntax().children());
    statements.any(|statement| ["print", "eprint"].iter().any(|name| statement.text().to_string().starts_with(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Api, Item, Member};
    use crate::scope::testing;

    /// The small library of [`testing`], with a few functions of which some compute where they are called.
    fn api() -> Api {
        let mut api = testing::api();
        api.items.push(Item {
            path: "qlora_nb::Tensor".into(),
            kind: "struct".into(),
            signature: "struct Tensor".into(),
            members: vec![
                Member::simple(
                    "zeros",
                    "function",
                    "fn zeros<S: Into<Shape>>(shape: S) -> Result<Self>",
                    "Result<Tensor>",
                ),
                Member::simple(
                    "arange",
                    "function",
                    "fn arange<D: WithDType>(end: D) -> Result<Self>",
                    "Result<Tensor>",
                ),
                Member::simple(
                    "to_vec1",
                    "method",
                    "fn to_vec1<S: WithDType>(&self) -> Result<Vec<S>>",
                    "Result<Vec<S>>",
                ),
                Member::simple("save", "method", "fn save(&self, path: impl AsRef<Path>) -> Result<()>", "Result<()>"),
                Member::simple("map", "method", "fn map(&self, f: impl FnMut(f32) -> f32) -> Self", "Tensor"),
                Member::simple("clone", "method", "fn clone(&self) -> Tensor", "Tensor"),
                Member::simple("sum", "method", "fn sum(&self) -> Result<Self>", "Result<Tensor>"),
                Member::simple(
                    "names",
                    "method",
                    "fn names(&self) -> Vec<(String, TrainOutput)>",
                    "Vec<(String, TrainOutput)>",
                ),
            ],
            ..Default::default()
        });
        let prelude = api.modules.entry("qlora_nb::prelude".into()).or_default();
        prelude.insert("Tensor".into(), "qlora_nb::Tensor".into());
        api
    }

    fn check(cells: &[&str], expected: bool) {
        let variables = [
            ("trainer", "qlora_nb::trainer::Trainer"),
            ("t", "qlora_nb::Tensor"),
            ("rate", "f64"),
            ("text", "std::string::String"),
            ("numbers", "Vec<f64>"),
            ("matrix", "alloc::vec::Vec<Matrix>"),
            ("foreign", "alloc::vec::Vec<ndarray::Array1<f64>>"),
        ];
        let variables = variables.map(|(name, ty)| (name.to_owned(), ty.to_owned()));
        let items = ["work", "Matrix"].map(Item::import);
        let api = api();
        let scope = Scope { api: &api, variables: &variables, items: &items, ask: &|_| None };
        for cell in cells {
            assert_eq!(is_plain(&scope, cell), expected, "{cell}");
        }
    }

    #[test]
    fn cells_that_only_call_the_library_are_plain() {
        check(
            &[
                "",
                "// a note\nuse qlora_nb::prelude::*;",
                "let trainer = Trainer::new(&t)?;",
                "let out = trainer.train_steps(3)?;\nprintln!(\"loss {:.3} at {rate}, {{}}\", out.loss);\nout",
                "let zeros = Tensor::zeros((2, 3))?; zeros.save(&text)?;",
                "let a = TrainingArguments { learning_rate: -1e-4, optim: Optim::Adam, ..Default::default() };",
                "let s = if rate > 0.5 { t.sum()? } else { t.clone() };",
                "if let Some(last) = trainer.train().ok() { println!(\"{}\", last.loss * 2.0) }",
                "match trainer.train() { Ok(out) => out.loss, Err(error) => panic!(\"{error}\") }",
                "let modules: Modules = [\"query_key_value\"].into();",
                "assert_eq!(text.len(), 3, \"{}\", vec![\"a\", \"b\"][0]);",
                "for (name, out) in t.names() { println!(\"{name} {}\", out.loss); }",
                "for out in trainer.history.iter().enumerate() {\n    let loss = 1;\n    println!(\"{loss} {out:?}\");\n}",
                "if let Some(last) = trainer.history.first() { println!(\"{}\", last.loss * 2.0) }",
                // Once, over data that is in memory.
                "let a = Tensor::arange(1000000u32)?;\na.to_vec1::<f32>()?",
                "println!(\"{numbers:?}\");",
                "let numbers = 1;",
                // Defined, and not called.
                "fn more(n: usize) -> usize { (0..n).sum() }\nstruct Point { x: f64 }",
            ],
            true,
        );
    }

    #[test]
    fn cells_that_may_compute_are_not() {
        check(
            &[
                "loop {}",
                "while rate < 0.5 {}",
                "for i in 0..1000 { t.sum()?; }",
                // Not each turn prints.
                "for i in 0..1000 { if i > 990 { println!(\"{i}\"); } }",
                "for i in 0..1000 { for j in 0..1000 { t.sum()?; } println!(\"{i}\"); }",
                "let f = |x: f64| x * 2.0;",
                "let r = t.map(|x| x + 1.0);",
                "let r = t.map(f64::sqrt);",
                "(0..1000).sum::<u64>()",
                "let v = (0..9).collect::<Vec<_>>();",
                "let big = vec![0.0; 100000];",
                "println!(\"{}\", (0..1000).map(|i| i * i).sum::<u64>());",
                "trainer.history.iter().map(work)",
                "trainer.history.sort()",
                // Of the user's own types and functions, of this cell or of others, and of other crates.
                "work()",
                "let f = work;",
                "println!(\"{}\", work());",
                "println!(\"{}\", matrix);",
                "matrix.clone()",
                "foreign.clone()",
                "ndarray::Array2::zeros((2, 2))",
                "fn more() -> u64 { (0..9).sum() }\nmore()",
                "struct Point; impl Point { fn heavy() {} }\nPoint::heavy();",
                "std::thread::sleep(x)",
                "my_macro!(t)",
                "let a = ;",
                "}} not rust {{",
                "} fn hidden() { loop {}",
            ],
            false,
        );
    }
}
