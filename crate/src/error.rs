//! One error type for the eight steps.
//!
//! Every message says what was expected, what was found, where, and what to do.
//! `Debug` prints the same text as `Display`: a notebook shows the `Debug` form of
//! an error that left a cell through `?`, and a reader should not have to decode it.

use std::{
    cell::Cell,
    fmt, io,
    panic::{self, AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Once,
};

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and the remedy.
///
/// ```
/// use qlora_nb::{dataset::Dataset, error::Error};
/// let error = Dataset::load_from_disk("no/such/folder").unwrap_err();
/// assert!(matches!(error, Error::NotFound { .. }));
/// ```
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The GPU has not as much memory as was asked for. Nothing was lost.
    #[error("the GPU is out of memory, {doing}\n  what to do: {remedy}")]
    OutOfDeviceMemory { doing: String, remedy: String },

    /// This process cannot have as much memory as is needed: it would be killed. Nothing was begun.
    #[error("not enough memory, {doing}\n  what to do: {remedy}")]
    OutOfMemory { doing: String, remedy: String },

    /// A GPU that this build or this machine cannot use.
    #[error("{device} cannot be used: {why}\n  what to do: {remedy}")]
    UnusableDevice { device: String, why: String, remedy: String },

    /// A file or folder is not there.
    #[error("{what} not found: {}\n  what to do: {remedy}", path.display())]
    NotFound { what: String, path: PathBuf, remedy: String },

    /// The operating system refused to read or write (permission, full disk, ...).
    #[error("could not {action} {}: {source}\n  what to do: {}", path.display(), io_remedy(source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },

    /// A file is there but its bytes are not what its format promises.
    #[error("{} is not a valid {format}: {detail}\n  what to do: {remedy}", path.display())]
    Malformed { path: PathBuf, format: &'static str, detail: String, remedy: String },

    /// A dataset has no column of that name.
    #[error(
        "no column {column:?}{}; the columns are {available:?}\n  what to do: use one of these names, or rename the field in the data",
        optional(row, |row| format!(" in row {row}"))
    )]
    MissingColumn { column: String, row: Option<usize>, available: Vec<String> },

    /// A dataset column holds another type than the call asks for.
    #[error(
        "column {column:?}{}: expected {expected}, got {got}\n  what to do: read it with the accessor of its own type, or convert the data",
        optional(row, |row| format!(" in row {row}"))
    )]
    ColumnType { column: String, row: Option<usize>, expected: String, got: String },

    /// A user's function failed on one row.
    #[error("row {row}: {source}")]
    Row { row: usize, source: Box<Error> },

    /// An index or range beyond the end.
    #[error("{what}: {got} is out of range, there are {len}\n  what to do: {remedy}")]
    OutOfRange { what: String, got: String, len: usize, remedy: String },

    /// Tensors are missing from, or strange to, a checkpoint or adapter.
    #[error("{} does not match the model: {} missing {:?}, {} unexpected {:?}\n  what to do: {remedy}",
            path.display(), missing.len(), few(missing), unexpected.len(), few(unexpected))]
    KeyMismatch { path: PathBuf, missing: Vec<String>, unexpected: Vec<String>, remedy: String },

    /// A tensor has another shape than its place requires.
    #[error("{name}{}: expected shape {expected:?}, got {got:?}\n  what to do: {remedy}", optional(path, |path| format!(" in {}", path.display())))]
    Shape { name: String, path: Option<PathBuf>, expected: Vec<usize>, got: Vec<usize>, remedy: String },

    /// Something that exists elsewhere but not here; `supported` lists what does.
    #[error("{what} {got:?} is not supported; supported: {}\n  what to do: {remedy}", supported.join(", "))]
    Unsupported { what: String, got: String, supported: Vec<String>, remedy: String },

    /// An argument outside its domain.
    #[error("{name} = {got}: expected {expected}\n  what to do: {remedy}")]
    InvalidArgument { name: String, got: String, expected: String, remedy: String },

    /// `target_modules` names no linear layer of the model.
    #[error(
        "target_modules {unknown:?} match no linear layer of the model; {}the linear layers are {available:?}\n  what to do: name one of these, or use \"all-linear\"",
        did_you_mean(suggestions)
    )]
    UnknownTargetModules { unknown: Vec<String>, suggestions: Vec<String>, available: Vec<String> },

    /// A token id that the embedding table does not have.
    #[error(
        "row {row}, position {position}: token id {id} is beyond the vocabulary of {vocab_size}\n  what to do: tokenize with the tokenizer that belongs to this model"
    )]
    TokenId { row: usize, position: usize, id: i64, vocab_size: usize },

    /// A row with no tokens, or with padding alone.
    #[error(
        "row {row}: the sequence has no token: its length is 0, or its attention_mask is 0 throughout\n  what to do: filter empty rows out, e.g. ds.filter(|ex| Ok(!ex.text(\"output\")?.is_empty()))"
    )]
    EmptySequence { row: usize },

    /// Rows whose fields have different lengths.
    #[error(
        "row {row}: {field} has {got} entries, input_ids has {expected}\n  what to do: give every field one entry a token"
    )]
    UnequalLengths { row: usize, field: &'static str, expected: usize, got: usize },

    /// No label survives: training would learn nothing, or divide zero by zero.
    #[error(
        "{rows} of {total} rows have no label to learn from (all are -100){}\n  what to do: {remedy}",
        first_rows(first)
    )]
    NothingToLearn { rows: usize, total: usize, first: Vec<usize>, remedy: String },

    /// A loss or gradient that is NaN or infinite; training stopped before it was applied.
    #[error(
        "{what} is {value} at step {step}; training stopped before the weights were changed{}\n  what to do: lower learning_rate, keep max_grad_norm at 1.0, compute in f32 or bf16",
        optional(checkpoint, |folder| format!("; the last good checkpoint is {}", folder.display()))
    )]
    NotFinite { what: String, value: f64, step: usize, checkpoint: Option<PathBuf> },

    /// Logits from which no token can be chosen.
    #[error(
        "prompt {prompt}: the logits after {position} tokens hold {value}, so no next token can be chosen\n  what to do: load the model in f32 or bf16 (f16 overflows beyond 65504); if that does not help, its weights are damaged"
    )]
    LogitsNotFinite { prompt: usize, position: usize, value: f32 },

    /// A checkpoint that another run wrote.
    #[error("{} is a checkpoint of another run: {field} was {expected}, here it is {got}\n  what to do: resume with the arguments, data and model of that run, or train from the start", path.display())]
    CheckpointMismatch { path: PathBuf, field: String, expected: String, got: String },

    /// The user asked to stop.
    #[error(
        "{what} was interrupted; nothing was lost\n  what to do: run the cell again, or go on from what it returned so far"
    )]
    Interrupted { what: String },

    /// A model hub could not be reached, or refused.
    #[error("could not get {what} from the hub: {detail}\n  what to do: {remedy}")]
    Hub { what: String, detail: String, remedy: String },

    /// The tokenizer library failed.
    #[error(
        "tokenizer: {0}\n  what to do: check tokenizer.json and the files beside it, or copy or download them again"
    )]
    Tokenizer(String),

    /// The tensor library failed.
    #[error("tensor operation: {0}")]
    Tensor(#[source] candle_core::Error),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        #[cfg(feature = "cuda")]
        if lacks_device_memory(&error) {
            return out_of_device_memory("making a tensor");
        }
        Error::Tensor(error)
    }
}

