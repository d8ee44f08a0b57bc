//! Runs a reader on damaged files and holds it to its promise: it loads a file or refuses it with an error, in little
//! time and memory, and never panics or ends the process.
//!
//! A test starts processes that read, since a reader may end its process, and starts another where one has ended. Of each
//! input there is a number: with the seed it gives the input again.
//!
//! | variable | what |
//! |---|---|
//! | `FUZZ_INPUTS` | how many inputs, on all cores; without it a few, on one |
//! | `FUZZ_SEED` | another seed than 1 |
//! | `FUZZ_INPUT` | read this one alone, here, and keep its files |

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeMap,
    env, fs,
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicIsize, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::mutate::{Kind, Random, mutate};

/// What most readers may have allocated at a time, beside this many bytes for each of the input.
pub const MEMORY: isize = 32 << 20;
const MEMORY_A_BYTE: isize = 64;
/// Beyond this there is no memory, as on a machine that has no more.
const ALL_MEMORY: isize = 2 << 30;
const TIME: Duration = Duration::from_secs(10);
/// A reader that ends so many processes is left.
const DEATHS: usize = 40;

/// Counts what is allocated.
struct Counting;

static ALLOCATED: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);
static LIMIT: AtomicIsize = AtomicIsize::new(isize::MAX);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Whether so many bytes more are allowed.
fn add(bytes: usize) -> bool {
    let bytes = isize::try_from(bytes).unwrap_or(isize::MAX);
    let before = ALLOCATED.fetch_add(bytes, Relaxed);
    let now = before.saturating_add(bytes);
    if now > LIMIT.load(Relaxed) {
        ALLOCATED.fetch_sub(bytes, Relaxed);
        PEAK.fetch_max(now, Relaxed);
        return false;
    }
    if now > PEAK.load(Relaxed) {
        PEAK.fetch_max(now, Relaxed);
    }
    true
}

// SAFETY: the system's allocator, or null, which says that there is no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if add(layout.size()) { unsafe { System.alloc(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if add(layout.size()) { unsafe { System.alloc_zeroed(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size() as isize, Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !add(size) {
            return std::ptr::null_mut();
        }
        ALLOCATED.fetch_sub(layout.size() as isize, Relaxed);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// The files that a reader is given, by name.
pub type Files = Vec<(String, Vec<u8>)>;

/// A damaged input.
pub struct Input {
    pub files: Files,
    folder: PathBuf,
    written: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl Input {
    /// The folder with the files, written when it is first asked for.
    pub fn folder(&self) -> &Path {
        // What the last input left and this one has, stays.
        let mut written = self.written.lock().unwrap();
        written.retain(|name, bytes| {
            let same = self.files.iter().any(|(n, b)| n == name && b == bytes);
            if !same {
                fs::remove_file(self.folder.join(name)).unwrap();
            }
            same
        });
        for (name, bytes) in &self.files {
            if !written.contains_key(name) {
                let path = self.folder.join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, bytes).unwrap();
                written.insert(name.clone(), bytes.clone());
            }
        }
        &self.folder
    }
}

/// What a reader has said: it loaded, or the text of its error.
pub type Verdict = Result<(), String>;
pub type Reader = Box<dyn FnMut(&Input) -> Verdict>;

/// A reader's test.
pub struct Test {
    /// Where it is: `module_path!()`.
    pub module: &'static str,
    pub name: &'static str,
    /// How many inputs are read where nobody asks for more.
    pub short: u64,
    /// Bytes that may be allocated at a time.
    pub memory: isize,
    /// Gives good files, and the reader.
    pub make: fn() -> (Vec<Files>, Reader),
}

