//! The types of a cell's variables, from rustc itself.
//!
//! evcxr moves variables from cell to cell through a store that needs their types in writing. It infers them
//! with rust-analyzer, which reads sources: the standard library's (a component that many toolchains lack) and
//! those of every dependency. rustc knows the types from metadata, so it is asked instead: the cell as evcxr
//! would check it is compiled up to type checking, with every variable passed to a function whose bound nothing
//! meets, and the errors name the types. [`annotate`] then writes them into the cell, as
//! `let x = f()?; let x: T = x;`, where evcxr reads them.
//!
//! The question travels by way of `cargo check`, for which this binary is the rustc wrapper: so the flags and
//! the dependencies are the very ones that the cell will be compiled with.

use std::collections::HashMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use ra_ap_syntax::ast::{self, HasName};
use ra_ap_syntax::{AstNode, Edition, SourceFile};
use serde_json::{Value, json};

use crate::plain::{self, Mark};

/// Set for cargo where this binary is its rustc wrapper; names the folder of the [`Question`].
pub const ASK_IN: &str = "QLORA_NB_ASK_IN";

/// The file whose existence asks, and which holds the answer afterwards.
const QUESTION: &str = "types.json";
/// How the errors that answer begin; then the variable's number and its type.
const ANSWER: &str = "qlora-nb-type-of";

/// The folder through which a session and the rustc wrapper speak.
pub struct Question {
    file: PathBuf,
}

/// rustc's answer.
pub struct Answer {
    pub types: HashMap<String, String>,
    /// Whether the cell had errors of its own, so that types may be missing.
    pub has_errors: bool,
}

impl Question {
    pub fn new(folder: &Path) -> Question {
        Question { file: folder.join(QUESTION) }
    }

    /// Asks during `check`, which must run cargo's check on the cell.
    pub fn ask(&self, check: impl FnOnce()) -> std::io::Result<Option<Answer>> {
        std::fs::write(&self.file, "")?;
        check();
        let text = std::fs::read_to_string(&self.file)?;
        std::fs::remove_file(&self.file)?;
        // Still empty where cargo did not get as far as the cell.
        let Ok(value) = serde_json::from_str::<Value>(&text) else { return Ok(None) };
        let types = value["types"].as_object().into_iter().flatten();
        let types = types.filter_map(|(name, ty)| Some((name.clone(), ty.as_str()?.to_owned()))).collect();
        Ok(Some(Answer { types, has_errors: value["has_errors"] == json!(true) }))
    }
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

/// Adds to a cell the types of its variables. The additions stand behind the statements, on the same line, so
/// that the compiler's messages keep their lines and columns.
pub fn annotate(code: &str, variables: &[Binding], types: &HashMap<String, String>) -> String {
    let mut code = code.to_owned();
    for Binding { name, is_typed, is_mut, end, .. } in variables.iter().rev() {
        if let Some(ty) = types.get(name).filter(|_| !is_typed) {
            let is_mut = if *is_mut { "mut " } else { "" };
            code.insert_str(*end, &format!(" let {is_mut}{name}: {ty} = {name};"));
        }
    }
    code
}

/// The cell as somebody would write it who has to name the types: for stock evcxr, which cannot find them out.
pub fn with_types(code: &str, variables: &[Binding], types: &HashMap<String, String>) -> String {
    let mut insertions = Vec::new();
    for Binding { name, is_typed, is_mut, end, type_place } in variables {
        let Some(ty) = types.get(name).filter(|_| !is_typed) else { continue };
        let is_mut = if *is_mut { "mut " } else { "" };
        insertions.push(match type_place {
            Some(place) => (*place, format!(": {ty}")),
            None => (*end, format!(" let {is_mut}{name}: {ty} = {name};")),
        });
    }
    insertions.sort();
    let mut typed = code.to_owned();
    insertions.iter().rev().for_each(|(place, text)| typed.insert_str(*place, text));
    typed
}

/// Where the Rust code of a cell begins: behind evcxr's own lines (`:dep`, `!ls`) and leading comments.
pub fn rust_begins(code: &str) -> usize {
    let is_rust = |line: &&str| {
        let start = line.trim_start();
        !(start.is_empty() || start.starts_with(':') || line.starts_with('!') || line.starts_with("//"))
    };
    code.split_inclusive('\n').take_while(|line| !is_rust(line)).map(str::len).sum()
}

/// The statements of a cell, and what to add to their offsets to have those in the cell.
pub fn statements(code: &str) -> Option<(ast::StmtList, usize)> {
    const BEFORE: &str = "fn cell() {";
    let begin = rust_begins(code);
    let file = SourceFile::parse(&format!("{BEFORE}{}\n}}", &code[begin..]), Edition::Edition2024);
    let function = file.syntax_node().children().find_map(ast::Fn::cast)?;
    Some((function.body()?.stmt_list()?, begin.wrapping_sub(BEFORE.len())))
}

/// Whether the cell's last expression has a value to show. evcxr would compile a cell twice to find out that a loop's
/// cannot be shown.
pub fn ends_in_expression(code: &str) -> bool {
    let Some((list, _)) = statements(code) else { return false };
    match list.syntax().children().last().and_then(ast::Expr::cast) {
        None | Some(ast::Expr::ForExpr(_) | ast::Expr::WhileExpr(_)) => false,
        Some(ast::Expr::IfExpr(branch)) => branch.else_branch().is_some(),
        Some(_) => true,
    }
}

/// The variables of a cell, in the order of the statements that bind them last.
pub fn bindings(code: &str) -> Vec<Binding> {
    let Some((list, shift)) = statements(code) else { return Vec::new() };
    let mut found: Vec<Binding> = Vec::new();
    for statement in list.statements() {
        let ast::Stmt::LetStmt(statement) = statement else { continue };
        let Some(pattern) = statement.pat() else { continue };
        let inferred = |ty: ast::Type| ty.syntax().descendants().any(|node| ast::InferType::can_cast(node.kind()));
        let typed = statement.ty().is_some_and(|ty| !inferred(ty));
        let end = usize::from(statement.syntax().text_range().end()).wrapping_add(shift);
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
            let behind_name =
                binding.name().map(|name| usize::from(name.syntax().text_range().end()).wrapping_add(shift));
            let type_place = behind_name.filter(|_| is_plain && statement.ty().is_none());
            found.push(Binding { name, is_typed, is_mut: binding.mut_token().is_some(), end, type_place });
        }
    }
    found
}

