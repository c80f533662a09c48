//! Who gets in: a slot for each connection, and threads for the slots.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv6Addr},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
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
    shares: Shares,
    inner: Mutex<Inner>,
    /// Told when the last permit is given back.
    empty: Condvar,
    /// A copy of the pool's number, for whoever looks.
    threads: AtomicUsize,
    /// Threads that have a job. Rises under the lock.
    busy: AtomicUsize,
}

/// What a thread does with the connection that it got a permit for.
type Job = Box<dyn FnOnce(Permit) + Send>;

/// Peers that wait for the place of another that was sent away; those leave
/// within milliseconds.
const MAX_WAITING: usize = 64;

/// Strangers that came within this time are not sent away for others: they
/// may be about to say who they are.
const GRACE: Duration = Duration::from_millis(100);

/// How the slots are shared.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shares {
    /// Connections at the same time.
    pub(super) connections: usize,
    /// Of them, those of peers who have not shown who they are.
    pub(super) strangers: usize,
    /// Of them, those of one address.
    pub(super) per_address: usize,
    /// Threads beyond one for each connection.
    pub(super) spare_threads: usize,
}

/// What becomes of a peer that wants in.
pub(super) enum Admitted {
    /// It is served.
    Yes,
    /// It is served in the place of a stranger that is leaving.
    InPlace,
    /// There is no room.
    Full,
    /// Its address has as many connections as it may.
    TooMany,
}

struct Inner {
    /// Free slots; the one that was freed last is taken first, so that its
    /// thread and its memory are used again.
    free: Vec<usize>,
    pool: ThreadPool,
    /// Slots taken by peers that have not shown who they are.
    strangers: usize,
    /// Threads that are in a slow call, while another one reads.
    spares: usize,
    /// Connections by address, where that is bounded.
    addresses: HashMap<IpAddr, usize>,
    /// Peers for whom a stranger was told to leave.
    waiting: VecDeque<(Job, Option<IpAddr>)>,
    /// Threads could not be started; said once.
    short_of_threads: bool,
}

/// The right to serve one connection. Given back when dropped.
pub(super) struct Permit {
    admission: Arc<Admission>,
    slot: usize,
    stranger: AtomicBool,
    address: OnceLock<IpAddr>,
}

/// The right of a thread that was left behind in a slow call. Given back when
/// dropped.
pub(super) struct Spare(Arc<Admission>);

impl Drop for Spare {
    fn drop(&mut self) {
        self.0.lock().spares -= 1;
    }
}

/// That a thread has a job, until this is dropped.
struct Busy(Arc<Admission>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Relaxed);
    }
}

impl Admission {
    pub(super) fn new(shares: Shares, thread_stack: usize) -> Arc<Self> {
        let max_connections = shares.connections;
        let pool = threadpool::Builder::new()
            .num_threads(FIRST_THREADS.min(max_connections))
            .thread_name("mb-connection".into())
            .thread_stack_size(thread_stack)
            .build();
        Arc::new(Self {
            slots: (0..max_connections)
                .map(|_| ArcSwapOption::empty())
                .collect(),
            shares,
            inner: Mutex::new(Inner {
                free: (0..max_connections).rev().collect(),
                pool,
                strangers: 0,
                spares: 0,
                addresses: HashMap::new(),
                waiting: VecDeque::new(),
                short_of_threads: false,
            }),
            empty: Condvar::new(),
            threads: AtomicUsize::new(FIRST_THREADS.min(max_connections)),
            busy: AtomicUsize::new(0),
        })
    }

    /// Serves a stranger, if there is a slot and a thread for it. `address` is
    /// none while it is not known for whom the peer speaks.
    pub(super) fn admit(self: &Arc<Self>, address: Option<IpAddr>, job: Job) -> Admitted {
        let address = address.map(whole_address);
        let mut inner = self.lock();
        if address.is_some_and(|address| inner.has_enough(address, self.shares.per_address)) {
            return Admitted::TooMany;
        }
        if inner.strangers < self.shares.strangers && !inner.free.is_empty() {
            let Some(slot) = self.slot(&mut inner) else {
                return Admitted::Full;
            };
            self.begin(&mut inner, slot, address, job);
            return Admitted::Yes;
        }
        if inner.waiting.len() >= MAX_WAITING {
            return Admitted::Full;
        }
        drop(inner);
        match self.longest_idle_stranger() {
            // Who has just come back to life is not sent away; the next one is.
            Some(stranger) if stranger.evict() => {
                let mut inner = self.lock();
                inner.waiting.push_back((job, address));
                // It, or another, may have been quicker than we are.
                self.seat_one(&mut inner);
                Admitted::InPlace
            }
            _ => Admitted::Full,
        }
    }

    /// Serves one of those that wait, if there is room now.
    fn seat_one(self: &Arc<Self>, inner: &mut Inner) {
        if inner.strangers < self.shares.strangers
            && !inner.waiting.is_empty()
            && let Some(slot) = self.slot(inner)
            && let Some((job, address)) = inner.waiting.pop_front()
        {
            self.begin(inner, slot, address, job);
        }
    }