/// Whether candle says that a card has no room.
#[cfg(feature = "cuda")]
fn lacks_device_memory(error: &candle_core::Error) -> bool {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } | candle_core::Error::Context { inner, .. } => {
            lacks_device_memory(inner)
        }
        candle_core::Error::Cuda(e) => {
            let text = e.to_string();
            text.contains("CUDA_ERROR_OUT_OF_MEMORY") || text.contains("STATUS_ALLOC_FAILED")
        }
        _ => false,
    }
}

/// The error of a card that has no room for what was being done.
#[cfg(feature = "cuda")]
pub(crate) fn out_of_device_memory(doing: &str) -> Error {
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let room = match candle_core::cuda_backend::cudarc::driver::result::mem_get_info() {
        Ok((free, total)) => format!(" ({:.2} of its {:.2} GiB are free)", gib(free), gib(total)),
        Err(_) => String::new(),
    };
    let remedy = "gradient_checkpointing: true and a smaller per_device_train_batch_size (with more \
                  gradient_accumulation_steps) save most; model.memory_report() and trainer.memory_plan() show \
                  where the memory goes, nvidia-smi who else uses the card";
    Error::OutOfDeviceMemory { doing: format!("{doing}{room}"), remedy: remedy.into() }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Wraps an I/O error with what was tried and where: `.map_err(Error::io("read", &path))`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::NotFound if action != "write" => {
                Self::not_found("file", path, "check the path; a relative path starts at the notebook's folder")
            }
            _ => Error::Io { action, path, source },
        }
    }

    /// Names the row in which a user's function failed.
    pub fn at_row(self, row: usize) -> Self {
        Error::Row { row, source: Box::new(self) }
    }

    /// A file or folder that is not there: `what` it is, and the remedy.
    pub fn not_found(what: &str, path: impl Into<PathBuf>, remedy: &str) -> Self {
        Error::NotFound { what: what.into(), path: path.into(), remedy: remedy.into() }
    }

    /// A file that is not what its format promises, and why.
    pub fn malformed(path: impl Into<PathBuf>, format: &'static str, detail: impl fmt::Display, remedy: &str) -> Self {
        Error::Malformed { path: path.into(), format, detail: detail.to_string(), remedy: remedy.into() }
    }

    /// Something that is not among what is `supported`.
    pub fn unsupported<S: Into<String>>(
        what: &str,
        got: impl fmt::Display,
        supported: impl IntoIterator<Item = S>,
        remedy: &str,
    ) -> Self {
        let supported = supported.into_iter().map(Into::into).collect();
        Error::Unsupported { what: what.into(), got: got.to_string(), supported, remedy: remedy.into() }
    }

    /// What the hub did not give, and why.
    pub(crate) fn hub(what: &str, detail: impl Into<String>, remedy: &str) -> Self {
        Error::Hub { what: what.into(), detail: detail.into(), remedy: remedy.into() }
    }

    /// A tensor of another shape than its place requires, and the file that it is in.
    pub(crate) fn shape(
        name: impl Into<String>,
        path: Option<&Path>,
        expected: &[usize],
        got: &[usize],
        remedy: &str,
    ) -> Self {
        let (path, remedy) = (path.map(Into::into), remedy.into());
        Error::Shape { name: name.into(), path, expected: expected.into(), got: got.into(), remedy }
    }

    /// A wrong argument: `Error::argument("r", 0, "a rank of at least 1", "use 8")`.
    pub fn argument(name: &str, got: impl fmt::Display, expected: &str, remedy: &str) -> Self {
        let (name, got) = (name.into(), got.to_string());
        Error::InvalidArgument { name, got, expected: expected.into(), remedy: remedy.into() }
    }
}

