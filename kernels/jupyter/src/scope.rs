//! The names that a cell sees and the types that its expressions have, as far as they can be told without compiling.
//!
//! A notebook's expressions are mostly chains of the library's own calls, `trainer.train()?.`, whose types the index
//! knows; this is answered at once. What is left goes to rustc, through `ask`, which takes its time.

use std::collections::{BTreeMap, HashMap};

use ra_ap_syntax::ast::{self, AstNode, HasArgList, HasGenericParams, HasLoopBody, HasName, HasTypeBounds};
use ra_ap_syntax::{Edition, SyntaxKind, SyntaxNode, SyntaxToken, TextRange};

use crate::api::{Api, Item, Member, last_segment};
use crate::{std_names, syntax};

/// What earlier cells defined.
#[derive(Clone, Default)]
pub struct Names {
    /// Variables and their types.
    pub variables: Vec<(String, String)>,
    /// Functions, types and other items.
    pub items: Vec<Item>,
}

impl Names {
    pub fn has_variable(&self, name: &str) -> bool {
        self.variables.iter().any(|(known, _)| known == name)
    }
}

/// What a cell sees.
pub(crate) struct Scope<'a> {
    pub api: &'a Api,
    /// Variables of earlier cells, with the types as rustc writes them.
    pub variables: &'a [(String, String)],
    /// Functions, types and other items of cells.
    pub items: &'a [Item],
    /// The type of an expression, from rustc. One that needs the cell's own variables comes as a block that begins
    /// with the statements before it: it is to be checked, never run.
    pub ask: &'a dyn Fn(&str) -> Option<String>,
}

/// A parsed cell and a token in it.
pub(crate) struct Cell {
    code: String,
    root: SyntaxNode,
    pub token: SyntaxToken,
    /// Where the cursor is, in the cell.
    cursor: usize,
}

/// Where in the grammar a name stands.
pub(crate) enum Place {
    /// Behind `receiver.`
    MemberOf(ast::Expr),
    /// Behind `qualifier::`
    Path(String),
    /// A field's name in a struct literal.
    FieldIn(ast::RecordExpr),
    /// A name that is being invented: of a variable, a function.
    NewName,
    Plain,
}

const MADE_UP: &str = "qloraNbCursor";

impl Cell {
    /// Parses with a made-up name at the cursor, which becomes a part of the name that is being typed.
    pub fn with_name_at(code: &str, cursor: usize) -> Option<Cell> {
        let with = format!("{}{MADE_UP}{}", &code[..cursor], &code[cursor..]);
        Cell::parse(code, &with, cursor, cursor)
    }

    /// Parses, and takes the token at an offset.
    pub fn token_at(code: &str, at: usize) -> Option<Cell> {
        Cell::parse(code, code, at, at)
    }

    fn parse(code: &str, parsed: &str, at: usize, cursor: usize) -> Option<Cell> {
        if at < syntax::rust_begins(parsed) {
            return None;
        }
        let offset = syntax::place_in_function(at)?;
        let mut text = syntax::as_function(parsed);
        loop {
            let file = syntax::parse(&text);
            // To the right, where two meet: there is the made-up name, or the name on which the cursor stands.
            let token = file.token_at_offset(offset).right_biased()?;
            // What stands in a macro's brackets is parsed as the arguments of a call.
            let trees = token.parent_ancestors().filter(|node| node.kind() == SyntaxKind::TOKEN_TREE);
            let outermost =
                trees.filter(|tree| tree.parent().is_some_and(|node| ast::MacroCall::can_cast(node.kind())));
            let Some(call) = outermost.last().and_then(|tree| tree.parent()).and_then(ast::MacroCall::cast) else {
                return Some(Cell { code: code.to_owned(), root: file, token, cursor });
            };
            text = syntax::as_a_call(&text, &call)?;
        }
    }

    /// Where the token begins, in the cell.
    pub fn token_start(&self) -> usize {
        syntax::place_in_cell(self.token.text_range().start())
    }

