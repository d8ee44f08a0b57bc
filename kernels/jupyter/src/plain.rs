//! Cells that no optimising can speed up, and which are therefore compiled without it.
//!
//! Most of a warm cell's time is LLVM's, which optimises the cell's own code. But a cell that loads, configures or
//! prints only calls the library, whose code is in its dylib, optimised long ago. [`is_plain`] finds such cells, and
//! [`Mark`] tells the rustc wrapper of them, which compiles them at level 0: in half the time.
//!
//! In doubt a cell is not plain. Level 0 is ten times slower where time is spent, and generic code of the standard
//! library or of candle is compiled within the cell that calls it: so plain is only what calls the library's own
//! functions, and the cheapest methods of std, on values that are the library's, and never in a loop, unless each turn
//! prints, which costs more than all else in it. Functions of earlier cells are compiled anew in each cell that uses
//! them, at its level: so whoever uses one is not plain.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ra_ap_syntax::ast::{self, AstNode, HasArgList, HasGenericParams, HasLoopBody, HasName};
use ra_ap_syntax::{AstToken, Edition, SourceFile, SyntaxKind, SyntaxNode};

use crate::api::last_segment;
use crate::scope::{Scope, as_a_call, peeled, qualifier_of, without_generics};
use crate::types;

const BEFORE: &str = "fn cell() {";
const PRINTS: [&str; 4] = ["println", "print", "eprintln", "eprint"];
const MACROS: [&str; 6] = ["format", "vec", "assert", "assert_eq", "assert_ne", "panic"];
const FUNCTIONS: [&str; 8] =
    ["Some", "Ok", "Err", "drop", "Default::default", "String::new", "String::from", "Box::new"];
/// Methods of std that take no time that grows with what they are called on.
const METHODS: [&str; 23] = [
    "as_deref",
    "as_mut",
    "as_ref",
    "as_str",
    "display",
    "enumerate",
    "err",
    "expect",
    "first",
    "get",
    "into",
    "is_empty",
    "is_err",
    "is_none",
    "is_ok",
    "is_some",
    "iter",
    "len",
    "ok",
    "to_owned",
    "to_string",
    "unwrap",
    "unwrap_or",
];
/// Bounds of type parameters that stand for ways to write an argument. Generic code over others may compute.
const WAYS_TO_WRITE: [&str; 12] = [
    "AsRef",
    "Into",
    "Dim",
    "Dims",
    "Display",
    "RangeBounds",
    "Send",
    "ShapeWithOneHole",
    "Sync",
    "TensorOrScalar",
    "ToUsize2",
    "TrainerCallback",
];
const SCALARS: [&str; 16] = [
    "bool", "char", "f32", "f64", "i8", "i16", "i32", "i64", "isize", "str", "u8", "u16", "u32", "u64", "usize",
    "String",
];

/// Whether a cell does nothing that optimising could speed up.
pub(crate) fn is_plain(scope: &Scope, code: &str) -> bool {
    let Some(list) = parse(code) else { return false };
    let cell = PlainCell { scope, bound: bound_in(list.syntax()) };
    // Items of the cell itself do nothing until they are used.
    let own = list.syntax().children().filter(|node| ast::Item::can_cast(node.kind()));
    let own: Vec<String> = own.filter_map(|item| name_of_item(&item)).collect();
    let is_item = |name: &str| own.iter().chain(scope.items).any(|item| item == name);
    let parts = list.syntax().children().filter(|node| !ast::Item::can_cast(node.kind()));
    let names = parts.flat_map(|node| node.descendants_with_tokens()).filter_map(|element| element.into_token());
    let mut names = names.filter(|token| token.kind() == SyntaxKind::IDENT);
    // The old value of a variable that is bound anew is cloned and dropped in the cell.
    let replaced_are_plain =
        cell.bound.iter().all(|name| cell.of_earlier_cell(name).is_none_or(|ty| cell.is_plain_type(ty)));
    replaced_are_plain && !names.any(|token| is_item(token.text())) && cell.statements(&list)
}

/// The statements, with the macros that are known here as calls of functions: what stands in their brackets is then
/// parsed, too. None if something does not parse.
fn parse(code: &str) -> Option<ast::StmtList> {
    let mut text = format!("{BEFORE}{}\n}}", &code[types::rust_begins(code)..]);
    loop {
        let file = SourceFile::parse(&text, Edition::Edition2024);
        if !file.errors().is_empty() {
            return None;
        }
        let root = file.syntax_node();
        let list = root.children().find_map(ast::Fn::cast)?.body()?.stmt_list()?;
        let is_known = |call: &ast::MacroCall| {
            let name = call.path().map(|path| path.syntax().text().to_string()).unwrap_or_default();
            PRINTS.contains(&name.as_str()) || MACROS.contains(&name.as_str())
        };
        match list.syntax().descendants().filter_map(ast::MacroCall::cast).find(is_known) {
            Some(call) => text = as_a_call(&text, &call)?,
            None => return (root.children().count() == 1).then_some(list),
        }
    }
}

