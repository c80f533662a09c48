//! Where connections wait for their next request without a thread, and the
//! few threads that are on duty there: each takes one connection that has
//! something to say, serves it, puts it back and looks for the next.
//!
//! Those threads never wait for one peer or one call. Before they would, they
//! [step aside](Poller::step_aside): another thread of the pool takes over the
//! duty, and they go on as the connection's own thread.

use std::{
    cell::Cell,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{
        EventfdFlags, Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
        eventfd,
    },
    fd::OwnedFd,
    time::{ClockId, clock_gettime},
};

use super::{
    ServerSettings,
    admission::Admission,
    chooser::{Chooser, PERIOD, Sample},
    session::Session,
};
use crate::{config::Waiting, log::Limiter, metrics::Counter, stripes::Stripes};

/// Threads on duty beyond one for each processor, so that none of those is
/// idle while a thread is in the kernel.
const MORE_THAN_PROCESSORS: usize = 1;

/// Threads that have something to do, from which on no connection is given one
/// because that is cheaper: so many are dear whatever the clients do.
const MOST_THREADS: usize = 256;

/// Connections that a thread serves before it looks at the time.
const LOOK_AFTER: u32 = 64;

/// Bounds of the time between two looks at who has waited too long: an eighth
/// of the shortest timeout, within these.
const SHORTEST_SWEEP: Duration = Duration::from_millis(5);
const LONGEST_SWEEP: Duration = Duration::from_secs(1);

/// What is told when the duty is over; slots are smaller.
const OVER: u64 = u64::MAX;

thread_local! {
    /// Whether other connections wait for this thread.
    static ON_DUTY: Cell<bool> = const { Cell::new(false) };
}

/// The connections that wait, and what says which of them has something.
pub(super) struct Poller {
    epoll: OwnedFd,
    /// Readable from the moment that the duty is over.
    over: OwnedFd,
    admission: Arc<Admission>,
    /// By slot.
    parked: Box<[Mutex<Option<Box<Session>>>]>,
    /// Whether connections shall wait here at present.
    wanted: AtomicBool,
    /// The settings leave it to what is measured.
    chooses: bool,
    /// Requests that were served, wherever their connections waited.
    served: Stripes<Counter>,
    sweep: Duration,
    /// There is enough to do to choose by.
    is_busy: AtomicBool,
    look: Mutex<Look>,
}

/// What one thread looks after for all.
struct Look {
    /// None where the settings have chosen.
    chooser: Option<Chooser>,
    next_sweep: Instant,
}

