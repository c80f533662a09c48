//! Who runs next: the pure part. No threads and no clock: each step is given
//! the time since the start, so that tests move it as they like.
//!
//! A run permit goes to the waiting call of the service that has received least
//! for its weight, within it to the principal that has received least, within
//! that to the call that waits longest. "Received" is a virtual time, as in
//! start-time fair queueing (Goyal, Vin, Cheng 1996): processor time divided by
//! the weight. A service that comes back does not bring along what it did not
//! use meanwhile.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

/// How long a call runs until others that wait may have its permit.
pub const SLICE: Duration = Duration::from_millis(4);

/// What a share of a processor may save up: so much of a second.
const BURST: f64 = 0.1;

/// The time over which a service's share is held.
const WINDOW: Duration = Duration::from_millis(100);

/// What services whose calls are quick weigh together. A service alone is over
/// its share when it uses more than a quarter of the processors in calls that
/// are not very short: then others would wait behind those.
const QUICK: f64 = 3.0;

/// Nanoseconds of a second.
const NANOS: f64 = 1e9;

/// Number of a service.
pub type ServiceId = u32;
/// Number of a principal.
pub type PrincipalId = u32;
/// Number of a call.
pub type CallId = u64;

/// A share of a processor: fills with time, empties with use, and may owe.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Of one processor; more than 1 for several.
    share: f64,
    /// Nanoseconds.
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    fn new(share: f64, now: Duration) -> Self {
        let mut bucket = Self {
            share,
            tokens: 0.0,
            filled: now,
        };
        bucket.tokens = bucket.most();
        bucket
    }

    fn most(&self) -> f64 {
        (self.share * BURST * NANOS).max(1.0)
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.filled).as_nanos() as f64;
        self.filled = self.filled.max(now);
        self.tokens = (self.tokens + passed * self.share).min(self.most());
    }

    fn is_empty(&mut self, now: Duration) -> bool {
        self.fill(now);
        self.tokens <= 0.0
    }

    /// When it is not empty any more.
    fn ready_at(&self) -> Duration {
        let nanos = (1.0 - self.tokens).max(0.0) / self.share;
        // Rounded up: a nanosecond too early would find it empty.
        self.filled + Duration::from_nanos(nanos as u64 + 1)
    }
}

/// What a service has used above its share of the last moments: a level that
/// sinks at the rate of that share.
#[derive(Debug, Clone, Copy, Default)]
struct Level {
    nanos: f64,
    seen: Duration,
}

impl Level {
    fn sink(&mut self, now: Duration, rate: f64) {
        let passed = now.saturating_sub(self.seen).as_nanos() as f64;
        self.seen = self.seen.max(now);
        self.nanos = (self.nanos - passed * rate).max(0.0);
    }
}

#[derive(Debug)]
struct Service {
    weight: f64,
    bucket: Option<Bucket>,
    level: Level,
    /// Virtual time: nanoseconds divided by the weight.
    received: f64,
    principals: BTreeMap<PrincipalId, Line>,
    /// The same as in `principals`, for whoever of them waits next.
    principals_received: f64,
    waiting: usize,
}

/// Calls of one principal to one service.
#[derive(Debug, Default)]
struct Line {
    received: f64,
    waiting: VecDeque<CallId>,
    /// Calls that wait or run.
    calls: usize,
}

#[derive(Debug)]
struct Call {
    service: ServiceId,
    principal: PrincipalId,
    holds: bool,
    /// Processor time since it was given its permit.
    slice: Duration,
}

/// All that run long, and all that wait to.
#[derive(Debug)]
pub struct RunQueue {
    permits: usize,
    held: usize,
    services: BTreeMap<ServiceId, Service>,
    /// Only those that have a share of their own.
    principals: BTreeMap<PrincipalId, Bucket>,
    calls: BTreeMap<CallId, Call>,
    /// Virtual time of the service that was given a permit last.
    received: f64,
}