    /// What is typed of the name at the cursor.
    pub fn prefix(&self) -> &str {
        let is_name = self.token.kind() == SyntaxKind::IDENT || self.token.kind().is_keyword(Edition::Edition2024);
        self.code.get(self.token_start()..self.cursor).filter(|_| is_name).unwrap_or_default()
    }

    /// An expression that stands before the cursor, with the statements of the cell that stand before it.
    fn question(&self, expr: &ast::Expr) -> Option<String> {
        let code = |from: TextRange, to: TextRange| {
            self.code.get(syntax::place_in_cell(from.start())..syntax::place_in_cell(to.end()))
        };
        let range = expr.syntax().text_range();
        let text = code(range, range)?;
        let before = syntax::statements_in(&self.root)?.statements().map(|statement| statement.syntax().text_range());
        let before: Vec<_> = before.take_while(|statement| statement.end() <= range.start()).collect();
        let (Some(first), Some(last)) = (before.first(), before.last()) else { return Some(text.to_owned()) };
        Some(format!("{{\n{}\n{text}\n}}", code(*first, *last)?))
    }

    pub fn place(&self) -> Place {
        let Some(name) = self.token.parent() else { return Place::Plain };
        let Some(parent) = name.parent() else { return Place::Plain };
        if ast::Name::can_cast(name.kind()) {
            return Place::NewName;
        }
        let receiver = ast::MethodCallExpr::cast(parent.clone()).and_then(|call| call.receiver());
        let receiver = receiver.or_else(|| ast::FieldExpr::cast(parent.clone()).and_then(|field| field.expr()));
        if let Some(receiver) = receiver {
            return Place::MemberOf(receiver);
        }
        let path = ast::PathSegment::cast(parent.clone()).map(|segment| segment.parent_path());
        if let Some(qualifier) = path.as_ref().and_then(qualifier_of) {
            return Place::Path(qualifier);
        }
        // `Literal { name: value }` holds the name, `Literal { name }` an expression of it.
        let field = parent.ancestors().take(4).find_map(ast::RecordExprField::cast);
        let is_its_name = |field: &ast::RecordExprField| {
            field.name_ref().is_none_or(|named| named.syntax().text_range() == name.text_range())
        };
        let is_alone =
            path.is_none_or(|path| path.syntax().parent().is_some_and(|node| ast::PathExpr::can_cast(node.kind())));
        match field.filter(|field| is_its_name(field) && is_alone) {
            Some(field) => {
                field.syntax().ancestors().find_map(ast::RecordExpr::cast).map_or(Place::Plain, Place::FieldIn)
            }
            None => Place::Plain,
        }
    }

    /// Variables that the cell binds before the cursor.
    pub fn local_names(&self) -> Vec<String> {
        let end = self.token.text_range().start();
        let bound = self.root.descendants().filter_map(ast::IdentPat::cast);
        let before = bound.filter(|pattern| pattern.syntax().text_range().end() <= end);
        let mut names: Vec<String> = before.filter_map(|pattern| Some(pattern.name()?.text().to_string())).collect();
        names.sort();
        names.dedup();
        names
    }
}

/// What stands before the last `::` of a path, with the paths of `use a::{b::{` around it.
pub(crate) fn qualifier_of(path: &ast::Path) -> Option<String> {
    let own = path.qualifier().map(|qualifier| without_generics(&qualifier.syntax().text().to_string()));
    let trees = path.syntax().ancestors().filter_map(ast::UseTree::cast).skip(1);
    let mut parts: Vec<String> = own.into_iter().collect();
    parts.extend(trees.filter_map(|tree| Some(tree.path()?.syntax().text().to_string())));
    parts.reverse();
    Some(parts.join("::")).filter(|qualifier| !qualifier.is_empty())
}

pub(crate) fn without_generics(path: &str) -> String {
    let end = path.find('<').unwrap_or(path.len());
    path[..end].trim_end_matches("::").trim().to_owned()
}

