//! What the server's connections, poller and workers take of the system: time,
//! locks, sockets that never wait, epoll, threads. The simulation runs the same
//! server over parts of its own (`tests/simulation`).

mod epoll;
mod linger;
mod pool;

use std::time::Instant;

pub use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};

pub use epoll::{Epoll, Ready};
pub use linger::{LINGER, Linger, MAX_ENDING};
pub use pool::Pool;

pub use crate::transport::{Channel, Received};

/// The time.
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Takes a lock. None of those of the server guards anything that a panic
/// leaves half done.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