fn bound_in(node: &SyntaxNode) -> Vec<String> {
    let bound = node.descendants().filter_map(ast::IdentPat::cast);
    bound.filter_map(|pattern| Some(pattern.name()?.text().to_string())).collect()
}

fn name_of_item(item: &SyntaxNode) -> Option<String> {
    Some(item.children().find_map(ast::Name::cast)?.text().to_string())
}

struct PlainCell<'a> {
    scope: &'a Scope<'a>,
    /// Names of the cell's own variables. What they hold is plain if the whole cell is.
    bound: Vec<String>,
}

impl PlainCell<'_> {
    fn of_earlier_cell(&self, variable: &str) -> Option<&str> {
        self.scope.variables.iter().find(|(name, _)| name == variable).map(|(_, ty)| ty.as_str())
    }

    /// The library's, or a scalar or a text.
    fn is_plain_type(&self, ty: &str) -> bool {
        let ty = peeled(ty);
        let name = last_segment(ty);
        let is_of_user = self.scope.items.iter().any(|item| item == name);
        !is_of_user && !ty.contains('<') && (SCALARS.contains(&name) || self.scope.item(ty).is_some())
    }

    fn is_plain_variable(&self, name: &str) -> bool {
        self.bound.iter().any(|bound| bound == name)
            || self.of_earlier_cell(name).is_some_and(|ty| self.is_plain_type(ty))
    }

    fn statements(&self, list: &ast::StmtList) -> bool {
        let all = list.statements().all(|statement| match statement {
            ast::Stmt::LetStmt(statement) => {
                let otherwise = statement.let_else().and_then(|branch| branch.block_expr());
                statement.initializer().is_none_or(|value| self.expr(&value))
                    && otherwise.is_none_or(|block| self.block(&block))
            }
            ast::Stmt::ExprStmt(statement) => statement.expr().is_none_or(|expr| self.expr(&expr)),
            ast::Stmt::Item(_) => true,
        });
        all && self.maybe(list.tail_expr())
    }

    fn block(&self, block: &ast::BlockExpr) -> bool {
        block.modifier().is_none() && block.stmt_list().is_some_and(|list| self.statements(&list))
    }

    fn maybe(&self, expr: Option<ast::Expr>) -> bool {
        expr.is_none_or(|expr| self.expr(&expr))
    }

    fn arguments(&self, call: &impl HasArgList) -> bool {
        call.arg_list().is_some_and(|list| list.args().all(|argument| self.expr(&argument)))
    }

    fn expr(&self, expr: &ast::Expr) -> bool {
        match expr {
            ast::Expr::Literal(_) => true,
            ast::Expr::PathExpr(path) => path.path().is_some_and(|path| self.path(&path)),
            ast::Expr::CallExpr(call) => self.call(call),
            ast::Expr::MethodCallExpr(call) => self.method_call(call),
            ast::Expr::FieldExpr(field) => self.maybe(field.expr()),
            ast::Expr::TryExpr(inner) => self.maybe(inner.expr()),
            ast::Expr::RefExpr(inner) => self.maybe(inner.expr()),
            ast::Expr::ParenExpr(inner) => self.maybe(inner.expr()),
            ast::Expr::PrefixExpr(inner) => self.maybe(inner.expr()),
            ast::Expr::CastExpr(inner) => self.maybe(inner.expr()),
            ast::Expr::LetExpr(inner) => self.maybe(inner.expr()),
            ast::Expr::BinExpr(binary) => self.maybe(binary.lhs()) && self.maybe(binary.rhs()),
            ast::Expr::IndexExpr(index) => self.maybe(index.base()) && self.maybe(index.index()),
            ast::Expr::RangeExpr(range) => range.syntax().children().filter_map(ast::Expr::cast).all(|e| self.expr(&e)),
            ast::Expr::TupleExpr(tuple) => tuple.fields().all(|field| self.expr(&field)),
            // `[0.0; n]` fills memory.
            ast::Expr::ArrayExpr(array) => array.semicolon_token().is_none() && array.exprs().all(|e| self.expr(&e)),
            ast::Expr::RecordExpr(record) => {
                let fields = record.record_expr_field_list();
                record.path().is_some_and(|path| self.library_item(&path))
                    && fields.is_some_and(|list| {
                        list.fields().all(|field| self.maybe(field.expr())) && self.maybe(list.spread())
                    })
            }
            ast::Expr::IfExpr(branches) => {
                branches.syntax().children().filter_map(ast::Expr::cast).all(|part| self.expr(&part))
            }
            ast::Expr::BlockExpr(block) => self.block(block),
            ast::Expr::ForExpr(each) => {
                self.maybe(each.iterable()) && each.loop_body().is_some_and(|body| self.block(&body) && prints(&body))
            }
            _ => false,
        }
    }

    fn path(&self, path: &ast::Path) -> bool {
        let text = path.syntax().text().to_string();
        text == "None" || self.is_plain_variable(&text) || self.library_item(path)
    }

    /// A type, a variant, a constant or a function of the library.
    fn library_item(&self, path: &ast::Path) -> bool {
        let text = path.syntax().text().to_string();
        let member = || {
            let qualifier = qualifier_of(path)?;
            let name = path.segment()?.name_ref()?.text().to_string();
            let item = self.scope.item(&qualifier)?;
            Some(item.member(&name)?.signature.clone())
        };
        match member() {
            Some(signature) => only_ways_to_write(&signature),
            None => self.scope.item(&text).is_some_and(|item| only_ways_to_write(&item.signature)),
        }
    }

    fn call(&self, call: &ast::CallExpr) -> bool {
        let Some(ast::Expr::PathExpr(callee)) = call.expr() else { return false };
        let Some(path) = callee.path() else { return false };
        let name = path.syntax().text().to_string();
        let is_print = PRINTS.contains(&name.as_str()) || MACROS.contains(&name.as_str());
        let is_known = is_print || FUNCTIONS.contains(&name.as_str()) || self.library_item(&path);
        is_known && self.arguments(call) && (!is_print || self.captures(call))
    }

    /// Whether the variables are plain that a format names, `"{loss:.3}"`.
    fn captures(&self, call: &ast::CallExpr) -> bool {
        let tokens = call.syntax().descendants_with_tokens().filter_map(|element| element.into_token());
        tokens.filter_map(ast::String::cast).all(|text| {
            let text = text.syntax().text().to_owned();
            let named = text.split('{').skip(1).map(|rest| rest.split(['}', ':']).next().unwrap_or_default());
            let is_name = |name: &&str| name.starts_with(|c: char| c.is_alphabetic() || c == '_');
            // `{:>width$}` names one, too.
            !text.contains('$') && named.filter(is_name).all(|name| self.is_plain_variable(name))
        })
    }

    fn method_call(&self, call: &ast::MethodCallExpr) -> bool {
        let (Some(receiver), Some(name)) = (call.receiver(), call.name_ref()) else { return false };
        if !self.expr(&receiver) || !self.arguments(call) {
            return false;
        }
        let name = name.text().to_string();
        let ty = self.scope.type_of(&receiver);
        let item = ty.and_then(|ty| self.scope.api.type_at(&without_generics(peeled(&ty))));
        match item.and_then(|item| item.member(&name)) {
            Some(member) => only_ways_to_write(&member.signature),
            None => METHODS.contains(&name.as_str()),
        }
    }
}