impl RunQueue {
    /// With so many permits, one at least.
    #[must_use]
    pub fn new(permits: usize) -> Self {
        Self {
            permits: permits.max(1),
            held: 0,
            services: BTreeMap::new(),
            principals: BTreeMap::new(),
            calls: BTreeMap::new(),
            received: 0.0,
        }
    }

    /// What holds for a service from now on.
    pub fn set_service(&mut self, now: Duration, id: ServiceId, weight: f64, cpu: Option<f64>) {
        let service = self.services.entry(id).or_insert_with(|| Service {
            weight,
            bucket: None,
            level: Level::default(),
            received: 0.0,
            principals: BTreeMap::new(),
            principals_received: 0.0,
            waiting: 0,
        });
        service.weight = weight;
        if service.bucket.map(|bucket| bucket.share) != cpu {
            service.bucket = cpu.map(|share| Bucket::new(share, now));
        }
    }

    /// What holds for a principal from now on.
    pub fn set_principal(&mut self, now: Duration, id: PrincipalId, cpu: Option<f64>) {
        match cpu {
            None => drop(self.principals.remove(&id)),
            Some(share) => {
                let bucket = self.principals.get(&id).copied();
                let same = bucket.filter(|bucket| bucket.share.total_cmp(&share).is_eq());
                let bucket = same.unwrap_or_else(|| Bucket::new(share, now));
                self.principals.insert(id, bucket);
            }
        }
    }

    /// A call waits for a permit from now on; those that get one are returned,
    /// it may be among them.
    pub fn wait(
        &mut self,
        now: Duration,
        id: CallId,
        service: ServiceId,
        principal: PrincipalId,
    ) -> Vec<CallId> {
        let known = self.services.get_mut(&service).expect("it was set");
        let line = known.principals.entry(principal).or_default();
        if known.waiting == 0 {
            // What it did not use while nobody waited is gone, but for a slice.
            let slack = SLICE.as_nanos() as f64 / known.weight;
            known.received = known.received.max(self.received - slack);
        }
        if line.waiting.is_empty() {
            let slack = SLICE.as_nanos() as f64;
            line.received = line.received.max(known.principals_received - slack);
        }
        line.waiting.push_back(id);
        line.calls += 1;
        known.waiting += 1;
        let call = Call {
            service,
            principal,
            holds: false,
            slice: Duration::ZERO,
        };
        assert!(self.calls.insert(id, call).is_none(), "it waits or runs");
        self.grant(now)
    }

    /// A call gives up its permit, or waits no longer; those that get a permit
    /// are returned.
    pub fn leave(&mut self, now: Duration, id: CallId) -> Vec<CallId> {
        let Some(call) = self.calls.remove(&id) else {
            return Vec::new();
        };
        let service = self.services.get_mut(&call.service).expect("it has calls");
        let line = service
            .principals
            .get_mut(&call.principal)
            .expect("it has calls");
        line.calls -= 1;
        if call.holds {
            self.held -= 1;
        } else {
            line.waiting.retain(|waiting| *waiting != id);
            service.waiting -= 1;
        }
        if service.principals.values().all(|line| line.calls == 0) {
            // What principals have received counts among those that want more.
            service.principals.clear();
            service.principals_received = 0.0;
        }
        self.grant(now)
    }

    /// A call of a service and a principal has used the processor; with its
    /// number if it runs with a permit.
    pub fn used(
        &mut self,
        now: Duration,
        service: ServiceId,
        principal: PrincipalId,
        call: Option<CallId>,
        amount: Duration,
    ) {
        let nanos = amount.as_nanos() as f64;
        if let Some(bucket) = self.principals.get_mut(&principal) {
            bucket.fill(now);
            bucket.tokens -= nanos;
        }
        if let Some(call) = call.and_then(|call| self.calls.get_mut(&call)) {
            call.slice += amount;
        }
        let Some(service) = self.services.get_mut(&service) else {
            return;
        };
        if let Some(bucket) = &mut service.bucket {
            bucket.fill(now);
            bucket.tokens -= nanos;
        }
        service.received += nanos / service.weight;
        if let Some(line) = service.principals.get_mut(&principal) {
            line.received += nanos;
        }
    }

