//! Group commit: what threads write at the same time is committed together.
//!
//! A thread that finds nobody committing commits its own write. Those that come
//! meanwhile wait, and once somebody waits the committer, a thread of its own,
//! commits group after group until nobody does. If one of those that wait did,
//! each group would first wait until the system runs that thread.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use redb::{ReadableTable as _, WriteTransaction};

use super::{
    Change, Done, Op, StoreError, digest,
    embedded::{SOME_END, contain},
    entry::{EntryKey, counted, has_ended, now, seal, tail_size, unseal, value_size},
    journal::{Effect, Record},
    journaled::{Journaled, Tables},
};

/// Writes that are committed together at most.
const MAX_GROUP: usize = 256;

type OpResult = Result<Done, StoreError>;
/// Commits a group: an outcome for each, or an error for all.
type Commit = dyn Fn(&[&Op]) -> Result<Vec<OpResult>, StoreError> + Send + Sync;
/// A value, and when it ends.
type Held = (Vec<u8>, Option<u64>);

/// Has writes committed.
pub(super) struct Queue {
    shared: Arc<Shared>,
    /// Until the queue is dropped.
    committer: Option<JoinHandle<()>>,
}

struct Shared {
    commit: Box<Commit>,
    state: Mutex<State>,
    /// The committer is to commit, or to end.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Each belongs to a thread that waits with it, so there are never more
    /// than threads.
    waiting: VecDeque<Arc<Ticket>>,
    commits: Commits,
    is_closed: bool,
}

/// Who commits.
#[derive(Default, PartialEq, Eq)]
enum Commits {
    #[default]
    Nobody,
    Writer,
    Committer,
}

/// A write that waits.
struct Ticket {
    op: Op,
    outcome: Mutex<Option<Outcome>>,
    is_there: Condvar,
}

struct Outcome {
    result: OpResult,
    /// Others of the group whose outcome is there, too. Whoever is woken wakes
    /// two of them, so that the next group does not wait for all those calls of
    /// the system.
    wakes: Vec<Arc<Ticket>>,
}

impl Ticket {
    fn new(op: Op) -> Arc<Self> {
        Arc::new(Self {
            op,
            outcome: Mutex::default(),
            is_there: Condvar::new(),
        })
    }

    /// Waits until the instant, or without end.
    fn wait(&self, until: Option<Instant>) -> Option<OpResult> {
        let mut outcome = lock(&self.outcome);
        while outcome.is_none() {
            outcome = match until {
                None => {
                    let woken = self.is_there.wait(outcome);
                    woken.unwrap_or_else(PoisonError::into_inner)
                }
                Some(until) => {
                    let remaining = until.saturating_duration_since(Instant::now());
                    if remaining.is_zero() {
                        return None;
                    }
                    let woken = self.is_there.wait_timeout(outcome, remaining);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            }
        }
        let Outcome { result, wakes } = outcome.take()?;
        for other in wakes {
            other.is_there.notify_one();
        }
        Some(result)
    }
}

impl Queue {
    /// With what commits a group.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(super) fn new(commit: Box<Commit>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            commit,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let committer = {
            let shared = Arc::clone(&shared);
            let named = thread::Builder::new().name("mb-commit".into());
            named.spawn(move || shared.run())?
        };
        Ok(Self {
            shared,
            committer: Some(committer),
        })
    }

    /// Has a write committed, by this thread or by another. One that has no
    /// turn before its deadline is withdrawn; one that has waits for its end.
    pub(super) fn submit(&self, op: Op, deadline: Instant) -> OpResult {
        if Instant::now() >= deadline {
            return Err(StoreError::Busy);
        }
        let mut state = self.shared.lock();
        if state.commits == Commits::Nobody {
            state.commits = Commits::Writer;
            drop(state);
            let result = self.shared.commit(&[&op]).pop();
            self.shared.hand_over();
            return result.unwrap_or_else(not_committed);
        }
        let ticket = Ticket::new(op);
        state.waiting.push_back(Arc::clone(&ticket));
        drop(state);
        if let Some(result) = ticket.wait(Some(deadline)) {
            return result;
        }
        let mut state = self.shared.lock();
        let mut waiting = state.waiting.iter();
        if let Some(place) = waiting.position(|waiting| Arc::ptr_eq(waiting, &ticket)) {
            state.waiting.remove(place);
            return Err(StoreError::Busy);
        }
        drop(state);
        // Taken: it may be committed, so only its outcome counts now.
        ticket.wait(None).unwrap_or_else(not_committed)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_one();
        if let Some(committer) = self.committer.take() {
            let _ = committer.join();
        }
    }
}

