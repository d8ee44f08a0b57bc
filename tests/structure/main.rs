//! What lies beneath never imports what lies above: the order of modules that `lib.rs` and `main.rs` write down, held
//! against the imports, and no circle of files. Also what the profile says of packages.

mod profile;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The files of a crate by their module's path: `["trainer", "run"]`. Tests are left out.
struct Sources {
    texts: BTreeMap<Vec<String>, String>,
}

impl Sources {
    fn read(root: &Path) -> Self {
        let mut texts = BTreeMap::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") {
                    let text = fs::read_to_string(&path).unwrap();
                    texts.insert(module_of(path.strip_prefix(root).unwrap()), without_tests(&text));
                }
            }
        }
        let tests = ["tests", "properties", "oracle", "double", "gallery"];
        texts.retain(|module, _| !module.iter().any(|part| tests.contains(&part.as_str())));
        Self { texts }
    }

    /// The modules, not itself, that a file names.
    fn imports(&self, module: &[String]) -> BTreeSet<Vec<String>> {
        let paths = paths(&self.texts[module]);
        let targets = paths.iter().filter_map(|path| self.resolve(module, path));
        // A module names those inside it, and they name it: that is how a file is declared.
        targets.filter(|target| !target.starts_with(module) && !module.starts_with(target)).collect()
    }

    /// The file that a path leads to.
    fn resolve(&self, here: &[String], path: &[String]) -> Option<Vec<String>> {
        let mut base = here.to_vec();
        let mut rest = path;
        match rest.first()?.as_str() {
            "crate" => base.clear(),
            "super" => drop(base.pop()),
            "self" => {}
            _ => return None,
        }
        rest = &rest[1..];
        while rest.first().is_some_and(|part| part == "super") {
            base.pop();
            rest = &rest[1..];
        }
        base.extend(rest.iter().cloned());
        (1..=base.len()).rev().map(|n| base[..n].to_vec()).find(|module| self.texts.contains_key(module))
    }
}

fn module_of(path: &Path) -> Vec<String> {
    let mut parts: Vec<String> =
        path.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    let root = parts.len() == 1 && (parts[0] == "lib" || parts[0] == "main");
    if root || parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

fn without_tests(text: &str) -> String {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Every path that begins with `crate`, `super` or `self`, the trees of `use` spread out.
fn paths(text: &str) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in text.match_indices(start) {
            let before = text[..at].chars().next_back();
            // Part of a longer path, or a name that ends so.
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            spread(&text[at..], &mut Vec::new(), &mut all);
        }
    }
    all
}

