//! The one way to take a lock, and to wait for what it guards.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

/// Takes a lock. None guards anything that a panic leaves half done.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits as long as a condition holds, until a deadline; also returns whether it
/// holds no more.
pub(crate) fn wait_while<'a, T>(
    guard: MutexGuard<'a, T>,
    changed: &Condvar,
    deadline: Instant,
    waits: impl FnMut(&mut T) -> bool,
) -> (MutexGuard<'a, T>, bool) {
    let remaining = deadline.saturating_duration_since(Instant::now());
    let waited = changed.wait_timeout_while(guard, remaining, waits);
    let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
    (guard, !timeout.timed_out())
}
