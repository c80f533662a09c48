//! Where connections wait for their next request without a thread, and the
//! few threads that are on duty there: each takes a connection that has
//! something to say, serves it, puts it back and looks for the next.
//!
//! The poller tells each arrival once, to one thread, and is not told when a
//! connection comes back: that saves a system call for each request. So who
//! serves a connection reads all that is there, and what arrives meanwhile is
//! noted at its place.
//!
//! Those threads never wait for one peer or one call. Before they would, they
//! [step aside](Poller::step_aside): another thread of the pool takes over the
//! duty, and they go on as the connection's own thread.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    fd::OwnedFd,
    io::Errno,
    time::{ClockId, DynamicClockId, clock_gettime_dynamic},
};

use super::{
    ServerSettings,
    admission::Admission,
    chooser::{Chooser, PERIOD, Sample},
    connection::Connection,
    session::Session,
    shutdown_event::ShutdownEvent,
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

/// Connections that a thread takes from the poller at once where each of the
/// last ones took little; else one, so that none waits for another one while a
/// thread is idle. Four save three of four waits.
const MOST_AT_ONCE: usize = 4;
/// Less than this is little: a few times what waking a thread costs.
const LITTLE: Duration = Duration::from_micros(100);
/// So many have to have taken little: where more than a few calls in a hundred
/// take long, nobody waits for them. A thousand gave next to nothing, because
/// the system interrupts some of any thousand.
const LAST_ONES: u32 = 100;

/// Bounds of the time between two looks at who has waited too long, or whose
/// credentials have ended: an eighth of the shortest timeout, within these.
const SHORTEST_SWEEP: Duration = Duration::from_millis(5);
const LONGEST_SWEEP: Duration = Duration::from_secs(1);

/// Once for each arrival, not for as long as there is something to read.
const INTEREST: EventFlags = EventFlags::IN
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// What is told when the duty is over; slots are smaller.
const OVER: u64 = u64::MAX;

thread_local! {
    /// Whether other connections wait for this thread.
    static ON_DUTY: Cell<bool> = const { Cell::new(false) };
    /// Those that it has taken and not yet served.
    static TAKEN: RefCell<VecDeque<Told>> = const { RefCell::new(VecDeque::new()) };
    /// How many took little, one after the other.
    static QUICK: Cell<u32> = const { Cell::new(0) };
}

/// A connection has something to say.
#[derive(Debug, Clone, Copy)]
struct Told {
    slot: u64,
    /// Its peer says nothing after it: there is an end to read too.
    last: bool,
}

/// The place of a slot.
#[derive(Default)]
struct Place {
    session: Option<Box<Session>>,
    /// More has arrived since a thread took it, or may have.
    more: bool,
}

/// The connections that wait, and what says which of them has something.
pub(super) struct Poller {
    /// None where the system has no epoll: then connections wait in threads.
    epoll: Option<OwnedFd>,
    /// Set from the moment that the duty is over.
    over: ShutdownEvent,
    admission: Arc<Admission>,
    /// By slot.
    places: Box<[Mutex<Place>]>,
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
        let over = ShutdownEvent::new()?;
        let epoll = open_epoll(&over)
            .inspect_err(|error| {
                tracing::warn!("connections wait in threads, epoll can't be used: {error}");
            })
            .ok();
        let now = Instant::now();
        // Without epoll or the time that the processor took, nothing is chosen.
        let chooser = sample(now, 0)
            .filter(|_| settings.waiting == Waiting::Auto && epoll.is_some())
            .map(Chooser::new);
        let wanted = settings.waiting != Waiting::Threads && epoll.is_some();
        let shortest = settings
            .idle_timeout
            .min(settings.read_timeout)
            .min(settings.keep_alive_interval)
            .min(settings.connection_max_age.unwrap_or(Duration::MAX));
        let sweep = shortest / 8;
        let sweep = sweep.clamp(SHORTEST_SWEEP, LONGEST_SWEEP);
        Ok(Self {
            epoll,
            over,
            admission: Arc::clone(admission),
            places: (0..settings.max_connections)
                .map(|_| Mutex::default())
                .collect(),
            wanted: AtomicBool::new(wanted),
            chooses: chooser.is_some(),
            served: Stripes::default(),
            sweep,
            is_busy: AtomicBool::new(false),
            look: Mutex::new(Look {
                chooser,
                next_sweep: now + sweep,
            }),
        })
    }

    /// Puts threads on duty until [`Poller::end`]. False if there are none.
    #[must_use]
    pub(super) fn begin(self: &Arc<Self>) -> bool {
        if self.epoll.is_none() {
            return true;
        }
        let processors = thread::available_parallelism().map_or(1, usize::from);
        (0..processors + MORE_THAN_PROCESSORS).fold(true, |all, _| all & self.relieve())
    }

    /// Nobody is parked any more, and nobody is on duty.
    pub(super) fn end(&self) {
        self.over.set();
    }

    /// Whether connections shall wait here at present.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Relaxed) || self.chooses && self.admission.busy_threads() >= MOST_THREADS
    }

    /// Requests of one connection were served, in this time.
    pub(super) fn served(&self, count: usize, took: Duration) {
        self.served.own().add(count as u64);
        QUICK.set(if took < LITTLE {
            QUICK.get().saturating_add(1)
        } else {
            0
        });
    }

    /// Keeps a session until its peer has something to say, or has waited too
    /// long.
    pub(super) fn park(&self, mut session: Box<Session>) {
        let slot = session.slot();
        let mut place = self.place(slot);
        let more = mem::take(&mut place.more);
        // Adding it tells what has come by now, and so does asking again.
        let told = if session.is_at_poller() {
            if more || session.may_have_more() {
                self.ask_again(&session)
            } else {
                Ok(())
            }
        } else {
            let socket = session.connection().stream().socket().stream();
            let data = EventData::new_u64(slot as u64);
            self.epoll()
                .and_then(|epoll| epoll::add(epoll, socket, data, INTEREST))
        };
        match told {
            Ok(()) => {
                session.set_at_poller();
                place.session = Some(session);
            }
            Err(error) => {
                drop(place);
                static LINES: Limiter = Limiter::new();
                if LINES.allows("no room at the poller") {
                    tracing::error!(
                        "a connection waits in a thread, the poller can't take it: {error}; is fs.epoll.max_user_watches too low?"
                    );
                }
                session.wait_on_thread();
            }
        }
    }

    /// What this connection has to say is told once more, to whoever is on
    /// duty; behind what others have.
    fn ask_again(&self, session: &Session) -> rustix::io::Result<()> {
        let socket = session.connection().stream().socket().stream();
        let data = EventData::new_u64(session.slot() as u64);
        epoll::modify(self.epoll()?, socket, data, INTEREST)
    }

    fn epoll(&self) -> rustix::io::Result<&OwnedFd> {
        self.epoll.as_ref().ok_or(Errno::NOSYS)
    }

    /// A thread waits for what it says from now on, or nobody does: what stays
    /// known to the poller wakes others for nothing.
    pub(super) fn forget(&self, connection: &Connection) {
        if let Some(epoll) = &self.epoll {
            let _ = epoll::delete(epoll, connection.stream().socket().stream());
        }
    }

    /// Whoever is about to wait for one peer or one call gives up the duty,
    /// if it has it, to another thread.
    pub(super) fn step_aside(self: &Arc<Self>) {
        if !ON_DUTY.get() {
            return;
        }
        // The end of the duty is told to each of them.
        for told in TAKEN.take().into_iter().filter(|told| told.slot != OVER) {
            let mut place = self.place(told.slot as usize);
            // One that can't be told about again has ended.
            if place
                .session
                .as_deref()
                .is_none_or(|session| self.ask_again(session).is_err())
            {
                place.more = true;
            }
        }
        if self.relieve() {
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
        // Whoever had the duty may have left it for a slow call.
        QUICK.set(0);
        let _defect = Defect(&self);
        let mut since_look = 0;
        while ON_DUTY.get() {
            match self.next() {
                Some(Told { slot: OVER, .. }) => ON_DUTY.set(false),
                Some(told) => {
                    since_look += 1;
                    let mut place = self.place(told.slot as usize);
                    let session = place.session.take();
                    // Without one, whoever has it asks again.
                    place.more = told.last || session.is_none();
                    drop(place);
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

    /// The next one that has something to say; none after a while.
    fn next(&self) -> Option<Told> {
        TAKEN.with_borrow_mut(|taken| {
            if taken.is_empty() {
                self.wait(taken);
            }
            taken.pop_front()
        })
    }

    fn wait(&self, taken: &mut VecDeque<Told>) {
        let timeout = if self.is_busy.load(Relaxed) {
            PERIOD
        } else {
            self.sweep
        };
        let timeout = Timespec::try_from(timeout).ok();
        let mut events = [Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; MOST_AT_ONCE];
        let most = if QUICK.get() >= LAST_ONES {
            MOST_AT_ONCE
        } else {
            1
        };
        let count = self
            .epoll()
            .and_then(|epoll| epoll::wait(epoll, &mut events[..most], timeout.as_ref()))
            .unwrap_or_else(|error| {
                // It worked at the start, so it may again.
                if error != Errno::INTR {
                    static LINES: Limiter = Limiter::new();
                    if LINES.allows("epoll fails") {
                        tracing::error!("connections are served late, epoll fails: {error}");
                    }
                    thread::sleep(SHORTEST_SWEEP);
                }
                0
            });
        taken.extend(events[..count].iter().map(|event| {
            let flags = event.flags;
            let last = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
            Told {
                slot: event.data.u64(),
                last,
            }
        }));
    }

    /// What has to be done from time to time, by one thread.
    fn look_after(self: &Arc<Self>) {
        let Ok(mut look) = self.look.try_lock() else {
            return;
        };
        let now = Instant::now();
        let Look {
            chooser,
            next_sweep,
        } = &mut *look;
        if let Some(chooser) = chooser.as_mut().filter(|chooser| chooser.is_due(now)) {
            let served = self.served.iter().map(Counter::get).sum();
            if let Some(sample) = sample(now, served) {
                self.wanted
                    .store(chooser.step(sample) == Waiting::Poller, Relaxed);
            }
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
        for slot in 0..self.places.len() {
            let mut place = self.place(slot);
            if place
                .session
                .as_ref()
                .is_some_and(|session| session.is_overdue(now))
                && let Some(session) = place.session.take()
            {
                drop(place);
                // The others need not wait for what its peer takes of it.
                self.step_aside();
                session.find_out();
            }
        }
    }

    fn place(&self, slot: usize) -> MutexGuard<'_, Place> {
        self.places[slot]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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

/// An epoll that reports the end of the duty; only where it can be waited for.
fn open_epoll(over: &ShutdownEvent) -> rustix::io::Result<OwnedFd> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, over, EventData::new_u64(OVER), EventFlags::IN)?;
    let mut nothing = [Event {
        flags: EventFlags::empty(),
        data: EventData::new_u64(0),
    }];
    match epoll::wait(&epoll, &mut nothing, Some(&Timespec::default())) {
        Ok(_) | Err(Errno::INTR) => Ok(epoll),
        Err(error) => Err(error),
    }
}

/// What has been done up to now, and what it took; none where the system does
/// not tell.
fn sample(at: Instant, served: u64) -> Option<Sample> {
    let clock = DynamicClockId::Known(ClockId::ProcessCPUTime);
    let Timespec { tv_sec, tv_nsec } = clock_gettime_dynamic(clock).ok()?;
    let cpu = Duration::new(
        u64::try_from(tv_sec).unwrap_or(0),
        u32::try_from(tv_nsec).unwrap_or(0),
    );
    Some(Sample { at, cpu, served })
}

/// Whether other connections wait for this thread.
pub(super) fn is_on_duty() -> bool {
    ON_DUTY.get()
}
