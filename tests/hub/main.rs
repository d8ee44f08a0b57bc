//! The hub, played by a small server on this machine: whole, and with every fault that we could think of.

mod faults;
mod processes;
mod server;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use qlora_nb::{
    error::Result,
    internals::hub::{Patience, Snapshot},
    prelude::*,
};
use qlora_nb_tests::*;
use server::{COMMIT, Hub, etag};

/// A large file in parts that differ.
pub fn large(bytes: u32) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn poet_files() -> HashMap<String, Vec<u8>> {
    let folder = root().join("notebooks/models/poet-bloom-zh");
    ["tokenizer.json", "tokenizer_config.json", "config.json"]
        .into_iter()
        .map(|name| (name.to_string(), fs::read(folder.join(name)).unwrap()))
        .collect()
}

/// The environment is the process's own, and nextest gives each test a process.
fn environment(home: &Path, endpoint: &str) {
    set("HF_HOME", home.to_str().unwrap());
    set("HF_ENDPOINT", endpoint);
    set("NO_PROXY", "127.0.0.1,127.0.0.2");
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        // SAFETY: as in `set`.
        unsafe { std::env::remove_var(name) };
    }
}

fn set(name: &str, value: &str) {
    // SAFETY: the threads that run now do not read the environment.
    unsafe { std::env::set_var(name, value) };
}

/// As in earnest, in less time.
fn patience() -> Patience {
    Patience { connect: Duration::from_secs(1), silence: Duration::from_millis(500), busy: Duration::from_millis(300) }
}

fn get(name: &str) -> Result<PathBuf> {
    Snapshot::open_with("tester/poet", patience())?.file(name)
}

/// Nothing is in the cache but what belongs there: blobs under their hashes, beginnings of files, and links.
fn assert_sound(home: &Path, files: &HashMap<String, Vec<u8>>) {
    let folder = home.join("hub/models--tester--poet");
    let read = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    for blob in read(folder.join("blobs")) {
        let (name, content) = (blob.file_name().unwrap().to_str().unwrap(), fs::read(&blob).unwrap());
        match name.strip_suffix(".incomplete") {
            Some(of) => assert!(files.values().any(|file| etag(file) == of && file.starts_with(&content)), "{name}"),
            None => assert_eq!(name, etag(&content), "a blob of another content"),
        }
    }
    let mut folders: Vec<PathBuf> = read(folder.join("snapshots")).collect();
    while let Some(folder) = folders.pop() {
        for path in read(folder) {
            if path.is_dir() {
                folders.push(path);
            } else {
                let target = fs::read_link(&path).expect("a link");
                assert!(target.starts_with("../..") && path.is_file(), "{}", target.display());
            }
        }
    }
    if let Ok(commit) = fs::read_to_string(folder.join("refs/main")) {
        assert_eq!(commit, COMMIT);
    }
    let mut names: Vec<_> = read(home.join("hub")).collect();
    names.retain(|path| {
        !path.ends_with(".locks") && !path.ends_with("CACHEDIR.TAG") && !path.ends_with("models--tester--poet")
    });
    assert!(names.is_empty() && !home.join("evil.json").exists(), "{names:?}");
}

