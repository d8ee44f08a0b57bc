//! Lays the library out for notebooks, and the kernel for Jupyter.
//!
//! Every cell becomes a library of its own. If each carried its own copy of candle, each would count tensor ids
//! from 1, and gradients would be added up for the wrong tensors: so all cells share one dylib. It is linked
//! here from the very rlib that the tests run (nothing is compiled twice), together with copies of the
//! metadata of all crates in it, so that a `cargo clean` does not break a notebook.
//!
//! An installation has four parts, each made only if it is not there already: the library, this binary as the
//! kernel, the index for completion ([`api`]), the [`kernelspec`]. Where they lie: [`layout`](crate::layout).

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{fs, io};

use anyhow::{Context, Result, bail};
use cargo_metadata::{Artifact, Message, Metadata, Node, Package, PackageId};

use crate::layout::{
    API, BINARY, BINARY_ENTRY, BUILT, DYLIB, INIT, LIBRARY_ENTRIES, Layout, Place, RUSTC, Staging, Target,
};
use crate::layout::{cannot, create_folder, first_line, remedy_for_linker, rustc_version, write_if_changed};
use crate::{api, kernelspec};

/// Counts the forms of an installation. One of another form is made anew.
const FORM: u32 = 2;
/// The library's package.
const LIBRARY: &str = "qlora-nb";

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    /// The qlora-nb sources [default: where this binary was built]
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
}

pub fn install(options: &Options) -> Result<()> {
    let begin = Instant::now();
    let Place { layout, kernelspec } = options.target.place()?;
    // Before the build, which may put another in its place.
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let rustc = rustc_version()?;
    let source = sources(options.source.as_deref())?;
    kernelspec::refuse_foreign(&kernelspec)?;
    // Before the build, so that a folder that cannot be written costs no minutes.
    let _claim = layout.claim(&kernelspec)?;

    println!("building the library in {} with {}", source.display(), first_line(&rustc));
    let built = build(&source)?;
    println!("  built or fresh after {:.1} s", begin.elapsed().as_secs_f64());
    let parts = [
        install_library(&layout, &built, &rustc)?,
        install_binary(&layout, &own)?,
        install_api(&layout, &built)?,
        kernelspec::write(&kernelspec, &layout)?,
    ];
    if parts.contains(&true) {
        println!("installed in {}", layout.prefix.display());
        println!("kernelspec   {}", kernelspec.display());
        println!("{:.1} s in all", begin.elapsed().as_secs_f64());
    } else {
        println!("{} is up to date", layout.prefix.display());
    }
    Ok(())
}

fn sources(source: Option<&Path>) -> Result<PathBuf> {
    let source = source.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."), Path::to_owned);
    let found = source.canonicalize().ok().filter(|dir| dir.join("crate/Cargo.toml").exists());
    found.with_context(|| {
        format!(
            "no qlora-nb sources in {}: the library is built from them, for the rustc of this machine
             remedy: pass --source DIR, a clone of the repository",
            source.display()
        )
    })
}

fn install_library(layout: &Layout, built: &Built, rustc: &str) -> Result<bool> {
    if is_current(layout, built, rustc) {
        return Ok(false);
    }
    let begin = Instant::now();
    let staging = Staging::new(layout)?;
    link_dylib(&staging.path("lib"), built)?;
    let (count, bytes) = copy_metadata(&staging.path("deps"), built, &staging.path(DYLIB))?;
    println!("  copied metadata of {count} crates ({} MiB)", bytes >> 20);
    write_if_changed(&staging.path(INIT), layout.init_evcxr().as_bytes())?;
    write_if_changed(&staging.path("built"), built.stamp()?.as_bytes())?;
    write_if_changed(&staging.path("rustc"), rustc.as_bytes())?;
    staging.commit(&LIBRARY_ENTRIES)?;
    let size = fs::metadata(layout.at(DYLIB))?.len() >> 20;
    println!("  linked {} ({size} MiB) in {:.1} s", layout.at(DYLIB).display(), begin.elapsed().as_secs_f64());
    Ok(true)
}