/// Whether each turn of a loop prints.
fn prints(body: &ast::BlockExpr) -> bool {
    let Some(list) = body.stmt_list() else { return false };
    let statements = list.statements().filter_map(|statement| match statement {
        ast::Stmt::ExprStmt(statement) => statement.expr(),
        _ => None,
    });
    statements.chain(list.tail_expr()).any(|expr| {
        let ast::Expr::CallExpr(call) = expr else { return false };
        call.expr().is_some_and(|callee| PRINTS.iter().any(|print| callee.syntax().text() == *print))
    })
}

/// Whether a function has type parameters, or `impl` arguments, at most for the ways in which an argument is written.
fn only_ways_to_write(signature: &str) -> bool {
    let file = SourceFile::parse(&format!("{signature} {{}}"), Edition::Edition2024).syntax_node();
    // A field, a variant, a type.
    let Some(function) = file.children().find_map(ast::Fn::cast) else { return true };
    let parameters = function.generic_param_list().map(|list| list.syntax().clone());
    let arguments = function.param_list().map(|list| list.syntax().clone());
    let bounds = parameters.into_iter().chain(arguments).flat_map(|node| node.descendants());
    bounds.filter_map(ast::TypeBound::cast).filter_map(|bound| bound.ty()).all(|bound| {
        let bound = bound.syntax().text().to_string();
        WAYS_TO_WRITE.contains(&last_segment(bound.split(['<', '(']).next().unwrap_or_default()).trim())
    })
}

/// The file by which a session tells the rustc wrapper that the cell to come is plain.
pub struct Mark {
    file: PathBuf,
}

impl Mark {
    pub fn new(folder: &Path) -> Mark {
        Mark { file: folder.join("plain") }
    }