/// A type without references and pointers: methods are looked up through them.
pub(crate) fn peeled(ty: &str) -> &str {
    let mut ty = ty.trim();
    loop {
        let before = ty;
        ty = ty.trim_start_matches('&').trim_start();
        if ty.starts_with('\'') {
            ty = ty.split_once(' ').map_or("", |(_, rest)| rest);
        }
        ty = ty.strip_prefix("mut ").or(ty.strip_prefix("dyn ")).unwrap_or(ty).trim_start();
        if matches!(head(ty), "Box" | "Arc" | "Rc") {
            ty = arguments(ty).first().copied().unwrap_or(ty);
        }
        if ty == before {
            return ty;
        }
    }
}

/// The last name of a type's path: `Vec` of `alloc::vec::Vec<T>`.
fn head(ty: &str) -> &str {
    last_segment(ty.split('<').next().unwrap_or(ty)).trim()
}

/// The arguments of a generic type, or the parts of a tuple.
fn arguments(ty: &str) -> Vec<&str> {
    let inside = match ty.strip_prefix('(') {
        Some(tuple) => tuple.strip_suffix(')'),
        None => ty.split_once('<').and_then(|(_, rest)| rest.strip_suffix('>')),
    };
    let Some(inside) = inside else { return Vec::new() };
    let mut found = Vec::new();
    let (mut depth, mut begin, mut before) = (0, 0, ' ');
    for (at, c) in inside.char_indices() {
        match c {
            '<' | '(' | '[' => depth += 1,
            '>' if before == '-' => {}
            '>' | ')' | ']' => depth -= 1,
            ',' if depth == 0 => {
                found.push(inside[begin..at].trim());
                begin = at + 1;
            }
            _ => {}
        }
        before = c;
    }
    found.push(inside[begin..].trim());
    found.retain(|part| !part.is_empty() && !part.starts_with('\''));
    found
}

/// What an iterator over the type yields, as far as that is plain.
fn element(ty: &str) -> Option<String> {
    let ty = peeled(ty);
    if let Some(inside) = ty.strip_prefix('[') {
        return Some(inside.trim_end_matches(']').split(';').next().unwrap_or_default().trim().to_owned());
    }
    match head(ty) {
        "Vec" | "Option" | "VecDeque" | "HashSet" | "BTreeSet" | "Iter" | "IterMut" | "IntoIter" | "Range" => {
            arguments(ty).first().map(|ty| (*ty).to_owned())
        }
        "HashMap" | "BTreeMap" => Some(format!("({})", arguments(ty).get(..2)?.join(", "))),
        _ => None,
    }
}

