//! Threads for jobs.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use crate::log::Limiter;

/// Threads beyond the first ones that are kept without a job. Each keeps the
/// deepest stack that it has touched, some hundred KiB, so more of them end
/// when they have had no job for a while.
const KEPT: usize = 16;

/// How long. Calls that wait for the disk together need as many threads again
/// in the next millisecond.
const SURPLUS_FOR: Duration = Duration::from_secs(1);

/// How long the system is not asked for a thread after it has refused one.
const PAUSE: Duration = Duration::from_millis(100);

/// A bounded number of threads, of which a few are kept.
///
/// No job waits for another: it goes to a thread that has none, or to a new
/// one. Each thread waits for itself, so that a job wakes the one that gets it
/// and no other: a call that waits costs two wake-ups, this one and its own.
pub struct Pool {
    shared: Arc<Shared>,
    /// Threads at most.
    limit: usize,
    stack: usize,
}

struct Shared {
    state: Mutex<State>,
    /// Threads without a job that stay.
    kept: usize,
    /// All of them, for the admin side.
    count: AtomicUsize,
}

#[derive(Default)]
struct State {
    /// Those without a job. The last one to have had one, whose stack is in
    /// the caches still, gets the next.
    idle: Vec<Arc<Seat>>,
    threads: usize,
    is_closed: bool,
    /// Threads could not be started; said once.
    is_short: bool,
    /// When the system has refused one. It is not asked again at once: each
    /// call that takes long asks each millisecond.
    refused: Option<Instant>,
}

type Job = Box<dyn FnOnce() + Send>;

/// Where a thread waits for its next job; none ends it.
#[derive(Default)]
struct Seat {
    next: Mutex<Option<Option<Job>>>,
    given: Condvar,
}

impl Seat {
    fn give(&self, job: Option<Job>) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        self.given.notify_one();
    }

    fn wait(&self) -> Option<Job> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let given = self.given.wait_while(next, |next| next.is_none());
        given.unwrap_or_else(PoisonError::into_inner).take()?
    }

    /// False if there was none for so long.
    fn is_given_within(&self, time: Duration) -> bool {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let given = self
            .given
            .wait_timeout_while(next, time, |next| next.is_none());
        let (next, _) = given.unwrap_or_else(PoisonError::into_inner);
        next.is_some()
    }
}

impl Pool {
    /// Keeps so many threads and some more, and has so many at most; with so
    /// much stack each.
    #[must_use]
    pub fn new(first: usize, limit: usize, stack: usize) -> Self {
        let limit = limit.max(first);
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                kept: limit.min(first + KEPT),
                count: AtomicUsize::new(0),
            }),
            limit,
            stack,
        }
    }

    /// Threads that there are.
    pub fn threads(&self) -> usize {
        self.shared.count.load(Relaxed)
    }

    /// Gives a job to a thread that has none; false if there is none.
    #[must_use]
    pub fn execute(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let job: Job = Box::new(job);
        let mut state = self.shared.lock();
        if let Some(seat) = state.idle.pop() {
            drop(state);
            seat.give(Some(job));
            return true;
        }
        let is_paused = state.refused.is_some_and(|at| at.elapsed() < PAUSE);
        if state.threads >= self.limit || is_paused {
            return false;
        }
        let shared = Arc::clone(&self.shared);
        let started = thread::Builder::new()
            .name("mb-worker".into())
            .stack_size(self.stack)
            .spawn(move || shared.run(job));
        if started.is_err() {
            state.refuse();
            return false;
        }
        (state.is_short, state.refused) = (false, None);
        state.threads += 1;
        self.shared.count.store(state.threads, Relaxed);
        true
    }
}

impl Drop for Pool {
    /// Threads with a job end after it.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_closed = true;
        for seat in state.idle.drain(..) {
            seat.give(None);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does.
    fn run(&self, first: Job) {
        let seat = Arc::<Seat>::default();
        let mut next = Some(first);
        while let Some(job) = next {
            // The hook has logged it.
            let _ = catch_unwind(AssertUnwindSafe(job));
            let mut state = self.lock();
            if state.is_closed {
                break;
            }
            let is_surplus = state.idle.len() >= self.kept;
            state.idle.push(Arc::clone(&seat));
            drop(state);
            if is_surplus && !seat.is_given_within(SURPLUS_FOR) && self.withdraw(&seat) {
                break;
            }
            next = seat.wait();
        }
        let mut state = self.lock();
        state.threads -= 1;
        self.count.store(state.threads, Relaxed);
    }
}

impl Shared {
    /// Whether the surplus thread of this seat may end: nobody has taken it to
    /// give it a job, and there still is a surplus.
    fn withdraw(&self, seat: &Arc<Seat>) -> bool {
        let mut state = self.lock();
        let place = state.idle.iter().position(|idle| Arc::ptr_eq(idle, seat));
        let surplus = place.filter(|_| state.idle.len() > self.kept);
        surplus.map(|place| state.idle.remove(place)).is_some()
    }
}

impl State {
    fn refuse(&mut self) {
        self.refused = Some(Instant::now());
        if !self.is_short {
            self.is_short = true;
            // Logged once, but again where the system alternately grants and
            // refuses.
            static LINES: Limiter = Limiter::new();
            if LINES.allows("no further threads") {
                tracing::error!(
                    "the system refuses more than {} threads; further calls wait for slow ones",
                    self.threads
                );
            }
        }
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

    #[test]
    fn a_panic_ends_a_job_and_the_end_of_the_pool_its_threads() {
        let pool = Pool::new(1, 1, 256 * 1024);
        assert!(pool.execute(|| panic!("this one")));
        let (done, is_done) = mpsc::channel();
        while !pool.execute({
            let done = done.clone();
            move || done.send(()).unwrap()
        }) {
            thread::yield_now();
        }
        is_done.recv().unwrap();
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        while shared.strong_count() > 0 {
            thread::yield_now();
        }
    }
}
