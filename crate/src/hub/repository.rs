//! One commit of a hub repository, and its files in the cache.
//!
//! hf-hub speaks to the hub and keeps the cache. What it leaves to us: the offline switch, one
//! commit for all files, and large downloads that go on where they stopped.

use std::{
    env,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use hf_hub::{
    HFClientSync, HFError, HFRepositorySync,
    repository::{RepoTreeEntry, RepoTypeModel},
    resolve_cache_dir, split_id,
};

use crate::{
    display::{Progress, notice},
    error::{Error, Result},
    interrupt,
    safe_file::write_atomically,
};

/// A larger file is downloaded in parts of this size. What is on disk when a download is cut
/// off stays, and the next call asks for the rest.
const PART: u64 = 16 << 20;
const MB: u64 = 1_000_000;

#[derive(Clone)]
pub(super) struct Repository {
    id: String,
    remote: HFRepositorySync<RepoTypeModel>,
    /// The repository's folder in the cache.
    folder: PathBuf,
    commit: String,
    /// The files of that commit; none when only the cache was asked.
    names: Option<Arc<[String]>>,
}

impl Repository {
    pub fn open(id: &str) -> Result<Self> {
        let failed = |e: HFError| failure(id, &e);
        let (owner, name) = split_id(id);
        let remote = HFClientSync::new().map_err(failed)?.model(owner, name);
        let folder = resolve_cache_dir().join(format!("models--{}", id.replace('/', "--")));
        let main = folder.join("refs/main");
        let cached = fs::read_to_string(&main).ok().map(|commit| commit.trim().to_string());
        let (commit, names) = match (is_offline(), cached) {
            (true, Some(commit)) => (commit, None),
            (true, None) => return Err(failure(id, &HFError::LocalEntryNotFound { path: id.into() })),
            (false, cached) => match (remote.info().send(), cached) {
                (Ok(info), _) => {
                    let commit = info.sha.ok_or_else(|| failed(HFError::malformed_response("the commit's sha")))?;
                    let names = info.siblings.map(|files| files.into_iter().map(|file| file.rfilename).collect());
                    fs::create_dir_all(folder.join("refs")).map_err(Error::io("write", &folder))?;
                    write_atomically(&main, commit.as_bytes())?;
                    (commit, names)
                }
                (Err(e @ HFError::Request { .. }), Some(commit)) => {
                    notice(&format!("{id}: the hub cannot be reached, the cached files are used ({})", brief(&e)));
                    (commit, None)
                }
                (Err(e), _) => return Err(failed(e)),
            },
        };
        Ok(Self { id: id.into(), remote, folder, commit, names })
    }

    /// A file's path in the cache, after a download if need be; none if the commit has no such file.
    pub fn fetch(&self, name: &str) -> Result<Option<PathBuf>> {
        let failed = |e: HFError| failure(&self.what(name), &e);
        let path = self.folder.join("snapshots").join(&self.commit).join(name);
        if path.exists() {
            return Ok(Some(path));
        }
        if !self.names.iter().flat_map(|names| names.iter()).any(|n| n == name) {
            return Ok(None);
        }
        let known = self.remote.get_paths_info().paths(vec![name.into()]).revision(&self.commit).send();
        if let Some(RepoTreeEntry::File { size, .. }) = known.map_err(failed)?.first()
            && *size > PART
        {
            self.fetch_in_parts(name, *size, &path)?;
        } else {
            self.remote.download_file().filename(name).revision(&self.commit).send().map_err(failed)?;
        }
        Ok(Some(path))
    }

    fn fetch_in_parts(&self, name: &str, size: u64, path: &Path) -> Result<()> {
        let partial = path.with_file_name(format!("{}.incomplete", path.file_name().unwrap_or_default().display()));
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        }
        let not_written = |e| Error::io("write", &partial)(e);
        let mut file = File::options().create(true).append(true).open(&partial).map_err(not_written)?;
        // A second process waits here, and then finds the file whole.
        file.lock().map_err(not_written)?;
        if path.exists() {
            return Ok(());
        }
        let mut have = file.metadata().map_err(Error::io("read", &partial))?.len();
        if have > size {
            file.set_len(0).map_err(not_written)?;
            have = 0;
        }
        let _guard = interrupt::Guard::new()?;
        let what = format!("Download {name}");
        let progress = Progress::starting_at(&what, (have / MB) as usize, (size / MB) as usize, "MB");
        while have < size {
            interrupt::check(&what)?;
            let range = have..size.min(have + PART);
            let part = self.remote.download_file_to_bytes().filename(name).revision(&self.commit).range(range.clone());
            let bytes = part.send().map_err(|e| failure(&self.what(name), &e))?;
            if bytes.len() as u64 != range.end - range.start {
                let detail = format!("asked for bytes {range:?}, got {} bytes", bytes.len());
                let remedy = "this hub does not serve parts of files: set HF_ENDPOINT to another one";
                return Err(Error::hub(&self.what(name), detail, remedy));
            }
            file.write_all(&bytes).map_err(not_written)?;
            have = range.end;
            progress.set((have / MB) as usize, "");
        }
        progress.finish();
        file.sync_all().map_err(not_written)?;
        fs::rename(&partial, path).map_err(Error::io("write", path))
    }

    /// Why a file that must be there is not.
    pub fn lacks(&self, name: &str) -> Error {
        if self.names.is_none() {
            return failure(&self.what(name), &HFError::LocalEntryNotFound { path: name.into() });
        }
        let remedy = "choose a repository in the transformers layout (config.json, tokenizer.json, *.safetensors)";
        Error::hub(&self.what(name), "the repository has no such file", remedy)
    }

    /// A file as messages call it.
    fn what(&self, name: &str) -> String {
        format!("{name} of {}", self.id)
    }
}

