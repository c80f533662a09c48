//! A bounded amount of something, memory or places, that many threads take
//! from and wait for, each until its own deadline.

mod rate;

pub use rate::Rate;

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crate::stripes::Stripes;

/// Places that are kept at hand for the next who takes one on the same
/// processor.
const MAX_AT_HAND: usize = 4;

/// How much there is and how much of it is taken.
pub struct Budget {
    limit: usize,
    /// What is at hand included. May exceed the limit by what was taken with
    /// [`Budget::overdraw`].
    used: AtomicUsize,
    /// Places that nobody holds, so that taking one and giving it back touches
    /// nothing that another processor does. None where amounts are taken.
    at_hand: Option<Stripes<AtomicUsize>>,
    /// Threads that wait; a giver that sees none need not take the lock.
    waiting: AtomicUsize,
    turn: Mutex<()>,
    given: Condvar,
    /// Gives back what nobody needs just now, before anyone waits.
    reclaim: OnceLock<Box<dyn Fn(bool) + Send + Sync>>,
}

/// How long a waiter waits until it has all given back that nobody needs.
const FIRST_RECLAIM: Duration = Duration::from_millis(5);

/// How often a waiter has what became idle meanwhile given back.
const RECLAIM_EVERY: Duration = Duration::from_millis(100);

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.used(), self.limit)
    }
}

impl Budget {
    /// Nothing taken yet.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Self::with(limit, None)
    }

    /// The same of places, which are taken and given back one at a time and
    /// often.
    #[must_use]
    pub fn places(limit: usize) -> Arc<Self> {
        Self::with(limit, Some(Stripes::default()))
    }

    fn with(limit: usize, at_hand: Option<Stripes<AtomicUsize>>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
            at_hand,
            waiting: AtomicUsize::new(0),
            turn: Mutex::default(),
            given: Condvar::new(),
            reclaim: OnceLock::new(),
        })
    }

    /// Says who can give back what nobody needs just now: what is easily done
    /// without, and with `true`, for those who have waited, all of it. The
    /// first one counts.
    pub fn reclaim_with(&self, reclaim: impl Fn(bool) + Send + Sync + 'static) {
        let _ = self.reclaim.set(Box::new(reclaim));
    }

    /// How much there is in all.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How much is taken.
    #[must_use]
    pub fn used(&self) -> usize {
        let at_hand = self
            .at_hand
            .iter()
            .flat_map(Stripes::iter)
            .map(|places| places.load(SeqCst))
            .sum();
        // Both change meanwhile.
        self.used.load(SeqCst).saturating_sub(at_hand)
    }

    /// Takes some if it is there.
    pub fn try_take(&self, amount: usize) -> bool {
        if let Some(at_hand) = &self.at_hand {
            assert_eq!(amount, 1, "places are taken one at a time");
            if take_one(at_hand.own()) {
                return true;
            }
        }
        let fits = |used: usize| used.checked_add(amount).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(SeqCst, SeqCst, fits).is_ok()
            || self.at_hand.iter().flat_map(Stripes::iter).any(take_one)
    }

    /// Takes some, and waits for it until the deadline. What exceeds the
    /// whole is refused at once.
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
                // Without the lock: it gives back here.
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

    /// Takes some of what is held without need.
    fn try_reclaim(&self, amount: usize) -> bool {
        amount <= self.limit
            && self.reclaim.get().is_some_and(|reclaim| {
                reclaim(true);
                self.try_take(amount)
            })
    }

    fn wait(&self, amount: usize, deadline: Instant) -> bool {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // A waiter counts itself before it looks again, a giver gives before
        // it looks for waiters: one of the two sees the other.
        self.waiting.fetch_add(1, SeqCst);
        let taken = loop {
            if self.try_take(amount) {
                break true;
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                break false;
            }
            turn = self
                .given
                .wait_timeout(turn, remaining)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        self.waiting.fetch_sub(1, SeqCst);
        drop(turn);
        // Whoever was woken passes the news on: what is left may do for the next.
        self.wake_one();
        taken
    }

    /// Takes what can't be refused any more, beyond the limit if need be:
    /// then others wait until it is given back.
    pub fn overdraw(&self, amount: usize) {
        self.used.fetch_add(amount, SeqCst);
    }

    /// Gives back.
    pub fn give(&self, amount: usize) {
        if let Some(own) = self
            .at_hand
            .as_ref()
            .map(Stripes::own)
            .filter(|own| own.load(SeqCst) < MAX_AT_HAND)
        {
            assert_eq!(amount, 1, "places are given one at a time");
            own.fetch_add(1, SeqCst);
            // A waiter counts itself before it looks for what is at hand, and
            // here it is the other way round: one of the two sees the other.
            if self.waiting.load(SeqCst) == 0 || !take_one(own) {
                return;
            }
        }
        if amount > 0 {
            let before = self.used.fetch_sub(amount, SeqCst);
            assert!(before >= amount, "more given than taken");
            self.wake_one();
        }
    }

    fn wake_one(&self) {
        if self.waiting.load(SeqCst) > 0 && self.used() < self.limit {
            drop(self.turn.lock());
            self.given.notify_one();
        }
    }
}

