//! Threads for jobs.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use threadpool::ThreadPool;

use crate::log::Limiter;

/// How long the system is not asked for a thread after it has refused one.
const PAUSE: Duration = Duration::from_millis(100);

/// A bounded number of threads, which are kept once they were started.
///
/// `threadpool` queues without bound, so nothing is given to it that it has no
/// thread for.
pub struct Pool {
    threads: Mutex<Threads>,
    limit: usize,
    /// Threads that have a job. Rises under the lock.
    busy: Arc<AtomicUsize>,
    /// A copy of the pool's number, for whoever looks.
    count: AtomicUsize,
}

struct Threads {
    pool: ThreadPool,
    /// Threads could not be started; said once.
    is_short: bool,
    /// When the system has refused one. It is not asked again at once: each
    /// call that takes long asks each millisecond.
    refused: Option<Instant>,
}

impl Pool {
    /// So many threads at the start, and at most; with so much stack each.
    #[must_use]
    pub fn new(first: usize, limit: usize, stack: usize) -> Self {
        let pool = threadpool::Builder::new()
            .num_threads(first)
            .thread_name("mb-worker".into())
            .thread_stack_size(stack)
            .build();
        Self {
            threads: Mutex::new(Threads {
                pool,
                is_short: false,
                refused: None,
            }),
            limit: limit.max(first),
            busy: Arc::default(),
            count: AtomicUsize::new(first),
        }
    }

    /// Threads that there are.
    pub fn threads(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// Gives a job to a thread that has none; false if there is none.
    #[must_use]
    pub fn execute(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if self.busy.load(SeqCst) >= threads.pool.max_count() && !threads.grow(self.limit) {
            return false;
        }
        self.count.store(threads.pool.max_count(), Relaxed);
        self.busy.fetch_add(1, SeqCst);
        let busy = Busy(Arc::clone(&self.busy));
        threads.pool.execute(move || {
            let _busy = busy;
            job();
        });
        true
    }
}

/// That a thread has a job, until this is dropped.
struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Threads {
    /// One thread more. `threadpool` panics where none can be started; then
    /// it is told to want as many as it has.
    fn grow(&mut self, limit: usize) -> bool {
        let count = self.pool.max_count();
        let refused = self.refused.is_some_and(|at| at.elapsed() < PAUSE);
        if count >= limit || refused {
            return false;
        }
        let more = || self.pool.set_num_threads(count + 1);
        if catch_unwind(AssertUnwindSafe(more)).is_ok() {
            (self.is_short, self.refused) = (false, None);
            return true;
        }
        self.pool.set_num_threads(count);
        self.refused = Some(Instant::now());
        if !self.is_short {
            self.is_short = true;
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
}