fn is_offline() -> bool {
    let set =
        |name| env::var(name).is_ok_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
    set("HF_HUB_OFFLINE") || set("TRANSFORMERS_OFFLINE")
}

fn failure(what: &str, e: &HFError) -> Error {
    let (detail, remedy) = match e {
        HFError::LocalEntryNotFound { .. } if is_offline() => (
            "it is not in the local cache, and HF_HUB_OFFLINE is set".into(),
            "unset HF_HUB_OFFLINE to download it once, or copy the cache folder from another machine",
        ),
        HFError::LocalEntryNotFound { .. } => (
            "it is not in the local cache, and the hub cannot be reached".into(),
            "check the connection; set HF_ENDPOINT to a mirror or HTTPS_PROXY to a proxy",
        ),
        HFError::RepoNotFound { .. } => (
            "there is no such folder here and no such repository there, or it is private".into(),
            "check the name; for a private model set HF_TOKEN",
        ),
        HFError::AuthRequired { .. } => (
            "it does not exist, or it is private and HF_TOKEN is not set to a token that may read it".into(),
            "check the name (or the path, if a folder is meant); for a private model set HF_TOKEN",
        ),
        HFError::Forbidden { .. } => {
            (e.to_string(), "accept the model's terms on its page, and set HF_TOKEN to a token that may read it")
        }
        HFError::Request { .. } => (
            brief(e),
            "if a folder is meant, check its path; else check the connection, or set HF_ENDPOINT to a mirror or \
             HTTPS_PROXY to a proxy; a download goes on where it stopped",
        ),
        HFError::Io(_) | HFError::CacheLockTimeout { .. } => {
            (e.to_string(), "check space and permissions of the cache folder, or set HF_HOME to another one")
        }
        _ => (e.to_string(), "try again later, or set HF_ENDPOINT to a mirror"),
    };
    Error::hub(what, detail, remedy)
}

/// The error and its cause; reqwest keeps "connection refused" in the innermost one.
fn brief(e: &HFError) -> String {
    let mut cause: &dyn std::error::Error = e;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let url = env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".into());
    format!("{url}: {cause}")
}
