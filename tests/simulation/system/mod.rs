//! What the server takes of the system, simulated: a clock that stands until
//! somebody moves it, sockets in memory, an epoll that tells each arrival once,
//! and threads and locks of which a seeded scheduler chooses the next at each
//! step (shuttle).

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use mb_server::transport::Proxied;
pub use mb_server::transport::Received;
use rustls::pki_types::CertificateDer;
pub use shuttle::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};
use shuttle::{
    sync::Condvar,
    thread::{self, ThreadId},
};

/// As the server has it.
pub const LINGER: Duration = Duration::from_secs(2);

thread_local! {
    /// All simulated threads run on one, one after the other.
    static WORLD: RefCell<Option<Arc<World>>> = const { RefCell::new(None) };
}

/// One simulated machine.
pub struct World {
    begun: Instant,
    inner: std::sync::Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    elapsed: Duration,
    /// Threads of the server.
    threads: usize,
    epolls: Vec<Arc<Events>>,
    clock: Arc<Gate>,
    /// Those that were asked for.
    known: HashMap<ThreadId, Thread>,
}

impl World {
    /// Begins a new one, in which all simulated threads are from now on.
    pub fn begin() -> Arc<Self> {
        let world = Arc::new(Self {
            begun: Instant::now(),
            inner: std::sync::Mutex::default(),
        });
        WORLD.set(Some(Arc::clone(&world)));
        world
    }

    /// That of the thread that asks.
    pub fn here() -> Arc<Self> {
        WORLD.with_borrow(|world| Arc::clone(world.as_ref().expect("a world")))
    }

    fn now(&self) -> Instant {
        self.begun + self.inner.lock().unwrap().elapsed
    }

    /// Moves the clock.
    pub fn pass(&self, time: Duration) {
        let mut inner = self.inner.lock().unwrap();
        inner.elapsed += time;
        let (epolls, clock) = (inner.epolls.clone(), Arc::clone(&inner.clock));
        drop(inner);
        clock.open();
        epolls.iter().for_each(|events| events.gate.open());
    }

    /// A guest waits for the clock to move.
    pub fn wait_for_clock(&self) {
        let clock = Arc::clone(&self.inner.lock().unwrap().clock);
        let turn = clock.turn();
        clock.wait(turn);
    }

    /// Whether nobody has anything to do before the clock moves.
    pub fn is_at_rest(&self) -> bool {
        let inner = self.inner.lock().unwrap();
        let (threads, epolls) = (inner.threads, inner.epolls.clone());
        let resting = inner.clock.resting();
        drop(inner);
        let nothing = |events: &Arc<Events>| {
            let state = events.state.lock().unwrap();
            // A poke is for those who wait.
            state.ready.is_empty() && (state.wakes == 0 || events.gate.resting() == 0)
        };
        let polling: usize = epolls.iter().map(|events| events.gate.resting()).sum();
        threads == resting + polling && epolls.iter().all(nothing)
    }

    /// Threads of the server.
    pub fn threads(&self) -> usize {
        self.inner.lock().unwrap().threads
    }
}

/// The time.
pub fn now() -> Instant {
    World::here().now()
}

/// A thread that others may wake.
#[derive(Clone, Default)]
pub struct Thread(Arc<Parking>);

#[derive(Default)]
struct Parking {
    is_woken: std::sync::atomic::AtomicBool,
    /// Nanoseconds that it has computed.
    ran: std::sync::atomic::AtomicU64,
}

impl Thread {
    pub fn unpark(&self) {
        self.0
            .is_woken
            .store(true, std::sync::atomic::Ordering::SeqCst);
        World::here().pass(Duration::ZERO);
    }
}

/// The thread that asks.
pub fn current() -> Thread {
    let id = thread::current().id();
    let world = World::here();
    let mut inner = world.inner.lock().unwrap();
    inner.known.entry(id).or_default().clone()
}

