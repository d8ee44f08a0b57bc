//! Where the files of a pretrained model are: a folder here, or a repository on a model hub.
//!
//! The hub is asked only when no folder of that name exists. `HF_ENDPOINT` (a mirror), `HF_HOME`, `HF_HUB_CACHE`,
//! `HF_TOKEN` and the file of `hf auth login`, `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE` and `HF_HUB_OFFLINE` mean
//! what they mean to Python's `huggingface_hub`. The cache is shared with it in both directions: `blobs/` holds the
//! files under their hashes, `snapshots/` links to them, `.locks/` keeps two processes from writing one file.
//!
//! What holds:
//!
//! - A file takes its name in the cache after its length is right, and its hash where the hub tells one (always on
//!   Hugging Face): an error page never becomes a file, and the half of a file is never taken for the whole.
//! - A connection is waited for 10 seconds, silence is borne for 30. A hub that is busy (429, 5xx) is asked again, as
//!   late as it says (`Retry-After`), for 30 seconds in all, or 3 if the model is in the cache.
//! - When the hub cannot be reached, stays busy or wants a longer wait, the cached files are used, with a notice.
//! - A download goes on where it stopped, after an interrupt, a broken connection or a kill. Waits and transfers end
//!   within a second of an interrupt.
//! - The token goes to the hub alone: to no other host, and into no message.

mod client;
mod repository;

use std::{
    env,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use self::repository::Repository;
use crate::error::{Error, Result, ensure};

/// How long a hub is waited for: for a connection, while nothing comes, and in all while it is busy.
#[derive(Clone, Copy)]
pub struct Patience {
    pub connect: Duration,
    pub silence: Duration,
    pub busy: Duration,
}

const PATIENCE: Patience =
    Patience { connect: Duration::from_secs(10), silence: Duration::from_secs(30), busy: Duration::from_secs(30) };

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
    Hub(Arc<Repository>),
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
        Self::open_with(name_or_path, PATIENCE)
    }

    /// [`open`](Self::open) for tests, which cannot wait so long.
    pub fn open_with(name_or_path: &str, patience: Patience) -> Result<Self> {
        let path = Path::new(name_or_path);
        // In `models/mine`, where there is a folder `models`, a path was meant.
        let owner_is_here = path.parent().is_some_and(|owner| owner != Path::new("") && owner.is_dir());
        let place = if path.is_dir() {
            Place::Folder(path.into())
        } else if is_hub_id(name_or_path) && !path.exists() && !owner_is_here {
            Place::Hub(Repository::open(name_or_path, patience)?.into())
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
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name that leads out of the model's folder: names come from files
    /// (`model.safetensors.index.json`) that anybody can write. [`Error::Hub`], with the remedy, from the hub.
    pub fn optional_file(&self, name: &str) -> Result<Option<PathBuf>> {
        let is_odd = |c: char| c.is_control() || c == '\\';
        let is_inside = !name.contains(is_odd) && !name.split('/').any(|part| matches!(part, "" | "." | ".."));
        let remedy = "the model's list of files is damaged or hostile: take the model from another place";
        ensure(is_inside, "file", format!("{name:?}"), "the name of a file inside the model's folder", remedy)?;
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

/// An environment variable; blank ones count as not set.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

/// The folder that an environment variable names, in which a shell may have left `~`.
fn folder(name: &str) -> Option<PathBuf> {
    let value = variable(name)?;
    Some(match value.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => home().join(rest.trim_start_matches('/')),
        _ => value.into(),
    })
}

fn home() -> PathBuf {
    env::home_dir().unwrap_or_else(env::temp_dir)
}

/// Where the token and the cache are.
fn hf_home() -> PathBuf {
    let default = || folder("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache")).join("huggingface");
    folder("HF_HOME").unwrap_or_else(default)
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