    /// A free slot, if there is a thread for it.
    fn slot(&self, inner: &mut Inner) -> Option<usize> {
        let slot = inner.free.pop()?;
        if !self.has_thread(inner) {
            inner.free.push(slot);
            return None;
        }
        Some(slot)
    }

    /// Whether there is a thread for one more job.
    fn has_thread(&self, inner: &mut Inner) -> bool {
        let enough = self.busy.load(Relaxed) < inner.pool.max_count() || inner.grow();
        self.threads.store(inner.pool.max_count(), Relaxed);
        enough
    }

    /// Gives a thread, which is there, its job.
    fn start(self: &Arc<Self>, inner: &Inner, job: impl FnOnce() + Send + 'static) {
        self.busy.fetch_add(1, Relaxed);
        let busy = Busy(Arc::clone(self));
        inner.pool.execute(move || {
            let _busy = busy;
            job();
        });
    }

    /// Gives a job to a thread; gives it back if there is none. For those who
    /// have a permit, and for the few on duty at the poller.
    pub(super) fn execute<J: FnOnce() + Send + 'static>(self: &Arc<Self>, job: J) -> Result<(), J> {
        let mut inner = self.lock();
        if !self.has_thread(&mut inner) {
            return Err(job);
        }
        self.start(&inner, job);
        Ok(())
    }

    /// Hands a slot, and a thread, to a job.
    fn begin(self: &Arc<Self>, inner: &mut Inner, slot: usize, address: Option<IpAddr>, job: Job) {
        inner.strangers += 1;
        if let Some(address) = address.filter(|_| self.shares.per_address > 0) {
            *inner.addresses.entry(address).or_default() += 1;
        }
        let address = address.map(OnceLock::from).unwrap_or_default();
        let permit = Permit {
            admission: Arc::clone(self),
            slot,
            stranger: AtomicBool::new(true),
            address,
        };
        self.start(inner, move || job(permit));
    }

    /// The stranger who has asked nothing for the longest time, where peers
    /// can show who they are.
    fn longest_idle_stranger(&self) -> Option<Arc<Connection>> {
        if self.shares.strangers == self.shares.connections {
            return None;
        }
        let idle = |connection: &Arc<Connection>| {
            connection.idle_as_stranger().filter(|idle| *idle >= GRACE)
        };
        let all = self
            .connections()
            .filter_map(|connection| Some((idle(&connection)?, connection)));
        all.max_by_key(|(idle, _)| *idle)
            .map(|(_, connection)| connection)
    }

    /// Connections that are being served.
    pub(super) fn connections(&self) -> impl Iterator<Item = Arc<Connection>> {
        self.slots.iter().filter_map(ArcSwapOption::load_full)
    }

    /// Threads that have something to do just now.
    pub(super) fn busy_threads(&self) -> usize {
        self.busy.load(Relaxed)
    }

    /// Threads that serve connections.
    pub(super) fn threads(&self) -> usize {
        self.threads.load(Relaxed)
    }

    /// Waits for all permits to come back; says whether they did.
    pub(super) fn wait_until_empty(&self, deadline: Instant) -> bool {
        let mut inner = self.lock();
        while inner.free.len() < self.slots.len() || !inner.waiting.is_empty() {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return false;
            }
            inner = self
                .empty
                .wait_timeout(inner, remaining)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics halfway through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn has_enough(&self, address: IpAddr, limit: usize) -> bool {
        limit > 0
            && self
                .addresses
                .get(&address)
                .is_some_and(|count| *count >= limit)
    }

    /// One thread more. `threadpool` panics where none can be started; then
    /// it is told to want as many as it has.
    fn grow(&mut self) -> bool {
        let threads = self.pool.max_count();
        let started =
            catch_unwind(AssertUnwindSafe(|| self.pool.set_num_threads(threads + 1))).is_ok();
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
                tracing::error!(
                    "the system refuses more than {threads} threads, further connections are refused"
                );
            }
        }
        false
    }
}

impl Permit {
    /// The slot, of those from 0 to `max_connections`.
    pub(super) fn slot(&self) -> usize {
        self.slot
    }

