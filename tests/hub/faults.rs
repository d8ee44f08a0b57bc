//! One test a fault. After each the cache holds nothing wrong, the error names the remedy, and a good hub heals it.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use qlora_nb::{error::Error, interrupt};

use crate::{
    assert_sound, environment, get, large, patience,
    server::{COMMIT, Hub, LARGE, Reply, Request, etag},
    set,
};

const SMALL: &str = "config.json";
const BIG: &str = "sub/model 1.safetensors";
const PAGE: &str = "<html>this is not a model</html>";

fn files() -> HashMap<String, Vec<u8>> {
    [(SMALL.into(), b"{\"a\": 1}".to_vec()), (BIG.into(), large(3 << 20))].into()
}

/// A hub with a fault, and an empty cache.
fn faulty(fault: impl Fn(&Request, &mut Reply) + Send + Sync + 'static) -> (tempfile::TempDir, Hub) {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(files());
    environment(home.path(), &hub.url());
    hub.fault(fault);
    (home, hub)
}

fn assert_comes(home: &Path, name: &str) {
    let path = get(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(fs::read(&path).unwrap() == files()[name], "{name}: other bytes");
    assert_sound(home, &files());
}

/// The fault stops the call with an error of these words, for a small file and a large one.
fn stops(words: &[&str], fault: impl Fn(&Request, &mut Reply) + Send + Sync + 'static + Clone) {
    for name in [SMALL, BIG] {
        let (home, hub) = faulty(fault.clone());
        let error = get(name).expect_err("a fault");
        assert!(matches!(error, Error::Hub { .. }), "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "not {word:?} in: {error}");
        }
        assert_sound(home.path(), &files());
        hub.fault(|_, _| {});
        assert_comes(home.path(), name);
    }
}

/// The client copes with the fault by itself. The requests that it made for the large file.
fn is_borne(fault: impl Fn(&Request, &mut Reply) + Send + Sync + 'static) -> Vec<Request> {
    let (home, hub) = faulty(fault);
    assert_comes(home.path(), SMALL);
    hub.requests();
    assert_comes(home.path(), BIG);
    hub.requests()
}

/// Where the bytes of a file are, this request asks for them.
fn is_content(request: &Request) -> bool {
    request.is_get(SMALL) || request.path.starts_with("/cdn/")
}

#[test]
fn an_error_page_for_a_file() {
    for (status, remedy) in [(403, "accept the model's terms"), (404, "check the name"), (410, "HF_ENDPOINT")] {
        stops(&[remedy], move |request, reply| {
            if is_content(request) {
                reply.be(status, PAGE);
            }
        });
    }
}

#[test]
fn a_busy_hub_for_a_file() {
    for (status, remedy) in [(429, "wait some minutes"), (500, "try again later"), (503, "try again later")] {
        stops(&[&status.to_string(), remedy, "HF_ENDPOINT"], move |request, reply| {
            if is_content(request) {
                reply.be(status, PAGE);
            }
        });
    }
}

#[test]
fn a_page_of_success_with_another_length() {
    stops(&["bytes", "HF_ENDPOINT"], |request, reply| {
        if is_content(request) {
            reply.be(200, PAGE);
        }
    });
}

#[test]
fn a_page_of_success_with_the_same_length() {
    stops(&["hash", "HF_ENDPOINT"], |request, reply| {
        if is_content(request) {
            reply.be(200, vec![b'x'; reply.body.len()]);
        }
    });
}

#[test]
fn a_login_page_for_a_file_whatever_is_asked() {
    stops(&["login page", "open the hub in a browser"], |request, reply| {
        if !request.is_api() {
            reply.be(200, PAGE);
            reply.set("etag", "\"5f-62\"");
        }
    });
}

#[test]
fn a_login_page_for_the_list_of_files() {
    for page in [PAGE.to_string(), "{}".into(), "[1]".into(), format!("{{\"sha\":{COMMIT:?}}}")] {
        stops(&["login page", "HF_ENDPOINT"], move |request, reply| {
            if request.is_api() {
                reply.be(200, page.as_str());
            }
        });
    }
}

#[test]
fn a_redirect_to_a_login_page() {
    stops(&["login page"], |request, reply| {
        if !request.is_api() {
            reply.be(302, PAGE);
            reply.set("location", "http://127.0.0.2:9/login?to=http://here");
        }
    });
}

#[test]
fn headers_that_are_missing() {
    for names in [["content-length", "x-linked-size"], ["etag", "x-linked-etag"], ["x-repo-commit", ""]] {
        stops(&["commit, length and hash", "HF_ENDPOINT"], move |request, reply| {
            if request.is_head() {
                names.iter().for_each(|name| reply.unset(name));
            }
        });
    }
}

#[test]
fn a_hash_that_is_a_path() {
    for etag in ["../../../evil.json", "/tmp/evil.json", "..", "a\\b", "a:b", "%2e%2e"] {
        stops(&["commit, length and hash"], move |request, reply| {
            if request.is_head() {
                reply.set("etag", etag);
                reply.set("x-linked-etag", etag);
            }
        });
    }
}

#[test]
fn a_commit_that_is_a_path() {
    for sha in ["../../../evil", "/tmp/evil", "main", "", "0123456789abcdef0123456789abcdef0123456/"] {
        stops(&["does not tell the commit"], move |request, reply| {
            if request.is_api() {
                reply.be(200, format!("{{\"sha\":{sha:?},\"siblings\":[]}}"));
            }
        });
    }
}

#[test]
fn a_file_of_another_commit() {
    stops(&["commit"], |request, reply| {
        if request.is_head() {
            reply.set("x-repo-commit", COMMIT.replace('0', "f"));
        }
    });
}

#[test]
fn names_that_lead_elsewhere() {
    let names = ["../evil.json", "/evil.json", "a/../../evil.json", "a\\..\\evil.json", "./a", "a//b", "a\n", "", ".."];
    let (home, hub) = faulty(move |request, reply| {
        if request.is_api() {
            let names: Vec<String> = names.iter().map(|name| format!("{{\"rfilename\":{name:?}}}")).collect();
            reply.be(200, format!("{{\"sha\":{COMMIT:?},\"siblings\":[{}]}}", names.join(",")));
        }
    });
    for name in names {
        let error = get(name).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{name:?}: {error}");
    }
    assert!(hub.requests().iter().all(Request::is_api));
    assert_sound(home.path(), &files());
}

#[test]
fn silence_instead_of_an_answer() {
    for at in [|request: &Request| request.is_api(), |request: &Request| request.is_head(), is_content] {
        stops(&["timeout", "check the connection"], move |request, reply| {
            if at(request) {
                reply.pause = Duration::from_secs(5);
            }
        });
    }
}

#[test]
fn silence_in_the_middle_of_a_file() {
    stops(&["timeout", "goes on where it stopped"], |request, reply| {
        if is_content(request) {
            reply.cut = Some(0);
            reply.pause = Duration::from_secs(5);
        }
    });
    // After something came, the rest is asked for.
    let requests = is_borne(|request, reply| {
        if is_content(request) && request.from.is_none() {
            reply.cut = Some(reply.body.len() / 2);
            reply.pause = Duration::from_secs(2);
        }
    });
    assert_eq!(requests.last().unwrap().from, Some((3 << 20) / 2), "{requests:?}");
}

#[test]
fn an_answer_in_drops() {
    stops(&["HF_ENDPOINT"], |request, reply| {
        if is_content(request) {
            reply.raw = Some(b"HTTP/1.1 200 OK\r\n".to_vec());
        }
    });
}

#[test]
fn a_broken_connection_before_the_answer() {
    for at in [|request: &Request| request.is_api(), |request: &Request| request.is_head(), is_content] {
        stops(&["check the connection"], move |request, reply| {
            if at(request) {
                reply.raw = Some(Vec::new());
            }
        });
    }
}

#[test]
fn something_else_than_http() {
    stops(&["http://127.0.0", "HF_ENDPOINT"], |request, reply| {
        if is_content(request) {
            reply.raw = Some(b"SSH-2.0-OpenSSH_9.6\r\n\0\xff\xfe\r\n\r\n".to_vec());
        }
    });
}

#[test]
fn connections_that_break_again_and_again() {
    let requests = is_borne(|request, reply| {
        if is_content(request) {
            reply.cut = Some((1 << 20).min(reply.body.len()));
        }
    });
    let from: Vec<_> = requests.iter().filter(|request| is_content(request)).map(|request| request.from).collect();
    assert_eq!(from, [None, Some(1 << 20), Some(2 << 20)]);
}

#[test]
fn a_connection_that_breaks_and_brings_little() {
    static BYTES: AtomicUsize = AtomicUsize::new(0);
    let (home, hub) = faulty(|request, reply| {
        if is_content(request) {
            BYTES.fetch_add(1, SeqCst);
            reply.cut = Some(1);
        }
    });
    let error = get(BIG).unwrap_err().to_string();
    assert!(error.contains("goes on where it stopped"), "{error}");
    assert!(BYTES.load(SeqCst) < 10, "not for ever");
    assert_sound(home.path(), &files());
    hub.fault(|_, _| {});
    assert_comes(home.path(), BIG);
}

/// Breaks a first time, and then gives parts as `parts` does.
fn after_a_break(parts: impl Fn(&mut Reply) + Send + Sync + 'static) -> Vec<Request> {
    is_borne(move |request, reply| match request.from {
        _ if !is_content(request) => {}
        None if request.path.starts_with("/cdn/") && BREAKS.fetch_add(1, SeqCst) == 0 => reply.cut = Some(1 << 20),
        None => {}
        Some(_) => parts(reply),
    })
}
static BREAKS: AtomicUsize = AtomicUsize::new(0);

#[test]
fn a_server_that_ignores_ranges() {
    after_a_break(|reply| reply.be(200, &files()[BIG][..]));
}

#[test]
fn a_server_that_gives_another_part() {
    after_a_break(|reply| {
        reply.be(206, &files()[BIG][5..]);
        reply.set("content-range", format!("bytes 5-{}/{}", (3 << 20) - 1, 3 << 20));
    });
}

#[test]
fn a_server_that_has_no_parts() {
    after_a_break(|reply| reply.be(416, PAGE));
}

#[test]
fn a_part_that_says_not_which() {
    after_a_break(|reply| reply.unset("content-range"));
}

#[test]
fn a_part_with_other_bytes() {
    after_a_break(|reply| reply.body.fill(7));
}

#[test]
fn more_bytes_than_announced() {
    for length in [true, false] {
        stops(&["bytes", "HF_ENDPOINT"], move |request, reply| {
            if is_content(request) {
                reply.body.extend(PAGE.bytes());
                reply.unset("content-length");
                if length {
                    reply.set("content-length", reply.body.len());
                }
            }
        });
    }
}

#[test]
fn fewer_bytes_than_announced() {
    for length in [true, false] {
        stops(&["bytes", "HF_ENDPOINT"], move |request, reply| {
            if is_content(request) {
                reply.body.truncate(5);
                reply.unset("content-length");
                if length {
                    reply.set("content-length", 5);
                }
            }
        });
    }
}

#[test]
fn a_body_in_chunks_that_ends_too_soon() {
    stops(&["HF_ENDPOINT"], |request, reply| {
        if is_content(request) {
            reply.raw = Some(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".to_vec());
        }
    });
}

#[test]
fn a_compressed_body() {
    stops(&["bytes"], |request, reply| {
        if is_content(request) {
            reply.be(200, b"\x1f\x8b\x08compressed".to_vec());
            reply.set("content-encoding", "gzip");
        }
    });
}

#[test]
fn a_file_that_grew_after_its_length_was_told() {
    stops(&["bytes"], |request, reply| {
        if request.is_head() {
            reply.set("content-length", 5);
            reply.set("x-linked-size", 5);
        }
    });
}

#[test]
fn redirects_in_a_circle() {
    stops(&["more than 8 redirects", "HF_ENDPOINT"], |request, reply| {
        if is_content(request) {
            reply.be(302, PAGE);
            reply.set("location", &request.path);
        }
    });
}

#[test]
fn a_redirect_to_nowhere() {
    for location in ["http://127.0.0.2:9/x", "ftp://127.0.0.2/x", "http://", "http://no such host/", "\u{1}"] {
        stops(&["HF_ENDPOINT"], move |request, reply| {
            if is_content(request) {
                reply.be(302, PAGE);
                reply.set("location", location);
            }
        });
    }
}

#[test]
fn an_endless_list_of_files() {
    stops(&["login page"], |request, reply| {
        if request.is_api() {
            reply.be(200, vec![b' '; 80 << 20]);
        }
    });
}

#[test]
fn a_hub_that_is_busy_for_a_while() {
    for after in ["", "0", "Wed, 21 Oct 2015 07:28:00 GMT", "-5"] {
        let asked = Mutex::new(HashSet::new());
        let requests = is_borne(move |request, reply| {
            if asked.lock().unwrap().insert((request.method.clone(), request.path.clone())) {
                reply.be(429, PAGE);
                reply.set("retry-after", after);
            }
        });
        assert!(requests.len() >= 5, "{requests:?}");
    }
}

#[test]
fn a_hub_that_wants_a_long_wait() {
    stops(&["3600 s", "wait some minutes"], |request, reply| {
        if is_content(request) {
            reply.be(429, PAGE);
            reply.set("retry-after", 3600);
        }
    });
}

#[test]
fn a_busy_or_silent_hub_and_all_in_the_cache() {
    for fault in [
        |reply: &mut Reply| reply.be(503, PAGE),
        |reply: &mut Reply| reply.be(429, PAGE),
        |reply: &mut Reply| reply.raw = Some(Vec::new()),
        |reply: &mut Reply| reply.pause = Duration::from_secs(5),
    ] {
        let (home, hub) = faulty(|_, _| {});
        assert_comes(home.path(), SMALL);
        hub.fault(move |_, reply| fault(reply));
        assert_comes(home.path(), SMALL);
        // What is not there is not.
        let error = get(BIG).unwrap_err().to_string();
        assert!(error.contains("not in the local cache") && error.contains("HF_ENDPOINT to a mirror"), "{error}");
        set("HF_HUB_OFFLINE", "1");
        assert_comes(home.path(), SMALL);
        let error = get(BIG).unwrap_err().to_string();
        assert!(error.contains("unset HF_HUB_OFFLINE"), "{error}");
        set("HF_HUB_OFFLINE", "0");
        hub.fault(|_, _| {});
        assert_comes(home.path(), BIG);
    }
}

#[test]
fn an_error_page_for_the_rest_keeps_what_is_there() {
    for status in [200, 403, 500] {
        let (home, hub) = faulty(move |request, reply| match request.from {
            None if is_content(request) => reply.cut = Some(LARGE),
            Some(_) if is_content(request) => reply.be(status, PAGE),
            _ => {}
        });
        get(BIG).unwrap_err();
        assert_sound(home.path(), &files());
        hub.fault(|_, _| {});
        hub.requests();
        assert_comes(home.path(), BIG);
        assert_eq!(hub.requests().last().unwrap().from, Some(LARGE));
    }
}

#[test]
fn a_cache_that_a_power_failure_damaged() {
    let beginning = |damage: fn(&mut Vec<u8>)| {
        let (home, hub) = faulty(|_, _| {});
        let folder = home.path().join("hub/models--tester--poet");
        let mut bytes = files()[BIG][..LARGE].to_vec();
        damage(&mut bytes);
        let blobs = folder.join("blobs");
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::create_dir_all(&blobs).unwrap();
        // A reference of zeros, the shorter half of a blob, and a link to nowhere.
        fs::write(folder.join("refs/main"), [0; 40]).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", etag(&files()[BIG]))), bytes).unwrap();
        fs::write(blobs.join(etag(&files()[SMALL])), b"{").unwrap();
        let snapshot = folder.join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        std::os::unix::fs::symlink("../../blobs/gone", snapshot.join(SMALL)).unwrap();
        get(BIG).unwrap();
        assert_comes(home.path(), SMALL);
        assert_comes(home.path(), BIG);
        hub.requests()
    };
    let whole = |requests: &[Request]| requests.iter().any(|request| is_content(request) && request.from.is_none());
    assert!(whole(&beginning(|bytes| bytes[LARGE - 4096..].fill(0))), "zeros at the end: all anew");
    assert!(whole(&beginning(|bytes| bytes.resize(5 << 20, 0))), "too long: all anew");
    let requests = beginning(|_| {});
    assert!(requests.iter().any(|request| request.from == Some(LARGE)), "sound: the rest alone");
}

#[test]
fn a_cache_that_cannot_be_written() {
    let (home, _hub) = faulty(|_, _| {});
    let blobs = home.path().join("hub/models--tester--poet/blobs");
    fs::create_dir_all(blobs.parent().unwrap()).unwrap();
    fs::write(&blobs, "a file in the way").unwrap();
    let error = get(SMALL).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path.starts_with(&blobs)), "{error}");
    fs::remove_file(&blobs).unwrap();
    assert_comes(home.path(), SMALL);
}

