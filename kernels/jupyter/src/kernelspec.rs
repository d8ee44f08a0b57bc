//! Jupyter's kernelspec: how it starts the kernel, and what it shows for it.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::layout::{BINARY, Layout, cannot, write_if_changed};

const KERNEL_JSON: &str = "kernel.json";
const LOGOS: [(&str, &[u8]); 3] = [
    ("logo-svg.svg", include_bytes!("../logo/logo-svg.svg")),
    ("logo-32x32.png", include_bytes!("../logo/logo-32x32.png")),
    ("logo-64x64.png", include_bytes!("../logo/logo-64x64.png")),
];

/// What Jupyter reads. `interrupt_mode: message`: the kernel decides what an interrupt ends, and keeps the variables.
fn content(layout: &Layout) -> Value {
    json!({
        "argv": [layout.at(BINARY), "kernel", "{connection_file}"],
        "display_name": "Rust (qlora-nb)",
        "language": "rust",
        "interrupt_mode": "message",
        "env": { "QLORA_NB_PREFIX": layout.prefix },
        "metadata": { "debugger": false },
    })
}

/// Writes the folder, kernel.json last. Returns whether anything was new.
pub fn write(folder: &Path, layout: &Layout) -> Result<bool> {
    refuse_foreign(folder)?;
    let mut changed = false;
    for (name, logo) in LOGOS {
        changed |= write_if_changed(&folder.join(name), logo)?;
    }
    let text = format!("{:#}\n", content(layout));
    Ok(changed | write_if_changed(&folder.join(KERNEL_JSON), text.as_bytes())?)
}

/// A kernelspec of the same name that another program wrote stays.
pub fn refuse_foreign(folder: &Path) -> Result<()> {
    if folder.join(KERNEL_JSON).exists() && layout_of(folder).is_none() {
        bail!(
            "{} is not ours: another program's kernelspec has our name\nremedy: remove it, or pass --prefix DIR",
            folder.join(KERNEL_JSON).display()
        );
    }
    Ok(())
}

fn read(folder: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(folder.join(KERNEL_JSON)).ok()?).ok()
}

/// What a kernelspec starts. One that came in a wheel names it from its own folder, behind `env`: some front ends leave out
/// kernels whose first word is no program.
fn program(spec: &Value) -> &str {
    let argv = &spec["argv"];
    (if argv[0] == "env" { &argv[1] } else { &argv[0] }).as_str().unwrap_or_default()
}

/// The layout to which a kernelspec of ours points.
fn layout_of(folder: &Path) -> Option<Layout> {
    read(folder)?["env"]["QLORA_NB_PREFIX"].as_str().map(|prefix| Layout::new(Path::new(prefix)))
}

/// Removes a kernelspec that points to the layout. Returns whether one was there.
pub fn remove(folder: &Path, layout: &Layout) -> Result<bool> {
    if layout_of(folder).is_none_or(|of| of.prefix != layout.prefix) {
        return Ok(false);
    }
    for name in LOGOS.map(|(name, _)| name).into_iter().chain([KERNEL_JSON]) {
        let path = folder.join(name);
        if path.exists() {
            fs::remove_file(&path).map_err(|error| cannot("remove", &path, error))?;
        }
    }
    // Stays if somebody else put something there.
    let _ = fs::remove_dir(folder);
    Ok(true)
}

/// Whether Jupyter can start the kernel by it; else what is wrong.
pub fn check(folder: &Path, layout: &Layout) -> Result<()> {
    let remedy = "remedy: qlora-nb install";
    let path = folder.join(KERNEL_JSON);
    let Some(spec) = read(folder) else { bail!("no kernelspec in {}\n{remedy}", folder.display()) };
    let binary = program(&spec).replace("{resource_dir}", &folder.to_string_lossy());
    if !Path::new(&binary).is_file() {
        bail!("{} starts {binary:?}, which does not exist\n{remedy}", path.display());
    }
    let of = layout_of(folder).map(|layout| layout.prefix).unwrap_or_default();
    // None in a wheel's: that kernel takes the library that came with it.
    if of != layout.prefix && !of.as_os_str().is_empty() {
        bail!(
            "{} uses the library in {}, not the one in {}\n{remedy}",
            path.display(),
            of.display(),
            layout.prefix.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_once_checked_and_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (spec, layout) = (folder.path().join("kernels/qlora-nb"), Layout::new(&folder.path().join("layout")));
        assert!(write(&spec, &layout).expect("written"));
        assert!(!write(&spec, &layout).expect("written"), "written anew");
        let read = read(&spec).expect("JSON");
        assert_eq!(read["argv"][2], "{connection_file}");
        assert_eq!(read["interrupt_mode"], "message");
        assert!(check(&spec, &layout).expect_err("no binary").to_string().contains("does not exist"));
        fs::create_dir_all(layout.prefix.join("bin")).expect("made");
        fs::write(layout.at(BINARY), "").expect("written");
        check(&spec, &layout).expect("well");
        let other = Layout::new(Path::new("/other"));
        assert!(check(&spec, &other).is_err() && !remove(&spec, &other).expect("kept"));
        fs::write(spec.join("own.txt"), "").expect("written");
        assert!(remove(&spec, &layout).expect("removed"));
        assert_eq!(fs::read_dir(&spec).expect("kept for own.txt").count(), 1);
    }

    #[test]
    fn one_that_came_in_a_wheel_is_checked_from_its_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        let (spec, layout) = (folder.path().join("kernels/qlora-nb"), Layout::new(&folder.path().join("layout")));
        fs::create_dir_all(&spec).expect("made");
        let json = json!({ "argv": ["env", "{resource_dir}/../../qlora-nb"], "env": { "QLORA_NB_PREFIX": "" } });
        fs::write(spec.join(KERNEL_JSON), json.to_string()).expect("written");
        assert!(check(&spec, &layout).expect_err("no binary").to_string().contains("does not exist"));
        fs::write(folder.path().join("qlora-nb"), "").expect("written");
        check(&spec, &layout).expect("well");
        assert!(!remove(&spec, &layout).expect("it is pip's"));
    }

    #[test]
    fn another_programs_kernelspec_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join(KERNEL_JSON), "{\"argv\": [\"evcxr_jupyter\"]}").expect("written");
        let error = write(folder.path(), &Layout::new(Path::new("/x"))).expect_err("refused").to_string();
        assert!(error.contains("not ours"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).expect("read").count(), 1);
    }
}
