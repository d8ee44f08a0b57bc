//! Files that are whole whenever somebody reads them.

use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Prints a line, to whoever is there to read it.
pub fn say(to: &mut impl Write, line: fmt::Arguments) {
    let _ = writeln!(to, "{line}");
}

/// Writes to a file beside it first, so that no reader ever meets half of it. Makes the folder if it is missing. A link stays, and
/// the file to which it leads is written.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let path = &path.canonicalize().unwrap_or(path.to_owned());
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    // A temporary file is for its owner alone. This one is not: a notebook or a Python environment is often shared.
    let permissions = fs::metadata(path).map_or(Permissions::from_mode(0o644), |file| file.permissions());
    file.as_file().set_permissions(permissions)?;
    file.persist(path)?;
    Ok(())
}
