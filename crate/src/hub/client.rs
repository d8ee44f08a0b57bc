//! Requests to a hub, as `huggingface_hub` makes them.

use std::{
    fs,
    io::{self, Read},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

use ureq::{
    Agent, BodyReader, Proxy,
    http::{HeaderMap, Method, Request},
    tls::{PemItem, RootCerts, TlsConfig, parse_pem},
};

use super::{Patience, folder, hf_home, variable};
use crate::{
    error::{Error, Result, ensure},
    interrupt,
};

/// How often a wait looks whether somebody asked it to stop.
const TICK: Duration = Duration::from_millis(100);
const REDIRECTS: usize = 8;
/// The longest answer that is taken into memory: the list of a repository's files.
const LONGEST_TEXT: usize = 64 << 20;
/// So much of a body is taken at once.
const PIECE: u64 = 256 << 10;

pub(super) struct Client {
    agent: Agent,
    pub endpoint: String,
    /// Only ever sent to `endpoint`.
    token: Option<String>,
    patience: Patience,
}

impl Client {
    pub fn from_env(patience: Patience) -> Result<Self> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let is_url = endpoint.starts_with("https://") || endpoint.starts_with("http://");
        ensure(is_url, "HF_ENDPOINT", shown(&endpoint), "a URL", "write it like https://hf-mirror.com, or unset it")?;
        let config = Agent::config_builder()
            .user_agent(concat!("qlora-nb/", env!("CARGO_PKG_VERSION")))
            // The length that the hub tells is then that of the file.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .tls_config(TlsConfig::builder().root_certs(root_certs()?).build())
            .timeout_resolve(Some(patience.connect))
            .timeout_connect(Some(patience.connect))
            .timeout_send_request(Some(patience.silence))
            .timeout_recv_response(Some(patience.silence))
            .timeout_per_read(Some(patience.silence));
        let agent = Agent::new_with_config(config.build());
        Ok(Self { agent, endpoint: endpoint.trim_end_matches('/').into(), token: token()?, patience })
    }

    /// What the hub answers, of whatever status. A busy hub is asked again for a while: less long where the cache can
    /// serve. An [`Error::Hub`] says that it cannot be reached or stays busy.
    pub fn ask(&self, method: Method, url: &str, from: u64, what: &str, is_cached: bool) -> Result<Answer> {
        let mut left = if is_cached { self.patience.busy / 10 } else { self.patience.busy };
        let mut pause = self.patience.busy / 30;
        loop {
            let answer = self.follow(&method, url, from, what)?;
            if !matches!(answer.status, 429 | 500..=599) {
                return Ok(answer);
            }
            let wait = pause.max(Duration::from_secs(answer.number("retry-after").unwrap_or(0)));
            if wait > left {
                return answer.accepted();
            }
            in_thread(what, move || thread::sleep(wait))?;
            left -= wait;
            pause *= 2;
        }
    }

    /// Redirects are followed here and not by ureq: the token may not leave the hub, and of a file that is stored
    /// elsewhere the hub's last own answer tells length and hash.
    fn follow(&self, method: &Method, url: &str, from: u64, what: &str) -> Result<Answer> {
        let mut url = url.to_string();
        for _ in 0..=REDIRECTS {
            let answer = self.send(method, &url, from, what)?;
            let next = match answer.header("location").filter(|_| matches!(answer.status, 300..=399)) {
                Some(path) if path.starts_with('/') => format!("{}{path}", origin(&url)),
                Some(other) if *method != Method::HEAD || origin(other) == origin(&self.endpoint) => other.into(),
                _ => return Ok(answer),
            };
            url = next;
        }
        let detail = format!("{}: more than {REDIRECTS} redirects", shown(&self.endpoint));
        Err(Error::hub(what, detail, "try again later, or set HF_ENDPOINT to a mirror"))
    }

    /// Sends one request and waits for the head of its answer.
    fn send(&self, method: &Method, url: &str, from: u64, what: &str) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(url);
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        if let Some(token) = self.token.as_ref().filter(|_| origin(url) == origin(&self.endpoint)) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let (agent, proxy) = (self.agent.clone(), proxy_of(url)?);
        let run = move || agent.run(agent.configure_request(request.body(())?).proxy(proxy).build());
        let (host, what) = (shown(origin(url)).to_string(), what.to_string());
        let (head, body) = in_thread(&what, run)?.map_err(|e| broken(&host, &what, e))?.into_parts();
        let body = Ok(body.into_reader());
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body, host, what })
    }
}

/// Does what may take long in a thread of its own, so that whoever waits for it can stop at any time. The thread is
/// left alone then: it ends by itself when its time is out.
pub(super) fn in_thread<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (tell, done) = sync_channel(1);
    thread::Builder::new().spawn(move || tell.send(work())).map_err(Error::io("start a thread for", what))?;
    loop {
        interrupt::check(what)?;
        match done.recv_timeout(TICK) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(broken("the connection", what, "its thread ended")),
        }
    }
}

