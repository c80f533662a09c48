//! Requests that have no answer yet: what is to be sent, what was, and what
//! becomes of both when the connection is lost. No I/O and no waiting.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use super::{Answer, error::ClientError};
use crate::{
    locks::{lock, wait_while},
    wire::{Header, Kind, Payload, Topic, Version, message::write_message},
};

/// Bytes that leave in one write, unless a single message is larger.
const BATCH_SIZE: usize = 64 * 1024;

/// Where the answer is put for the one who waits for it.
#[derive(Debug, Default)]
pub(super) struct Slot {
    answer: Mutex<Option<Result<Answer, ClientError>>>,
    ready: Condvar,
}

impl Slot {
    pub(super) fn put(&self, answer: Result<Answer, ClientError>) {
        *lock(&self.answer) = Some(answer);
        self.ready.notify_all();
    }

    /// None at the deadline.
    pub(super) fn wait(&self, deadline: Instant) -> Option<Result<Answer, ClientError>> {
        let is_missing = |answer: &mut Option<_>| answer.is_none();
        let answer = lock(&self.answer);
        wait_while(answer, &self.ready, deadline, is_missing)
            .0
            .take()
    }
}

/// One request.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) topic: String,
    pub(super) version: Version,
    pub(super) payload: Vec<u8>,
    pub(super) binary: bool,
    pub(super) deadline: Instant,
    pub(super) idempotent: bool,
    /// How often it may still be sent again.
    pub(super) retries: u32,
    pub(super) sent: Sent,
    /// It was lost once and sent again, because that does no harm: whatever
    /// comes of it now, it may have run before.
    pub(super) lost_once: bool,
    pub(super) slot: Arc<Slot>,
}

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// Not a byte of it counts: it waits to be sent.
    No,
    /// It waits for a time to be sent again.
    Later(Instant),
    /// It may have left as a whole, over the connection of this number.
    Maybe(u64),
}

/// All requests without an answer.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: HashMap<Arc<str>, Entry>,
    /// Those to be sent, in order; ids that have gone meanwhile are skipped.
    unsent: VecDeque<Arc<str>>,
}

/// What leaves together, and which request ends at which byte.
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    link: u64,
    ends: Vec<(usize, Arc<str>)>,
}

/// How a connection was lost.
#[derive(Debug, Clone)]
pub(super) struct Loss {
    /// Of which connection.
    pub(super) link: u64,
    pub(super) why: String,
    /// The server has said that it begins nothing more, and ended in order.
    pub(super) nothing_begun: bool,
    /// Requests are sent again over the next connection.
    pub(super) reconnect: bool,
}

impl Entry {
    /// What is said where there will be no answer.
    pub(super) fn without_answer(&self, nothing_begun: bool, why: String) -> ClientError {
        let left = matches!(self.sent, Sent::Maybe(_)) && !nothing_begun;
        if left || self.lost_once {
            ClientError::Unanswered(why)
        } else {
            ClientError::NotSent(why)
        }
    }
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub(super) fn contains(&self, id: &str) -> bool {
        self.entries.contains_key(id)
    }

    pub(super) fn push(&mut self, id: Arc<str>, entry: Entry) {
        self.unsent.push_back(Arc::clone(&id));
        self.entries.insert(id, entry);
    }

    pub(super) fn remove(&mut self, id: &str) -> Option<Entry> {
        let removed = self.entries.remove(id);
        // Without a connection, nothing else takes ids out.
        if self.unsent.len() > 2 * self.entries.len() {
            self.unsent.retain(|id| self.entries.contains_key(id));
        }
        removed
    }

    /// The next requests to be sent, up to about 64 KiB of them. From here on
    /// they may have left.
    pub(super) fn take_batch(&mut self, link: u64, now: Instant) -> Option<Batch> {
        let mut batch = Batch {
            bytes: Vec::new(),
            link,
            ends: Vec::new(),
        };
        while batch.bytes.len() < BATCH_SIZE {
            let Some(id) = self.unsent.pop_front() else {
                break;
            };
            let Some(entry) = self
                .entries
                .get_mut(&id)
                .filter(|entry| entry.sent == Sent::No)
            else {
                continue;
            };
            let Ok(topic) = Topic::parse(&entry.topic) else {
                continue;
            };
            let remaining = entry
                .deadline
                .saturating_duration_since(now)
                .max(Duration::from_millis(1));
            let header = Header {
                kind: Kind::Request,
                topic,
                version: entry.version,
                request_id: Some(&id),
                parent_request_id: None,
                timeout: Some(Duration::from_millis(
                    u64::try_from(remaining.as_millis()).unwrap_or(1).max(1),
                )),
            };
            // It was a text when it came.
            let text = || std::str::from_utf8(&entry.payload).unwrap_or_default();
            let payload = if entry.binary {
                Payload::Binary(&entry.payload)
            } else {
                Payload::Json(text())
            };
            write_message(&mut batch.bytes, &header, payload);
            entry.sent = Sent::Maybe(link);
            batch.ends.push((batch.bytes.len(), id));
        }
        (!batch.ends.is_empty()).then_some(batch)
    }

    /// Of a batch, only so many bytes can have left: requests that end after
    /// them were not sent as a whole, and are sent over the next connection.
    pub(super) fn cut_short(&mut self, batch: &Batch, possibly_left: usize) {
        for (end, id) in batch.ends.iter().rev() {
            if *end > possibly_left
                && let Some(entry) = self.entries.get_mut(id)
                // Not one that has gone over the next connection since.
                && entry.sent == Sent::Maybe(batch.link)
            {
                entry.sent = Sent::No;
                self.unsent.push_front(Arc::clone(id));
            }
        }
    }