impl Shared {
    /// What the committer does.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if state.commits != Commits::Committer {
                if state.is_closed {
                    return;
                }
                let woken = self.changed.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let count = state.waiting.len().min(MAX_GROUP);
            let group: Vec<_> = state.waiting.drain(..count).collect();
            drop(state);
            let ops: Vec<_> = group.iter().map(|ticket| &ticket.op).collect();
            deliver(&group, self.commit(&ops));
            state = self.lock();
            if state.waiting.is_empty() {
                state.commits = Commits::Nobody;
            }
        }
    }

    /// A writer has committed: the committer is next if somebody waits.
    fn hand_over(&self) {
        let mut state = self.lock();
        if state.waiting.is_empty() {
            state.commits = Commits::Nobody;
        } else {
            state.commits = Commits::Committer;
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Commits a group; there is an outcome for each, whatever happens.
    fn commit(&self, ops: &[&Op]) -> Vec<OpResult> {
        let outcomes = catch_unwind(AssertUnwindSafe(|| (self.commit)(ops)))
            .unwrap_or_else(|_| Err(StoreError::Io("defect while writing".into())));
        outcomes.unwrap_or_else(|error| vec![Err(error); ops.len()])
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Tells each of a group its outcome, and wakes the first.
fn deliver(group: &[Arc<Ticket>], outcomes: Vec<OpResult>) {
    let mut outcomes = outcomes.into_iter();
    // Backwards, so that whoever is awake by chance wakes only those that have
    // theirs.
    for (place, ticket) in group.iter().enumerate().rev() {
        let wakes = [2 * place + 1, 2 * place + 2];
        *lock(&ticket.outcome) = Some(Outcome {
            result: outcomes.next_back().unwrap_or_else(not_committed),
            wakes: wakes
                .iter()
                .filter_map(|place| group.get(*place))
                .cloned()
                .collect(),
        });
    }
    if let Some(first) = group.first() {
        first.is_there.notify_one();
    }
}

fn not_committed() -> OpResult {
    Err(StoreError::Io("it was not committed".into()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a group in one transaction. One that fails by its own fault leaves
/// the others alone; an error of the disk is everybody's.
pub(super) fn apply(database: &Journaled, ops: &[&Op]) -> Result<Vec<OpResult>, StoreError> {
    let mut broken = BTreeMap::new();
    // Once more for each that meets damage, at most.
    loop {
        let transaction = database.begin_write()?;
        match apply_all(&transaction, ops, &broken)? {
            Applied::All(outcomes, record) => {
                database.commit(transaction, record)?;
                return Ok(outcomes);
            }
            Applied::Broken(place, error) => {
                transaction.abort()?;
                broken.insert(place, error);
            }
        }
    }
}

/// What came of a group.
enum Applied {
    /// An outcome of each, and what they leave behind.
    All(Vec<OpResult>, Record),
    /// This one met damage in the file, maybe after a part of its effect: all of
    /// it is to be aborted.
    Broken(usize, String),
}

/// Applies all but those that met damage before.
fn apply_all(
    transaction: &WriteTransaction,
    ops: &[&Op],
    broken: &BTreeMap<usize, String>,
) -> Result<Applied, StoreError> {
    let mut tables = Tables::open(transaction)?;
    let mut outcomes = Vec::with_capacity(ops.len());
    for (place, op) in ops.iter().enumerate() {
        if let Some(error) = broken.get(&place) {
            outcomes.push(Err(StoreError::Broken(error.clone())));
            continue;
        }
        match contain(|| op.apply(&mut tables)) {
            Err(StoreError::Broken(error)) => return Ok(Applied::Broken(place, error)),
            Err(error) if error.needs_reopening() => return Err(error),
            outcome => outcomes.push(outcome),
        }
    }
    Ok(Applied::All(outcomes, tables.finish()))
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
        let last: BTreeMap<_, _> = pairs.iter().copied().collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, time::Duration};

    fn op(delta: i64) -> Op {
        Op {
            service: "svc".into(),
            quota: 0,
            bucket: "".into(),
            change: Change::Increment {
                key: "n".into(),
                delta,
            },
        }
    }

    fn delta(op: &Op) -> i64 {
        match op.change {
            Change::Increment { delta, .. } => delta,
            _ => unreachable!(),
        }
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A queue whose commits tell their sizes and wait until they may go on.
    fn held() -> (Arc<Queue>, mpsc::Receiver<usize>, mpsc::Sender<()>) {
        let (begun, sizes) = mpsc::channel();
        let (go_on, goes_on) = mpsc::channel();
        let (begun, goes_on) = (Mutex::new(begun), Mutex::new(goes_on));
        let queue = Queue::new(Box::new(move |ops| {
            lock(&begun).send(ops.len()).unwrap();
            lock(&goes_on).recv().unwrap();
            let outcome = |op: &&Op| match delta(op) {
                0 => panic!("as a defect would"),
                delta => Ok(Done::Number(delta)),
            };
            Ok(ops.iter().map(outcome).collect())
        }));
        (Arc::new(queue.unwrap()), sizes, go_on)
    }

    fn submits(queue: &Arc<Queue>, delta: i64, deadline: Instant) -> JoinHandle<OpResult> {
        let queue = Arc::clone(queue);
        thread::spawn(move || queue.submit(op(delta), deadline))
    }

    fn until_waiting(queue: &Queue, count: usize) {
        while queue.shared.lock().waiting.len() != count {
            thread::yield_now();
        }
    }

    #[test]
    fn those_that_come_meanwhile_are_one_group() {
        let (queue, sizes, go_on) = held();
        let first = submits(&queue, 100, later());
        assert_eq!(sizes.recv(), Ok(1));
        let others: Vec<_> = (1..=20).map(|n| submits(&queue, n, later())).collect();
        until_waiting(&queue, 20);
        go_on.send(()).unwrap();
        assert_eq!(first.join().unwrap(), Ok(Done::Number(100)));
        assert_eq!(sizes.recv(), Ok(20));
        go_on.send(()).unwrap();
        for (n, other) in (1..).zip(others) {
            assert_eq!(other.join().unwrap(), Ok(Done::Number(n)));
        }
        // Nobody commits any more: the next one does it itself.
        go_on.send(()).unwrap();
        assert_eq!(queue.submit(op(7), later()), Ok(Done::Number(7)));
        assert_eq!(sizes.recv(), Ok(1));
    }

    #[test]
    fn one_whose_deadline_passes_is_withdrawn_unless_it_is_being_committed() {
        let (queue, sizes, go_on) = held();
        assert_eq!(queue.submit(op(1), Instant::now()), Err(StoreError::Busy));
        let soon = Instant::now() + Duration::from_millis(50);
        let first = submits(&queue, 1, soon);
        assert_eq!(sizes.recv(), Ok(1));
        assert_eq!(queue.submit(op(2), soon), Err(StoreError::Busy));
        until_waiting(&queue, 0);
        go_on.send(()).unwrap();
        assert_eq!(first.join().unwrap(), Ok(Done::Number(1)));
        assert!(sizes.try_recv().is_err());
    }

    #[test]
    fn a_panic_is_everybodys_error_and_the_next_ones_are_committed() {
        let (queue, sizes, go_on) = held();
        let first = submits(&queue, 1, later());
        sizes.recv().unwrap();
        let others: Vec<_> = [0, 2].map(|n| submits(&queue, n, later())).into();
        until_waiting(&queue, 2);
        go_on.send(()).unwrap();
        sizes.recv().unwrap();
        go_on.send(()).unwrap();
        assert!(first.join().unwrap().is_ok());
        for other in others {
            assert!(matches!(other.join().unwrap(), Err(StoreError::Io(_))));
        }
        go_on.send(()).unwrap();
        assert_eq!(queue.submit(op(3), later()), Ok(Done::Number(3)));
    }
}
