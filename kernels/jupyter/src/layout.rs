//! Where the library lies for notebooks, and where Jupyter finds the kernel.
//!
//! ```text
//! LAYOUT/qlora-nb.json     our stamp: the folder is ours, and which kernelspec belongs to it
//! LAYOUT/rustc             what `rustc -vV` said: the dylib serves this compiler only
//! LAYOUT/built             which build of the library it was linked from
//! LAYOUT/lib/              libqlora_nb.so
//! LAYOUT/deps/             metadata of qlora_nb and all that it depends on
//! LAYOUT/evcxr/            init.evcxr: how another evcxr compiles cells
//! LAYOUT/bin/qlora-nb      the kernel that Jupyter starts
//! LAYOUT/api.json          what completion and inspection know of the library
//! KERNELSPEC/              kernel.json and logos
//! ```
//!
//! A wheel (`scripts/wheel`) holds the same for a Python environment, without `built` and `evcxr`, with `notebooks`, and
//! with the kernel where the environment has its programs. Nobody knows beforehand where that lies, so the stamp names the
//! kernelspec from LAYOUT, and the kernelspec the kernel from its own folder.
//!
//! | | LAYOUT | KERNELSPEC |
//! |---|---|---|
//! | `--user` | `$XDG_DATA_HOME/qlora-nb` | `$JUPYTER_DATA_DIR/kernels/qlora-nb` |
//! | `--sys-prefix`, `--prefix DIR` | `DIR/share/qlora-nb` | `DIR/share/jupyter/kernels/qlora-nb` |
//! | `QLORA_NB_PREFIX=DIR`, no flag | `DIR` | `DIR/share/jupyter/kernels/qlora-nb` |
//! | wheel | `share/qlora-nb` of the environment | `share/jupyter/kernels/qlora-nb` of the environment |

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::files;

/// The library's entries, as an installation puts them into its layout. Its stamps are the last of them: an install that
/// is cut short never passes for a whole one.
pub const LIBRARY_ENTRIES: [&str; 5] = ["lib", "deps", "evcxr", BUILT, RUSTC];
pub const BINARY_ENTRY: &str = "bin";
pub const API: &str = "api.json";
pub const STAMP: &str = "qlora-nb.json";
pub const RUSTC: &str = "rustc";
pub const BUILT: &str = "built";
/// How the folders begin in which entries are made.
const NEW: &str = ".new-";
/// Files in entries.
pub const DYLIB: &str = "lib/libqlora_nb.so";
pub const INIT: &str = "evcxr/init.evcxr";
pub const BINARY: &str = "bin/qlora-nb";

/// Where notebooks find the library.
#[derive(Clone)]
pub struct Layout {
    pub prefix: PathBuf,
}

impl Layout {
    pub fn new(prefix: &Path) -> Layout {
        Layout { prefix: prefix.to_owned() }
    }

    /// The place of an entry, or of a file in one.
    pub fn at(&self, entry: &str) -> PathBuf {
        self.prefix.join(entry)
    }

    /// Whether an installation of ours lies there, whole or not.
    pub fn is_ours(&self) -> bool {
        self.at(STAMP).is_file()
    }

    /// As the stamp has it.
    fn stamped_kernelspec(&self) -> Option<PathBuf> {
        let stamp: Value = serde_json::from_slice(&fs::read(self.at(STAMP)).ok()?).ok()?;
        stamp["kernelspec"].as_str().map(PathBuf::from)
    }

    /// The kernelspec that was installed for this layout, as its stamp says.
    pub fn kernelspec(&self) -> Option<PathBuf> {
        Some(self.prefix.join(self.stamped_kernelspec()?))
    }

    fn is_pips(&self) -> bool {
        self.stamped_kernelspec().is_some_and(|spec| spec.is_relative())
    }

    /// What pip has installed is pip's to replace and to remove.
    pub fn refuse_pips(&self) -> Result<()> {
        if self.is_pips() {
            let prefix = self.prefix.display();
            bail!("{prefix} was installed by pip\nremedy: pip uninstall qlora-nb, or another place (--prefix DIR)");
        }
        Ok(())
    }

