//! Removes what `install` wrote, and nothing else.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};

use crate::kernelspec;
use crate::layout::{API, BINARY_ENTRY, LIBRARY_ENTRIES, Layout, Place, STAMP, Target, cannot};

pub fn uninstall(target: &Target) -> Result<()> {
    let Place { mut layout, mut kernelspec } = target.place()?;
    if let Some(prefix) = &target.prefix
        && !layout.is_ours()
    {
        // A prefix may be named as QLORA_NB_PREFIX names it: the layout itself.
        let named = Layout::new(&std::path::absolute(prefix)?);
        if named.is_ours() {
            layout = named;
        }
    }
    layout.refuse_pips()?;
    if let Some(installed) = layout.kernelspec() {
        kernelspec = installed;
    }
    let removed_spec = kernelspec::remove(&kernelspec, &layout)?;
    if removed_spec {
        println!("removed {}", kernelspec.display());
        remove_empty_parents(&kernelspec, &layout.prefix);
    }
    if layout.is_ours() {
        return remove(&layout);
    }
    let is_empty = || fs::read_dir(&layout.prefix).is_ok_and(|mut entries| entries.next().is_none());
    if layout.prefix.exists() && !is_empty() {
        bail!(
            "{} holds no installation of qlora-nb: nothing in it was removed\n\
             remedy: say which with --user, --sys-prefix or --prefix DIR",
            layout.prefix.display()
        );
    }
    if !removed_spec {
        println!("nothing is installed in {}", layout.prefix.display());
    }
    Ok(())
}

fn remove(layout: &Layout) -> Result<()> {
    // The stamp goes last: what an uninstall leaves when it is cut short is still ours to remove.
    let stamp = layout.at(STAMP);
    let entries = LIBRARY_ENTRIES.into_iter().rev().chain([BINARY_ENTRY, API]);
    for path in entries.map(|entry| layout.prefix.join(entry)).chain(left_behind(layout)).chain([stamp]) {
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false if path.exists() => fs::remove_file(&path),
            false => Ok(()),
        };
        removed.map_err(|error| cannot("remove", &path, error))?;
    }
    let others = fs::read_dir(&layout.prefix).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.file_name()));
    let others: Vec<String> = others.map(|name| name.to_string_lossy().into_owned()).collect();
    if others.is_empty() {
        fs::remove_dir(&layout.prefix).map_err(|error| cannot("remove", &layout.prefix, error))?;
        println!("removed {}", layout.prefix.display());
    } else {
        println!("removed the installation from {}, which also holds {}", layout.prefix.display(), others.join(", "));
    }
    Ok(())
}

/// Staging folders of an install that was killed.
fn left_behind(layout: &Layout) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(&layout.prefix).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let is_staging = |path: &std::path::PathBuf| {
        path.is_dir() && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".new-"))
    };
    entries.filter(is_staging).collect()
}

fn remove_empty_parents(path: &Path, within: &Path) {
    let parents = path.ancestors().skip(1).take_while(|parent| parent.starts_with(within) && *parent != within);
    for parent in parents {
        if fs::remove_dir(parent).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RUSTC;

    #[test]
    fn other_files_stay() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = Target { prefix: Some(folder.path().to_owned()), ..Target::default() };
        let Place { layout, kernelspec } = target.place().expect("a place");
        let claim = layout.claim(&kernelspec).expect("claimed");
        for entry in ["lib", "deps", "evcxr", "bin", ".new-abc"] {
            fs::create_dir_all(layout.prefix.join(entry)).expect("made");
        }
        for file in ["rustc", "built", "api.json", "theirs"] {
            fs::write(layout.prefix.join(file), "").expect("written");
        }
        kernelspec::write(&kernelspec, &layout).expect("written");
        drop(claim);
        uninstall(&target).expect("uninstalled");
        let names = |path: &Path| -> Vec<_> {
            fs::read_dir(path).expect("read").map(|entry| entry.expect("an entry").file_name()).collect()
        };
        assert_eq!(names(&layout.prefix), ["theirs"]);
        assert!(!kernelspec.exists() && kernelspec.parent().is_some_and(Path::exists));
        assert!(uninstall(&target).expect_err("foreign now").to_string().contains("nothing in it was removed"));
        fs::remove_file(layout.prefix.join("theirs")).expect("removed");
        uninstall(&target).expect("nothing to do");
    }

    #[test]
    fn a_prefix_that_is_the_layout_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let layout = Layout::new(&folder.path().join("layout"));
        let spec = layout.prefix.join("share/jupyter/kernels/qlora-nb");
        let claim = layout.claim(&spec).expect("claimed");
        fs::write(layout.at(RUSTC), "").expect("written");
        drop(claim);
        kernelspec::write(&spec, &layout).expect("written");
        uninstall(&Target { prefix: Some(layout.prefix.clone()), ..Target::default() }).expect("uninstalled");
        assert!(!layout.prefix.exists());
    }
}
