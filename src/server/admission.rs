//! Who gets in: a slot for each connection.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;

use super::peer::Peer;
use crate::access::whole_address;

/// The slots.
pub(crate) struct Admission {
    /// Read by the admin side and the drain, without a lock.
    slots: Box<[ArcSwapOption<Peer>]>,
    shares: Shares,
    inner: Mutex<Inner>,
    /// Notified when the last permit is released.
    empty: Condvar,
}

/// What is done with a peer once it is known whether it gets a permit.
type Job = Box<dyn FnOnce(Result<Permit, AdmissionError>) + Send>;

/// One that may begin, outside of the lock.
type Begun = (Job, Permit);

/// Peers that wait for the slot of one that is being evicted, which takes
/// milliseconds.
const MAX_WAITING: usize = 64;

/// Unauthenticated peers that connected within this time are not evicted: they
/// may be about to authenticate.
const GRACE: Duration = Duration::from_millis(100);

/// How the slots are shared.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shares {
    /// Connections at the same time.
    pub(crate) connections: usize,
    /// Of them, those of unauthenticated peers.
    pub(crate) unauthenticated: usize,
    /// Of them, those of one address.
    pub(crate) per_address: usize,
}

/// Why a peer gets no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AdmissionError {
    /// All slots are taken.
    Full,
    /// Its address has as many connections as it may.
    TooMany,
}

struct Inner {
    /// Free slots; the one that was freed last is taken first, so that its
    /// memory is used again.
    free: Vec<usize>,
    /// Slots taken by unauthenticated peers.
    unauthenticated: usize,
    /// Connections by address, where that is bounded.
    addresses: HashMap<IpAddr, usize>,
    /// Peers for whom an unauthenticated one is being evicted.
    waiting: VecDeque<(Job, Option<IpAddr>)>,
}

/// The right to serve one connection. Released when dropped.
pub(crate) struct Permit {
    admission: Arc<Admission>,
    slot: usize,
    unauthenticated: AtomicBool,
    address: OnceLock<IpAddr>,
}

impl Admission {
    pub(crate) fn new(shares: Shares) -> Arc<Self> {
        let connections = shares.connections;
        Arc::new(Self {
            slots: (0..connections).map(|_| ArcSwapOption::empty()).collect(),
            shares,
            inner: Mutex::new(Inner {
                free: (0..connections).rev().collect(),
                unauthenticated: 0,
                addresses: HashMap::new(),
                waiting: VecDeque::new(),
            }),
            empty: Condvar::new(),
        })
    }

    /// Runs the job of an unauthenticated peer, now or once there is a slot for
    /// it. `address` is none while it is not known for whom the peer speaks.
    /// Where unauthenticated peers can be evicted for others, `evict` does
    /// that, if the peer is still idle.
    pub(crate) fn admit(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        job: Job,
        evict: impl FnOnce(&Peer) -> bool,
    ) {
        let address = address.map(whole_address);
        let mut inner = self.lock();
        if address.is_some_and(|address| inner.has_enough(address, self.shares.per_address)) {
            drop(inner);
            return job(Err(AdmissionError::TooMany));
        }
        let is_crowded = inner.waiting.len() >= MAX_WAITING;
        if is_crowded
            || inner.unauthenticated >= self.shares.unauthenticated
            || inner.free.is_empty()
        {
            drop(inner);
            // A peer that has just become active is not evicted; the next one
            // is.
            let idle = self.longest_idle_unauthenticated().filter(|_| !is_crowded);
            if !idle.is_some_and(|idle| evict(&idle)) {
                return job(Err(AdmissionError::Full));
            }
            inner = self.lock();
        }
        // Another may have been quicker, or the evicted one has not left: then
        // this one waits for the next slot.
        inner.waiting.push_back((job, address));
        let next = self.admit_next(&mut inner);
        drop(inner);
        if let Some((job, permit)) = next {
            job(Ok(permit));
        }
    }

    /// Admits one of those that wait, if there is a slot now.
    #[must_use]
    fn admit_next(self: &Arc<Self>, inner: &mut Inner) -> Option<Begun> {
        if inner.unauthenticated >= self.shares.unauthenticated || inner.waiting.is_empty() {
            return None;
        }
        let slot = inner.free.pop()?;
        let (job, address) = inner.waiting.pop_front()?;
        inner.unauthenticated += 1;
        if let Some(address) = address.filter(|_| self.shares.per_address > 0) {
            *inner.addresses.entry(address).or_default() += 1;
        }
        let address = address.map(OnceLock::from).unwrap_or_default();
        let permit = Permit {
            admission: Arc::clone(self),
            slot,
            unauthenticated: AtomicBool::new(true),
            address,
        };
        Some((job, permit))
    }