/// Why a variable of this type cannot be kept for later cells; None if it can.
pub fn unnameable(ty: &str) -> Option<&'static str> {
    if ty.contains("{closure") {
        Some("a closure has no type name; use a fn, or box it: `let f: Box<dyn Fn(i32) -> i32> = Box::new(...)`")
    } else if ty.contains("'_") || ty.starts_with("impl ") || ty.contains("{") || ty.contains("/* ") {
        Some("it borrows from another variable or has no type name; collect or clone it into an owned value")
    } else {
        None
    }
}

/// A type in a message: closures without the place where they stand in generated code.
pub fn for_people(ty: &str) -> String {
    let mut parts = ty.split("{closure@");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str("{closure}");
        out.push_str(part.split_once('}').map_or("", |(_, rest)| rest));
    }
    out
}

pub fn is_asked_for() -> bool {
    std::env::var_os(ASK_IN).is_some()
}

/// Runs the rustc of the command line, a plain cell's without optimising; or answers the question if one is asked and
/// this is the cell's check.
pub fn stand_before_rustc() -> ExitCode {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    let folder = std::env::var_os(ASK_IN).map(PathBuf::from).unwrap_or_default();
    let is = |what: &str| args.iter().any(|arg| arg == what);
    let is_cell = is("ctx");
    if is_cell && is("--emit=dep-info,metadata") {
        let file = folder.join(QUESTION);
        if file.exists() {
            // A failure, so that cargo does not take the cell for checked.
            if let Err(error) = answer(&file) {
                eprintln!("qlora-nb: asking rustc for types: {error}");
            }
            return ExitCode::FAILURE;
        }
    } else if is_cell {
        let source = std::fs::metadata("src/lib.rs").map_or(0, |file| file.len());
        args = plain::for_a_cell(args, source, Mark::new(&folder).is_set());
    }
    let Some((rustc, args)) = args.split_first() else { return ExitCode::FAILURE };
    let error = Command::new(rustc).args(args).env_remove(ASK_IN).exec();
    eprintln!("qlora-nb: cannot run rustc: {error}");
    ExitCode::FAILURE
}