    /// Counts what a service uses in calls that are not very short; see
    /// [`RunQueue::is_over_share`].
    pub fn fills_window(&mut self, now: Duration, service: ServiceId, amount: Duration) {
        let rate = self.fair_rate(service);
        if let Some(service) = self.services.get_mut(&service) {
            service.level.sink(now, rate);
            service.level.nanos += amount.as_nanos() as f64;
            // Twice the window at most: then it is forgotten as soon.
            let most = 2.0 * WINDOW.as_nanos() as f64 * rate;
            service.level.nanos = service.level.nanos.min(most);
        }
    }

    /// Whether a service has used more than its share of the last 100 ms, or of
    /// its `cpu`; or the principal of its. Its calls then wait for a permit
    /// before they begin.
    pub fn is_over_share(&mut self, now: Duration, service: ServiceId) -> bool {
        let rate = self.fair_rate(service);
        let Some(service) = self.services.get_mut(&service) else {
            return false;
        };
        service.level.sink(now, rate);
        let empty = service
            .bucket
            .as_mut()
            .is_some_and(|bucket| bucket.is_empty(now));
        empty || service.level.nanos > WINDOW.as_nanos() as f64 * rate
    }

    /// Whether a principal has used more than its `cpu`.
    pub fn is_principal_over(&mut self, now: Duration, principal: PrincipalId) -> bool {
        let bucket = self.principals.get_mut(&principal);
        bucket.is_some_and(|bucket| bucket.is_empty(now))
    }

    /// Processors that are a service's by its weight, among those that have
    /// calls here and the weight of all that are quick.
    fn fair_rate(&self, id: ServiceId) -> f64 {
        let Some(own) = self.services.get(&id) else {
            return 0.0;
        };
        let others = self.services.iter().filter(|(other, _)| **other != id);
        let busy = others.filter(|(_, other)| other.principals.values().any(|line| line.calls > 0));
        let weights: f64 = busy.map(|(_, other)| other.weight).sum();
        self.permits as f64 * own.weight / (weights + own.weight + QUICK)
    }

    /// Whether a call that holds a permit may go on. After its slice, it may
    /// not if another one that waits has received less.
    pub fn goes_on(&mut self, now: Duration, id: CallId) -> bool {
        let Some(call) = self.calls.get(&id) else {
            return false;
        };
        let (service, principal, slice) = (call.service, call.principal, call.slice);
        if self.is_empty(now, service, principal) {
            return false;
        }
        if slice < SLICE {
            return true;
        }
        if let Some((next, _, next_principal)) = self.next(now)
            && self.is_before(next, next_principal, service, principal)
        {
            return false;
        }
        // One of its own service may be next, although another service comes
        // first that has received as much.
        if let Some((_, next_principal, _)) =
            Self::least(&self.services[&service], &self.principals)
            && self.is_before(service, next_principal, service, principal)
        {
            return false;
        }
        self.starts_slice(id, service, principal);
        true
    }

    /// Whether a waiting call of the first has received less than a running one
    /// of the second, or as much where they are alike.
    fn is_before(
        &self,
        service: ServiceId,
        principal: PrincipalId,
        other: ServiceId,
        other_principal: PrincipalId,
    ) -> bool {
        if service != other {
            return self.services[&service].received < self.services[&other].received;
        }
        let lines = &self.services[&service].principals;
        principal == other_principal
            || lines[&principal].received < lines[&other_principal].received
    }

    fn is_empty(&mut self, now: Duration, service: ServiceId, principal: PrincipalId) -> bool {
        let bucket = self
            .services
            .get_mut(&service)
            .and_then(|s| s.bucket.as_mut());
        let own = bucket.is_some_and(|bucket| bucket.is_empty(now));
        own || self.is_principal_over(now, principal)
    }

