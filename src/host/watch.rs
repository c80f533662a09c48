//! Watches a call while it runs or waits, and may stop it.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::waiter::Waiter;
use crate::scheduler::{Attendant, Cost, PermitError, Ticket};

/// How often a call that sleeps is looked after: a server that ends leaves it 50 ms
/// and more to notice (`drain_timeout` of 100 ms).
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A sleep that is shorter is not worth another thread.
const LONG_ENOUGH: Duration = Duration::from_millis(1);

/// Looks after a call that takes longer than a tick. It is asked on the
/// thread of the call, and must not block.
pub trait Watch: Send + Sync {
    /// Whether the call shall end before its deadline.
    fn tick(&self) -> Option<Stop>;

    /// The call is about to wait for something, for as long as a quick call
    /// takes at least.
    fn waits(&self) {}

    /// The call has not begun, and is about to wait until it may. False if it
    /// shall not, but be handed back and asked again later: too many wait.
    #[must_use]
    fn queues(&self) -> bool {
        self.waits();
        true
    }

    /// It has what it waited for.
    fn begins(&self) {}

    /// The call goes on when its client resets the connection.
    fn outlives_reset(&self) {}

    /// What the scheduler knows of the call; none where nothing is scheduled.
    fn ticket(&self) -> Option<&Ticket> {
        None
    }

    /// What the call has cost so far, at a tick.
    fn costs(&self, _cost: Cost) {}
}

impl dyn Watch + '_ {
    /// The call begins to wait: others are served meanwhile, and run.
    pub fn begin_wait(&self) {
        self.pause();
        self.waits();
    }

    /// The call gives its run permit back: others run meanwhile.
    pub fn pause(&self) {
        if let Some(ticket) = self.ticket() {
            ticket.pause();
        }
    }

    /// The call has waited; says whether it shall end instead of going on.
    pub fn end_wait(&self, deadline: Instant) -> Option<Stop> {
        let ticket = self.ticket()?;
        ticket.resume(deadline, &Attends(self)).err().map(stop)
    }
}

/// The scheduler's way to ask.
pub(super) struct Attends<'a>(pub(super) &'a dyn Watch);

impl Attendant for Attends<'_> {
    type Stop = Stop;

    fn look(&self) -> Option<Stop> {
        self.0.tick()
    }

    fn waits(&self) {
        self.0.waits();
    }

    fn queues(&self) -> bool {
        self.0.queues()
    }
}

/// Why a call ends that did not get a run permit.
pub(super) fn stop(ended: PermitError<Stop>) -> Stop {
    match ended {
        PermitError::Deadline => Stop::Deadline,
        PermitError::Stopped(stop) => stop,
    }
}

/// Nobody looks.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn tick(&self) -> Option<Stop> {
        None
    }
}

crate::wire::words! {
    /// Why a running call was stopped.
    pub enum Stop {
        /// Its deadline passed.
        Deadline = "stopped at its deadline",
        /// The server ends, and its time for that is over.
        Shutdown = "stopped because the server shuts down",
        /// The operator wants it.
        Killed = "stopped by the operator",
        /// Its client has reset the connection.
        Reset = "stopped because its client has reset the connection",
    }
}

impl std::error::Error for Stop {}

/// Sleeps until an instant, or says why the call must end before.
pub(super) fn sleep(watch: &dyn Watch, until: Instant, deadline: Instant) -> Result<(), Stop> {
    if until.saturating_duration_since(Instant::now()) >= LONG_ENOUGH {
        watch.begin_wait();
    } else {
        watch.pause();
    }
    let mut looks = Waiter::inside(watch, deadline).each(LOOK_EVERY).looks();
    loop {
        let next = looks.next.min(until);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        if Instant::now() >= until {
            return watch.end_wait(deadline).map_or(Ok(()), Err);
        }
        looks.look()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ends;

    impl Watch for Ends {
        fn tick(&self) -> Option<Stop> {
            Some(Stop::Shutdown)
        }
    }

    #[test]
    fn a_sleep_ends_when_the_call_does() {
        let now = Instant::now();
        let later = now + Duration::from_secs(3600);
        assert_eq!(sleep(&Unwatched, now, later), Ok(()));
        assert_eq!(sleep(&Unwatched, later, now), Err(Stop::Deadline));
        assert_eq!(sleep(&Ends, later, later), Err(Stop::Shutdown));
    }
}
