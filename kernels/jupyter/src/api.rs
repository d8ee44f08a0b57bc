//! What completion and inspection know of the library: an index of its public items, made when it is installed.
//!
//! rustdoc writes all it knows of a crate as JSON (megabytes, in a format that changes with the compiler); kept of
//! that is what a notebook's user sees: paths, signatures in one line, documentation, and of each type its fields,
//! variants and methods. candle is indexed too, for its tensors are what the library hands out.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Counts the forms of the file. An index of another form is made anew.
const FORM: u32 = 2;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Api {
    form: u32,
    /// The build of the library that was indexed.
    built: String,
    pub items: Vec<Item>,
    /// For each public module what it exports: name -> path of an item or a module.
    pub modules: BTreeMap<String, BTreeMap<String, String>>,
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(crate) struct Item {
    /// The shortest public path outside the prelude.
    pub path: String,
    /// Where it is defined, which is what rustc prints at times.
    pub defined: String,
    /// `struct`, `enum`, `trait`, `function`, `module`, `macro`, `constant`, `type`; of a cell also `import`.
    pub kind: String,
    pub signature: String,
    pub docs: String,
    /// A function's return type.
    pub ty: Option<String>,
    pub members: Vec<Member>,
}

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub name: String,
    /// `field`, `variant`, `method` (takes self), `function` (does not), `constant`.
    pub kind: String,
    pub signature: String,
    pub docs: String,
    /// A field's type, or what a function returns.
    pub ty: Option<String>,
}

impl Item {
    /// A name that a cell imported, which says nothing of what it means.
    pub fn import(name: &str) -> Item {
        Item { path: name.to_owned(), kind: "import".to_owned(), ..Item::default() }
    }

    pub fn name(&self) -> &str {
        last_segment(&self.path)
    }

    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.name == name)
    }
}

impl Api {
    /// The index of a layout; an empty one if there is none.
    pub fn load(path: &Path) -> Api {
        let api = std::fs::read(path).ok().and_then(|text| serde_json::from_slice::<Api>(&text).ok());
        api.filter(|api| api.form == FORM).unwrap_or_default()
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn item(&self, path: &str) -> Option<&Item> {
        self.items.iter().find(|item| item.path == path || item.defined == path)
    }

    /// The item that a name means behind `use qlora_nb::prelude::*;`.
    pub fn in_prelude(&self, name: &str) -> Option<&Item> {
        self.item(self.modules.get("qlora_nb::prelude")?.get(name)?)
    }

    /// The type of a path as rustc writes it, or of its last name alone if that is unambiguous.
    pub fn type_at(&self, path: &str) -> Option<&Item> {
        let is_type = |item: &&Item| matches!(item.kind.as_str(), "struct" | "enum" | "trait" | "union");
        let types = || self.items.iter().filter(is_type);
        let name = last_segment(path);
        let found = types().find(|item| item.path == path || item.defined == path);
        found.or_else(|| self.in_prelude(name).filter(is_type)).or_else(|| {
            let mut named = types().filter(|item| item.name() == name);
            named.next().filter(|_| named.next().is_none())
        })
    }
}

pub(crate) fn last_segment(path: &str) -> &str {
    path.rsplit("::").next().unwrap_or(path)
}

pub fn is_current(path: &Path, built: &str) -> bool {
    let api = Api::load(path);
    api.form == FORM && api.built == built
}

/// A crate whose dependencies are compiled already.
#[derive(Debug, Default)]
pub struct Documented {
    pub name: String,
    pub root: PathBuf,
    pub edition: String,
    pub version: String,
    pub features: Vec<String>,
    /// The crates that it names, and their compiled files.
    pub externs: Vec<(String, PathBuf)>,
    /// Where compiled files lie.
    pub folders: HashSet<PathBuf>,
}

/// Indexes the crates, all at once; the first of them must succeed.
pub fn make(crates: &[Documented], built: &str) -> Result<Api> {
    let mut api = Api { form: FORM, built: built.to_owned(), ..Default::default() };
    let described: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = crates.iter().map(|krate| scope.spawn(|| rustdoc(krate))).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("rustdoc's output is not understood")))
            .collect()
    });
    for (i, described) in described.into_iter().enumerate() {
        match described {
            Ok(described) => Reader(&described).read_into(&mut api),
            Err(error) if i == 0 => return Err(error),
            // A library's sources may be absent where it was built elsewhere.
            Err(_) => {}
        }
    }
    Ok(api)
}