/// Waits until somebody wakes this thread, or so long.
pub fn park_timeout(timeout: Duration) {
    let (world, own) = (World::here(), current());
    let until = world.now() + timeout;
    thread::yield_now();
    loop {
        let clock = Arc::clone(&world.inner.lock().unwrap().clock);
        let turn = clock.turn();
        let is_woken = &own.0.is_woken;
        if is_woken.swap(false, std::sync::atomic::Ordering::SeqCst) || world.now() >= until {
            return;
        }
        clock.wait(turn);
    }
}

/// How long this thread has computed.
pub fn thread_time() -> Duration {
    let ran = current().0.ran.load(std::sync::atomic::Ordering::SeqCst);
    Duration::from_nanos(ran)
}

/// This thread computes for so long, while the clock moves on.
pub fn compute(time: Duration) {
    let world = World::here();
    let until = world.now() + time;
    while world.now() < until {
        world.wait_for_clock();
    }
    let nanos = u64::try_from(time.as_nanos()).unwrap();
    let own = current();
    own.0
        .ran
        .fetch_add(nanos, std::sync::atomic::Ordering::SeqCst);
}

/// Takes a lock.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A socket in memory, as both sides know it.
pub struct Wire {
    inner: std::sync::Mutex<Ends>,
}

#[derive(Default)]
struct Ends {
    /// From the client.
    inbound: VecDeque<u8>,
    /// Bytes of it that the server has read.
    read: usize,
    /// The client says nothing more.
    inbound_over: bool,
    /// The client is gone.
    reset: bool,
    /// To the client.
    outbound: Vec<u8>,
    /// Bytes that fit there.
    room: usize,
    /// The server says nothing more.
    pub outbound_over: bool,
    /// The server could not write: it gets an event once it can.
    wants_room: bool,
    /// The server has closed it.
    closed: bool,
    watched: Option<(Arc<Events>, usize)>,
}

impl Wire {
    /// One into which the server can write so many bytes that are not taken.
    pub fn new(room: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: std::sync::Mutex::new(Ends {
                room,
                ..Ends::default()
            }),
        })
    }

    fn change(&self, change: impl FnOnce(&mut Ends) -> bool) {
        let mut ends = self.inner.lock().unwrap();
        let events = change(&mut ends);
        let ready = ends.watched.clone().filter(|_| events);
        let ready = ready.map(|(events, slot)| (events, ends.ready(slot)));
        // Nobody waits for this lock while others go on.
        drop(ends);
        if let Some((events, ready)) = ready {
            events.deliver(ready);
        }
    }

    /// The client sends.
    pub fn send(&self, bytes: &[u8]) {
        self.change(|ends| {
            if !ends.closed {
                ends.inbound.extend(bytes);
            }
            true
        });
    }

    /// The client says nothing more.
    pub fn shut(&self) {
        self.change(|ends| {
            ends.inbound_over = true;
            true
        });
    }

    /// The client is gone.
    pub fn reset(&self) {
        self.change(|ends| {
            ends.reset = true;
            ends.inbound.clear();
            ends.outbound.clear();
            true
        });
    }

    /// The client takes at most so many bytes.
    pub fn take(&self, most: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        self.change(|ends| {
            let count = most.min(ends.outbound.len());
            taken.extend(ends.outbound.drain(..count));
            count > 0 && std::mem::take(&mut ends.wants_room)
        });
        taken
    }

    /// Whether the server has ended it, and all that it said was taken.
    pub fn is_over(&self) -> bool {
        let ends = self.inner.lock().unwrap();
        (ends.outbound_over || ends.closed) && ends.outbound.is_empty()
    }

    /// Whether the server waits until the client takes something.
    pub fn is_full(&self) -> bool {
        self.inner.lock().unwrap().wants_room
    }

    /// Bytes that the server has read.
    pub fn read(&self) -> usize {
        self.inner.lock().unwrap().read
    }

    /// Bytes that the server has not read.
    pub fn unread(&self) -> usize {
        self.inner.lock().unwrap().inbound.len()
    }

    /// Bytes that the server has not read, or an end that it has not seen.
    pub fn is_unread(&self) -> bool {
        let ends = self.inner.lock().unwrap();
        !ends.closed
            && !ends.outbound_over
            && (!ends.inbound.is_empty() || ends.inbound_over || ends.reset)
    }
}

