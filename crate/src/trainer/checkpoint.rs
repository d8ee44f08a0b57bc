//! `checkpoint-N` folders: written whole or not at all, and recognised when they come back.
//!
//! | file | what |
//! |---|---|
//! | `adapter_model.safetensors`, `adapter_config.json` | the adapter, as PEFT writes it |
//! | `optimizer.safetensors` | the optimizer's state and step count |
//! | `scheduler.json` | updates done and the learning rates, as PyTorch's scheduler names them |
//! | `rng_state.json` | the seeds and the number of the next micro-batch: all randomness follows from them |
//! | `trainer_state.json` | transformers' file of that name |
//! | `progress.json` | losses not yet logged, so that the log goes on as if nothing had happened |
//! | `training_args.json` | the arguments, and what identifies the run |

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::state::TrainerState;
use crate::{
    backend::LossScale,
    error::{Error, Result},
    json_file::{read_fields, read_json_or},
    safe_file::{remove_folder, replace, write_file, writing_in},
    tensor_file::write_tensors,
};

pub(super) const PREFIX: &str = "checkpoint-";
const ADAPTER: &str = "adapter_model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const SCHEDULER: &str = "scheduler.json";
const RNG: &str = "rng_state.json";
const STATE: &str = "trainer_state.json";
const PROGRESS: &str = "progress.json";
const ARGUMENTS: &str = "training_args.json";

/// What the log needs and `trainer_state.json` has no place for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Progress {
    /// Sum of the updates' losses since the last entry of the log.
    pub loss_since_log: f64,
    /// `global_step` at that entry.
    pub step_logged: usize,
    /// Sum of the losses of all updates.
    pub loss_of_run: f64,
    /// Of the last update.
    pub grad_norm: f64,
    /// Of the last update.
    pub learning_rate: f64,
    /// `global_step` at the last end of an epoch whose logging, evaluating and saving is done.
    pub epoch_end_step: usize,
    /// What the loss of an f16 model is multiplied by on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

impl Progress {
    /// Nothing was done after the last step.
    fn check(&self, global_step: usize) -> Result<(), String> {
        for (name, step) in [("step_logged", self.step_logged), ("epoch_end_step", self.epoch_end_step)] {
            if step > global_step {
                return Err(format!("{name} is {step}, global_step of {STATE} is {global_step}"));
            }
        }
        Ok(())
    }
}

/// What goes into a checkpoint's own files.
pub(super) struct Content<'a> {
    pub state: Value,
    pub progress: &'a Progress,
    pub optimizer: HashMap<String, Tensor>,
    pub scheduler: Value,
    pub rng: Value,
    pub arguments: Map<String, Value>,
    /// What makes this run another run than others, by name.
    pub identity: Vec<(String, Value)>,
}

/// Writes the folder beside its place, then renames it. On failure nothing is left behind, and
/// a folder that was there before is untouched. What else somebody put into that folder is in the new one, too.
pub(super) fn save(folder: &Path, save_adapter: impl FnOnce(&Path) -> Result<()>, content: &Content) -> Result<()> {
    // Of other checkpoints, too: a process that was killed may have been deleting one.
    let is_checkpoint = |name: &OsStr| name.to_str().is_some_and(|name| name.starts_with(PREFIX));
    drop(writing_in(folder, is_checkpoint));
    replace(folder, |temporary| {
        write_all(temporary, save_adapter, content)?;
        if folder.is_dir() { keep_others(folder, temporary) } else { Ok(()) }
    })
}

/// Gives `new` what `old` has beside: a second name for each file.
fn keep_others(old: &Path, new: &Path) -> Result<()> {
    for entry in fs::read_dir(old).map_err(Error::io("read", old))? {
        let from = entry.map_err(Error::io("read", old))?.path();
        let to = new.join(from.file_name().unwrap_or_default());
        let is_folder = from.is_dir() && !from.is_symlink();
        if is_folder {
            fs::create_dir_all(&to).map_err(Error::io("write", &to))?;
            keep_others(&from, &to)?;
        } else if !to.exists() {
            // Where a file system gives no second names, it is copied.
            let kept = fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop));
            kept.map_err(Error::io("copy", &from))?;
        }
    }
    Ok(())
}

fn write_all(folder: &Path, save_adapter: impl FnOnce(&Path) -> Result<()>, content: &Content) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
    save_adapter(folder)?;
    let tensors = content.optimizer.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    // A stop waits until the checkpoint is whole.
    write_tensors(&folder.join(OPTIMIZER), tensors, None, &|| Ok(()))?;
    let arguments = json!({
        "arguments": content.arguments,
        "run": content.identity.iter().cloned().collect::<Map<_, _>>(),
    });
    for (name, value) in [
        (SCHEDULER, &content.scheduler),
        (RNG, &content.rng),
        (STATE, &content.state),
        (PROGRESS, &json!(content.progress)),
        (ARGUMENTS, &arguments),
    ] {
        write_file(&folder.join(name), format!("{value:#}\n").as_bytes())?;
    }
    Ok(())
}

