//! The history: calls that failed or took long.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde::Serialize;
use serde_json::value::RawValue;

use super::lock;
use crate::wire::json as wire_json;

/// Slow calls that are kept.
const MAX_SLOW: usize = 256;
/// Failed ones of one service that ended with the same code.
const MAX_OF_A_KIND: usize = 64;
/// Failed ones of all kinds.
const MAX_FAILED: usize = 512;
/// Longest details that are kept whole, in bytes: a service chooses them, and
/// they may be as large as an answer.
const MAX_DETAILS: usize = 2048;
/// Bytes of all that are kept, where nothing else is said.
const MAX_BYTES: usize = 8 * 1024 * 1024;
/// What takes longer is slow, however it ended.
const SLOW: Duration = Duration::from_millis(10);

/// A finished call.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PastCall {
    /// As its caller named it, `-` if it did not.
    pub request_id: String,
    /// The request that caused it.
    pub parent_request_id: Option<String>,
    /// The connection that it came over.
    pub connection: String,
    /// Who asked, if they had shown it.
    pub principal: Option<String>,
    /// Who served it.
    pub service: String,
    /// In which version; none where the call reached no service.
    pub version: Option<String>,
    /// What was called.
    pub action: String,
    /// When it ended, RFC 3339.
    pub ended: String,
    /// Milliseconds from its arrival at the service to its end.
    pub elapsed_ms: f64,
    /// Milliseconds of them until an instance was there: turn, place, memory
    /// and instantiation.
    pub waited_ms: f64,
    /// Milliseconds of processor time, with the calls that it made; none where
    /// it was over before its first tick, or was made by another service.
    pub ran_ms: Option<f64>,
    /// Milliseconds that it waited for a processor; likewise.
    pub cpu_waited_ms: Option<f64>,
    /// Most memory that it held, in bytes.
    pub peak_memory: usize,
    /// `OK`, a code of the protocol, or the service's own.
    pub outcome: String,
    /// What went wrong, for a person.
    pub message: Option<String>,
    /// More of it, as [`brief`] keeps it.
    pub details: Option<Box<RawValue>>,
    /// Functions that ran when it failed, innermost first.
    pub backtrace: Vec<String>,
    /// The newest lines that it printed to standard error, if it failed.
    pub stderr: Vec<String>,
}

impl PastCall {
    /// About what it takes, in bytes.
    fn size(&self) -> usize {
        let lines = |lines: &[String]| {
            lines
                .iter()
                .map(|line| size_of::<String>() + line.len())
                .sum::<usize>()
        };
        let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        size_of::<Self>()
            + self.request_id.len()
            + optional(&self.parent_request_id)
            + self.connection.len()
            + optional(&self.principal)
            + self.service.len()
            + optional(&self.version)
            + self.action.len()
            + self.ended.len()
            + self.outcome.len()
            + optional(&self.message)
            + self.details.as_ref().map_or(0, |text| text.get().len())
            + lines(&self.backtrace)
            + lines(&self.stderr)
    }
}

/// The newest that failed, of each service with each code, and the newest that
/// were slow; fewer where they are large.
#[derive(Debug)]
pub struct History {
    failed: Mutex<Failed>,
    slow: Mutex<Slow>,
    /// Bytes of each of the two.
    limit: usize,
}

/// Oldest first.
#[derive(Debug, Default)]
struct Slow {
    calls: VecDeque<Arc<PastCall>>,
    bytes: usize,
}

impl Default for History {
    fn default() -> Self {
        Self::new(MAX_BYTES)
    }
}

