//! Places for instances, and instances that wait to be used again.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::instance::Live;
use crate::{budget::Budget, host::Watch};

/// A place among the instances of the server, given back when dropped.
pub(super) struct Place(pub(super) Arc<Budget>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.give(1);
    }
}

/// An instance of a service with `isolation = "shared"`, between two calls.
pub(super) struct Warm {
    pub(super) live: Live,
    /// Calls that it has served.
    pub(super) calls: u64,
}

/// A call that waits for its turn is looked after this soon, because answers
/// from before it may wait with it, and then this often.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Takes one of something, until the deadline or the end of the server.
pub(super) fn take(places: &Budget, watch: &dyn Watch, deadline: Instant) -> bool {
    if places.try_take(1) {
        return true;
    }
    watch.waits();
    let mut look = FIRST_LOOK;
    loop {
        let now = Instant::now();
        if places.take_until(1, deadline.min(now + look)) {
            return true;
        }
        look = LOOK_EVERY;
        if watch.tick().is_some() || Instant::now() >= deadline {
            return false;
        }
    }
}

/// The idle instances of one component. There are never more than its
/// `concurrency`, since each was made for a call.
pub(super) struct Idle {
    instances: Mutex<Vec<Warm>>,
    /// Idle instances of all components together.
    all: Arc<AtomicUsize>,
}

impl Idle {
    pub(super) fn new(all: &Arc<AtomicUsize>) -> Self {
        Self { instances: Mutex::default(), all: Arc::clone(all) }
    }

    /// The one that was used last: its memory is most likely still in the
    /// processor's caches.
    pub(super) fn take(&self) -> Option<Warm> {
        let warm = self.lock().pop();
        if warm.is_some() {
            self.all.fetch_sub(1, Relaxed);
        }
        warm
    }

    pub(super) fn put(&self, warm: Warm) {
        self.lock().push(warm);
        self.all.fetch_add(1, Relaxed);
    }

    /// Gives up all of them, because others need their places and memory.
    pub(super) fn clear(&self) {
        let idle = std::mem::take(&mut *self.lock());
        self.all.fetch_sub(idle.len(), Relaxed);
        // Outside of the lock: ending an instance takes its time.
        drop(idle);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Warm>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.clear();
    }
}