fn rustdoc(krate: &Documented) -> Result<Value> {
    let out = tempfile::tempdir().context("cannot make a folder in /tmp")?;
    let mut rustdoc = Command::new("rustdoc");
    // JSON is a nightly feature; a stable compiler knows it, and the index is made by the compiler that reads it.
    rustdoc.env("RUSTC_BOOTSTRAP", "1").args(["-Zunstable-options", "--output-format=json", "--cap-lints=allow"]);
    rustdoc.env("CARGO_PKG_VERSION", &krate.version).env("CARGO_PKG_NAME", &krate.name);
    rustdoc.env("CARGO_MANIFEST_DIR", krate.root.parent().and_then(Path::parent).unwrap_or(Path::new("/")));
    rustdoc.arg(format!("--crate-name={}", krate.name)).arg(format!("--edition={}", krate.edition));
    for feature in &krate.features {
        rustdoc.arg(format!("--cfg=feature=\"{feature}\""));
    }
    for (name, file) in &krate.externs {
        rustdoc.arg("--extern").arg(format!("{name}={}", file.display()));
    }
    for folder in &krate.folders {
        rustdoc.arg(format!("-Ldependency={}", folder.display()));
    }
    let output = rustdoc.arg("-o").arg(out.path()).arg(&krate.root).output().context("cannot run rustdoc")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let error = said.lines().find(|line| line.starts_with("error")).unwrap_or("no message");
        bail!("rustdoc fails on {}: {error}", krate.name);
    }
    let json = std::fs::read(out.path().join(format!("{}.json", krate.name))).context("rustdoc wrote no JSON")?;
    Ok(serde_json::from_slice(&json)?)
}

/// Condenses what rustdoc wrote of one crate.
struct Reader<'a>(&'a Value);

