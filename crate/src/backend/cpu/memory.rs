//! How much memory this process can still have.

use std::fs;

/// The least of what the machine has free (swap included), what the process's cgroup may still take and what its limit
/// on address space leaves, bytes; `None` where the system does not say. Whoever takes more is killed by the system, or
/// ended by a failed allocation: with all variables of a notebook.
pub fn available() -> Option<usize> {
    let machine = || Some(bytes_of("/proc/meminfo", "MemAvailable:")? + bytes_of("/proc/meminfo", "SwapFree:")?);
    [machine(), cgroup(), address_space()].into_iter().flatten().min()
}

/// A line of a file of the kernel's, such as `VmRSS:  1024 kB`, in bytes.
pub(crate) fn bytes_of(file: &str, name: &str) -> Option<usize> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches(" kB").parse::<usize>().ok()?.checked_mul(1024)
}

/// Of the cgroup (version 2) that the process is in; file pages that it can give back count as free.
fn cgroup() -> Option<usize> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let folder = format!("/sys/fs/cgroup{}", own.trim().strip_prefix("0::")?);
    let number = |file: &str| fs::read_to_string(format!("{folder}/{file}")).ok()?.trim().parse::<usize>().ok();
    let (max, current) = (number("memory.max")?, number("memory.current")?);
    let statistics = fs::read_to_string(format!("{folder}/memory.stat")).unwrap_or_default();
    let files = statistics.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<usize>().ok());
    Some(max.saturating_sub(current.saturating_sub(files.unwrap_or(0))))
}

/// Asks the C library to keep what is freed for the next pass. It gives memory back to the system as soon as there are some
/// megabytes at the end of a heap, and a step, whose activations come and go, then waits for the system to clear the same
/// pages again and again: a quarter of the time of a step without checkpointing. At the end of a training it is given back.
pub(super) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: two settings of the allocator; a value that it refuses changes nothing.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 20);
    }
}

fn address_space() -> Option<usize> {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid place to write to.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    if status != 0 || limit.rlim_cur == libc::RLIM_INFINITY {
        return None;
    }
    Some((limit.rlim_cur as usize).saturating_sub(bytes_of("/proc/self/status", "VmSize:")?))
}