/// What a checkpoint holds beside the adapter.
#[derive(Debug)]
pub(super) struct Loaded {
    pub state: TrainerState,
    pub progress: Progress,
    pub optimizer: HashMap<String, Tensor>,
}

/// Reads a checkpoint and refuses one of another run.
///
/// # Errors
/// A missing folder or file, a damaged file, and [`Error::CheckpointMismatch`] with the field.
pub(super) fn load(folder: &Path, identity: &[(String, Value)]) -> Result<Loaded> {
    if !folder.join(STATE).is_file() || !folder.join(ADAPTER).is_file() {
        let near = if folder.is_dir() { folder } else { folder.parent().unwrap_or(folder) };
        let remedy = match sorted(near).last() {
            Some(last) => format!("name a checkpoint folder; the last one there is {}", last.display()),
            None => "name a checkpoint-N folder that the trainer wrote".into(),
        };
        return Err(Error::not_found("checkpoint", folder, &remedy));
    }
    let read = |name: &str| read_json_or(&folder.join(name), DAMAGED);
    let saved = read(ARGUMENTS)?;
    for (field, here) in identity {
        let there = &saved["run"][field];
        if there != here {
            let (expected, got) = (there.to_string(), here.to_string());
            return Err(Error::CheckpointMismatch { path: folder.into(), field: field.clone(), expected, got });
        }
    }
    let state = TrainerState::from_json(&read(STATE)?);
    let state = state.map_err(|e| Error::malformed(folder.join(STATE), "trainer state", e, DAMAGED))?;
    let progress: Result<Progress, String> = read_fields(&read(PROGRESS)?);
    let of_this_state = progress.and_then(|progress| progress.check(state.global_step).map(|()| progress));
    let damaged = |e| Error::malformed(folder.join(PROGRESS), "progress file", e, DAMAGED);
    let progress = of_this_state.map_err(damaged)?;
    let path = folder.join(OPTIMIZER);
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let optimizer = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
        .map_err(|e| Error::malformed(&path, "safetensors file", e, DAMAGED))?;
    Ok(Loaded { state, progress, optimizer })
}

/// Where the checkpoint is now that `folder` names by the path of its own run: beside `folder`, if it is there. The run may
/// have had another working directory, or its folder another place.
pub(super) fn beside(folder: &Path, named: &str) -> String {
    let (here, name) = (fs::canonicalize(folder), Path::new(named).file_name());
    let found = here.ok().zip(name).map(|(here, name)| here.with_file_name(name)).filter(|path| path.is_dir());
    found.map_or(named.into(), |path| path.to_string_lossy().into_owned())
}

const DAMAGED: &str = "the checkpoint is damaged: resume from an earlier one";

/// The checkpoints in `output_dir`, the oldest first: by the time of writing, as transformers
/// sorts them, so that those of an earlier run count as old whatever their number.
pub(super) fn sorted(output_dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(output_dir) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let step: usize = entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
            let metadata = entry.metadata().ok().filter(|m| m.is_dir())?;
            Some((metadata.modified().ok()?, step, entry.path()))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, _, path)| path).collect()
}

