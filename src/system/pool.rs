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

/// Threads beyond the first ones that are kept once they were started. Each
/// keeps the deepest stack that it has touched, some hundred KiB, so more of
/// them end with their job.
const KEPT: usize = 16;

/// How long the system is not asked for a thread after it has refused one.
const PAUSE: Duration = Duration::from_millis(100);

/// A bounded number of threads, of which a few are kept.
///
/// `threadpool` queues without bound, so nothing is given to it that it has no
/// thread for. It ends no thread but with the whole pool, so those that are
/// not kept are pools of one thread each.
pub struct Pool {
    threads: Mutex<Threads>,
    /// Threads that are kept, and all of them, at most.
    kept: usize,
    limit: usize,
    stack: usize,
    /// Jobs of kept threads, and of the others. They rise under the lock.
    busy: Arc<AtomicUsize>,
    others: Arc<AtomicUsize>,
    /// Idle threads, for the admin side.
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
        let limit = limit.max(first);
        Self {
            threads: Mutex::new(Threads {
                pool: pool(first, stack),
                is_short: false,
                refused: None,
            }),
            kept: limit.min(first + KEPT),
            limit,
            stack,
            busy: Arc::default(),
            others: Arc::default(),
            count: AtomicUsize::new(first),
        }
    }

    /// Threads that there are.
    pub fn threads(&self) -> usize {
        self.count.load(Relaxed) + self.others.load(Relaxed)
    }

    /// Gives a job to a thread that has none; false if there is none.
    #[must_use]
    pub fn execute(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let count = threads.pool.max_count();
        if self.busy.load(SeqCst) < count {
            run(&threads.pool, &self.busy, job);
            return true;
        }
        if count < self.kept {
            let is_started = threads.start(self.threads(), |pool| pool.set_num_threads(count + 1));
            if is_started.is_none() {
                // It panics before it has one, and wants it none the less.
                threads.pool.set_num_threads(count);
                return false;
            }
            self.count.store(count + 1, Relaxed);
            run(&threads.pool, &self.busy, job);
            return true;
        }
        if count + self.others.load(SeqCst) >= self.limit {
            return false;
        }
        let Some(one) = threads.start(self.threads(), |_| pool(1, self.stack)) else {
            return false;
        };
        // Its thread ends with the job: nobody can give it another one.
        run(&one, &self.others, job);
        true
    }
}

fn pool(threads: usize, stack: usize) -> ThreadPool {
    threadpool::Builder::new()
        .num_threads(threads)
        .thread_name("mb-worker".into())
        .thread_stack_size(stack)
        .build()
}

fn run(pool: &ThreadPool, count: &Arc<AtomicUsize>, job: impl FnOnce() + Send + 'static) {
    count.fetch_add(1, SeqCst);
    let busy = Busy(Arc::clone(count));
    pool.execute(move || {
        let _busy = busy;
        job();
    });
}

/// That a thread has a job, until this is dropped.
struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Threads {
    /// Has a thread started, of which `threadpool` panics where the system has
    /// none; then this is none.
    fn start<T>(&mut self, count: usize, start: impl FnOnce(&mut ThreadPool) -> T) -> Option<T> {
        if self.refused.is_some_and(|at| at.elapsed() < PAUSE) {
            return None;
        }
        let started = catch_unwind(AssertUnwindSafe(|| start(&mut self.pool)));
        if let Ok(started) = started {
            (self.is_short, self.refused) = (false, None);
            return Some(started);
        }
        self.refused = Some(Instant::now());
        if !self.is_short {
            self.is_short = true;
            // Logged once, but again where the system alternately grants and
            // refuses.
            static LINES: Limiter = Limiter::new();
            if LINES.allows("no further threads") {
                tracing::error!(
                    "the system refuses more than {count} threads; further calls wait for slow ones"
                );
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn no_job_waits_for_another_and_few_threads_are_kept() {
        let limit = 1 + KEPT + 2;
        let pool = Pool::new(1, limit, 256 * 1024);
        let (done, is_done) = mpsc::channel();
        let mut ends = Vec::new();
        for _ in 0..limit {
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
        assert_eq!(pool.threads(), limit);
        drop((ends, done));
        assert!(is_done.recv().is_err(), "all have ended");
        while pool.threads() > 1 + KEPT || !pool.execute(|| {}) {
            std::thread::yield_now();
        }
    }
}
