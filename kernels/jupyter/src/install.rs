//! Lays the library out for notebooks.
//!
//! Every cell becomes a library of its own. If each carried its own copy of candle, each would count tensor ids
//! from 1, and gradients would be added up for the wrong tensors: so all cells share one dylib. It is linked
//! here from the very rlib that the tests run (nothing is compiled twice), together with copies of the
//! metadata of its dependencies, so that a `cargo clean` does not break a notebook.
//!
//! ```text
//! PREFIX/rustc            what `rustc -vV` said: the dylib serves this compiler only
//! PREFIX/built            which build of the library it was linked from
//! PREFIX/lib/             libqlora_nb.so
//! PREFIX/deps/            metadata of qlora_nb and all that it depends on
//! PREFIX/evcxr/           init.evcxr: how cells are compiled
//! ```

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Where notebooks find the library.
pub struct Layout {
    pub prefix: PathBuf,
}

impl Layout {
    pub fn new(prefix: &Path) -> Layout {
        Layout { prefix: prefix.to_owned() }
    }

    pub fn dylib(&self) -> PathBuf {
        self.prefix.join("lib/libqlora_nb.so")
    }

    pub fn deps(&self) -> PathBuf {
        self.prefix.join("deps")
    }

    pub fn evcxr_config(&self) -> PathBuf {
        self.prefix.join("evcxr")
    }

    fn rustc_stamp(&self) -> PathBuf {
        self.prefix.join("rustc")
    }

    fn built_stamp(&self) -> PathBuf {
        self.prefix.join("built")
    }

    /// Whether notebooks can use what is there; else what is wrong and the remedy.
    pub fn check(&self) -> Result<()> {
        let prefix = self.prefix.display();
        let Ok(installed_for) = fs::read_to_string(self.rustc_stamp()) else {
            bail!("no library for notebooks in {prefix}\nremedy: qlora-nb install (or --prefix DIR, where it is)");
        };
        for needed in [self.dylib(), self.deps(), self.evcxr_config().join("init.evcxr")] {
            if !needed.exists() {
                bail!("{} is missing\nremedy: qlora-nb install", needed.display());
            }
        }
        let rustc = rustc_version()?;
        if installed_for.trim() != rustc.trim() {
            bail!(
                "the library in {prefix} was built by {}, and a notebook's cells would be built by {}\n\
                 remedy: qlora-nb install",
                first_line(&installed_for),
                first_line(&rustc)
            );
        }
        let init = fs::read_to_string(self.evcxr_config().join("init.evcxr"))?;
        if !init.contains(&*self.dylib().to_string_lossy()) {
            bail!("{prefix} was moved after it was installed\nremedy: qlora-nb install --prefix {prefix}");
        }
        Ok(())
    }
}

pub fn default_prefix() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let prefix = from("QLORA_NB_PREFIX")
        .or_else(|| Some(from("XDG_DATA_HOME")?.join("qlora-nb")))
        .or_else(|| Some(from("HOME")?.join(".local/share/qlora-nb")))
        .context("neither QLORA_NB_PREFIX, XDG_DATA_HOME nor HOME is set: pass --prefix DIR")?;
    Ok(std::path::absolute(prefix)?)
}

/// `rustc -vV`, which names compiler, commit and host.
pub fn rustc_version() -> Result<String> {
    let remedy = "remedy: install Rust 1.95 or newer with rustup, and have ~/.cargo/bin on PATH";
    match Command::new("rustc").arg("-vV").output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => bail!("rustc -vV failed: {}\n{remedy}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => bail!("cannot run rustc, which compiles the cells: {error}\n{remedy}"),
    }
}

/// Where this rustc's toolchain lies.
pub fn sysroot() -> Result<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("cannot run rustc")?;
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

pub fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