pub fn fuzz(test: &Test) {
    let Test { module, name, short, make, .. } = *test;
    let number = |name: &str| env::var(name).ok().map(|n| n.parse::<u64>().unwrap_or_else(|_| panic!("{name}={n}")));
    let seed = number("FUZZ_SEED").unwrap_or(1);
    if let Some(input) = number("FUZZ_INPUT") {
        return alone(name, seed, input, make);
    }
    if let Some(folder) = env::var_os("FUZZ_FOLDER") {
        let [first, step, end] = ["FUZZ_FIRST", "FUZZ_STEP", "FUZZ_END"].map(|name| number(name).unwrap());
        return work(test, Path::new(&folder), seed_of(name, seed), (first..end).step_by(step as usize));
    }
    let inputs = number("FUZZ_INPUTS");
    let cores = if inputs.is_some() { std::thread::available_parallelism().map_or(1, usize::from) as u64 } else { 1 };
    let module = module.split_once("::").map_or("", |(_, module)| module);
    let test = format!("{module}::{name}").trim_start_matches("::").to_string();
    supervise(name, &test, seed, inputs.unwrap_or(short), cores);
}

fn seed_of(name: &str, seed: u64) -> u64 {
    name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// The input of that number.
fn input(corpus: &[Files], seed: u64, number: u64) -> Files {
    let mut random = Random::new(seed, number);
    let mut files = random.pick(corpus).clone();
    // As it is, now and then: what is right must load.
    if random.one_in(50) {
        return files;
    }
    for _ in 0..=random.below(4) {
        if files.is_empty() {
            break;
        }
        let i = random.below(files.len());
        let other = random.pick(corpus);
        let (name, bytes) = &mut files[i];
        let other = other.iter().find(|(n, _)| n == name).map_or(&[][..], |(_, bytes)| bytes);
        match random.below(100) {
            0 => drop(files.remove(i)),
            1 => bytes.clear(),
            2 | 3 => *bytes = other.to_vec(),
            _ => mutate(&mut random, Kind::of(name), bytes, other),
        }
    }
    files
}

fn shm() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn alone(name: &str, seed: u64, number: u64, make: fn() -> (Vec<Files>, Reader)) {
    let (corpus, mut read) = make();
    let folder = env::temp_dir().join(format!("fuzz-{name}-{number}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let files = input(&corpus, seed_of(name, seed), number);
    let input = Input { files, folder, written: Mutex::default() };
    eprintln!("{name}, seed {seed}, input {number}: {}", input.folder().display());
    let before = ALLOCATED.load(Relaxed);
    PEAK.store(before, Relaxed);
    let begin = Instant::now();
    let verdict = read(&input);
    eprintln!("{verdict:#?}\n{:.3} s, {} bytes at most", begin.elapsed().as_secs_f64(), PEAK.load(Relaxed) - before);
}

// The process that reads.

/// What it has done, for the one that started it: numbers in a file, which outlive it.
#[derive(Clone, Copy, Default)]
struct Counts {
    /// The input that is being read, plus 1; 0 when all are.
    current: u64,
    inputs: u64,
    loaded: u64,
    /// Of those refused: by an error that does not say what to do.
    vague: u64,
}

impl Counts {
    fn write(self, to: &File) {
        let numbers = [self.current, self.inputs, self.loaded, self.vague].map(u64::to_le_bytes);
        to.write_all_at(numbers.as_flattened(), 0).unwrap();
    }

    fn read(from: &Path) -> Self {
        let bytes = fs::read(from).unwrap_or_default();
        let (numbers, _) = bytes.as_chunks::<8>();
        let at = |i: usize| numbers.get(i).map_or(0, |n| u64::from_le_bytes(*n));
        Self { current: at(0), inputs: at(1), loaded: at(2), vague: at(3) }
    }
}

/// Milliseconds since the process began at which an input was begun; 0 while there is none.
static BEGUN: AtomicU64 = AtomicU64::new(0);
static PANICKED: Mutex<String> = Mutex::new(String::new());

fn work(test: &Test, folder: &Path, seed: u64, numbers: impl Iterator<Item = u64>) {
    let (corpus, mut read) = (test.make)();
    let counts_file = File::create(folder.join("counts")).unwrap();
    let mut counts = Counts::default();
    let start = Instant::now();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let begun = BEGUN.load(Relaxed);
            if begun > 0 && start.elapsed() > Duration::from_millis(begun) + TIME {
                eprintln!("it takes over {} s", TIME.as_secs());
                std::process::exit(101);
            }
        }
    });
    let (place, mut written) = (folder.join("files"), BTreeMap::new());
    fs::create_dir_all(&place).unwrap();
    // What is made once, at the first use, is there then.
    let mut loaded = 0;
    for files in &corpus {
        let input = Input { files: files.clone(), folder: place.clone(), written: Mutex::new(written) };
        loaded += usize::from(read(&input).is_ok());
        written = input.written.into_inner().unwrap();
    }
    assert!(loaded * 2 > corpus.len(), "{loaded} of {} good files load", corpus.len());
    std::panic::set_hook(Box::new(|info| *PANICKED.lock().unwrap() = info.to_string().replace('\n', " ")));
    for number in numbers {
        let files = input(&corpus, seed, number);
        let size: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
        let allowed = test.memory + MEMORY_A_BYTE * size as isize;
        let input = Input { files, folder: place.clone(), written: Mutex::new(written) };
        counts.current = number + 1;
        counts.write(&counts_file);
        BEGUN.store(start.elapsed().as_millis() as u64 + 1, Relaxed);
        let before = ALLOCATED.load(Relaxed);
        PEAK.store(before, Relaxed);
        LIMIT.store(before + ALL_MEMORY, Relaxed);
        let verdict = catch_unwind(AssertUnwindSafe(|| read(&input)));
        LIMIT.store(isize::MAX, Relaxed);
        let took = PEAK.load(Relaxed) - before;
        BEGUN.store(0, Relaxed);
        counts.inputs += 1;
        match verdict {
            Ok(Ok(())) => counts.loaded += 1,
            Ok(Err(text)) if !text.contains("what to do: ") && !text.contains("remedy: ") => {
                counts.vague += 1;
                if counts.vague.is_power_of_two() {
                    note(folder, "vague", number, &text);
                }
            }
            Ok(Err(_)) => {}
            Err(_) => note(folder, "failures", number, &PANICKED.lock().unwrap()),
        }
        if took > allowed {
            let text = format!("memory: {} MiB for {size} bytes", took >> 20);
            note(folder, "failures", number, &text);
        }
        written = input.written.into_inner().unwrap();
        // Notices of the library: only the last are of interest.
        if number.is_multiple_of(1024) {
            let _ = File::options().write(true).open(folder.join("stderr")).and_then(|file| file.set_len(0));
        }
    }
    counts.current = 0;
    counts.write(&counts_file);
}

