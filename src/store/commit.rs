//! Group commit. A write takes effect at once, on top of what is not yet on the
//! disk: the next one finds it. Meanwhile the thread `mb-commit` makes what came
//! before durable, group after group. Nobody has to wait but who tells somebody
//! outside what was written or read: [`Unflushed`] says until when.

use std::{
    collections::BTreeMap,
    fmt, io, mem,
    ops::Bound::{Included, Unbounded},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    Change, Done, Op, StoreError, digest,
    embedded::{SOME_END, USED, Used, VALUES, Values},
    entry::{EntryKey, counted, has_ended, now, seal, tail_size, unseal, value_size},
    journal::Effect,
    journaled::{Journaled, Tables},
};
use crate::locks::{lock, wait_while};

/// Writes of a group, and the bytes that they leave, from which on others wait
/// for the disk first.
const MAX_GROUP: usize = 256;
const MAX_GROUP_BYTES: usize = 1024 * 1024;

/// The same where a flush has taken so long already: then the disk is slow, or
/// hangs.
const SLOW: Duration = Duration::from_millis(20);

/// Bytes of an entry in a group beside its key and value, about.
const ENTRY: usize = 128;

/// Makes a group durable.
type Commit = dyn Fn(&Group) -> Result<(), StoreError> + Send + Sync;
type Outcome = Result<(), StoreError>;
/// Is handed what became of a group, and whether others of it follow at once.
type Then = Box<dyn FnOnce(Outcome, bool) + Send>;
/// A value, and when it ends.
type Held = (Vec<u8>, Option<u64>);

/// Writes that are not on the disk yet. Clones stand for the same.
#[derive(Clone)]
pub struct Unflushed(Arc<Flush>);

/// One flush of a group, which may be over.
#[derive(Default)]
struct Flush {
    /// Those of later groups are higher.
    number: u64,
    outcome: OnceLock<Outcome>,
    /// Until when each waits.
    waiting: Mutex<Vec<(Instant, Then)>>,
    is_over: Condvar,
    /// What is kept until it is over.
    kept: Mutex<Vec<Box<dyn Send>>>,
}

impl fmt::Debug for Unflushed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unflushed({})", self.0.number)
    }
}

impl Unflushed {
    fn numbered(number: u64) -> Self {
        Self(Arc::new(Flush {
            number,
            ..Flush::default()
        }))
    }

    /// Adds one to those that are waited for: when what is left is on the disk,
    /// all are. What fails takes with it whatever was applied on top.
    pub fn join(all: &mut Option<Self>, other: Self) {
        let covers = |one: &Self| {
            let has_failed = matches!(one.0.outcome.get(), Some(Err(_)));
            has_failed || one.0.number >= other.0.number
        };
        if !all.as_ref().is_some_and(covers) {
            *all = Some(other);
        }
    }

    /// Waits until they are on the disk.
    ///
    /// # Errors
    /// They are not, and maybe none of them will be.
    pub fn wait(&self, deadline: Instant) -> Result<(), StoreError> {
        let is_open = |_: &mut Vec<_>| self.0.outcome.get().is_none();
        let waiting = lock(&self.0.waiting);
        drop(wait_while(waiting, &self.0.is_over, deadline, is_open));
        self.0.outcome.get().cloned().unwrap_or_else(|| Err(late()))
    }

