//! JSON files that other programs wrote.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Reads a whole JSON file.
///
/// # Errors
/// [`Error::NotFound`] and [`Error::Io`]; [`Error::Malformed`] with the line that is no JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Malformed {
        path: path.into(),
        format: "JSON file",
        detail: if bytes.is_empty() { "the file is empty".into() } else { e.to_string() },
        remedy: "copy or download this file again".into(),
    })
}
