//! Group commit: of the threads that want to write, one leads and commits for
//! all that wait.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use redb::ReadableTable as _;

use super::{
    Change, Done, Op, StoreError, digest,
    embedded::SOME_END,
    entry::{EntryKey, counted, has_ended, now, seal, tail_size, unseal, value_size},
    journal::Effect,
    journaled::{Journaled, Tables},
};

/// Writes that are committed together at most.
const MAX_GROUP: usize = 256;

type OpResult = Result<Done, StoreError>;
/// A value, and when it ends.
type Held = (Vec<u8>, Option<u64>);

/// Writes that wait. Each belongs to a thread that waits with it, so there
/// are never more than threads.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// In turn. The first one's thread leads once no other does.
    waiting: VecDeque<Arc<Ticket>>,
    /// A thread commits, or the first in turn was notified that it shall.
    led: bool,
}

struct Ticket {
    op: Op,
    turn: Mutex<Turn>,
    changed: Condvar,
}

/// What a write waits for.
#[derive(Default)]
enum Turn {
    #[default]
    Later,
    /// To lead. It is still among those that wait.
    Leads,
    Done(OpResult),
}

impl Ticket {
    fn set(&self, turn: Turn) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = turn;
        self.changed.notify_one();
    }

    /// Waits until the instant, or without end.
    fn wait(&self, until: Option<Instant>) -> Turn {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if !matches!(*turn, Turn::Later) {
                return std::mem::take(&mut *turn);
            }
            let remaining = until.map(|until| until.saturating_duration_since(Instant::now()));
            turn = match remaining {
                Some(remaining) if remaining.is_zero() => return Turn::Later,
                Some(remaining) => {
                    let waited = self.changed.wait_timeout(turn, remaining);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(turn);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
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
            turn: Mutex::default(),
            changed: Condvar::new(),
        });
        let leads = {
            let mut state = self.lock();
            state.waiting.push_back(Arc::clone(&ticket));
            !std::mem::replace(&mut state.led, true)
        };
        let turn = if leads {
            Turn::Leads
        } else {
            ticket.wait(Some(deadline))
        };
        if let Turn::Done(outcome) = turn {
            return outcome;
        }
        let mut state = self.lock();
        if Instant::now() >= deadline {
            let mut waiting = state.waiting.iter();
            if let Some(place) = waiting.position(|waiting| Arc::ptr_eq(waiting, &ticket)) {
                state.waiting.remove(place);
                let notified = || matches!(ticket.wait(Some(deadline)), Turn::Leads);
                if matches!(turn, Turn::Leads) || notified() {
                    state.pass_on();
                }
                return Err(StoreError::Busy);
            }
        }
        if matches!(turn, Turn::Later) {
            drop(state);
            // Taken: it may be committed, so only its outcome counts now.
            return match ticket.wait(None) {
                Turn::Done(outcome) => outcome,
                Turn::Later | Turn::Leads => Err(StoreError::Io("it was not committed".into())),
            };
        }
        let count = state.waiting.len().min(MAX_GROUP);
        let group: Vec<_> = state.waiting.drain(..count).collect();
        drop(state);
        let mut outcomes = lead(&group, &commit).into_iter();
        // The next group first: it has a flush to wait for. Of all that wait,
        // only those are woken that have something to do.
        self.lock().pass_on();
        // Its own is the first in turn.
        let own = outcomes.next();
        for (member, outcome) in group.iter().skip(1).zip(outcomes) {
            member.set(Turn::Done(outcome));
        }
        own.unwrap_or_else(|| Err(StoreError::Io("no outcome".into())))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Has the next in turn lead, if there is one.
    fn pass_on(&mut self) {
        match self.waiting.front() {
            Some(next) => next.set(Turn::Leads),
            None => self.led = false,
        }
    }
}

/// Commits a group; there is an outcome for each, whatever happens.
fn lead(
    group: &[Arc<Ticket>],
    commit: impl Fn(&[&Op]) -> Result<Vec<OpResult>, StoreError>,
) -> Vec<OpResult> {
    let ops: Vec<_> = group.iter().map(|ticket| &ticket.op).collect();
    let outcomes = catch_unwind(AssertUnwindSafe(|| commit(&ops)))
        .unwrap_or_else(|_| Err(StoreError::Io("defect while writing".into())));
    outcomes.unwrap_or_else(|error| vec![Err(error); group.len()])
}

