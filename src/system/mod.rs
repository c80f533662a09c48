//! What the server's connections, poller and workers take of the system: time,
//! locks, sockets that never wait, epoll, threads. The simulation runs the same
//! server over parts of its own (`tests/simulation`).

mod epoll;
mod linger;
mod pool;

use std::time::{Duration, Instant};

use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};

pub use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};

pub use std::thread::{Thread, current, park_timeout};

pub use epoll::{Epoll, Ready};
pub use linger::{LINGER, Linger, MAX_ENDING};
pub use pool::Pool;

pub(crate) use crate::locks::lock;
pub use crate::transport::{Channel, Received};

/// The time.
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Processor time of this thread.
#[must_use]
pub fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or_default(),
        u32::try_from(time.tv_nsec).unwrap_or_default(),
    )
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
