//! Calls that ended badly or took long, kept for whoever asks why.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use serde_json::value::RawValue;

/// Calls of each kind that are kept.
const MAX_KEPT: usize = 256;
/// Longest details that are kept whole, in bytes: a service chooses them, and
/// they may be as large as an answer.
const MAX_DETAILS: usize = 2048;
/// What takes longer is slow, however it ended.
const SLOW: Duration = Duration::from_millis(10);

/// A call that has ended.
#[derive(Debug, Clone, Serialize)]
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
    /// In which version.
    pub version: String,
    /// What was called.
    pub action: String,
    /// When it ended, RFC 3339.
    pub ended: String,
    /// Milliseconds from its arrival at the service to its end.
    pub elapsed_ms: f64,
    /// Milliseconds of them until an instance was there: turn, place, memory
    /// and instantiation.
    pub waited_ms: f64,
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
}

/// The newest that failed, and the newest that were slow.
#[derive(Debug, Default)]
pub struct History {
    failed: Mutex<VecDeque<Arc<PastCall>>>,
    slow: Mutex<VecDeque<Arc<PastCall>>>,
}

impl History {
    /// Whether such a call is worth keeping.
    #[must_use]
    pub fn wants(failed: bool, elapsed: Duration) -> bool {
        failed || elapsed >= SLOW
    }

    /// Keeps one.
    pub fn keep(&self, failed: bool, call: PastCall) {
        let mut kept = lock(if failed { &self.failed } else { &self.slow });
        if kept.len() == MAX_KEPT {
            kept.pop_front();
        }
        kept.push_back(Arc::new(call));
    }

    /// Those that fit, newest first.
    #[must_use]
    pub fn find(&self, limit: usize, fits: impl Fn(&PastCall) -> bool) -> Vec<PastCall> {
        let mut found: Vec<_> = [&self.failed, &self.slow]
            .into_iter()
            .flat_map(|kept| lock(kept).clone())
            .collect();
        found.retain(|call| fits(call));
        found.sort_by(|a, b| b.ended.cmp(&a.ended));
        found.truncate(limit);
        found.iter().map(|call| PastCall::clone(call)).collect()
    }
}

/// Details as they are kept: the JSON text itself, which takes as much memory
/// as it is long; of one beyond 2 KiB the beginning, as a JSON string.
#[must_use]
pub fn brief(details: &RawValue) -> Option<Box<RawValue>> {
    let text = details.get();
    if text.len() <= MAX_DETAILS {
        return Some(details.to_owned());
    }
    let beginning = &text[..text.floor_char_boundary(MAX_DETAILS)];
    serde_json::value::to_raw_value(&format!("{beginning}... ({} bytes)", text.len())).ok()
}

fn lock(kept: &Mutex<VecDeque<Arc<PastCall>>>) -> MutexGuard<'_, VecDeque<Arc<PastCall>>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
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
        let long = of(format!("[\"{}\"]", "é\\n".repeat(1 << 20)));
        assert!(long.get().len() < 2 * MAX_DETAILS, "{}", long.get().len());
        let text: String = serde_json::from_str(long.get()).unwrap();
        assert!(
            text.starts_with("[\"é") && text.ends_with("... (4194308 bytes)"),
            "{text}"
        );
    }

    #[test]
    fn failed_ones_do_not_drive_out_slow_ones() {
        let history = History::default();
        let call = |id: usize| PastCall {
            request_id: id.to_string(),
            parent_request_id: None,
            connection: "1".into(),
            principal: None,
            service: "a".into(),
            version: "1.0.0".into(),
            action: "b".into(),
            ended: format!("{id:09}"),
            elapsed_ms: 1.0,
            waited_ms: 0.0,
            peak_memory: 0,
            outcome: "OK".into(),
            message: None,
            details: None,
            backtrace: Vec::new(),
        };
        history.keep(false, call(1));
        (2..1000).for_each(|id| history.keep(true, call(id)));
        let all = history.find(usize::MAX, |_| true);
        assert_eq!(
            (all.len(), &*all[0].request_id, &*all[MAX_KEPT].request_id),
            (MAX_KEPT + 1, "999", "1")
        );
        assert_eq!(history.find(10, |call| call.request_id == "1").len(), 1);
        assert!(
            History::wants(true, Duration::ZERO)
                && !History::wants(false, Duration::from_millis(9))
        );
    }
}