impl Scope<'_> {
    /// The module at a path: whole, behind the prelude, or imported by its last name.
    pub fn module(&self, path: &str) -> Option<&BTreeMap<String, String>> {
        let modules = &self.api.modules;
        // A type of that name goes first: `pipeline` is both a module and a function.
        modules.get(path).or_else(|| {
            let end = format!("::{path}");
            self.item(path).is_none().then(|| modules.iter().find(|(name, _)| name.ends_with(&end)))?.map(|(_, m)| m)
        })
    }

    /// The item that a path means: whole, behind the prelude, or imported by its last name.
    pub fn item(&self, path: &str) -> Option<&Item> {
        let path = path.trim_start_matches("::");
        let in_module = || {
            let (module, name) = path.rsplit_once("::")?;
            self.api.item(self.api.modules.get(module)?.get(name)?)
        };
        let exact = self.own(path).or_else(|| self.api.item(path)).or_else(in_module);
        exact.or_else(|| self.api.in_prelude(path)).or_else(|| self.api.type_at(path))
    }

    /// What is known of a type.
    pub fn type_at(&self, ty: &str) -> Option<&Item> {
        let path = without_generics(peeled(ty));
        self.own(&path).or_else(|| self.api.type_at(&path))
    }

    /// What cells define under a name.
    fn own(&self, name: &str) -> Option<&Item> {
        self.items.iter().find(|item| item.path == name && item.kind != "import")
    }

    /// All that can stand behind a dot or `::` of the type.
    pub fn members_of(&self, ty: &str) -> Vec<Member> {
        let ty = peeled(ty);
        let known = self.type_at(ty).map(|item| item.members.clone());
        known.unwrap_or_else(|| std_names::members(head(ty), arguments(ty).as_slice(), ty))
    }

    pub fn member(&self, ty: &str, name: &str) -> Option<Member> {
        self.members_of(ty).into_iter().find(|member| member.name == name)
    }

    /// The types of the variables that a cell binds to what the library returns, such as `Trainer::new(..)?`, written so
    /// that any cell can name them. Whoever uses them must have rustc check them: imports can make a name mean another
    /// thing.
    pub fn variables_of(&self, code: &str) -> HashMap<String, String> {
        let lets = syntax::statements(code).into_iter().flat_map(|list| list.statements()).filter_map(|statement| {
            match statement {
                ast::Stmt::LetStmt(statement) => Some(statement),
                _ => None,
            }
        });
        lets.filter_map(|statement| {
            let ast::Pat::IdentPat(pattern) = statement.pat()? else { return None };
            Some((pattern.name()?.text().to_string(), self.nameable(&statement.initializer()?)?))
        })
        .collect()
    }

    /// The path of a struct or enum without parameters that an expression certainly has as its type.
    fn nameable(&self, expr: &ast::Expr) -> Option<String> {
        let ty = match expr {
            // What a reference borrows is all that is known of it.
            ast::Expr::RefExpr(_) => return None,
            ast::Expr::MethodCallExpr(call) if call.name_ref()?.text() == "clone" => {
                let ast::Expr::PathExpr(variable) = call.receiver()? else { return None };
                self.type_of_path(&variable.path()?)?
            }
            expr => self.type_of(expr)?,
        };
        let item = self.item(&ty).filter(|_| !ty.starts_with('&') && !ty.contains('<'))?;
        match item.path.split_once("::")?.0 {
            _ if !["struct", "enum"].contains(&item.kind.as_str()) || item.signature.contains('<') => None,
            "qlora_nb" => Some(item.path.clone()),
            // Cells know it through the library.
            "candle_core" => Some(format!("qlora_nb::{}", item.path)),
            _ => None,
        }
    }

    pub fn type_of_or_ask(&self, cell: &Cell, expr: &ast::Expr) -> Option<String> {
        self.type_of(expr).or_else(|| (self.ask)(&cell.question(expr)?))
    }

    pub fn type_of(&self, expr: &ast::Expr) -> Option<String> {
        let ty = match expr {
            ast::Expr::ParenExpr(inner) => self.type_of(&inner.expr()?)?,
            ast::Expr::RefExpr(inner) => self.type_of(&inner.expr()?)?,
            ast::Expr::TryExpr(inner) => arguments(peeled(&self.type_of(&inner.expr()?)?)).first()?.to_string(),
            ast::Expr::PathExpr(path) => self.type_of_path(&path.path()?)?,
            ast::Expr::CallExpr(call) => self.type_of_call(call)?,
            ast::Expr::MethodCallExpr(call) => {
                let receiver = self.type_of(&call.receiver()?)?;
                self.member(&receiver, call.name_ref()?.text())?.ty?
            }
            ast::Expr::FieldExpr(field) => {
                let owner = self.type_of(&field.expr()?)?;
                let name = field.syntax().last_token()?.text().to_owned();
                match name.parse::<usize>() {
                    Ok(number) if peeled(&owner).starts_with('(') => arguments(peeled(&owner)).get(number)?.to_string(),
                    _ => self.member(&owner, &name)?.ty?,
                }
            }
            ast::Expr::IndexExpr(index) => match index.index()? {
                ast::Expr::RangeExpr(_) => self.type_of(&index.base()?)?,
                _ => element(&self.type_of(&index.base()?)?)?,
            },
            ast::Expr::RecordExpr(record) => record.path()?.syntax().text().to_string(),
            ast::Expr::CastExpr(cast) => cast.ty()?.syntax().text().to_string(),
            ast::Expr::Literal(literal) => of_literal(literal.token().kind(), literal.token().text())?.to_owned(),
            ast::Expr::MacroExpr(call) => match call.macro_call()?.path()?.syntax().text().to_string().as_str() {
                "format" => "String".to_owned(),
                "vec" => "Vec<_>".to_owned(),
                _ => return None,
            },
            _ => return None,
        };
        (ty != "_" && !ty.is_empty()).then_some(ty)
    }

    /// A variable, a unit variant or a constant.
    fn type_of_path(&self, path: &ast::Path) -> Option<String> {
        let name = path.segment()?.name_ref()?.text().to_string();
        let Some(qualifier) = qualifier_of(path) else { return self.type_of_variable(&name, path.syntax()) };
        let item = self.item(&qualifier)?;
        let member = item.member(&name)?;
        if member.kind == "variant" { Some(item.path.clone()) } else { member.ty.clone() }
    }

    fn type_of_call(&self, call: &ast::CallExpr) -> Option<String> {
        let ast::Expr::PathExpr(callee) = call.expr()? else { return None };
        let path = callee.path()?;
        let name = path.segment()?.name_ref()?.text().to_string();
        if let Some(qualifier) = qualifier_of(&path)
            && self.module(&qualifier).is_none_or(|module| !module.contains_key(&name))
        {
            let owner = self.item(&qualifier).map(|item| item.path.clone()).unwrap_or(qualifier);
            let member = self.member(&owner, &name)?;
            return if member.kind == "variant" { Some(owner) } else { member.ty };
        }
        match name.as_str() {
            "format" => Some("String".to_owned()),
            // A macro's brackets were taken for a call's.
            "vec" => Some("Vec<_>".to_owned()),
            "Some" | "Ok" => {
                let inner = self.type_of(&call.arg_list()?.args().next()?)?;
                Some(format!("{}<{inner}>", if name == "Some" { "Option" } else { "Result" }))
            }
            _ => self.item(&path.syntax().text().to_string())?.ty.clone(),
        }
    }

    /// The type of a variable that is seen from a node. One of the cell hides one of an earlier cell.
    pub fn type_of_variable(&self, name: &str, from: &SyntaxNode) -> Option<String> {
        for node in from.ancestors() {
            if let Some(ty) = self.bound_by(&node, name, from) {
                return ty;
            }
        }
        self.variables.iter().find(|(known, _)| known == name).map(|(_, ty)| ty.clone())
    }

    /// None if the node binds no such name; Some(None) if the type cannot be told.
    fn bound_by(&self, node: &SyntaxNode, name: &str, from: &SyntaxNode) -> Option<Option<String>> {
        if let Some(list) = ast::StmtList::cast(node.clone()) {
            let before = |statement: &SyntaxNode| statement.text_range().end() <= from.text_range().start();
            let statements = list.statements().filter(|statement| before(statement.syntax()));
            let lets = statements.filter_map(|statement| ast::LetStmt::cast(statement.syntax().clone()));
            let binding = lets.filter(|statement| statement.pat().is_some_and(|pat| binds(&pat, name))).last()?;
            let ty = written(binding.ty()).or_else(|| self.type_of(&binding.initializer()?));
            return Some(ty.and_then(|ty| part_of(&binding.pat()?, name, ty)));
        }
        if let Some(function) = ast::Fn::cast(node.clone()) {
            let mut params = function.param_list()?.params();
            return params
                .find(|param| param.pat().is_some_and(|pat| binds(&pat, name)))
                .map(|param| written(param.ty()));
        }
        if let Some(closure) = ast::ClosureExpr::cast(node.clone()) {
            let mut params = closure.param_list()?.params().enumerate();
            let (number, param) = params.find(|(_, param)| param.pat().is_some_and(|pat| binds(&pat, name)))?;
            let ty = written(param.ty()).or_else(|| self.closure_parameter(&closure, number));
            return Some(ty.and_then(|ty| part_of(&param.pat()?, name, ty)));
        }
        let of = ast::ForExpr::cast(node.clone())?;
        of.loop_body().filter(|body| body.syntax().text_range().contains_range(from.text_range()))?;
        let pat = of.pat().filter(|pat| binds(pat, name))?;
        let ty = of.iterable().and_then(|iterable| element(&self.type_of(&iterable)?));
        Some(ty.and_then(|ty| part_of(&pat, name, ty)))
    }

    /// The type that the called method hands to its closure: of `f: impl FnMut(&Example)` it is `&Example`.
    fn closure_parameter(&self, closure: &ast::ClosureExpr, number: usize) -> Option<String> {
        let arguments = ast::ArgList::cast(closure.syntax().parent()?)?;
        let position = arguments.args().position(|argument| argument.syntax() == closure.syntax())?;
        let call = ast::MethodCallExpr::cast(arguments.syntax().parent()?)?;
        let member = self.member(&self.type_of(&call.receiver()?)?, call.name_ref()?.text())?;
        let file = syntax::parse(&format!("{} {{}}", member.signature));
        let function = file.children().find_map(ast::Fn::cast)?;
        let ty = function.param_list()?.params().nth(position)?.ty()?;
        let generic = function.generic_param_list().and_then(|list| {
            let mut params =
                list.type_or_const_params().filter_map(|param| ast::TypeParam::cast(param.syntax().clone()));
            params.find(|param| param.name().is_some_and(|name| *ty.syntax().text().to_string() == *name.text()))
        });
        let bound = match generic.and_then(|param| param.type_bound_list()) {
            Some(bounds) => bounds.syntax().clone(),
            None => ty.syntax().clone(),
        };
        let inputs = bound.descendants().find_map(ast::ParenthesizedArgList::cast)?;
        Some(inputs.type_args().nth(number)?.syntax().text().to_string())
    }
}

