//! What is counted, with atomics only: a reader never makes the wire
//! side wait.

mod histogram;
mod history;
pub mod snapshot;
mod usage;

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, OnceLock,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
            fence,
        },
    },
    time::{Duration, Instant},
};

pub use histogram::Histogram;
pub use history::{History, PastCall, brief};
pub use usage::{Due, Usage, Usages};

use snapshot::Distribution;

use crate::{locks::lock, stripes::Stripes, wire::Code};

/// Protocols that are shown from the start.
const PROTOCOLS: [&str; 3] = ["frames", "http", "websocket"];

/// A counter that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// Reads it.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// The same for what is most often nothing.
    #[inline]
    pub fn add_some(&self, count: u64) {
        if count > 0 {
            self.add(count);
        }
    }

    /// Raises it to what it is below only seldom.
    #[inline]
    pub fn rise_to(&self, count: u64) {
        if self.get() < count {
            self.0.fetch_max(count, Relaxed);
        }
    }

    fn take(&self) -> u64 {
        self.0.swap(0, Relaxed)
    }
}

/// Counters by a word of the program's own, so that there are only so many.
/// For what ends a connection, where a lock costs nothing.
#[derive(Debug, Default)]
pub struct Labelled(Mutex<BTreeMap<&'static str, u64>>);

impl Labelled {
    /// One more.
    pub fn add(&self, label: &'static str) {
        *lock(&self.0).entry(label).or_default() += 1;
    }

    /// All of them, in the order of their words.
    #[must_use]
    pub fn get(&self) -> Vec<(&'static str, u64)> {
        let counts = lock(&self.0);
        counts
            .iter()
            .map(|(label, count)| (*label, *count))
            .collect()
    }
}

/// Connections and requests of one protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProtocolUse {
    /// Open connections.
    pub open: u64,
    /// Connections so far.
    pub connections: u64,
    /// Whole requests read.
    pub requests: u64,
}

impl ProtocolUse {
    /// Adds one connection.
    pub fn add(&mut self, is_open: bool, requests: u64) {
        self.open += u64::from(is_open);
        self.connections += 1;
        self.requests += requests;
    }
}

/// What each protocol was used for, by its name.
#[derive(Debug)]
pub struct Protocols {
    closed: Mutex<BTreeMap<&'static str, ProtocolUse>>,
    /// The highest counts that were shown, as [`Metrics::published`].
    published: Mutex<BTreeMap<&'static str, ProtocolUse>>,
}

impl Default for Protocols {
    fn default() -> Self {
        let none = || Mutex::new(PROTOCOLS.map(|name| (name, ProtocolUse::default())).into());
        Self {
            closed: none(),
            published: none(),
        }
    }
}

impl Protocols {
    /// A connection has ended, after [`Traffic::end`] of its traffic.
    pub fn end(&self, protocol: &'static str, requests: u64) {
        let mut closed = lock(&self.closed);
        closed.entry(protocol).or_default().add(false, requests);
    }

    /// Those of closed connections.
    #[must_use]
    pub fn closed(&self) -> BTreeMap<&'static str, ProtocolUse> {
        lock(&self.closed).clone()
    }

    /// What is shown of sums: totals never fall, although a connection that
    /// ends while they are taken may be missing.
    #[must_use]
    pub fn publish(
        &self,
        sums: BTreeMap<&'static str, ProtocolUse>,
    ) -> Vec<(&'static str, ProtocolUse)> {
        let mut shown = lock(&self.published);
        for (protocol, sum) in sums {
            let highest = shown.entry(protocol).or_default();
            *highest = ProtocolUse {
                open: sum.open,
                connections: sum.connections.max(highest.connections),
                requests: sum.requests.max(highest.requests),
            };
        }
        shown.iter().map(|(name, used)| (*name, *used)).collect()
    }
}

/// Bytes and messages, of one connection or of all closed ones.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Bytes read.
    pub bytes_in: Counter,
    /// Bytes written.
    pub bytes_out: Counter,
    /// Whole messages read.
    pub messages_in: Counter,
    /// Messages written.
    pub messages_out: Counter,
    /// Keep-alive frames read.
    pub keep_alives: Counter,
    /// ERRORs written.
    pub errors: Counter,
    /// Host functions that its calls have called.
    pub host_calls: Counter,
    /// Most bytes of linear memory that a call held, since [`Traffic::usage`]
    /// was asked last.
    pub peak_memory: Counter,
    /// All of this was, or is being, added to the sum of those that ended.
    ended: AtomicBool,
}

impl Traffic {
    /// What is summed over connections.
    fn summed(&self) -> [&Counter; 6] {
        let Self {
            bytes_in,
            bytes_out,
            messages_in,
            messages_out,
            keep_alives,
            errors,
            host_calls: _,
            peak_memory: _,
            ended: _,
        } = self;
        [
            bytes_in,
            bytes_out,
            messages_in,
            messages_out,
            keep_alives,
            errors,
        ]
    }

