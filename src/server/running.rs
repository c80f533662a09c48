//! Calls that have become slow: what runs now, for the admin side, and the way
//! to stop one. A call is listed from its second tick on, or when it waits, so
//! that the quick ones pay nothing.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crate::{host::Stop, metrics::snapshot::CallRow, scheduler::Cost, wire::Header};

/// One slow call.
pub(crate) struct Running {
    id: u64,
    connection: u64,
    request_id: String,
    topic: String,
    principal: Option<String>,
    arrived: Instant,
    timeout: Duration,
    /// It waits for something, and does not compute.
    waits: AtomicBool,
    killed: AtomicBool,
    /// Its client has reset the connection.
    reset: AtomicBool,
    /// Microseconds that it has run, and that it has waited for a processor.
    ran: AtomicU64,
    cpu_waited: AtomicU64,
    /// That of the call, which may wait for a run permit.
    thread: Thread,
}

impl Running {
    /// What it has cost so far.
    pub(crate) fn costs(&self, cost: Cost) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.ran.store(micros(cost.ran), Relaxed);
        self.cpu_waited.store(micros(cost.waited), Relaxed);
    }

    pub(crate) fn waits(&self, waits: bool) {
        self.waits.store(waits, Relaxed);
    }

    /// Why it shall be stopped, if it shall.
    pub(crate) fn stop(&self) -> Option<Stop> {
        let reset = self.reset.load(SeqCst).then_some(Stop::Reset);
        self.is_killed().then_some(Stop::Killed).or(reset)
    }

    /// Whether the operator wants it stopped.
    pub(crate) fn is_killed(&self) -> bool {
        self.killed.load(SeqCst)
    }
}

/// All of them. There are never more than threads.
#[derive(Default)]
pub(crate) struct RunningCalls {
    next: AtomicU64,
    calls: Mutex<BTreeMap<u64, Arc<Running>>>,
}

impl RunningCalls {
    /// Lists a call for as long as what this returns is kept.
    pub(crate) fn list(
        self: &Arc<Self>,
        connection: u64,
        header: Option<&Header<'_>>,
        principal: Option<String>,
        arrived: Instant,
        default_timeout: Duration,
    ) -> Listed {
        let id = self.next.fetch_add(1, Relaxed) + 1;
        let call = Arc::new(Running {
            id,
            connection,
            request_id: header
                .and_then(|header| header.request_id)
                .unwrap_or("-")
                .to_owned(),
            topic: header
                .map_or("-", |header| header.topic.as_str())
                .to_owned(),
            principal,
            arrived,
            timeout: header
                .and_then(|header| header.timeout)
                .unwrap_or(default_timeout),
            waits: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            ran: AtomicU64::new(0),
            cpu_waited: AtomicU64::new(0),
            thread: thread::current(),
        });
        self.lock().insert(id, Arc::clone(&call));
        Listed {
            all: Arc::clone(self),
            call,
        }
    }

    /// Copies, oldest first.
    pub(crate) fn rows(&self) -> Vec<CallRow> {
        let now = Instant::now();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let row = |call: &Arc<Running>| CallRow {
            id: call.id,
            connection: call.connection.to_string(),
            request_id: call.request_id.clone(),
            topic: call.topic.clone(),
            principal: call.principal.clone(),
            state: if call.waits.load(Relaxed) {
                "waiting"
            } else {
                "running"
            },
            age_ms: millis(now.saturating_duration_since(call.arrived)),
            remaining_ms: millis((call.arrived + call.timeout).saturating_duration_since(now)),
            ran_ms: call.ran.load(Relaxed) as f64 / 1e3,
            cpu_waited_ms: call.cpu_waited.load(Relaxed) as f64 / 1e3,
            killed: call.is_killed(),
        };
        self.lock().values().map(row).collect()
    }

    /// Has a call stopped by its next tick, or at once if it waits for a run
    /// permit; false if there is none.
    pub(crate) fn kill(&self, id: u64) -> bool {
        let call = self.lock().get(&id).cloned();
        call.map(|call| {
            call.killed.store(true, SeqCst);
            call.thread.unpark();
        })
        .is_some()
    }

    /// A client has reset its connection: its calls end likewise.
    pub(crate) fn reset(&self, connection: u64) {
        let calls = self.lock();
        for call in calls.values().filter(|call| call.connection == connection) {
            call.reset.store(true, SeqCst);
            call.thread.unpark();
        }
    }

    /// Has all calls that wait for a run permit check whether they must end.
    pub(crate) fn wake(&self) {
        self.lock().values().for_each(|call| call.thread.unpark());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Running>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is listed until this is dropped.
pub(crate) struct Listed {
    all: Arc<RunningCalls>,
    pub(crate) call: Arc<Running>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.all.lock().remove(&self.call.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_listed_until_it_ends() {
        let all = Arc::new(RunningCalls::default());
        let (header, _) = Header::parse(b"REQUEST:a.b:1.0.0:7::50\n").unwrap();
        let long_ago = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        let first = all.list(3, Some(&header), None, long_ago, Duration::from_secs(5));
        let second = all.list(
            4,
            None,
            Some("ann".into()),
            Instant::now(),
            Duration::from_secs(5),
        );
        second.call.waits(true);
        let rows = all.rows();
        assert_eq!(
            (&*rows[0].topic, &*rows[0].request_id, rows[0].remaining_ms),
            ("a.b", "7", 0)
        );
        assert!(rows[0].age_ms >= 1000 && rows[0].state == "running");
        assert_eq!(
            (&*rows[1].topic, rows[1].state, rows[1].principal.as_deref()),
            ("-", "waiting", Some("ann"))
        );
        assert!(all.kill(rows[0].id) && first.call.is_killed() && !second.call.is_killed());
        drop(first);
        assert!(!all.kill(rows[0].id));
        assert_eq!(all.rows().len(), 1);
    }
}
