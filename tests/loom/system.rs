//! What the poller takes of the system: loom's locks and atomics, a clock that
//! stands until a test moves it, and an epoll that has no sockets.

use std::{
    cell::Cell,
    io,
    sync::LazyLock,
    time::{Duration, Instant},
};

use loom::sync::Condvar;
pub use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

std::thread_local! {
    /// A model's threads are one of the system's.
    static SINCE_START: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// The time.
pub fn now() -> Instant {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    *START + SINCE_START.get()
}

/// Moves the clock.
pub fn set_clock(since_start: Duration) {
    SINCE_START.set(since_start);
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// No socket.
pub struct Channel;

#[derive(Debug, Clone, Copy)]
pub struct Ready {
    pub slot: usize,
    pub readable: bool,
    pub writable: bool,
    pub ended: bool,
}

/// Reports nothing but that it was woken.
pub struct Epoll {
    woken: Mutex<bool>,
    wakes: Condvar,
}

impl Epoll {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            woken: Mutex::new(false),
            wakes: Condvar::new(),
        })
    }

    pub fn add(&self, _: &Channel, _: usize) -> io::Result<()> {
        Ok(())
    }

    pub fn pause(&self, _: &Channel, _: usize) {}

    pub fn resume(&self, _: &Channel, _: usize) {}

    pub fn forget(&self, _: &Channel) {}

    /// Waits until it is woken: the clock stands, so no time ends it. What
    /// nobody wakes is a deadlock, which loom finds.
    pub fn wait(&self, _: &mut Vec<Ready>, _: usize, timeout: Duration) -> bool {
        let mut woken = lock(&self.woken);
        while !*woken && !timeout.is_zero() {
            woken = self.wakes.wait(woken).unwrap();
        }
        std::mem::take(&mut *woken)
    }

    pub fn wake(&self) {
        *lock(&self.woken) = true;
        self.wakes.notify_one();
    }
}
