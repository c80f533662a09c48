//! Properties of the queue, over a clock that only the test moves.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::queue::*;

const TICK: Duration = Duration::from_millis(1);

use std::time::Duration;

/// A loop that never ends, of a service and a principal.
#[derive(Debug, Clone, Copy)]
struct Loop {
    service: ServiceId,
    principal: PrincipalId,
}

/// Processors on which those that hold a permit run, a tick at a time.
struct Machine {
    queue: RunQueue,
    permits: usize,
    now: Duration,
    loops: BTreeMap<CallId, Loop>,
    ran: BTreeMap<CallId, Duration>,
    last_ran: BTreeMap<CallId, Duration>,
    next: CallId,
}

impl Machine {
    fn new(permits: usize) -> Self {
        Self {
            queue: RunQueue::new(permits),
            permits,
            now: Duration::ZERO,
            loops: BTreeMap::new(),
            ran: BTreeMap::new(),
            last_ran: BTreeMap::new(),
            next: 0,
        }
    }

    fn service(&mut self, id: ServiceId, weight: f64, cpu: Option<f64>) {
        self.queue.set_service(self.now, id, weight, cpu);
    }

    fn begin(&mut self, service: ServiceId, principal: PrincipalId) -> CallId {
        self.next += 1;
        let id = self.next;
        self.queue.wait(self.now, id, service, principal);
        self.loops.insert(id, Loop { service, principal });
        self.last_ran.insert(id, self.now);
        self.check();
        id
    }

    fn end(&mut self, id: CallId) {
        self.queue.leave(self.now, id);
        self.loops.remove(&id);
        self.last_ran.remove(&id);
        self.check();
    }

    /// Everybody who holds a permit runs for a tick.
    fn tick(&mut self) {
        self.now += TICK;
        self.queue.grant(self.now);
        let holders: Vec<_> = self
            .loops
            .keys()
            .copied()
            .filter(|id| self.queue.holds(*id))
            .collect();
        for id in holders {
            let Loop { service, principal } = self.loops[&id];
            self.queue
                .used(self.now, service, principal, Some(id), TICK);
            *self.ran.entry(id).or_default() += TICK;
            self.last_ran.insert(id, self.now);
            if !self.queue.goes_on(self.now, id) {
                self.queue.leave(self.now, id);
                self.queue.wait(self.now, id, service, principal);
            }
        }
        self.check();
    }

    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.tick();
        }
    }

    /// Permits are neither lost nor made, and none lies idle while one waits
    /// who may have it.
    fn check(&self) {
        let holders = self
            .loops
            .keys()
            .filter(|id| self.queue.holds(**id))
            .count();
        let (held, waiting) = self.queue.counts();
        assert_eq!((held, held + waiting), (holders, self.loops.len()));
        assert!(held <= self.permits);
        assert!(held == self.permits || waiting == 0 || self.queue.alarm().is_some());
    }

    fn share(&self, fits: impl Fn(&Loop) -> bool) -> f64 {
        let all: Duration = self.ran.values().sum();
        let own: Duration = self
            .ran
            .iter()
            .filter(|(id, _)| fits(&self.loops[id]))
            .map(|(_, ran)| *ran)
            .sum();
        own.as_secs_f64() / all.as_secs_f64()
    }
}

fn near(share: f64, wanted: f64) {
    assert!((share - wanted).abs() <= 0.02, "{share} of {wanted}");
}

#[test]
fn a_service_with_one_loop_gets_as_much_as_one_with_64() {
    let mut machine = Machine::new(2);
    machine.service(1, 1.0, None);
    machine.service(2, 1.0, None);
    (0..64).for_each(|_| {
        machine.begin(1, 0);
    });
    machine.run(Duration::from_secs(1));
    machine.ran.clear();
    machine.begin(2, 0);
    machine.run(Duration::from_secs(5));
    near(machine.share(|one| one.service == 2), 0.5);
}

#[test]
fn weights_count() {
    for (first, second) in [(3.0, 1.0), (1.0, 3.0)] {
        let mut machine = Machine::new(2);
        machine.service(1, first, None);
        machine.service(2, second, None);
        (0..64).for_each(|_| {
            machine.begin(1, 0);
        });
        (0..8).for_each(|_| {
            machine.begin(2, 0);
        });
        machine.run(Duration::from_secs(5));
        near(
            machine.share(|one| one.service == 1),
            first / (first + second),
        );
    }
}

#[test]
fn principals_of_a_service_get_the_same() {
    let mut machine = Machine::new(2);
    machine.service(1, 1.0, None);
    for (principal, loops) in [(1, 40), (2, 8), (3, 2)] {
        (0..loops).for_each(|_| {
            machine.begin(1, principal);
        });
    }
    machine.run(Duration::from_secs(5));
    for principal in 1..=3 {
        near(machine.share(|one| one.principal == principal), 1.0 / 3.0);
    }
}