#[test]
fn the_token_goes_to_the_hub_alone_and_into_no_message() {
    set("HF_TOKEN", "hf_secret\r\n");
    let (home, hub) = faulty(|_, _| {});
    set("HF_TOKEN", " hf_secret\r\n");
    assert_comes(home.path(), BIG);
    for request in hub.requests() {
        let is_hub = request.host.starts_with("127.0.0.1:");
        assert_eq!(request.token.as_deref(), is_hub.then_some("Bearer hf_secret"), "{request:?}");
    }
    // A hub that says it again, and one that fails in every way.
    for status in [302, 401, 403, 404, 429, 500] {
        let (home, hub) = faulty(move |request, reply| {
            reply.be(status, request.token.clone().unwrap_or_default());
            reply.set("x-error-message", request.token.clone().unwrap_or_default());
        });
        set("HF_TOKEN", "hf_secret");
        let error = get(SMALL).unwrap_err().to_string();
        assert!(hub.requests()[0].token.is_some() && !error.contains("hf_secret"), "{error}");
        assert_sound(home.path(), &files());
    }
    set("HF_TOKEN", "hf_secret\u{e9} two");
    let error = get(SMALL).unwrap_err().to_string();
    assert!(error.contains("HF_TOKEN") && !error.contains("hf_secret"), "{error}");
    // The file of `hf auth login`.
    let (home, hub) = faulty(|_, _| {});
    fs::write(home.path().join("token"), "hf_of_file\n").unwrap();
    assert_comes(home.path(), SMALL);
    assert!(hub.requests().iter().all(|request| request.token.as_deref() == Some("Bearer hf_of_file")));
}

