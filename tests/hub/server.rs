//! A model hub with one repository, `tester/poet`, and whatever fault a test gives it.
//!
//! It answers as Hugging Face does: small files by itself, under git's hash; a large one by a redirect to another
//! host (this server under another address) with the SHA-256 in `x-linked-etag`.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// So many bytes make a file large.
pub const LARGE: usize = 1 << 20;
const API: &str = "/api/models/tester/poet";

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// The first byte that is asked for.
    pub from: Option<usize>,
    pub host: String,
    pub token: Option<String>,
}

impl Request {
    pub fn is_api(&self) -> bool {
        self.path.starts_with("/api/")
    }

    /// The question for a file's length and hash.
    pub fn is_head(&self) -> bool {
        self.method == "HEAD"
    }

    /// The request that a file's bytes answer, wherever they are.
    pub fn is_get(&self, name: &str) -> bool {
        self.method == "GET" && !self.is_api() && self.path.ends_with(name)
    }
}

/// What is sent, and how it ends.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Sent instead of all of it.
    pub raw: Option<Vec<u8>>,
    /// The connection breaks after so many bytes of the body.
    pub cut: Option<usize>,
    /// So long nothing comes: before the answer, or where it is cut.
    pub pause: Duration,
}

impl Reply {
    fn of(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        let headers = vec![("content-length", body.len().to_string())];
        Self { status, headers, body, raw: None, cut: None, pause: Duration::ZERO }
    }

    /// Becomes another answer, of the body's length.
    pub fn be(&mut self, status: u16, body: impl Into<Vec<u8>>) {
        *self = Self::of(status, body);
    }

    pub fn set(&mut self, name: &'static str, value: impl ToString) {
        self.unset(name);
        self.headers.push((name, value.to_string()));
    }

    pub fn unset(&mut self, name: &str) {
        self.headers.retain(|(n, _)| *n != name);
    }
}

type Fault = dyn Fn(&Request, &mut Reply) + Send + Sync;

pub struct Hub {
    pub port: u16,
    log: Arc<Mutex<Vec<Request>>>,
    fault: Arc<Mutex<Arc<Fault>>>,
}

impl Hub {
    pub fn start(files: HashMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        let fault: Arc<Fault> = Arc::new(|_, _| {});
        let hub = Self {
            port: listener.local_addr().unwrap().port(),
            log: Arc::default(),
            fault: Arc::new(Mutex::new(fault)),
        };
        let (log, fault, files) = (hub.log.clone(), hub.fault.clone(), Arc::new(files));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, fault, files) = (log.clone(), fault.clone(), files.clone());
                thread::spawn(move || {
                    let request = read(&stream)?;
                    log.lock().unwrap().push(request.clone());
                    let mut reply = good(&request, &files);
                    let fault = fault.lock().unwrap().clone();
                    fault(&request, &mut reply);
                    send(stream, &request, &reply)
                });
            }
        });
        hub
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on each answer is changed so.
    pub fn fault(&self, fault: impl Fn(&Request, &mut Reply) + Send + Sync + 'static) {
        *self.fault.lock().unwrap() = Arc::new(fault);
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    let mut lines = BufReader::new(stream).lines();
    let line = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = line.split(' ').map(String::from);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request { method, path, from: None, host: String::new(), token: None };
    for header in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = header.split_once(": ").unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "range" => request.from = value.trim_start_matches("bytes=").trim_end_matches('-').parse().ok(),
            "authorization" => request.token = Some(value.into()),
            "host" => request.host = value.into(),
            _ => {}
        }
    }
    Ok(request)
}

/// What a hub without a fault answers.
fn good(request: &Request, files: &HashMap<String, Vec<u8>>) -> Reply {
    let error = |status, code: &str| {
        let mut reply = Reply::of(status, "{\"error\": \"no\"}");
        reply.set("x-error-code", code);
        reply
    };
    let path = request.path.as_str();
    if path.starts_with("/api/models/tester/private") && request.token.as_deref() != Some("Bearer secret") {
        return error(401, "RepoNotFound");
    }
    if path.starts_with("/api/models/tester/gated") {
        return error(403, "GatedRepo");
    }
    if path == API || path.starts_with("/api/models/tester/private") {
        let names: Vec<String> = files.keys().map(|name| format!("{{\"rfilename\":{name:?}}}")).collect();
        return Reply::of(200, format!("{{\"sha\":{COMMIT:?},\"siblings\":[{}]}}", names.join(",")));
    }
    let of = |revision| path.strip_prefix(&format!("/tester/poet/resolve/{revision}/"));
    let resolved = of(COMMIT).or_else(|| of("main"));
    let name = resolved.or_else(|| path.strip_prefix("/cdn/")).unwrap_or_default().replace("%20", " ");
    let Some(content) = files.get(&name) else { return error(404, "RepoNotFound") };
    if resolved.is_some() && content.len() >= LARGE {
        let mut reply = Reply::of(302, "elsewhere");
        let port = request.host.rsplit(':').next().unwrap_or_default();
        reply.set("location", format!("http://127.0.0.2:{port}/cdn/{}", name.replace(' ', "%20")));
        reply.set("x-linked-etag", format!("\"{}\"", etag(content)));
        reply.set("x-linked-size", content.len());
        reply.set("x-repo-commit", COMMIT);
        return reply;
    }
    let from = request.from.unwrap_or(0).min(content.len());
    let mut reply = Reply::of(if request.from.is_some() { 206 } else { 200 }, &content[from..]);
    if request.from.is_some() {
        reply.set("content-range", format!("bytes {from}-{}/{}", content.len() - 1, content.len()));
    }
    if resolved.is_some() {
        reply.set("etag", format!("\"{}\"", etag(content)));
        reply.set("x-repo-commit", COMMIT);
    }
    reply
}

fn send(mut stream: TcpStream, request: &Request, reply: &Reply) -> std::io::Result<()> {
    if reply.cut.is_none() {
        thread::sleep(reply.pause);
    }
    if let Some(raw) = &reply.raw {
        return stream.write_all(raw);
    }
    write!(stream, "HTTP/1.1 {} X\r\nconnection: close\r\n", reply.status)?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "\r\n")?;
    if !request.is_head() {
        stream.write_all(&reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())])?;
    }
    if reply.cut.is_some() {
        thread::sleep(reply.pause);
    }
    // Whatever else the client sends, closing must not take away what it has not read yet.
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.read_to_end(&mut Vec::new()).map(|_| ())
}

/// A file's name among the blobs.
pub fn etag(content: &[u8]) -> String {
    let hash = if content.len() >= LARGE {
        digest(&SHA256, content)
    } else {
        let mut named = format!("blob {}\0", content.len()).into_bytes();
        named.extend(content);
        digest(&SHA1_FOR_LEGACY_USE_ONLY, &named)
    };
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