    /// What is wrong with the library that is there, with the remedy; else the toolchain that builds its cells: the one
    /// that built the library, for no other rustc can read it.
    pub fn check(&self) -> Result<PathBuf> {
        let prefix = self.prefix.display();
        let Ok(built_by) = fs::read_to_string(self.at(RUSTC)) else {
            bail!("no library for notebooks in {prefix}\nremedy: qlora-nb install (or --prefix DIR, where it is)");
        };
        for needed in [self.at(DYLIB), self.at("deps")] {
            if !needed.exists() {
                bail!("{} is missing\nremedy: qlora-nb install", needed.display());
            }
        }
        let is_it = |toolchain: &PathBuf| version_of(&toolchain.join("bin/rustc")).is_ok_and(|text| text == built_by);
        sysroot().into_iter().chain(toolchains()).find(is_it).with_context(|| {
            let (rustc, release) = (first_line(&built_by), release_in(&built_by));
            let here = if self.is_pips() { "" } else { "qlora-nb install, for the rustc on PATH; or " };
            format!(
                "the library in {prefix} was built by {rustc}, which alone can build its cells and is not on this machine\n\
                 remedy: {here}rustup toolchain install {release} --profile minimal (rustup: https://rustup.rs)"
            )
        })
    }

    /// The release of the rustc that built the library.
    pub fn release(&self) -> String {
        release_in(&fs::read_to_string(self.at(RUSTC)).unwrap_or_default()).to_owned()
    }

    /// Copies the notebooks that came with the library, with their data and their model, to a new folder.
    pub fn copy_notebooks(&self, to: &Path) -> Result<()> {
        let from = self.at("notebooks");
        if !from.exists() {
            bail!("no notebooks came with this installation: they are in the repository that it was built from");
        }
        fs::create_dir(to).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => anyhow!("{} exists already\nremedy: name a new folder", to.display()),
            _ => cannot("create", to, error),
        })?;
        for entry in walkdir::WalkDir::new(&from).min_depth(1) {
            let entry = entry.with_context(|| format!("cannot read {}", from.display()))?;
            let copy = to.join(entry.path().strip_prefix(&from)?);
            match entry.file_type().is_dir() {
                true => create_folder(&copy)?,
                false => drop(fs::copy(entry.path(), &copy).map_err(|error| cannot("write", &copy, error))?),
            }
        }
        Ok(())
    }

    /// How evcxr, ours or another, compiles cells: against the dylib, and with std from rustc's own dylib, which the
    /// library shares. The separator is the one that cargo wants where paths may contain spaces.
    pub fn init_evcxr(&self) -> String {
        let flags = [
            "-Cprefer-dynamic".to_owned(),
            format!("--extern=qlora_nb={}", self.at(DYLIB).display()),
            format!("-Ldependency={}", self.at("deps").display()),
        ];
        format!(":build_env CARGO_ENCODED_RUSTFLAGS={}\n", flags.join("\u{1f}"))
    }

    /// Makes the folder ours, with its stamp as the lock that keeps a second install out until the claim is dropped.
    /// Refuses a folder with other people's files: `uninstall` could not tell them from ours.
    pub fn claim(&self, kernelspec: &Path) -> Result<Claim<'_>> {
        self.refuse_pips()?;
        let folder = &self.prefix;
        let is_empty = || fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
        if folder.exists() && !self.is_ours() && !is_empty() {
            bail!(
                "{} is not empty and holds no installation of qlora-nb\n\
                 remedy: choose another folder (--prefix DIR or QLORA_NB_PREFIX), or empty this one",
                folder.display()
            );
        }
        create_folder(folder)?;
        let stamp = self.at(STAMP);
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&stamp);
        let mut file = open.map_err(|error| cannot("write", &stamp, error))?;
        file.lock().map_err(|error| cannot("lock", &stamp, error))?;
        // What an install that was killed has left: nobody else installs here now.
        for entry in fs::read_dir(folder).map_err(|error| cannot("read", folder, error))?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(NEW)) {
                fs::remove_dir_all(entry.path()).map_err(|error| cannot("remove", &entry.path(), error))?;
            }
        }
        let text = format!("{:#}\n", json!({ "kernelspec": kernelspec, "version": env!("CARGO_PKG_VERSION") }));
        let mut before = String::new();
        file.read_to_string(&mut before).map_err(|error| cannot("read", &stamp, error))?;
        if before != text {
            let write = file.rewind().and_then(|()| file.set_len(0)).and_then(|()| file.write_all(text.as_bytes()));
            write.map_err(|error| cannot("write", &stamp, error))?;
        }
        Ok(Claim { layout: self, _lock: file })
    }
}

/// A layout that this process is installing. Takes the stamp away again where nothing came of it.
pub struct Claim<'a> {
    layout: &'a Layout,
    _lock: File,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !LIBRARY_ENTRIES.iter().any(|entry| self.layout.prefix.join(entry).exists()) {
            let _ = fs::remove_file(self.layout.at(STAMP));
            let _ = fs::remove_dir(&self.layout.prefix);
        }
    }
}

