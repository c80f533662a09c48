//! How a call waits for something that others hold: without a run permit,
//! looked after, until its deadline at the latest.

use std::time::{Duration, Instant};

use super::{Context, Stop, Watch};

/// A call that waits is looked after this soon, because answers from before it
/// may wait with it, and then this often.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often a call that has begun is looked after while it waits for memory. Each
/// time, idle instances are released again.
const LOOK_EVERY_INSIDE: Duration = Duration::from_millis(10);

/// Who waits for something, until when.
#[derive(Clone, Copy)]
pub struct Waiter<'a> {
    watch: &'a dyn Watch,
    deadline: Instant,
    /// It is the call of a client, which may be handed back before it begins.
    pub is_outermost: bool,
    /// From one look to the next.
    every: Duration,
}

/// Why something was not had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitError {
    /// Not until the deadline.
    Late,
    /// The call shall end.
    Stopped(Stop),
    /// The call is to be handed back.
    Postponed,
}

impl From<WaitError> for Stop {
    /// Of a call that has begun, which is never handed back.
    fn from(missed: WaitError) -> Self {
        match missed {
            WaitError::Stopped(stop) => stop,
            WaitError::Late | WaitError::Postponed => Self::Deadline,
        }
    }
}

impl<'a> Waiter<'a> {
    /// The call of a context.
    #[inline]
    #[must_use]
    pub fn of(watch: &'a dyn Watch, context: &Context) -> Self {
        Self {
            watch,
            deadline: context.deadline,
            is_outermost: context.depth() == 0,
            every: LOOK_EVERY,
        }
    }

    /// A call that has begun, which waits for memory.
    #[must_use]
    pub fn inside(watch: &'a dyn Watch, deadline: Instant) -> Self {
        Self {
            watch,
            deadline,
            is_outermost: false,
            every: LOOK_EVERY_INSIDE,
        }
    }

    /// The same, looked after so often.
    #[must_use]
    pub fn each(self, every: Duration) -> Self {
        Self { every, ..self }
    }

    /// The call of a client, before there is a context.
    #[must_use]
    pub fn of_client(watch: &'a dyn Watch, deadline: Instant) -> Self {
        Self {
            watch,
            deadline,
            is_outermost: true,
            every: LOOK_EVERY,
        }
    }

    /// Waits until something is found, without a run permit. What was found is
    /// released if the call shall end.
    ///
    /// # Errors
    /// If it is not found, the call shall end, or too many wait.
    pub fn wait<T>(self, find: impl FnOnce() -> Result<T, WaitError>) -> Result<T, WaitError> {
        self.watch.pause();
        if !self.is_outermost {
            self.watch.waits();
        } else if !self.watch.queues() {
            return Err(WaitError::Postponed);
        }
        let found = find().and_then(|found| {
            let stop = self.watch.end_wait(self.deadline);
            stop.map_or(Ok(found), |stop| Err(WaitError::Stopped(stop)))
        });
        if self.is_outermost {
            self.watch.begins();
        }
        found
    }

    /// The same for what is taken by a function that waits until an instant and
    /// says whether it has it.
    ///
    /// # Errors
    /// As [`Waiter::wait`].
    pub fn take(self, mut take: impl FnMut(Instant) -> bool) -> Result<(), WaitError> {
        self.wait(|| {
            let mut looks = self.looks();
            while !take(looks.next) {
                looks.look()?;
            }
            Ok(())
        })
    }

    /// When it is looked after while it waits, from now on.
    #[must_use]
    pub fn looks(self) -> Looks<'a> {
        Looks {
            next: self.deadline.min(Instant::now() + FIRST_LOOK),
            waiter: self,
        }
    }
}

/// The looks at a call that waits.
pub struct Looks<'a> {
    waiter: Waiter<'a>,
    /// Until then it may wait.
    pub next: Instant,
}

impl Looks<'_> {
    /// One of them.
    ///
    /// # Errors
    /// If the call shall end.
    pub fn look(&mut self) -> Result<(), WaitError> {
        let Waiter {
            watch,
            deadline,
            every,
            ..
        } = self.waiter;
        if let Some(stop) = watch.tick() {
            return Err(WaitError::Stopped(stop));
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(WaitError::Late);
        }
        watch.waits();
        self.next = deadline.min(now + every);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Unwatched;

    struct Ends;

    impl Watch for Ends {
        fn tick(&self) -> Option<Stop> {
            Some(Stop::Killed)
        }
    }

    #[test]
    fn a_wait_ends_with_what_is_taken_at_the_deadline_or_with_the_call() {
        let now = Instant::now();
        let hour = now + Duration::from_secs(3600);
        let nothing = |until: Instant| {
            assert!(until <= Instant::now() + LOOK_EVERY, "it is looked after");
            false
        };
        let mut tries = 0;
        let inside = Waiter::inside(&Unwatched, hour).take(|until| {
            let in_time = until <= Instant::now() + LOOK_EVERY_INSIDE;
            assert!(in_time, "idle instances are released");
            tries += 1;
            tries == 3
        });
        assert_eq!(inside, Ok(()));
        let mut tries = 0;
        let third = |_| {
            tries += 1;
            tries == 3
        };
        assert_eq!(Waiter::of_client(&Unwatched, hour).take(third), Ok(()));
        let late = Waiter::of_client(&Unwatched, now).take(nothing);
        assert_eq!(late, Err(WaitError::Late));
        let stopped = Waiter::of_client(&Ends, hour).take(nothing);
        assert_eq!(stopped, Err(WaitError::Stopped(Stop::Killed)));
    }
}
