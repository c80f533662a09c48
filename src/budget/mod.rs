//! A bounded amount that many threads reserve from and wait for, each until its
//! own deadline: memory in bytes, or the permits of a counting semaphore.

mod rate;

pub use rate::Rate;

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crate::{
    locks::{lock, wait_while},
    stripes::Stripes,
};

/// Released permits that stay with a processor, for the next thread on it that
/// takes one.
const MAX_PER_CPU: usize = 4;

/// A limit and how much of it is taken. [`Budget::semaphore`] is the counting
/// semaphore of it.
pub struct Budget {
    limit: usize,
    /// Per-CPU permits included. May exceed the limit by what was taken with
    /// [`Budget::overcommit`].
    used: AtomicUsize,
    /// Released permits by processor, so that taking one and releasing it
    /// writes to nothing that processors share. None where amounts are taken.
    per_cpu: Option<Stripes<AtomicUsize>>,
    /// Threads that wait. A thread that releases and sees none need not lock.
    waiting: AtomicUsize,
    lock: Mutex<()>,
    released: Condvar,
    /// Releases what is held without need, before a thread waits.
    reclaim: OnceLock<Box<dyn Fn(bool) + Send + Sync>>,
}

/// Time after which a waiter has everything released that is held without need.
const FIRST_RECLAIM: Duration = Duration::from_millis(5);

/// Time between two such attempts of one waiter.
const RECLAIM_EVERY: Duration = Duration::from_millis(100);

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.used(), self.limit)
    }
}

impl Budget {
    /// Creates a budget of which nothing is taken.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Self::with(limit, None)
    }

    /// Creates a counting semaphore of so many permits, which are taken and
    /// released one at a time and often.
    #[must_use]
    pub fn semaphore(limit: usize) -> Arc<Self> {
        Self::with(limit, Some(Stripes::default()))
    }

    fn with(limit: usize, per_cpu: Option<Stripes<AtomicUsize>>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
            per_cpu,
            waiting: AtomicUsize::new(0),
            lock: Mutex::default(),
            released: Condvar::new(),
            reclaim: OnceLock::new(),
        })
    }

    /// Sets the function that releases what is held without need: what costs
    /// little to lose, and with `true`, for threads that have waited, all of
    /// it. Only the first function set is used.
    pub fn reclaim_with(&self, reclaim: impl Fn(bool) + Send + Sync + 'static) {
        let _ = self.reclaim.set(Box::new(reclaim));
    }

    /// Returns the limit.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Returns how much is taken.
    #[must_use]
    pub fn used(&self) -> usize {
        let per_cpu = self
            .per_cpu
            .iter()
            .flat_map(Stripes::iter)
            .map(|permits| permits.load(SeqCst))
            .sum();
        // Both change meanwhile.
        self.used.load(SeqCst).saturating_sub(per_cpu)
    }

    /// Takes an amount if it is available now.
    pub fn try_take(&self, amount: usize) -> bool {
        if let Some(per_cpu) = &self.per_cpu {
            assert_eq!(amount, 1, "permits are taken one at a time");
            if take_one(per_cpu.own()) {
                return true;
            }
        }
        let fits = |used: usize| used.checked_add(amount).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(SeqCst, SeqCst, fits).is_ok()
            || self.per_cpu.iter().flat_map(Stripes::iter).any(take_one)
    }

    /// Takes an amount, and waits for it until the deadline. An amount beyond
    /// the limit is refused at once.
    pub fn take_until(&self, amount: usize, deadline: Instant) -> bool {
        if self.try_take(amount) {
            return true;
        }
        if amount > self.limit {
            return false;
        }
        let mut has_waited = false;
        loop {
            let next = match self.reclaim.get() {
                // Without the lock: it releases into this budget.
                Some(reclaim) => {
                    reclaim(has_waited);
                    let pause = if has_waited {
                        RECLAIM_EVERY
                    } else {
                        FIRST_RECLAIM
                    };
                    has_waited = true;
                    deadline.min(Instant::now() + pause)
                }
                None => deadline,
            };
            let taken = self.wait(amount, next);
            if taken || next == deadline {
                return taken;
            }
        }
    }

    /// Takes an amount once everything held without need is released.
    fn try_reclaim(&self, amount: usize) -> bool {
        amount <= self.limit
            && self.reclaim.get().is_some_and(|reclaim| {
                reclaim(true);
                self.try_take(amount)
            })
    }

    fn wait(&self, amount: usize, deadline: Instant) -> bool {
        let guard = lock(&self.lock);
        // A waiter counts itself before it tries again, and a thread releases
        // before it looks for waiters, so one of the two sees the other.
        self.waiting.fetch_add(1, SeqCst);
        let misses = |(): &mut ()| !self.try_take(amount);
        let (guard, taken) = wait_while(guard, &self.released, deadline, misses);
        self.waiting.fetch_sub(1, SeqCst);
        drop(guard);
        // One thread is woken at a time: what is left may do for the next one.
        self.wake_one();
        taken
    }

    /// Takes what can no longer be refused, beyond the limit if need be: then
    /// others wait until it is released.
    pub fn overcommit(&self, amount: usize) {
        self.used.fetch_add(amount, SeqCst);
    }

    /// Releases an amount.
    pub fn release(&self, amount: usize) {
        if let Some(own) = self
            .per_cpu
            .as_ref()
            .map(Stripes::own)
            .filter(|own| own.load(SeqCst) < MAX_PER_CPU)
        {
            assert_eq!(amount, 1, "permits are released one at a time");
            own.fetch_add(1, SeqCst);
            // A waiter counts itself before it looks at the per-CPU permits,
            // and this is the other way round, so one of the two sees the
            // other.
            if self.waiting.load(SeqCst) == 0 || !take_one(own) {
                return;
            }
        }
        if amount > 0 {
            let before = self.used.fetch_sub(amount, SeqCst);
            assert!(before >= amount, "more released than taken");
            self.wake_one();
        }
    }

    fn wake_one(&self) {
        if self.waiting.load(SeqCst) > 0 && self.used() < self.limit {
            drop(self.lock.lock());
            self.released.notify_one();
        }
    }
}

