//! Calls that compute and take turns: the scheduler itself. Calls begin, end,
//! wait for something else, are stopped and miss their deadlines as the seed
//! says, each on a thread of its own.
//!
//! Held at each rest: no more calls hold a permit than there are permits; none
//! is free while a call waits that may have it; no call waits that was stopped
//! or whose deadline has passed, and none for long. At the end all permits are
//! back. Who is next is held by the tests beside the queue.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use shuttle::thread;

use crate::{
    machine::{Random, runner},
    system::{self, Pool, Thread, World},
    turns::scheduler::{Account, Attendant, Payer, PermitError, Scheduler, Ticket},
};

#[path = "../../src/scheduler/mod.rs"]
mod scheduler;

const TICK: Duration = Duration::from_millis(1);
/// Calls at the same time.
const CALLS: usize = 7;
/// Calls of a run.
const CALLS_IN_ALL: usize = 12;
/// All others take this long at most, with slices of 4 ms and weights of 4.
const LONGEST_WAIT: Duration = Duration::from_millis(300);
/// Looks of one who waits for a rest.
const MAX_LOOKS: usize = 100_000;

const COMPUTES: u8 = 0;
const WAITS_FOR_TURN: u8 = 1;
const WAITS: u8 = 2;
const OVER: u8 = 3;

/// What others know of a call.
struct Call {
    state: AtomicU8,
    is_stopped: AtomicBool,
    /// Milliseconds of the run.
    since: AtomicU64,
    deadline: Instant,
    begun: Instant,
    thread: std::sync::OnceLock<Thread>,
}

impl Call {
    fn is(&self, state: u8) {
        if self.state.swap(state, SeqCst) == state {
            return;
        }
        let since = system::now().saturating_duration_since(self.begun);
        let millis = u64::try_from(since.as_millis()).unwrap();
        self.since.store(millis, SeqCst);
    }

    fn stop(&self) {
        self.is_stopped.store(true, SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

struct Looks<'a>(&'a Call);

impl Attendant for Looks<'_> {
    type Stop = ();

    fn look(&self) -> Option<()> {
        self.0.is_stopped.load(SeqCst).then_some(())
    }

    fn waits(&self) {
        self.0.is(WAITS_FOR_TURN);
    }
}

/// What a call does, in this order and over again.
struct Guest {
    call: Arc<Call>,
    account: Arc<Account>,
    principal: String,
    ticks: usize,
    /// It waits for something else after so many.
    pauses_after: usize,
}

impl Guest {
    fn run(self) {
        let Self {
            call,
            account,
            principal,
            ticks,
            pauses_after,
        } = self;
        let _ = call.thread.set(system::current());
        let payer = Payer {
            account: &account,
            principal: Some(&principal),
            began: system::now(),
        };
        let (ticket, deadline, looks) = (Ticket::default(), call.deadline, Looks(&call));
        let serve = || -> Result<(), PermitError<()>> {
            if account.is_over_share() {
                ticket.enter(&payer, deadline, &looks)?;
            }
            for tick in 1..=ticks {
                call.is(COMPUTES);
                system::compute(TICK);
                ticket.tick(&payer, TICK, deadline, &looks)?;
                if tick % pauses_after == 0 {
                    ticket.pause();
                    ticket.assert_paused();
                    call.is(WAITS);
                    World::here().wait_for_clock();
                    ticket.resume(deadline, &looks)?;
                }
            }
            Ok(())
        };
        match serve() {
            Ok(()) => {}
            Err(PermitError::Deadline) => assert!(system::now() >= deadline, "too early"),
            Err(PermitError::Stopped(())) => assert!(call.is_stopped.load(SeqCst), "nobody asked"),
        }
        ticket.finish();
        assert!(!ticket.holds(), "a call that is over holds a permit");
        call.is(OVER);
    }
}

/// Runs a seed, or panics.
pub fn run(seed: u64) {
    runner(seed).run(move || Turns::new(seed).run());
}

struct Turns {
    random: Random,
    world: Arc<World>,
    threads: Pool,
    scheduler: Arc<Scheduler>,
    accounts: Vec<Arc<Account>>,
    permits: usize,
    /// A service has a share of a processor: permits may be free.
    is_bounded: bool,
    calls: Vec<Arc<Call>>,
    begun: usize,
}

impl Turns {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let world = World::begin();
        let permits = random.of(1..4);
        let scheduler = Scheduler::new(permits);
        let is_bounded = random.happens(30);
        let account = |number: usize| {
            let weight = random.of(1..5) as f64;
            let cpu = (is_bounded && number == 0).then_some(0.3);
            scheduler.service(&number.to_string(), weight, cpu)
        };
        let accounts = (0..3).map(account).collect();
        Self {
            random,
            world,
            threads: Pool::new(CALLS, CALLS, 0),
            scheduler,
            accounts,
            permits,
            is_bounded,
            calls: Vec::new(),
            begun: 0,
        }
    }