fn binds(pattern: &ast::Pat, name: &str) -> bool {
    let bound = pattern.syntax().descendants().filter_map(ast::IdentPat::cast);
    bound.filter_map(|pattern| pattern.name()).any(|bound| bound.text() == name)
}

fn written(ty: Option<ast::Type>) -> Option<String> {
    ty.map(|ty| ty.syntax().text().to_string()).filter(|ty| ty != "_")
}

/// The type of a name in a pattern for a value of the type.
fn part_of(pattern: &ast::Pat, name: &str, ty: String) -> Option<String> {
    match pattern {
        ast::Pat::IdentPat(_) => Some(ty),
        ast::Pat::RefPat(inner) => part_of(&inner.pat()?, name, ty),
        ast::Pat::TuplePat(tuple) => {
            let (number, part) = tuple.fields().enumerate().find(|(_, part)| binds(part, name))?;
            part_of(&part, name, arguments(peeled(&ty)).get(number)?.to_string())
        }
        _ => None,
    }
}

fn of_literal(kind: SyntaxKind, text: &str) -> Option<&str> {
    let suffix =
        |default| text.find(['i', 'u', 'f']).filter(|_| !text.starts_with("0x")).map_or(default, |at| &text[at..]);
    Some(match kind {
        SyntaxKind::STRING => "&str",
        SyntaxKind::INT_NUMBER => suffix("i32"),
        SyntaxKind::FLOAT_NUMBER => suffix("f64"),
        SyntaxKind::CHAR => "char",
        SyntaxKind::TRUE_KW | SyntaxKind::FALSE_KW => "bool",
        _ => return None,
    })
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A small library in the manner of ours.
    pub fn api() -> Api {
        let member = Member::simple;
        let item = |path: &str, kind: &str, members: Vec<Member>| Item {
            path: path.into(),
            kind: kind.into(),
            signature: format!("{kind} {}", last_segment(path)),
            docs: format!("About {}.", last_segment(path)),
            members,
            ..Default::default()
        };
        let mut api = Api::default();
        api.items = vec![
            item(
                "qlora_nb::trainer::Trainer",
                "struct",
                vec![
                    member("new", "function", "fn new(model: &Model) -> Result<Self>", "Result<Trainer>"),
                    member("train", "method", "fn train(&mut self) -> Result<TrainOutput>", "Result<TrainOutput>"),
                    member(
                        "train_steps",
                        "method",
                        "fn train_steps(&mut self, n: usize) -> Result<TrainOutput>",
                        "Result<TrainOutput>",
                    ),
                    member("each", "method", "fn each<F: FnMut(&TrainOutput)>(&self, f: F)", "()"),
                    member("history", "field", "history: Vec<TrainOutput>", "Vec<TrainOutput>"),
                ],
            ),
            item("qlora_nb::trainer::TrainOutput", "struct", vec![member("loss", "field", "loss: f64", "f64")]),
            item(
                "qlora_nb::args::TrainingArguments",
                "struct",
                vec![
                    member("learning_rate", "field", "learning_rate: f64", "f64"),
                    member("per_device_train_batch_size", "field", "per_device_train_batch_size: usize", "usize"),
                    member("optim", "field", "optim: Optim", "Optim"),
                ],
            ),
            item(
                "qlora_nb::args::Optim",
                "enum",
                vec![
                    member("Adam", "variant", "Adam", ""),
                    member("PagedAdam", "variant", "PagedAdam", ""),
                    member("default", "function", "fn default() -> Self", "Optim"),
                ],
            ),
        ];
        api.items[0].members[2].docs = "At most `n` more updates.".into();
        let paths: Vec<String> = api.items.iter().map(|item| item.path.clone()).collect();
        for path in paths {
            let (module, name) = path.rsplit_once("::").expect("a path");
            for module in [module, "qlora_nb::prelude"] {
                api.modules.entry(module.into()).or_default().insert(name.into(), path.clone());
            }
            api.modules.entry("qlora_nb".into()).or_default().insert(last_segment(module).into(), module.into());
        }
        api.modules.entry("qlora_nb".into()).or_default().insert("prelude".into(), "qlora_nb::prelude".into());
        api
    }

    fn rustc(expr: &str) -> Option<String> {
        let known = expr.starts_with("if true") || expr == "{\nlet t = magic();\nt\n}";
        known.then(|| "qlora_nb::trainer::Trainer".to_owned())
    }

    pub fn scope<'a>(api: &'a Api, variables: &'a [(String, String)]) -> Scope<'a> {
        Scope { api, variables, items: &[], ask: &rustc }
    }

    pub fn with_scope<T>(work: impl FnOnce(&Scope) -> T) -> T {
        let variables = [("trainer", "qlora_nb::trainer::Trainer"), ("names", "alloc::string::String")];
        let variables = variables.map(|(name, ty)| (name.to_owned(), ty.to_owned()));
        work(&Scope { items: &[Item::import("helper")], ..scope(&api(), &variables) })
    }

    #[test]
    fn tells_what_variables_are() {
        with_scope(|scope| {
            let told = |code: &str| {
                let mut types: Vec<_> = scope.variables_of(code).into_iter().collect();
                types.sort();
                types.into_iter().map(|(name, ty)| format!("{name}: {ty}")).collect::<Vec<_>>().join(", ")
            };
            assert_eq!(
                told("let mut t = Trainer::new(&m)?; let u = t.clone();"),
                "t: qlora_nb::trainer::Trainer, u: qlora_nb::trainer::Trainer"
            );
            assert_eq!(
                told("let out = trainer.train()?;\nlet again = trainer.clone();"),
                "again: qlora_nb::trainer::Trainer, out: qlora_nb::trainer::TrainOutput"
            );
            assert_eq!(
                told(
                    "let out = trainer.train(); let r = &trainer; let n = 1; let s = format!(\"\"); let (a, b) = f();"
                ),
                ""
            );
        });
    }

    #[test]
    fn takes_types_apart() {
        assert_eq!(peeled("&'a mut Box<dyn CausalLM>"), "CausalLM");
        assert_eq!(head("alloc::vec::Vec<(a::B, C)>"), "Vec");
        assert_eq!(arguments("HashMap<String, Vec<(u8, u16)>>"), ["String", "Vec<(u8, u16)>"]);
        assert_eq!(arguments("Box<dyn Fn(u8) -> u8, A>"), ["dyn Fn(u8) -> u8", "A"]);
        assert_eq!(element("&[u32; 3]").as_deref(), Some("u32"));
    }
}