impl History {
    /// Nothing kept yet, and about so many bytes at most.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self {
            failed: Mutex::default(),
            slow: Mutex::default(),
            limit: bytes / 2,
        }
    }

    /// Whether such a call is worth keeping.
    #[must_use]
    pub fn wants(failed: bool, elapsed: Duration) -> bool {
        failed || elapsed >= SLOW
    }

    /// Keeps one.
    pub fn keep(&self, failed: bool, call: PastCall) {
        if failed {
            lock(&self.failed).keep(Arc::new(call), self.limit);
            return;
        }
        let mut slow = lock(&self.slow);
        slow.bytes += call.size();
        slow.calls.push_back(Arc::new(call));
        while slow.calls.len() > MAX_SLOW || slow.bytes > self.limit {
            let Some(oldest) = slow.calls.pop_front() else {
                break;
            };
            slow.bytes -= oldest.size();
        }
    }

    /// Those that fit, newest first.
    #[must_use]
    pub fn find(&self, limit: usize, fits: impl Fn(&PastCall) -> bool) -> Vec<PastCall> {
        let mut found = lock(&self.failed).all();
        found.extend(lock(&self.slow).calls.iter().cloned());
        found.retain(|call| fits(call));
        found.sort_by(|a, b| b.ended.cmp(&a.ended));
        found.truncate(limit);
        found.iter().map(|call| PastCall::clone(call)).collect()
    }
}

/// Failed calls by service and code, so that no kind displaces another one.
#[derive(Debug, Default)]
struct Failed {
    services: BTreeMap<String, Kinds>,
    count: usize,
    bytes: usize,
}

/// Those of one service, by code, oldest first.
type Kinds = BTreeMap<String, VecDeque<Arc<PastCall>>>;

impl Failed {
    fn keep(&mut self, call: Arc<PastCall>, limit: usize) {
        self.bytes += call.size();
        self.insert(call);
        while self.bytes > limit && self.count > 0 {
            self.drop_one();
        }
    }

    fn insert(&mut self, call: Arc<PastCall>) {
        // The caller chooses what it calls a service that is not there: they
        // are all one.
        let service = call.version.as_ref().map_or("", |_| &*call.service);
        let kind = self
            .services
            .get_mut(service)
            .and_then(|kinds| kinds.get_mut(&call.outcome));
        if let Some(kind) = kind
            && kind.len() == MAX_OF_A_KIND
        {
            self.bytes -= kind.pop_front().map_or(0, |oldest| oldest.size());
            kind.push_back(call);
            return;
        }
        if self.count == MAX_FAILED {
            self.drop_one();
        }
        let kinds = self.services.entry(service.to_owned()).or_default();
        let kind = kinds.entry(call.outcome.clone()).or_default();
        kind.push_back(call);
        self.count += 1;
    }

    /// Drops the oldest of the most frequent kind of the service with the most,
    /// since a service may choose ever new codes.
    fn drop_one(&mut self) {
        let of = |kinds: &Kinds| kinds.values().map(VecDeque::len).sum::<usize>();
        let most = self.services.values_mut().max_by_key(|kinds| of(kinds));
        let Some(kinds) = most else { return };
        let longest = kinds.values().map(VecDeque::len).max().unwrap_or(0);
        let oldest = kinds
            .values_mut()
            .filter(|kind| kind.len() == longest)
            .min_by(|a, b| ended(a).cmp(&ended(b)));
        if let Some(kind) = oldest
            && let Some(oldest) = kind.pop_front()
        {
            self.bytes -= oldest.size();
            self.count -= 1;
        }
        kinds.retain(|_, kind| !kind.is_empty());
        self.services.retain(|_, kinds| !kinds.is_empty());
    }

    fn all(&self) -> Vec<Arc<PastCall>> {
        let kinds = self.services.values().flat_map(BTreeMap::values);
        kinds.flatten().cloned().collect()
    }
}

/// When the oldest of a kind ended.
fn ended(kind: &VecDeque<Arc<PastCall>>) -> Option<&str> {
    kind.front().map(|call| &*call.ended)
}

