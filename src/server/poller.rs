//! Where connections wait without a thread, and how workers get those that have
//! something to do.
//!
//! Each connection slot has a parking slot. The connection is
//! parked there, or a worker owns it; which of the two, and the events that
//! arrive meanwhile, change under the lock of the parking slot. So no event is
//! lost: whoever delivers one finds the connection parked and has it served, or
//! leaves the event for the worker that parks it. epoll reports each arrival
//! once, to one worker.

use std::{
    collections::VecDeque,
    io, mem,
    time::{Duration, Instant},
};

use crate::system::{
    self, AtomicBool, AtomicU64, AtomicUsize, Channel, Epoll, Mutex,
    Ordering::{Relaxed, SeqCst},
    Ready, lock,
};

/// Connections that a worker takes at once where the last ones were quick; else
/// one, so that none waits for another while a worker is idle. Four save three
/// of four waits.
const MOST_AT_ONCE: usize = 4;

/// Deadlines are rounded up to this fraction of the remaining time, at most by
/// the longest step, so that those of many connections pass together.
const STEPS: u32 = 32;
const SHORTEST_STEP: Duration = Duration::from_millis(1);
const LONGEST_STEP: Duration = Duration::from_secs(1);

/// Longest wait for events.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Longest wait of the reserve, which only the shutdown ends.
const LONGEST_REST: Duration = Duration::from_secs(3600);

/// No deadline.
const NEVER: u64 = u64::MAX;

/// Events for the owner of a connection, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Events(u8);

impl Events {
    /// There may be something to read.
    pub(crate) const READABLE: Self = Self(1);
    /// The socket may take bytes again.
    pub(crate) const WRITABLE: Self = Self(2);
    /// The peer has closed its end of the stream.
    pub(crate) const PEER_CLOSED: Self = Self(4);
    /// A call that was left behind has answered.
    pub(crate) const ANSWER: Self = Self(8);
    /// It is to close: see [`Peer::close_request`].
    pub(crate) const CLOSE: Self = Self(16);
    /// A deadline has passed.
    pub(crate) const OVERDUE: Self = Self(32);
    /// What was postponed may begin.
    pub(crate) const RETRY: Self = Self(64);

    pub(crate) fn is_none(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn add(&mut self, events: Self) {
        self.0 |= events.0;
    }

    pub(crate) fn has(self, events: Self) -> bool {
        self.0 & events.0 != 0
    }
}

/// What can be parked: a connection.
pub(crate) trait Parked {
    /// Its slot.
    fn slot(&self) -> usize;
    /// Its socket, until it is closed.
    fn channel(&self) -> Option<&Channel>;
    /// When it has to be served, whatever happens.
    fn deadline(&self) -> Option<Instant>;
    /// Whether there is something to do without an event.
    fn goes_on(&self) -> bool;
    /// Whether it waits until the call of a message may begin.
    fn is_postponed(&self) -> bool;
}

/// What a worker looks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PollOptions {
    /// What was postponed may begin.
    pub(crate) may_begin: bool,
    /// Waits where nothing is ready.
    pub(crate) waits: bool,
    /// Queued connections come before events.
    pub(crate) takes_queued: bool,
    /// The last connections were quick.
    pub(crate) is_quick: bool,
}

/// Where the connection of a slot is parked.
struct ParkingSlot<C> {
    inner: Mutex<Inner<C>>,
    /// Milliseconds from the poller's start to the deadline of the connection
    /// that is parked here.
    due: AtomicU64,
}

struct Inner<C> {
    connection: Option<Box<C>>,
    /// Events that its owner has yet to take.
    events: Events,
    /// Its slot is among those that are postponed.
    is_postponed: bool,
}

/// All parked connections, and which of them have something to do.
pub(crate) struct Poller<C> {
    epoll: Epoll,
    parking: Box<[ParkingSlot<C>]>,
    /// Slots of parked connections that have something to do that epoll does
    /// not report.
    queue: Queue<usize>,
    /// Slots of parked connections whose call could not begin.
    postponed: Queue<usize>,
    /// Polling workers, and those of them that are in a call without a
    /// replacement.
    workers: usize,
    absent: AtomicUsize,
    /// Where the reserve waits until all are absent. No socket is watched.
    reserve: Epoll,
    started: Instant,
    /// No deadline passes before this.
    earliest: AtomicU64,
    sweeps: AtomicBool,
    shut_down: AtomicBool,
}