    /// The server has not begun a request: it is sent again at that time, if
    /// it may be and there is time.
    pub(super) fn retry_later(&mut self, id: &str, at: Instant) -> bool {
        let Some(entry) = self
            .entries
            .get_mut(id)
            .filter(|entry| entry.retries > 0 && at < entry.deadline)
        else {
            return false;
        };
        entry.retries -= 1;
        entry.sent = Sent::Later(at);
        true
    }

    /// Puts in line what is due.
    pub(super) fn wake_due(&mut self, now: Instant) {
        for (id, entry) in &mut self.entries {
            if matches!(entry.sent, Sent::Later(at) if at <= now) {
                entry.sent = Sent::No;
                self.unsent.push_back(Arc::clone(id));
            }
        }
    }

    /// When the next one will be due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let later = |entry: &Entry| match entry.sent {
            Sent::Later(at) => Some(at),
            Sent::No | Sent::Maybe(_) => None,
        };
        self.entries.values().filter_map(later).min()
    }

    /// The connection is lost. What was certainly not begun, or does no harm
    /// twice, is sent over the next one; the rest ends here.
    pub(super) fn lost(&mut self, loss: &Loss) {
        let mut over = Vec::new();
        let mut again = Vec::new();
        for (id, entry) in &mut self.entries {
            if entry.sent != Sent::Maybe(loss.link) {
                if !loss.reconnect {
                    over.push(Arc::clone(id));
                }
                continue;
            }
            let safe = loss.nothing_begun || entry.idempotent;
            if safe && loss.reconnect && entry.retries > 0 {
                entry.retries -= 1;
                entry.sent = Sent::No;
                entry.lost_once |= !loss.nothing_begun;
                again.push(Arc::clone(id));
            } else {
                over.push(Arc::clone(id));
            }
        }
        self.unsent.extend(again);
        for id in over {
            if let Some(entry) = self.entries.remove(&id) {
                entry.slot.put(Err(
                    entry.without_answer(loss.nothing_begun, loss.why.clone())
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(idempotent: bool) -> Entry {
        Entry {
            topic: "a.b".into(),
            version: Version::new(1, 0, 0),
            payload: b"1".to_vec(),
            binary: false,
            deadline: Instant::now() + Duration::from_secs(60),
            idempotent,
            retries: 1,
            sent: Sent::No,
            lost_once: false,
            slot: Arc::default(),
        }
    }

    /// `sent`, `unanswered`, `not sent` or `waits`.
    fn after(queue: &mut Queue, id: &str, slot: &Slot) -> &'static str {
        match slot.wait(Instant::now()) {
            Some(Err(ClientError::Unanswered(_))) => "unanswered",
            Some(Err(ClientError::NotSent(_))) => "not sent",
            Some(_) => "?",
            None if queue
                .entries
                .get(id)
                .is_some_and(|entry| entry.sent == Sent::No) =>
            {
                "waits"
            }
            None => "sent",
        }
    }

    #[test]
    fn what_is_over_leaves_nothing_while_there_is_no_connection() {
        let mut queue = Queue::default();
        for number in 0..1000 {
            let id: Arc<str> = number.to_string().into();
            queue.push(Arc::clone(&id), entry(false));
            if number % 100 > 0 {
                assert!(queue.remove(&id).is_some());
            }
        }
        assert_eq!(queue.len(), 10);
        assert!(queue.unsent.len() <= 2 * queue.len(), "{:?}", queue.unsent);
        let batch = queue.take_batch(1, Instant::now()).unwrap();
        assert_eq!(batch.ends.len(), 10);
    }

    #[test]
    fn what_is_sent_again_after_a_loss() {
        let check = |idempotent: bool,
                     left: Option<usize>,
                     nothing_begun: bool,
                     reconnect: bool,
                     expected: &str| {
            let mut queue = Queue::default();
            let entry = entry(idempotent);
            let slot = Arc::clone(&entry.slot);
            queue.push("1".into(), entry);
            if let Some(left) = left {
                let batch = queue.take_batch(7, Instant::now()).unwrap();
                queue.cut_short(&batch, left);
            }
            queue.lost(&Loss {
                link: 7,
                why: "gone".into(),
                nothing_begun,
                reconnect,
            });
            let found = after(&mut queue, "1", &slot);
            assert_eq!(
                found, expected,
                "{idempotent} {left:?} {nothing_begun} {reconnect}"
            );
        };
        let all = Some(usize::MAX);
        check(false, None, false, true, "waits");
        check(false, None, false, false, "not sent");
        check(false, Some(3), false, true, "waits");
        check(false, all, false, true, "unanswered");
        check(true, all, false, true, "waits");
        check(false, all, true, true, "waits");
        check(false, all, true, false, "not sent");
        check(true, all, false, false, "unanswered");
    }

    #[test]
    fn small_ones_leave_together_and_are_cut_where_the_bytes_end() {
        let mut queue = Queue::default();
        for id in ["1", "2", "3"] {
            queue.push(id.into(), entry(false));
        }
        let batch = queue.take_batch(7, Instant::now()).unwrap();
        assert_eq!(batch.ends.len(), 3);
        assert!(queue.take_batch(7, Instant::now()).is_none());
        queue.cut_short(&batch, batch.ends[0].0);
        let again = queue.take_batch(7, Instant::now()).unwrap();
        let ids: Vec<_> = again.ends.iter().map(|(_, id)| &**id).collect();
        assert_eq!(ids, ["2", "3"], "in their order");
        let now = Instant::now();
        assert!(
            queue.retry_later("2", now) && !queue.retry_later("2", now),
            "as often as it may"
        );
        assert_eq!(queue.next_due(), Some(now));
        queue.wake_due(now);
        assert_eq!(queue.next_due(), None);
        assert!(queue.take_batch(7, now).is_some());
    }
}
