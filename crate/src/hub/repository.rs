//! One commit of a hub repository, and its files in the cache.

use std::{
    fs::{self, File, TryLockError},
    io::{Read, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use ureq::http::Method;

use super::{
    Patience,
    client::{Answer, Client, in_thread, shown},
    folder, hf_home, variable,
};
use crate::{
    display::{Progress, notice},
    error::{Error, Result},
    interrupt,
    safe_file::{replace, write_atomically},
};

const MB: u64 = 1_000_000;
/// A download of so many bytes shows how far it has come.
const LARGE: u64 = 16 << 20;
/// So many broken connections in a row are borne by one download, if each of them brought something.
const BREAKS: usize = 5;

pub(super) struct Repository {
    id: String,
    /// The cache's folder of this repository, and that of its locks.
    folder: PathBuf,
    locks: PathBuf,
    commit: String,
    /// The hub, and the names of the commit's files.
    hub: Result<(Client, Vec<String>), CacheOnly>,
}

/// Why only the cache is asked, and what to do about it.
type CacheOnly = (String, String);

/// What the hub tells of a file: its length and its name among the blobs, which is its hash.
struct Known {
    etag: String,
    size: u64,
}

impl Repository {
    pub fn open(id: &str, patience: Patience) -> Result<Self> {
        let _guard = interrupt::Guard::new()?;
        let cache = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.unwrap_or_else(|| hf_home().join("hub"));
        let name = format!("models--{}", id.replace('/', "--"));
        let (folder, locks) = (cache.join(&name), cache.join(".locks").join(&name));
        let main = folder.join("refs/main");
        let cached = fs::read_to_string(&main).unwrap_or_default();
        let cached = Some(cached.trim().to_string()).filter(|commit| is_commit(commit));
        let (commit, hub) = match (ask_hub(id, patience, cached.is_some()), cached) {
            (Ok((client, answer)), cached) => {
                let (commit, names) = commit_and_names(answer.accepted()?, id, &client.endpoint)?;
                if cached.as_ref() != Some(&commit) {
                    // Threads of one process would write it under one temporary name.
                    static ONE: Mutex<()> = Mutex::new(());
                    let _one = ONE.lock();
                    create(&folder.join("refs"))?;
                    write_atomically(&main, commit.as_bytes())?;
                }
                (commit, Ok((client, names)))
            }
            (Err(Error::Hub { detail, remedy, .. }), Some(commit)) => {
                if !is_offline() {
                    notice(&format!("{id}: the hub cannot be asked, the cached files are used ({detail})"));
                }
                (commit, Err((detail, remedy)))
            }
            (Err(e), _) => return Err(e),
        };
        Ok(Self { id: id.into(), folder, locks, commit, hub })
    }

    /// A file's path in the cache, after a download if need be; none if the commit has no such file.
    pub fn fetch(&self, name: &str) -> Result<Option<PathBuf>> {
        let path = self.folder.join("snapshots").join(&self.commit).join(name);
        if path.exists() {
            return Ok(Some(path));
        }
        let Ok((client, names)) = &self.hub else { return Ok(None) };
        if !names.iter().any(|n| n == name) {
            return Ok(None);
        }
        let _guard = interrupt::Guard::new()?;
        let what = self.what(name);
        let url = format!("{}/{}/resolve/{}/{}", client.endpoint, self.id, self.commit, in_url(name));
        let known = self.known(client, &url, &what)?;
        let blob = self.folder.join("blobs").join(&known.etag);
        create(&self.folder.join("blobs"))?;
        create(&self.locks)?;
        let _lock = lock(&self.locks.join(format!("{}.lock", known.etag)), &what)?;
        if path.exists() {
            // Another process fetched it meanwhile.
            return Ok(Some(path));
        }
        // Another commit may have the same file.
        if !fs::metadata(&blob).is_ok_and(|file| file.len() == known.size) {
            download(client, &url, &known, &blob, &what)?;
        }
        let target = format!("{}blobs/{}", "../".repeat(name.split('/').count() + 1), known.etag);
        path.parent().map_or(Ok(()), create)?;
        replace(&path, |temporary| {
            // Where there are no links the file itself goes there, as with Python.
            let linked = symlink(&target, temporary).or_else(|_| fs::rename(&blob, temporary));
            linked.map_err(Error::io("write", temporary))
        })?;
        Ok(Some(path))
    }

    /// Asks the hub for a file's length and hash.
    fn known(&self, client: &Client, url: &str, what: &str) -> Result<Known> {
        let answer = client.ask(Method::HEAD, url, 0, what, false)?;
        // A redirect tells of a file that is stored elsewhere.
        let answer = if matches!(answer.status, 300..=399) { answer } else { answer.accepted()? };
        let etag = answer.header("x-linked-etag").or_else(|| answer.header("etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        let size = answer.number("x-linked-size").or_else(|| answer.number("content-length"));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let is_name = !etag.is_empty() && etag.len() <= 128 && !etag.starts_with('.') && etag.chars().all(is_plain);
        match size {
            Some(size) if is_name && answer.header("x-repo-commit") == Some(&self.commit) => Ok(Known { etag, size }),
            _ => Err(no_hub(what, &client.endpoint, "does not tell commit, length and hash of the file")),
        }
    }

    /// Why a file that must be there is not.
    pub fn lacks(&self, name: &str) -> Error {
        let layout = "choose a repository in the transformers layout (config.json, tokenizer.json, *.safetensors)";
        match &self.hub {
            Ok(_) => Error::hub(&self.what(name), "the repository has no such file", layout),
            Err((why, remedy)) => Error::hub(&self.what(name), format!("it is not in the local cache; {why}"), remedy),
        }
    }

    /// A file as messages call it.
    fn what(&self, name: &str) -> String {
        format!("{name} of {}", self.id)
    }
}

/// Asks for the commit that the main branch is at and the names of its files.
fn ask_hub(id: &str, patience: Patience, is_cached: bool) -> Result<(Client, Answer)> {
    if is_offline() {
        let remedy = "unset HF_HUB_OFFLINE to download it once, or copy the cache folder from another machine";
        return Err(Error::hub(id, "HF_HUB_OFFLINE is set", remedy));
    }
    let client = Client::from_env(patience)?;
    let answer = client.ask(Method::GET, &format!("{}/api/models/{id}", client.endpoint), 0, id, is_cached)?;
    Ok((client, answer))
}

fn commit_and_names(mut answer: Answer, id: &str, endpoint: &str) -> Result<(String, Vec<String>)> {
    let info = answer.json()?;
    match (info["sha"].as_str().filter(|sha| is_commit(sha)), info["siblings"].as_array()) {
        (Some(commit), Some(files)) => {
            let names = files.iter().filter_map(|file| Some(file["rfilename"].as_str()?.to_string()));
            Ok((commit.into(), names.collect()))
        }
        _ => Err(no_hub(id, endpoint, "does not tell the commit and its files")),
    }
}

/// Fetches a file's bytes under a name of their own, and gives them the blob's when they are what the hub announced.
fn download(client: &Client, url: &str, known: &Known, blob: &Path, what: &str) -> Result<()> {
    let partial = blob.with_file_name(format!("{}.incomplete", known.etag));
    // What a power failure left of an earlier download may be damaged: then once more from the start.
    for _ in 0..2 {
        transfer(client, url, known, &partial, what)?;
        if is_as_announced(&partial, known, what)? {
            return fs::rename(&partial, blob).map_err(Error::io("write", blob));
        }
        fs::remove_file(&partial).map_err(Error::io("write", &partial))?;
    }
    let detail = format!("what came has not the hash that the hub announced ({})", known.etag);
    Err(Error::hub(what, detail, "something on the way changes files: set HF_ENDPOINT to a mirror, or use another net"))
}

/// Asks for what is missing until all is there.
fn transfer(client: &Client, url: &str, known: &Known, partial: &Path, what: &str) -> Result<()> {
    let not_written = |e| Error::io("write", partial)(e);
    let mut file = File::options().create(true).append(true).open(partial).map_err(not_written)?;
    let mut have = file.metadata().map_err(not_written)?.len();
    let progress = match known.size {
        ..=LARGE => Progress::silent(),
        size => Progress::starting_at(&format!("Download {what}"), (have / MB) as usize, (size / MB) as usize, "MB"),
    };
    let mut breaks = 0;
    while have != known.size {
        let mut answer = client.ask(Method::GET, url, have, what, false)?;
        let range = answer.header("content-range").unwrap_or_default();
        let goes_on = have == 0 || answer.status == 206 && range.starts_with(&format!("bytes {have}-"));
        if have > known.size || !goes_on && matches!(answer.status, 206 | 416) {
            // The server gives other parts or none: from the start.
            file.set_len(0).map_err(not_written)?;
            have = 0;
            continue;
        }
        answer = answer.accepted()?;
        // A server that ignores ranges sends the whole file.
        let start = if goes_on { have } else { 0 };
        let wrong = || {
            let detail = format!("of its {} bytes those from {start} on were asked for, others came", known.size);
            let remedy = "the server or a proxy sends something else: try again later, or set HF_ENDPOINT to a mirror";
            Err(Error::hub(what, detail, remedy))
        };
        if answer.number("content-length").is_some_and(|length| length != known.size - start) {
            return wrong();
        }
        file.set_len(start).map_err(not_written)?;
        have = start;
        loop {
            match answer.piece() {
                Ok(bytes) if bytes.is_empty() && have == known.size => break,
                Ok(bytes) if bytes.is_empty() || bytes.len() as u64 > known.size - have => {
                    // What came is no part of the file.
                    file.set_len(start).map_err(not_written)?;
                    return wrong();
                }
                Ok(bytes) => {
                    file.write_all(&bytes).map_err(not_written)?;
                    have += bytes.len() as u64;
                    progress.set((have / MB) as usize, "");
                }
                Err(Error::Hub { .. }) if have > start && breaks < BREAKS => {
                    breaks += 1;
                    break;
                }
                Err(e) => return Err(e),
            }
        }
    }
    progress.finish();
    file.sync_all().map_err(not_written)
}

/// Whether a file has the hash that its etag is: SHA-256 of large files, of others that which git calls them by. A
/// mirror may have etags of another kind, and then the length has to do.
fn is_as_announced(path: &Path, known: &Known, what: &str) -> Result<bool> {
    let is_hash = known.etag.chars().all(|c| c.is_ascii_hexdigit());
    let mut hash = match known.etag.len() {
        64 if is_hash => Context::new(&SHA256),
        40 if is_hash => Context::new(&SHA1_FOR_LEGACY_USE_ONLY),
        _ => return Ok(true),
    };
    if known.etag.len() == 40 {
        hash.update(format!("blob {}\0", known.size).as_bytes());
    }
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        interrupt::check(what)?;
        match file.read(&mut buffer).map_err(Error::io("read", path))? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let hex: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(hex.eq_ignore_ascii_case(&known.etag))
}

/// Holds the lock that Python takes for the same blob, while the file lives.
fn lock(path: &Path, what: &str) -> Result<File> {
    let file = File::options().create(true).append(true).open(path).map_err(Error::io("write", path))?;
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        notice(&format!("{what}: waiting for another process that downloads it"));
        return in_thread(what, move || file.lock().map(|()| file))?.map_err(Error::io("write", path));
    }
    // On a file system without locks the hash shows it if two wrote at once.
    Ok(file)
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io("write", folder))
}

/// Something else answers in the hub's place.
fn no_hub(what: &str, endpoint: &str, detail: &str) -> Error {
    let remedy = "a login page of the network or a proxy may answer for it: open the hub in a browser, or set \
                  HF_ENDPOINT to a mirror";
    Error::hub(what, format!("{}: the answer {detail}", shown(endpoint)), remedy)
}

/// Becomes the name of a folder.
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

/// A file's name in a URL.
fn in_url(name: &str) -> String {
    let encoded = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    name.bytes().map(encoded).collect()
}

fn is_offline() -> bool {
    let set = |name| variable(name).is_some_and(|v| matches!(v.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
    set("HF_HUB_OFFLINE") || set("TRANSFORMERS_OFFLINE")
}