/// The kind of a rustdoc item, and its particulars.
fn inner(item: &Value) -> Option<(&str, &Value)> {
    item["inner"].as_object()?.iter().next().map(|(kind, inner)| (kind.as_str(), inner))
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

impl<'a> Reader<'a> {
    fn get(&self, id: &Value) -> Option<&'a Value> {
        self.0["index"].get(id.to_string())
    }

    /// Where an item is defined; empty if that is not said.
    fn defined(&self, id: &str) -> String {
        joined(&self.0["paths"][id]["path"], text, "::")
    }

    fn read_into(&self, api: &mut Api) {
        // The best path of each item, and each module's names with the ids that they stand for.
        let mut best: HashMap<String, String> = HashMap::new();
        let mut exports: Vec<(String, String, &Value)> = Vec::new();
        let Some(root) = self.get(&self.0["root"]) else { return };
        let mut queue = VecDeque::from([(text(&root["name"]), root)]);
        let mut seen = HashSet::new();
        best.insert(self.0["root"].to_string(), text(&root["name"]));
        while let Some((path, module)) = queue.pop_front() {
            if !seen.insert(path.clone()) {
                continue;
            }
            api.modules.entry(path.clone()).or_default();
            for (name, id) in self.exports_of(module) {
                let own = format!("{path}::{name}");
                if let Some(item) = self.get(id).filter(|item| item["inner"].get("module").is_some()) {
                    queue.push_back((own.clone(), item));
                }
                let rank = |path: &str| (path.contains("::prelude::"), path.matches("::").count());
                let known = best.entry(id.to_string()).or_insert_with(|| own.clone());
                if rank(&own) < rank(known) {
                    *known = own;
                }
                exports.push((path.clone(), name, id));
            }
        }
        for (module, name, id) in exports {
            // What another crate defines is named as it names it.
            let defined = Some(self.defined(&id.to_string())).filter(|path| !path.is_empty());
            let path = if self.get(id).is_some() { best.get(&id.to_string()).cloned() } else { defined };
            api.modules.entry(module).or_default().extend(path.map(|path| (name, path)));
        }
        let mut items: Vec<Item> = best.iter().filter_map(|(id, path)| self.item(id, path)).collect();
        items.sort_by(|a, b| a.path.cmp(&b.path));
        api.items.extend(items);
    }

    /// What a module exports under which name. Globs are followed.
    fn exports_of(&self, module: &'a Value) -> Vec<(String, &'a Value)> {
        let mut found = Vec::new();
        for id in list(&module["inner"]["module"]["items"]) {
            let Some(item) = self.get(id) else { continue };
            let import = &item["inner"]["use"];
            if import["is_glob"] == true {
                let module = self.get(&import["id"]).filter(|target| target["inner"].get("module").is_some());
                found.extend(module.map(|module| self.exports_of(module)).unwrap_or_default());
            } else if import.is_object() {
                found.push((text(&import["name"]), &import["id"]));
            } else if item["name"].is_string() && item["visibility"] == "public" {
                found.push((text(&item["name"]), id));
            }
        }
        found
    }

    fn item(&self, id: &str, path: &str) -> Option<Item> {
        let item = self.0["index"].get(id)?;
        let (kind, inner) = inner(item)?;
        let name = last_segment(path);
        let generics = generics(&inner["generics"]);
        let members = match kind {
            "struct" | "union" => self.fields(inner).chain(self.methods(inner, name)).collect(),
            "enum" => self.variants(inner).chain(self.methods(inner, name)).collect(),
            "trait" => list(&inner["items"]).filter_map(|id| member(self.get(id)?, "Self")).collect(),
            _ => Vec::new(),
        };
        let (kind, signature) = match kind {
            "function" => ("function", function(name, inner)),
            "constant" => ("constant", format!("const {name}: {}", ty(&inner["type"]))),
            "type_alias" => ("type", format!("type {name}{generics} = {}", ty(&inner["type"]))),
            "module" => ("module", format!("mod {name}")),
            "macro" | "proc_macro" => ("macro", format!("macro {name}!")),
            "struct" | "enum" | "trait" | "union" | "static" => (kind, format!("{kind} {name}{generics}")),
            _ => return None,
        };
        let defined = self.defined(id);
        Some(Item {
            path: path.to_owned(),
            defined: if defined == path { String::new() } else { defined },
            kind: kind.to_owned(),
            signature,
            docs: text(&item["docs"]),
            ty: (kind == "function").then(|| ty(&inner["sig"]["output"])),
            members,
        })
    }

    fn fields(&self, inner: &'a Value) -> impl Iterator<Item = Member> {
        let plain = list(&inner["kind"]["plain"]["fields"]).chain(list(&inner["kind"]["tuple"]));
        plain.filter_map(|id| self.get(id)).filter(|field| field["visibility"] == "public").map(field)
    }

    fn variants(&self, inner: &'a Value) -> impl Iterator<Item = Member> {
        list(&inner["variants"]).filter_map(|id| self.get(id)).map(|variant| {
            let name = text(&variant["name"]);
            let kind = &variant["inner"]["variant"]["kind"];
            let parts = |ids: &'a Value, part: fn(Member) -> String| {
                let fields = list(ids).filter_map(|id| self.get(id)).map(field);
                fields.map(part).collect::<Vec<_>>().join(", ")
            };
            let signature = if kind["tuple"].is_array() {
                format!("{name}({})", parts(&kind["tuple"], |field| field.ty.unwrap_or_default()))
            } else if kind["struct"].is_object() {
                format!("{name} {{ {} }}", parts(&kind["struct"]["fields"], |field| field.signature))
            } else {
                name.clone()
            };
            Member { name, kind: "variant".into(), signature, docs: text(&variant["docs"]), ty: None }
        })
    }

    /// Inherent methods first, then those of the crate's own traits, `clone` and `default`.
    fn methods(&self, inner: &'a Value, name: &str) -> impl Iterator<Item = Member> {
        let mut found: Vec<Member> = Vec::new();
        let mut add = |member: Member| {
            if found.iter().all(|earlier| earlier.name != member.name) {
                found.push(member);
            }
        };
        let impls = || list(&inner["impls"]).filter_map(|id| Some(&self.get(id)?["inner"]["impl"]));
        let items = |ids: &'a Value| list(ids).filter_map(|id| self.get(id));
        for block in impls().filter(|block| block["trait"].is_null()) {
            items(&block["items"])
                .filter(|item| item["visibility"] == "public")
                .filter_map(|i| member(i, name))
                .for_each(&mut add);
        }
        for block in impls().filter(|block| block["blanket_impl"].is_null() && block["is_synthetic"] == false) {
            let of = &block["trait"];
            let is_own = self.get(&of["id"]).filter(|of| of["crate_id"] == 0);
            match (is_own, last_segment(of["path"].as_str().unwrap_or_default())) {
                // The trait's own documentation; whether the type overrides a method is its affair.
                (Some(of), _) => {
                    items(&of["inner"]["trait"]["items"]).filter_map(|i| member(i, name)).for_each(&mut add)
                }
                (None, "Clone") => add(Member::simple("clone", "method", &format!("fn clone(&self) -> {name}"), name)),
                (None, "Default") => {
                    add(Member::simple("default", "function", &format!("fn default() -> {name}"), name))
                }
                _ => {}
            }
        }
        found.into_iter()
    }
}