#[test]
fn a_share_of_a_processor_is_held() {
    let mut machine = Machine::new(2);
    machine.service(1, 1.0, Some(0.5));
    machine.service(2, 1.0, None);
    machine.queue.set_principal(Duration::ZERO, 7, Some(0.25));
    (0..8).for_each(|_| {
        machine.begin(1, 0);
    });
    (0..8).for_each(|_| {
        machine.begin(2, 7);
    });
    machine.run(Duration::from_secs(1));
    let before: Duration = machine.ran.values().sum();
    machine.run(Duration::from_secs(10));
    let after: Duration = machine.ran.values().sum();
    near((after - before).as_secs_f64() / 10.0, 0.75);
}

#[test]
fn who_comes_back_does_not_bring_along_what_it_did_not_use() {
    let mut machine = Machine::new(1);
    machine.service(1, 1.0, None);
    machine.service(2, 1.0, None);
    machine.begin(1, 0);
    machine.run(Duration::from_secs(10));
    machine.ran.clear();
    machine.begin(2, 0);
    machine.run(Duration::from_secs(1));
    near(machine.share(|one| one.service == 2), 0.5);
}

#[test]
fn a_service_is_over_its_share_while_it_uses_more_of_it() {
    let mut machine = Machine::new(2);
    machine.service(1, 1.0, None);
    let mut over_share = Vec::new();
    // Three processors' worth, and a third of one.
    for amount in [3000, 300] {
        for _ in 0..300 {
            machine.now += TICK;
            machine
                .queue
                .fills_window(machine.now, 1, Duration::from_micros(amount));
            over_share.push(machine.queue.is_over_share(machine.now, 1));
        }
    }
    assert!(!over_share[10] && over_share[299] && !over_share[599]);
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Begin(ServiceId, PrincipalId),
    End(usize),
    Run(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..4_u32, 0..3_u32).prop_map(|(service, principal)| Step::Begin(service, principal)),
        (0..100_usize).prop_map(Step::End),
        (1..20_u64).prop_map(Step::Run),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Calls come and go, waiting or running: permits return, none is idle
    /// while somebody may have it, and nobody waits longer than all others
    /// take for their slices.
    #[test]
    fn nobody_starves(
        steps in steps(),
        permits in 1..5_usize,
        weights in prop::collection::vec(1..5_u32, 4),
        cpu in prop::option::of(0.1..1.0_f64),
    ) {
        let mut machine = Machine::new(permits);
        for (id, weight) in (0..).zip(&weights) {
            machine.service(id, f64::from(*weight), cpu.filter(|_| id == 3));
        }
        for step in steps {
            match step {
                Step::Begin(service, principal) => {
                    machine.begin(service, principal);
                }
                Step::End(index) => {
                    let id = machine.loops.keys().nth(index % machine.loops.len().max(1)).copied();
                    if let Some(id) = id {
                        machine.end(id);
                    }
                }
                Step::Run(ticks) => machine.run(TICK * u32::try_from(ticks).unwrap()),
            }
        }
        let begun = machine.now;
        machine.run(Duration::from_secs(5));
        for (id, last) in &machine.last_ran {
            prop_assert!(*last > begun, "{id} of {:?} did not run", machine.loops[id]);
        }
        let all: Vec<_> = machine.loops.keys().copied().collect();
        all.into_iter().for_each(|id| machine.end(id));
        prop_assert_eq!(machine.queue.counts(), (0, 0));
    }
}

#[test]
fn calls_of_a_service_that_has_a_processor_take_turns() {
    let mut machine = Machine::new(2);
    // The last one's half is a processor, while the others take turns.
    for (id, weight) in [(0, 2.0), (1, 2.0), (3, 4.0)] {
        machine.service(id, weight, None);
    }
    let first = machine.begin(0, 0);
    machine.run(14 * TICK);
    let own = [machine.begin(3, 0), machine.begin(3, 0)];
    machine.end(first);
    for service in [0, 0, 1] {
        machine.begin(service, 0);
    }
    machine.run(Duration::from_secs(1));
    for call in own {
        let ran = machine.ran[&call];
        assert!(ran > Duration::from_millis(400), "{call}: {ran:?}");
    }
}

/// Nobody wants a call to end.
struct Calm;

impl super::Attendant for Calm {
    type Stop = ();
    fn look(&self) -> Option<()> {
        None
    }
    fn waits(&self) {}
}

#[test]
fn time_in_which_a_call_waits_is_not_what_it_ran() {
    let scheduler = super::Scheduler::new(1);
    let account = scheduler.service("stores", 1.0, None);
    let payer = super::Payer {
        account: &account,
        principal: None,
        began: std::time::Instant::now(),
    };
    let deadline = payer.began + Duration::from_secs(600);
    let ticket = super::Ticket::default();
    let since_last = Duration::from_millis(50);
    ticket.pause();
    while payer.began.elapsed() < since_last {
        std::thread::yield_now();
    }
    ticket.resume(deadline, &Calm).unwrap();
    // Ticks that fell into the wait are none of a long call.
    for _ in 0..2 {
        ticket.pause();
        ticket.resume(deadline, &Calm).unwrap();
        let cost = ticket.tick(&payer, since_last, deadline, &Calm).unwrap();
        assert!(cost.ran < since_last / 2, "{cost:?}");
        assert!(!ticket.holds());
    }
    ticket.finish();
    assert!(account.cpu() < since_last / 2, "{:?}", account.cpu());
}
