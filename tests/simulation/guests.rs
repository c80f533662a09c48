//! What calls do: the payload says it.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use shuttle::thread;

use crate::{
    dispatch::{Answered, Counted, Deferred, HandOver, Handle, Outcome, Postponed, Reply, Request},
    host::Stop,
    system::{self, World},
    wire::{Code, ErrorBody, Header},
};

/// Until when a call that queues must begin, where it was postponed.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);

/// What guests panic with.
const ON_PURPOSE: &str = "a defect, on purpose";

/// What guests do: the payload says it.
#[derive(Default)]
pub struct Guests {
    /// Requests that have begun, or are answered that they could not.
    pub begun: std::sync::Mutex<HashSet<String>>,
    /// Requests that were handled, also those that queue.
    pub handled: std::sync::Mutex<HashSet<String>>,
    /// Until when those that are postponed must begin.
    pub postponed: std::sync::Mutex<HashMap<String, std::time::Instant>>,
    /// Places that they queue for.
    pub slots: std::sync::atomic::AtomicUsize,
    /// Answers that wait until the disk has what they say.
    unflushed: Arc<std::sync::Mutex<Vec<Unflushed>>>,
}

/// An answer that is deferred.
struct Unflushed {
    hand_over: HandOver,
    text: String,
}

impl Unflushed {
    fn hand_over(self, more: bool) {
        let Self { hand_over, text } = self;
        hand_over(Box::new(move || late(text)), more);
    }
}

/// A call that is over, and whose answer waits for the disk.
struct Stored {
    text: String,
    /// The disk has it already.
    is_flushed: bool,
    all: Arc<std::sync::Mutex<Vec<Unflushed>>>,
}

fn late(text: String) -> Answered {
    Outcome::Json(text).into()
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Deferred for Stored {
    fn wait(self: Box<Self>) -> Answered {
        World::here().wait_for_clock();
        late(self.text)
    }

    fn then(self: Box<Self>, hand_over: HandOver) {
        let Self {
            text,
            is_flushed,
            all,
        } = *self;
        let unflushed = Unflushed { hand_over, text };
        if is_flushed {
            unflushed.hand_over(false);
        } else {
            all.lock().unwrap().push(unflushed);
        }
    }
}

impl Handle for Guests {
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a> {
        let Ok((header, payload)) = Header::parse(request.body) else {
            let body = ErrorBody::server(Code::MalformedMessage, "what is this");
            let outcome = Outcome::Error(Some(Code::MalformedMessage), body);
            return Reply::new(None, outcome);
        };
        let text = std::str::from_utf8(payload).unwrap().trim();
        let id = header.request_id.unwrap().to_owned();
        self.handled.lock().unwrap().insert(id.clone());
        self.postponed.lock().unwrap().remove(&id);
        let queues = text.starts_with("queues");
        let until = request.arrived + QUEUE_TIMEOUT;
        if request
            .postponed
            .is_some_and(|postponed| postponed.until <= system::now())
        {
            let id = header.request_id.unwrap().to_owned();
            assert!(self.begun.lock().unwrap().insert(id), "it has run");
            let body = ErrorBody::server(Code::ServiceUnavailable, "not begun");
            let outcome = Outcome::Error(Some(Code::ServiceUnavailable), body);
            return Reply::new(Some(header), outcome);
        }
        if queues && !self.take_place(&request) {
            let counted = Counted::ByService;
            self.postponed.lock().unwrap().insert(id, until);
            return Reply::new(
                Some(header),
                Outcome::Postponed(Postponed { until, counted }),
            );
        }
        let id = header.request_id.unwrap().to_owned();
        assert!(self.begun.lock().unwrap().insert(id), "it runs twice");
        if std::env::var("MB_SEED").is_ok() {
            println!("begins {:?} {text}", header.request_id);
        }
        let (kind, amount) = text.split_once(' ').unwrap_or((text, "0"));
        let amount: u64 = amount.parse().unwrap();
        let stopped = match kind {
            "quick" => None,
            "stores" => {
                let stored = Stored {
                    text: format!("{:?}", "x".repeat(amount as usize)),
                    is_flushed: amount.is_multiple_of(4),
                    all: Arc::clone(&self.unflushed),
                };
                return Reply::new(Some(header), Outcome::Deferred(Box::new(stored)));
            }
            "slow" => Self::works(&request, amount),
            "queues" => {
                let stopped = Self::works(&request, amount);
                self.slots.fetch_add(1, SeqCst);
                World::here().pass(Duration::ZERO);
                stopped
            }
            "waits" => {
                request.watch.waits();
                Self::works(&request, amount)
            }
            "panics" => {
                request.watch.waits();
                // Without the hook, which would say so.
                std::panic::resume_unwind(Box::new(ON_PURPOSE))
            }
            _ => unreachable!("{kind}"),
        };
        let outcome = match stopped {
            None => Outcome::Json(format!("{:?}", "x".repeat(amount as usize % 300))),
            Some(_) => {
                let body = ErrorBody::server(Code::Timeout, "stopped");
                Outcome::Error(Some(Code::Timeout), body)
            }
        };
        Reply::new(Some(header), outcome)
    }
}

impl Guests {
    /// The disk has what so many calls wrote, those that came first.
    pub fn flush(&self, most: usize) {
        let mut unflushed = self.unflushed.lock().unwrap();
        let count = most.min(unflushed.len());
        let flushed: Vec<_> = unflushed.drain(..count).collect();
        drop(unflushed);
        for (place, one) in flushed.into_iter().enumerate() {
            one.hand_over(place + 1 < count);
        }
    }

    /// Takes a place, however long that takes; false if the call is postponed.
    fn take_place(&self, request: &Request<'_>) -> bool {
        let try_take = || {
            let one_less = |slots: usize| slots.checked_sub(1);
            self.slots.fetch_update(SeqCst, SeqCst, one_less).is_ok()
        };
        if try_take() {
            return true;
        }
        if !request.watch.queues() {
            return false;
        }
        while !try_take() {
            World::here().wait_for_clock();
            request.watch.tick();
        }
        request.watch.begins();
        true
    }

    /// So many milliseconds, a tick each time that the clock has moved.
    fn works(request: &Request<'_>, millis: u64) -> Option<Stop> {
        let until = system::now() + Duration::from_millis(millis);
        for _ in 0..2 {
            if let Some(stop) = request.watch.tick() {
                return Some(stop);
            }
            thread::yield_now();
        }
        while system::now() < until {
            World::here().wait_for_clock();
            if let Some(stop) = request.watch.tick() {
                return Some(stop);
            }
        }
        None
    }
}