impl Member {
    pub fn simple(name: &str, kind: &str, signature: &str, ty: &str) -> Member {
        let ty = Some(ty.to_owned()).filter(|ty| !ty.is_empty());
        Member { name: name.into(), kind: kind.into(), signature: signature.into(), docs: String::new(), ty }
    }
}

fn field(item: &Value) -> Member {
    let (name, ty) = (text(&item["name"]), ty(&item["inner"]["struct_field"]));
    Member { signature: format!("{name}: {ty}"), name, kind: "field".into(), docs: text(&item["docs"]), ty: Some(ty) }
}

/// A function, constant or type of an impl or a trait; `owner` is what Self means there.
fn member(item: &Value, owner: &str) -> Option<Member> {
    let (kind, inner) = inner(item)?;
    let name = text(&item["name"]);
    let (kind, signature, ty) = match kind {
        "function" => {
            let takes_self = inner["sig"]["inputs"][0][0] == "self";
            let returned = ty(&inner["sig"]["output"]);
            (if takes_self { "method" } else { "function" }, function(&name, inner), returned)
        }
        "assoc_const" => ("constant", format!("const {name}: {}", ty(&inner["type"])), ty(&inner["type"])),
        _ => return None,
    };
    let ty = Some(replace_word(&ty, "Self", owner));
    Some(Member { name, kind: kind.into(), signature, docs: text(&item["docs"]), ty })
}

pub(crate) fn replace_word(text: &str, word: &str, with: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(word) {
        let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let is_word = !is_part(rest[..at].chars().next_back()) && !is_part(rest[at + word.len()..].chars().next());
        out.push_str(&rest[..at]);
        out.push_str(if is_word { with } else { word });
        rest = &rest[at + word.len()..];
    }
    out + rest
}

/// A function's signature in one line.
fn function(name: &str, inner: &Value) -> String {
    let header = &inner["header"];
    let mut out = String::new();
    for (key, word) in [("is_const", "const "), ("is_async", "async "), ("is_unsafe", "unsafe ")] {
        out.push_str(if header[key] == true { word } else { "" });
    }
    let inputs = list(&inner["sig"]["inputs"]).map(|input| match (input[0].as_str(), ty(&input[1]).as_str()) {
        (Some("self"), "Self") => "self".to_owned(),
        (Some("self"), "&Self") => "&self".to_owned(),
        (Some("self"), "&mut Self") => "&mut self".to_owned(),
        (name, ty) => format!("{}: {ty}", name.unwrap_or("_")),
    });
    let inputs = inputs.collect::<Vec<_>>().join(", ");
    out + &format!("fn {name}{}({inputs}){}", generics(&inner["generics"]), returned(&inner["sig"]["output"]))
}

/// ` -> T`; nothing for a function that returns nothing.
fn returned(output: &Value) -> String {
    if output.is_null() { String::new() } else { format!(" -> {}", ty(output)) }
}

