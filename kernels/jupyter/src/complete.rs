//! What could stand at the cursor.
//!
//! The cell is parsed with a made-up name at the cursor, so that what stands before it is a whole expression. Types
//! come from [`scope`](crate::scope), names from the index that was made of the library ([`api`](crate::api)).

use std::path::Path;

use ra_ap_syntax::SyntaxKind;
use ra_ap_syntax::ast::{self, AstNode};

use crate::api::{Api, Item, Member};
use crate::scope::{Cell, Place, Scope};
use crate::std_names;

/// Jupyter's `complete_reply`, in bytes of the cell.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Completions {
    /// The part of the cell that a match replaces.
    pub start: usize,
    pub end: usize,
    /// Those that are likeliest first.
    pub matches: Vec<Match>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Match {
    pub text: String,
    /// `field`, `method`, `function`, `variant`, `constant`, `struct`, `enum`, `trait`, `type`, `module`, `macro`,
    /// `variable`, `item`, `keyword`, `path`, `command`.
    pub kind: String,
    /// Signature or type in one line; may be empty.
    pub signature: String,
}

const KEYWORDS: [&str; 30] = [
    "as", "async", "await", "break", "const", "continue", "crate", "dyn", "else", "enum", "false", "fn", "for", "if",
    "impl", "in", "let", "loop", "match", "mod", "move", "mut", "pub", "return", "struct", "trait", "true", "use",
    "where", "while",
];

/// What can stand behind `::`, the likeliest first.
const KINDS: [&str; 8] = ["variant", "function", "constant", "method", "struct", "enum", "trait", "module"];

/// Completes a cell at a cursor that counts bytes.
pub(crate) fn complete(scope: &Scope, code: &str, cursor: usize) -> Completions {
    let cursor = (0..=cursor.min(code.len())).rev().find(|at| code.is_char_boundary(*at)).unwrap_or(0);
    let line = code[..cursor].rsplit('\n').next().filter(|line| line.starts_with(':') && !line.contains(' '));
    if let Some(line) = line {
        let matches = std_names::commands().filter(|(name, _)| name.starts_with(line));
        let matches = matches.map(|(name, usage)| named(name, "command", usage)).collect();
        return Completions { start: cursor - line.len(), end: cursor, matches };
    }
    let Some(cell) = Cell::with_name_at(code, cursor) else { return nothing(cursor) };
    if cell.token.kind() == SyntaxKind::COMMENT {
        return nothing(cursor);
    }
    if matches!(cell.token.kind(), SyntaxKind::STRING | SyntaxKind::C_STRING) {
        return files(code, cell.token_start(), cursor);
    }
    let prefix = cell.prefix().to_owned();
    let matches = match cell.place() {
        Place::MemberOf(receiver) => {
            let ty = scope.type_of_or_ask(&cell, &receiver);
            ty.map(|ty| members(scope.members_of(&ty), &["field", "method"])).unwrap_or_default()
        }
        Place::Path(qualifier) => qualified(scope, &qualifier),
        Place::FieldIn(literal) => match remaining_fields(scope, &literal, &prefix) {
            Some(fields) => fields,
            None => plain(scope, &cell),
        },
        Place::Plain => plain(scope, &cell),
        Place::NewName => Vec::new(),
    };
    Completions { start: cursor - prefix.len(), end: cursor, matches: fitting(matches, &prefix, &code[cursor..]) }
}

fn nothing(cursor: usize) -> Completions {
    Completions { start: cursor, end: cursor, matches: Vec::new() }
}

/// Those that begin as what is typed; in another case, if there are none.
fn fitting(matches: Vec<Match>, prefix: &str, behind: &str) -> Vec<Match> {
    let folded = prefix.to_lowercase();
    let exact = matches.iter().any(|m| m.text.starts_with(prefix));
    let fits = |m: &Match| if exact { m.text.starts_with(prefix) } else { m.text.to_lowercase().starts_with(&folded) };
    let mut found: Vec<Match> = Vec::new();
    for mut candidate in matches.into_iter().filter(fits) {
        if candidate.kind == "macro" && behind.starts_with('!') {
            candidate.text.pop();
        }
        if found.iter().all(|earlier| earlier.text != candidate.text) {
            found.push(candidate);
        }
    }
    found
}

fn of(member: &Member) -> Match {
    Match { text: member.name.clone(), kind: member.kind.clone(), signature: member.signature.clone() }
}

fn named(text: &str, kind: &str, signature: &str) -> Match {
    Match { text: text.into(), kind: kind.into(), signature: signature.into() }
}

