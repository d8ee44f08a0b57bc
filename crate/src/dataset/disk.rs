//! Folders as `datasets.save_to_disk` writes and `load_from_disk` reads them: `state.json`,
//! `dataset_info.json` and Arrow IPC stream shards; one such folder a split for a `DatasetDict`.

use std::{
    collections::HashMap,
    fs,
    hash::Hasher,
    path::{Path, PathBuf},
};

use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, DataType, Field, FieldRef, Schema, SchemaRef};
use serde_json::json;

use super::{
    Dataset, DatasetDict,
    ipc::{read_shard, write_stream},
    table::{BATCH_ROWS, Table},
    value::type_name,
};
use crate::{
    error::{Error, Result, ensure},
    interrupt,
    json_file::read_json,
    py_repr::commas,
    safe_file::{is_inside, replace, write_file},
};

/// What `datasets` uses: a shard holds about this many bytes of columns.
const SHARD_BYTES: usize = 500_000_000;

/// The key under which a field in memory keeps its description from dataset_info.json: what we do not use (the names
/// of a ClassLabel) is written again when the dataset is saved.
const FEATURE_KEY: &str = "dataset_info";

const REDOWNLOAD: &str = "copy or download the folder again; the other files are not needed to tell what is wrong";

impl Dataset {
    /// Loads a folder that `save_to_disk` wrote, here or in Python's `datasets`.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a folder or file that is not there; [`Error::Malformed`], naming
    /// the file, for one that is cut off or damaged, or for the folder of a [`DatasetDict`].
    pub fn load_from_disk(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_from_disk_path(path.as_ref())
    }

    fn load_from_disk_path(folder: &Path) -> Result<Self> {
        interrupt::stoppable("reading the dataset", || Self::read_folder(folder))
    }

    fn read_folder(folder: &Path) -> Result<Self> {
        check_folder(folder)?;
        if folder.join("dataset_dict.json").exists() && !folder.join("state.json").exists() {
            let splits = split_names(folder)?;
            let split = splits.first().map_or("train", |s| s.as_str());
            let remedy = format!("DatasetDict::load_from_disk({:?})?.get({split:?})?", folder.display().to_string());
            let detail = format!("it holds a DatasetDict with the splits {splits:?}");
            return Err(Error::malformed(folder, "dataset folder", detail, &remedy));
        }
        let state_path = folder.join("state.json");
        if !state_path.exists() {
            let remedy = format!(
                "give a folder that save_to_disk wrote; this one holds {:?}. For files of rows use \
                 Dataset::from_json, from_parquet or from_csv",
                few_names(folder)
            );
            return Err(Error::not_found("state.json of a saved dataset", state_path, &remedy));
        }
        let state = read_json(&state_path)?;
        let shards = shard_names(&state).ok_or_else(|| {
            let expected = "expected \"_data_files\": a list of {\"filename\": a file in this folder}";
            Error::malformed(&state_path, "dataset state", expected, REDOWNLOAD)
        })?;
        let mut schema: Option<SchemaRef> = None;
        let mut batches = Vec::new();
        for shard in shards {
            let path = folder.join(shard);
            let (shard_schema, shard_batches) = read_shard(&path)?;
            let first = schema.get_or_insert(shard_schema.clone());
            if describe(first) != describe(&shard_schema) {
                let (here, there) = (describe(&shard_schema), describe(first));
                let detail = format!("its columns are {here}, those of the first {there}");
                let remedy = "save the dataset again: the shards come from different datasets";
                return Err(Error::malformed(path, "shard of this dataset", detail, remedy));
            }
            batches.extend(shard_batches);
        }
        let info = folder.join("dataset_info.json");
        let features = if info.exists() { read_json(&info)?["features"].clone() } else { json!(null) };
        let schema = with_features(schema.as_deref().unwrap_or(&Schema::empty()), &features);
        let table = Table::new(&schema, batches);
        Ok(Self::of(table.map_err(|e| Error::malformed(folder, "dataset folder", e, REDOWNLOAD))?))
    }

    /// Saves in the form that [`load_from_disk`](Self::load_from_disk) and Python's `datasets`
    /// read. The folder appears whole or not at all; an earlier dataset at `path` is replaced.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk is full or not writable; [`Error::InvalidArgument`] when `path`
    /// is a folder with anything else in it. What was at `path` is then unchanged.
    pub fn save_to_disk(&self, path: impl AsRef<Path>) -> Result<()> {
        replace_folder(path.as_ref(), &|folder| self.write_into(folder))
    }