fn joined(values: &Value, each: impl Fn(&Value) -> String, separator: &str) -> String {
    list(values).map(each).collect::<Vec<_>>().join(separator)
}

fn generics(generics: &Value) -> String {
    // `impl Trait` in an argument is a parameter without a name of its own.
    let written = list(&generics["params"]).filter(|param| param["kind"]["type"]["is_synthetic"] != true);
    let params = written.map(|param| {
        let bounds = bounds(&param["kind"]["type"]["bounds"]);
        let name = text(&param["name"]);
        match (&param["kind"]["const"], bounds.is_empty()) {
            (Value::Object(constant), _) => format!("const {name}: {}", ty(&constant["type"])),
            (_, true) => name,
            (_, false) => format!("{name}: {bounds}"),
        }
    });
    let params = params.collect::<Vec<_>>().join(", ");
    if params.is_empty() { params } else { format!("<{params}>") }
}

fn bounds(bounds: &Value) -> String {
    let bound = |bound: &Value| match (&bound["trait_bound"], bound["outlives"].as_str()) {
        (Value::Object(of), _) => {
            let maybe = if of["modifier"] == "maybe" { "?" } else { "" };
            format!("{maybe}{}", path(&of["trait"]))
        }
        (_, outlives) => outlives.unwrap_or("_").to_owned(),
    };
    joined(bounds, bound, " + ")
}

/// A path's last name with its arguments: people read `Result<Tensor>`, not where each comes from.
fn path(value: &Value) -> String {
    let name = last_segment(value["path"].as_str().unwrap_or("_")).to_owned();
    let args = &value["args"];
    if let Some(args) = args.get("angle_bracketed") {
        let plain = list(&args["args"]).map(|arg| match (arg.get("type"), arg["lifetime"].as_str()) {
            (Some(arg), _) => ty(arg),
            (_, Some(lifetime)) => lifetime.to_owned(),
            _ => arg["const"]["expr"].as_str().unwrap_or("_").to_owned(),
        });
        let bound = list(&args["constraints"]).map(|of| {
            let equal = &of["binding"]["equality"]["type"];
            match equal.is_null() {
                true => format!("{}: {}", text(&of["name"]), bounds(&of["binding"]["constraint"])),
                false => format!("{} = {}", text(&of["name"]), ty(equal)),
            }
        });
        let all = plain.chain(bound).collect::<Vec<_>>().join(", ");
        return if all.is_empty() { name } else { format!("{name}<{all}>") };
    }
    if let Some(args) = args.get("parenthesized") {
        return format!("{name}({}){}", joined(&args["inputs"], ty, ", "), returned(&args["output"]));
    }
    name
}