    /// Whether they are on the disk.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        matches!(self.0.outcome.get(), Some(Ok(())))
    }

    /// Hands over what becomes of them, on this thread if it is known, else on
    /// the one that commits, which must not be kept; and whether somebody else
    /// gets the same at once. Where that is not known at a deadline, an error is
    /// handed over within some seconds.
    pub fn then(
        &self,
        deadline: Instant,
        then: impl FnOnce(Result<(), StoreError>, bool) + Send + 'static,
    ) {
        let mut waiting = lock(&self.0.waiting);
        match self.0.outcome.get() {
            None => waiting.push((deadline, Box::new(then))),
            Some(outcome) => {
                drop(waiting);
                then(outcome.clone(), false);
            }
        }
    }

    /// Keeps something until it is known what becomes of them.
    pub fn keep(&self, kept: impl Send + 'static) {
        let mut all = lock(&self.0.kept);
        if self.0.outcome.get().is_none() {
            all.push(Box::new(kept));
        }
    }

    /// Says what becomes of them. Nobody hears of it yet.
    fn decide(&self, outcome: &Outcome) {
        let _ = self.0.outcome.set(outcome.clone());
    }

    /// Has those who wait hear of it.
    fn deliver(&self) {
        lock(&self.0.kept).clear();
        let waiting = {
            let mut waiting = lock(&self.0.waiting);
            self.0.is_over.notify_all();
            mem::take(&mut *waiting)
        };
        if let Some(outcome) = self.0.outcome.get() {
            hand_over(waiting, outcome);
        }
    }

    /// Those that can't wait any longer get an error.
    fn expire(&self, now: Instant) {
        let mut waiting = lock(&self.0.waiting);
        let expired = waiting.extract_if(.., |(deadline, _)| *deadline <= now);
        let expired: Vec<_> = expired.collect();
        drop(waiting);
        hand_over(expired, &Err(late()));
    }
}

fn hand_over(waiting: Vec<(Instant, Then)>, outcome: &Outcome) {
    let last = waiting.len().saturating_sub(1);
    for (place, (_, then)) in waiting.into_iter().enumerate() {
        let hand_over = || then(outcome.clone(), place < last);
        // A defect of one is none of the others.
        let _ = catch_unwind(AssertUnwindSafe(hand_over));
    }
}

fn late() -> StoreError {
    StoreError::Unconfirmed("the disk has not taken it in time".into())
}

/// Writes that become durable together: of each entry, what the last one leaves.
pub(super) struct Group {
    unflushed: Unflushed,
    /// By [`place`]; none where it is removed.
    values: BTreeMap<Box<str>, Option<Vec<u8>>>,
    /// What the entries of services count.
    used: BTreeMap<Arc<str>, u64>,
    pub(super) writes: usize,
    /// What they have left, about, also where a later one left something else.
    bytes: usize,
}

impl Group {
    fn numbered(number: u64) -> Self {
        Self {
            unflushed: Unflushed::numbered(number),
            values: BTreeMap::new(),
            used: BTreeMap::new(),
            writes: 0,
            bytes: 0,
        }
    }

    /// Writes it in one transaction.
    pub(super) fn write(&self, database: &Journaled) -> Result<(), StoreError> {
        let transaction = database.begin_write()?;
        let mut tables = Tables::open(&transaction)?;
        for (place, stored) in &self.values {
            let entry_key = entry_key_of(place);
            tables.apply(match stored {
                Some(stored) => Effect::Put(entry_key, stored),
                None => Effect::Remove(entry_key),
            })?;
        }
        for (service, used) in &self.used {
            tables.apply(Effect::Used(service, *used))?;
        }
        let record = tables.finish();
        database.commit(transaction, record)
    }
}

/// An entry's key as one text: names of services and buckets have no NUL.
fn place((service, bucket, key): EntryKey<'_>) -> String {
    [service, "\0", bucket, "\0", key].concat()
}

fn entry_key_of(place: &str) -> EntryKey<'_> {
    let (service, rest) = place.split_once('\0').unwrap_or_default();
    let (bucket, key) = rest.split_once('\0').unwrap_or_default();
    (service, bucket, key)
}

/// Takes writes, and has them made durable.
pub(super) struct Queue {
    shared: Arc<Shared>,
    /// Until the queue is dropped.
    committer: Option<JoinHandle<()>>,
}

struct Shared {
    commit: Box<Commit>,
    state: Mutex<State>,
    /// There is something to commit, or the end.
    changed: Condvar,
}