/// Reads `a::b::{c, d::e}` from the beginning of `text`; gives how many bytes that were.
fn spread(text: &str, prefix: &mut Vec<String>, all: &mut Vec<Vec<String>>) -> usize {
    let (mut at, depth) = (0, prefix.len());
    loop {
        let rest = &text[at..];
        let blank = rest.len() - rest.trim_start().len();
        let name: String = rest[blank..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if name.is_empty() {
            break;
        }
        prefix.push(name.clone());
        at += blank + name.len();
        if !text[at..].starts_with("::") {
            break;
        }
        at += 2;
        if text[at..].trim_start().starts_with('{') {
            at += text[at..].find('{').unwrap_or(0) + 1;
            loop {
                let inside = prefix.len();
                at += spread(&text[at..], prefix, all);
                prefix.truncate(inside);
                // To the next part: past ` as name`, `*` and what else there is.
                let Some(next) = text[at..].find([',', '}']) else { break };
                let ends = text[at + next..].starts_with('}');
                at += next + 1;
                if ends {
                    break;
                }
            }
            prefix.truncate(depth);
            return at;
        }
    }
    all.push(prefix.clone());
    prefix.truncate(depth);
    at
}

/// The order in the docs of a crate's root, the lowest first: what stands in backticks in its list, line by line.
fn order(root: &Path) -> Vec<String> {
    let text = fs::read_to_string(root).unwrap();
    let docs: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("//!")).map(str::trim).collect();
    let list = docs.iter().skip_while(|line| !line.starts_with("- ")).take_while(|line| !line.is_empty());
    let list: String = list.map(|line| format!("{line} ")).collect();
    list.split('`').skip(1).step_by(2).map(String::from).collect()
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What is wrong with the imports of a crate.
fn faults(root: &str) -> Vec<String> {
    let root = repository().join(root);
    let (folder, sources) = (root.parent().unwrap(), Sources::read(root.parent().unwrap()));
    assert!(sources.texts.len() > 20, "{}: {} files", folder.display(), sources.texts.len());
    let order = order(&root);
    let level = |module: &str| order.iter().position(|m| m == module);
    let mut faults = Vec::new();
    for module in sources.texts.keys().filter(|module| !module.is_empty()) {
        let Some(own) = level(&module[0]) else {
            faults.push(format!("{} is not in the order of {}", module[0], root.display()));
            continue;
        };
        for target in sources.imports(module) {
            if target.is_empty() || target[0] == module[0] {
                continue;
            }
            if level(&target[0]).is_none_or(|target| target >= own) {
                faults.push(format!("{} imports {}, which is not beneath it", module.join("::"), target.join("::")));
            }
        }
    }
    faults.extend(circle(&sources));
    faults
}

/// A circle of files, if there is one: what is left when every file that imports nothing left is taken away.
fn circle(sources: &Sources) -> Option<String> {
    let mut left: BTreeMap<_, _> =
        sources.texts.keys().map(|module| (module.clone(), sources.imports(module))).collect();
    loop {
        let done: Vec<Vec<String>> = left.iter().filter(|(_, to)| to.is_empty()).map(|(m, _)| m.clone()).collect();
        if done.is_empty() {
            break;
        }
        for module in &done {
            left.remove(module);
        }
        left.values_mut().for_each(|to| to.retain(|target| !done.contains(target)));
    }
    // The root names everything; what imports the root alone is no circle.
    left.remove(&Vec::new());
    left.values_mut().for_each(|to| to.retain(|target| !target.is_empty()));
    let names = left.iter().filter(|(_, to)| !to.is_empty());
    let names: Vec<String> = names.map(|(m, to)| format!("{} -> {to:?}", m.join("::"))).collect();
    if names.is_empty() { None } else { Some(format!("a circle of files among: {}", names.join("; "))) }
}

#[test]
fn the_library_imports_downward_only() {
    assert_eq!(faults("crate/src/lib.rs"), Vec::<String>::new());
}

#[test]
fn the_kernel_imports_downward_only() {
    assert_eq!(faults("kernels/jupyter/src/main.rs"), Vec::<String>::new());
}

#[test]
fn trees_of_use_are_spread_out() {
    let text = "use crate::{a::{self, b as c}, d::*}; fn f(x: super::e::F) { my_crate::g(); crate::h::i() }";
    let found: BTreeSet<String> = paths(text).into_iter().map(|path| path.join("::")).collect();
    let expected = ["crate::a::b", "crate::a::self", "crate::d", "crate::h::i", "super::e::F"];
    assert_eq!(found, expected.map(String::from).into());
}

/// `SECURITY.md` names the test of each promise: tests by their name, files by their path.
#[test]
fn each_promise_of_security_has_its_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| ")).skip(1);
    let held_by: Vec<&str> = rows.map(|row| row.trim_end_matches('|').rsplit('|').next().unwrap()).collect();
    assert!(held_by.len() > 10);
    let mut tests = String::new();
    for folder in ["tests", "crate/src", "kernels/jupyter/src"] {
        read_all(&root.join(folder), &mut tests);
    }
    for row in held_by {
        let names: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{row}");
        for name in names {
            let is_test = ["fn", "def"].iter().any(|keyword| tests.contains(&format!("{keyword} {name}(")));
            assert!(is_test || root.join(name).is_file() || name == "scripts/fuzz", "{name} is no test");
        }
    }
}

fn read_all(folder: &Path, texts: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_all(&path, texts);
        } else if path.extension().is_some_and(|e| e == "rs" || e == "py") {
            texts.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

/// Every crate that is built may be passed on under licences that `deny.toml` allows; from crates.io alone.
#[test]
fn licences_are_those_that_are_allowed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let deny = fs::read_to_string(root.join("deny.toml")).unwrap();
    let (_, allow) = deny.split_once("allow = [").unwrap();
    let allow: BTreeSet<&str> = allow.split(']').next().unwrap().split('"').skip(1).step_by(2).collect();
    let mut metadata = std::process::Command::new(env!("CARGO"));
    metadata.args(["metadata", "--format-version=1", "--offline", "--filter-platform=x86_64-unknown-linux-gnu"]);
    let metadata = metadata.current_dir(root).output().unwrap();
    assert!(metadata.status.success(), "{}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    for package in packages {
        let (name, license) = (&package["name"], package["license"].as_str().unwrap_or_default());
        assert!(may_be_passed_on(license, &allow), "{name}: {license:?} is not among {allow:?}");
        let source = package["source"].as_str();
        assert!(source.is_none_or(|source| source.starts_with("registry+")), "{name} comes from {source:?}");
    }
}

/// Whether an SPDX expression, in which `/` is an old way to write OR, has an alternative that is allowed whole.
fn may_be_passed_on(expression: &str, allow: &BTreeSet<&str>) -> bool {
    let plain = expression.replace('/', " OR ");
    let parts: Vec<&str> = plain.split(" AND ").map(|part| part.trim_matches(['(', ')', ' '])).collect();
    parts.iter().all(|part| part.split(" OR ").any(|license| allow.contains(license.trim())))
}

#[test]
fn licences_are_read_as_they_are_meant() {
    let allow = BTreeSet::from(["MIT", "ISC"]);
    for fine in ["MIT", "MIT OR GPL-3.0", "GPL-3.0/MIT", "(GPL-3.0 OR MIT) AND ISC"] {
        assert!(may_be_passed_on(fine, &allow), "{fine}");
    }
    for wrong in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0"] {
        assert!(!may_be_passed_on(wrong, &allow), "{wrong}");
    }
}
