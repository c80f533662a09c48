//! Places for instances, and instances that wait to be used again.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::instance::{CallError, Live, Wanted};
use crate::{
    budget::Budget,
    host::{Context, Watch},
    stripes::Stripes,
};

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

/// Who waits for something, until when.
#[derive(Clone, Copy)]
pub(super) struct Waiter<'a> {
    pub(super) watch: &'a dyn Watch,
    pub(super) deadline: Instant,
    /// It is the call of a client, which may be handed back before it begins.
    pub(super) is_outermost: bool,
}

/// Why something was not had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missed {
    /// Not until the deadline, or the end of the server.
    Late,
    /// The call is to be handed back.
    Postponed,
}

impl Missed {
    /// For a call that wanted something.
    pub(super) fn of(self, wanted: Wanted) -> CallError {
        match self {
            Self::Late => CallError::NotBegun(wanted),
            Self::Postponed => CallError::Postponed,
        }
    }
}

impl<'a> Waiter<'a> {
    /// The call of a context.
    #[inline]
    pub(super) fn of(watch: &'a dyn Watch, context: &Context) -> Self {
        Self {
            watch,
            deadline: context.deadline,
            is_outermost: context.depth() == 0,
        }
    }

    /// It is about to wait.
    pub(super) fn begins_to_wait(self) -> Result<(), Missed> {
        if !self.is_outermost {
            self.watch.waits();
        } else if !self.watch.queues() {
            return Err(Missed::Postponed);
        }
        Ok(())
    }

    /// It waits no more.
    pub(super) fn ends_to_wait(self) {
        if self.is_outermost {
            self.watch.begins();
        }
    }

    /// Takes one of something.
    #[inline]
    pub(super) fn take(self, places: &Budget) -> Result<(), Missed> {
        if places.try_take(1) {
            return Ok(());
        }
        self.begins_to_wait()?;
        let taken = self.take_later(places);
        self.ends_to_wait();
        taken
    }

    fn take_later(self, places: &Budget) -> Result<(), Missed> {
        let mut look = FIRST_LOOK;
        loop {
            let now = Instant::now();
            if places.take_until(1, self.deadline.min(now + look)) {
                return Ok(());
            }
            look = LOOK_EVERY;
            if self.watch.tick().is_some() || Instant::now() >= self.deadline {
                return Err(Missed::Late);
            }
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