struct State {
    /// Takes the next write.
    filling: Group,
    /// Is made durable, since then.
    flushing: Option<(Arc<Group>, Instant)>,
    is_closed: bool,
}

impl State {
    /// From the newest to the oldest.
    fn groups(&self) -> impl Iterator<Item = &Group> {
        let flushing = self.flushing.as_ref().map(|(group, _)| &**group);
        [&self.filling].into_iter().chain(flushing)
    }
}

impl Queue {
    /// With what makes a group durable.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(super) fn new(commit: Box<Commit>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            commit,
            state: Mutex::new(State {
                filling: Group::numbered(0),
                flushing: None,
                is_closed: false,
            }),
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

    /// Does a write, on top of what the file has and what is not there yet.
    pub(super) fn apply(
        &self,
        op: &Op,
        database: &Journaled,
    ) -> Result<(Done, Option<Unflushed>), StoreError> {
        let mut state = self.shared.lock();
        let mut view = View {
            state: &state,
            database,
            tables: None,
            effects: Effects::default(),
            unflushed: None,
        };
        let done = op.apply(&mut view)?;
        let View {
            effects: Effects { values, used },
            unflushed,
            ..
        } = view;
        if values.is_empty() {
            return Ok((done, unflushed));
        }
        let State {
            filling, flushing, ..
        } = &mut *state;
        let size = |(place, stored): &(Box<str>, Option<Vec<u8>>)| {
            ENTRY + place.len() + stored.as_ref().map_or(0, Vec::len)
        };
        filling.bytes += values.iter().map(size).sum::<usize>();
        filling.values.extend(values);
        filling.used.extend(used);
        filling.writes += 1;
        let unflushed = filling.unflushed.clone();
        let is_first = filling.writes == 1 && flushing.is_none();
        drop(state);
        if is_first {
            self.shared.changed.notify_one();
        }
        Ok((done, Some(unflushed)))
    }

    /// Reads what is stored for an entry, or that nothing is, where it is not on
    /// the disk yet.
    pub(super) fn read<T>(
        &self,
        entry_key: EntryKey<'_>,
        read: impl FnOnce(Option<&[u8]>) -> T,
    ) -> Option<(T, Unflushed)> {
        let state = self.shared.lock();
        if state.groups().all(|group| group.writes == 0) {
            return None;
        }
        let place = place(entry_key);
        state
            .groups()
            .find_map(|group| {
                let stored = group.values.get(&*place)?.as_deref();
                Some((stored, group.unflushed.clone()))
            })
            .map(|(stored, unflushed)| (read(stored), unflushed))
    }

    /// All that is not on the disk yet.
    pub(super) fn newest(&self) -> Option<Unflushed> {
        let state = self.shared.lock();
        let newest = state.groups().find(|group| group.writes > 0);
        newest.map(|group| group.unflushed.clone())
    }

    /// What of a bucket is not on the disk yet.
    pub(super) fn of_bucket(&self, (service, bucket): (&str, &str)) -> Option<Unflushed> {
        let state = self.shared.lock();
        let first = place((service, bucket, ""));
        let has = |group: &&Group| {
            let mut from = group.values.range::<str, _>((Included(&*first), Unbounded));
            from.next()
                .is_some_and(|(place, _)| place.starts_with(&first))
        };
        let found = state.groups().find(has);
        found.map(|group| group.unflushed.clone())
    }

    /// What a further write should wait for first: so much is not on the disk
    /// yet, or the disk takes so long.
    pub(super) fn backlog(&self) -> Option<Unflushed> {
        let state = self.shared.lock();
        let State {
            filling, flushing, ..
        } = &*state;
        let is_large = filling.writes >= MAX_GROUP || filling.bytes >= MAX_GROUP_BYTES;
        match flushing {
            Some((group, since)) if is_large || since.elapsed() >= SLOW => {
                Some(group.unflushed.clone())
            }
            None if is_large => Some(filling.unflushed.clone()),
            _ => None,
        }
    }