/// Writes a group in one transaction. One that fails by its own fault leaves
/// the others alone; an error of the disk is everybody's.
pub(super) fn apply(database: &Journaled, ops: &[&Op]) -> Result<Vec<OpResult>, StoreError> {
    let transaction = database.begin_write()?;
    let mut outcomes = Vec::with_capacity(ops.len());
    let mut tables = Tables::open(&transaction)?;
    for op in ops {
        match op.apply(&mut tables) {
            Err(error) if error.needs_reopening() => return Err(error),
            outcome => outcomes.push(outcome),
        }
    }
    let record = tables.finish();
    database.commit(transaction, record)?;
    Ok(outcomes)
}

impl Op {
    /// Checks first and writes then, so that it has its whole effect or none.
    fn apply(&self, tables: &mut Tables<'_>) -> OpResult {
        match &self.change {
            Change::Put(pairs) => {
                let pairs: Vec<_> = pairs
                    .iter()
                    .map(|(key, value)| (&**key, value.as_deref()))
                    .collect();
                self.put(&pairs, None, tables).map(|()| Done::Written)
            }
            Change::SetFor { key, value, life } => {
                let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
                let end = Some(now().saturating_add(life));
                self.put(&[(key, Some(value))], end, tables)?;
                if tables.values.get(SOME_END)?.is_none() {
                    tables.apply(Effect::Put(SOME_END, &seal(SOME_END, b"", None)))?;
                }
                Ok(Done::Written)
            }
            Change::End(keys) => {
                let mut ended = Vec::new();
                for key in keys {
                    let entry_key = self.entry_key(key);
                    let stored = tables.values.get(entry_key)?;
                    if stored.is_some_and(|stored| has_ended(entry_key, stored.value())) {
                        ended.push((&**key, None));
                    }
                }
                self.put(&ended, None, tables).map(|()| Done::Written)
            }
            Change::Increment { key, delta } => {
                let (before, end) = self.value(key, tables)?.unzip();
                let before = before.map_or(Some(0), |text| {
                    std::str::from_utf8(&text).ok()?.parse::<i64>().ok()
                });
                let sum = before
                    .and_then(|number| number.checked_add(*delta))
                    .ok_or(StoreError::NotANumber)?;
                let text = sum.to_string();
                self.put(&[(key, Some(text.as_bytes()))], end.flatten(), tables)?;
                Ok(Done::Number(sum))
            }
            Change::Swap {
                key,
                expected,
                value,
            } => {
                let (present, end) = self.value(key, tables)?.unzip();
                if present.map(|value| digest(&value)) != *expected {
                    return Ok(Done::Swapped(false));
                }
                self.put(&[(key, Some(value))], end.flatten(), tables)?;
                Ok(Done::Swapped(true))
            }
        }
    }

    fn entry_key<'a>(&'a self, key: &'a str) -> EntryKey<'a> {
        (&self.service, &self.bucket, key)
    }

    /// The value of a key, and when it ends.
    fn value(&self, key: &str, tables: &Tables<'_>) -> Result<Option<Held>, StoreError> {
        let entry_key = self.entry_key(key);
        let Some(stored) = tables.values.get(entry_key)? else {
            return Ok(None);
        };
        let live = unseal(entry_key, stored.value())?.live();
        Ok(live.map(|live| (live.value.to_vec(), live.end)))
    }

    fn put(
        &self,
        pairs: &[(&str, Option<&[u8]>)],
        end: Option<u64>,
        tables: &mut Tables<'_>,
    ) -> Result<(), StoreError> {
        let before = tables.used.get(&*self.service)?;
        let before = before.map_or(0, |used| used.value());
        // Of a key that stands twice the last one counts.
        let last: std::collections::BTreeMap<_, _> = pairs.iter().copied().collect();
        let size = |key: &str, value: Option<usize>| {
            value.map_or(0, |value| counted(self.entry_key(key), value))
        };
        let (mut wanted, mut grows) = (before, false);
        for (key, value) in &last {
            let old = tables
                .values
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
                Some(value) => {
                    tables.apply(Effect::Put(entry_key, &seal(entry_key, value, end)))?;
                }
                None => tables.apply(Effect::Remove(entry_key))?,
            }
        }
        if wanted != before {
            tables.apply(Effect::Used(&self.service, wanted))?;
        }
        Ok(())
    }
}
