//! Which of the calls that run long runs next, and what each has cost.
//!
//! A call that is over in a tick of the sandbox has nothing to do with any of
//! this. One that sees its second tick needs a run permit to go on, of which
//! there are as many as processors; one of a service that was over its share of
//! the last 100 ms needs it before it begins. It gives the permit back before it
//! waits for anything, and takes it again afterwards. [`queue`] decides who is
//! next, without threads and without a clock; this file has threads wait for it.

pub mod queue;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use queue::{CallId, PrincipalId, RunQueue, ServiceId};

use crate::system::{
    self, AtomicBool, AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering::Relaxed, Thread, lock,
};

/// The tick from which on a call needs a permit.
const LONG: u32 = 2;

/// Time of a call at its first tick from which on it is not very short: those
/// of a service count towards its share, so that a flood of calls that each end
/// before their second tick is one of long calls.
const NOT_SHORT: Duration = Duration::from_micros(250);

/// Principals that are distinguished; later ones count as one.
const MAX_PRINCIPALS: usize = 10_000;

/// The principal of callers without a name, and of those beyond the bound.
const OTHERS: PrincipalId = 0;

/// A service, as the scheduler knows it: all versions of a name are one.
pub struct Account {
    id: ServiceId,
    scheduler: Arc<Scheduler>,
    /// Its calls look for a permit before they begin.
    over_share: AtomicBool,
    /// Processor time of all its calls, in nanoseconds.
    cpu: AtomicU64,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service {}", self.id)
    }
}

impl Account {
    /// Whether its calls look for a permit before they begin. All that a quick
    /// call pays for the scheduler.
    #[inline]
    #[must_use]
    pub fn is_over_share(&self) -> bool {
        self.over_share.load(Relaxed)
    }

    /// Processor time of all its calls.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        Duration::from_nanos(self.cpu.load(Relaxed))
    }
}

/// A principal, as the scheduler knows it.
#[derive(Debug, Default)]
struct Principal {
    id: PrincipalId,
    cpu: AtomicU64,
}

/// What a call has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Processor time of its thread; of a call that saw one tick, the time
    /// between two at least, which stands for calls that saw none.
    pub ran: Duration,
    /// How long it waited for a run permit.
    pub waited: Duration,
}

/// A thread that waits, and who is to be asked when a permit is free.
#[derive(Default)]
struct Waiting(BTreeMap<CallId, Thread>);

impl Waiting {
    fn wake(&self, calls: &[CallId]) {
        calls
            .iter()
            .filter_map(|call| self.0.get(call))
            .for_each(Thread::unpark);
    }
}

struct Inner {
    queue: RunQueue,
    waiting: Waiting,
    next_call: CallId,
    services: BTreeMap<String, Arc<Account>>,
    principals: HashMap<String, Arc<Principal>>,
    /// Settings of principals by name, and those of all others.
    cpu_of: BTreeMap<String, Option<f64>>,
    cpu_of_others: Option<f64>,
}

/// Has the calls that run long take turns.
pub struct Scheduler {
    inner: Mutex<Inner>,
    started: Instant,
    others: Arc<Principal>,
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scheduler")
    }
}