    /// Those whose deadline has passed hear of it.
    pub(super) fn expire(&self) {
        let state = self.shared.lock();
        let flushes: Vec<_> = state
            .groups()
            .map(|group| group.unflushed.clone())
            .collect();
        drop(state);
        let now = Instant::now();
        flushes.iter().for_each(|flush| flush.expire(now));
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_one();
        // The committer itself may be the last one that had the queue.
        let others = |committer: &JoinHandle<()>| committer.thread().id() != thread::current().id();
        if let Some(committer) = self.committer.take().filter(others) {
            let _ = committer.join();
        }
    }
}

impl Shared {
    /// What the committer does.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            let number = state.filling.unflushed.0.number;
            if state.filling.writes == 0 {
                if state.is_closed {
                    return;
                }
                let woken = self.changed.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let group = Arc::new(mem::replace(
                &mut state.filling,
                Group::numbered(number + 1),
            ));
            state.flushing = Some((Arc::clone(&group), Instant::now()));
            drop(state);
            let outcome = catch_unwind(AssertUnwindSafe(|| (self.commit)(&group)))
                .unwrap_or_else(|_| Err(StoreError::Io("defect while writing".into())));
            state = self.lock();
            state.flushing = None;
            // What was applied on top of what is not there must not be either.
            let on_top = outcome
                .is_err()
                .then(|| mem::replace(&mut state.filling, Group::numbered(number + 2)));
            // Under the lock: who writes into a later group finds that one
            // before it has failed.
            group.unflushed.decide(&outcome);
            if let Some(on_top) = &on_top {
                on_top.unflushed.decide(&outcome);
            }
            drop(state);
            group.unflushed.deliver();
            if let Some(on_top) = on_top {
                on_top.unflushed.deliver();
            }
            state = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// What a write leaves behind.
#[derive(Default)]
struct Effects {
    values: Vec<(Box<str>, Option<Vec<u8>>)>,
    used: Option<(Arc<str>, u64)>,
}

/// What a write finds, and does.
struct View<'a> {
    state: &'a State,
    database: &'a Journaled,
    /// Once something is read there.
    tables: Option<(Values, Used)>,
    effects: Effects,
    /// What it has read rests on that.
    unflushed: Option<Unflushed>,
}

impl View<'_> {
    /// Reads what is stored for an entry.
    fn stored<T>(
        &mut self,
        entry_key: EntryKey<'_>,
        read: impl FnOnce(Option<&[u8]>) -> T,
    ) -> Result<T, StoreError> {
        let place = place(entry_key);
        for group in self.state.groups() {
            if let Some(stored) = group.values.get(&*place) {
                Unflushed::join(&mut self.unflushed, group.unflushed.clone());
                return Ok(read(stored.as_deref()));
            }
        }
        let stored = self.tables()?.0.get(entry_key)?;
        Ok(read(stored.as_ref().map(redb::AccessGuard::value)))
    }

    fn tables(&mut self) -> Result<&(Values, Used), StoreError> {
        let tables = match self.tables.take() {
            Some(tables) => tables,
            None => {
                let transaction = self.database.begin_read()?;
                (
                    transaction.open_table(VALUES)?,
                    transaction.open_table(USED)?,
                )
            }
        };
        Ok(self.tables.insert(tables))
    }

    /// What the entries of a service count.
    fn used(&mut self, service: &str) -> Result<u64, StoreError> {
        let mut groups = self.state.groups();
        if let Some(used) = groups.find_map(|group| group.used.get(service)) {
            return Ok(*used);
        }
        let used = self.tables()?.1.get(service)?;
        Ok(used.map_or(0, |used| used.value()))
    }

    fn put(&mut self, entry_key: EntryKey<'_>, stored: Option<Vec<u8>>) {
        self.effects.values.push((place(entry_key).into(), stored));
    }
}

