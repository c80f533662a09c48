//! The interleavings of the threads that serve one connection, and of the
//! drain: the file of the server itself, over loom's atomics. All those in
//! which no thread is interrupted more often than a bound says; without one,
//! three threads have more than can be gone through.

#![allow(dead_code, missing_docs, reason = "the server uses the rest")]

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, Ordering};
}

#[path = "../src/server/phase.rs"]
mod phase;

use loom::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    thread,
};
use phase::Phase;

/// One connection, as far as its end goes.
struct Connection {
    phase: Phase,
    draining: AtomicBool,
    /// Calls that have their answer, of those that were begun.
    begun: AtomicU32,
    answered: AtomicU32,
    /// The reader has found out that the server ends, and leaves the word to
    /// whoever ends the connection.
    pending: AtomicBool,
    spoken: AtomicU32,
    ended: AtomicU32,
}

impl Connection {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            phase: Phase::new(),
            draining: AtomicBool::new(false),
            begun: AtomicU32::new(0),
            answered: AtomicU32::new(0),
            pending: AtomicBool::new(false),
            spoken: AtomicU32::new(0),
            ended: AtomicU32::new(0),
        })
    }

    /// The last word: once, and after every answer.
    fn speak(&self) {
        assert_eq!(
            self.spoken.fetch_add(1, SeqCst),
            0,
            "the last word is said once"
        );
        assert_eq!(
            self.begun.load(SeqCst),
            self.answered.load(SeqCst),
            "what was begun is answered before"
        );
    }

    fn leave(&self) {
        if self.phase.detach() {
            assert_eq!(
                self.ended.fetch_add(1, SeqCst),
                0,
                "the connection ends once"
            );
            if self.pending.load(SeqCst) {
                self.speak();
            }
        }
    }

    /// A thread that was relieved comes back from its call.
    fn leave_behind(&self) {
        self.answered.fetch_add(1, SeqCst);
        if self.phase.rest() && self.draining.load(SeqCst) && self.phase.tell() {
            self.speak();
        }
        self.leave();
    }

    /// The thread that reads gets one more message, and then the peer's end.
    fn read_on(&self) {
        if self.phase.begin() {
            if self.draining.load(SeqCst) {
                assert!(self.phase.close());
                self.pending.store(true, SeqCst);
            } else {
                self.begun.fetch_add(1, SeqCst);
                self.answered.fetch_add(1, SeqCst);
                if self.phase.rest() && self.draining.load(SeqCst) && self.phase.close() {
                    self.pending.store(true, SeqCst);
                }
            }
        }
        self.leave();
    }

    fn drain(&self) {
        self.draining.store(true, SeqCst);
        if self.phase.tell() {
            self.speak();
        }
    }
}

/// One thread reads, so many are left behind in slow calls, and the server
/// drains.
fn check(slow: u32, interruptions: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(interruptions);
    model.check(move || {
        let connection = Connection::new();
        for _ in 0..slow {
            assert!(connection.phase.begin());
            connection.begun.fetch_add(1, SeqCst);
            connection.phase.attach();
        }
        let spawn = |act: fn(&Connection)| {
            let connection = Arc::clone(&connection);
            thread::spawn(move || act(&connection))
        };
        let mut threads = vec![spawn(Connection::read_on), spawn(Connection::drain)];
        threads.extend((1..slow).map(|_| spawn(Connection::leave_behind)));
        if slow > 0 {
            connection.leave_behind();
        }
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(
            connection.ended.load(SeqCst),
            1,
            "somebody turns off the light"
        );
        assert_eq!(
            connection.spoken.load(SeqCst),
            1,
            "no connection is left untold"
        );
    });
}

#[test]
fn with_one_thread_and_the_drain() {
    check(0, 10);
}

#[test]
fn with_a_slow_call() {
    check(1, 4);
}

#[test]
fn with_two_slow_calls() {
    check(2, 3);
}