/// A type as Rust writes it.
fn ty(value: &Value) -> String {
    let Some((kind, inner)) = value.as_object().and_then(|kinds| kinds.iter().next()) else { return "()".to_owned() };
    let reference = |sigil: &str, inner: &Value| {
        let lifetime = inner["lifetime"].as_str().map(|name| format!("{name} ")).unwrap_or_default();
        let mutable = if inner["is_mutable"] == true { "mut " } else { "" };
        format!("{sigil}{lifetime}{mutable}{}", ty(&inner["type"]))
    };
    match kind.as_str() {
        "resolved_path" => path(inner),
        "generic" | "primitive" => text(inner),
        "borrowed_ref" => reference("&", inner),
        "raw_pointer" => reference(if inner["is_mutable"] == true { "*" } else { "*const " }, inner),
        "tuple" => format!("({})", joined(inner, ty, ", ")),
        "slice" => format!("[{}]", ty(inner)),
        "array" => format!("[{}; {}]", ty(&inner["type"]), text(&inner["len"])),
        "impl_trait" => format!("impl {}", bounds(inner)),
        "dyn_trait" => format!("dyn {}", joined(&inner["traits"], |of| path(&of["trait"]), " + ")),
        "function_pointer" => {
            let inputs = joined(&inner["sig"]["inputs"], |input| ty(&input[1]), ", ");
            format!("fn({inputs}){}", returned(&inner["sig"]["output"]))
        }
        "qualified_path" => format!("{}::{}", ty(&inner["self_type"]), text(&inner["name"])),
        _ => "_".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A crate `k` with a private module whose type is exported by the root and by the prelude.
    fn described() -> Value {
        let public = |id: u32, name: &str, inner: Value| {
            (
                id.to_string(),
                json!({ "id": id, "crate_id": 0, "name": name, "visibility": "public", "docs": "D", "inner": inner }),
            )
        };
        let import = |id: u32, name: &str, target: u32| {
            let inner = json!({ "use": { "name": name, "id": target, "is_glob": false } });
            (id.to_string(), json!({ "id": id, "name": null, "visibility": "public", "inner": inner }))
        };
        let reference =
            json!({ "borrowed_ref": { "lifetime": null, "is_mutable": true, "type": { "generic": "Self" } } });
        let result = json!({ "resolved_path": { "path": "a::Result", "id": 9, "args": { "angle_bracketed": {
            "args": [{ "type": { "generic": "Self" } }], "constraints": [] } } } });
        let fun = json!({ "function": { "sig": { "inputs": [["self", reference], ["n", { "primitive": "usize" }]],
            "output": result }, "generics": { "params": [] }, "header": {} } });
        let index: serde_json::Map<String, Value> = [
            public(0, "k", json!({ "module": { "items": [1, 2, 3] } })),
            import(1, "Thing", 5),
            public(2, "prelude", json!({ "module": { "items": [4, 8] } })),
            public(3, "Kind", json!({ "enum": { "variants": [7], "impls": [] } })),
            import(4, "Thing", 5),
            public(5, "Thing", json!({ "struct": { "kind": { "plain": { "fields": [10] } }, "impls": [6] } })),
            public(6, "", json!({ "impl": { "trait": null, "items": [11] } })),
            public(7, "One", json!({ "variant": { "kind": { "tuple": [10] } } })),
            import(8, "Tensor", 12),
            public(10, "rate", json!({ "struct_field": { "primitive": "f64" } })),
            public(11, "run", fun),
        ]
        .into_iter()
        .collect();
        let paths =
            json!({ "5": { "path": ["k", "hidden", "Thing"] }, "12": { "path": ["candle_core", "tensor", "Tensor"] } });
        json!({ "root": 0, "index": index, "paths": paths })
    }

    #[test]
    fn condenses_what_rustdoc_wrote() {
        let mut api = Api::default();
        Reader(&described()).read_into(&mut api);
        let thing = api.item("k::Thing").expect("indexed under its public path");
        assert_eq!((thing.defined.as_str(), thing.signature.as_str()), ("k::hidden::Thing", "struct Thing"));
        let run = thing.member("run").expect("a method");
        assert_eq!(run.signature, "fn run(&mut self, n: usize) -> Result<Self>");
        assert_eq!((run.kind.as_str(), run.ty.as_deref()), ("method", Some("Result<Thing>")));
        assert_eq!(thing.member("rate").map(|field| field.signature.as_str()), Some("rate: f64"));
        assert_eq!(api.item("k::Kind").expect("an enum").members[0].signature, "One(f64)");
        assert_eq!(api.modules["k::prelude"]["Thing"], "k::Thing");
        assert_eq!(api.modules["k::prelude"]["Tensor"], "candle_core::tensor::Tensor");
        assert_eq!(api.type_at("k::hidden::Thing").map(Item::name), Some("Thing"));
    }

    #[test]
    fn an_index_of_another_form_is_no_index() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("api.json");
        let api = Api { form: FORM, built: "b".into(), items: vec![Item::default()], ..Default::default() };
        std::fs::write(&path, api.to_json()).expect("written");
        assert!(is_current(&path, "b") && !is_current(&path, "c"));
        std::fs::write(&path, Api { form: FORM + 1, ..api }.to_json()).expect("written");
        assert!(!is_current(&path, "b"));
        assert_eq!(Api::load(&path).items.len(), 0);
    }

    #[test]
    fn replaces_whole_words() {
        assert_eq!(replace_word("Result<Self, SelfError>", "Self", "T"), "Result<T, SelfError>");
    }
}