    /// Returns the longest-idle unauthenticated peer, where peers can
    /// authenticate.
    fn longest_idle_unauthenticated(&self) -> Option<Arc<Peer>> {
        if self.shares.unauthenticated == self.shares.connections {
            return None;
        }
        let idle = |peer: &Arc<Peer>| peer.idle_unauthenticated().filter(|idle| *idle >= GRACE);
        let all = self.peers().filter_map(|peer| Some((idle(&peer)?, peer)));
        all.max_by_key(|(idle, _)| *idle).map(|(_, peer)| peer)
    }

    /// Connected peers.
    pub(crate) fn peers(&self) -> impl Iterator<Item = Arc<Peer>> {
        self.slots.iter().filter_map(ArcSwapOption::load_full)
    }

    /// Waits until all permits are released. Returns whether they were.
    pub(crate) fn wait_until_empty(&self, deadline: Instant) -> bool {
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
}

impl Permit {
    /// The slot, of those from 0 to `max_connections`.
    pub(crate) fn slot(&self) -> usize {
        self.slot
    }

    /// Lists the connection.
    pub(crate) fn hold(&self, peer: Arc<Peer>) {
        self.admission.slots[self.slot].store(Some(peer));
    }

    /// Counts the connection for an address that is known only now. Returns
    /// false if that address has as many connections as it may.
    #[must_use]
    pub(crate) fn claim(&self, address: IpAddr) -> bool {
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

    /// The peer has authenticated: a slot for unauthenticated peers is free
    /// again.
    pub(crate) fn authenticated(&self) {
        if self.unauthenticated.swap(false, Relaxed) {
            let mut inner = self.admission.lock();
            inner.unauthenticated -= 1;
            let next = self.admission.admit_next(&mut inner);
            drop(inner);
            if let Some((job, permit)) = next {
                job(Ok(permit));
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.slots[self.slot].store(None);
        let mut inner = self.admission.lock();
        inner.unauthenticated -= usize::from(*self.unauthenticated.get_mut());
        if let Some(address) = self.address.get()
            && let Some(count) = inner.addresses.get_mut(address)
        {
            *count -= 1;
            if *count == 0 {
                inner.addresses.remove(address);
            }
        }
        inner.free.push(self.slot);
        let next = self.admission.admit_next(&mut inner);
        if inner.free.len() == self.admission.slots.len() {
            self.admission.empty.notify_all();
        }
        drop(inner);
        if let Some((job, permit)) = next {
            job(Ok(permit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn shares(connections: usize, unauthenticated: usize, per_address: usize) -> Shares {
        Shares {
            connections,
            unauthenticated,
            per_address,
        }
    }

    /// A peer that stays as long as its permit is kept.
    fn stay(
        admission: &Arc<Admission>,
        address: Option<IpAddr>,
        known: bool,
    ) -> Result<Permit, AdmissionError> {
        let (give, given) = mpsc::channel();
        let job = Box::new(move |permit: Result<Permit, AdmissionError>| {
            if let (Ok(permit), true) = (&permit, known) {
                permit.authenticated();
            }
            give.send(permit).unwrap();
        });
        admission.admit(address, job, |_| false);
        given.try_recv().unwrap()
    }

    #[test]
    fn as_many_as_there_are_slots() {
        let admission = Admission::new(shares(6, 6, 0));
        let peers: Vec<_> = (0..6).map(|_| stay(&admission, None, false)).collect();
        assert!(peers.iter().all(Result::is_ok));
        assert_eq!(
            stay(&admission, None, false).err(),
            Some(AdmissionError::Full)
        );
        assert!(!admission.wait_until_empty(Instant::now()));
        drop(peers);
        assert!(admission.wait_until_empty(Instant::now()));
        assert!(stay(&admission, None, false).is_ok());
    }

    #[test]
    fn unauthenticated_peers_and_single_addresses_have_their_share() {
        let admission = Admission::new(shares(4, 2, 3));
        let one: IpAddr = "192.0.2.1".parse().unwrap();
        let other: IpAddr = "192.0.2.2".parse().unwrap();
        let known: Vec<_> = (0..2).map(|_| stay(&admission, Some(one), true)).collect();
        let refused = |address| stay(&admission, Some(address), false).err();
        let _unauthenticated = stay(&admission, Some(one), false).ok().unwrap();
        assert_eq!(refused(one), Some(AdmissionError::TooMany));
        let _another = stay(&admission, Some(other), false).ok().unwrap();
        assert_eq!(refused(other), Some(AdmissionError::Full));
        drop(known);
    }
}