impl Scheduler {
    /// As many permits as the process may use processors.
    #[must_use]
    pub fn of_this_machine() -> Arc<Self> {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// With so many permits.
    #[must_use]
    pub fn new(permits: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                queue: RunQueue::new(permits),
                waiting: Waiting::default(),
                next_call: 0,
                services: BTreeMap::new(),
                principals: HashMap::new(),
                cpu_of: BTreeMap::new(),
                cpu_of_others: None,
            }),
            started: system::now(),
            others: Arc::default(),
        })
    }

    /// A service by its name, with what holds for it from now on: its weight,
    /// and its share of a processor if that is bounded.
    #[must_use]
    pub fn service(self: &Arc<Self>, name: &str, weight: f64, cpu: Option<f64>) -> Arc<Account> {
        let mut inner = self.lock();
        let next = ServiceId::try_from(inner.services.len()).unwrap_or(ServiceId::MAX);
        let known = inner.services.get(name).cloned();
        let account = known.unwrap_or_else(|| {
            let account = Arc::new(Account {
                id: next,
                scheduler: Arc::clone(self),
                over_share: AtomicBool::new(false),
                cpu: AtomicU64::new(0),
            });
            inner.services.insert(name.into(), Arc::clone(&account));
            account
        });
        inner.queue.set_service(self.now(), account.id, weight, cpu);
        account
    }

    /// The shares of a processor of principals by name, and of each other one,
    /// from now on.
    pub fn set_principals(&self, cpu_of: BTreeMap<String, Option<f64>>, others: Option<f64>) {
        let now = self.now();
        let mut inner = self.lock();
        inner.cpu_of = cpu_of;
        inner.cpu_of_others = others;
        let Inner {
            queue,
            principals,
            cpu_of,
            ..
        } = &mut *inner;
        for (name, principal) in principals {
            let cpu = cpu_of.get(name).copied().unwrap_or(others);
            queue.set_principal(now, principal.id, cpu);
        }
    }

    /// Processor time by principal so far, in the order of their names.
    #[must_use]
    pub fn cpu_by_principal(&self) -> Vec<(String, Duration)> {
        let of = |principal: &Principal| Duration::from_nanos(principal.cpu.load(Relaxed));
        let mut all: Vec<_> = {
            let inner = self.lock();
            let known = inner.principals.iter();
            known.map(|(name, one)| (name.clone(), of(one))).collect()
        };
        let others = of(&self.others);
        if !others.is_zero() {
            all.push(("-".into(), others));
        }
        all.sort();
        all
    }

    /// Calls that run with a permit, and calls that wait for one.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        self.lock().queue.counts()
    }

    fn principal(&self, name: Option<&str>) -> Arc<Principal> {
        let Some(name) = name else {
            return Arc::clone(&self.others);
        };
        let now = self.now();
        let mut inner = self.lock();
        if let Some(known) = inner.principals.get(name) {
            return Arc::clone(known);
        }
        if inner.principals.len() == MAX_PRINCIPALS {
            return Arc::clone(&self.others);
        }
        let id = PrincipalId::try_from(inner.principals.len() + 1).unwrap_or(OTHERS);
        let principal = Arc::new(Principal {
            id,
            cpu: AtomicU64::new(0),
        });
        inner.principals.insert(name.into(), Arc::clone(&principal));
        let own = inner.cpu_of.get(name).copied();
        let cpu = own.unwrap_or(inner.cpu_of_others);
        inner.queue.set_principal(now, id, cpu);
        principal
    }

    fn now(&self) -> Duration {
        system::now().saturating_duration_since(self.started)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

impl Inner {
    /// Those that got a permit go on, and if a permit is free that nobody may
    /// have yet, somebody waits for that moment.
    fn pass_on(&self, granted: &[CallId]) {
        self.waiting.wake(granted);
        if self.queue.alarm().is_some()
            && let Some(keeper) = self.queue.any_waiting()
        {
            self.waiting.wake(&[keeper]);
        }
    }
}

/// Whose call it is: the service that was called first and the principal that
/// asked, whatever services call each other meanwhile.
pub struct Payer<'a> {
    /// The service.
    pub account: &'a Arc<Account>,
    /// The principal, if it has a name.
    pub principal: Option<&'a str>,
    /// When the call began.
    pub began: Instant,
}

impl Payer<'_> {
    /// For how long the call has run.
    fn ran(&self) -> Duration {
        system::now().saturating_duration_since(self.began)
    }
}

/// Watches a call while it waits for a run permit.
pub trait Attendant {
    /// Why a call may end early.
    type Stop;
    /// Whether it shall.
    fn look(&self) -> Option<Self::Stop>;
    /// It is about to wait.
    fn waits(&self);
    /// The same before it has begun; false if it shall not.
    fn queues(&self) -> bool {
        self.waits();
        true
    }
}