/// A connection that is to be served, and the events that it has yet to take.
pub(crate) type Taken<C> = (Box<C>, Events);

/// What waits for a worker, and how much that is without the lock.
pub(crate) struct Queue<T> {
    waiting: Mutex<VecDeque<T>>,
    count: AtomicUsize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            count: AtomicUsize::new(0),
        }
    }
}

impl<T> Queue<T> {
    pub(crate) fn push(&self, last: T) {
        let mut waiting = lock(&self.waiting);
        waiting.push_back(last);
        self.count.store(waiting.len(), SeqCst);
    }

    pub(crate) fn pop(&self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        let mut waiting = lock(&self.waiting);
        let first = waiting.pop_front();
        self.count.store(waiting.len(), SeqCst);
        first
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(SeqCst) == 0
    }
}

impl<C: Parked> Poller<C> {
    /// Creates a poller for so many connections and workers.
    ///
    /// # Errors
    /// If the system has no epoll.
    pub(crate) fn new(slots: usize, workers: usize) -> io::Result<Self> {
        let parking_slot = |_| ParkingSlot {
            inner: Mutex::new(Inner {
                connection: None,
                events: Events::default(),
                is_postponed: false,
            }),
            due: AtomicU64::new(NEVER),
        };
        Ok(Self {
            epoll: Epoll::new()?,
            parking: (0..slots).map(parking_slot).collect(),
            queue: Queue::default(),
            postponed: Queue::default(),
            workers,
            absent: AtomicUsize::new(0),
            reserve: Epoll::new()?,
            started: system::now(),
            earliest: AtomicU64::new(NEVER),
            sweeps: AtomicBool::new(false),
            shut_down: AtomicBool::new(false),
        })
    }

    /// Parks a new connection until its first bytes arrive.
    ///
    /// # Errors
    /// If the system can't watch it; then it is closed.
    pub(crate) fn begin(&self, connection: Box<C>) -> io::Result<()> {
        let slot = connection.slot();
        let parking_slot = &self.parking[slot];
        let mut inner = lock(&parking_slot.inner);
        // Events of a connection that had this slot before.
        inner.events = Events::default();
        if let Some(channel) = connection.channel() {
            self.epoll.add(channel, slot)?;
        }
        if self.park_locked(parking_slot, &mut inner, connection) {
            self.wake();
        }
        Ok(())
    }

    /// Stops watching a socket that another thread takes over.
    pub(crate) fn forget(&self, channel: &Channel) {
        self.epoll.forget(channel);
    }

    /// Reports no events of a connection whose worker waits for its peer.
    pub(crate) fn pause(&self, connection: &C) {
        if let Some(channel) = connection.channel() {
            self.epoll.pause(channel, connection.slot());
        }
    }

    /// Reports them again, and what has arrived.
    pub(crate) fn resume(&self, connection: &C) {
        if let Some(channel) = connection.channel() {
            self.epoll.resume(channel, connection.slot());
        }
    }

    /// Parks a connection that a worker is done with for now. Returns whether a
    /// worker must look for the next one: the caller, or one that it wakes.
    #[must_use]
    pub(crate) fn park(&self, connection: Box<C>) -> bool {
        let slot = connection.slot();
        let parking_slot = &self.parking[slot];
        let (goes_on, is_postponed) = (connection.goes_on(), connection.is_postponed());
        let mut inner = lock(&parking_slot.inner);
        let goes_on = goes_on || !inner.events.is_none();
        let is_sooner = self.park_locked(parking_slot, &mut inner, connection);
        let is_new = is_postponed && !mem::replace(&mut inner.is_postponed, true);
        drop(inner);
        if goes_on {
            self.queue.push(slot);
        }
        if is_new {
            self.postponed.push(slot);
        }
        goes_on || is_postponed || is_sooner
    }

    /// Has postponed connections tried again, because a call that waited has
    /// begun or ended.
    pub(crate) fn retry_postponed(&self) {
        if !self.postponed.is_empty() {
            self.wake();
        }
    }

    /// Takes a postponed connection, to try it again.
    fn retry(&self) -> Option<Taken<C>> {
        while let Some(slot) = self.postponed.pop() {
            let parking_slot = &self.parking[slot];
            let mut inner = lock(&parking_slot.inner);
            inner.is_postponed = false;
            if let Some(connection) = inner
                .connection
                .take_if(|connection| connection.is_postponed())
            {
                inner.events.add(Events::RETRY);
                return Some((connection, mem::take(&mut inner.events)));
            }
        }
        None
    }

