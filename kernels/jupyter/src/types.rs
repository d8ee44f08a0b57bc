//! The types of a cell's variables, from rustc itself.
//!
//! evcxr moves variables from cell to cell through a store that needs their types in writing. It infers them
//! with rust-analyzer, which reads sources: the standard library's (a component that many toolchains lack) and
//! those of every dependency. rustc knows the types from metadata, so it is asked instead: the cell as evcxr
//! would check it is compiled up to type checking, with every variable passed to a function whose bound nothing
//! meets, and the errors name the types. [`annotate`](crate::syntax::annotate) then writes them into the cell, as
//! `let x = f()?; let x: T = x;`, where evcxr reads them.
//!
//! The question travels by way of `cargo check`, for which this binary is the rustc [`wrapper`](crate::wrapper): so the flags and
//! the dependencies are the very ones that the cell will be compiled with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Set for cargo where this binary is its rustc wrapper; names the folder of the [`Question`].
pub const ASK_IN: &str = "QLORA_NB_ASK_IN";

/// The file whose existence asks, and which holds the answer afterwards.
const QUESTION: &str = "types.json";
/// How the errors that answer begin; then the variable's number and its type.
const ANSWER: &str = "qlora-nb-type-of";
/// The argument by which a rustc that only checks is known.
pub const CHECKS: &str = "--emit=dep-info,metadata";

/// Variables' types, by their names.
pub type Types = HashMap<String, String>;

/// The folder through which a session and the rustc wrapper speak.
pub struct Question {
    file: PathBuf,
}

/// rustc's answer.
#[derive(Serialize, Deserialize)]
pub struct Answer {
    pub types: Types,
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
        Ok(serde_json::from_str(&text).ok())
    }

    pub fn is_asked(&self) -> bool {
        self.file.exists()
    }

    /// Answers, in the rustc wrapper, with what rustc says of the cell that cargo wants checked.
    pub fn answer(&self) -> std::io::Result<()> {
        let source = std::fs::read_to_string("src/lib.rs")?;
        let (source, names) = question(&source);
        std::fs::write("src/types.rs", source)?;
        let mut args: Vec<_> = std::env::args_os().skip(1).collect();
        for arg in &mut args {
            if arg == "src/lib.rs" {
                *arg = "src/types.rs".into();
            } else if arg == CHECKS {
                *arg = "--emit=metadata=/dev/null".into();
            }
        }
        // Full paths instead of the shortest unambiguous names: the cell need not have imported them.
        args.extend(["-Ztrim-diagnostic-paths=no".into(), "--diagnostic-width=1000000".into()]);
        let output = Command::new(&args[0]).args(&args[1..]).env_remove(ASK_IN).env("RUSTC_BOOTSTRAP", "1").output()?;
        let answer = read_answer(&String::from_utf8_lossy(&output.stderr), &names);
        std::fs::write(&self.file, serde_json::to_string(&answer)?)
    }
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
    static CLOSURE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\{closure@[^}]*\}").expect("a constant"));
    CLOSURE.replace_all(ty, "{closure}").into_owned()
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

fn read_answer(stderr: &str, names: &[String]) -> Answer {
    let mut answer = Answer { types: Types::new(), has_errors: false };
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
                answer.types.insert(name.clone(), ty);
            }
            None => answer.has_errors |= message["level"] == "error" && !text.starts_with("aborting due to"),
        }
    }
    answer
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        let answer = read_answer(&answer.join("\n"), &names);
        assert_eq!((answer.types["a"].as_str(), answer.has_errors), ("Vec<i32>", false));
        assert!(read_answer(&error("mismatched types"), &names).has_errors);
    }
}