    /// Adds what another one has counted.
    pub fn absorb(&self, other: &Self) {
        for (own, other) in self.summed().into_iter().zip(other.summed()) {
            own.add(other.get());
        }
    }

    /// So far, but for the peak of memory, which starts again at 0.
    pub fn usage(&self) -> Usage {
        Usage {
            requests: self.messages_in.get(),
            bytes_in: self.bytes_in.get(),
            bytes_out: self.bytes_out.get(),
            host_calls: self.host_calls.get(),
            peak_memory: self.peak_memory.take(),
        }
    }

    /// Adds all of it to the sum of those that ended, once and for all.
    pub fn end(&self, sum: &Self) {
        self.ended.store(true, Relaxed);
        // Who sees the sum below has seen the mark above, if it then passes
        // the fence in `add_unless_closed`.
        fence(Release);
        sum.absorb(self);
    }

    /// Adds it to a sum that began with that of those that ended. Returns
    /// whether it has: false if that one has it.
    pub fn add_unless_closed(&self, sum: &Self) -> bool {
        fence(Acquire);
        let is_open = !self.ended.load(Relaxed);
        if is_open {
            sum.absorb(self);
        }
        is_open
    }

    /// Raises each counter to that of the other where it is lower.
    pub fn rise_to(&self, other: &Self) {
        for (own, other) in self.summed().into_iter().zip(other.summed()) {
            own.rise_to(other.get());
        }
    }
}

/// When the server was started.
#[derive(Debug)]
struct Started(Instant);

impl Default for Started {
    fn default() -> Self {
        Self(Instant::now())
    }
}

/// Counters of the whole server. Those of every request live with the
/// connection and the service, so that no two threads write to one of them
/// in turns.
#[derive(Debug, Default)]
pub struct Metrics {
    started: Started,
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections refused with SERVER_BUSY.
    pub refused: Counter,
    /// Errors of the accept call.
    pub accept_errors: Counter,
    /// Messages cut off by the end of their stream.
    pub truncated: Counter,
    /// Connections that ended because the peer took no answer in time.
    pub write_timeouts: Counter,
    /// Failed PUBLISH messages that no client was notified of.
    pub publish_failures: Counter,
    /// Calls stopped because their client had reset its connection.
    pub calls_reset: Counter,
    /// Connections from an address that is denied.
    pub denied: Counter,
    /// Unauthenticated peers that were evicted for others.
    pub evicted: Counter,
    /// Handshakes of TLS and PROXY headers that failed, by reason.
    pub handshake_failures: Labelled,
    /// Peers that failed to authenticate, by reason.
    pub auth_failures: Labelled,
    /// Calls that failed or were slow.
    pub history: History,
    /// Traffic of closed connections.
    pub closed: Traffic,
    /// Connections and requests by protocol.
    pub protocols: Protocols,
    /// What principals have used.
    pub usages: Usages,
    /// The highest sums that were shown: a sum is taken while connections
    /// end, and may lack one of them; what is shown never falls.
    pub published: Traffic,
    errors: [Counter; Code::ALL.len()],
    service_errors: Counter,
}

impl Metrics {
    /// None counted yet; calls of the past take so many bytes at most.
    #[must_use]
    pub fn with_history(bytes: usize) -> Self {
        Self {
            history: History::new(bytes),
            ..Self::default()
        }
    }

    /// Counts an ERROR: the server's by its code, the services' own together,
    /// because their codes are without number.
    pub fn count_error(&self, code: Option<Code>) {
        code.map_or(&self.service_errors, |code| &self.errors[code.index()])
            .add(1);
    }

    /// ERRORs so far by code; `None` for the services' own.
    pub fn errors(&self) -> impl Iterator<Item = (Option<Code>, u64)> {
        let own = Code::ALL
            .into_iter()
            .map(|code| (Some(code), self.errors[code.index()].get()));
        own.chain([(None, self.service_errors.get())])
    }

    /// How long the server has been up.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.0.elapsed()
    }
}

/// Counters of one version of a service, a set for each processor. A service
/// that nobody calls has none.
#[derive(Debug, Default)]
pub struct ServiceStats(Stripes<OnceLock<Box<CallStats>>>);

impl ServiceStats {
    /// Where to count what ends here.
    pub fn own(&self) -> &CallStats {
        self.0.own().get_or_init(Box::default)
    }

    /// All together.
    #[must_use]
    pub fn sum(&self) -> CallStats {
        let sum = CallStats::default();
        for stats in self.0.iter().filter_map(|stats| stats.get().map(|b| &**b)) {
            let CallStats {
                calls,
                failures,
                errors,
                instances,
                answered,
                rest,
                waits,
                bytes_in,
                bytes_out,
                host_calls,
                peak_memory,
            } = stats;
            sum.calls.add(calls.get());
            sum.failures.add(failures.get());
            sum.errors.add(errors.get());
            sum.instances.add(instances.get());
            sum.bytes_in.add(bytes_in.get());
            sum.bytes_out.add(bytes_out.get());
            sum.host_calls.add(host_calls.get());
            sum.peak_memory.rise_to(peak_memory.get());
            sum.answered.absorb(answered);
            for (sum, part) in sum
                .rest
                .iter()
                .chain([&sum.waits])
                .zip(rest.iter().chain([waits]))
            {
                if let Some(part) = part.get() {
                    sum.get_or_init(Box::default).absorb(part);
                }
            }
        }
        sum
    }
}

