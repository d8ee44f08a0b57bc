//! JSON files that other programs wrote.

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Reads a whole JSON file.
///
/// # Errors
/// [`Error::NotFound`] and [`Error::Io`]; [`Error::Malformed`] with the line that is no JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    read_json_or(path, "copy or download this file again")
}

/// [`read_json`] with another remedy for a file that is no JSON.
pub fn read_json_or(path: &Path, remedy: &str) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        let detail = if bytes.is_empty() { "the file is empty".into() } else { e.to_string() };
        Error::malformed(path, "JSON file", detail, remedy)
    })
}

/// Reads a struct field by field, so that the error can name the one that is missing or does not fit. The struct must
/// be one that serde reads with a default for what is left out.
pub(crate) fn read_fields<T: Default + Serialize + DeserializeOwned>(json: &Value) -> Result<T, String> {
    let mut fields = Map::new();
    for (key, default) in serde_json::to_value(T::default()).unwrap_or_default().as_object().into_iter().flatten() {
        check_field::<T>(key, &json[key]).map_err(|why| match default {
            Value::Number(n) if n.is_f64() => format!("{key} is not a number"),
            Value::Number(_) => format!("{key} is not a count"),
            _ => format!("{key}: {why}"),
        })?;
        fields.insert(key.clone(), json[key].clone());
    }
    serde_json::from_value(fields.into()).map_err(|e| e.to_string())
}

/// Whether the struct takes this value for this field; if not, why.
pub(crate) fn check_field<T: DeserializeOwned>(key: &str, value: &Value) -> Result<(), String> {
    let alone = Map::from_iter([(key.to_owned(), value.clone())]);
    serde_json::from_value::<T>(alone.into()).map(|_| ()).map_err(|e| e.to_string())
}
