//! Slots for instances, shared among services: while calls wait for one, the
//! next that is released goes to the service that holds fewest. A service keeps
//! its last slot when the instance in it ends, so that its next call need not
//! wait until a call of another service ends.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread::{self, Thread},
    time::Instant,
};

use super::pool::{IdleEviction, IdleInstance, IdleInstances};
use crate::{
    budget::Budget,
    host::{WaitError, Waiter},
    locks::lock,
};

/// One slot in so many is kept for services that hold few.
const RESERVE: usize = 16;

/// Slots, and who waits for one.
pub(super) struct Slots {
    free: Arc<Budget>,
    waiting: AtomicUsize,
    queue: Mutex<Vec<Arc<Queued>>>,
}

struct Queued {
    idle: Arc<IdleInstances>,
    thread: Thread,
    has_slot: AtomicBool,
}

impl Queued {
    /// Gives it a slot that was taken for it.
    fn give(&self) {
        self.idle.slots.fetch_add(1, Relaxed);
        self.has_slot.store(true, SeqCst);
        self.thread.unpark();
    }
}

/// A slot of a service, released or kept for its next instance when dropped.
pub(super) struct Slot {
    slots: Arc<Slots>,
    of: Arc<IdleInstances>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let is_last = self.of.slots.fetch_sub(1, SeqCst) == 1;
        if !is_last || !self.of.keep_slot(&self.slots) {
            self.slots.free.release(1);
        }
        self.slots.pass_on();
    }
}

/// What a call runs in.
pub(super) enum Found {
    /// An instance that has become idle meanwhile.
    Idle(Box<IdleInstance>),
    /// A slot for a new one.
    Slot(Slot),
}

impl Slots {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Budget::semaphore(limit),
            waiting: AtomicUsize::new(0),
            queue: Mutex::default(),
        })
    }

    fn try_take(self: &Arc<Self>, of: &Arc<IdleInstances>) -> Option<Slot> {
        // Nobody overtakes those who wait, but with what is kept for it.
        let is_free = of.take_kept_slot(self)
            || self.waiting.load(SeqCst) == 0 && self.has_one_for(of) && self.free.try_take(1);
        is_free.then(|| self.slot(of))
    }

    /// Of the last slots, a service gets one only if more are left than it
    /// holds: one that needs a first or second instance for a moment would wait
    /// for calls of others to end, however long they run.
    fn has_one_for(&self, of: &IdleInstances) -> bool {
        let reserve = self.free.limit() / RESERVE;
        let left = self.free.limit().saturating_sub(self.free.used());
        left > reserve.min(of.slots.load(Relaxed))
    }

    /// Releases a slot that was kept for a service.
    pub(super) fn release_kept(self: &Arc<Self>) {
        self.free.release(1);
        self.pass_on();
    }

    fn slot(self: &Arc<Self>, of: &Arc<IdleInstances>) -> Slot {
        of.slots.fetch_add(1, Relaxed);
        Slot {
            slots: Arc::clone(self),
            of: Arc::clone(of),
        }
    }

    /// A slot for a service, or an instance of its that has become idle.
    /// `reclaim` gives up idle instances: the last one of a service only for
    /// one that holds no slot.
    pub(super) fn take(
        self: &Arc<Self>,
        of: &Arc<IdleInstances>,
        waiter: Waiter<'_>,
        reclaim: impl Fn(IdleEviction),
    ) -> Result<Found, WaitError> {
        if let Some(slot) = self.try_take(of) {
            return Ok(Found::Slot(slot));
        }
        waiter.wait(|| self.wait(of, waiter, reclaim))
    }

    fn wait(
        self: &Arc<Self>,
        of: &Arc<IdleInstances>,
        waiter: Waiter<'_>,
        reclaim: impl Fn(IdleEviction),
    ) -> Result<Found, WaitError> {
        let queued = Arc::new(Queued {
            idle: Arc::clone(of),
            thread: thread::current(),
            has_slot: AtomicBool::new(false),
        });
        // A waiter counts itself before it looks again, a slot is released
        // before its giver looks for waiters: one of the two sees the other.
        lock(&self.queue).push(Arc::clone(&queued));
        self.waiting.fetch_add(1, SeqCst);
        queued.idle.begin_wait();
        let mut looks = waiter.looks();
        let mut missed = WaitError::Late;
        let mut idle_instance = None;
        loop {
            reclaim(IdleEviction::Surplus);
            self.pass_on();
            if !queued.has_slot.load(SeqCst) && queued.idle.slots.load(Relaxed) == 0 {
                reclaim(IdleEviction::One);
                self.pass_on();
            }
            if queued.has_slot.load(SeqCst) {
                break;
            }
            idle_instance = queued.idle.take();
            if idle_instance.is_some() {
                break;
            }
            thread::park_timeout(looks.next.saturating_duration_since(Instant::now()));
            if let Err(why) = looks.look() {
                missed = why;
                break;
            }
        }
        queued.idle.end_wait();
        lock(&self.queue).retain(|other| !Arc::ptr_eq(other, &queued));
        self.waiting.fetch_sub(1, SeqCst);
        // Nobody gives it one from here on.
        let slot = queued.has_slot.load(SeqCst).then(|| Slot {
            slots: Arc::clone(self),
            of: Arc::clone(&queued.idle),
        });
        self.pass_on();
        match idle_instance {
            // A slot that came at the same time is released.
            Some(idle_instance) => Ok(Found::Idle(Box::new(idle_instance))),
            None => slot.map(Found::Slot).ok_or(missed),
        }
    }

    /// Gives free slots to those that wait: first to the service that holds
    /// fewest, of its calls to the one that waits longest.
    fn pass_on(self: &Arc<Self>) {
        if self.waiting.load(SeqCst) == 0 {
            return;
        }
        let queue = lock(&self.queue);
        for one in queue.iter() {
            if !one.has_slot.load(SeqCst) && one.idle.take_kept_slot(self) {
                one.give();
            }
        }
        loop {
            let without = queue.iter().filter(|one| !one.has_slot.load(SeqCst));
            let Some(next) = without.min_by_key(|one| one.idle.slots.load(Relaxed)) else {
                return;
            };
            if !self.has_one_for(&next.idle) || !self.free.try_take(1) {
                return;
            }
            next.give();
        }
    }

    pub(super) fn has_waiters(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }
}