/// Where `install` writes.
pub struct Place {
    pub layout: Layout,
    pub kernelspec: PathBuf,
}

/// For whom to install; `QLORA_NB_PREFIX` if nothing is said and that is set, else the user.
#[derive(Debug, Default, clap::Args)]
#[group(multiple = false)]
pub struct Target {
    /// For this user: $XDG_DATA_HOME/qlora-nb or ~/.local/share/qlora-nb (the default)
    #[arg(long)]
    pub user: bool,
    /// In the active Python environment: share/qlora-nb in it
    #[arg(long)]
    pub sys_prefix: bool,
    /// In DIR/share/qlora-nb ($QLORA_NB_PREFIX, without a flag, names the installation's own folder)
    #[arg(long, value_name = "DIR")]
    pub prefix: Option<PathBuf>,
}

impl Target {
    pub fn place(&self) -> Result<Place> {
        let kernelspec_in = |prefix: &Path| prefix.join("share/jupyter/kernels/qlora-nb");
        let under = |prefix: &Path| Place::new(&prefix.join("share/qlora-nb"), &kernelspec_in(prefix));
        if let Some(prefix) = &self.prefix {
            return under(prefix);
        }
        if self.sys_prefix {
            return under(&python_prefix()?);
        }
        if let Some(prefix) = variable("QLORA_NB_PREFIX").filter(|_| !self.user) {
            return Place::new(&prefix, &kernelspec_in(&prefix));
        }
        let kernels = variable("JUPYTER_DATA_DIR").or_else(|| Some(data_home()?.join("jupyter")));
        let kernels = kernels.context("neither JUPYTER_DATA_DIR, XDG_DATA_HOME nor HOME is set: pass --prefix DIR")?;
        Place::new(&user_layout()?, &kernels.join("kernels/qlora-nb"))
    }
}

impl Place {
    fn new(layout: &Path, kernelspec: &Path) -> Result<Place> {
        Ok(Place { layout: Layout::new(&std::path::absolute(layout)?), kernelspec: std::path::absolute(kernelspec)? })
    }
}

/// Which installation is used.
#[derive(Clone, Debug, clap::Args)]
pub struct Installation {
    /// Use the installation under DIR/share, or DIR itself [default: $QLORA_NB_PREFIX, or what is found]
    #[arg(long, value_name = "DIR")]
    prefix: Option<PathBuf>,
}

impl Installation {
    /// The layout that notebooks use: of a prefix, if one is given, the layout under it or the prefix itself; else
    /// `QLORA_NB_PREFIX`; else the first that exists of the one to which this binary belongs, the user's, and the one in
    /// the active Python environment.
    pub fn layout(&self) -> Result<Layout> {
        let absolute = |path: &Path| std::path::absolute(path).map(|path| Layout::new(&path));
        if let Some(prefix) = &self.prefix {
            let under = absolute(&prefix.join("share/qlora-nb"))?;
            return if under.is_ours() { Ok(under) } else { Ok(absolute(prefix)?) };
        }
        if let Some(prefix) = variable("QLORA_NB_PREFIX") {
            return Ok(absolute(&prefix)?);
        }
        let own = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.to_owned()));
        let own = own.into_iter().flat_map(|dir| [dir.join("share/qlora-nb"), dir]);
        let python = active_environment().map(|dir| dir.join("share/qlora-nb"));
        let candidates = own.chain(user_layout()).chain(python);
        match candidates.map(|path| Layout::new(&path)).find(Layout::is_ours) {
            Some(layout) => Ok(absolute(&layout.prefix)?),
            None => Ok(absolute(&user_layout()?)?),
        }
    }
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

pub fn data_home() -> Option<PathBuf> {
    variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")))
}

fn user_layout() -> Result<PathBuf> {
    let home = data_home().context("neither QLORA_NB_PREFIX, XDG_DATA_HOME nor HOME is set: pass --prefix DIR")?;
    Ok(home.join("qlora-nb"))
}

/// The folder of the Python environment that was activated.
fn active_environment() -> Option<PathBuf> {
    variable("VIRTUAL_ENV").or_else(|| variable("CONDA_PREFIX"))
}

