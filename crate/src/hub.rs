//! Where the files of a pretrained model are: a folder here, or a repository on a model hub.
//!
//! The hub is asked only when no folder of that name exists. `HF_ENDPOINT` (a mirror), `HF_HOME`,
//! `HF_HUB_CACHE`, `HF_TOKEN`, the proxy variables and `HF_HUB_OFFLINE` mean what they mean to
//! Python's `huggingface_hub`, and the cache folder is shared with it.

use std::{
    env,
    path::{Path, PathBuf},
};

use hf_hub::{HFClientSync, HFError, HFRepositorySync, repository::RepoTypeModel, split_id};

use crate::error::{Error, Result};

/// A folder or a hub repository that files are taken from by name.
#[derive(Clone)]
pub struct Snapshot {
    name_or_path: String,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Folder(PathBuf),
    Hub(HFRepositorySync<RepoTypeModel>),
}

impl Snapshot {
    /// A folder if there is one of that name, else a hub id such as `Langboat/bloom-1b4-zh`.
    /// No request is made yet.
    ///
    /// # Errors
    /// [`Error::NotFound`] for what is no folder and cannot be a hub id.
    pub fn open(name_or_path: &str) -> Result<Self> {
        let path = Path::new(name_or_path);
        let name_or_path = name_or_path.to_string();
        if path.is_dir() {
            return Ok(Self { name_or_path, place: Place::Folder(path.into()) });
        }
        if !is_hub_id(&name_or_path) {
            let remedy = if path.exists() {
                "this is a file: give the folder that holds it"
            } else {
                "check the path (a relative path starts at the notebook's folder), or give a hub id such as \
                 \"Langboat/bloom-1b4-zh\""
            };
            return Err(Error::NotFound { what: "model folder".into(), path: path.into(), remedy: remedy.into() });
        }
        let failed = |e: HFError| failure(&name_or_path, "", &e);
        let client = HFClientSync::new().map_err(failed)?;
        let (owner, name) = split_id(&name_or_path);
        Ok(Self { place: Place::Hub(client.model(owner, name)), name_or_path })
    }

    /// What [`open`](Self::open) was given.
    pub fn name_or_path(&self) -> &str {
        &self.name_or_path
    }

    /// The path of a file that must be there, downloaded first if need be.
    ///
    /// # Errors
    /// [`Error::NotFound`] in a folder; [`Error::Hub`], with the remedy, from the hub.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        if let Some(path) = self.optional_file(name)? {
            return Ok(path);
        }
        match &self.place {
            Place::Folder(folder) => Err(Error::NotFound {
                what: format!("{name} of the model"),
                path: folder.join(name),
                remedy: "give a folder in Hugging Face layout; copy or download the missing file into it".into(),
            }),
            Place::Hub(_) => Err(Error::Hub {
                what: format!("{name} of {}", self.name_or_path),
                detail: "the repository has no such file".into(),
                remedy: "choose a repository in the transformers layout (config.json, tokenizer.json, *.safetensors)"
                    .into(),
            }),
        }
    }

    /// The path of a file that may be missing.
    pub fn optional_file(&self, name: &str) -> Result<Option<PathBuf>> {
        match &self.place {
            Place::Folder(folder) => {
                let path = folder.join(name);
                Ok(path.is_file().then_some(path))
            }
            Place::Hub(repository) => {
                let sent = repository.download_file().filename(name).local_files_only(is_offline()).send();
                match sent {
                    Ok(path) => Ok(Some(path)),
                    Err(HFError::EntryNotFound { .. }) => Ok(None),
                    // Offline, a file that was never there looks like one that was never fetched.
                    Err(e) => Err(failure(&self.name_or_path, name, &e)),
                }
            }
        }
    }
}

/// `name` or `owner/name`, of the characters that the hub allows. What starts like a path, or
/// has more parts, is a path.
fn is_hub_id(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let part_ok = |part: &&str| !part.is_empty() && part.chars().all(allowed) && !part.starts_with(['.', '-']);
    parts.len() <= 2 && parts.iter().all(part_ok)
}

fn is_offline() -> bool {
    let set =
        |name| env::var(name).is_ok_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
    set("HF_HUB_OFFLINE") || set("TRANSFORMERS_OFFLINE")
}

fn failure(id: &str, file: &str, e: &HFError) -> Error {
    let offline = "it is not in the local cache, and HF_HUB_OFFLINE is set".to_string();
    let (detail, remedy) = match e {
        HFError::LocalEntryNotFound { .. } => {
            (offline, "unset HF_HUB_OFFLINE to download it once, or copy the cache folder from another machine")
        }
        HFError::RepoNotFound { .. } => (
            "there is no such repository, or it is private".into(),
            "check the name; for a folder give an existing path; for a private model set HF_TOKEN",
        ),
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            (e.to_string(), "set HF_TOKEN to a token that may read this model, after accepting its terms on its page")
        }
        HFError::Request { .. } => (
            e.to_string(),
            "check the connection; set HF_ENDPOINT to a mirror or HTTPS_PROXY to a proxy, or give a \
             folder that holds the model's files",
        ),
        HFError::Io(_) | HFError::CacheLockTimeout { .. } => {
            (e.to_string(), "check space and permissions of the cache folder, or set HF_HOME to another one")
        }
        _ => (e.to_string(), "try again later, or set HF_ENDPOINT to a mirror"),
    };
    let what = if file.is_empty() { id.to_string() } else { format!("{file} of {id}") };
    Error::Hub { what, detail, remedy: remedy.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_hub_ids() {
        assert!(is_hub_id("Langboat/bloom-1b4-zh"));
        assert!(is_hub_id("gpt2"));
        for path in ["/root/model", "./model", "../model", "models/a/b", "~/model", "a b", "", "models/"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