/// [`Error::argument`] unless `fine`: `ensure(r >= 1, "r", r, "a rank of at least 1", "use 8")?`.
pub(crate) fn ensure(fine: bool, name: &str, got: impl fmt::Display, expected: &str, remedy: &str) -> Result<()> {
    if fine { Ok(()) } else { Err(Error::argument(name, got, expected, remedy)) }
}

/// The names among `known` nearest to `name`, for "did you mean": at most three, by
/// edit distance, none when nothing is near.
pub fn near_names(name: &str, known: &[String]) -> Vec<String> {
    let mut scored: Vec<(usize, &String)> = known.iter().map(|k| (strsim::levenshtein(name, k), k)).collect();
    scored.sort();
    scored.dedup();
    let near = |d: usize, k: &str| d <= 1 + name.len().max(k.len()) / 3 || k.contains(name) || name.contains(k);
    scored.into_iter().filter(|(d, k)| near(*d, k)).take(3).map(|(_, k)| k.clone()).collect()
}

/// Runs what reads files of others by another crate, which may promise no freedom from panics: a damaged file must not
/// end a notebook, nor print a panic beside the error that says the same.
pub(crate) fn catch<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_as("its contents contradict each other", read)
}

/// [`catch`], where it is known what a panic means.
pub(crate) fn catch_as<T>(meaning: &str, read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    static SILENCE: Once = Once::new();
    SILENCE.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CATCHES.get() {
                others(info)
            }
        }));
    });
    let outer = CATCHES.replace(true);
    let read = catch_unwind(AssertUnwindSafe(read));
    CATCHES.set(outer);
    read.unwrap_or_else(|_| Err(meaning.into()))
}

thread_local! {
    /// Whether this thread is in [`catch`].
    static CATCHES: Cell<bool> = const { Cell::new(false) };
}

fn io_remedy(e: &io::Error) -> &'static str {
    if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
        return "too many files are open: drop what holds them, or raise the limit (ulimit -n) and start again";
    }
    match e.kind() {
        io::ErrorKind::ReadOnlyFilesystem => "choose a folder on a disk that can be written to",
        io::ErrorKind::FileTooLarge => "raise the limit on the size of files (ulimit -f), or choose another disk",
        io::ErrorKind::PermissionDenied => "choose a folder that you may write to, or change its permissions",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some disk space and run the cell again; the earlier files are unchanged"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => "a file is in the way: choose another path",
        _ => "check the path and the disk, then run the cell again",
    }
}

fn optional<T>(value: &Option<T>, text: impl FnOnce(&T) -> String) -> String {
    value.as_ref().map(text).unwrap_or_default()
}

fn few(names: &[String]) -> &[String] {
    &names[..names.len().min(4)]
}

fn did_you_mean(suggestions: &[String]) -> String {
    if suggestions.is_empty() { String::new() } else { format!("did you mean {}? ", suggestions.join(" or ")) }
}

fn first_rows(first: &[usize]) -> String {
    if first.is_empty() { String::new() } else { format!(", the first are {first:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found() {
        let known: Vec<String> = ["query_key_value", "dense", "dense_h_to_4h"].map(String::from).into();
        assert_eq!(near_names("query_key_values", &known)[0], "query_key_value");
        assert_eq!(near_names("zzz", &known), Vec::<String>::new());
    }
}