impl Ends {
    fn ready(&self, slot: usize) -> Ready {
        Ready {
            slot,
            readable: !self.inbound.is_empty() || self.inbound_over || self.reset,
            writable: self.outbound.len() < self.room || self.reset,
            ended: self.inbound_over || self.reset,
        }
    }
}

/// The server's side of a socket.
pub struct Channel {
    wire: Arc<Wire>,
    blocks: bool,
    waits: bool,
}

impl Channel {
    /// Not simulated.
    pub fn new(_: TcpStream, _: Option<rustls::Connection>) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Over a socket in memory.
    pub fn over(wire: &Arc<Wire>) -> Self {
        Self {
            wire: Arc::clone(wire),
            blocks: false,
            waits: false,
        }
    }

    pub fn is_encrypted(&self) -> bool {
        false
    }

    pub fn read_proxy_header(&self, _: bool) -> io::Result<Option<Proxied>> {
        Ok(Some(Proxied::Balancer))
    }

    pub fn handshake(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<Received> {
        thread::yield_now();
        if std::mem::take(&mut self.waits) {
            // The clock stands, so nothing comes once all others do nothing.
            for _ in 0..8 {
                thread::yield_now();
            }
        }
        let mut ends = self.wire.inner.lock().unwrap();
        if ends.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let count = buf.len().min(ends.inbound.len());
        if count > 0 {
            for (place, byte) in buf.iter_mut().zip(ends.inbound.drain(..count)) {
                *place = byte;
            }
            ends.read += count;
            let more = count == buf.len();
            return Ok(Received::Bytes { count, more });
        }
        Ok(if ends.inbound_over {
            Received::End
        } else {
            Received::Nothing
        })
    }

    pub fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        thread::yield_now();
        let mut ends = self.wire.inner.lock().unwrap();
        if ends.reset {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = buf.len().min(ends.room.saturating_sub(ends.outbound.len()));
        ends.wants_room |= count < buf.len();
        ends.outbound.extend_from_slice(&buf[..count]);
        Ok(count)
    }

    pub fn flush(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    pub fn is_midway(&self) -> bool {
        false
    }

    pub fn wait_in_next_read(&mut self, _: Duration) -> bool {
        (self.blocks, self.waits) = (true, true);
        true
    }

    pub fn may_wait(&self) -> bool {
        self.blocks
    }

    pub fn waits(&self) -> bool {
        self.waits
    }

    pub fn stop_waiting(&mut self) -> bool {
        self.waits = false;
        std::mem::take(&mut self.blocks)
    }

    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        None
    }

    pub fn alpn(&self) -> Option<&[u8]> {
        None
    }

    pub fn tls_version(&self) -> Option<&'static str> {
        None
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let mut ends = self.wire.inner.lock().unwrap();
        ends.closed = true;
        // Closing a socket takes it out of epoll: its slot has another one.
        ends.watched = None;
    }
}

/// What has happened to the socket of a slot.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    pub slot: usize,
    pub readable: bool,
    pub writable: bool,
    pub ended: bool,
}

/// Events of sockets.
#[derive(Default)]
struct Events {
    state: std::sync::Mutex<EventState>,
    gate: Gate,
}

#[derive(Default)]
struct EventState {
    ready: VecDeque<Ready>,
    wakes: usize,
}

/// Wakes simulated threads.
struct Gate {
    turn: Mutex<u64>,
    changed: Condvar,
    /// Those who wait for the next turn.
    resting: std::sync::atomic::AtomicUsize,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            turn: Mutex::new(0),
            changed: Condvar::new(),
            resting: std::sync::atomic::AtomicUsize::new(0),
        }
    }
}

impl Gate {
    fn turn(&self) -> u64 {
        *self.turn.lock().unwrap()
    }

