//! Group commit: of the threads that want to write, one leads and commits for
//! all that wait.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use redb::{Database, Durability, ReadableTable as _, Table};

use super::{
    Change, Done, Op, StoreError, digest,
    embedded::{SOME_END, USED, VALUES},
    entry::{EntryKey, counted, has_ended, now, seal, tail_size, unseal, value_size},
};

/// Writes that are committed together at most.
const MAX_GROUP: usize = 256;

type OpResult = Result<Done, StoreError>;

/// Writes that wait. Each belongs to a thread that waits with it, so there
/// are never more than threads.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Arc<Ticket>>,
    /// A thread commits.
    led: bool,
}

struct Ticket {
    op: Op,
    outcome: Mutex<Option<OpResult>>,
}

impl Queue {
    /// Has a write committed, by this thread or by another. One that has no
    /// turn before its deadline is withdrawn; one that has waits for its end.
    pub(super) fn submit(
        &self,
        op: Op,
        deadline: Instant,
        commit: impl Fn(&[&Op]) -> Result<Vec<OpResult>, StoreError>,
    ) -> OpResult {
        let ticket = Arc::new(Ticket {
            op,
            outcome: Mutex::default(),
        });
        let mut state = self.lock();
        state.waiting.push_back(Arc::clone(&ticket));
        loop {
            if let Some(outcome) = ticket
                .outcome
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take()
            {
                return outcome;
            }
            let entry_key = state
                .waiting
                .iter()
                .position(|waiting| Arc::ptr_eq(waiting, &ticket));
            let remaining = deadline.saturating_duration_since(Instant::now());
            match entry_key {
                Some(entry_key) if remaining.is_zero() => {
                    state.waiting.remove(entry_key);
                    return Err(StoreError::Busy);
                }
                Some(_) if !state.led => {
                    state.led = true;
                    let count = state.waiting.len().min(MAX_GROUP);
                    let group: Vec<_> = state.waiting.drain(..count).collect();
                    drop(state);
                    lead(&group, &commit);
                    state = self.lock();
                    state.led = false;
                    self.changed.notify_all();
                }
                Some(_) => {
                    state = self
                        .changed
                        .wait_timeout(state, remaining)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                // Taken: it may be committed, so only its outcome counts now.
                None => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Commits a group and hands each its outcome, whatever happens.
fn lead(group: &[Arc<Ticket>], commit: impl Fn(&[&Op]) -> Result<Vec<OpResult>, StoreError>) {
    let ops: Vec<_> = group.iter().map(|ticket| &ticket.op).collect();
    let outcomes = catch_unwind(AssertUnwindSafe(|| commit(&ops)))
        .unwrap_or_else(|_| Err(StoreError::Io("defect while writing".into())));
    let outcomes = outcomes.unwrap_or_else(|error| vec![Err(error); group.len()]);
    for (ticket, outcome) in group.iter().zip(outcomes) {
        *ticket
            .outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(outcome);
    }
}

/// Writes a group in one transaction. One that fails by its own fault leaves
/// the others alone; an error of the disk is everybody's.
pub(super) fn apply(database: &Database, ops: &[&Op]) -> Result<Vec<OpResult>, StoreError> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    // Services choose what is written: with two phases a commit that a crash
    // cuts off can't be made to look like a whole one. Implied by the other,
    // which keeps opening after a crash short.
    transaction.set_two_phase_commit(true);
    transaction.set_quick_repair(true);
    let mut outcomes = Vec::with_capacity(ops.len());
    {
        let mut values = transaction.open_table(VALUES)?;
        let mut used = transaction.open_table(USED)?;
        for op in ops {
            match op.apply(&mut values, &mut used) {
                Err(error) if error.needs_reopening() => return Err(error),
                outcome => outcomes.push(outcome),
            }
        }
    }
    transaction.commit()?;
    Ok(outcomes)
}

type Values<'txn> = Table<'txn, (&'static str, &'static str, &'static str), &'static [u8]>;
type Used<'txn> = Table<'txn, &'static str, u64>;

impl Op {
    /// Checks first and writes then, so that it has its whole effect or none.
    fn apply(&self, values: &mut Values<'_>, used: &mut Used<'_>) -> OpResult {
        match &self.change {
            Change::Put(pairs) => {
                let pairs: Vec<_> = pairs
                    .iter()
                    .map(|(key, value)| (&**key, value.as_deref()))
                    .collect();
                self.put(&pairs, None, values, used).map(|()| Done::Written)
            }
            Change::SetFor { key, value, life } => {
                let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
                let end = Some(now().saturating_add(life));
                self.put(&[(key, Some(value))], end, values, used)?;
                if values.get(SOME_END)?.is_none() {
                    values.insert(SOME_END, &*seal(SOME_END, b"", None))?;
                }
                Ok(Done::Written)
            }
            Change::End(keys) => {
                let mut ended = Vec::new();
                for key in keys {
                    let entry_key = self.entry_key(key);
                    let stored = values.get(entry_key)?;
                    if stored.is_some_and(|stored| has_ended(entry_key, stored.value())) {
                        ended.push((&**key, None));
                    }
                }
                self.put(&ended, None, values, used).map(|()| Done::Written)
            }
            Change::Increment { key, delta } => {
                let (before, end) = self.value(key, values)?.unzip();
                let before = before.map_or(Some(0), |text| {
                    std::str::from_utf8(&text).ok()?.parse::<i64>().ok()
                });
                let sum = before
                    .and_then(|number| number.checked_add(*delta))
                    .ok_or(StoreError::NotANumber)?;
                let text = sum.to_string();
                self.put(&[(key, Some(text.as_bytes()))], end.flatten(), values, used)?;
                Ok(Done::Number(sum))
            }
            Change::Swap {
                key,
                expected,
                value,
            } => {
                let (present, end) = self.value(key, values)?.unzip();
                if present.map(|value| digest(&value)) != *expected {
                    return Ok(Done::Swapped(false));
                }
                self.put(&[(key, Some(value))], end.flatten(), values, used)?;
                Ok(Done::Swapped(true))
            }
        }
    }

    fn entry_key<'a>(&'a self, key: &'a str) -> EntryKey<'a> {
        (&self.service, &self.bucket, key)
    }

    /// The value of a key, and when it ends.
    fn value(
        &self,
        key: &str,
        values: &Values<'_>,
    ) -> Result<Option<(Vec<u8>, Option<u64>)>, StoreError> {
        let entry_key = self.entry_key(key);
        let Some(stored) = values.get(entry_key)? else {
            return Ok(None);
        };
        let live = unseal(entry_key, stored.value())?.live();
        Ok(live.map(|live| (live.value.to_vec(), live.end)))
    }

    fn put(
        &self,
        pairs: &[(&str, Option<&[u8]>)],
        end: Option<u64>,
        values: &mut Values<'_>,
        used: &mut Used<'_>,
    ) -> Result<(), StoreError> {
        let before = used.get(&*self.service)?.map_or(0, |used| used.value());
        // Of a key that stands twice the last one counts.
        let last: std::collections::BTreeMap<_, _> = pairs.iter().copied().collect();
        let size = |key: &str, value: Option<usize>| {
            value.map_or(0, |value| counted(self.entry_key(key), value))
        };
        let (mut wanted, mut grows) = (before, false);
        for (key, value) in &last {
            let old = values
                .get(self.entry_key(key))?
                .map(|stored| value_size(stored.value()));
            let new = size(key, value.map(|value| value.len() + tail_size(end)));
            grows |= new > size(key, old);
            wanted = (wanted + new).saturating_sub(size(key, old));
        }
        if grows && wanted > self.quota {
            return Err(StoreError::Quota {
                wanted,
                limit: self.quota,
            });
        }
        for (key, value) in last {
            let entry_key = self.entry_key(key);
            match value {
                Some(value) => drop(values.insert(entry_key, &*seal(entry_key, value, end))?),
                None => drop(values.remove(entry_key)?),
            }
        }
        used.insert(&*self.service, wanted)?;
        Ok(())
    }
}
