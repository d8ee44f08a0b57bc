//! The hub, played by a small server on this machine.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use qlora_nb::{internals::hub::Snapshot, prelude::*};
use qlora_nb_tests::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves one repository, `tester/poet`, over HTTP.
struct Hub {
    port: u16,
    /// Method, path and range of each request.
    log: Arc<Mutex<Vec<String>>>,
    /// After so many bytes of one file the connection breaks; 0: never.
    break_after: Arc<AtomicUsize>,
}

impl Hub {
    fn start(files: HashMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub =
            Self { port: listener.local_addr().unwrap().port(), log: Arc::default(), break_after: Arc::default() };
        let (log, break_after, files) = (hub.log.clone(), hub.break_after.clone(), Arc::new(files));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, break_after, files) = (log.clone(), break_after.clone(), files.clone());
                thread::spawn(move || {
                    let _ = answer(stream, &files, &log, &break_after);
                });
            }
        });
        hub
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn answer(
    mut stream: TcpStream,
    files: &HashMap<String, Vec<u8>>,
    log: &Mutex<Vec<String>>,
    break_after: &AtomicUsize,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (mut range, mut length, mut token) = (None, 0usize, None);
    let request = line.split(" HTTP").next().unwrap_or_default().to_string();
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header == "\r\n" {
            break;
        }
        let (name, value) = header.trim().split_once(": ").unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                range = value
                    .strip_prefix("bytes=")
                    .and_then(|r| r.split_once('-'))
                    .map(|(a, b)| (a.to_string(), b.to_string()))
            }
            "content-length" => length = value.parse().unwrap_or(0),
            "authorization" => token = Some(value.to_string()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let shown = range.as_ref().map(|(a, b)| format!(" {a}-{b}")).unwrap_or_default();
    log.lock().unwrap().push(format!("{request}{shown}"));
    let (method, path) = request.split_once(' ').unwrap_or_default();
    let json = |stream: &mut TcpStream, status: &str, text: String, extra: &str| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n{extra}\r\n{text}",
            text.len()
        )
    };
    if path.starts_with("/api/models/tester/private") && token.as_deref() != Some("Bearer secret") {
        return json(&mut stream, "401 Unauthorized", "{\"error\": \"Invalid credentials\"}".into(), "");
    }
    if path.starts_with("/api/models/tester/gated") {
        return json(
            &mut stream,
            "403 Forbidden",
            "{\"error\": \"awaiting review\"}".into(),
            "x-error-code: GatedRepo\r\n",
        );
    }
    if path.starts_with("/api/models/tester/poet/paths-info/") {
        let asked = String::from_utf8_lossy(&body).into_owned();
        let entries: Vec<String> = files
            .iter()
            .filter(|(name, _)| asked.contains(&format!("{name:?}")))
            .map(|(name, bytes)| {
                format!("{{\"type\":\"file\",\"oid\":\"1\",\"size\":{},\"path\":{name:?}}}", bytes.len())
            })
            .collect();
        return json(&mut stream, "200 OK", format!("[{}]", entries.join(",")), "");
    }
    if path.starts_with("/api/models/tester/poet") || path.starts_with("/api/models/tester/private") {
        let names: Vec<String> = files.keys().map(|name| format!("{{\"rfilename\":{name:?}}}")).collect();
        let text = format!("{{\"id\":\"tester/poet\",\"sha\":{COMMIT:?},\"siblings\":[{}]}}", names.join(","));
        return json(&mut stream, "200 OK", text, "");
    }
    let name = path.strip_prefix(&format!("/tester/poet/resolve/{COMMIT}/"));
    let Some((name, content)) = name.and_then(|name| files.get_key_value(name)) else {
        return json(
            &mut stream,
            "404 Not Found",
            "{\"error\": \"not found\"}".into(),
            "x-error-code: RepoNotFound\r\n",
        );
    };
    let part = match &range {
        Some((from, to)) => &content[from.parse().unwrap()..=to.parse().unwrap()],
        None => &content[..],
    };
    let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\netag: \"{name}-1\"\r\nx-repo-commit: {COMMIT}\r\nconnection: close\r\n\r\n",
        part.len()
    )?;
    if method == "HEAD" {
        return Ok(());
    }
    let limit = break_after.load(SeqCst);
    let start: usize = range.and_then(|(from, _)| from.parse().ok()).unwrap_or(0);
    if limit > 0 && start + part.len() > limit {
        stream.write_all(&part[..limit.saturating_sub(start)])?;
        return stream.shutdown(std::net::Shutdown::Both);
    }
    stream.write_all(part)
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
    for (name, value) in [("HF_HOME", home.to_str().unwrap()), ("HF_ENDPOINT", endpoint), ("NO_PROXY", "127.0.0.1")] {
        // SAFETY: no other thread of this process reads the environment yet.
        unsafe { std::env::set_var(name, value) };
    }
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        // SAFETY: as above.
        unsafe { std::env::remove_var(name) };
    }
}

fn set(name: &str, value: &str) {
    // SAFETY: the threads that run now do not read the environment.
    unsafe { std::env::set_var(name, value) };
}

#[test]
fn a_tokenizer_comes_from_the_hub_once() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(poet_files());
    environment(home.path(), &format!("http://127.0.0.1:{}", hub.port));
    let tokenizer = AutoTokenizer::from_pretrained("tester/poet").unwrap();
    assert_eq!(tokenizer.encode("春眠不觉晓").unwrap().len(), 5);
    assert!(tokenizer.to_string().contains("name_or_path='tester/poet'"));
    assert!(hub.requests().iter().any(|r| r.starts_with("GET /tester/poet/resolve")));
    // Again: one question for the commit, no file.
    AutoTokenizer::from_pretrained("tester/poet").unwrap();
    let requests = hub.requests();
    assert!(requests.len() == 1 && requests[0].starts_with("GET /api/models/tester/poet"), "{requests:?}");
    // Offline: none at all.
    set("HF_HUB_OFFLINE", "1");
    AutoTokenizer::from_pretrained("tester/poet").unwrap();
    assert_eq!(hub.requests(), Vec::<String>::new());
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
    let large: Vec<u8> = (0..40_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut files = poet_files();
    files.insert("model.safetensors".into(), large.clone());
    let hub = Hub::start(files);
    environment(home.path(), &format!("http://127.0.0.1:{}", hub.port));
    let snapshot = Snapshot::open("tester/poet").unwrap();
    hub.break_after.store(30_000_000, SeqCst);
    let error = snapshot.file("model.safetensors").unwrap_err();
    assert!(matches!(error, Error::Hub { .. }), "{error}");
    assert!(error.to_string().contains("goes on where it stopped"), "{error}");
    hub.requests();
    hub.break_after.store(0, SeqCst);
    let path = snapshot.file("model.safetensors").unwrap();
    assert!(fs::read(&path).unwrap() == large, "the parts make the file");
    let gets: Vec<String> = hub.requests().into_iter().filter(|r| r.starts_with("GET /tester")).collect();
    assert!(gets[0].ends_with(" 16777216-33554431"), "the first part was kept: {gets:?}");
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no partial file stays");
    assert_eq!(Snapshot::open("tester/poet").unwrap().file("model.safetensors").unwrap(), path);
}

#[test]
fn what_the_hub_refuses_is_explained() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(poet_files());
    environment(home.path(), &format!("http://127.0.0.1:{}", hub.port));
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