/// What is counted of calls.
#[derive(Debug, Default)]
pub struct CallStats {
    /// Calls begun.
    pub calls: Counter,
    /// Calls that ended with the service's own failure.
    pub failures: Counter,
    /// Calls that the server ended: trap, limit, timeout, invalid answer.
    pub errors: Counter,
    /// Instances that were made for them.
    pub instances: Counter,
    /// Bytes of their payloads.
    pub bytes_in: Counter,
    /// Bytes of their answers.
    pub bytes_out: Counter,
    /// Host functions that they called.
    pub host_calls: Counter,
    /// Most bytes of linear memory that one of them held.
    pub peak_memory: Counter,
    /// How long calls took that were answered, from when they came to the
    /// service, waiting for a permit, a slot and memory included.
    pub answered: Histogram,
    /// The same for failures and errors, which most services have few of.
    rest: [OnceLock<Box<Histogram>>; 2],
    /// What of that was waiting, and making an instance; not where it took
    /// less than [`SHORT_WAIT`], which is most often.
    waits: OnceLock<Box<Histogram>>,
}

/// What a call used besides time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Bytes of its payload.
    pub bytes_in: u64,
    /// Bytes of its answer.
    pub bytes_out: u64,
    /// Host functions that it called.
    pub host_calls: u64,
    /// Most bytes of linear memory that its instance held.
    pub peak_memory: u64,
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOutcome {
    /// With an answer.
    Answered,
    /// With the service's own failure.
    Failed,
    /// By the server: trap, limit, timeout, invalid answer.
    Ended,
}

/// Waits below the lowest bound that is shown are not told apart.
const SHORT_WAIT: Duration = Duration::from_nanos(1 << 13);

impl CallStats {
    /// One more call.
    pub fn record(&self, outcome: CallOutcome, waited: Duration, elapsed: Duration, used: Used) {
        let Used {
            bytes_in,
            bytes_out,
            host_calls,
            peak_memory,
        } = used;
        self.calls.add(1);
        self.bytes_in.add(bytes_in);
        self.bytes_out.add(bytes_out);
        self.host_calls.add_some(host_calls);
        self.peak_memory.rise_to(peak_memory);
        match outcome {
            CallOutcome::Answered => self.answered.record(elapsed),
            CallOutcome::Failed => {
                self.failures.add(1);
                self.rest[0].get_or_init(Box::default).record(elapsed);
            }
            CallOutcome::Ended => {
                self.errors.add(1);
                self.rest[1].get_or_init(Box::default).record(elapsed);
            }
        }
        if waited >= SHORT_WAIT {
            self.waits.get_or_init(Box::default).record(waited);
        }
    }

    /// How long calls took, however they ended.
    #[must_use]
    pub fn latency(&self) -> Histogram {
        let all = Histogram::default();
        all.absorb(&self.answered);
        self.rest
            .iter()
            .filter_map(OnceLock::get)
            .for_each(|part| all.absorb(part));
        all
    }

    /// The same, each outcome apart, under the word that Prometheus gets.
    #[must_use]
    pub fn by_outcome(&self) -> [(&'static str, Distribution); 3] {
        let rest = |index: usize| {
            self.rest[index]
                .get()
                .map(|part| part.distribution())
                .unwrap_or_default()
        };
        [
            ("answered", self.answered.distribution()),
            ("failed", rest(0)),
            ("ended", rest(1)),
        ]
    }

    /// How long calls waited until they ran.
    #[must_use]
    pub fn waiting(&self) -> Distribution {
        let none = Histogram::default();
        let mut waits = self
            .waits
            .get()
            .map_or(&none, |waits| &**waits)
            .distribution();
        let short = self.calls.get().saturating_sub(waits.count);
        waits
            .buckets
            .iter_mut()
            .for_each(|(_, count)| *count += short);
        waits.count += short;
        waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_ended_is_counted_once_and_what_was_shown_never_falls() {
        let (ended, published) = (Traffic::default(), Traffic::default());
        let connection = Traffic::default();
        connection.bytes_in.add(7);
        let show = |ended_before: u64| {
            let sum = Traffic::default();
            sum.bytes_in.add(ended_before);
            connection.add_unless_closed(&sum);
            published.rise_to(&sum);
            published.bytes_in.get()
        };
        assert_eq!(show(ended.bytes_in.get()), 7);
        let before = ended.bytes_in.get();
        connection.end(&ended);
        assert_eq!(show(before), 7, "it ended between the two reads");
        assert_eq!(
            show(ended.bytes_in.get()),
            7,
            "it is in the sum, and has not given its slot back"
        );
    }
}
