//! Instances that wait to be used again.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicU8, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread::{self, Thread},
};

use super::{instance::Live, slots::Slots};
use crate::{locks::lock, stripes::Stripes};

/// An instance between two calls: of a service with `isolation = "shared"`, or
/// reset.
pub(super) struct IdleInstance {
    pub(super) live: Live,
    /// Calls that it has served.
    pub(super) calls: u64,
}

/// The idle instances of one component. There are never more than its
/// `concurrency`, since each was made for a call.
pub(super) struct IdleInstances {
    instances: Stripes<Mutex<Vec<IdleInstance>>>,
    /// Of all components together.
    any: Arc<AnyIdle>,
    /// Slots that instances of the component have, idle or not.
    pub(super) slots: AtomicUsize,
    /// One of these that its last instance has left behind.
    kept_slot: Mutex<Option<Arc<Slots>>>,
    /// How many of its calls wait for a slot, and their threads.
    waiting: AtomicUsize,
    waiters: Mutex<Vec<Thread>>,
}

/// Whether there may be idle instances.
#[derive(Default)]
pub(super) struct AnyIdle(AtomicU8);

/// Which idle instances are given up because others need what they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IdleEviction {
    /// Those that are not the last of their component.
    Surplus,
    /// Also the last ones that hold memory which all share.
    Memory,
    /// All.
    All,
    /// One, whichever.
    One,
}

/// Nothing was looked for since the last one came.
const UNSEEN: u8 = 0b111;

impl IdleEviction {
    fn bits(self) -> u8 {
        match self {
            Self::Surplus => 0b001,
            Self::Memory => 0b011,
            Self::All => 0b111,
            Self::One => 0,
        }
    }
}

impl AnyIdle {
    /// Whether it is worth to look for instances to give up. It is not, until
    /// there are others.
    pub(super) fn take(&self, which: IdleEviction) -> bool {
        let bits = which.bits();
        // Asked by everyone who waits, most often for nothing.
        bits == 0
            || self.0.load(Relaxed) & bits != 0 && self.0.fetch_and(!bits, Relaxed) & bits != 0
    }

    #[inline]
    fn set(&self) {
        if self.0.load(Relaxed) != UNSEEN {
            self.0.store(UNSEEN, Relaxed);
        }
    }
}

impl IdleInstances {
    pub(super) fn new(any: &Arc<AnyIdle>) -> Self {
        Self {
            instances: Stripes::default(),
            any: Arc::clone(any),
            slots: AtomicUsize::new(0),
            kept_slot: Mutex::default(),
            waiting: AtomicUsize::new(0),
            waiters: Mutex::default(),
        }
    }

    /// The one that was used last on this processor, or else any: its memory
    /// is most likely still in the processor's caches.
    #[inline]
    pub(super) fn take(&self) -> Option<IdleInstance> {
        let own = lock(self.instances.own()).pop();
        own.or_else(|| self.instances.iter().find_map(|stripe| lock(stripe).pop()))
    }

    #[inline]
    pub(super) fn put(&self, idle_instance: IdleInstance) {
        let mut idle = lock(self.instances.own());
        idle.push(idle_instance);
        // Within the lock: who clears the mark then sees this instance, or
        // this sees that the mark was cleared.
        self.any.set();
        drop(idle);
        // One that counts itself just now looks after that.
        if self.waiting.load(SeqCst) > 0 {
            self.wake_one();
        }
    }

    #[cold]
    fn wake_one(&self) {
        if let Some(thread) = lock(&self.waiters).first() {
            thread.unpark();
        }
    }

    /// This thread waits for an instance to become idle, until it says so.
    pub(super) fn begin_wait(&self) {
        lock(&self.waiters).push(thread::current());
        self.waiting.fetch_add(1, SeqCst);
    }

    pub(super) fn end_wait(&self) {
        self.waiting.fetch_sub(1, SeqCst);
        let own = thread::current().id();
        let mut waiters = lock(&self.waiters);
        if let Some(index) = waiters.iter().position(|thread| thread.id() == own) {
            waiters.remove(index);
        }
        drop(waiters);
        // What this one was woken for may be there for another one.
        self.wake_one();
    }

    /// Keeps the slot of the last instance for the next one. Returns false if
    /// one is kept already.
    pub(super) fn keep_slot(&self, of: &Arc<Slots>) -> bool {
        let mut kept = lock(&self.kept_slot);
        let keeps = kept.is_none();
        if keeps {
            *kept = Some(Arc::clone(of));
        }
        keeps
    }

    /// Takes the slot that is kept, if it is one of these.
    pub(super) fn take_kept_slot(&self, of: &Arc<Slots>) -> bool {
        let is_of = |slots: &mut Arc<Slots>| Arc::ptr_eq(slots, of);
        lock(&self.kept_slot).take_if(is_of).is_some()
    }

    /// Releases the slot that is kept.
    fn release_kept_slot(&self) -> bool {
        let kept = lock(&self.kept_slot).take();
        kept.map(|slots| slots.release_kept()).is_some()
    }

    /// Gives instances up, because others need their slots and memory; says
    /// whether there were any.
    pub(super) fn evict(&self, which: IdleEviction) -> bool {
        if which == IdleEviction::One {
            // The slot of the last one is kept at first.
            return self.release_kept_slot()
                || self.take().map(drop).is_some() | self.release_kept_slot();
        }
        let mut keeps = which != IdleEviction::All;
        let mut any = false;
        for stripe in self.instances.iter() {
            let mut stripe = lock(stripe);
            let mut idle = std::mem::take(&mut *stripe);
            let may_stay = |idle_instance: &IdleInstance| {
                which == IdleEviction::Surplus || !idle_instance.live.holds_memory()
            };
            if keeps && idle.last().is_some_and(may_stay) {
                stripe.extend(idle.pop());
                keeps = false;
            }
            drop(stripe);
            any |= !idle.is_empty();
            // Outside of the lock: ending an instance takes its time.
            drop(idle);
        }
        any
    }
}

impl Drop for IdleInstances {
    fn drop(&mut self) {
        self.release_kept_slot();
    }
}