#[test]
fn variables_that_are_odd() {
    let (home, hub) = faulty(|_, _| {});
    set("HOME", home.path().to_str().unwrap());
    set("HF_HOME", "~/here ");
    assert!(get(SMALL).unwrap().starts_with(home.path().join("here/hub")));
    set("HF_HUB_CACHE", "~/there");
    assert!(get(SMALL).unwrap().starts_with(home.path().join("there/models--tester--poet")));
    set("HF_HUB_CACHE", "");
    set("HF_ENDPOINT", &format!("{}/", hub.url()));
    assert!(get(BIG).unwrap().starts_with(home.path().join("here")));
    set("HF_ENDPOINT", "hf-mirror.com");
    let error = get(SMALL).unwrap_err().to_string();
    assert!(error.contains("HF_ENDPOINT") && error.contains("https://hf-mirror.com"), "{error}");
    // A proxy, and one that does not answer.
    let proxy = Hub::start(HashMap::new());
    proxy.fault(|_, reply| reply.raw = Some(b"HTTP/1.1 407 No\r\n\r\n".to_vec()));
    set("HF_ENDPOINT", "http://hub.invalid");
    for (url, words) in [(proxy.url(), "http://hub.invalid"), ("http://".into(), "http_proxy")] {
        set("HTTP_PROXY", &url);
        set("HTTPS_PROXY", "http://127.0.0.1:9");
        let error = crate::Snapshot::open_with("tester/other", patience()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("what to do"), "{error}");
    }
    let seen = proxy.requests();
    assert!(seen.len() == 1 && seen[0].method == "CONNECT" && seen[0].path.starts_with("hub.invalid"), "{seen:?}");
    set("NO_PROXY", "127.0.0.2, .0.0.1");
    set("HF_ENDPOINT", &hub.url());
    assert!(get(SMALL).is_ok() && proxy.requests().is_empty());
}

#[test]
fn every_wait_can_be_interrupted() {
    let waits: [fn(&Request, &mut Reply); 4] = [
        |request, reply| reply.pause = Duration::from_secs(if request.is_api() { 60 } else { 0 }),
        |request, reply| reply.pause = Duration::from_secs(if request.is_head() { 60 } else { 0 }),
        |request, reply| {
            if is_content(request) {
                reply.cut = Some(5);
                reply.pause = Duration::from_secs(60);
            }
        },
        |request, reply| {
            if is_content(request) {
                reply.be(503, PAGE);
                reply.set("retry-after", 60);
            }
        },
    ];
    let patient = crate::Patience { silence: Duration::from_secs(60), busy: Duration::from_secs(100), ..patience() };
    for wait in waits {
        let (home, hub) = faulty(wait);
        let stop = thread::spawn(|| {
            thread::sleep(Duration::from_millis(500));
            interrupt::request();
        });
        let error = crate::Snapshot::open_with("tester/poet", patient).and_then(|files| files.file(BIG)).unwrap_err();
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        stop.join().unwrap();
        assert_sound(home.path(), &files());
        hub.fault(|_, _| {});
        assert_comes(home.path(), BIG);
    }
}