impl Poller {
    pub(super) fn new(settings: &ServerSettings, admission: &Arc<Admission>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let over = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &over, EventData::new_u64(OVER), EventFlags::IN)?;
        let now = Instant::now();
        let chooser = (settings.waiting == Waiting::Auto).then(|| Chooser::new(sample(now, 0)));
        let sweep = settings.idle_timeout.min(settings.read_timeout) / 8;
        let sweep = sweep.clamp(SHORTEST_SWEEP, LONGEST_SWEEP);
        Ok(Self {
            epoll,
            over,
            admission: Arc::clone(admission),
            parked: (0..settings.max_connections).map(|_| Mutex::default()).collect(),
            wanted: AtomicBool::new(settings.waiting != Waiting::Threads),
            chooses: chooser.is_some(),
            served: Stripes::default(),
            sweep,
            is_busy: AtomicBool::new(false),
            look: Mutex::new(Look { chooser, next_sweep: now + sweep }),
        })
    }

    /// Puts threads on duty until [`Poller::end`]. False if there are none.
    #[must_use]
    pub(super) fn begin(self: &Arc<Self>) -> bool {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        (0..processors + MORE_THAN_PROCESSORS).fold(true, |all, _| all & self.relieve())
    }

    /// Nobody is parked any more, and nobody is on duty.
    pub(super) fn end(&self) {
        // Nobody reads it, so it stays readable.
        let _ = rustix::io::write(&self.over, &1_u64.to_ne_bytes());
    }

    /// Whether connections shall wait here at present.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Relaxed) || self.chooses && self.admission.busy_threads() >= MOST_THREADS
    }

    /// Requests were served.
    pub(super) fn served(&self, count: usize) {
        self.served.own().add(count as u64);
    }

    /// Keeps a session until its peer has something to say, or has waited too
    /// long.
    pub(super) fn park(&self, session: Box<Session>) {
        let slot = session.slot();
        let mut place = self.place(slot);
        let session = place.insert(session);
        // Once, so that it is one thread's until that one puts it back; and
        // what has come meanwhile is told at once.
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ONESHOT;
        let data = EventData::new_u64(slot as u64);
        let socket = session.connection().stream().socket().stream();
        let told = match epoll::modify(&self.epoll, socket, data, flags) {
            Err(rustix::io::Errno::NOENT) => epoll::add(&self.epoll, socket, data, flags),
            told => told,
        };
        if let Err(error) = told {
            let session = place.take();
            drop(place);
            static LINES: Limiter = Limiter::new();
            if LINES.allows("no room at the poller") {
                tracing::error!(
                    "a connection waits in a thread, the poller can't take it: {error}; is fs.epoll.max_user_watches too low?"
                );
            }
            if let Some(session) = session {
                session.wait_on_thread();
            }
        }
    }

    /// Whoever is about to wait for one peer or one call gives up the duty,
    /// if it has it, to another thread.
    pub(super) fn step_aside(self: &Arc<Self>) {
        if ON_DUTY.get() && self.relieve() {
            ON_DUTY.set(false);
        }
    }

    /// One thread more on duty; false if there is none.
    fn relieve(self: &Arc<Self>) -> bool {
        let poller = Arc::clone(self);
        self.admission.execute(move || poller.serve()).is_ok()
    }

    /// What a thread does on duty.
    fn serve(self: Arc<Self>) {
        ON_DUTY.set(true);
        let _defect = Defect(&self);
        let mut since_look = 0;
        while ON_DUTY.get() {
            match self.wait() {
                Some(OVER) => ON_DUTY.set(false),
                Some(slot) => {
                    since_look += 1;
                    // It may have been taken for having waited too long.
                    let session = self.place(slot as usize).take();
                    if let Some(session) = session {
                        session.wake();
                    }
                }
                None => since_look = LOOK_AFTER,
            }
            if since_look >= LOOK_AFTER {
                since_look = 0;
                self.look_after();
            }
        }
    }

    /// The next one that has something to say, by its slot; none after a
    /// while.
    fn wait(&self) -> Option<u64> {
        let timeout = if self.is_busy.load(Relaxed) { PERIOD } else { self.sweep };
        let timeout = Timespec::try_from(timeout).ok();
        // One at a time: what else there is, another thread may take.
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
        let count = epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()).unwrap_or(0);
        (count > 0).then(|| events[0].data.u64())
    }

    /// What has to be done from time to time, by one thread.
    fn look_after(self: &Arc<Self>) {
        let Ok(mut look) = self.look.try_lock() else { return };
        let now = Instant::now();
        let Look { chooser, next_sweep } = &mut *look;
        if let Some(chooser) = chooser.as_mut().filter(|chooser| chooser.is_due(now)) {
            let served = self.served.iter().map(Counter::get).sum();
            self.wanted.store(chooser.step(sample(now, served)) == Waiting::Poller, Relaxed);
            self.is_busy.store(chooser.is_busy(), Relaxed);
        }
        if *next_sweep <= now {
            *next_sweep = now + self.sweep;
            drop(look);
            self.send_away_overdue(now);
        }
    }

    /// Has those who have waited too long told so.
    fn send_away_overdue(self: &Arc<Self>, now: Instant) {
        for slot in 0..self.parked.len() {
            let mut place = self.place(slot);
            if place.as_ref().is_some_and(|session| session.is_overdue(now))
                && let Some(session) = place.take()
            {
                drop(place);
                // The others need not wait for what its peer takes of it.
                self.step_aside();
                session.find_out();
            }
        }
    }

    fn place(&self, slot: usize) -> MutexGuard<'_, Option<Box<Session>>> {
        self.parked[slot].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A defect takes a thread, not the duty.
struct Defect<'a>(&'a Arc<Poller>);

impl Drop for Defect<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.step_aside();
        }
    }
}

/// What has been done up to now, and what it took.
fn sample(at: Instant, served: u64) -> Sample {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::ProcessCPUTime);
    let cpu = Duration::new(u64::try_from(tv_sec).unwrap_or(0), u32::try_from(tv_nsec).unwrap_or(0));
    Sample { at, cpu, served }
}

/// Whether other connections wait for this thread.
pub(super) fn is_on_duty() -> bool {
    ON_DUTY.get()
}