    /// Counts a worker that is in a call without a replacement.
    pub(crate) fn is_absent(&self) {
        if self.absent.fetch_add(1, SeqCst) + 1 >= self.workers {
            self.reserve.wake();
        }
    }

    /// Counts that worker no longer: it is back, or it has a replacement.
    pub(crate) fn is_back(&self) {
        self.absent.fetch_sub(1, SeqCst);
    }

    /// Whether no worker polls but the reserve.
    pub(crate) fn all_are_absent(&self) -> bool {
        self.absent.load(SeqCst) >= self.workers
    }

    /// Waits, as the reserve, until all others are absent or the server shuts
    /// down.
    pub(crate) fn wait_as_reserve(&self) {
        while !self.all_are_absent() && !self.is_shut_down() {
            self.reserve.wait(&mut Vec::new(), 1, LONGEST_REST);
        }
    }

    /// Parks it under the lock. Returns whether its deadline passes before all
    /// others.
    fn park_locked(
        &self,
        parking_slot: &ParkingSlot<C>,
        inner: &mut Inner<C>,
        connection: Box<C>,
    ) -> bool {
        let due = connection.deadline().map_or(NEVER, |at| self.rounded(at));
        inner.connection = Some(connection);
        parking_slot.due.store(due, SeqCst);
        due < self.earliest.load(SeqCst) && due < self.earliest.fetch_min(due, SeqCst)
    }

    /// Wakes one waiting worker.
    pub(crate) fn wake(&self) {
        self.epoll.wake();
    }

    /// Delivers events to the connection of a slot, which any free worker then
    /// serves.
    pub(crate) fn deliver(&self, slot: usize, events: Events) {
        let mut inner = lock(&self.parking[slot].inner);
        inner.events.add(events);
        let is_parked = inner.connection.is_some();
        drop(inner);
        if is_parked {
            self.queue.push(slot);
            self.epoll.wake();
        }
    }

    /// Delivers events and takes the connection, if it is parked, for the
    /// caller to serve.
    pub(crate) fn take_with(&self, slot: usize, events: Events) -> Option<Taken<C>> {
        self.take(slot, events)
    }

    /// Takes a parked connection without events, if it satisfies a condition.
    pub(crate) fn take_if(
        &self,
        slot: usize,
        may_leave: impl FnOnce(&C) -> bool,
    ) -> Option<Box<C>> {
        let mut inner = lock(&self.parking[slot].inner);
        // Its own events are served first.
        let has_events = !inner.events.is_none();
        inner
            .connection
            .take_if(|connection| !has_events && may_leave(connection))
    }

    /// Waits for a connection that has something to do. Returns none after a
    /// while.
    pub(crate) fn next(
        &self,
        options: PollOptions,
        ready: &mut Vec<Ready>,
    ) -> Option<(Taken<C>, Instant)> {
        if !self.postponed.is_empty()
            && options.may_begin
            && let Some(taken) = self.retry()
        {
            return Some((taken, system::now()));
        }
        let queued = !self.queue.is_empty();
        // Alternately: those that go on, and those that have events.
        if queued
            && options.takes_queued
            && let Some(taken) = self.dequeue()
        {
            return Some((taken, system::now()));
        }
        let timeout = if queued || !options.waits {
            Duration::ZERO
        } else {
            self.timeout()
        };
        let most = if options.is_quick { MOST_AT_ONCE } else { 1 };
        if self.epoll.wait(ready, most, timeout) && !options.waits {
            // That was for one who waits, and looks at everything.
            self.epoll.wake();
        }
        let now = system::now();
        let mut first = None;
        for ready in ready.drain(..) {
            let mut events = Events::default();
            for (is_so, one) in [
                (ready.readable, Events::READABLE),
                (ready.writable, Events::WRITABLE),
                (ready.ended, Events::PEER_CLOSED),
            ] {
                if is_so {
                    events.add(one);
                }
            }
            if first.is_none() {
                first = self.take(ready.slot, events);
            } else {
                // The first worker that is free takes it.
                let mut inner = lock(&self.parking[ready.slot].inner);
                inner.events.add(events);
                let is_parked = inner.connection.is_some();
                drop(inner);
                if is_parked {
                    self.queue.push(ready.slot);
                }
            }
        }
        let taken = first.or_else(|| self.dequeue())?;
        Some((taken, now))
    }

