//! This binary as cargo's rustc wrapper: it answers a [`Question`] for types, and has rustc not optimise a cell where
//! nothing is to be gained.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::types::{ASK_IN, CHECKS, Question};

pub fn is_asked_for() -> bool {
    std::env::var_os(ASK_IN).is_some()
}

/// Runs the rustc of the command line, a plain cell's without optimising; or answers the question if one is asked and
/// this is the cell's check.
pub fn stand_before_rustc() -> ExitCode {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    let folder = std::env::var_os(ASK_IN).map(PathBuf::from).unwrap_or_default();
    let question = Question::new(&folder);
    let is = |what: &str| args.iter().any(|arg| arg == what);
    if is("ctx") && is(CHECKS) {
        if question.is_asked() {
            // A failure, so that cargo does not take the cell for checked.
            if let Err(error) = question.answer() {
                eprintln!("qlora-nb: asking rustc for types: {error}");
            }
            return ExitCode::FAILURE;
        }
    } else if is("ctx") {
        let source = std::fs::metadata("src/lib.rs").map_or(0, |file| file.len());
        args = for_a_cell(args, source, is_marked(&folder));
        keep_identity(&mut args, &folder.join("identity"));
    }
    let Some((rustc, args)) = args.split_first() else { return ExitCode::FAILURE };
    let error = Command::new(rustc).args(args).env_remove(ASK_IN).exec();
    eprintln!("qlora-nb: cannot run rustc: {error}");
    ExitCode::FAILURE
}

/// Gives the cell's crate the identity of the one before: with another, which cargo gives it for one dependency more, every
/// type that cells define would be another, and variables of it lost. Unless a dependency changed that was there before,
/// for then types may have.
fn keep_identity(args: &mut [OsString], file: &Path) {
    let Some(own) = args.iter().position(|arg| arg.as_encoded_bytes().starts_with(b"metadata=")) else { return };
    let known = std::fs::read_to_string(file).unwrap_or_default();
    let is_there = |known: &str| args.iter().any(|arg| arg == known);
    if let Some(metadata) = known.lines().next().filter(|_| known.lines().skip(1).all(is_there)) {
        args[own] = metadata.into();
    }
    let is_extern = |pair: &&[OsString]| pair[0] == "--extern";
    let externs = args.windows(2).filter(is_extern).map(|pair| pair[1].to_string_lossy());
    let lines: Vec<_> = std::iter::once(args[own].to_string_lossy()).chain(externs).collect();
    // Without it variables may be lost, of which evcxr tells.
    let _ = std::fs::write(file, lines.join("\n"));
}

/// The file by which a session tells the rustc wrapper that the cell to come is [`plain`](crate::plain).
const MARK: &str = "plain";

/// A mark that cannot be made or taken away costs time, and nothing else.
pub fn mark(folder: &Path, is_plain: bool) {
    let _ = match is_plain {
        true => std::fs::write(folder.join(MARK), ""),
        false => std::fs::remove_file(folder.join(MARK)),
    };
}

fn is_marked(folder: &Path) -> bool {
    folder.join(MARK).exists()
}

/// Up to so many bytes of source a cell is sooner compiled as a whole than from pieces that earlier cells left; more is
/// there when earlier cells defined a dozen functions, which are compiled with each cell.
const SMALL: u64 = 12 << 10;

/// The arguments of the rustc that compiles a cell with so many bytes of source. cargo does not know of this: for another
/// profile it would give the cell's crate another identity, and with it every type that cells define.
pub fn for_a_cell(args: Vec<OsString>, source: u64, is_plain: bool) -> Vec<OsString> {
    let mut adapted: Vec<OsString> = Vec::with_capacity(args.len());
    for arg in args {
        match arg.to_str().and_then(|text| text.split_once('=')) {
            Some(("opt-level", _)) if is_plain => adapted.push("opt-level=0".into()),
            Some(("codegen-units", _)) => adapted.push("codegen-units=1".into()),
            Some(("incremental", _)) if source <= SMALL && adapted.last().is_some_and(|flag| flag == "-C") => {
                adapted.pop();
            }
            // What one level leaves there is of no use to the other, which would throw it away.
            Some(("incremental", folder)) if is_plain => adapted.push(format!("incremental={folder}-plain").into()),
            _ => adapted.push(arg),
        }
    }
    adapted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_for_rustc() {
        let args = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let cargos =
            "rustc --crate-name ctx -C opt-level=2 -C codegen-units=16 -C metadata=a1 -C incremental=/tmp/i -L x=/y";
        let small = "rustc --crate-name ctx -C opt-level=2 -C codegen-units=1 -C metadata=a1 -L x=/y";
        assert_eq!(for_a_cell(args(cargos), 100, false), args(small));
        assert_eq!(for_a_cell(args(cargos), 100, true), args(&small.replace("level=2", "level=0")));
        let large = cargos.replace("units=16", "units=1");
        assert_eq!(for_a_cell(args(cargos), 1 << 20, false), args(&large));
        let plain = large.replace("level=2", "level=0").replace("/tmp/i", "/tmp/i-plain");
        assert_eq!(for_a_cell(args(cargos), 1 << 20, true), args(&plain));
    }

    #[test]
    fn a_crate_keeps_its_identity_until_a_dependency_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        let identity = |line: &str| {
            let mut args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            keep_identity(&mut args, &folder.path().join("identity"));
            args[1].to_string_lossy().into_owned()
        };
        assert_eq!(identity("-C metadata=1"), "metadata=1");
        assert_eq!(identity("-C metadata=2 --extern a=/a1"), "metadata=1");
        assert_eq!(identity("-C metadata=3 --extern b=/b1 --extern a=/a1"), "metadata=1");
        assert_eq!(identity("-C metadata=4 --extern b=/b1 --extern a=/a2"), "metadata=4");
        assert_eq!(identity("-C metadata=5 --extern b=/b1 --extern a=/a2"), "metadata=4");
    }

    #[test]
    fn a_mark_is_seen_until_it_is_taken_away() {
        let folder = tempfile::tempdir().expect("a folder");
        mark(folder.path(), false);
        assert!(!is_marked(folder.path()));
        mark(folder.path(), true);
        assert!(is_marked(folder.path()));
        mark(folder.path(), false);
        assert!(!is_marked(folder.path()));
    }
}