pub fn install(prefix: &Path, source: Option<&Path>) -> Result<()> {
    let begin = Instant::now();
    let layout = Layout::new(prefix);
    let rustc = rustc_version()?;
    let source = match source {
        Some(dir) => dir.to_owned(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
    };
    let source = source
        .canonicalize()
        .ok()
        .filter(|dir| dir.join("crate/Cargo.toml").exists())
        .with_context(|| format!("no qlora-nb sources in {}: pass --source DIR", source.display()))?;

    println!("building the library in {} with {}", source.display(), first_line(&rustc));
    let built = build(&source)?;
    println!("  built or fresh after {:.1} s", begin.elapsed().as_secs_f64());

    if is_current(&layout, &built, &rustc) {
        println!("{} is up to date", prefix.display());
        return Ok(());
    }
    let step = Instant::now();
    for folder in [prefix.join("lib"), layout.evcxr_config()] {
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    // The stamp goes first and comes back last: an install that is cut short never passes for a whole one.
    let _ = fs::remove_file(layout.rustc_stamp());
    let (count, bytes) = copy_metadata(&layout, &built)?;
    println!("  copied metadata of {count} crates ({} MiB)", bytes >> 20);
    link_dylib(&layout, &built)?;
    println!("  linked {} ({} MiB)", layout.dylib().display(), fs::metadata(layout.dylib())?.len() >> 20);
    fs::write(layout.evcxr_config().join("init.evcxr"), init_evcxr(&layout))?;
    fs::write(layout.built_stamp(), built.stamp()?)?;
    fs::write(layout.rustc_stamp(), rustc)?;
    println!("installed in {} in {:.1} s", prefix.display(), step.elapsed().as_secs_f64());
    Ok(())
}

/// What cargo says it built.
#[derive(Default)]
struct Built {
    /// The library itself.
    rlib: PathBuf,
    /// rmetas and proc macros of all crates that it depends on.
    metadata: Vec<PathBuf>,
    /// Where build scripts put native libraries: `-L` arguments.
    native: Vec<String>,
}

impl Built {
    /// Tells one build from another.
    fn stamp(&self) -> Result<String> {
        let metadata = fs::metadata(&self.rlib)?;
        let modified = metadata.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(format!("{} {} {}\n", self.rlib.display(), metadata.len(), modified.as_nanos()))
    }
}

/// Builds the whole workspace, and not the library alone: cargo unites the features of dependencies over what is
/// built together, and would compile dozens of crates a second time for another set.
fn build(source: &Path) -> Result<Built> {
    let build = ["build", "--release", "--workspace", "--message-format=json-render-diagnostics"];
    let messages = cargo(source, &build)?;
    let metadata: Value = serde_json::from_slice(&cargo(source, &["metadata", "--format-version=1"])?)?;
    let needed = dependencies(&metadata);
    let mut built = Built::default();
    for line in messages.split(|b| *b == b'\n') {
        let Ok(message) = serde_json::from_slice::<Value>(line) else { continue };
        if !message["package_id"].as_str().is_some_and(|id| needed.contains(id)) {
            continue;
        }
        let strings = |key: &str| message[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        built.native.extend(strings("linked_paths").map(str::to_owned));
        let is_proc_macro =
            message["target"]["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|k| k == "proc-macro"));
        // A crate that is built as a C library too has no rmeta of its own: its rlib holds the metadata. (Its .so
        // has none, and would be taken for a damaged crate.)
        let has_rmeta = strings("filenames").any(|name| name.ends_with(".rmeta"));
        for file in strings("filenames").map(PathBuf::from) {
            let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if message["target"]["name"] != "qlora_nb" {
                let needed = match extension {
                    "rmeta" => true,
                    "rlib" => !has_rmeta,
                    "so" => is_proc_macro,
                    _ => false,
                };
                built.metadata.extend(needed.then_some(file));
            } else if extension == "rlib" {
                built.rlib = file;
            }
        }
    }
    if built.rlib.as_os_str().is_empty() {
        bail!("cargo built no rlib of qlora_nb from {}", source.display());
    }
    Ok(built)
}

fn cargo(source: &Path, args: &[&str]) -> Result<Vec<u8>> {
    // CI: evcxr's rust-analyzer looks at it while it is compiled, and is compiled anew when it changes.
    let output =
        Command::new("cargo").args(args).current_dir(source).env_remove("CI").stderr(Stdio::inherit()).output();
    let output = output.context("cannot run cargo; remedy: install Rust with rustup, have ~/.cargo/bin on PATH")?;
    if !output.status.success() {
        bail!("`cargo {}` failed: see its messages above", args.join(" "));
    }
    Ok(output.stdout)
}

/// The ids of the library's package and of all packages whose metadata its own metadata refers to.
fn dependencies(metadata: &Value) -> HashSet<&str> {
    let mut nodes = HashMap::new();
    for node in metadata["resolve"]["nodes"].as_array().into_iter().flatten() {
        nodes.insert(node["id"].as_str().unwrap_or_default(), &node["deps"]);
    }
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let library = packages.filter(|package| package["name"] == "qlora-nb").filter_map(|package| package["id"].as_str());
    let mut queue: Vec<&str> = library.collect();
    let mut needed = HashSet::new();
    while let Some(id) = queue.pop() {
        if needed.insert(id) {
            let deps = nodes.get(id).and_then(|deps| deps.as_array()).into_iter().flatten();
            let normal =
                |dep: &&Value| dep["dep_kinds"].as_array().is_some_and(|k| k.iter().any(|k| k["kind"].is_null()));
            queue.extend(deps.filter(normal).filter_map(|dep| dep["pkg"].as_str()));
        }
    }
    needed
}

fn is_current(layout: &Layout, built: &Built, rustc: &str) -> bool {
    fs::read_to_string(layout.rustc_stamp()).is_ok_and(|text| text == rustc)
        && fs::read_to_string(layout.built_stamp()).is_ok_and(|text| built.stamp().is_ok_and(|now| now == text))
        && layout.check().is_ok()
}

fn copy_metadata(layout: &Layout, built: &Built) -> Result<(usize, u64)> {
    let deps = layout.deps();
    if deps.exists() {
        fs::remove_dir_all(&deps).with_context(|| format!("cannot empty {}", deps.display()))?;
    }
    fs::create_dir_all(&deps).with_context(|| format!("cannot create {}", deps.display()))?;
    let mut bytes = 0;
    for file in built.metadata.iter().chain([&built.rlib]) {
        let name = file.file_name().context("a library without a name")?;
        bytes += fs::copy(file, deps.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    Ok((built.metadata.len() + 1, bytes))
}

/// Links the library and all its dependencies, but not std, into one dylib of the same name.
fn link_dylib(layout: &Layout, built: &Built) -> Result<()> {
    let folder = layout.prefix.join("lib");
    let facade = folder.join("qlora_nb.rs");
    fs::write(&facade, "pub use library::*;\n")?;
    let rlib_deps = built.rlib.parent().context("an rlib without a folder")?;
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition=2024", "--crate-name=qlora_nb", "--crate-type=dylib", "-Cprefer-dynamic"]);
    // Another crate than the one it contains, though of the same name: the name is what error messages print.
    rustc.args(["-Cmetadata=notebook", "-Copt-level=3", "--extern"]).arg(join("library=", &built.rlib));
    for folder in [rlib_deps, &rlib_deps.join("deps")] {
        rustc.arg("-L").arg(join("dependency=", folder));
    }
    for path in &built.native {
        rustc.arg("-L").arg(path);
    }
    // rustc puts the dylib beside its final name first, so a running notebook keeps the old one.
    let new = folder.join("new");
    fs::create_dir_all(&new)?;
    let output = rustc.arg("--out-dir").arg(&new).arg(&facade).output().context("cannot run rustc")?;
    if !output.status.success() {
        bail!("the dylib does not link:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    fs::rename(new.join("libqlora_nb.so"), layout.dylib())?;
    fs::remove_dir_all(&new)?;
    Ok(())
}

fn join(before: &str, path: &Path) -> OsString {
    let mut text = OsString::from(before);
    text.push(path);
    text
}

/// How evcxr, ours or another, compiles cells: against the dylib, and with std from rustc's own dylib, which the
/// library shares. The separator is the one that cargo wants where paths may contain spaces.
fn init_evcxr(layout: &Layout) -> String {
    let flags = [
        "-Cprefer-dynamic".to_owned(),
        format!("--extern=qlora_nb={}", layout.dylib().display()),
        format!("-Ldependency={}", layout.deps().display()),
    ];
    format!(":build_env CARGO_ENCODED_RUSTFLAGS={}\n", flags.join("\u{1f}"))
}
