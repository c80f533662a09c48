//! How often one address may fail to authenticate, in each way of its own.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::locks::lock;

/// Addresses that are remembered, once for each way in which they failed;
/// the longest-quiet ones are displaced.
const MAX_ADDRESSES: usize = 8192;

/// A way to fail. Each has a throttle of its own: who fails in one way does
/// not keep others of the same address from authenticating in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// A hello without a token where one is demanded.
    NoToken,
    /// A token that is unknown, expired or revoked.
    WrongToken,
    /// A TLS handshake without a valid certificate where one is demanded.
    Certificate,
}

/// Failures by address. For each, one instant is kept: when all its failures
/// will be forgotten, of which one is in each sixtieth, third or whatever
/// part of a minute.
pub(super) struct AuthThrottle {
    per_minute: u32,
    forgotten: Mutex<HashMap<(IpAddr, Failure), Instant>>,
}

impl AuthThrottle {
    pub(super) fn new(per_minute: u32) -> Self {
        Self {
            per_minute: per_minute.max(1),
            forgotten: Mutex::default(),
        }
    }

    /// How long to wait before the next try; none if it is allowed now.
    pub(super) fn wait(&self, address: IpAddr, way: Failure, now: Instant) -> Option<Duration> {
        let forgotten = lock(&self.forgotten);
        let left = forgotten
            .get(&(whole_address(address), way))?
            .saturating_duration_since(now);
        let most = self.each() * (self.per_minute - 1);
        left.checked_sub(most).filter(|wait| !wait.is_zero())
    }

    pub(super) fn failed(&self, address: IpAddr, way: Failure, now: Instant) {
        let mut forgotten = lock(&self.forgotten);
        if forgotten.len() >= MAX_ADDRESSES {
            forgotten.retain(|_, until| *until > now);
        }
        let full = forgotten.len() >= MAX_ADDRESSES;
        let most = now + self.each() * self.per_minute;
        // Where even those are too many, the newcomers are not remembered:
        // a token is too long to be guessed from that many addresses.
        let key = (whole_address(address), way);
        if !full || forgotten.contains_key(&key) {
            let until = forgotten.entry(key).or_insert(now);
            *until = ((*until).max(now) + self.each()).min(most);
        }
    }

    fn each(&self) -> Duration {
        Duration::from_secs(60) / self.per_minute
    }
}

/// Of IPv6, the /64 that one customer has at least.
#[must_use]
pub fn whole_address(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & (!0 << 64)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_forgotten_one_by_one() {
        let throttle = AuthThrottle::new(3);
        let now = Instant::now();
        let one: IpAddr = "2001:db8::1".parse().unwrap();
        let same_network: IpAddr = "2001:db8::ffff:1".parse().unwrap();
        let other: IpAddr = "2001:db8:0:1::1".parse().unwrap();
        for _ in 0..3 {
            assert_eq!(throttle.wait(one, Failure::WrongToken, now), None);
            throttle.failed(one, Failure::WrongToken, now);
        }
        assert_eq!(
            throttle.wait(one, Failure::WrongToken, now),
            Some(Duration::from_secs(20))
        );
        assert_eq!(
            throttle.wait(same_network, Failure::WrongToken, now),
            Some(Duration::from_secs(20))
        );
        assert_eq!(
            throttle.wait(one, Failure::NoToken, now),
            None,
            "each way has a throttle of its own"
        );
        assert_eq!(throttle.wait(other, Failure::WrongToken, now), None);
        throttle.failed(one, Failure::WrongToken, now);
        assert_eq!(
            throttle.wait(one, Failure::WrongToken, now + Duration::from_secs(20)),
            None,
            "more failures don't wait for longer"
        );
        throttle.failed(one, Failure::WrongToken, now + Duration::from_secs(20));
        assert!(
            throttle
                .wait(one, Failure::WrongToken, now + Duration::from_secs(20))
                .is_some()
        );
        assert_eq!(
            throttle.wait(one, Failure::WrongToken, now + Duration::from_secs(81)),
            None
        );
    }

    #[test]
    fn so_many_addresses_are_remembered() {
        let throttle = AuthThrottle::new(1);
        let now = Instant::now();
        for number in 0..u32::try_from(MAX_ADDRESSES).unwrap() + 10 {
            throttle.failed(IpAddr::from(number.to_be_bytes()), Failure::NoToken, now);
        }
        assert_eq!(throttle.forgotten.lock().unwrap().len(), MAX_ADDRESSES);
        throttle.failed(
            "9.9.9.9".parse().unwrap(),
            Failure::NoToken,
            now + Duration::from_secs(61),
        );
        assert_eq!(
            throttle.forgotten.lock().unwrap().len(),
            1,
            "forgotten addresses free capacity"
        );
    }
}