/// The head of an answer, and its body as it comes.
pub(super) struct Answer {
    pub status: u16,
    headers: HeaderMap,
    body: io::Result<BodyReader<'static>>,
    host: String,
    what: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.parse().ok()
    }

    /// The next bytes of the body; none at its end.
    pub fn piece(&mut self) -> Result<Vec<u8>> {
        let broken = |e| broken(&self.host, &self.what, e);
        let mut body = std::mem::replace(&mut self.body, Err(io::ErrorKind::Interrupted.into())).map_err(broken)?;
        let (bytes, end, body) = in_thread(&self.what, move || {
            let mut bytes = Vec::new();
            let end = body.by_ref().take(PIECE).read_to_end(&mut bytes);
            (bytes, end, body)
        })?;
        // What came before an error counts; the next call gives the error.
        self.body = end.map(|_| body);
        if bytes.is_empty() && self.body.is_err() { self.piece() } else { Ok(bytes) }
    }

    /// The whole body as JSON; null if it is none.
    pub fn json(&mut self) -> Result<serde_json::Value> {
        let mut text = Vec::new();
        loop {
            let bytes = self.piece()?;
            if bytes.is_empty() || text.len() > LONGEST_TEXT {
                return Ok(serde_json::from_slice(&text).unwrap_or_default());
            }
            text.extend(bytes);
        }
    }

    /// This answer, unless its status is none of success.
    pub fn accepted(self) -> Result<Self> {
        let private = "check the name (or the path, if a folder is meant); for a private model set HF_TOKEN";
        let (detail, remedy) = match (self.status, self.header("x-error-code")) {
            (200..=299, _) => return Ok(self),
            (403, _) | (_, Some("GatedRepo")) => (
                "the hub refuses it",
                "accept the model's terms on its page, and set HF_TOKEN to a token that may read it",
            ),
            (401, _) => {
                ("it does not exist, or it is private and HF_TOKEN is not set to a token that may read it", private)
            }
            (404, _) => ("there is no such folder here and no such repository there, or it is private", private),
            (429, _) => (
                "it allows no more requests for now",
                "wait some minutes and try again (with a token in HF_TOKEN it allows more), or set HF_ENDPOINT to a mirror",
            ),
            _ => ("it does not serve now", "try again later, or set HF_ENDPOINT to a mirror"),
        };
        let later = self.number("retry-after").map_or(String::new(), |s| format!(", retry after {s} s"));
        Err(Error::hub(&self.what, format!("{}: status {}{later}: {detail}", self.host, self.status), remedy))
    }
}

/// The error of a hub that cannot be reached.
fn broken(host: &str, what: &str, detail: impl std::fmt::Display) -> Error {
    let remedy = "if a folder is meant, check its path; else check the connection, or set HF_ENDPOINT to a mirror or \
                  HTTPS_PROXY to a proxy; a download goes on where it stopped";
    Error::hub(what, format!("{host}: {detail}"), remedy)
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// A URL in messages: a user name and a password before the host are left out.
pub(super) fn shown(url: &str) -> &str {
    url.rsplit_once('@').map_or(url, |(_, host)| host)
}

/// `HF_TOKEN`, or the file that `hf auth login` writes. It is in no message.
fn token() -> Result<Option<String>> {
    if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return Ok(None);
    }
    let file = folder("HF_TOKEN_PATH").unwrap_or_else(|| hf_home().join("token"));
    let of_file = || Some(fs::read_to_string(file).ok()?.trim().to_string()).filter(|token| !token.is_empty());
    let token = variable("HF_TOKEN").or_else(of_file);
    let is_plain = token.iter().all(|token| token.chars().all(|c| c.is_ascii_graphic()));
    let remedy = "copy the token anew from the hub's settings";
    ensure(is_plain, "HF_TOKEN", "other characters (not shown)", "letters, digits and _", remedy)?;
    Ok(token)
}

/// The proxy of a URL, as Python chooses it; ureq's own choice knows one for all schemes.
fn proxy_of(url: &str) -> Result<Option<Proxy>> {
    let either = |name: &str| variable(name).or_else(|| variable(&name.to_uppercase()));
    let (scheme, host) = origin(url).split_once("://").unwrap_or_default();
    let Some(proxy) = either(&format!("{scheme}_proxy")).or_else(|| either("all_proxy")) else { return Ok(None) };
    let host = format!(".{}", host.split(':').next().unwrap_or_default());
    let excludes = |entry: &str| entry == "*" || host.ends_with(&format!(".{}", entry.trim_start_matches(['*', '.'])));
    if either("no_proxy").unwrap_or_default().split([',', ' ']).any(|entry| !entry.is_empty() && excludes(entry)) {
        return Ok(None);
    }
    let bad =
        |_| Error::argument(&format!("{scheme}_proxy"), shown(&proxy), "a URL", "write it like http://proxy:8080");
    Proxy::new(&proxy).map(Some).map_err(bad)
}

/// Mozilla's certificates, or those of the file that `SSL_CERT_FILE` names: a company's proxy may have its own.
fn root_certs() -> Result<RootCerts> {
    let Some(path) = variable("SSL_CERT_FILE").or_else(|| variable("REQUESTS_CA_BUNDLE")) else {
        return Ok(RootCerts::WebPki);
    };
    let pem = fs::read(&path).map_err(Error::io("read", &path))?;
    Ok(RootCerts::from(parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_never_that_of_another_host() {
        assert_eq!(origin("https://hub.co/a/b?c"), "https://hub.co");
        for url in [
            "https://hub.co@evil.com/",
            "https://hub.co\\@evil.com/",
            "https://hub.co.evil.com",
            "https://hub.co:8/a",
            "http://hub.co/a",
        ] {
            assert_ne!(origin(url), "https://hub.co", "{url}");
        }
        assert_eq!(shown("https://user:secret@hub.co"), "hub.co");
    }
}