/// Members of the kinds, in their order; within a kind by name.
fn members(mut members: Vec<Member>, kinds: &[&str]) -> Vec<Match> {
    let rank = |member: &Member| kinds.iter().position(|kind| *kind == member.kind);
    members.retain(|member| rank(member).is_some());
    members.sort_by(|a, b| (rank(a), &a.name).cmp(&(rank(b), &b.name)));
    members.iter().map(of).collect()
}

/// What stands behind `Type::` or `module::`.
fn qualified(scope: &Scope, qualifier: &str) -> Vec<Match> {
    if let Some(module) = scope.module(qualifier) {
        return module.iter().map(|(name, path)| exported(scope.api, name, path)).collect();
    }
    let mut found = members(scope.members_of(qualifier), &KINDS);
    if qualifier == "Default" {
        found.push(named("default", "function", "fn default() -> Self"));
    }
    found
}

fn of_item(name: &str, item: &Item) -> Match {
    let sign = if item.kind == "macro" { "!" } else { "" };
    named(&format!("{name}{sign}"), &item.kind, &item.signature)
}

fn exported(api: &Api, name: &str, path: &str) -> Match {
    match api.item(path) {
        Some(item) => of_item(name, item),
        None => named(name, if api.modules.contains_key(path) { "module" } else { "item" }, path),
    }
}

/// The fields that a struct literal does not name yet, in the order of the type.
fn remaining_fields(scope: &Scope, literal: &ast::RecordExpr, prefix: &str) -> Option<Vec<Match>> {
    let path = literal.path()?.syntax().text().to_string();
    let item = scope.item(&path).filter(|item| item.kind == "struct")?;
    let given =
        literal.record_expr_field_list()?.fields().filter_map(|field| Some(field.field_name()?.text().to_string()));
    let given: Vec<String> = given.collect();
    let is_given = |name: &str| name != prefix && given.iter().any(|given| given == name);
    let fields = item.members.iter().filter(|member| member.kind == "field" && !is_given(&member.name));
    Some(fields.map(of).collect())
}

fn plain(scope: &Scope, cell: &Cell) -> Vec<Match> {
    let mut found: Vec<Match> = cell.local_names().iter().map(|name| named(name, "variable", "")).collect();
    found.retain(|local| scope.variables.iter().all(|(name, _)| *name != local.text));
    found.extend(scope.variables.iter().map(|(name, ty)| named(name, "variable", ty)));
    found.extend(scope.items.iter().map(|item| of_item(item.name(), item)));
    found.sort_by(|a, b| (a.kind != "variable", &a.text).cmp(&(b.kind != "variable", &b.text)));
    let prelude = scope.api.modules.get("qlora_nb::prelude").into_iter().flatten();
    found.extend(prelude.map(|(name, path)| exported(scope.api, name, path)));
    found.extend(["qlora_nb", "std"].map(|name| named(name, "module", "")));
    found.extend(std_names::macros().map(|(name, usage)| named(name, "macro", usage)));
    let types = ["Vec", "String", "Option", "Some", "None", "Result", "Ok", "Err", "Box", "Default"];
    found.extend(types.map(|name| named(name, "type", "")));
    found.extend(KEYWORDS.map(|name| named(name, "keyword", "")));
    found
}

