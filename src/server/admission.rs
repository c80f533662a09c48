//! Who gets in: a slot for each connection.

use std::{
    net::IpAddr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;

use super::{
    by_address::{ByAddress, Counted},
    peer::Peer,
};

/// The slots.
pub(crate) struct Admission {
    /// Read by the admin side and the drain, without a lock.
    slots: Box<[ArcSwapOption<Peer>]>,
    shares: Shares,
    inner: Mutex<Inner>,
    /// Connections by address, where that is bounded.
    addresses: Arc<ByAddress>,
    /// Notified when the last permit is released.
    empty: Condvar,
}

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
}

/// The right to serve one connection. Released when dropped.
pub(crate) struct Permit {
    admission: Arc<Admission>,
    slot: usize,
    unauthenticated: AtomicBool,
    /// Its count, once it is known for whom the peer speaks.
    address: OnceLock<Counted>,
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
            }),
            addresses: Arc::default(),
            empty: Condvar::new(),
        })
    }

    /// Takes a slot for an unauthenticated peer. `address` is none while it is not
    /// known for whom the peer speaks. Where unauthenticated peers can be evicted
    /// for others, `evict` does that, if the peer is still idle.
    ///
    /// # Errors
    /// If there is none, or the address has as many connections as it may.
    pub(crate) fn admit(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        evict: impl FnOnce(&Peer) -> bool,
    ) -> Result<Permit, AdmissionError> {
        let counted = OnceLock::new();
        if !address.is_none_or(|address| self.count(address, &counted)) {
            return Err(AdmissionError::TooMany);
        }
        // A peer that has just become active is not evicted; the next one is.
        let slot = self.take_slot().or_else(|| {
            let idle = self.longest_idle_unauthenticated()?;
            evict(&idle).then(|| self.take_slot()).flatten()
        });
        Ok(Permit {
            admission: Arc::clone(self),
            slot: slot.ok_or(AdmissionError::Full)?,
            unauthenticated: AtomicBool::new(true),
            address: counted,
        })
    }

    fn take_slot(&self) -> Option<usize> {
        let mut inner = self.lock();
        if inner.unauthenticated >= self.shares.unauthenticated {
            return None;
        }
        let slot = inner.free.pop()?;
        inner.unauthenticated += 1;
        Some(slot)
    }

    /// Counts a connection of an address, once. False if it has as many as it may.
    fn count(&self, address: IpAddr, counted: &OnceLock<Counted>) -> bool {
        let limit = self.shares.per_address;
        if limit == 0 || counted.get().is_some() {
            return true;
        }
        let one_more = self.addresses.begin(address, limit);
        one_more.is_some_and(|one_more| counted.set(one_more).is_ok())
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
        let remaining = deadline.saturating_duration_since(Instant::now());
        let are_held = |inner: &mut Inner| inner.free.len() < self.slots.len();
        let waited = self
            .empty
            .wait_timeout_while(self.lock(), remaining, are_held);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inner.free.len() == self.slots.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics halfway through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.admission.count(address, &self.address)
    }

    /// The peer has authenticated: a slot for unauthenticated peers is free
    /// again.
    pub(crate) fn authenticated(&self) {
        if self.unauthenticated.swap(false, Relaxed) {
            self.admission.lock().unauthenticated -= 1;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.slots[self.slot].store(None);
        self.address.take();
        let mut inner = self.admission.lock();
        inner.unauthenticated -= usize::from(*self.unauthenticated.get_mut());
        inner.free.push(self.slot);
        if inner.free.len() == self.admission.slots.len() {
            self.admission.empty.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let permit = admission.admit(address, |_| false)?;
        if known {
            permit.authenticated();
        }
        Ok(permit)
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