    /// A mark that cannot be made or taken away costs time, and nothing else.
    pub fn set(&self, is_plain: bool) {
        let _ = match is_plain {
            true => std::fs::write(&self.file, ""),
            false => std::fs::remove_file(&self.file),
        };
    }

    pub fn is_set(&self) -> bool {
        self.file.exists()
    }
}

/// Up to so many bytes of source a cell is sooner compiled as a whole than from pieces that earlier cells left; more is
/// there when earlier cells defined a dozen functions, which are compiled with each cell.
const SMALL: u64 = 12 << 10;

/// The arguments of the rustc that compiles a cell with so many bytes of source. cargo does not know of this: for another
/// profile it would give the cell's crate another identity, and with it every type that cells define.
pub fn for_a_cell(args: Vec<OsString>, source: u64, is_plain: bool) -> Vec<OsString> {
    let mut adapted: Vec<OsString> = Vec::with_capacity(args.len());
    for arg in args {
        match arg.to_str().and_then(|text| text.split_once('=')) {
            Some(("opt-level", _)) if is_plain => adapted.push("opt-level=0".into()),
            Some(("codegen-units", _)) => adapted.push("codegen-units=1".into()),
            Some(("incremental", _)) if source <= SMALL && adapted.last().is_some_and(|flag| flag == "-C") => {
                adapted.pop();
            }
            // What one level leaves there is of no use to the other, which would throw it away.
            Some(("incremental", folder)) if is_plain => adapted.push(format!("incremental={folder}-plain").into()),
            _ => adapted.push(arg),
        }
    }
    adapted
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
            ("matrix", "Matrix"),
        ];
        let variables = variables.map(|(name, ty)| (name.to_owned(), ty.to_owned()));
        let items = ["work".to_owned(), "Matrix".to_owned()];
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
                "if let Some(last) = trainer.history.first() { println!(\"{}\", last.loss * 2.0) }",
                "for (name, out) in t.names() { println!(\"{name} {}\", out.loss); }",
                "for out in trainer.history.iter().enumerate() {\n    let loss = 1;\n    println!(\"{loss} {out:?}\");\n}",
                "assert_eq!(trainer.history.len(), 3, \"{}\", vec![\"a\", \"b\"].len());",
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
                "(0..1000).sum::<u64>()",
                "let v = (0..9).collect::<Vec<_>>();",
                "let big = [0.0; 100000];",
                "let big = vec![0.0; 100000];",
                "println!(\"{}\", (0..1000).map(|i| i * i).sum::<u64>());",
                "trainer.history.iter().map(work)",
                "trainer.history.sort()",
                "let a = Tensor::arange(1000000u32)?;",
                "t.to_vec1::<f32>()?",
                // Of the user's own types and functions, of this cell or of others.
                "work()",
                "let f = work;",
                "println!(\"{}\", work());",
                "println!(\"{matrix}\");",
                "matrix.clone()",
                "numbers.len()",
                "println!(\"{numbers:?}\");",
                "println!(\"{:>1$}\", 1, rate);",
                "let numbers = 1;",
                "fn more() -> u64 { (0..9).sum() }\nmore()",
                "struct Point; impl Point { fn heavy() {} }\nPoint::heavy();",
                "std::thread::sleep(x)",
                "unsafe { t.sum()? }",
                "my_macro!(t)",
                "let a = ;",
                "}} not rust {{",
                "} fn hidden() { loop {}",
            ],
            false,
        );
    }

    #[test]
    fn what_changes_for_rustc() {
        let args = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let cargos =
            "rustc --crate-name ctx -C opt-level=2 -C codegen-units=16 -C metadata=a1 -C incremental=/tmp/i -L x=/y";
        let small = "rustc --crate-name ctx -C opt-level=2 -C codegen-units=1 -C metadata=a1 -L x=/y";
        assert_eq!(for_a_cell(args(cargos), 100, false), args(small));
        assert_eq!(for_a_cell(args(cargos), 100, true), args(&small.replace("level=2", "level=0")));
        let large = cargos.replace("units=16", "units=1");
        assert_eq!(for_a_cell(args(cargos), 1 << 20, false), args(&large));
        let plain = large.replace("level=2", "level=0").replace("/tmp/i", "/tmp/i-plain");
        assert_eq!(for_a_cell(args(cargos), 1 << 20, true), args(&plain));
    }

    #[test]
    fn a_mark_is_seen_until_it_is_taken_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let seen = || Mark::new(folder.path()).is_set();
        let mark = Mark::new(folder.path());
        mark.set(false);
        assert!(!seen());
        mark.set(true);
        assert!(seen());
        mark.set(false);
        assert!(!seen());
    }
}