/// Files for the path that a string literal begins with; cells run in the notebook's folder, as we do.
fn files(code: &str, literal: usize, cursor: usize) -> Completions {
    let Some(begin) = code.get(literal..cursor).and_then(|text| text.find('"')).map(|at| literal + at + 1) else {
        return nothing(cursor);
    };
    let typed = &code[begin..cursor];
    let (folder, name) =
        typed.rsplit_once('/').map_or(("", typed), |(folder, name)| (&typed[..folder.len() + 1], name));
    let start = cursor - name.len();
    let entries = std::fs::read_dir(Path::new(if folder.is_empty() { "." } else { folder }));
    let mut matches: Vec<Match> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let found = entry.file_name().into_string().ok()?;
            // Nothing that would have to be escaped in a literal.
            let fits = found.starts_with(name) && (name.starts_with('.') || !found.starts_with('.'));
            let slash = if entry.path().is_dir() { "/" } else { "" };
            (fits && !found.contains(['"', '\\', '\n'])).then(|| named(&format!("{found}{slash}"), "path", ""))
        })
        .collect();
    matches.sort_by(|a, b| a.text.cmp(&b.text));
    Completions { start, end: cursor, matches }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::testing::{scope, with_scope};

    #[test]
    fn completes_members_paths_fields_and_names() {
        let table: &[(&str, &str, &[&str])] = &[
            // Members of variables, of what earlier cells and this cell made.
            ("trainer.tr¦", "tr", &["train", "train_steps"]),
            ("trainer.¦", "", &["history", "each", "train", "train_steps"]),
            ("let x = 1;\ntrainer.train_¦\nlet y = 2;", "train_", &["train_steps"]),
            ("(&trainer).train_¦", "train_", &["train_steps"]),
            ("trainer.train()?.lo¦", "lo", &["loss"]),
            ("trainer.history.le¦", "le", &["len"]),
            ("trainer.history[0].lo¦", "lo", &["loss"]),
            ("trainer.history.first().unwrap().lo¦", "lo", &["loss"]),
            ("let t = Trainer::new(&m)?;\nt.train_¦", "train_", &["train_steps"]),
            ("let t: Trainer = make();\nt.train_¦", "train_", &["train_steps"]),
            ("let trainer = 1.5;\ntrainer.sq¦", "sq", &["sqrt"]),
            ("fn f(ex: &TrainOutput) { ex.lo¦ }", "lo", &["loss"]),
            ("trainer.each(|out| out.lo¦)", "lo", &["loss"]),
            ("for out in trainer.history { out.lo¦ }", "lo", &["loss"]),
            // Inside macros.
            ("println!(\"{}\", trainer.train_¦);", "train_", &["train_steps"]),
            ("let v = vec![trainer.train()?.lo¦];", "lo", &["loss"]),
            ("assert!(format!(\"{}\", trainer.train_¦).is_empty());", "train_", &["train_steps"]),
            // What only rustc knows.
            ("if true { trainer } else { other }.train_¦", "train_", &["train_steps"]),
            ("let t = magic();\nt.train_¦", "train_", &["train_steps"]),
            ("mystery.train_¦", "train_", &[]),
            // A variable of the cell hides one of an earlier cell, also where its type is unknown.
            ("let trainer = mystery();\ntrainer.train_¦", "train_", &[]),
            // Standard types.
            ("\"text\".trim¦", "trim", &["trim", "trim_end", "trim_start"]),
            ("names.pu¦", "pu", &["push", "push_str"]),
            ("String::from_u¦", "from_u", &["from_utf8"]),
            // Paths.
            ("Trainer::n¦", "n", &["new"]),
            ("Optim::¦", "", &["Adam", "PagedAdam", "default"]),
            ("TrainingArguments { ..Default::d¦", "d", &["default"]),
            ("qlora_nb::trainer::Train¦", "Train", &["TrainOutput", "Trainer"]),
            ("use qlora_nb::{prelude::*, trainer::TrainO¦};", "TrainO", &["TrainOutput"]),
            ("use qlora_nb::pre¦", "pre", &["prelude"]),
            // Struct literals.
            ("TrainingArguments { learning_rate: 1e-3, per_¦", "per_", &["per_device_train_batch_size"]),
            (
                "TrainingArguments { learning_rate: 1e-3, ¦, ..Default::default() }",
                "",
                &["per_device_train_batch_size", "optim"],
            ),
            ("TrainingArguments { optim: Optim::Pa¦ }", "Pa", &["PagedAdam"]),
            // Names.
            ("trai¦", "trai", &["trainer", "trait"]),
            ("Trainin¦", "Trainin", &["TrainingArguments"]),
            ("trainingarg¦", "trainingarg", &["TrainingArguments"]),
            ("let local = 1; loc¦", "loc", &["local"]),
            ("helpe¦", "helpe", &["helper"]),
            ("struct Own { size: u8 }\nlet own = Own { size: 1 };\nown.si¦", "si", &["size"]),
            ("impl Own { fn grow(&self) {} }\nstruct Own;\nlet own = Own;\nown.gr¦", "gr", &[]),
            ("use std::coll¦", "coll", &["collections"]),
            ("std::fs::re¦", "re", &["read", "read_dir", "read_to_string", "remove_dir_all", "remove_file", "rename"]),
            (":ti¦", ":ti", &[":timing"]),
            ("printl¦", "printl", &["println!"]),
            ("printl¦!(\"\")", "printl", &["println"]),
            ("whil¦", "whil", &["while"]),
            // Nowhere.
            ("// trainer.¦", "", &[]),
            ("let na¦", "na", &[]),
        ];
        for (code, replaced, texts) in table {
            let cursor = code.find('¦').expect("a cursor");
            let cell = code.replace('¦', "");
            let mut items = vec![Item::import("helper")];
            crate::own::learn(&mut items, &cell);
            let found = with_scope(|scope| complete(&Scope { items: &items, ..*scope }, &cell, cursor));
            assert_eq!(&cell[found.start..found.end], *replaced, "{code}");
            let found: Vec<&str> = found.matches.iter().map(|m| m.text.as_str()).collect();
            assert_eq!(found, *texts, "{code}");
        }
    }

    #[test]
    fn names_come_with_their_types() {
        let completions = with_scope(|scope| complete(scope, "trainer.train_s", 15));
        let expected = named("train_steps", "method", "fn train_steps(&mut self, n: usize) -> Result<TrainOutput>");
        assert_eq!(completions.matches, [expected]);
        let all = with_scope(|scope| complete(scope, "", 0)).matches;
        let texts: Vec<_> = all.iter().take(2).map(|m| m.text.as_str()).collect();
        assert_eq!(texts, ["names", "trainer"], "variables come first");
    }

    #[test]
    fn a_cursor_inside_a_character_or_behind_the_end_is_no_panic() {
        with_scope(|scope| {
            complete(scope, "江上", 1);
            complete(scope, "trainer.", 99);
            for cursor in 0..=12 {
                complete(scope, ":dep x\n江 = \"", cursor);
            }
        });
    }

    /// While a cell is typed, and wherever the cursor is put in it.
    #[test]
    fn no_cell_that_is_half_typed_is_a_panic() {
        let code = ":dep x\n// 江上\nuse qlora_nb::{prelude::*, trainer::Trainer};\nfn f<T: Fn(&u8)>(a: &[T; 2], t: T) -> Result<()> {\n\
                    let (a, mut b) = (1.5f32, \"江{}\"); for (i, x) in a.iter().enumerate() { println!(\"{}\", x.y()?); }\n\
                    let v = vec![trainer.each(|o| o.loss); 3]; match v[0] { Some(x) if x > 1 => {} _ => return Err(e)? }\n\
                    }\nTrainingArguments { optim: Optim::Adam, ..Default::default() }.0.1";
        with_scope(|scope| {
            for at in (0..=code.len()).filter(|at| code.is_char_boundary(*at)) {
                for (code, at) in [(&code[..at], at), (code, at), (&code[at..], code.len() - at), (&code[at..], 0)] {
                    let found = complete(scope, code, at);
                    assert!(found.start <= found.end && code.get(found.start..found.end).is_some());
                    crate::inspect::inspect(scope, code, at);
                }
            }
        });
    }

    #[test]
    fn completes_files_in_strings() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("data")).expect("made");
        std::fs::write(folder.path().join("day.json"), "").expect("written");
        let code = format!("Dataset::load_from_disk(\"{}/da", folder.path().display());
        let completions = with_scope(|scope| complete(scope, &code, code.len()));
        let texts: Vec<_> = completions.matches.iter().map(|m| m.text.as_str()).collect();
        assert_eq!((texts, completions.start), (vec!["data/", "day.json"], code.len() - 2));
    }

    /// The index of the library itself, where one is installed.
    #[test]
    fn the_librarys_own_index_completes_the_walkthrough() {
        let Some(prefix) = std::env::var_os("QLORA_NB_PREFIX") else {
            eprintln!("skipped: QLORA_NB_PREFIX names no layout");
            return;
        };
        let api = Api::load(&Path::new(&prefix).join("api.json"));
        if api.items.is_empty() {
            eprintln!("skipped: no index in {}", prefix.display());
            return;
        }
        let variables = [
            ("trainer".to_owned(), "qlora_nb::trainer::Trainer".to_owned()),
            ("ds".to_owned(), "qlora_nb::dataset::Dataset".to_owned()),
            ("t".to_owned(), "candle_core::Tensor".to_owned()),
        ];
        let scope = scope(&api, &variables);
        let has = |code: &str, text: &str| {
            let found = complete(&scope, code, code.len()).matches;
            assert!(found.iter().any(|m| m.text == text), "{code}: no {text} among {found:?}");
        };
        has("trainer.", "train_steps");
        has("trainer.train()?.", "training_loss");
        has("ds.map(|ex| ex.", "text");
        has("ds.head(3).", "num_rows");
        has("ds.select(&[0])?.shuffle(1).", "num_rows");
        has("t.", "matmul");
        has("TrainingArguments { learning_rate: 1e-3, per_", "per_device_train_batch_size");
        has("let t = AutoTokenizer::from_pretrained(\"x\")?; t.", "encode");
        has("Optim::", "PagedAdamW32bit");
        has("use qlora_nb::", "trainer");
        has("DType::", "F16");
        let begin = std::time::Instant::now();
        complete(&scope, "ds.map(|ex| ex.", 15);
        println!("one completion: {:?}", begin.elapsed());
    }
}
