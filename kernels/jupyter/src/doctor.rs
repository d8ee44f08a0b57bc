//! What is missing or does not match, and the remedy.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::api::Api;
use crate::kernelspec;
use crate::layout::{API, DYLIB, Layout, first_line, sysroot};

pub fn doctor(layout: &Layout) -> Result<ExitCode> {
    let mut healthy = true;
    let mut report = |what, finding| healthy &= tell("PROBLEM ", what, finding);
    let toolchain = layout.check();
    // Where the one that is needed is not there, the one that is.
    let bin = toolchain.as_ref().ok().cloned().or_else(|| sysroot().ok()).unwrap_or_default().join("bin");
    report("rustc", says(&bin.join("rustc"), &["--version"]).context("remedy: install Rust with rustup"));
    report("cargo", says(&bin.join("cargo"), &["--version"]).context("remedy: install Rust with rustup"));
    report("sysroot", std_of(&bin.join("rustc")));
    let linker = says(Path::new("cc"), &["--version"]);
    report("linker", linker.context("cc is missing\nremedy: apt-get install build-essential"));
    report("library for notebooks", toolchain.map(|_| layout.at(DYLIB).display().to_string()));
    let spec = layout.kernelspec();
    report("kernelspec", kernelspec_of(layout, spec.as_deref()));
    // What notebooks do without, if need be.
    let note = |what, finding| tell("note    ", what, finding);
    note("completion", index(&layout.at(API)));
    note("Jupyter", jupyter(spec.as_deref()));
    note("GPU driver", gpu_driver());
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints a finding, under `otherwise` if it is an error; returns whether it is none.
fn tell(otherwise: &str, what: &str, finding: Result<String>) -> bool {
    match &finding {
        Ok(text) => println!("ok       {what}: {text}"),
        Err(error) => println!("{otherwise} {what}: {}", indented(&format!("{error:#}"))),
    }
    finding.is_ok()
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n         ")
}

fn says(program: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    Ok(first_line(&String::from_utf8_lossy(&output.stdout)).to_owned())
}

/// Cells and library share the std that lies in the sysroot as a dylib.
fn std_of(rustc: &Path) -> Result<String> {
    let folder = says(rustc, &["--print", "target-libdir"])?;
    let files = std::fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    let names = files.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
    let std = names.into_iter().find(|name| name.starts_with("libstd-") && name.ends_with(".so"));
    let std =
        std.with_context(|| format!("no libstd-*.so in {folder}\nremedy: reinstall the toolchain with rustup"))?;
    Ok(format!("{folder}/{std}"))
}

fn kernelspec_of(layout: &Layout, spec: Option<&Path>) -> Result<String> {
    let spec = spec.context("none was installed\nremedy: qlora-nb install")?;
    kernelspec::check(spec, layout)?;
    Ok(spec.display().to_string())
}

fn index(path: &Path) -> Result<String> {
    match Api::load(path).items.len() {
        0 => bail!("no index of the library: completion knows less\nremedy: qlora-nb install, which says why it fails"),
        items => Ok(format!("{items} items indexed")),
    }
}

/// Whether Jupyter is there, and looks where the kernelspec is.
fn jupyter(spec: Option<&Path>) -> Result<String> {
    let without = "only notebooks in a browser need it: run, test and repl do not\nremedy: pip install jupyterlab";
    let output = Command::new("jupyter").args(["--paths", "--json"]).output();
    let output = output.ok().filter(|output| output.status.success()).context(format!("not found; {without}"))?;
    let paths: Value = serde_json::from_slice(&output.stdout).context("`jupyter --paths --json` is not understood")?;
    let data = spec.and_then(|spec| spec.parent()?.parent());
    let (Some(data), Some(searched)) = (data, paths["data"].as_array()) else { return Ok("found".to_owned()) };
    if !searched.iter().any(|path| path.as_str().is_some_and(|path| Path::new(path) == data)) {
        bail!(
            "found, but it does not look for kernels in {}\nremedy: export JUPYTER_PATH={}, or qlora-nb install --user",
            data.display(),
            data.display()
        );
    }
    Ok("found, and sees the kernel".to_owned())
}

fn gpu_driver() -> Result<String> {
    let version = std::fs::read_to_string("/proc/driver/nvidia/version");
    match version {
        Ok(text) => Ok(first_line(&text).trim_start_matches("NVRM version:").trim().to_owned()),
        Err(_) => bail!("no NVIDIA driver is loaded; the CPU does the work"),
    }
}