impl Op {
    /// Reads first and writes then, so that it has its whole effect or none.
    fn apply(&self, view: &mut View<'_>) -> Result<Done, StoreError> {
        match &self.change {
            Change::Put(pairs) => {
                let pairs: Vec<_> = pairs
                    .iter()
                    .map(|(key, value)| (&**key, value.as_deref()))
                    .collect();
                self.put(&pairs, None, view).map(|()| Done::Written)
            }
            Change::SetFor { key, value, life } => {
                let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
                let end = Some(now().saturating_add(life));
                let has_ends = view.stored(SOME_END, |stored| stored.is_some())?;
                self.put(&[(key, Some(value))], end, view)?;
                if !has_ends {
                    view.put(SOME_END, Some(seal(SOME_END, b"", None)));
                }
                Ok(Done::Written)
            }
            Change::End(keys) => {
                let mut ended = Vec::new();
                for key in keys {
                    let entry_key = self.entry_key(key);
                    let has_ended = |stored: Option<&[u8]>| {
                        stored.is_some_and(|stored| has_ended(entry_key, stored))
                    };
                    if view.stored(entry_key, has_ended)? {
                        ended.push((&**key, None));
                    }
                }
                self.put(&ended, None, view).map(|()| Done::Written)
            }
            Change::Increment { key, delta } => {
                let (before, end) = self.value(key, view)?.unzip();
                let before = before.map_or(Some(0), |text| {
                    std::str::from_utf8(&text).ok()?.parse::<i64>().ok()
                });
                let sum = before
                    .and_then(|number| number.checked_add(*delta))
                    .ok_or(StoreError::NotANumber)?;
                let text = sum.to_string();
                self.put(&[(key, Some(text.as_bytes()))], end.flatten(), view)?;
                Ok(Done::Number(sum))
            }
            Change::Swap {
                key,
                expected,
                value,
            } => {
                let (present, end) = self.value(key, view)?.unzip();
                if present.map(|value| digest(&value)) != *expected {
                    return Ok(Done::Swapped(false));
                }
                self.put(&[(key, Some(value))], end.flatten(), view)?;
                Ok(Done::Swapped(true))
            }
        }
    }

    fn entry_key<'a>(&'a self, key: &'a str) -> EntryKey<'a> {
        (&self.service, &self.bucket, key)
    }

    /// The value of a key, and when it ends.
    fn value(&self, key: &str, view: &mut View<'_>) -> Result<Option<Held>, StoreError> {
        let entry_key = self.entry_key(key);
        view.stored(entry_key, |stored| {
            let live = stored.map(|stored| unseal(entry_key, stored)).transpose()?;
            let live = live.and_then(|unsealed| unsealed.live());
            Ok(live.map(|live| (live.value.to_vec(), live.end)))
        })?
    }

    fn put(
        &self,
        pairs: &[(&str, Option<&[u8]>)],
        end: Option<u64>,
        view: &mut View<'_>,
    ) -> Result<(), StoreError> {
        // Of a key that stands twice the last one counts.
        let last: BTreeMap<_, _> = pairs.iter().copied().collect();
        let size = |key: &str, value: Option<usize>| {
            value.map_or(0, |value| counted(self.entry_key(key), value))
        };
        let (mut more, mut less, mut grows) = (0, 0, false);
        for (key, value) in &last {
            let old = view.stored(self.entry_key(key), |stored| stored.map(value_size))?;
            let new = size(key, value.map(|value| value.len() + tail_size(end)));
            let old = size(key, old);
            grows |= new > old;
            (more, less) = (more + new, less + old);
        }
        if grows || more != less {
            let before = view.used(&self.service)?;
            let wanted = (before + more).saturating_sub(less);
            if grows && wanted > self.quota {
                return Err(StoreError::Quota {
                    wanted,
                    limit: self.quota,
                });
            }
            view.effects.used = (wanted != before).then(|| (Arc::clone(&self.service), wanted));
        }
        for (key, value) in last {
            let entry_key = self.entry_key(key);
            view.put(entry_key, value.map(|value| seal(entry_key, value, end)));
        }
        Ok(())
    }
}