/// Deletes the oldest checkpoints until `limit` are left, but none of `keep`.
pub(super) fn rotate(output_dir: &Path, limit: usize, keep: &[&Path]) -> Result<()> {
    let found = sorted(output_dir);
    let mut surplus = found.len().saturating_sub(limit);
    // One folder may be named by several paths.
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let keep: Vec<PathBuf> = keep.iter().map(|path| real(path)).collect();
    for path in found {
        if surplus > 0 && !keep.contains(&real(&path)) {
            remove_folder(&path)?;
            surplus -= 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::state::TrainerControl;

    fn content(progress: &Progress) -> Content<'_> {
        Content {
            state: TrainerState { global_step: 3, ..Default::default() }.to_json(&TrainerControl::default()),
            progress,
            optimizer: HashMap::from([("m".into(), Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap())]),
            scheduler: json!({}),
            rng: json!({}),
            arguments: Map::new(),
            identity: vec![("seed".into(), json!(42)), ("LoraConfig.r".into(), json!(8))],
        }
    }

    fn adapter(folder: &Path) -> Result<()> {
        write_file(&folder.join(ADAPTER), b"adapter")
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_checkpoint_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("checkpoint-3");
        let progress = Progress { loss_since_log: 0.1 + 0.2, step_logged: 2, ..Default::default() };
        let content = content(&progress);
        save(&folder, adapter, &content).unwrap();
        let loaded = load(&folder, &content.identity).unwrap();
        assert_eq!((loaded.progress, loaded.state.global_step), (progress.clone(), 3));
        assert_eq!(loaded.optimizer["m"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        // Over itself: the new one takes the place of the old one and nothing else stays.
        save(&folder, adapter, &content).unwrap();
        assert_eq!(names(dir.path()), ["checkpoint-3"]);
    }

    #[test]
    fn what_others_put_into_a_checkpoint_stays() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("checkpoint-3");
        let progress = Progress::default();
        save(&folder, adapter, &content(&progress)).unwrap();
        fs::create_dir_all(folder.join("plots/old")).unwrap();
        fs::write(folder.join("notes.txt"), "mine").unwrap();
        fs::write(folder.join("plots/old/loss.svg"), "mine too").unwrap();
        fs::write(folder.join(ADAPTER), "an older adapter").unwrap();
        save(&folder, adapter, &content(&progress)).unwrap();
        assert_eq!(fs::read(folder.join("notes.txt")).unwrap(), b"mine");
        assert_eq!(fs::read(folder.join("plots/old/loss.svg")).unwrap(), b"mine too");
        assert_eq!(fs::read(folder.join(ADAPTER)).unwrap(), b"adapter");
        assert_eq!(names(dir.path()), ["checkpoint-3"]);
    }

    #[test]
    fn progress_beyond_the_last_step_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("checkpoint-3");
        for progress in
            [Progress { step_logged: 4, ..Default::default() }, Progress { epoch_end_step: 9, ..Default::default() }]
        {
            save(&folder, adapter, &content(&progress)).unwrap();
            let error = load(&folder, &content(&progress).identity).unwrap_err();
            assert!(matches!(&error, Error::Malformed { path, .. } if path.ends_with(PROGRESS)), "{error}");
        }
    }

    #[test]
    fn a_failed_save_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("checkpoint-3");
        let progress = Progress::default();
        save(&folder, adapter, &content(&progress)).unwrap();
        let full = |f: &Path| {
            adapter(f)?;
            Err(Error::io("write", f.join(ADAPTER))(std::io::ErrorKind::StorageFull.into()))
        };
        let error = save(&folder, full, &content(&progress)).unwrap_err();
        assert!(error.to_string().contains(&format!("{}/checkpoint-3/{ADAPTER}", dir.path().display())), "{error}");
        assert!(error.to_string().contains("free some disk space"), "{error}");
        assert_eq!(names(dir.path()), ["checkpoint-3"]);
        load(&folder, &content(&progress).identity).unwrap();
    }

    #[test]
    fn a_checkpoint_of_another_run_is_refused_by_field() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("checkpoint-3");
        save(&folder, adapter, &content(&Progress::default())).unwrap();
        let error = load(&folder, &[("seed".into(), json!(42)), ("LoraConfig.r".into(), json!(16))]).unwrap_err();
        let Error::CheckpointMismatch { field, expected, got, .. } = error else { panic!("{error}") };
        assert_eq!((field.as_str(), expected.as_str(), got.as_str()), ("LoraConfig.r", "8", "16"));
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("checkpoint-3");
        let progress = Progress::default();
        for name in [OPTIMIZER, STATE, PROGRESS, ARGUMENTS] {
            save(&folder, adapter, &content(&progress)).unwrap();
            let whole = fs::read(folder.join(name)).unwrap();
            fs::write(folder.join(name), &whole[..whole.len() / 2]).unwrap();
            let error = load(&folder, &content(&progress).identity).unwrap_err();
            assert!(matches!(&error, Error::Malformed { path, .. } if path.ends_with(name)), "{name}: {error}");
        }
        fs::remove_file(folder.join(STATE)).unwrap();
        assert!(matches!(load(&folder, &[]).unwrap_err(), Error::NotFound { .. }));
    }

    #[test]
    fn a_missing_checkpoint_points_to_the_last_one() {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("checkpoint-3"), adapter, &content(&Progress::default())).unwrap();
        for wrong in [dir.path().to_path_buf(), dir.path().join("checkpoint-4")] {
            let error = load(&wrong, &[]).unwrap_err();
            assert!(error.to_string().contains("checkpoint-3"), "{error}");
        }
    }

    #[test]
    fn rotation_keeps_the_newest_and_the_named() {
        let dir = tempfile::tempdir().unwrap();
        // An earlier run left a higher number; it is older all the same.
        for step in [900, 1, 2, 3] {
            fs::create_dir(dir.path().join(format!("checkpoint-{step}"))).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
        fs::write(dir.path().join("checkpoint-x"), "").unwrap();
        rotate(dir.path(), 2, &[&dir.path().join("checkpoint-1")]).unwrap();
        assert_eq!(names(dir.path()), ["checkpoint-1", "checkpoint-3", "checkpoint-x"]);
        rotate(dir.path(), 1, &[&dir.path().join("checkpoint-1"), &dir.path().join("checkpoint-3")]).unwrap();
        assert_eq!(names(dir.path()).len(), 3, "what must be kept is kept, whatever the limit");
    }
}
