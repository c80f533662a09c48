//! Threads for jobs.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use crate::log::Limiter;

type Job = Box<dyn FnOnce() + Send>;

/// Threads without a job that are kept for the next one. Others end: of a stack
/// stays resident what was ever touched.
const MAX_IDLE: usize = 16;

/// A bounded number of threads, started where a job finds none that is idle.
pub struct Pool {
    shared: Arc<Shared>,
    limit: usize,
    stack: usize,
}

#[derive(Default)]
struct Shared {
    threads: Mutex<Threads>,
    /// A job came, or the pool was dropped.
    changed: Condvar,
}

#[derive(Default)]
struct Threads {
    /// Given out, each to an idle thread that has yet to wake up. Invariant:
    /// no more than those.
    jobs: VecDeque<Job>,
    count: usize,
    idle: usize,
    over: bool,
    /// Threads could not be started; said once.
    is_short: bool,
}

impl Pool {
    /// So many threads at most, `first` of them in any case, with so many bytes
    /// of stack each.
    #[must_use]
    pub fn new(first: usize, limit: usize, stack: usize) -> Self {
        Self {
            shared: Arc::default(),
            limit: limit.max(first),
            stack,
        }
    }

    /// Threads that there are.
    pub fn threads(&self) -> usize {
        self.shared.lock().count
    }

    /// Gives a job to a thread that has none; false if there is none. No job
    /// waits for another.
    #[must_use]
    pub fn execute(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut threads = self.shared.lock();
        if threads.idle > threads.jobs.len() {
            threads.jobs.push_back(Box::new(job));
            drop(threads);
            self.shared.changed.notify_one();
            return true;
        }
        if threads.count >= self.limit {
            return false;
        }
        let shared = Arc::clone(&self.shared);
        let builder = thread::Builder::new().name("mb-worker".into());
        let started = builder
            .stack_size(self.stack)
            .spawn(move || shared.run(Box::new(job)));
        if started.is_ok() {
            threads.count += 1;
            threads.is_short = false;
            return true;
        }
        if !threads.is_short {
            threads.is_short = true;
            let count = threads.count;
            // Said once, but again where the system gives and refuses in turns.
            static LINES: Limiter = Limiter::new();
            if LINES.allows("no further threads") {
                tracing::error!(
                    "the system refuses more than {count} threads; slow calls keep others waiting"
                );
            }
        }
        false
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does: its first job, and then others.
    fn run(&self, first: Job) {
        let mut next = Some(first);
        while let Some(job) = next {
            // Its panic has been said by the hook, and ends nothing else.
            let _ = catch_unwind(AssertUnwindSafe(job));
            next = self.next();
        }
    }

    /// The next job of the thread that asks; none if it is to end.
    fn next(&self) -> Option<Job> {
        let mut threads = self.lock();
        if threads.idle >= MAX_IDLE {
            threads.count -= 1;
            return None;
        }
        threads.idle += 1;
        while threads.jobs.is_empty() && !threads.over {
            threads = self
                .changed
                .wait(threads)
                .unwrap_or_else(PoisonError::into_inner);
        }
        threads.idle -= 1;
        let job = threads.jobs.pop_front();
        threads.count -= usize::from(job.is_none());
        job
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn no_job_waits_for_another() {
        let pool = Pool::new(1, 2, 256 * 1024);
        let (done, is_done) = mpsc::channel();
        let mut ends = Vec::new();
        for _ in 0..2 {
            let (end, ended) = mpsc::channel::<()>();
            ends.push(end);
            let done = done.clone();
            assert!(pool.execute(move || {
                done.send(()).unwrap();
                let _ = ended.recv();
                drop(done);
            }));
            is_done.recv().unwrap();
        }
        assert!(!pool.execute(|| {}));
        assert_eq!(pool.threads(), 2);
        drop((ends, done));
        assert!(is_done.recv().is_err(), "both have ended");
        while !pool.execute(|| {}) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn of_many_threads_a_few_are_kept() {
        let pool = Pool::new(1, 100, 256 * 1024);
        let ends: Vec<_> = (0..100)
            .map(|_| {
                let (end, ended) = mpsc::channel::<()>();
                assert!(pool.execute(move || {
                    let _ = ended.recv();
                    panic!("as it may");
                }));
                end
            })
            .collect();
        assert_eq!(pool.threads(), 100);
        drop(ends);
        while pool.threads() > MAX_IDLE {
            thread::yield_now();
        }
        assert!(pool.execute(|| {}));
        assert_eq!(pool.threads(), MAX_IDLE);
    }
}
