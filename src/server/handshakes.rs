//! TLS handshakes of addresses that have failed to authenticate too often.
//! A peer with a valid certificate is admitted from there too, so they are not
//! refused; but a handshake costs much, so few run at the same time.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::access::whole_address;

/// Handshakes of one such address at the same time. One more is closed without
/// a word.
const MAX_HANDSHAKES: usize = 8;

/// How many there are by address. There are never more than connections.
#[derive(Default)]
pub(crate) struct Handshakes(Mutex<HashMap<IpAddr, usize>>);

/// One of them, until it is dropped.
pub(crate) struct Handshake {
    all: Arc<Handshakes>,
    address: IpAddr,
}

impl Handshakes {
    /// One more of an address, if it may.
    pub(crate) fn begin(self: &Arc<Self>, address: IpAddr) -> Option<Handshake> {
        let address = whole_address(address);
        let mut by_address = self.lock();
        let count = by_address.entry(address).or_default();
        if *count >= MAX_HANDSHAKES {
            return None;
        }
        *count += 1;
        Some(Handshake {
            all: Arc::clone(self),
            address,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.all.lock().entry(self.address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_of_one_address() {
        let all = Arc::new(Handshakes::default());
        let one: IpAddr = "2001:db8::1".parse().unwrap();
        let same: IpAddr = "2001:db8::2".parse().unwrap();
        let other: IpAddr = "192.0.2.1".parse().unwrap();
        let mut begun: Vec<_> = (0..MAX_HANDSHAKES).map(|_| all.begin(one)).collect();
        assert!(begun.iter().all(Option::is_some));
        assert!(all.begin(same).is_none() && all.begin(other).is_some());
        begun.pop();
        assert!(all.begin(same).is_some());
        drop(begun);
        assert!(all.lock().is_empty());
    }
}