/// Takes one, if there is one.
fn take_one(places: &AtomicUsize) -> bool {
    // Looked at first: what is empty need not be written to.
    places.load(SeqCst) > 0
        && places
            .fetch_update(SeqCst, SeqCst, |places| places.checked_sub(1))
            .is_ok()
}

/// What one holder has taken; given back when dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    held: usize,
}

impl Charge {
    /// Holds nothing yet.
    #[must_use]
    pub fn none(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            held: 0,
        }
    }

    /// Holds `amount` in all from now on; waits until the deadline for what
    /// that is more than before. False if there was not enough.
    pub fn raise_until(&mut self, amount: usize, deadline: Instant) -> bool {
        let more = amount.saturating_sub(self.held);
        let taken = more == 0 || self.budget.take_until(more, deadline);
        if taken {
            self.held += more;
        }
        taken
    }

    /// The same, without waiting for others.
    pub fn try_raise(&mut self, amount: usize) -> bool {
        let more = amount.saturating_sub(self.held);
        let taken = more == 0 || self.budget.try_take(more) || self.budget.try_reclaim(more);
        if taken {
            self.held += more;
        }
        taken
    }

    /// Holds what another one of the same budget holds as well.
    pub fn join(&mut self, mut other: Self) {
        assert!(Arc::ptr_eq(&self.budget, &other.budget), "one budget");
        self.held += std::mem::take(&mut other.held);
    }

    /// How much it holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Holds `amount` in all from now on, whatever there is.
    pub fn set(&mut self, amount: usize) {
        if amount > self.held {
            self.budget.overdraw(amount - self.held);
        } else {
            self.budget.give(self.held - amount);
        }
        self.held = amount;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.give(self.held);
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
        budget.give(1);
        assert!(budget.try_take(4));
        assert_eq!(budget.used(), 10);
    }

    #[test]
    fn waits_for_what_others_give() {
        for budget in [Budget::new(4), Budget::places(4)] {
            assert!((0..4).all(|_| budget.try_take(1)));
            thread::scope(|scope| {
                let waiters: Vec<_> = (0..8)
                    .map(|_| scope.spawn(|| budget.take_until(1, soon())))
                    .collect();
                for _ in 0..8 {
                    while budget.used() < 4 {
                        thread::yield_now();
                    }
                    budget.give(1);
                }
                assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap()));
            });
        }
    }

    #[test]
    fn places_at_hand_are_there_for_all() {
        let budget = Budget::places(3);
        let held = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        assert!(budget.take_until(1, soon()));
                        assert!(held.fetch_add(1, SeqCst) < 3);
                        held.fetch_sub(1, SeqCst);
                        budget.give(1);
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
        assert!((0..3).all(|_| budget.try_take(1)) && !budget.try_take(1));
    }

    #[test]
    fn what_is_idle_is_given_back_before_anyone_waits() {
        let budget = Budget::new(4);
        assert!(budget.try_take(4));
        let idle = Arc::downgrade(&budget);
        budget.reclaim_with(move |_| {
            idle.upgrade()
                .filter(|idle| idle.used() == 4)
                .iter()
                .for_each(|idle| idle.give(3))
        });
        assert!(budget.take_until(3, soon()));
        assert!(!budget.take_until(5, soon()));
    }

    #[test]
    fn a_charge_gives_back() {
        let budget = Budget::new(10);
        let mut charge = Charge::none(&budget);
        assert!(charge.raise_until(6, soon()));
        charge.set(12);
        assert_eq!(budget.used(), 12);
        assert!(!charge.raise_until(13, Instant::now()));
        charge.set(2);
        let mut other = Charge::none(&budget);
        assert!(other.try_raise(3));
        charge.join(other);
        assert_eq!((charge.held(), budget.used()), (5, 5));
        drop(charge);
        assert_eq!(budget.used(), 0);
    }
}