    fn write_into(&self, folder: &Path) -> Result<()> {
        let bytes: usize = self.batches().map(|b| b.map_or(0, |b| logical_bytes(&b))).sum();
        let shards = bytes.div_ceil(SHARD_BYTES).max(1);
        let rows_a_shard = self.len().div_ceil(shards).max(1);
        let schema = SchemaRef::new(without_features(&self.table.schema));
        // The same hasher everywhere: equal data has an equal fingerprint, which is what
        // Python's cache of mapped datasets goes by.
        let mut hasher = std::hash::DefaultHasher::new();
        let mut files = Vec::new();
        for shard in 0..shards {
            let name = format!("data-{shard:05}-of-{shards:05}.arrow");
            let rows = self.slice(shard * rows_a_shard..(shard + 1) * rows_a_shard);
            write_stream(&folder.join(&name), &schema, rows.batches(), &mut hasher)?;
            files.push(json!({ "filename": name }));
        }
        let features = self.table.schema.fields().iter().map(|f| (f.name().clone(), feature_json(f)));
        let features: serde_json::Value = features.collect();
        let info = json!({ "citation": "", "description": "", "features": features, "homepage": "", "license": "" });
        let state = json!({
            "_data_files": files,
            "_fingerprint": format!("{:016x}", hasher.finish()),
            "_format_columns": null,
            "_format_kwargs": {},
            "_format_type": null,
            "_output_all_columns": false,
            "_split": null,
        });
        write_json(&folder.join("dataset_info.json"), &info)?;
        write_json(&folder.join("state.json"), &state)
    }

    /// This dataset's rows in order, as batches.
    fn batches(&self) -> Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + '_> {
        match &self.order {
            None => Box::new(self.table.contiguous(self.range.clone()).map(Ok)),
            Some(order) => Box::new(order[self.range.clone()].chunks(BATCH_ROWS).map(|rows| self.table.gather(rows))),
        }
    }
}

impl DatasetDict {
    /// Loads all splits of a folder that `DatasetDict.save_to_disk` wrote.
    ///
    /// # Errors
    /// As [`Dataset::load_from_disk`].
    pub fn load_from_disk(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_from_disk_path(path.as_ref())
    }

    fn load_from_disk_path(folder: &Path) -> Result<Self> {
        check_folder(folder)?;
        if folder.join("state.json").exists() {
            let remedy = format!("Dataset::load_from_disk({:?})", folder.display().to_string());
            let detail = "it holds one dataset without splits";
            return Err(Error::malformed(folder, "DatasetDict folder", detail, &remedy));
        }
        let load = |split: String| Ok((split.clone(), Dataset::load_from_disk(folder.join(&split))?));
        Ok(Self::new(split_names(folder)?.into_iter().map(load).collect::<Result<Vec<_>>>()?))
    }

    /// Saves all splits: one folder each, and `dataset_dict.json`. As [`Dataset::save_to_disk`]; a split's name must be
    /// that of a folder.
    pub fn save_to_disk(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_to_disk_path(path.as_ref())
    }

    fn save_to_disk_path(&self, path: &Path) -> Result<()> {
        for (name, _) in self.iter() {
            let remedy = "give the split another name";
            ensure(is_inside(name), "split", format!("{name:?}"), "the name of a folder", remedy)?;
        }
        replace_folder(path, &|folder| {
            for (name, dataset) in self.iter() {
                let split = folder.join(name);
                fs::create_dir(&split).map_err(Error::io("write", &split))?;
                dataset.write_into(&split)?;
            }
            write_json(&folder.join("dataset_dict.json"), &json!({ "splits": self.splits() }))
        })
    }
}

fn check_folder(folder: &Path) -> Result<()> {
    let remedy = if folder.exists() {
        "this is a file: use Dataset::from_json, from_parquet or from_csv"
    } else {
        "check the path; a relative path starts at the notebook's folder"
    };
    if folder.is_dir() { Ok(()) } else { Err(Error::not_found("dataset folder", folder, remedy)) }
}

fn split_names(folder: &Path) -> Result<Vec<String>> {
    let path = folder.join("dataset_dict.json");
    let splits = read_json(&path)?["splits"].clone();
    let name = |name: &serde_json::Value| name.as_str().filter(|name| is_inside(name)).map(String::from);
    splits.as_array().and_then(|names| names.iter().map(name).collect()).ok_or_else(|| {
        let expected = "expected {\"splits\": [names of folders in this one]}";
        Error::malformed(path, "list of splits", expected, REDOWNLOAD)
    })
}

fn shard_names(state: &serde_json::Value) -> Option<Vec<String>> {
    let name = |file: &serde_json::Value| file["filename"].as_str().filter(|name| is_inside(name)).map(String::from);
    state["_data_files"].as_array()?.iter().map(name).collect()
}

fn describe(schema: &Schema) -> String {
    let column = |f: &FieldRef| format!("{}: {}", f.name(), type_name(f.data_type()));
    format!("[{}]", commas(schema.fields().iter().map(column)))
}

