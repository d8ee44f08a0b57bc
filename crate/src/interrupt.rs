//! Ctrl-C that loses nothing: long calls stop at the next safe point and return what they have.
//!
//! A notebook's variables live in the process that runs the cells, so letting SIGINT end
//! that process costs the user the model. While a [`Guard`] is alive SIGINT only raises a
//! flag, which training looks at before each micro-batch, generation before each token, and whatever reads or writes a
//! file before each piece of it.
//! A second SIGINT gets what it would have got without us, normally the end of the process.

use std::{
    io, mem, ptr,
    sync::atomic::{AtomicBool, AtomicPtr, Ordering::SeqCst},
};

use parking_lot::Mutex;

use crate::error::{Error, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);
/// What SIGINT did before the first guard; read by the signal handler.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
/// How many guards are alive.
static GUARDS: Mutex<usize> = Mutex::new(0);

/// Whether somebody asked the running call to stop.
pub fn requested() -> bool {
    REQUESTED.load(SeqCst)
}

/// The error of `what` if somebody asked it to stop: for a call that has nothing to give back half done. Outside a
/// [`Guard`] nothing stops: a request waits for the next call that has one.
pub fn check(what: &str) -> Result<()> {
    let stops = requested() && *GUARDS.lock() > 0;
    if stops { Err(Error::Interrupted { what: what.into() }) } else { Ok(()) }
}

/// Runs work that gives nothing half done. Asked to stop, it may end with any error: this one is told.
pub(crate) fn stoppable<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let _guard = Guard::new()?;
    let done = work();
    check(what).and(done)
}

/// What reads until somebody asks to stop: for parsers that go through a file in one call.
pub(crate) struct Reader<R>(pub R);

impl<R: io::Read> io::Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if requested() { Err(io::Error::other("interrupted")) } else { self.0.read(buffer) }
    }
}

/// Asks the running train or generate call to stop at its next safe point, as SIGINT does.
/// Without such a call the next one stops before its first step.
pub fn request() {
    REQUESTED.store(true, SeqCst);
}

/// While it lives SIGINT raises the flag. Guards nest; the last one to go puts the previous
/// handler back and lowers the flag, so that the request stops one call and not the next.
#[derive(Debug)]
pub struct Guard(());

impl Guard {
    /// Installs the handler unless an outer call has done so.
    pub fn new() -> Result<Self> {
        let mut guards = GUARDS.lock();
        if *guards == 0 {
            install().map_err(|e| {
                let detail = format!("installing the handler of SIGINT failed: {e}");
                Error::argument("interrupt", detail, "a process that may handle SIGINT", "check the sandbox's rules")
            })?;
        }
        *guards += 1;
        Ok(Self(()))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut guards = GUARDS.lock();
        *guards -= 1;
        if *guards == 0 {
            restore();
            REQUESTED.store(false, SeqCst);
        }
    }
}

fn install() -> io::Result<()> {
    let mut previous = Box::new(unsafe { mem::zeroed::<libc::sigaction>() });
    // SAFETY: both structs are valid for the call, and `on_sigint` does only what a signal
    // handler may: atomics, sigaction and raise.
    let status = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = on_sigint as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SA_RESTART: a read or write that the signal meets goes on instead of failing.
        action.sa_flags = libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGINT, &action, &mut *previous)
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    PREVIOUS.store(Box::into_raw(previous), SeqCst);
    Ok(())
}

fn restore() {
    let previous = PREVIOUS.swap(ptr::null_mut(), SeqCst);
    if !previous.is_null() {
        // SAFETY: the pointer came from `Box::into_raw` in `install`. It is not freed: a
        // handler running on another thread may still be reading it.
        unsafe { libc::sigaction(libc::SIGINT, previous, ptr::null_mut()) };
    }
}

extern "C" fn on_sigint(signal: libc::c_int) {
    if REQUESTED.swap(true, SeqCst) {
        let previous = PREVIOUS.load(SeqCst);
        if !previous.is_null() {
            // SAFETY: `restore` never frees what PREVIOUS pointed to; both calls are
            // async-signal-safe. The raised signal is delivered when this handler returns.
            unsafe {
                libc::sigaction(libc::SIGINT, previous, ptr::null_mut());
                libc::raise(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, because the flag and the handler belong to the whole process.
    #[test]
    fn sigint_raises_the_flag_while_a_guard_lives() {
        let handler = || unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            libc::sigaction(libc::SIGINT, ptr::null(), &mut action);
            action.sa_sigaction
        };
        let before = handler();
        {
            let _outer = Guard::new().unwrap();
            let inner = Guard::new().unwrap();
            assert_ne!(handler(), before);
            assert!(!requested());
            unsafe { libc::raise(libc::SIGINT) };
            assert!(requested(), "the first SIGINT is a request");
            drop(inner);
            assert!(requested(), "the outer call still has to see it");
        }
        assert!(!requested(), "the request does not outlive the call that it stopped");
        assert_eq!(handler(), before);

        // The second SIGINT reaches the handler that was there before.
        static SEEN: AtomicBool = AtomicBool::new(false);
        extern "C" fn mine(_: libc::c_int) {
            SEEN.store(true, SeqCst);
        }
        unsafe { libc::signal(libc::SIGINT, mine as extern "C" fn(libc::c_int) as libc::sighandler_t) };
        let guard = Guard::new().unwrap();
        unsafe { libc::raise(libc::SIGINT) };
        assert!(!SEEN.load(SeqCst));
        unsafe { libc::raise(libc::SIGINT) };
        assert!(SEEN.load(SeqCst));
        drop(guard);
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
    }
}
