//! Signals, and the compilers that evcxr starts: processes of ours, of which it says nothing.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::{fs, io, thread};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

/// Has a signal, from now on, do this instead of ending the process.
pub fn on_signal(of: Signal, act: impl Fn() + Send + 'static) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    // Not in the thread: an editor of lines, which puts back what it finds, must find this.
    let mut signals = signal(SignalKind::from_raw(of as i32))?;
    drop(entered);
    thread::spawn(move || {
        runtime.block_on(async {
            while signals.recv().await.is_some() {
                act()
            }
        })
    });
    Ok(())
}

/// Has a process get a signal when the thread that starts it ends.
pub fn end_together(command: &mut Command, by: Signal) {
    // SAFETY: prctl is async-signal-safe.
    unsafe { command.pre_exec(move || Ok(set_pdeathsig(by)?)) };
}

/// Kills whatever descends from this process, but for the `spared` processes and their descendants. Returns whether
/// there was any.
pub fn kill_descendants(spared: &[i32]) -> bool {
    let own = std::process::id() as i32;
    let all = processes();
    let mut doomed = vec![own];
    // Children are found in any order, so until nothing is added.
    loop {
        let more = all.iter().find(|process| {
            doomed.contains(&process.parent) && !doomed.contains(&process.id) && !spared.contains(&process.id)
        });
        match more {
            Some(process) => doomed.push(process.id),
            None => break,
        }
    }
    for id in &doomed[1..] {
        // A descendant of ours, which nobody but its parent waits for.
        let _ = kill(Pid::from_raw(*id), Signal::SIGKILL);
    }
    doomed.len() > 1
}

struct Process {
    id: i32,
    parent: i32,
}

/// All living processes.
fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    ids.filter_map(process).collect()
}

fn process(id: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name, in parentheses, may itself contain spaces and parentheses.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (state != "Z").then_some(Process { id, parent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grandchildren_die_and_the_spared_live() -> std::io::Result<()> {
        let mut spared = Command::new("sleep").arg("100").spawn()?;
        let mut shell = Command::new("sh").args(["-c", "sleep 100; true"]).spawn()?;
        let parent = shell.id() as i32;
        while !processes().iter().any(|process| process.parent == parent) {
            std::thread::yield_now();
        }
        let grandchildren: Vec<i32> =
            processes().iter().filter(|process| process.parent == parent).map(|process| process.id).collect();
        assert!(kill_descendants(&[spared.id() as i32]));
        assert!(!shell.wait()?.success());
        assert!(grandchildren.iter().all(|id| process(*id).is_none_or(|process| process.parent != parent)));
        assert!(spared.try_wait()?.is_none());
        spared.kill()?;
        spared.wait()?;
        Ok(())
    }
}