/// Copies this binary into the layout, also when it is the one that lies there.
fn install_binary(layout: &Layout, own: &Path) -> Result<bool> {
    let read = |path: &Path| fs::read(path).map_err(|error| cannot("read", path, error));
    if layout.at(BINARY).exists() && read(own)? == read(&layout.at(BINARY))? {
        return Ok(false);
    }
    let staging = Staging::new(layout)?;
    let copy = staging.path(BINARY);
    create_folder(&staging.path(BINARY_ENTRY))?;
    let bytes = fs::copy(own, &copy).map_err(|error| cannot("copy the kernel to", &copy, error))?;
    staging.commit(&[BINARY_ENTRY])?;
    println!("  copied the kernel to {} ({} MiB)", layout.at(BINARY).display(), bytes >> 20);
    Ok(true)
}

/// Notebooks run without the index, so what goes wrong here is said and no more.
fn install_api(layout: &Layout, built: &Built) -> Result<bool> {
    let stamp = built.stamp()?;
    if api::is_current(&layout.at(API), &stamp) {
        return Ok(false);
    }
    let begin = Instant::now();
    match api::make(&built.documented, &stamp) {
        Ok(api) => {
            write_if_changed(&layout.at(API), &api.to_json())?;
            println!("  indexed {} items for completion in {:.1} s", api.items.len(), begin.elapsed().as_secs_f64());
        }
        Err(error) => println!("  no index of the library: completion will know less ({error:#})"),
    }
    Ok(true)
}

/// What cargo says it built.
#[derive(Default)]
struct Built {
    /// The library itself.
    rlib: PathBuf,
    /// Where build scripts put native libraries: `-L` arguments.
    native: Vec<String>,
    /// The library, and candle, which it shows to its users: what completion should know.
    documented: Vec<api::Documented>,
}

impl Built {
    fn folder(&self) -> Result<&Path> {
        self.rlib.parent().context("an rlib without a folder")
    }

    /// Tells one build from another.
    fn stamp(&self) -> Result<String> {
        let metadata = fs::metadata(&self.rlib)?;
        let modified = metadata.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(format!("{FORM} {} {} {}\n", self.rlib.display(), metadata.len(), modified.as_nanos()))
    }
}

/// Builds the whole workspace, and not the library alone: cargo unites the features of dependencies over what is
/// built together, and would compile dozens of crates a second time for another set.
fn build(source: &Path) -> Result<Built> {
    let build = ["build", "--release", "--workspace", "--message-format=json-render-diagnostics"];
    let messages = cargo(source, &build)?;
    let metadata = cargo(source, &["metadata", "--format-version=1"])?;
    let metadata: Metadata = serde_json::from_slice(&metadata).context("cargo's metadata is not understood")?;
    let mut built = Built::default();
    let mut artifacts = HashMap::new();
    for message in Message::parse_stream(&messages[..]) {
        match message? {
            Message::BuildScriptExecuted(script) => {
                built.native.extend(script.linked_paths.into_iter().map(String::from));
            }
            Message::CompilerArtifact(artifact) => {
                if artifact.target.name == "qlora_nb" {
                    let rlib = artifact.filenames.iter().find(|file| file.extension() == Some("rlib"));
                    built.rlib = rlib.map_or(built.rlib, PathBuf::from);
                } else if let Some(file) = metadata_file(&artifact) {
                    artifacts.insert(artifact.package_id, file);
                }
            }
            _ => {}
        }
    }
    if built.rlib.as_os_str().is_empty() {
        bail!("cargo built no rlib of qlora_nb from {}", source.display());
    }
    let described = [LIBRARY, "candle-core"].into_iter().filter_map(|name| documented(&metadata, name, &artifacts));
    built.documented = described.collect();
    Ok(built)
}

/// Where a crate's metadata is: its rmeta, or the library of a proc macro. A crate that is built as a C library too has no
/// rmeta of its own: its rlib holds the metadata. (Its .so has none, and would be taken for a damaged crate.)
fn metadata_file(artifact: &Artifact) -> Option<PathBuf> {
    let with = |extension| artifact.filenames.iter().find(|file| file.extension() == Some(extension));
    let proc_macro = || with("so").filter(|_| artifact.target.is_proc_macro());
    with("rmeta").or_else(|| with("rlib")).or_else(proc_macro).map(PathBuf::from)
}