fn answer(file: &Path) -> std::io::Result<()> {
    let source = std::fs::read_to_string("src/lib.rs")?;
    let (source, names) = question(&source);
    std::fs::write("src/types.rs", source)?;
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    for arg in &mut args {
        if arg == "src/lib.rs" {
            *arg = "src/types.rs".into();
        } else if arg == "--emit=dep-info,metadata" {
            *arg = "--emit=metadata=/dev/null".into();
        }
    }
    // Full paths instead of the shortest unambiguous names: the cell need not have imported them.
    args.extend(["-Ztrim-diagnostic-paths=no".into(), "--diagnostic-width=1000000".into()]);
    let output = Command::new(&args[0]).args(&args[1..]).env_remove(ASK_IN).env("RUSTC_BOOTSTRAP", "1").output()?;
    let (types, has_errors) = read_answer(&String::from_utf8_lossy(&output.stderr), &names);
    std::fs::write(file, json!({ "types": types, "has_errors": has_errors }).to_string())
}

/// evcxr's source for checking a cell ends with a call `evcxr_variable_store(name);` a variable, on a line of its
/// own. Returns it with each call replaced by one whose error tells the type, and the names in order.
fn question(source: &str) -> (String, Vec<String>) {
    const STORE: &str = "evcxr_variable_store(";
    let mut names = Vec::new();
    let mut out = format!(
        "#![allow(warnings)]\n#[diagnostic::on_unimplemented(message = \"{ANSWER} {{N}} {{Self}}\")]\n\
         trait QloraNbTypeOf<N> {{}}\nfn qlora_nb_type_of<N, T: QloraNbTypeOf<N>>(_: T) {{}}\n"
    );
    for line in source.lines() {
        match line.trim().strip_prefix(STORE).and_then(|rest| rest.strip_suffix(");")) {
            Some(name) => {
                out.push_str(&format!("qlora_nb_type_of::<[(); {}], _>({name});", names.len()));
                names.push(name.to_owned());
            }
            // Inner attributes must come first in a file: they are not needed to learn types, but features are.
            None if line.trim_start().starts_with("#![") => out.insert_str(0, &format!("{}\n", line.trim())),
            // A cell may have imported a Result of one parameter.
            None => out.push_str(&line.replace("-> Result<(), EvcxrUser", "-> ::std::result::Result<(), EvcxrUser")),
        }
        out.push('\n');
    }
    (out, names)
}

fn read_answer(stderr: &str, names: &[String]) -> (HashMap<String, String>, bool) {
    let mut types = HashMap::new();
    let mut has_errors = false;
    for message in stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let text = message["message"].as_str().unwrap_or_default();
        let told = text.strip_prefix(ANSWER).and_then(|rest| {
            let (number, ty) = rest.trim_start().strip_prefix("[(); ")?.split_once("] ")?;
            Some((names.get(number.parse::<usize>().ok()?)?, ty))
        });
        match told {
            // A literal that nothing else decides is an i32 or an f64, as everywhere in Rust.
            Some((name, ty)) => {
                let ty = ty.replace("{integer}", "i32").replace("{float}", "f64");
                types.insert(name.clone(), ty);
            }
            None => has_errors |= message["level"] == "error" && !text.starts_with("aborting due to"),
        }
    }
    (types, has_errors)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn names_a_closure_without_its_place() {
        assert_eq!(for_people("Map<Iter<u8>, {closure@src/types.rs:25:34: 25:37}>"), "Map<Iter<u8>, {closure}>");
        assert!(unnameable("{closure@x}").is_some_and(|why| why.contains("closure")));
        assert!(unnameable("std::slice::Iter<'_, u8>").is_some_and(|why| why.contains("borrows")));
        assert_eq!(unnameable("std::vec::Vec<&str>"), None);
    }

    #[test]
    fn reads_types_out_of_errors() {
        let (source, names) = question("#![allow(x)]\nfn f() {\nlet a = 1;\nevcxr_variable_store(a);\n}");
        assert!(source.starts_with("#![allow(x)]\n"));
        assert!(source.contains("qlora_nb_type_of::<[(); 0], _>(a);"));
        let error = |message: &str| json!({ "level": "error", "message": message }).to_string();
        let answer = [error("qlora-nb-type-of [(); 0] Vec<{integer}>"), error("aborting due to 1 previous error")];
        let (types, has_errors) = read_answer(&answer.join("\n"), &names);
        assert_eq!((types["a"].as_str(), has_errors), ("Vec<i32>", false));
        assert!(read_answer(&error("mismatched types"), &names).1);
    }
}
