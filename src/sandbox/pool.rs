//! Places for instances, and instances that wait to be used again.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::instance::Live;
use crate::{budget::Budget, host::Watch, stripes::Stripes};

/// A place among the instances of the server, given back when dropped.
pub(super) struct Place(pub(super) Arc<Budget>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.give(1);
    }
}

/// An instance between two calls: of a service with `isolation = "shared"`, or
/// reset.
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
    instances: Stripes<Mutex<Vec<Warm>>>,
    /// Of all components together: there may be one.
    any: Arc<AtomicBool>,
}

impl Idle {
    pub(super) fn new(any: &Arc<AtomicBool>) -> Self {
        Self {
            instances: Stripes::default(),
            any: Arc::clone(any),
        }
    }

    /// The one that was used last on this processor, or else any: its memory
    /// is most likely still in the processor's caches.
    #[inline]
    pub(super) fn take(&self) -> Option<Warm> {
        let own = lock(self.instances.own()).pop();
        own.or_else(|| self.instances.iter().find_map(|stripe| lock(stripe).pop()))
    }

    #[inline]
    pub(super) fn put(&self, warm: Warm) {
        let mut idle = lock(self.instances.own());
        idle.push(warm);
        // Within the lock: who clears the mark then sees this instance, or
        // this sees that the mark was cleared.
        if !self.any.load(Relaxed) {
            self.any.store(true, Relaxed);
        }
    }

    /// Gives up all of them, because others need their places and memory.
    pub(super) fn clear(&self) {
        for stripe in self.instances.iter() {
            let idle = std::mem::take(&mut *lock(stripe));
            // Outside of the lock: ending an instance takes its time.
            drop(idle);
        }
    }
}

fn lock(stripe: &Mutex<Vec<Warm>>) -> MutexGuard<'_, Vec<Warm>> {
    stripe.lock().unwrap_or_else(PoisonError::into_inner)
}