#[test]
fn a_tokenizer_comes_from_the_hub_once() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(poet_files());
    environment(home.path(), &hub.url());
    let tokenizer = AutoTokenizer::from_pretrained("tester/poet").unwrap();
    assert_eq!(tokenizer.encode("春眠不觉晓").unwrap().len(), 5);
    assert!(tokenizer.to_string().contains("name_or_path='tester/poet'"));
    assert!(hub.requests().iter().any(|r| r.is_get("tokenizer.json")));
    assert_sound(home.path(), &poet_files());
    // Again: one question for the commit, no file.
    AutoTokenizer::from_pretrained("tester/poet").unwrap();
    let requests = hub.requests();
    assert!(requests.len() == 1 && requests[0].is_api(), "{requests:?}");
    // Offline: none at all.
    set("HF_HUB_OFFLINE", "1");
    AutoTokenizer::from_pretrained("tester/poet").unwrap();
    assert!(hub.requests().is_empty());
    let error = Snapshot::open("tester/poet").unwrap().file("model.safetensors").unwrap_err().to_string();
    assert!(error.contains("model.safetensors of tester/poet") && error.contains("unset HF_HUB_OFFLINE"), "{error}");
    let error = AutoTokenizer::from_pretrained("tester/other").unwrap_err();
    assert!(matches!(&error, Error::Hub { .. }) && error.to_string().contains("HF_HUB_OFFLINE is set"), "{error}");
    // The hub gone: the cache serves.
    set("HF_HUB_OFFLINE", "0");
    set("HF_ENDPOINT", "http://127.0.0.1:9");
    AutoTokenizer::from_pretrained("tester/poet").unwrap();
}

#[test]
fn a_download_goes_on_where_it_stopped() {
    let home = tempfile::tempdir().unwrap();
    let content = large(40_000_000);
    let mut files = poet_files();
    files.insert("model.safetensors".into(), content.clone());
    let hub = Hub::start(files.clone());
    environment(home.path(), &hub.url());
    let snapshot = Snapshot::open("tester/poet").unwrap();
    hub.fault(|request, reply| {
        if request.is_get("model.safetensors") {
            reply.cut = Some(30_000_000usize.saturating_sub(request.from.unwrap_or(0)));
        }
    });
    let error = snapshot.file("model.safetensors").unwrap_err();
    assert!(matches!(error, Error::Hub { .. }), "{error}");
    assert!(error.to_string().contains("goes on where it stopped"), "{error}");
    assert_sound(home.path(), &files);
    hub.requests();
    hub.fault(|_, _| {});
    let path = snapshot.file("model.safetensors").unwrap();
    assert!(fs::read(&path).unwrap() == content, "the parts make the file");
    let from: Vec<usize> = hub.requests().iter().filter_map(|request| request.from).collect();
    assert_eq!(from, [30_000_000; 2], "what came before was kept");
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(home.path().join("hub/models--tester--poet/blobs")).unwrap().count(), 1);
    assert_eq!(Snapshot::open("tester/poet").unwrap().file("model.safetensors").unwrap(), path);
}

#[test]
fn what_the_hub_refuses_is_explained() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(poet_files());
    environment(home.path(), &hub.url());
    let open = |id: &str| {
        let error = Snapshot::open(id).map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Hub { what, .. } if what.contains(id)), "{error}");
        error.to_string()
    };
    assert!(open("tester/nothing").contains("check the name"), "{}", open("tester/nothing"));
    assert!(open("tester/private").contains("HF_TOKEN"), "{}", open("tester/private"));
    assert!(open("tester/gated").contains("accept the model's terms"), "{}", open("tester/gated"));
    set("HF_TOKEN", "secret");
    assert!(Snapshot::open("tester/private").is_ok());
    let poet = Snapshot::open("tester/poet").unwrap();
    let error = poet.file("model.safetensors").unwrap_err().to_string();
    assert!(error.contains("no such file"), "{error}");
    assert!(poet.optional_file("generation_config.json").unwrap().is_none());
    set("HF_ENDPOINT", "http://127.0.0.1:9");
    let error = open("tester/elsewhere");
    assert!(error.contains("http://127.0.0.1:9") && error.contains("HF_ENDPOINT to a mirror"), "{error}");
}

#[test]
fn a_path_is_never_asked_of_the_hub() {
    let home = tempfile::tempdir().unwrap();
    environment(home.path(), "http://127.0.0.1:9");
    fs::create_dir(home.path().join("models")).unwrap();
    std::env::set_current_dir(home.path()).unwrap();
    for path in ["/no/such/model", "./poet", "models/none", "out/qlora/checkpoint-9"] {
        let error = AutoTokenizer::from_pretrained(path).unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{path}: {error}");
    }
}