fn note(folder: &Path, file: &str, number: u64, text: &str) {
    use std::io::Write;
    let text = text.replace('\n', " ");
    let mut file = File::options().create(true).append(true).open(folder.join(file)).unwrap();
    writeln!(file, "{number} {text}").unwrap();
}

// The process that started it.

fn spawn(test: &str, folder: &Path, seed: u64, (first, step, end): (u64, u64, u64)) -> Child {
    let stderr = File::options().create(true).append(true).open(folder.join("stderr")).unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).stdout(Stdio::null()).stderr(stderr);
    command.env("FUZZ_FOLDER", folder).env("FUZZ_SEED", seed.to_string());
    for (name, value) in [("FUZZ_FIRST", first), ("FUZZ_STEP", step), ("FUZZ_END", end)] {
        command.env(name, value.to_string());
    }
    // As many processes as cores: each needs one thread. A backtrace would hide what was said before it.
    command.env("RAYON_NUM_THREADS", "1").env("RUST_BACKTRACE", "0").env_remove("FUZZ_INPUTS").spawn().unwrap()
}

/// What one core has found.
#[derive(Default)]
struct Found {
    counts: Counts,
    failures: Vec<(u64, String)>,
    vague: Vec<(u64, String)>,
}

fn supervise(name: &str, test: &str, seed: u64, inputs: u64, cores: u64) {
    let begin = Instant::now();
    let cores: Vec<_> = (0..cores).map(|core| (core, cores)).collect();
    let mut found = Found::default();
    std::thread::scope(|scope| {
        let running: Vec<_> = cores
            .iter()
            .map(|(core, step)| scope.spawn(move || one_core(test, seed, (*core, *step, inputs))))
            .collect();
        for core in running {
            let core = core.join().unwrap();
            found.counts.inputs += core.counts.inputs;
            found.counts.loaded += core.counts.loaded;
            found.counts.vague += core.counts.vague;
            found.failures.extend(core.failures);
            found.vague.extend(core.vague);
        }
    });
    let Counts { inputs, loaded, vague, .. } = found.counts;
    let memory = found.failures.iter().filter(|(_, text)| text.starts_with("memory: ")).count();
    let died = found.failures.iter().filter(|(_, text)| text.starts_with("ended: ")).count();
    let panics = found.failures.len() - memory - died;
    let rate = inputs as f64 / begin.elapsed().as_secs_f64();
    eprintln!(
        "{name}: {inputs} inputs, {rate:.0} a second: {loaded} loaded, {} refused ({vague} without a remedy), {panics} \
         panics, {memory} beyond the memory, {died} ended the process or took too long",
        inputs.saturating_sub(loaded + found.failures.len() as u64)
    );
    for (number, text) in distinct(&found.vague) {
        eprintln!("  without a remedy, {number}: {text}");
    }
    let failures = distinct(&found.failures);
    for (number, text) in &failures {
        eprintln!("  FUZZ_SEED={seed} FUZZ_INPUT={number}: {text}");
    }
    assert!(failures.is_empty(), "{name}: {} failures; run one alone as told above", found.failures.len());
}