    fn timeout(&self) -> Duration {
        let earliest = self.earliest.load(SeqCst);
        let now = self.millis(system::now());
        Duration::from_millis(earliest.saturating_sub(now)).min(LONGEST_WAIT)
    }

    fn dequeue(&self) -> Option<Taken<C>> {
        while let Some(slot) = self.queue.pop() {
            // Where a worker owns it, its events are taken when it is parked.
            if let Some(taken) = self.take(slot, Events::default()) {
                return Some(taken);
            }
        }
        None
    }

    fn take(&self, slot: usize, events: Events) -> Option<Taken<C>> {
        let mut inner = lock(&self.parking[slot].inner);
        inner.events.add(events);
        let connection = inner.connection.take()?;
        Some((connection, mem::take(&mut inner.events)))
    }

    /// Queues the connections whose deadline has passed; one worker at a time.
    pub(crate) fn sweep(&self, now: Instant) {
        let mut now = self.millis(now);
        // A worker that came meanwhile has gone on without a sweep.
        while self.earliest.load(Relaxed) <= now && !self.sweeps.swap(true, SeqCst) {
            self.sweep_once(now);
            self.sweeps.store(false, SeqCst);
            now = self.millis(system::now());
        }
    }

    fn sweep_once(&self, now: u64) {
        // A connection that is parked from now on counts by itself.
        self.earliest.store(NEVER, SeqCst);
        let mut earliest = NEVER;
        for (slot, parking_slot) in self.parking.iter().enumerate() {
            let due = parking_slot.due.load(SeqCst);
            if due > now {
                earliest = earliest.min(due);
                continue;
            }
            let mut inner = lock(&parking_slot.inner);
            // It may have been parked with another deadline since.
            if inner.connection.is_some() && parking_slot.due.load(SeqCst) <= now {
                parking_slot.due.store(NEVER, SeqCst);
                inner.events.add(Events::OVERDUE);
                drop(inner);
                self.queue.push(slot);
            }
        }
        self.earliest.fetch_min(earliest, SeqCst);
    }

    /// How late the latest parked connection is.
    #[allow(dead_code, reason = "the simulation asks")]
    pub(crate) fn overdue_for(&self, now: Instant) -> Option<Duration> {
        let now = self.millis(now);
        let late = |parking_slot: &ParkingSlot<C>| {
            let is_parked = lock(&parking_slot.inner).connection.is_some();
            let due = parking_slot.due.load(SeqCst);
            (is_parked && due < now).then(|| Duration::from_millis(now - due))
        };
        self.parking.iter().filter_map(late).max()
    }

    /// Whether a parked connection is queued.
    #[allow(dead_code, reason = "the simulation asks")]
    pub(crate) fn has_queued(&self) -> bool {
        let slots = lock(&self.queue.waiting);
        let is_parked = |slot: &usize| lock(&self.parking[*slot].inner).connection.is_some();
        slots.iter().any(is_parked)
    }

    /// Whether a postponed connection is parked while workers poll.
    #[allow(dead_code, reason = "the simulation asks")]
    pub(crate) fn is_kept_waiting(&self) -> bool {
        let is_postponed = |parking_slot: &ParkingSlot<C>| {
            let inner = lock(&parking_slot.inner);
            inner.connection.as_ref().is_some_and(|c| c.is_postponed())
        };
        !self.all_are_absent() && self.parking.iter().any(is_postponed)
    }

    fn millis(&self, at: Instant) -> u64 {
        let millis = at.saturating_duration_since(self.started).as_millis();
        u64::try_from(millis).unwrap_or(NEVER)
    }

    /// Never before the instant.
    fn rounded(&self, at: Instant) -> u64 {
        let remains = at.saturating_duration_since(system::now());
        let step = (remains / STEPS).clamp(SHORTEST_STEP, LONGEST_STEP);
        let step = u64::try_from(step.as_millis()).unwrap_or(1).max(1);
        (self.millis(at) + 1).next_multiple_of(step)
    }

    /// Stops all workers.
    pub(crate) fn shut_down(&self) {
        self.shut_down.store(true, SeqCst);
        // Each worker that is woken wakes the next.
        self.epoll.wake();
        self.reserve.wake();
    }

    /// Whether workers stop.
    pub(crate) fn is_shut_down(&self) -> bool {
        let shut_down = self.shut_down.load(Relaxed);
        if shut_down {
            self.epoll.wake();
        }
        shut_down
    }
}
