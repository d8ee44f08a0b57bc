//! Files that are whole or not there.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// The sibling under which a file or folder is written before it takes its name.
pub fn temporary_sibling(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Writes `bytes` beside `path`, then renames: whoever looks sees the old file or the new one,
/// never a part. On failure the old file is untouched and nothing is left behind.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_sibling(path);
    let written = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        std::fs::rename(&temporary, path)
    })();
    written.map_err(|e| {
        // Best effort: the error that counts is the one being reported.
        let _ = std::fs::remove_file(&temporary);
        Error::io("write", path)(e)
    })
}
