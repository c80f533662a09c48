//! The poller itself, over loom's locks and atomics: where two threads meet,
//! every order of their steps is run, not a sample of them as in the simulation.
//! loom takes `SeqCst` for `AcqRel`, so what rests on one order of two variables
//! (a sweep beside a connection that is being parked) is left to the simulation.
//!
//!     cargo test --release --test loom

#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "what is checked is the server's, which has all of it"
)]

#[path = "../../src/server/poller.rs"]
mod poller;
mod system;

use std::time::{Duration, Instant};

use loom::{sync::Arc, thread};
use poller::{Events, Parked, PollOptions, Poller, Taken};
use system::Channel;

const SLOT: usize = 0;
const WORKERS: usize = 2;

const OPTIONS: PollOptions = PollOptions {
    waits: true,
    may_begin: true,
    takes_queued: false,
    is_quick: false,
};

/// A connection that wants nothing by itself.
#[derive(Default)]
struct Quiet {
    deadline: Option<Instant>,
    is_postponed: bool,
}

impl Parked for Quiet {
    fn slot(&self) -> usize {
        SLOT
    }

    fn channel(&self) -> Option<&Channel> {
        None
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn goes_on(&self) -> bool {
        false
    }

    fn is_postponed(&self) -> bool {
        self.is_postponed
    }
}

fn poller() -> Arc<Poller<Quiet>> {
    system::set_clock(Duration::ZERO);
    Arc::new(Poller::new(1, WORKERS).expect("it asks the system for nothing"))
}

/// Serves as a worker does, until it has a connection.
fn work(poller: &Poller<Quiet>) -> Taken<Quiet> {
    loop {
        poller.sweep(system::now());
        if let Some((taken, _)) = poller.next(OPTIONS, &mut Vec::new()) {
            return taken;
        }
    }
}

/// Parks as a worker does that looks for no further connection.
fn park(poller: &Poller<Quiet>, connection: Quiet) {
    if poller.park(Box::new(connection)) {
        poller.wake();
    }
}

#[test]
fn an_event_is_not_lost_while_its_connection_is_parked() {
    loom::model(|| {
        let poller = poller();
        let parks = Arc::clone(&poller);
        let parks = thread::spawn(move || park(&parks, Quiet::default()));
        let delivers = Arc::clone(&poller);
        let delivers = thread::spawn(move || delivers.deliver(SLOT, Events::ANSWER));
        let (_, events) = work(&poller);
        assert!(events.has(Events::ANSWER));
        parks.join().unwrap();
        delivers.join().unwrap();
    });
}

#[test]
fn one_of_two_owners_takes_a_connection() {
    loom::model(|| {
        let poller = poller();
        park(&poller, Quiet::default());
        let answers = Arc::clone(&poller);
        let answers =
            thread::spawn(move || answers.take_with(SLOT, Events::ANSWER).map(|taken| taken.1));
        let closes = poller.take_with(SLOT, Events::CLOSE).map(|taken| taken.1);
        let answers = answers.join().unwrap();
        let events = match (answers, closes) {
            (Some(events), None) | (None, Some(events)) => events,
            both => panic!("taken by {both:?}"),
        };
        // The other's event is there, or waits for the owner to park.
        if !(events.has(Events::ANSWER) && events.has(Events::CLOSE)) {
            assert!(poller.park(Box::default()));
        }
    });
}

#[test]
fn a_deadline_is_not_lost_while_workers_wait() {
    loom::model(|| {
        let poller = poller();
        let connection = Quiet {
            deadline: Some(system::now()),
            ..Quiet::default()
        };
        system::set_clock(Duration::from_secs(2));
        let parks = Arc::clone(&poller);
        let parks = thread::spawn(move || park(&parks, connection));
        let (_, events) = work(&poller);
        assert!(events.has(Events::OVERDUE));
        parks.join().unwrap();
    });
}

#[test]
fn what_was_postponed_is_tried_again() {
    loom::model(|| {
        let poller = poller();
        let parks = Arc::clone(&poller);
        let parks = thread::spawn(move || {
            let connection = Quiet {
                is_postponed: true,
                ..Quiet::default()
            };
            park(&parks, connection);
        });
        let begins = Arc::clone(&poller);
        let begins = thread::spawn(move || begins.retry_postponed());
        let (_, events) = work(&poller);
        assert!(events.has(Events::RETRY));
        parks.join().unwrap();
        begins.join().unwrap();
    });
}

#[test]
fn the_reserve_polls_once_all_are_absent() {
    loom::model(|| {
        let poller = poller();
        let threads: Vec<_> = (0..WORKERS)
            .map(|_| {
                let poller = Arc::clone(&poller);
                thread::spawn(move || poller.is_absent())
            })
            .collect();
        poller.wait_as_reserve();
        assert!(poller.all_are_absent());
        for thread in threads {
            thread.join().unwrap();
        }
    });
}