/// Why a call did not get a run permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PermitError<S> {
    /// Its deadline came first.
    Deadline,
    /// Its attendant stopped it.
    Stopped(S),
}

/// What the scheduler knows of the call that a thread runs; one call after the
/// other. Only that thread uses it, but for what is to be seen.
#[derive(Debug, Default)]
pub struct Ticket {
    /// Ticks of the current call.
    ticks: AtomicU32,
    /// There is a run, or the call has waited: what quick calls look at.
    is_active: AtomicBool,
    current: Mutex<Current>,
}

/// The current call, if it is more than a quick one.
#[derive(Debug, Default)]
struct Current {
    run: Option<Run>,
    /// How long it has waited for something else than a permit.
    waited: Duration,
    /// Since when it does.
    waits_since: Option<Instant>,
    /// It did since the last tick, which may have fallen into that.
    has_waited: bool,
}

/// A call that has seen a tick, or was kept from beginning.
#[derive(Debug)]
struct Run {
    account: Arc<Account>,
    principal: Arc<Principal>,
    /// Its number while it holds a permit.
    permit: Option<CallId>,
    /// It needs a permit to run.
    takes_part: bool,
    /// It was stopped while it waited for a run permit.
    was_waiting: bool,
    /// Thread time up to which `ran` goes. By the time of day, which is read
    /// without a system call, quick calls would pay for those that interrupt
    /// them: beside 256 loops on one processor their p99 was 50 ms, not 2.
    clock: Duration,
    cost: Cost,
    /// Of `ran`, what the service and the principal were charged with.
    charged: Duration,
}

impl Ticket {
    /// The current call has seen a tick, on its own thread, so long after the
    /// one before. It waits here for a run permit, if it needs one.
    ///
    /// # Errors
    /// If it shall end instead.
    pub fn tick<A: Attendant>(
        &self,
        payer: &Payer<'_>,
        since_last: Duration,
        deadline: Instant,
        attendant: &A,
    ) -> Result<Cost, PermitError<A::Stop>> {
        let mut current = self.lock();
        self.is_active.store(true, Relaxed);
        // One that fell into a wait is none of a call that runs long: what it
        // has run tells, then.
        let seen = u32::from(!std::mem::take(&mut current.has_waited));
        let ticks = self.ticks.load(Relaxed) + seen;
        self.ticks.store(ticks, Relaxed);
        let waited = current.waited;
        let mut least = Duration::ZERO;
        let first = current.run.is_none();
        let run = current.run.get_or_insert_with(|| {
            let since = payer.ran();
            let ran = since.saturating_sub(waited);
            least = share(since_last, ran, since);
            Run::of(payer, ran.min(since_last))
        });
        // A run that has just been created has read its clock.
        if !first {
            run.read_clock();
        }
        let counts = !first || run.cost.ran >= NOT_SHORT;
        run.settle(least, counts);
        run.takes_part |= ticks >= LONG || run.cost.ran >= since_last * LONG;
        if run.takes_part {
            run.goes_on(deadline, attendant)?;
        }
        Ok(run.cost)
    }

    /// A call of a service that was over its share is about to begin: it waits
    /// for a run permit if that is still so. False if too many wait.
    ///
    /// # Errors
    /// If it shall end instead.
    #[cold]
    pub fn enter<A: Attendant>(
        &self,
        payer: &Payer<'_>,
        deadline: Instant,
        attendant: &A,
    ) -> Result<bool, PermitError<A::Stop>> {
        let mut current = self.lock();
        if current.run.is_some() {
            return Ok(true);
        }
        let run = Run::of(payer, Duration::ZERO);
        if !run.has_to_wait() {
            return Ok(true);
        }
        // Others are served meanwhile: one that is not very short is coming.
        if !attendant.queues() {
            return Ok(false);
        }
        let run = current.run.insert(run);
        self.is_active.store(true, Relaxed);
        run.takes_part = true;
        run.goes_on(deadline, attendant).map(|()| true)
    }