/// Takes a permit, if there is one.
fn take_one(permits: &AtomicUsize) -> bool {
    // Read first: an empty stripe need not be written to.
    permits.load(SeqCst) > 0
        && permits
            .fetch_update(SeqCst, SeqCst, |permits| permits.checked_sub(1))
            .is_ok()
}

/// What one holder has taken of a budget; released when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    held: usize,
}

impl Reservation {
    /// Creates a reservation of nothing.
    #[must_use]
    pub fn empty(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            held: 0,
        }
    }

    /// Raises the reservation to `amount` in all, and waits for the difference
    /// until the deadline. Returns false if there was not enough.
    pub fn raise_until(&mut self, amount: usize, deadline: Instant) -> bool {
        let more = amount.saturating_sub(self.held);
        let taken = more == 0 || self.budget.take_until(more, deadline);
        if taken {
            self.held += more;
        }
        taken
    }

    /// Raises the reservation to `amount` in all without waiting.
    pub fn try_raise(&mut self, amount: usize) -> bool {
        let more = amount.saturating_sub(self.held);
        let taken = more == 0 || self.budget.try_take(more) || self.budget.try_reclaim(more);
        if taken {
            self.held += more;
        }
        taken
    }

    /// Adds what another reservation of the same budget holds.
    pub fn join(&mut self, mut other: Self) {
        assert!(Arc::ptr_eq(&self.budget, &other.budget), "one budget");
        self.held += std::mem::take(&mut other.held);
    }

    /// Returns how much is reserved.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Sets the reservation to `amount` in all, beyond the limit if need be.
    pub fn set(&mut self, amount: usize) {
        if amount > self.held {
            self.budget.overcommit(amount - self.held);
        } else {
            self.budget.release(self.held - amount);
        }
        self.held = amount;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.release(self.held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn no_more_than_there_is() {
        let budget = Budget::new(10);
        assert!(budget.try_take(7));
        assert!(!budget.try_take(4));
        assert!(!budget.take_until(4, Instant::now()));
        assert!(!budget.take_until(11, soon()), "refused at once");
        budget.release(1);
        assert!(budget.try_take(4));
        assert_eq!(budget.used(), 10);
    }

    #[test]
    fn waits_for_what_others_give() {
        for budget in [Budget::new(4), Budget::semaphore(4)] {
            assert!((0..4).all(|_| budget.try_take(1)));
            thread::scope(|scope| {
                let waiters: Vec<_> = (0..8)
                    .map(|_| scope.spawn(|| budget.take_until(1, soon())))
                    .collect();
                for _ in 0..8 {
                    while budget.used() < 4 {
                        thread::yield_now();
                    }
                    budget.release(1);
                }
                assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap()));
            });
        }
    }

    #[test]
    fn per_cpu_permits_are_available_to_all() {
        let budget = Budget::semaphore(3);
        let held = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        assert!(budget.take_until(1, soon()));
                        assert!(held.fetch_add(1, SeqCst) < 3);
                        held.fetch_sub(1, SeqCst);
                        budget.release(1);
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
        assert!((0..3).all(|_| budget.try_take(1)) && !budget.try_take(1));
    }

    #[test]
    fn what_is_idle_is_released_before_anyone_waits() {
        let budget = Budget::new(4);
        assert!(budget.try_take(4));
        let idle = Arc::downgrade(&budget);
        budget.reclaim_with(move |_| {
            idle.upgrade()
                .filter(|idle| idle.used() == 4)
                .iter()
                .for_each(|idle| idle.release(3))
        });
        assert!(budget.take_until(3, soon()));
        assert!(!budget.take_until(5, soon()));
    }

    #[test]
    fn a_reservation_is_released_when_dropped() {
        let budget = Budget::new(10);
        let mut reservation = Reservation::empty(&budget);
        assert!(reservation.raise_until(6, soon()));
        reservation.set(12);
        assert_eq!(budget.used(), 12);
        assert!(!reservation.raise_until(13, Instant::now()));
        reservation.set(2);
        let mut other = Reservation::empty(&budget);
        assert!(other.try_raise(3));
        reservation.join(other);
        assert_eq!((reservation.held(), budget.used()), (5, 5));
        drop(reservation);
        assert_eq!(budget.used(), 0);
    }
}