    /// The call that is to run next, with its service and principal.
    fn next(&mut self, now: Duration) -> Option<(ServiceId, CallId, PrincipalId)> {
        for bucket in self.principals.values_mut() {
            bucket.fill(now);
        }
        let mut best: Option<(f64, ServiceId, CallId, PrincipalId)> = None;
        for (id, service) in &mut self.services {
            if service.waiting == 0 || best.is_some_and(|(least, ..)| least <= service.received) {
                continue;
            }
            if let Some(bucket) = &mut service.bucket {
                bucket.fill(now);
            }
            let least = Self::least(service, &self.principals);
            if let Some((_, principal, call)) = least {
                best = Some((service.received, *id, call, principal));
            }
        }
        best.map(|(_, service, call, principal)| (service, call, principal))
    }

    /// Of a service, the call that is to run next, with what its principal has
    /// received; none where all are over their `cpu`, as far as buckets are
    /// filled.
    fn least(
        service: &Service,
        principals: &BTreeMap<PrincipalId, Bucket>,
    ) -> Option<(f64, PrincipalId, CallId)> {
        let has = |bucket: Option<&Bucket>| bucket.is_none_or(|bucket| bucket.tokens > 0.0);
        if !has(service.bucket.as_ref()) {
            return None;
        }
        let lines = service.principals.iter();
        let waiting = lines.filter_map(|(principal, line)| {
            let call = *line.waiting.front()?;
            has(principals.get(principal)).then_some((line.received, *principal, call))
        });
        waiting.min_by(|(a, ..), (b, ..)| a.total_cmp(b))
    }

    /// Gives permits that nobody holds to those that wait.
    pub fn grant(&mut self, now: Duration) -> Vec<CallId> {
        let mut granted = Vec::new();
        while self.held < self.permits
            && let Some((service, id, principal)) = self.next(now)
        {
            let known = self.services.get_mut(&service).expect("its call waits");
            let line = known
                .principals
                .get_mut(&principal)
                .expect("its call waits");
            line.waiting.pop_front();
            known.waiting -= 1;
            self.starts_slice(id, service, principal);
            self.held += 1;
            granted.push(id);
        }
        granted
    }

    /// A call runs from here on: what others have received who come later is
    /// counted from what its service and principal have.
    fn starts_slice(&mut self, id: CallId, service: ServiceId, principal: PrincipalId) {
        let service = self.services.get_mut(&service).expect("its call runs");
        let line = &service.principals[&principal];
        service.principals_received = service.principals_received.max(line.received);
        self.received = self.received.max(service.received);
        let call = self.calls.get_mut(&id).expect("it runs");
        call.holds = true;
        call.slice = Duration::ZERO;
    }

    /// Whether it holds a permit.
    #[must_use]
    pub fn holds(&self, id: CallId) -> bool {
        self.calls.get(&id).is_some_and(|call| call.holds)
    }

    /// When a permit that nobody holds can next be given to a call that waits
    /// because of a `cpu`; none if that is not what they wait for.
    #[must_use]
    pub fn alarm(&self) -> Option<Duration> {
        if self.held == self.permits {
            return None;
        }
        let ready = |bucket: Option<&Bucket>| bucket.map_or(Duration::ZERO, Bucket::ready_at);
        let of_service = |service: &Service| {
            let lines = service.principals.iter();
            let waiting = lines.filter(|(_, line)| !line.waiting.is_empty());
            let first = waiting
                .map(|(id, _)| ready(self.principals.get(id)))
                .min()?;
            Some(first.max(ready(service.bucket.as_ref())))
        };
        self.services.values().filter_map(of_service).min()
    }

    /// Any call that waits.
    #[must_use]
    pub fn any_waiting(&self) -> Option<CallId> {
        let waits = |(id, call): (&CallId, &Call)| (!call.holds).then_some(*id);
        self.calls.iter().find_map(waits)
    }

    /// Whether any principal has used more than its `cpu`.
    pub fn is_any_principal_over(&mut self, now: Duration) -> bool {
        self.principals
            .values_mut()
            .any(|bucket| bucket.is_empty(now))
    }

    /// Calls that run with a permit, and calls that wait for one.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.held, self.calls.len() - self.held)
    }
}