fn with_features(schema: &Schema, features: &serde_json::Value) -> Schema {
    let field = |field: &FieldRef| {
        let described = features.get(field.name()).map(|f| (FEATURE_KEY.to_string(), f.to_string()));
        field.as_ref().clone().with_metadata(described.into_iter().collect::<HashMap<_, _>>())
    };
    Schema::new(schema.fields().iter().map(field).collect::<Vec<Field>>())
}

fn without_features(schema: &Schema) -> Schema {
    with_features(schema, &json!(null))
}

/// What a loaded folder said of a column is kept only where our own words would lose something:
/// "List", which older versions of `datasets` do not know, is then written as they know it.
fn feature_json(field: &Field) -> serde_json::Value {
    let loaded = field.metadata().get(FEATURE_KEY).and_then(|text| serde_json::from_str(text).ok());
    loaded.filter(|feature| !is_plain(feature)).unwrap_or_else(|| feature_of(field.data_type()))
}

/// Whether a description says no more than the Arrow type does.
fn is_plain(feature: &serde_json::Value) -> bool {
    match feature {
        serde_json::Value::Object(fields) => {
            let known = |kind: &str| matches!(kind, "Value" | "List" | "LargeList" | "Sequence");
            fields.get("_type").and_then(|kind| kind.as_str()).is_none_or(known) && fields.values().all(is_plain)
        }
        serde_json::Value::Array(items) => items.iter().all(is_plain),
        _ => true,
    }
}

/// A type as dataset_info.json describes it, in the words that all versions of `datasets` read
/// (version 4 added "List", and still reads the older "Sequence").
fn feature_of(dtype: &DataType) -> serde_json::Value {
    match dtype {
        DataType::Struct(fields) => fields.iter().map(|f| (f.name().clone(), feature_of(f.data_type()))).collect(),
        DataType::List(f) => match f.data_type() {
            DataType::Struct(_) => json!([feature_of(f.data_type())]),
            item => json!({ "feature": feature_of(item), "_type": "Sequence" }),
        },
        DataType::LargeList(f) => json!({ "feature": feature_of(f.data_type()), "_type": "LargeList" }),
        DataType::FixedSizeList(f, n) => {
            json!({ "feature": feature_of(f.data_type()), "length": n, "_type": "Sequence" })
        }
        other => json!({ "dtype": type_name(other), "_type": "Value" }),
    }
}

/// The bytes that a batch's own rows take, whatever larger buffers they lie in.
fn logical_bytes(batch: &RecordBatch) -> usize {
    batch.columns().iter().map(|c| c.to_data().get_slice_memory_size().unwrap_or(0)).sum()
}

/// Makes `target` a folder that `fill` writes, in place of nothing, an empty folder or another saved dataset and
/// nothing else.
fn replace_folder(target: &Path, fill: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
    let has_name = target.file_name().is_some();
    ensure(has_name, "path", target.display(), "a folder with a name", "use e.g. \"data/tokenized\"")?;
    if let Some(foreign) = foreign(target) {
        let expected = format!(
            "a new folder, or one that holds a saved dataset alone, which is replaced; there is {}",
            foreign.display()
        );
        return Err(Error::argument("path", target.display(), &expected, "choose another folder, or move that away"));
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(Error::io("write", parent))?;
    }
    interrupt::stoppable("saving the dataset", || {
        replace(target, |temporary| {
            fs::create_dir(temporary).map_err(Error::io("write", temporary))?;
            fill(temporary)
        })
    })
}

/// The first thing at `target` that no saved dataset has: it would be lost.
fn foreign(target: &Path) -> Option<PathBuf> {
    let Ok(entries) = fs::read_dir(target) else { return target.exists().then(|| target.into()) };
    let splits = split_names(target).unwrap_or_default();
    let shards = read_json(&target.join("state.json")).ok().and_then(|state| shard_names(&state));
    // Python's `datasets` keeps what it mapped beside the shards.
    let is_cache = |name: &str| name.starts_with("cache-") && name.ends_with(".arrow");
    let is_ours = |name: &String| {
        let fixed = ["state.json", "dataset_info.json", "dataset_dict.json"].contains(&name.as_str());
        fixed || shards.as_ref().is_some_and(|shards| shards.contains(name) || is_cache(name))
    };
    let mut entries = entries.flatten().map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()));
    entries.find_map(|(name, path)| match path.is_dir() {
        true if splits.contains(&name) => foreign(&path),
        false if is_ours(&name) => None,
        _ => Some(path),
    })
}

fn few_names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names.truncate(6);
    names
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    write_file(path, format!("{json:#}").as_bytes())
}