    fn resting(&self) -> usize {
        self.resting.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Lets all pass who wait.
    fn open(&self) {
        let mut turn = self.turn.lock().unwrap();
        *turn += 1;
        self.resting.store(0, std::sync::atomic::Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits until it was opened after a turn.
    fn wait(&self, turn: u64) {
        let mut now = self.turn.lock().unwrap();
        if *now == turn {
            self.resting
                .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
        while *now == turn {
            now = self.changed.wait(now).unwrap();
        }
    }
}

impl Events {
    fn deliver(&self, ready: Ready) {
        {
            let mut state = self.state.lock().unwrap();
            // Two events before somebody looks are one.
            state.ready.retain(|events| events.slot != ready.slot);
            state.ready.push_back(ready);
        }
        self.gate.open();
    }
}

/// Tells what happens to sockets, each time once and to one who waits.
pub struct Epoll(Arc<Events>);

impl Epoll {
    pub fn new() -> io::Result<Self> {
        let events = Arc::new(Events::default());
        let world = World::here();
        world.inner.lock().unwrap().epolls.push(Arc::clone(&events));
        Ok(Self(events))
    }

    pub fn add(&self, channel: &Channel, slot: usize) -> io::Result<()> {
        let mut ends = channel.wire.inner.lock().unwrap();
        ends.watched = Some((Arc::clone(&self.0), slot));
        let ready = ends.ready(slot);
        drop(ends);
        self.0.deliver(ready);
        Ok(())
    }

    pub fn pause(&self, channel: &Channel, _: usize) {
        channel.wire.inner.lock().unwrap().watched = None;
    }

    pub fn resume(&self, channel: &Channel, slot: usize) {
        let _ = self.add(channel, slot);
    }

    pub fn forget(&self, channel: &Channel) {
        channel.wire.inner.lock().unwrap().watched = None;
    }

    pub fn wait(&self, ready: &mut Vec<Ready>, most: usize, timeout: Duration) -> bool {
        let world = World::here();
        let until = world.now() + timeout;
        thread::yield_now();
        loop {
            let turn = self.0.gate.turn();
            {
                let mut state = self.0.state.lock().unwrap();
                let woken = std::mem::take(&mut state.wakes) > 0;
                let count = state.ready.len().min(most);
                ready.extend(state.ready.drain(..count));
                if woken || count > 0 {
                    return woken;
                }
            }
            if world.now() >= until {
                return false;
            }
            self.0.gate.wait(turn);
        }
    }

    pub fn wake(&self) {
        self.0.state.lock().unwrap().wakes += 1;
        self.0.gate.open();
    }
}

/// Ends sockets at once; what was said is there to be read.
pub struct Linger;

impl Linger {
    pub fn start(_: usize) -> io::Result<Self> {
        Ok(Self)
    }

    pub fn take(&self, channel: Channel) {
        channel.wire.inner.lock().unwrap().outbound_over = true;
    }

    pub fn wait_until_empty(&self, _: Instant) {}
}

/// Threads for jobs.
pub struct Pool {
    busy: Arc<AtomicUsize>,
    first: usize,
    limit: usize,
    /// Threads beyond the first ones that the system gives, until it is moved.
    given: std::sync::atomic::AtomicUsize,
}

impl Pool {
    pub fn new(first: usize, limit: usize, _: usize) -> Self {
        Self {
            busy: Arc::new(AtomicUsize::new(0)),
            first,
            limit: limit.max(first),
            given: std::sync::atomic::AtomicUsize::new(usize::MAX),
        }
    }

    /// From now on the system gives so many threads beyond the first ones.
    pub fn give(&self, threads: usize) {
        self.given
            .store(threads, std::sync::atomic::Ordering::SeqCst);
    }

    pub fn threads(&self) -> usize {
        self.busy.load(Ordering::SeqCst)
    }

    pub fn execute(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let given = self.given.load(std::sync::atomic::Ordering::SeqCst);
        let most = self.limit.min(self.first.saturating_add(given));
        if self.busy.load(Ordering::SeqCst) >= most {
            return false;
        }
        self.busy.fetch_add(1, Ordering::SeqCst);
        let busy = Arc::clone(&self.busy);
        let world = World::here();
        world.inner.lock().unwrap().threads += 1;
        thread::spawn(move || {
            job();
            busy.fetch_sub(1, Ordering::SeqCst);
            World::here().inner.lock().unwrap().threads -= 1;
        });
        true
    }
}
