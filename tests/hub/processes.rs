//! Several at one cache, and one that is killed.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use qlora_nb_tests::root;

use crate::{
    assert_sound, environment, get, large,
    server::{Hub, Request, etag},
};

const NAME: &str = "model.safetensors";

/// This program again, with this environment: it runs [`child`] alone.
fn spawn() -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "processes::child", "--nocapture"]).env("QLORA_TEST_CHILD", "1");
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// What a second process does; nothing when it is run as a test.
#[test]
fn child() {
    if std::env::var_os("QLORA_TEST_CHILD").is_some() {
        let path = get(NAME).unwrap();
        assert!(fs::read(path).unwrap() == large(3 << 20));
    }
}

fn start(home: &Path) -> Hub {
    let hub = Hub::start([(NAME.to_string(), large(3 << 20))].into());
    environment(home, &hub.url());
    hub
}

fn is_content(request: &&Request) -> bool {
    request.path.starts_with("/cdn/")
}

#[test]
fn processes_that_want_the_same_file_wait_for_each_other() {
    let home = tempfile::tempdir().unwrap();
    let hub = start(home.path());
    hub.fault(|request, reply| {
        if is_content(&request) {
            reply.pause = Duration::from_millis(300);
        }
    });
    let children: Vec<Child> = (0..3).map(|_| spawn()).collect();
    let threads: Vec<_> = (0..3).map(|_| thread::spawn(|| get(NAME))).collect();
    for thread in threads {
        thread.join().unwrap().unwrap();
    }
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(hub.requests().iter().filter(is_content).count(), 1, "it came once");
    assert_sound(home.path(), &[(NAME.to_string(), large(3 << 20))].into());
}

#[test]
fn the_lock_is_that_of_python_and_can_be_interrupted() {
    let home = tempfile::tempdir().unwrap();
    let hub = start(home.path());
    let locks = home.path().join("hub/.locks/models--tester--poet");
    fs::create_dir_all(&locks).unwrap();
    let lock = File::create(locks.join(format!("{}.lock", etag(&large(3 << 20))))).unwrap();
    lock.lock().unwrap();
    let waiting = thread::spawn(|| get(NAME));
    thread::sleep(Duration::from_millis(500));
    assert!(!waiting.is_finished(), "it waits");
    qlora_nb::interrupt::request();
    let error = waiting.join().unwrap().unwrap_err();
    assert!(matches!(error, qlora_nb::error::Error::Interrupted { .. }), "{error}");
    assert_eq!(hub.requests().iter().filter(is_content).count(), 0);
    drop(lock);
    get(NAME).unwrap();
}

#[test]
fn a_killed_download_goes_on_where_it_stopped() {
    let home = tempfile::tempdir().unwrap();
    let hub = start(home.path());
    hub.fault(|request, reply| {
        if is_content(&request) {
            reply.cut = Some(1 << 20);
            reply.pause = Duration::from_secs(60);
        }
    });
    let mut child = spawn();
    let partial = home.path().join(format!("hub/models--tester--poet/blobs/{}.incomplete", etag(&large(3 << 20))));
    for _ in 0..400 {
        if fs::metadata(&partial).is_ok_and(|file| file.len() == 1 << 20) {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    hub.fault(|_, _| {});
    hub.requests();
    assert!(fs::read(get(NAME).unwrap()).unwrap() == large(3 << 20));
    let requests = hub.requests();
    assert_eq!(requests.iter().rfind(is_content).unwrap().from, Some(1 << 20), "{requests:?}");
}

/// The paths that Python's huggingface_hub tells of these files; none, said aloud, where it is not installed.
fn of_python(names: &[&str], offline: &str) -> Option<Vec<PathBuf>> {
    let python = std::env::var("QLORA_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = root().join("tests/interchange/hub_cache.py");
    match Command::new(python).arg(script).args(names).env("HF_HUB_OFFLINE", offline).output() {
        Ok(ran) if ran.status.code() != Some(77) => {
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
            Some(serde_json::from_slice(&ran.stdout).unwrap())
        }
        _ => {
            eprintln!("skipped: no Python with huggingface_hub (set QLORA_PYTHON)");
            None
        }
    }
}

#[test]
fn the_cache_is_shared_with_python() {
    let names = [NAME, "sub/config.json"];
    let files = HashMap::from([(NAME.to_string(), large(3 << 20)), (names[1].to_string(), b"{}".to_vec())]);
    let hub = Hub::start(files.clone());
    for python_first in [true, false] {
        let home = tempfile::tempdir().unwrap();
        environment(home.path(), &hub.url());
        let fetch = || names.iter().map(|name| get(name).unwrap()).collect::<Vec<_>>();
        // Without Python there is nothing to compare with.
        let Some(first) = (if python_first { of_python(&names, "0") } else { Some(fetch()) }) else { return };
        hub.requests();
        let Some(second) = (if python_first { Some(fetch()) } else { of_python(&names, "1") }) else { return };
        assert!(hub.requests().iter().all(Request::is_api), "what is there is not fetched");
        assert_eq!(first, second);
        assert_sound(home.path(), &files);
    }
}
