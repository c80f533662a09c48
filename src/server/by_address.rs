//! Counts by address, each with a bound.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::access::whole_address;

/// How many there are by address. There are never more than connections.
#[derive(Default)]
pub(crate) struct ByAddress(Mutex<HashMap<IpAddr, usize>>);

/// One of them, until it is dropped.
pub(crate) struct Counted {
    all: Arc<ByAddress>,
    address: IpAddr,
}

impl ByAddress {
    /// One more of an address, if it has less than so many.
    pub(crate) fn begin(self: &Arc<Self>, address: IpAddr, limit: usize) -> Option<Counted> {
        let address = whole_address(address);
        let mut counts = self.lock();
        let count = counts.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Counted {
            all: Arc::clone(self),
            address,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Counted {
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
        let all = Arc::new(ByAddress::default());
        let begin = |address: &str| all.begin(address.parse().unwrap(), 8);
        let one = "2001:db8::1";
        let mut begun: Vec<_> = (0..8).map(|_| begin(one)).collect();
        assert!(begun.iter().all(Option::is_some));
        assert!(begin("2001:db8::2").is_none() && begin("192.0.2.1").is_some());
        begun.pop();
        assert!(begin("2001:db8::2").is_some());
        drop(begun);
        assert!(all.lock().is_empty());
    }
}
