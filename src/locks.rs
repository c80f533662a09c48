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
    mut waits: impl FnMut(&mut T) -> bool,
) -> (MutexGuard<'a, T>, bool) {
    let remaining = deadline.saturating_duration_since(Instant::now());
    // What a poisoned lock returns says nothing of the condition.
    let mut is_over = false;
    let still_waits = |value: &mut T| {
        is_over = !waits(value);
        !is_over
    };
    let waited = changed.wait_timeout_while(guard, remaining, still_waits);
    let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
    (guard, is_over)
}
