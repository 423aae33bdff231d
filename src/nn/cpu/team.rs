//! The threads that share one operation: the caller and helpers that wait a little for the next one before they sleep.
//!
//! A denoising step is some hundred operations of a few microseconds to milliseconds. The caller begins at once and takes tasks
//! like everybody else; a helper that wakes up late finds nothing left and keeps nobody waiting. Invariant: a job lives on its
//! caller's stack; helpers enter it only under the lock while it is published, and the caller leaves after the last of them.
#![allow(
    unsafe_code,
    reason = "helpers borrow the caller's job for as long as the caller waits"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// Rounds of waiting for the next operation before a helper sleeps: some 20 microseconds.
const PATIENCE: u32 = 2000;

/// Work of one caller.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    /// Helpers inside.
    inside: AtomicUsize,
    failed: AtomicBool,
}

impl Job<'_> {
    fn drain(&self) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.count {
                return;
            }
            (self.task)(i);
        }
    }
}

/// A published job; the lifetime is the publisher's business.
#[derive(Clone, Copy)]
struct Published(*const Job<'static>);
// SAFETY: a job is shared state behind atomics and a `Sync` closure; who may enter it when is the module's invariant.
unsafe impl Send for Published {}

struct Team {
    job: Mutex<Option<Published>>,
    wake: Condvar,
    /// Counts jobs, so that waiting helpers see a new one without the lock.
    generation: AtomicU64,
    helpers: usize,
}

static TEAM: OnceLock<Team> = OnceLock::new();

impl Team {
    /// The process's team: as many threads as rayon has, the caller being one of them.
    fn get() -> &'static Self {
        let mut fresh = false;
        let team = TEAM.get_or_init(|| {
            fresh = true;
            Self {
                job: Mutex::new(None),
                wake: Condvar::new(),
                generation: AtomicU64::new(0),
                helpers: rayon::current_num_threads().saturating_sub(1),
            }
        });
        if fresh {
            for i in 0..team.helpers {
                let name = format!("sdgen-kernel-{i}");
                // A machine that refuses a thread gets along without it.
                let _ = std::thread::Builder::new()
                    .name(name)
                    .spawn(move || team.help());
            }
        }
        team
    }

    fn lock(&self) -> MutexGuard<'_, Option<Published>> {
        // Nothing panics under the lock.
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn help(&self) -> ! {
        let mut seen = 0;
        loop {
            for _ in 0..PATIENCE {
                if self.generation.load(Ordering::Relaxed) != seen {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut job = self.lock();
            let published = loop {
                let now = self.generation.load(Ordering::Relaxed);
                match *job {
                    Some(published) if now != seen => {
                        seen = now;
                        break published;
                    }
                    _ => seen = now,
                }
                job = self.wake.wait(job).unwrap_or_else(PoisonError::into_inner);
            };
            // SAFETY: published, so the caller has not left; it cannot while `inside` is above 0.
            let entered = unsafe { &*published.0 };
            entered.inside.fetch_add(1, Ordering::Relaxed);
            drop(job);
            if catch_unwind(AssertUnwindSafe(|| entered.drain())).is_err() {
                entered.failed.store(true, Ordering::Relaxed);
            }
            entered.inside.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Ends a job: nobody enters any more, and who is inside is waited for; also when the caller's own task panicked.
struct Leave<'a>(&'a Team, &'a Job<'a>);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.1.next.store(self.1.count, Ordering::Relaxed);
        *self.0.lock() = None;
        let mut rounds = 0u32;
        while self.1.inside.load(Ordering::Acquire) > 0 {
            rounds += 1;
            if rounds < PATIENCE {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Runs `task(0..count)`, shared with whoever of the team is free; on the caller alone while another one's job runs.
///
/// # Panics
/// When a task panics.
pub(super) fn share(count: usize, task: &(dyn Fn(usize) + Sync)) {
    let team = Team::get();
    let job = Job {
        task,
        count,
        next: AtomicUsize::new(0),
        inside: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    };
    let mut published = team.lock();
    if team.helpers == 0 || published.is_some() {
        drop(published);
        return job.drain();
    }
    *published = Some(Published(std::ptr::from_ref(&job).cast()));
    team.generation.fetch_add(1, Ordering::Relaxed);
    drop(published);
    let leave = Leave(team, &job);
    team.wake.notify_all();
    job.drain();
    drop(leave);
    assert!(
        !job.failed.load(Ordering::Relaxed),
        "a task of a kernel panicked on another thread"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whoever_calls_and_however_often() {
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for count in 0..if cfg!(miri) { 4 } else { 300 } {
                        let runs: Vec<AtomicUsize> = (0..count).map(|_| 0.into()).collect();
                        share(count, &|i| {
                            runs[i].fetch_add(1, Ordering::Relaxed);
                            // A task that shares runs its part alone.
                            share(1, &|_| ());
                        });
                        assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let failing = catch_unwind(|| share(50, &|i| assert!(i != 30, "task 30")));
        assert!(failing.is_err());
        let sum = AtomicUsize::new(0);
        share(100, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4950);
    }
}