fn package<'a>(metadata: &'a Metadata, name: &str) -> Option<&'a Package> {
    metadata.packages.iter().find(|package| package.name == name)
}

/// The dependencies of a package.
fn node<'a>(metadata: &'a Metadata, id: &PackageId) -> Option<&'a Node> {
    metadata.resolve.as_ref()?.nodes.iter().find(|node| node.id == *id)
}

/// What rustdoc needs for a package, from what cargo has built.
fn documented(metadata: &Metadata, name: &str, artifacts: &HashMap<PackageId, PathBuf>) -> Option<api::Documented> {
    let package = package(metadata, name)?;
    let node = node(metadata, &package.id)?;
    let target = package.targets.iter().find(|target| target.is_lib() || target.is_rlib())?;
    let externs = node.deps.iter().filter_map(|dep| Some((dep.name.to_string(), artifacts.get(&dep.pkg)?.clone())));
    Some(api::Documented {
        name: target.name.replace('-', "_"),
        root: target.src_path.clone().into(),
        edition: target.edition.to_string(),
        version: package.version.to_string(),
        features: node.features.iter().map(|feature| feature.to_string()).collect(),
        externs: externs.collect(),
        folders: artifacts.values().filter_map(|file| file.parent()).map(Path::to_owned).collect(),
    })
}

fn cargo(source: &Path, args: &[&str]) -> Result<Vec<u8>> {
    let mut command = Command::new("cargo");
    command.args(args).current_dir(source).stderr(Stdio::inherit());
    // Some crates look at these while they are compiled, and are compiled anew when one changes: evcxr's
    // rust-analyzer at CI, ring at what cargo tells a program that it runs (a test of ours, say) of its package.
    let of_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name == "CI" || name.to_str().is_some_and(of_package) {
            command.env_remove(name);
        }
    }
    let remedy = "remedy: install Rust with rustup, have ~/.cargo/bin on PATH";
    let output = command.output().with_context(|| format!("cannot run cargo, which builds the library\n{remedy}"))?;
    if !output.status.success() {
        bail!("`cargo {}` failed: see its messages above", args.join(" "));
    }
    Ok(output.stdout)
}

fn is_current(layout: &Layout, built: &Built, rustc: &str) -> bool {
    fs::read_to_string(layout.at(RUSTC)).is_ok_and(|text| text == rustc)
        && fs::read_to_string(layout.at(BUILT)).is_ok_and(|text| built.stamp().is_ok_and(|now| now == text))
        && layout.check().is_ok()
}

/// Copies the metadata of all crates in the dylib but std's: rustc reads it all for each cell, and needs nothing else of
/// them, for their code is in the dylib.
fn copy_metadata(deps: &Path, built: &Built, dylib: &Path) -> Result<(usize, u64)> {
    create_folder(deps)?;
    let folder = built.folder()?.join("deps");
    let (mut count, mut bytes, mut macros) = (0, 0, Vec::new());
    for name in crates_in(dylib)? {
        // In this order: a crate with an rlib and a .so is built as a C library too, whose .so has no metadata.
        let mut found = ["rmeta", "rlib", "so"].iter().map(|extension| format!("lib{name}.{extension}"));
        let Some(file) = found.find(|file| folder.join(file).exists()) else { continue };
        let (from, copy) = (folder.join(&file), deps.join(&file));
        bytes += match file.ends_with(".rlib") {
            true => copy_metadata_alone(&from, &copy),
            false => fs::copy(&from, &copy),
        }
        .map_err(|error| cannot("copy a library to", &copy, error))?;
        count += 1;
        macros.extend(file.ends_with(".so").then_some(copy));
    }
    // A third of the procedural macros are symbols, for nobody. Where there is no `strip`, they stay.
    let _ = Command::new("strip").args(macros).stderr(Stdio::null()).status();
    Ok((count, bytes))
}

