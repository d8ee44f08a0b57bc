//! The power fails: what has its name is on disk. Calls of fsync and rename are written down as they are made, and each
//! file must have been synced before it, or the folder that it is in, got its name, and that name after it.

use std::{
    cell::RefCell,
    ffi::{CStr, c_char, c_int, c_uint},
    fs,
    path::{Path, PathBuf},
};

use qlora_nb::{
    dataset::Dataset,
    model::{AutoModelForCausalLM, ModelOptions},
    peft::{LoraConfig, get_peft_model},
    tokenizer::AutoTokenizer,
};
use qlora_nb_tests::*;

#[derive(Debug)]
enum Call {
    Sync(PathBuf),
    Rename(PathBuf, PathBuf),
}

thread_local! {
    /// What this thread calls, while somebody wants to know.
    static CALLS: RefCell<Option<Vec<Call>>> = const { RefCell::new(None) };
}

fn note(call: impl FnOnce() -> Call) {
    CALLS.with_borrow_mut(|calls| calls.as_mut().map(|calls| calls.push(call())).unwrap_or_default());
}

fn path(name: *const c_char) -> PathBuf {
    // SAFETY: the callers of rename give strings that end with zero.
    PathBuf::from(unsafe { CStr::from_ptr(name) }.to_str().unwrap())
}

/// In place of the C library's, for this program.
#[unsafe(no_mangle)]
pub extern "C" fn fsync(fd: c_int) -> c_int {
    note(|| Call::Sync(fs::read_link(format!("/proc/self/fd/{fd}")).unwrap()));
    // SAFETY: the system call of that name.
    unsafe { libc::syscall(libc::SYS_fsync, fd) as c_int }
}

#[unsafe(no_mangle)]
pub extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    renameat2(libc::AT_FDCWD, from, libc::AT_FDCWD, to, 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn renameat2(a: c_int, from: *const c_char, b: c_int, to: *const c_char, flags: c_uint) -> c_int {
    note(|| Call::Rename(path(from), path(to)));
    // SAFETY: the system call of that name, with the caller's arguments.
    unsafe { libc::syscall(libc::SYS_renameat2, a, from, b, to, flags) as c_int }
}

/// Every file and folder at or below a path.
fn below(path: &Path) -> Vec<PathBuf> {
    let entries = path.is_dir().then(|| fs::read_dir(path).unwrap()).into_iter().flatten();
    let inside = entries.flat_map(|entry| below(&entry.unwrap().path()));
    [path.to_path_buf()].into_iter().chain(inside).collect()
}

/// Runs a save into `folder`, and checks the order of what it called.
fn check(what: &str, folder: &Path, save: impl FnOnce()) {
    CALLS.set(Some(Vec::new()));
    save();
    let calls = CALLS.take().unwrap();
    let synced = |path: &Path, calls: &[Call]| calls.iter().any(|call| matches!(call, Call::Sync(p) if p == path));
    let mut named = Vec::new();
    for (i, call) in calls.iter().enumerate() {
        let Call::Rename(from, to) = call else { continue };
        for file in below(to) {
            let written_as = from.join(file.strip_prefix(to).unwrap());
            let written_as = if file == *to { from.clone() } else { written_as };
            assert!(synced(&written_as, &calls[..i]), "{what}: {} got its name unsynced: {calls:#?}", file.display());
            named.push(file);
        }
        assert!(synced(to.parent().unwrap(), &calls[i..]), "{what}: the name {} is not on disk", to.display());
    }
    for file in below(folder).into_iter().filter(|path| path.is_file()) {
        assert!(named.contains(&file), "{what}: {} was written in place", file.display());
    }
}

#[test]
fn what_has_its_name_is_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().canonicalize().unwrap().join(name);
    let base = AutoModelForCausalLM::from_pretrained(fixture("bloom_tiny"), ModelOptions::default()).unwrap();
    let config = LoraConfig { target_modules: ["query_key_value"].into(), ..Default::default() };
    let model = get_peft_model(&base, &config).unwrap();
    let data = Dataset::from_columns([("a", vec![1i64, 2, 3])]).unwrap();
    let tokenizer = AutoTokenizer::from_pretrained(root().join("notebooks/models/poet-bloom-zh")).unwrap();
    // Twice: in place of nothing, and of what is there.
    for _ in 0..2 {
        check("adapter", &at("adapter"), || model.save_pretrained(at("adapter")).unwrap());
        check("model", &at("model"), || base.save_pretrained(at("model")).unwrap());
        check("tokenizer", &at("tokenizer"), || tokenizer.save_pretrained(at("tokenizer")).unwrap());
        check("dataset", &at("data"), || data.save_to_disk(at("data")).unwrap());
        check("checkpoint", &at("run"), || super::kills::one_step(&model, dir.path()));
    }
    // The check itself: a file that is only written is found.
    let unsynced = std::panic::catch_unwind(|| {
        check("plain", &at("plain"), || {
            fs::write(at(".plain"), "").unwrap();
            fs::rename(at(".plain"), at("plain")).unwrap();
        });
    });
    assert!(unsynced.is_err());
}