    /// The call is about to wait for something else: it gives its permit back.
    pub fn pause(&self) {
        let mut current = self.lock();
        self.is_active.store(true, Relaxed);
        current.has_waited = true;
        current.waits_since.get_or_insert_with(system::now);
        if let Some(run) = &mut current.run {
            run.read_clock();
            run.settle(Duration::ZERO, true);
            run.release_permit();
        }
    }

    /// Nobody waits for something else with a run permit: that would be a
    /// deadlock.
    pub fn assert_paused(&self) {
        assert!(!self.holds(), "a call waits with a run permit");
    }

    /// The call goes on after a wait.
    ///
    /// # Errors
    /// If it shall end instead.
    pub fn resume<A: Attendant>(
        &self,
        deadline: Instant,
        attendant: &A,
    ) -> Result<(), PermitError<A::Stop>> {
        let mut current = self.lock();
        if let Some(since) = current.waits_since.take() {
            current.waited += system::now().saturating_duration_since(since);
        }
        match &mut current.run {
            Some(run) if run.takes_part => run.goes_on(deadline, attendant),
            _ => Ok(()),
        }
    }

    /// Whether the call holds a permit.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.lock()
            .run
            .as_ref()
            .is_some_and(|run| run.permit.is_some())
    }

    /// Whether the call was stopped while it waited for a run permit.
    #[must_use]
    pub fn was_waiting(&self) -> bool {
        self.lock().run.as_ref().is_some_and(|run| run.was_waiting)
    }

    /// The call is over; what it has cost, if it has seen a tick or waited for
    /// a run permit.
    #[inline]
    pub fn finish(&self) -> Option<Cost> {
        if !self.is_active.load(Relaxed) {
            return None;
        }
        self.is_active.store(false, Relaxed);
        self.ticks.store(0, Relaxed);
        let run = std::mem::take(&mut *self.lock()).run?;
        Some(run.finish())
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        lock(&self.current)
    }
}

/// Of a time as much as one time is of another.
fn share(of: Duration, part: Duration, whole: Duration) -> Duration {
    if whole.is_zero() {
        return of;
    }
    of.mul_f64(part.as_secs_f64() / whole.as_secs_f64())
}

impl Run {
    /// That has run for so long.
    fn of(payer: &Payer<'_>, ran: Duration) -> Self {
        let Payer {
            account, principal, ..
        } = payer;
        Self {
            account: Arc::clone(account),
            principal: account.scheduler.principal(*principal),
            permit: None,
            takes_part: false,
            was_waiting: false,
            clock: system::thread_time(),
            cost: Cost {
                ran,
                waited: Duration::ZERO,
            },
            charged: Duration::ZERO,
        }
    }

    /// Counts what the call has run since the last time.
    fn read_clock(&mut self) {
        let clock = system::thread_time();
        self.cost.ran += clock.saturating_sub(self.clock);
        self.clock = clock;
    }

    /// Charges what the call has run, and at least so much.
    fn settle(&mut self, least: Duration, counts: bool) {
        // A sample: whoever is seen at a tick stands for all since the last one,
        // so that short calls count what they use on average.
        let due = self.cost.ran.max(least).saturating_sub(self.charged);
        if due.is_zero() {
            return;
        }
        self.charged += due;
        let nanos = u64::try_from(due.as_nanos()).unwrap_or(u64::MAX);
        self.account.cpu.fetch_add(nanos, Relaxed);
        self.principal.cpu.fetch_add(nanos, Relaxed);
        let (service, principal) = (self.account.id, self.principal.id);
        let scheduler = &self.account.scheduler;
        let now = scheduler.now();
        let mut inner = scheduler.lock();
        let queue = &mut inner.queue;
        queue.used(now, service, principal, self.permit, due);
        if counts {
            queue.fills_window(now, service, due);
        }
        if queue.is_over_share(now, service) || queue.is_principal_over(now, principal) {
            self.account.over_share.store(true, Relaxed);
        }
    }