/// The crates in a library, as their files are named: `serde_json-b7a5b60358df109f`. To list them is a thing that only a
/// nightly rustc does unasked.
fn crates_in(library: &Path) -> Result<Vec<String>> {
    let output = Command::new("rustc").arg("-Zls=root").arg(library).env("RUSTC_BOOTSTRAP", "1").output();
    let output = output.context("cannot run rustc")?;
    let listed = String::from_utf8_lossy(&output.stdout);
    // `21 arrow-84c67b8db7d45c49 hash 5006... host_hash None kind Unconditional ...`
    let name = |line: &str| {
        let mut words = line.split(' ');
        words.next()?.parse::<u32>().ok()?;
        Some(words.next()?.to_owned())
    };
    let crates: Vec<String> = listed.lines().filter_map(name).collect();
    if crates.is_empty() {
        bail!("rustc lists no crates in {}:\n{listed}{}", library.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(crates)
}

/// Copies of an rlib what rustc reads where the code is elsewhere. Returns its size.
fn copy_metadata_alone(rlib: &Path, copy: &Path) -> io::Result<u64> {
    let archive = fs::read(rlib)?;
    let kept = metadata_alone(&archive).unwrap_or(archive);
    fs::write(copy, &kept)?;
    Ok(kept.len() as u64)
}

/// An archive with the one member that is rustc's metadata; None if it has none.
fn metadata_alone(archive: &[u8]) -> Option<Vec<u8>> {
    const MAGIC: &[u8] = b"!<arch>\n";
    const HEADER: usize = 60;
    let mut members = archive.strip_prefix(MAGIC)?;
    loop {
        let size: usize = std::str::from_utf8(members.get(48..58)?).ok()?.trim().parse().ok()?;
        // Members begin at even places.
        let (member, others) = members.split_at_checked(HEADER + size.next_multiple_of(2))?;
        if member.starts_with(b"lib.rmeta/") {
            return Some([MAGIC, member].concat());
        }
        members = others;
    }
}

/// Links the library and all its dependencies, but not std, into one dylib of the same name.
fn link_dylib(folder: &Path, built: &Built) -> Result<()> {
    let facade = folder.join("qlora_nb.rs");
    write_if_changed(&facade, b"pub use library::*;\n")?;
    let rlib_deps = built.folder()?;
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition=2024", "--crate-name=qlora_nb", "--crate-type=dylib", "-Cprefer-dynamic"]);
    // Another crate than the one it contains, though of the same name: the name is what error messages print.
    rustc.args(["-Cmetadata=notebook", "-Copt-level=3", "-Cstrip=symbols"]);
    rustc.arg("--extern").arg(join("library=", &built.rlib));
    for folder in [rlib_deps, &rlib_deps.join("deps")] {
        rustc.arg("-L").arg(join("dependency=", folder));
    }
    for path in &built.native {
        rustc.arg("-L").arg(path);
    }
    let output = rustc.arg("--out-dir").arg(folder).arg(&facade).output().context("cannot run rustc")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        // The linker writes through mapped memory, where a full disk is a bus error.
        let remedy = if ["No space left", "File too large", "Bus error"].iter().any(|sign| said.contains(sign)) {
            "\nremedy: free about 1 GiB there, or install elsewhere with --prefix DIR"
        } else {
            remedy_for_linker(&said)
        };
        bail!("the dylib does not link:\n{said}{remedy}");
    }
    Ok(())
}

fn join(before: &str, path: &Path) -> OsString {
    let mut text = OsString::from(before);
    text.push(path);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_rlib_only_the_metadata_is_kept() {
        let member = |name: &str, data: &str| format!("{name:<48}{:<10}`\n{data}", data.len());
        let archive = |members: &[&str]| format!("!<arch>\n{}", members.concat());
        let (symbols, metadata, code) =
            (member("/", "symbols!"), member("lib.rmeta/", "odd") + "\n", member("a.o/", "code"));
        let kept = |members: &[&str]| metadata_alone(archive(members).as_bytes());
        assert_eq!(kept(&[&symbols, &metadata, &code]), Some(archive(&[&metadata]).into_bytes()));
        assert_eq!(kept(&[&symbols, &code]), None);
        assert_eq!(kept(&[&metadata[..62]]), None);
        assert_eq!(metadata_alone(b"no archive"), None);
    }
}