/// Details as they are kept: JSON text that takes as much memory as it is long;
/// of one beyond 2 KiB the beginning, as a JSON string.
#[must_use]
pub fn brief(details: &RawValue) -> Option<Box<RawValue>> {
    let text = details.get();
    if text.len() <= MAX_DETAILS {
        return serde_json::value::to_raw_value(&wire_json::tree(details)).ok();
    }
    let beginning = &text[..text.floor_char_boundary(MAX_DETAILS)];
    serde_json::value::to_raw_value(&format!("{beginning}... ({} bytes)", text.len())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_details_are_kept_in_brief() {
        let of = |text: String| brief(&RawValue::from_string(text).unwrap()).unwrap();
        assert_eq!(
            of(r#"{"reason":"trap"}"#.into()).get(),
            r#"{"reason":"trap"}"#
        );
        // Pages are made as trees.
        for odd in [r#"{"x":1e999}"#, r#"["\ud800"]"#] {
            let kept: String = serde_json::from_str(of(odd.into()).get()).unwrap();
            assert_eq!(kept, odd);
        }
        let long = of(format!("[\"{}\"]", "é\\n".repeat(1 << 20)));
        assert!(long.get().len() < 2 * MAX_DETAILS, "{}", long.get().len());
        let text: String = serde_json::from_str(long.get()).unwrap();
        assert!(
            text.starts_with("[\"é") && text.ends_with("... (4194308 bytes)"),
            "{text}"
        );
    }

    fn call(id: usize, service: &str, outcome: &str) -> PastCall {
        PastCall {
            request_id: id.to_string(),
            parent_request_id: None,
            connection: "1".into(),
            principal: None,
            service: service.into(),
            version: Some("1.0.0".into()),
            action: "b".into(),
            ended: format!("{id:09}"),
            elapsed_ms: 1.0,
            waited_ms: 0.0,
            ran_ms: None,
            cpu_waited_ms: None,
            peak_memory: 0,
            outcome: outcome.into(),
            message: None,
            details: None,
            backtrace: Vec::new(),
            stderr: Vec::new(),
        }
    }

    #[test]
    fn failed_ones_do_not_drive_out_slow_ones() {
        let history = History::default();
        history.keep(false, call(1, "a", "OK"));
        (2..1000).for_each(|id| history.keep(true, call(id, "a", "FAILED")));
        let all = history.find(usize::MAX, |_| true);
        assert_eq!(
            (
                all.len(),
                &*all[0].request_id,
                &*all[MAX_OF_A_KIND].request_id
            ),
            (MAX_OF_A_KIND + 1, "999", "1")
        );
        assert_eq!(history.find(10, |call| call.request_id == "1").len(), 1);
        assert!(
            History::wants(true, Duration::ZERO)
                && !History::wants(false, Duration::from_millis(9))
        );
    }

    #[test]
    fn of_large_calls_fewer_are_kept() {
        const LIMIT: usize = 100_000;
        let history = History::new(2 * LIMIT);
        let held = || {
            let bytes = |call: &PastCall| call.size();
            let all = history.find(usize::MAX, |_| true);
            (all.len(), all.iter().map(bytes).sum::<usize>())
        };
        for id in 0..1000 {
            let stderr = vec!["x".repeat(5000)];
            let call = call(id, "a", &format!("E{}", id % 7));
            history.keep(id % 2 == 0, PastCall { stderr, ..call });
        }
        let (count, bytes) = held();
        assert!((30..40).contains(&count), "{count}");
        assert!(bytes <= 2 * LIMIT, "{bytes}");
        assert_eq!(
            lock(&history.failed).bytes + lock(&history.slow).bytes,
            bytes
        );
        assert_eq!(history.find(1, |_| true)[0].request_id, "999");
    }

    #[test]
    fn no_kind_of_failure_drives_out_another_one() {
        let history = History::default();
        let kept = |id: &str| history.find(1, |call| call.request_id == id).len() == 1;
        history.keep(true, call(1, "a", "TIMEOUT"));
        history.keep(true, call(2, "b", "NOT_FOUND"));
        (100..1000).for_each(|id| history.keep(true, call(id, "a", "NOT_FOUND")));
        assert!(kept("1") && kept("2") && kept("999"));
        // Ever new codes of one service cost that service only.
        (1000..3000).for_each(|id| history.keep(true, call(id, "c", &format!("E{id}"))));
        assert!(kept("2") && kept("999") && kept("2999") && !kept("1000"));
        // So do names of services that are not there.
        for id in 3000..4000 {
            let version = None;
            let call = call(id, &format!("s{id}"), "NO_ROUTE_FOUND");
            history.keep(true, PastCall { version, ..call });
        }
        assert!(kept("1") && kept("2") && kept("2999") && kept("3999") && !kept("3900"));
        let all = history.find(usize::MAX, |_| true);
        assert_eq!(
            (all.len(), lock(&history.failed).count),
            (MAX_FAILED, MAX_FAILED)
        );
    }
}
