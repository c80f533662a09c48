//! Who gets in: a slot for each connection, and threads for the slots.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use arc_swap::ArcSwapOption;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use threadpool::ThreadPool;

use super::connection::Connection;
use crate::log::Limiter;

/// Threads that are there from the start.
const FIRST_THREADS: usize = 4;

/// Slots for connections, and the pool of threads that serve them.
///
/// `threadpool` queues without bound, so nothing is given to it without a
/// permit, and there are never more permits than threads: its queue stays
/// empty but for the moment in which a thread that has just let go of its
/// permit returns.
pub(super) struct Admission {
    /// Read by the admin side and the drain, without a lock.
    slots: Box<[ArcSwapOption<Connection>]>,
    inner: Mutex<Inner>,
    /// Told when the last permit is given back.
    empty: Condvar,
    /// A copy of the pool's number, for whoever looks.
    threads: AtomicUsize,
}

struct Inner {
    /// Free slots; the one that was freed last is taken first, so that its
    /// thread and its memory are used again.
    free: Vec<usize>,
    pool: ThreadPool,
    /// Threads could not be started; said once.
    short_of_threads: bool,
}

/// The right to serve one connection. Given back when dropped.
pub(super) struct Permit {
    admission: Arc<Admission>,
    slot: usize,
}

impl Admission {
    pub(super) fn new(max_connections: usize, thread_stack: usize) -> Arc<Self> {
        let pool = threadpool::Builder::new()
            .num_threads(FIRST_THREADS.min(max_connections))
            .thread_name("mb-connection".into())
            .thread_stack_size(thread_stack)
            .build();
        Arc::new(Self {
            slots: (0..max_connections).map(|_| ArcSwapOption::empty()).collect(),
            inner: Mutex::new(Inner { free: (0..max_connections).rev().collect(), pool, short_of_threads: false }),
            empty: Condvar::new(),
            threads: AtomicUsize::new(FIRST_THREADS.min(max_connections)),
        })
    }

    /// A permit, if there is a free slot and a thread for it.
    pub(super) fn admit(self: &Arc<Self>) -> Option<Permit> {
        let mut inner = self.lock();
        let slot = inner.free.pop()?;
        let taken = self.slots.len() - inner.free.len();
        if taken > inner.pool.max_count() && !inner.grow() {
            inner.free.push(slot);
            return None;
        }
        self.threads.store(inner.pool.max_count(), Relaxed);
        Some(Permit { admission: Arc::clone(self), slot })
    }

    /// Runs the job of a permit holder.
    pub(super) fn execute(&self, job: impl FnOnce() + Send + 'static) {
        self.lock().pool.execute(job);
    }

    /// Connections that are being served.
    pub(super) fn connections(&self) -> impl Iterator<Item = Arc<Connection>> {
        self.slots.iter().filter_map(ArcSwapOption::load_full)
    }

    /// Threads that serve connections.
    pub(super) fn threads(&self) -> usize {
        self.threads.load(Relaxed)
    }

    /// Waits for all permits to come back; says whether they did.
    pub(super) fn wait_until_empty(&self, deadline: Instant) -> bool {
        let mut inner = self.lock();
        while inner.free.len() < self.slots.len() {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return false;
            }
            inner = self.empty.wait_timeout(inner, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics halfway through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// One thread more. `threadpool` panics where none can be started; then
    /// it is told to want as many as it has.
    fn grow(&mut self) -> bool {
        let threads = self.pool.max_count();
        let started = catch_unwind(AssertUnwindSafe(|| self.pool.set_num_threads(threads + 1))).is_ok();
        if started {
            self.short_of_threads = false;
            return true;
        }
        self.pool.set_num_threads(threads);
        if !self.short_of_threads {
            self.short_of_threads = true;
            // Said once, but again where the system gives and refuses in turns.
            static LINES: Limiter = Limiter::new();
            if LINES.allows("no further threads") {
                tracing::error!("the system refuses more than {threads} threads, further connections are refused");
            }
        }
        false
    }
}

impl Permit {
    /// Shows the connection to whoever looks.
    pub(super) fn hold(&self, connection: Arc<Connection>) {
        self.admission.slots[self.slot].store(Some(connection));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.slots[self.slot].store(None);
        let mut inner = self.admission.lock();
        inner.free.push(self.slot);
        if inner.free.len() == self.admission.slots.len() {
            self.admission.empty.notify_all();
        }
    }
}

/// Raises the soft limit of open files to the hard one, and returns it; none
/// where there is no limit.
pub fn raise_open_files() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum || setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err() {
        return current;
    }
    maximum
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, time::Duration};

    #[test]
    fn as_many_as_there_are_slots_and_threads_grow_with_them() {
        let admission = Admission::new(6, 256 * 1024);
        assert_eq!(admission.threads(), FIRST_THREADS);
        let permits: Vec<_> = (0..6).map(|_| admission.admit().unwrap()).collect();
        assert!(admission.admit().is_none());
        assert_eq!(admission.threads(), 6);
        assert!(!admission.wait_until_empty(Instant::now()));

        // All six run at the same time: none is queued behind another.
        let (started, starts) = mpsc::channel();
        let gate = Arc::new(std::sync::Barrier::new(7));
        for permit in permits {
            let (started, gate) = (started.clone(), Arc::clone(&gate));
            admission.execute(move || {
                started.send(()).unwrap();
                gate.wait();
                drop(permit);
            });
        }
        for _ in 0..6 {
            starts.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        gate.wait();
        assert!(admission.wait_until_empty(Instant::now() + Duration::from_secs(10)));
        assert!(admission.admit().is_some());
        assert_eq!(admission.threads(), 6, "threads are kept");
    }
}