    /// A thread goes on with the connection; the job comes back if there is
    /// none.
    pub(super) fn execute<J: FnOnce() + Send + 'static>(&self, job: J) -> Result<(), J> {
        self.admission.execute(job)
    }

    /// Shows the connection to whoever looks.
    pub(super) fn hold(&self, connection: Arc<Connection>) {
        self.admission.slots[self.slot].store(Some(connection));
    }

    /// Has another thread of the pool go on with the connection while the
    /// caller stays where it is; none if all are taken. What is returned is
    /// the caller's for as long.
    pub(super) fn relieve(&self, job: impl FnOnce() + Send + 'static) -> Option<Spare> {
        let admission = &self.admission;
        let mut inner = admission.lock();
        if inner.spares >= admission.shares.spare_threads {
            return None;
        }
        inner.spares += 1;
        if !admission.has_thread(&mut inner) {
            inner.spares -= 1;
            return None;
        }
        admission.start(&inner, job);
        Some(Spare(Arc::clone(admission)))
    }

    /// It has come out for whom the peer speaks. False if that address has as
    /// many connections as it may.
    #[must_use]
    pub(super) fn claim(&self, address: IpAddr) -> bool {
        let address = whole_address(address);
        let limit = self.admission.shares.per_address;
        if limit == 0 || self.address.get().is_some() {
            return true;
        }
        let mut inner = self.admission.lock();
        if inner.has_enough(address, limit) {
            return false;
        }
        *inner.addresses.entry(address).or_default() += 1;
        let _ = self.address.set(address);
        true
    }

    /// The peer has shown who it is: a place for strangers is free again.
    pub(super) fn is_known(&self) {
        if self.stranger.swap(false, Relaxed) {
            let mut inner = self.admission.lock();
            inner.strangers -= 1;
            self.admission.seat_one(&mut inner);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.slots[self.slot].store(None);
        let mut inner = self.admission.lock();
        inner.strangers -= usize::from(*self.stranger.get_mut());
        if let Some(address) = self.address.get()
            && let Some(count) = inner.addresses.get_mut(address)
        {
            *count -= 1;
            if *count == 0 {
                inner.addresses.remove(address);
            }
        }
        inner.free.push(self.slot);
        self.admission.seat_one(&mut inner);
        if inner.free.len() == self.admission.slots.len() {
            self.admission.empty.notify_all();
        }
    }
}

/// Of IPv6, the /64 that one customer has at least.
pub(super) fn whole_address(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & (!0 << 64)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Raises the soft limit of open files to the hard one, and returns it; none
/// where there is no limit.
pub fn raise_open_files() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum
        || setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        )
        .is_err()
    {
        return current;
    }
    maximum
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn shares(connections: usize, strangers: usize, per_address: usize) -> Shares {
        Shares {
            connections,
            strangers,
            per_address,
            spare_threads: 1,
        }
    }

    /// Peers that stay until the sender is dropped.
    fn stay(
        admission: &Arc<Admission>,
        address: Option<IpAddr>,
        known: bool,
    ) -> (Admitted, mpsc::Sender<()>) {
        let (leave, stays) = mpsc::channel::<()>();
        let (started, starts) = mpsc::channel();
        let job = Box::new(move |permit: Permit| {
            if known {
                permit.is_known();
            }
            started.send(()).unwrap();
            let _ = stays.recv();
            drop(permit);
        });
        let admitted = admission.admit(address, job);
        if matches!(admitted, Admitted::Yes) {
            starts.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        (admitted, leave)
    }

    #[test]
    fn as_many_as_there_are_slots_and_threads_grow_with_them() {
        let admission = Admission::new(shares(6, 6, 0), 256 * 1024);
        assert_eq!(admission.threads(), FIRST_THREADS);
        // All six run at the same time: none is queued behind another.
        let peers: Vec<_> = (0..6).map(|_| stay(&admission, None, false)).collect();
        assert!(
            peers
                .iter()
                .all(|(admitted, _)| matches!(admitted, Admitted::Yes))
        );
        assert!(matches!(stay(&admission, None, false).0, Admitted::Full));
        assert_eq!(admission.threads(), 6);
        assert!(!admission.wait_until_empty(Instant::now()));
        drop(peers);
        assert!(admission.wait_until_empty(Instant::now() + Duration::from_secs(10)));
        assert!(matches!(stay(&admission, None, false).0, Admitted::Yes));
        assert_eq!(admission.threads(), 6, "threads are kept");
    }

    #[test]
    fn a_thread_in_a_slow_call_is_relieved_as_long_as_there_are_spare_ones() {
        let admission = Admission::new(shares(1, 1, 0), 256 * 1024);
        let (tell, told) = mpsc::channel();
        let job = Box::new(move |permit: Permit| {
            let (done, is_done) = mpsc::channel();
            let first = permit.relieve(move || done.send(()).unwrap());
            is_done.recv_timeout(Duration::from_secs(10)).unwrap();
            let second = permit.relieve(|| {});
            tell.send((first.is_some(), second.is_some())).unwrap();
            drop(first);
            tell.send((true, permit.relieve(|| {}).is_some())).unwrap();
        });
        assert!(matches!(admission.admit(None, job), Admitted::Yes));
        let next = || told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(next(), (true, false));
        assert_eq!(next(), (true, true));
    }

    #[test]
    fn strangers_and_single_addresses_have_their_share() {
        let admission = Admission::new(shares(4, 2, 3), 256 * 1024);
        let one: IpAddr = "192.0.2.1".parse().unwrap();
        let other: IpAddr = "192.0.2.2".parse().unwrap();
        let known: Vec<_> = (0..2).map(|_| stay(&admission, Some(one), true)).collect();
        let (first, _stranger) = stay(&admission, Some(one), false);
        assert!(matches!(first, Admitted::Yes));
        assert!(matches!(
            stay(&admission, Some(one), false).0,
            Admitted::TooMany
        ));
        let (second, _another) = stay(&admission, Some(other), false);
        assert!(matches!(second, Admitted::Yes));
        assert!(matches!(
            stay(&admission, Some(other), false).0,
            Admitted::Full
        ));
        drop(known);
    }
}