/// The folder of the Python environment that `python3` belongs to.
fn python_prefix() -> Result<PathBuf> {
    if let Some(prefix) = active_environment() {
        return Ok(prefix);
    }
    let remedy = "remedy: activate the environment, or pass its folder with --prefix DIR";
    match Command::new("python3").args(["-c", "import sys; print(sys.prefix)"]).output() {
        Ok(output) if output.status.success() => {
            Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
        }
        Ok(output) => bail!("python3 fails: {}\n{remedy}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => bail!("--sys-prefix needs python3, to ask it for its prefix: {error}\n{remedy}"),
    }
}

/// `rustc -vV`, which names compiler, commit and host.
fn version_of(rustc: &Path) -> Result<String> {
    match Command::new(rustc).arg("-vV").output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => bail!("rustc -vV failed: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => bail!("cannot run rustc, which compiles the cells: {error}"),
    }
}

/// Of the rustc that is on PATH, if it is new enough.
pub fn rustc_version() -> Result<String> {
    let needed = env!("CARGO_PKG_RUST_VERSION");
    let version = version_of(Path::new("rustc")).with_context(|| {
        format!("remedy: install Rust {needed} or newer with rustup, and have ~/.cargo/bin on PATH")
    })?;
    let numbers = |text: &str| -> Vec<u32> { text.split(['.', '-']).map_while(|part| part.parse().ok()).collect() };
    if numbers(release_in(&version)) < numbers(needed) {
        bail!("{} is too old: Rust {needed} or newer is needed\nremedy: rustup update", first_line(&version));
    }
    Ok(version)
}

/// `1.95.0`, of what `rustc -vV` says.
fn release_in(version: &str) -> &str {
    version.lines().find_map(|line| line.strip_prefix("release: ")).unwrap_or("unknown")
}

/// rustup's toolchains.
fn toolchains() -> Vec<PathBuf> {
    let home = variable("RUSTUP_HOME").or_else(|| Some(variable("HOME")?.join(".rustup"))).unwrap_or_default();
    let entries = fs::read_dir(home.join("toolchains")).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// Where the toolchain of the rustc on PATH lies.
pub fn sysroot() -> Result<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("cannot run rustc")?;
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// What helps where a compiler complains that there is no linker.
pub fn remedy_for_linker(said: &str) -> &'static str {
    match said.contains("linker `cc` not found") {
        true => "\nremedy: install a C compiler (Debian: apt-get install build-essential)",
        false => "",
    }
}

pub fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// An error of the file system, with what helps against it.
pub fn cannot(verb: &str, path: &Path, error: io::Error) -> Error {
    let remedy = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "\nremedy: free about 1 GiB there, or install elsewhere with --prefix DIR"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem | ErrorKind::NotADirectory => {
            "\nremedy: install into a folder that you may write, with --prefix DIR (or QLORA_NB_PREFIX)"
        }
        ErrorKind::NotFound => "\nremedy: name a folder that can exist, with --prefix DIR (or QLORA_NB_PREFIX)",
        _ => "",
    };
    anyhow!("cannot {verb} {}: {error}{remedy}", path.display())
}

pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| cannot("create", path, error))
}

/// A folder in the layout in which entries are made, before they take their places at once.
pub struct Staging {
    folder: tempfile::TempDir,
    layout: PathBuf,
}

impl Staging {
    pub fn new(layout: &Layout) -> Result<Staging> {
        let folder = tempfile::Builder::new().prefix(NEW).tempdir_in(&layout.prefix);
        let folder = folder.map_err(|error| cannot("write in", &layout.prefix, error))?;
        Ok(Staging { folder, layout: layout.prefix.clone() })
    }

    pub fn path(&self, entry: &str) -> PathBuf {
        self.folder.path().join(entry)
    }

    /// Moves the entries into the layout; what they replace goes with the staging folder. The last entry is taken
    /// away first and comes last: while it is there, all are.
    pub fn commit(self, entries: &[&str]) -> Result<()> {
        let old = self.path("old");
        create_folder(&old)?;
        let retire = |entry: &str| match fs::rename(self.layout.join(entry), old.join(entry)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(cannot("replace", &self.layout.join(entry), error))
            }
            _ => Ok(()),
        };
        if let Some(last) = entries.last() {
            retire(last)?;
        }
        for entry in entries {
            retire(entry)?;
            let place = self.layout.join(entry);
            fs::rename(self.path(entry), &place).map_err(|error| cannot("write", &place, error))?;
        }
        Ok(())
    }
}