    fn run(mut self) {
        while self.begun < CALLS_IN_ALL || !self.calls.is_empty() {
            match self.random.of(0..10) {
                0..3 if self.calls.len() < CALLS && self.begun < CALLS_IN_ALL => self.begin(),
                3 if !self.calls.is_empty() && self.random.happens(30) => {
                    let index = self.random.of(0..self.calls.len());
                    self.calls[index].stop();
                }
                // Without a rest, now and then.
                4 => thread::yield_now(),
                _ => {
                    self.rest();
                    self.world.pass(TICK / 2);
                }
            }
            self.calls.retain(|call| call.state.load(SeqCst) != OVER);
        }
        self.rest();
        assert_eq!(self.scheduler.counts(), (0, 0), "a permit is not back");
        assert_eq!(self.world.threads(), 0, "a thread is not back");
    }

    fn begin(&mut self) {
        let now = system::now();
        let timeout = if self.random.happens(25) {
            self.random.of(5..100) as u64
        } else {
            2000
        };
        let ticks = if self.random.happens(15) {
            200
        } else {
            self.random.of(1..30)
        };
        let call = Arc::new(Call {
            state: AtomicU8::new(COMPUTES),
            is_stopped: AtomicBool::new(false),
            since: AtomicU64::new(0),
            deadline: now + Duration::from_millis(timeout),
            begun: now,
            thread: std::sync::OnceLock::new(),
        });
        let account = self.random.of(0..self.accounts.len());
        let guest = Guest {
            call: Arc::clone(&call),
            account: Arc::clone(&self.accounts[account]),
            principal: self.random.of(0..3).to_string(),
            ticks,
            pauses_after: self.random.of(2..20),
        };
        if self.threads.execute(move || guest.run()) {
            self.calls.push(call);
            self.begun += 1;
        }
    }

    /// Waits until nobody has anything to do, and holds all against it.
    fn rest(&self) {
        for look in 0.. {
            if self.world.is_at_rest() {
                break;
            }
            assert!(look < MAX_LOOKS, "they do not rest");
            thread::yield_now();
        }
        let (held, waiting) = self.scheduler.counts();
        assert!(held <= self.permits, "{held} of {} permits", self.permits);
        assert!(
            held == self.permits || waiting == 0 || self.is_bounded,
            "{waiting} wait for {} permits, of which {held} are held",
            self.permits
        );
        let now = system::now();
        let for_turn = |call: &&Arc<Call>| call.state.load(SeqCst) == WAITS_FOR_TURN;
        let parked = self.calls.iter().filter(for_turn).count();
        assert_eq!(parked, waiting, "one sleeps that has a permit");
        for call in self.calls.iter().filter(for_turn) {
            assert!(!call.is_stopped.load(SeqCst), "one that was stopped waits");
            assert!(now < call.deadline, "one waits beyond its deadline");
            let since = Duration::from_millis(call.since.load(SeqCst));
            let waits = now.saturating_duration_since(call.begun + since);
            assert!(waits <= LONGEST_WAIT || self.is_bounded, "one starves");
        }
    }
}