/// One of each kind: texts that are the same but for their numbers.
fn distinct(all: &[(u64, String)]) -> Vec<(u64, String)> {
    let mut kinds = BTreeMap::new();
    for (number, text) in all {
        let kind: String = text.chars().filter(|c| !c.is_ascii_digit()).take(120).collect();
        kinds.entry(kind).or_insert_with(|| (*number, text.chars().take(400).collect()));
    }
    kinds.into_values().collect()
}

fn one_core(test: &str, seed: u64, (mut first, step, end): (u64, u64, u64)) -> Found {
    let mut found = Found::default();
    for _ in 0..DEATHS {
        let folder = shm();
        let status = spawn(test, folder.path(), seed, (first, step, end)).wait().unwrap();
        let counts = Counts::read(&folder.path().join("counts"));
        found.counts.inputs += counts.inputs;
        found.counts.loaded += counts.loaded;
        found.counts.vague += counts.vague;
        let notes = |file: &str| -> Vec<(u64, String)> {
            let text = fs::read_to_string(folder.path().join(file)).unwrap_or_default();
            text.lines().filter_map(|l| l.split_once(' ')).map(|(n, t)| (n.parse().unwrap_or(0), t.into())).collect()
        };
        found.failures.extend(notes("failures"));
        found.vague.extend(notes("vague"));
        if status.success() {
            break;
        }
        let last = last_words(&folder.path().join("stderr"));
        if counts.current == 0 {
            found.failures.push((0, format!("ended: before the first input, {status}: {last}")));
            break;
        }
        found.counts.inputs += 1;
        found.failures.push((counts.current - 1, format!("ended: {status}: {last}")));
        first = counts.current - 1 + step;
        if first >= end {
            break;
        }
    }
    found
}

/// The end of what a process has written.
fn last_words(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(200)))?;
        file.read_to_end(&mut bytes)
    });
    read.map(|_| String::from_utf8_lossy(&bytes).trim().replace('\n', " | ")).unwrap_or_default()
}