/// Writes a file unless it holds the same already. Returns whether it did.
pub fn write_if_changed(path: &Path, content: &[u8]) -> Result<bool> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    create_folder(path.parent().unwrap_or(Path::new("/")))?;
    files::write(path, content).map_err(|error| cannot("write", path, error))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout) {
        let folder = tempfile::tempdir().expect("a folder");
        let layout = Layout::new(&folder.path().join("layout"));
        (folder, layout)
    }

    #[test]
    fn a_claim_that_came_to_nothing_leaves_nothing() {
        let (_folder, layout) = layout();
        drop(layout.claim(Path::new("/spec")).expect("claimed"));
        assert!(!layout.prefix.exists());
        let claim = layout.claim(Path::new("/spec")).expect("claimed");
        fs::write(layout.at(RUSTC), "x").expect("written");
        drop(claim);
        assert_eq!(layout.kernelspec(), Some(PathBuf::from("/spec")));
    }

    #[test]
    fn what_a_killed_install_left_is_removed() {
        let (_folder, layout) = layout();
        drop(layout.claim(Path::new("/spec")).expect("claimed"));
        create_folder(&layout.at("lib")).expect("made");
        fs::write(layout.at(STAMP), "").expect("written");
        create_folder(&layout.at(".new-left/lib")).expect("made");
        drop(layout.claim(Path::new("/spec")).expect("claimed"));
        assert!(layout.at("lib").exists() && !layout.at(".new-left").exists());
    }

    #[test]
    fn a_folder_of_others_is_not_claimed() {
        let (_folder, layout) = layout();
        fs::create_dir_all(layout.prefix.join("lib")).expect("made");
        let error = layout.claim(Path::new("/spec")).err().expect("refused").to_string();
        assert!(error.contains("holds no installation") && error.contains("remedy"), "{error}");
        assert!(!layout.at(STAMP).exists());
    }

    #[test]
    fn what_came_in_a_wheel_is_pips_and_finds_its_kernelspec() {
        let (folder, layout) = layout();
        create_folder(&layout.prefix).expect("made");
        fs::write(layout.at(STAMP), r#"{"kernelspec": "../kernels/qlora-nb"}"#).expect("written");
        assert_eq!(layout.kernelspec(), Some(folder.path().join("layout/../kernels/qlora-nb")));
        for refused in [layout.refuse_pips(), layout.claim(Path::new("/spec")).map(drop)] {
            assert!(refused.expect_err("pip's").to_string().contains("pip uninstall qlora-nb"));
        }
        fs::write(layout.at(STAMP), r#"{"kernelspec": "/spec"}"#).expect("written");
        layout.refuse_pips().expect("ours");
    }

    #[test]
    fn notebooks_are_copied_to_a_new_folder_only() {
        let (folder, layout) = layout();
        let to = folder.path().join("book");
        assert!(layout.copy_notebooks(&to).expect_err("none").to_string().contains("in the repository"));
        create_folder(&layout.at("notebooks/en")).expect("made");
        fs::write(layout.at("notebooks/en/a.ipynb"), "cells").expect("written");
        layout.copy_notebooks(&to).expect("copied");
        fs::write(to.join("en/a.ipynb"), "changed").expect("it is the reader's own");
        assert!(layout.copy_notebooks(&to).expect_err("there").to_string().contains("exists already"));
        assert_eq!(fs::read_to_string(to.join("en/a.ipynb")).expect("kept"), "changed");
    }

    #[test]
    fn staged_entries_replace_old_ones() {
        let (_folder, layout) = layout();
        for (entry, text) in [("lib", "old"), ("rustc", "old")] {
            fs::create_dir_all(layout.prefix.join(entry)).expect("made");
            fs::write(layout.prefix.join(entry).join(text), "").expect("written");
        }
        let staging = Staging::new(&layout).expect("staged");
        fs::create_dir(staging.path("lib")).expect("made");
        fs::write(staging.path("rustc"), "new").expect("written");
        staging.commit(&["lib", "rustc"]).expect("committed");
        assert_eq!(fs::read_to_string(layout.at(RUSTC)).expect("read"), "new");
        let names = |folder: &Path| fs::read_dir(folder).expect("read").count();
        assert_eq!((names(&layout.prefix), names(&layout.prefix.join("lib"))), (2, 0));
    }

    #[test]
    fn errors_of_the_file_system_carry_their_remedy() {
        let text = |kind: ErrorKind| cannot("write", Path::new("/x"), kind.into()).to_string();
        assert!(text(ErrorKind::StorageFull).contains("remedy: free"));
        assert!(text(ErrorKind::ReadOnlyFilesystem).contains("a folder that you may write"));
        let (_folder, layout) = layout();
        fs::write(&layout.prefix, "a file").expect("written");
        let error = create_folder(&layout.prefix.join("in")).expect_err("no folder in a file").to_string();
        assert!(error.contains("remedy"), "{error}");
    }
}