    /// Whether its service or its principal is still over its share.
    fn has_to_wait(&self) -> bool {
        let scheduler = &self.account.scheduler;
        let now = scheduler.now();
        let mut inner = scheduler.lock();
        let own = inner.queue.is_over_share(now, self.account.id);
        if !own && !inner.queue.is_any_principal_over(now) {
            self.account.over_share.store(false, Relaxed);
        }
        own || inner.queue.is_principal_over(now, self.principal.id)
    }

    /// Waits for a permit, if there is none or another call is next.
    fn goes_on<A: Attendant>(
        &mut self,
        deadline: Instant,
        attendant: &A,
    ) -> Result<(), PermitError<A::Stop>> {
        let scheduler = Arc::clone(&self.account.scheduler);
        let now = scheduler.now();
        let mut inner = scheduler.lock();
        let mut granted = Vec::new();
        if let Some(id) = self.permit {
            if inner.queue.goes_on(now, id) {
                return Ok(());
            }
            self.permit = None;
            // Behind those that wait.
            granted = inner.queue.leave(now, id);
        }
        inner.next_call += 1;
        let id = inner.next_call;
        let (service, principal) = (self.account.id, self.principal.id);
        granted.extend(inner.queue.wait(now, id, service, principal));
        inner.pass_on(&granted);
        if inner.queue.holds(id) {
            self.permit = Some(id);
            return Ok(());
        }
        inner.waiting.0.insert(id, system::current());
        drop(inner);
        let begun = system::now();
        let ended = wait(&scheduler, id, deadline, attendant);
        self.cost.waited += system::now().saturating_duration_since(begun);
        self.was_waiting = ended.is_err();
        if ended.is_ok() {
            self.permit = Some(id);
        }
        ended
    }

    fn release_permit(&mut self) {
        if let Some(id) = self.permit.take() {
            let scheduler = &self.account.scheduler;
            let now = scheduler.now();
            let mut inner = scheduler.lock();
            let granted = inner.queue.leave(now, id);
            inner.pass_on(&granted);
        }
    }

    fn finish(mut self) -> Cost {
        self.read_clock();
        self.settle(Duration::ZERO, true);
        self.cost
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.release_permit();
    }
}

/// Waits until a call holds a permit.
fn wait<A: Attendant>(
    scheduler: &Scheduler,
    id: CallId,
    deadline: Instant,
    attendant: &A,
) -> Result<(), PermitError<A::Stop>> {
    // Before the first look: who wants it stopped finds it from now on.
    attendant.waits();
    let ended = loop {
        let stop = attendant.look().map(PermitError::Stopped);
        attendant.waits();
        let now = system::now();
        let stop = stop.or_else(|| (now >= deadline).then_some(PermitError::Deadline));
        let mut inner = scheduler.lock();
        let at = scheduler.now();
        let granted = inner.queue.grant(at);
        inner.waiting.wake(&granted);
        if let Some(stop) = stop {
            break Err(stop);
        }
        if inner.queue.holds(id) {
            inner.waiting.0.remove(&id);
            break Ok(());
        }
        let keeps = inner.queue.any_waiting() == Some(id);
        let alarm = inner.queue.alarm().filter(|_| keeps);
        drop(inner);
        let pause = deadline.saturating_duration_since(now);
        let until_alarm = alarm.map(|alarm| alarm.saturating_sub(at));
        system::park_timeout(until_alarm.map_or(pause, |alarm| alarm.min(pause)));
    };
    let mut inner = scheduler.lock();
    inner.waiting.0.remove(&id);
    let granted = if ended.is_err() {
        let now = scheduler.now();
        inner.queue.leave(now, id)
    } else {
        Vec::new()
    };
    // It may have been the one that waited for the moment of others.
    inner.pass_on(&granted);
    ended
}
