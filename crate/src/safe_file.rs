//! Files and folders that are whole or not there.

use std::{
    ffi::{CString, OsStr},
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt,
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
/// never a part, whenever the process is killed or the power fails. On failure what was at `path` is still there and
/// nothing is left behind.
pub fn replace(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let _writes = writing_in(path, |name| Some(name) == path.file_name());
    let temporary = Removed::at(temporary_sibling(path));
    // On disk before the name is: that the disk is full may show only then.
    let done = fill(&temporary.0).and_then(|()| sync(&temporary.0));
    done.map_err(|error| in_final_place(error, &temporary.0, path))?;
    let renamed = match path.is_dir() && temporary.0.is_dir() {
        // A rename does not replace a folder that has something in it: the two change places.
        true => exchange(&temporary.0, path),
        false => fs::rename(&temporary.0, path),
    };
    // The name, too, is on disk when this is done.
    renamed.and_then(|()| File::open(folder_of(path))?.sync_all()).map_err(Error::io("write", path))
}

/// [`replace`] for a file of these bytes.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |temporary| write_file(temporary, bytes))
}

/// Writes a file, in a folder that [`replace`] fills.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(Error::io("write", path))
}

/// Deletes a folder: one that is half deleted does not have its name any more.
pub fn remove_folder(path: &Path) -> Result<()> {
    let _writes = writing_in(path, |_| false);
    let doomed = temporary_sibling(path);
    fs::rename(path, &doomed).and_then(|()| fs::remove_dir_all(&doomed)).map_err(Error::io("delete", path))
}

/// Removes what processes that were killed have left beside `path` of the files and folders that `ours` names. While
/// the result lives nobody else takes what this process writes there for such a leftover: who writes holds a shared lock
/// on the folder, who removes has it alone. Where the file system has no locks, nothing is removed.
pub fn writing_in(path: &Path, ours: impl Fn(&OsStr) -> bool) -> Option<File> {
    let place = folder_of(path);
    let folder = File::open(place).ok()?;
    if folder.try_lock().is_ok() {
        let entries = fs::read_dir(place).into_iter().flatten().flatten();
        let left = entries.filter(|entry| written_for(&entry.file_name()).is_some_and(|name| ours(name.as_ref())));
        left.for_each(|entry| remove(&entry.path()));
        folder.unlock().ok()?;
    }
    folder.lock_shared().ok()?;
    Some(folder)
}

/// `name` of `.name.PID.tmp`: what [`temporary_sibling`] is for.
fn written_for(temporary: &OsStr) -> Option<String> {
    let (name, process) = temporary.to_str()?.strip_prefix('.')?.strip_suffix(".tmp")?.rsplit_once('.')?;
    let is_number = !process.is_empty() && process.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| name.to_string())
}

/// The folder that something is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
}

/// Waits until a file, or a folder and all in it, is on disk.
fn sync(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(Error::io("read", path))? {
            sync(&entry.map_err(Error::io("read", path))?.path())?;
        }
    }
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io("write", path))
}

/// Two folders change names at once; where the file system cannot, one after the other.
fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
        let (from, to) = (name(new)?, name(old)?);
        // SAFETY: two strings that end with zero.
        let status = unsafe {
            libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::RENAME_EXCHANGE)
        };
        if status == 0 {
            return Ok(());
        }
    }
    let aside = Removed::at(new.with_extension("0.tmp"));
    fs::rename(old, &aside.0)?;
    fs::rename(new, old).inspect_err(|_| {
        let _ = fs::rename(&aside.0, old);
    })
}

/// What is removed now, if it is there, and again in the end.
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
                write_file(&folder.join("inside"), text.as_bytes())
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
