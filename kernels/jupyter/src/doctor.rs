//! What is missing or does not match, and the remedy.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::install::{Layout, first_line, rustc_version};

pub fn doctor(prefix: &Path) -> Result<ExitCode> {
    let mut healthy = true;
    let mut report = |what: &str, finding: Result<String>| match finding {
        Ok(text) => println!("ok       {what}: {text}"),
        Err(error) => {
            healthy = false;
            println!("PROBLEM  {what}: {}", format!("{error:#}").replace('\n', "\n         "));
        }
    };
    report("rustc", rustc_version().map(|text| first_line(&text).to_owned()));
    report("cargo", says("cargo", &["--version"]).context("remedy: install Rust with rustup"));
    report("sysroot", sysroot());
    report("linker", says("cc", &["--version"]).context("cc is missing\nremedy: apt-get install build-essential"));
    let layout = Layout::new(prefix);
    report("library for notebooks", layout.check().map(|()| layout.dylib().display().to_string()));
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn says(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| format!("cannot run {program}"))?;
    Ok(first_line(&String::from_utf8_lossy(&output.stdout)).to_owned())
}

/// Cells and library share the std that lies in the sysroot as a dylib.
fn sysroot() -> Result<String> {
    let folder = says("rustc", &["--print", "target-libdir"])?;
    let files = std::fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    let names = files.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
    let std = names.into_iter().find(|name| name.starts_with("libstd-") && name.ends_with(".so"));
    let std =
        std.with_context(|| format!("no libstd-*.so in {folder}\nremedy: reinstall the toolchain with rustup"))?;
    Ok(format!("{folder}/{std}"))
}
