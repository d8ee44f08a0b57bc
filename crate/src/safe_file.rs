//! Files and folders that are whole or not there.

use std::{
    fs::{self, File},
    io::Write,
    path::{Component, Path, PathBuf},
};

use crate::error::{Error, Result};

/// The sibling under which a file or folder is written before it takes its name.
pub fn temporary_sibling(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Whether a name that a file gives, joined to a folder, is in that folder: not absolute and without `..`.
pub fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Lets `fill` write a file or folder beside `path`, then renames it: whoever looks sees the old one or the new one,
/// never a part. On failure what was at `path` is still there and nothing is left behind.
pub fn replace(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let temporary = Removed::at(temporary_sibling(path));
    fill(&temporary.0).map_err(|error| in_final_place(error, &temporary.0, path))?;
    if !(path.is_dir() && temporary.0.is_dir()) {
        return fs::rename(&temporary.0, path).map_err(Error::io("write", path));
    }
    // A rename does not replace a folder that has something in it: it steps aside first.
    let aside = Removed::at(temporary.0.with_extension("old"));
    fs::rename(path, &aside.0).map_err(Error::io("write", path))?;
    fs::rename(&temporary.0, path).map_err(|e| {
        let _ = fs::rename(&aside.0, path);
        Error::io("write", path)(e)
    })
}

/// [`replace`] for a file of these bytes.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |temporary| write_to_disk(temporary, bytes))
}

/// Writes a file and waits until the disk has it: that it is full may show only then.
pub fn write_to_disk(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(Error::io("write", path))
}

/// What is removed now, left over from a process of this id that was killed, and again in the end if it is there.
struct Removed(PathBuf);

impl Removed {
    fn at(path: PathBuf) -> Self {
        remove(&path);
        Self(path)
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Best effort: where it fails, the error that counts is another one.
fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// The user knows a file by its own name, not by that of its temporary place.
fn in_final_place(error: Error, temporary: &Path, place: &Path) -> Error {
    match error {
        Error::Io { action, path, source } => {
            let path = match path.strip_prefix(temporary) {
                Ok(rest) if rest == Path::new("") => place.into(),
                Ok(rest) => place.join(rest),
                Err(_) => path,
            };
            Error::Io { action, path, source }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_or_folder_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("file"), dir.path().join("folder"));
        let fill = |text: &'static str| {
            move |folder: &Path| {
                fs::create_dir(folder).unwrap();
                write_to_disk(&folder.join("inside"), text.as_bytes())
            }
        };
        for text in ["old", "new"] {
            write_atomically(&file, text.as_bytes()).unwrap();
            replace(&folder, fill(text)).unwrap();
        }
        assert!(write_atomically(&folder, b"").is_err(), "a file does not take the place of a folder");
        let full = |place: &Path| Err(Error::io("write", place)(std::io::ErrorKind::StorageFull.into()));
        let error = replace(&file, full).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == file), "{error}");
        let full_inside = |place: &Path| fill("half")(place).and_then(|()| full(&place.join("inside")));
        let error = replace(&folder, full_inside).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == folder.join("inside")), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::read(folder.join("inside")).unwrap(), b"new");
        assert_eq!((names(dir.path()).len(), names(&folder).len()), (2, 1), "nothing is left behind");
    }
}
