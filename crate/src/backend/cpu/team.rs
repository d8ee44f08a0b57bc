//! The threads of a pass. A pass of a few tokens is some hundred products of ten microseconds each: its threads wait for the
//! next one awake, for a moment, and the thread that asks works too.
//!
//! As many threads as rayon has (`RAYON_NUM_THREADS`, or one for each core). A share of work may only write what is its own;
//! which thread takes which share changes no bits.

use std::{
    any::Any,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Condvar, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use super::SharedMut;

/// How often a thread without work looks for some before it goes to sleep: about 100 microseconds.
const LOOKS: usize = 4000;
/// How often it looks before it lets others have the core in between.
const LOOKS_AWAKE: usize = 2000;

/// The lower half of a ticket of which no share can be taken.
const CLOSED: u64 = u32::MAX as u64;

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// What is to be done, in one number that threads take shares of: the job's number in the upper half, the next share in
/// the lower.
struct Team {
    ticket: AtomicU64,
    /// The two words of a `&dyn Fn(usize)`, and how many shares it has. They change while the ticket is [`CLOSED`]. A share
    /// is taken by exchanging the ticket that was read before them: that fails if the ticket has been closed since, and
    /// otherwise they are those of its job.
    task: [AtomicUsize; 2],
    shares: AtomicUsize,
    done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// A job is running: another, from inside of it or of another thread, is done by its own thread alone.
    busy: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    threads: usize,
}

static TEAM: LazyLock<&'static Team> = LazyLock::new(|| {
    let team: &'static Team = Box::leak(Box::new(Team {
        ticket: AtomicU64::new(0),
        task: [AtomicUsize::new(0), AtomicUsize::new(0)],
        shares: AtomicUsize::new(0),
        done: AtomicUsize::new(0),
        panic: Mutex::new(None),
        busy: AtomicBool::new(false),
        sleepers: AtomicUsize::new(0),
        sleep: Mutex::new(()),
        wake: Condvar::new(),
        threads: rayon::current_num_threads(),
    }));
    for i in 1..team.threads {
        // One that cannot be had leaves its work to the others.
        let _ = thread::Builder::new().name(format!("qlora-nb-{i}")).spawn(|| team.serve());
    }
    team
});

/// Threads that share a job.
pub fn threads() -> usize {
    TEAM.threads
}

/// Calls `task` with each of `0 .. shares`, on all threads, and comes back when all are done. A panic of one is one of the
/// caller, after the others are done.
pub fn run(shares: usize, task: impl Fn(usize) + Sync) {
    let team = *TEAM;
    if shares <= 1 || team.threads == 1 || team.busy.swap(true, Ordering::Acquire) {
        return (0..shares).for_each(task);
    }
    let panic = team.run(shares, &task);
    team.busy.store(false, Ordering::Release);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Calls `task` with pieces of `0 .. len`, `size` long, on all threads.
pub fn ranges(len: usize, size: usize, task: impl Fn(Range<usize>) + Sync) {
    run(len.div_ceil(size), |i| task(i * size..len.min((i + 1) * size)));
}

/// [`ranges`] of the elements of `out`.
pub fn chunks(out: &mut [f32], size: usize, task: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let (len, shared) = (out.len(), SharedMut::new(out));
    // SAFETY: these elements belong to this share.
    ranges(len, size, |range| task(range.clone(), unsafe { shared.slice(range) }));
}

impl Team {
    fn run(&self, shares: usize, task: Task) -> Option<Box<dyn Any + Send>> {
        assert!((shares as u64) < CLOSED, "more shares than a ticket counts");
        let last = self.ticket.fetch_or(CLOSED, Ordering::AcqRel);
        // SAFETY: two words, as below; the job is over before `task` goes.
        let words: [usize; 2] = unsafe { std::mem::transmute(task) };
        for (to, word) in self.task.iter().zip(words) {
            to.store(word, Ordering::Relaxed);
        }
        self.shares.store(shares, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        let job = ((last >> 32) + 1) << 32;
        // Sleepers are counted after this: who is about to sleep either sees the ticket or is seen here.
        self.ticket.store(job, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.wake.notify_all();
        }
        while self.share() {}
        let mut looks = 0;
        while self.done.load(Ordering::Acquire) < shares {
            pause(&mut looks);
        }
        lock(&self.panic).take()
    }

    /// Takes a share and does it; false: there is none.
    fn share(&self) -> bool {
        let ticket = self.ticket.load(Ordering::Acquire);
        let next = (ticket & CLOSED) as usize;
        let words = [0, 1].map(|i| self.task[i].load(Ordering::Relaxed));
        if next >= self.shares.load(Ordering::Relaxed) {
            return false;
        }
        if self.ticket.compare_exchange(ticket, ticket + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true;
        }
        // SAFETY: the words are those of this job, which is not over before `done` says so.
        let task: Task = unsafe { std::mem::transmute(words) };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(next))) {
            lock(&self.panic).get_or_insert(panic);
        }
        self.done.fetch_add(1, Ordering::Release);
        true
    }

    /// What the threads do that nobody asks.
    fn serve(&self) {
        let mut looks = 0;
        loop {
            if self.share() {
                looks = 0;
            } else if looks < LOOKS {
                pause(&mut looks);
            } else {
                self.rest();
                looks = 0;
            }
        }
    }

    /// Sleeps until there is another job.
    fn rest(&self) {
        let seen = self.ticket.load(Ordering::Relaxed) >> 32;
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.ticket.load(Ordering::SeqCst) >> 32 == seen {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

fn pause(looks: &mut usize) {
    *looks += 1;
    if *looks < LOOKS_AWAKE { std::hint::spin_loop() } else { thread::yield_now() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_share_is_done_once() {
        for shares in [0, 1, 2, 3, 64, 1000] {
            let counts: Vec<AtomicUsize> = (0..shares).map(|_| AtomicUsize::new(0)).collect();
            run(shares, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{shares}: {counts:?}");
        }
    }

    #[test]
    fn jobs_follow_each_other_from_many_threads_and_from_inside() {
        let rounds = if cfg!(miri) { 20 } else { 2000 };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for round in 0..rounds {
                        let mut out = vec![0f32; 50];
                        chunks(&mut out, 7, |range, part| {
                            let inner = AtomicUsize::new(0);
                            run(3, |j| {
                                inner.fetch_add(j, Ordering::Relaxed);
                            });
                            part.fill((range.start / 7 + round + inner.load(Ordering::Relaxed)) as f32);
                        });
                        assert!(out.iter().enumerate().all(|(at, v)| *v == (at / 7 + round + 3) as f32), "{out:?}");
                        if round % 500 == 0 {
                            thread::sleep(std::time::Duration::from_millis(2));
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_of_a_share_is_the_callers_and_the_next_job_runs() {
        let done = AtomicUsize::new(0);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            run(9, |i| {
                assert_ne!(i, 5, "the fifth");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        // The others are done, or at least those before it if another test keeps the threads busy.
        let before = done.load(Ordering::Relaxed);
        assert!(caught.is_err() && (5..=8).contains(&before), "{before}");
        run(4, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), before + 4);
    }
}
