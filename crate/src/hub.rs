//! Where the files of a pretrained model are: a folder here, or a repository on a model hub.
//!
//! The hub is asked only when no folder of that name exists. `HF_ENDPOINT` (a mirror), `HF_HOME`,
//! `HF_HUB_CACHE`, `HF_TOKEN`, the proxy variables and `HF_HUB_OFFLINE` mean what they mean to
//! Python's `huggingface_hub`, and the cache folder is shared with it.

mod repository;

use std::path::{Path, PathBuf};

use self::repository::Repository;
use crate::error::{Error, Result};

/// A folder or a hub repository that files are taken from by name.
///
/// ```no_run
/// use qlora_nb::internals::hub::Snapshot;
/// let files = Snapshot::open("Langboat/bloom-1b4-zh")?;
/// let config = files.file("config.json")?; // a path, after a download if need be
/// let generation_config = files.optional_file("generation_config.json")?; // None if there is none
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
#[derive(Clone)]
pub struct Snapshot {
    name_or_path: String,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Folder(PathBuf),
    Hub(Repository),
}

impl Snapshot {
    /// A folder if there is one of that name, else a hub id such as `Langboat/bloom-1b4-zh`. All
    /// files come from the commit that the repository's main branch is at now; without a
    /// connection, from the one that the cache holds.
    ///
    /// # Errors
    /// [`Error::NotFound`] for what is no folder and cannot be a hub id; [`Error::Hub`], with the
    /// remedy, for what the hub does not have or does not give.
    pub fn open(name_or_path: &str) -> Result<Self> {
        let path = Path::new(name_or_path);
        // In `models/mine`, where there is a folder `models`, a path was meant.
        let owner_is_here = path.parent().is_some_and(|owner| owner != Path::new("") && owner.is_dir());
        let place = if path.is_dir() {
            Place::Folder(path.into())
        } else if is_hub_id(name_or_path) && !path.exists() && !owner_is_here {
            Place::Hub(Repository::open(name_or_path)?)
        } else {
            let remedy = if path.exists() {
                "this is a file: give the folder that holds it"
            } else {
                "check the path (a relative path starts at the notebook's folder), or give a hub id such as \
                 \"Langboat/bloom-1b4-zh\""
            };
            return Err(Error::not_found("model folder", path, remedy));
        };
        Ok(Self { name_or_path: name_or_path.into(), place })
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
        Err(match &self.place {
            Place::Folder(folder) => {
                let remedy = "give a folder in Hugging Face layout; copy or download the missing file into it";
                Error::not_found(&format!("{name} of the model"), folder.join(name), remedy)
            }
            Place::Hub(repository) => repository.lacks(name),
        })
    }

    /// The path of a file that may be missing.
    pub fn optional_file(&self, name: &str) -> Result<Option<PathBuf>> {
        match &self.place {
            Place::Folder(folder) => {
                let path = folder.join(name);
                Ok(path.is_file().then_some(path))
            }
            Place::Hub(repository) => repository.fetch(name),
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
