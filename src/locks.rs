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
    // `wait_timeout_while` returns from a poisoned lock when it is first notified.
    let mut guard = guard;
    while waits(&mut guard) {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return (guard, false);
        }
        let waited = changed.wait_timeout(guard, remaining);
        guard = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    (guard, true)
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    #[test]
    fn a_condition_is_waited_for_also_where_the_lock_is_poisoned() {
        let (counter, changed) = (Mutex::new(0), Condvar::new());
        let defect = || {
            let _guard = lock(&counter);
            panic!("a defect");
        };
        thread::scope(|scope| assert!(scope.spawn(defect).join().is_err()));
        let now = Instant::now();
        let (guard, is_over) = wait_while(lock(&counter), &changed, now, |count| *count < 3);
        assert!(counter.is_poisoned() && !is_over);
        drop(guard);
        let hour = now + Duration::from_secs(3600);
        thread::scope(|scope| {
            scope.spawn(|| {
                let (guard, is_over) = wait_while(lock(&counter), &changed, hour, |n| *n < 3);
                assert!(is_over && *guard == 3);
            });
            for _ in 0..3 {
                *lock(&counter) += 1;
                changed.notify_all();
            }
        });
    }
}
