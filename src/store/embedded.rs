//! The engine of one machine: one file of redb in this process.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard},
    time::{Duration, Instant},
};

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};

use super::{
    Change, Checked, Done, Engine, EngineResult, Health, KeyPage, MAX_BATCH_BYTES, MAX_PAGE, Op,
    Reader, Size, StoreError, batch_too_large,
    commit::{Group, Queue, Unflushed},
    entry::{EntryKey, has_ended, unseal},
    file::{self, Files},
    journaled::{Journaled, Medium},
};
use crate::{locks::lock, log::panic_text};

/// Memory that an open store uses as cache, in bytes. A larger one is no faster:
/// reads come from the page cache.
pub const CACHE: usize = 8 * 1024 * 1024;

/// Version of the tables below, in the file under `format`.
pub(super) const FORMAT: u64 = 3;
/// The same tables, without those of a journal.
pub(super) const FORMAT_BEFORE: u64 = 2;

/// (service, bucket, key) to value, as `entry` seals it.
pub(super) const VALUES: TableDefinition<'_, (&str, &str, &str), &[u8]> =
    TableDefinition::new("values");
/// What the entries of each service count, in bytes; see `entry`.
pub(super) const USED: TableDefinition<'_, &str, u64> = TableDefinition::new("used");
/// About the file itself.
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// Entry of no service, which is there once any value ends.
pub(super) const SOME_END: EntryKey<'static> = ("", "", "some-end");
/// Entries at which one look for what has ended looks, and their bytes.
const TEND_ENTRIES: usize = 10_000;
const TEND_BYTES: usize = 8 * 1024 * 1024;
/// How often the file is opened again because of damage, at most.
const REOPEN_EVERY: Duration = Duration::from_secs(60);
/// Those that are removed at once: others that write wait meanwhile.
const TEND_KEYS: usize = 100;
/// Time for removing them.
const TEND_TIME: Duration = Duration::from_secs(1);
/// Time for what is not on the disk at the end.
const END_TIME: Duration = Duration::from_secs(5);

/// A file of redb and its journal. What is written at the same time is made
/// durable together (`commit`), because that costs one flush of the disk,
/// whatever the number.
pub(super) struct Embedded {
    pub(super) database: Arc<Database>,
    queue: Queue,
    /// Where the next look for what has ended begins.
    next: Mutex<(String, String, String)>,
}

/// The database, which is opened again after an error of the disk.
pub(super) struct Database {
    pub(super) open: RwLock<Open>,
    /// When it was opened again because of damage.
    reopened: Mutex<Option<Instant>>,
    medium: Arc<dyn Medium>,
    cache: usize,
    health: Health,
}

pub(super) struct Open {
    /// None after an error from which opening again did not recover; the next
    /// one who comes tries.
    pub(super) database: Option<Journaled>,
    /// How often it was opened again.
    number: u64,
}

impl Database {
    /// Works with it. After an error of the disk redb refuses to go on, so the
    /// file is opened again, now or by who comes next.
    pub(super) fn work<T>(
        &self,
        work: impl FnOnce(&Journaled) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let (is_closed, number) = {
            let open = self.read_open();
            (open.database.is_none(), open.number)
        };
        if is_closed {
            self.reopen(number)?;
        }
        let (result, number) = {
            let open = self.read_open();
            let database = open.database.as_ref();
            (contain(|| work(database.ok_or_else(closed)?)), open.number)
        };
        if result.as_ref().is_err_and(StoreError::needs_reopening) {
            // The error is this one's; opening again is for the next.
            let _ = self.reopen(number);
        }
        result
    }

    /// How often it was opened again.
    pub(super) fn number(&self) -> u64 {
        self.read_open().number
    }

    fn read_open(&self) -> RwLockReadGuard<'_, Open> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the file again, unless somebody has since this number was read.
    pub(super) fn reopen(&self, number: u64) -> Result<(), StoreError> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.number != number {
            return Ok(());
        }
        let old = open.database.take();
        open.database = Some(contain(|| {
            // The old one holds the lock of the file.
            drop(old);
            Journaled::open(Arc::clone(&self.medium), self.cache)
        })?);
        open.number += 1;
        Ok(())
    }

    fn commit(&self, group: &Group) -> Result<(), StoreError> {
        let number = self.number();
        let result = self.work(|database| group.write(database));
        if matches!(result, Err(StoreError::Broken(_))) {
            // redb may refuse all writes now, until it is opened again.
            let mut reopened = lock(&self.reopened);
            if reopened.is_none_or(|at| at.elapsed() >= REOPEN_EVERY) {
                *reopened = Some(Instant::now());
                let _ = self.reopen(number);
            }
        }
        self.health.wrote(group.writes, &result);
        result
    }
}

impl Embedded {
    /// Opens the file, or creates it, for this user alone. One that a full
    /// disk left empty at its creation is created again, with a warning.
    pub(super) fn open(file: &Path, cache: usize) -> Result<Self, StoreError> {
        contain(|| file::ensure(file, cache))?;
        Self::with(Arc::new(Files::of(file)), cache)
    }

    pub(super) fn with(medium: Arc<dyn Medium>, cache: usize) -> Result<Self, StoreError> {
        let open = contain(|| Journaled::open(Arc::clone(&medium), cache))?;
        let database = Arc::new(Database {
            open: RwLock::new(Open {
                database: Some(open),
                number: 0,
            }),
            reopened: Mutex::default(),
            medium,
            cache,
            health: Health::default(),
        });
        let commits = Arc::clone(&database);
        Ok(Self {
            database,
            queue: Queue::new(Box::new(move |group| commits.commit(group)))?,
            next: Mutex::default(),
        })
    }

    pub(super) fn work<T>(
        &self,
        work: impl FnOnce(&Journaled) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.database.work(work)
    }

    fn read<T>(&self, read: impl Fn(&Values) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let result = self.work(|database| read(&database.begin_read()?.open_table(VALUES)?));
        self.health().read(&result);
        result
    }
}

impl Engine for Embedded {
    fn get(&self, entry_key: EntryKey<'_>, _: Instant) -> EngineResult<Option<Vec<u8>>> {
        if let Some((value, unflushed)) = self
            .queue
            .read(entry_key, |stored| value(stored, entry_key))
        {
            return Ok((value?, Some(unflushed)));
        }
        let read = self.read(|values| {
            let stored = values.get(entry_key)?;
            value(stored.as_ref().map(redb::AccessGuard::value), entry_key)
        });
        Ok((read?, None))
    }

    fn exists(&self, entry_key: EntryKey<'_>, _: Instant) -> EngineResult<bool> {
        let is_live =
            |stored: Option<&[u8]>| stored.is_some_and(|stored| !has_ended(entry_key, stored));
        if let Some((exists, unflushed)) = self.queue.read(entry_key, is_live) {
            return Ok((exists, Some(unflushed)));
        }
        let read = self.read(|values| {
            let stored = values.get(entry_key)?;
            Ok(is_live(stored.as_ref().map(redb::AccessGuard::value)))
        });
        Ok((read?, None))
    }

    fn get_many(
        &self,
        (service, bucket): (&str, &str),
        keys: &[String],
        _: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.read(|values| {
            let mut bytes = 0;
            let mut one = |key: &String| {
                let entry_key = (service, bucket, &**key);
                let stored = values.get(entry_key)?;
                let value = value(stored.as_ref().map(redb::AccessGuard::value), entry_key)?;
                bytes += value.as_ref().map_or(0, Vec::len);
                if bytes > MAX_BATCH_BYTES {
                    Err(batch_too_large(bytes))
                } else {
                    Ok(value)
                }
            };
            keys.iter().map(&mut one).collect()
        })
    }

    fn list(
        &self,
        (service, bucket): (&str, &str),
        prefix: &str,
        from: &str,
        _: Instant,
    ) -> Result<KeyPage, StoreError> {
        self.read(|values| {
            let mut page = KeyPage {
                keys: Vec::new(),
                next: None,
            };
            let mut bytes = 0;
            for entry in values.range((service, bucket, from)..)? {
                let (entry_key, stored) = entry?;
                let (its_service, its_bucket, key) = entry_key.value();
                if its_service != service || its_bucket != bucket || !key.starts_with(prefix) {
                    break;
                }
                if has_ended(entry_key.value(), stored.value()) {
                    continue;
                }
                bytes += key.len();
                if page.keys.len() == MAX_PAGE || bytes > MAX_BATCH_BYTES {
                    page.next = Some(key.to_owned());
                    break;
                }
                page.keys.push(key.to_owned());
            }
            Ok(page)
        })
    }

    fn write(&self, op: &Op, deadline: Instant) -> EngineResult<Done> {
        if Instant::now() >= deadline {
            return Err(StoreError::Busy);
        }
        let applied = self.work(|database| self.queue.apply(op, database));
        if applied.as_ref().is_err_and(StoreError::needs_reopening) {
            self.health().wrote(1, &applied);
        }
        applied
    }

    /// While the file is opened again, which may read all of it.
    fn waits(&self) -> bool {
        let open = self.database.open.try_read();
        open.map_or(true, |open| open.database.is_none())
    }

    fn backlog(&self) -> Option<Unflushed> {
        self.queue.backlog()
    }

    fn unflushed(&self, place: (&str, &str)) -> Option<Unflushed> {
        self.queue.of_bucket(place)
    }

    /// Looks at a part of the entries, in turn, and removes what has ended of
    /// them; at none as long as no entry ends.
    fn tend(&self) {
        self.queue.expire();
        let mut next = lock(&self.next);
        let from = std::mem::take(&mut *next);
        let Ok(found) = self.work(|database| ended_from(database, &from)) else {
            return;
        };
        *next = found.next;
        for ((service, bucket), keys) in found.ended {
            for keys in keys.chunks(TEND_KEYS) {
                self.queue.expire();
                let op = Op {
                    service: Arc::clone(&service),
                    quota: u64::MAX,
                    bucket: bucket.clone(),
                    change: Change::End(keys.to_vec()),
                };
                let deadline = Instant::now() + TEND_TIME;
                let removed = self.write(&op, deadline);
                let flushed = removed.and_then(|(_, unflushed)| {
                    unflushed.map_or(Ok(()), |unflushed| unflushed.wait(deadline))
                });
                match flushed {
                    Ok(()) => {}
                    Err(StoreError::Damaged(_)) => break,
                    // What is left is found in the next round.
                    Err(_) => {
                        *next = from;
                        return;
                    }
                }
            }
        }
    }

    fn health(&self) -> &Health {
        &self.database.health
    }

    /// Reads one number for each service. A reader of the server asks this, so
    /// it neither waits for the file to be opened again nor opens it, which may
    /// read all of it.
    fn size(&self) -> Result<Size, StoreError> {
        let open = self.database.open.try_read().map_err(|_| closed())?;
        let used = contain(|| {
            let database = open.database.as_ref().ok_or_else(closed)?;
            let mut sum = 0;
            for entry in database.begin_read()?.open_table(USED)?.iter()? {
                sum += entry?.1.value();
            }
            Ok(sum)
        })?;
        Ok(Size {
            used,
            on_disk: self.database.medium.size(),
        })
    }

    /// Reads and writes wait meanwhile. Reads and writes most of the file.
    fn compact(&self) -> Result<(), StoreError> {
        let open = self.database.open.write();
        let mut open = open.unwrap_or_else(PoisonError::into_inner);
        let Some(database) = open.database.as_mut() else {
            return Err(closed());
        };
        contain(|| database.compact())
    }

    fn end(&self) {
        if let Some(unflushed) = self.queue.newest() {
            let _ = unflushed.wait(Instant::now() + END_TIME);
        }
        if let Some(database) = &self.database.read_open().database {
            database.end();
        }
    }

    /// As it is at one time; writes go on meanwhile.
    fn export(&self, out: &mut dyn Write, lost: &mut dyn FnMut(&str)) -> io::Result<Checked> {
        let reader = self.work(Reader::of).map_err(io::Error::other)?;
        reader.export(out, lost)
    }

    fn import(&self, input: &mut dyn BufRead, merge: bool) -> Result<u64, StoreError> {
        self.read_backup(input, merge)
    }
}

/// What of some entries has ended, and where the next ones begin.
#[derive(Default)]
struct Ended {
    ended: BTreeMap<(Arc<str>, Box<str>), Vec<String>>,
    next: (String, String, String),
}

fn ended_from(
    database: &Journaled,
    (service, bucket, key): &(String, String, String),
) -> Result<Ended, StoreError> {
    let values = database.begin_read()?.open_table(VALUES)?;
    let mut found = Ended::default();
    if values.get(SOME_END)?.is_none() {
        return Ok(found);
    }
    let mut bytes = 0;
    for (count, entry) in values.range((&**service, &**bucket, &**key)..)?.enumerate() {
        let (entry_key, stored) = entry?;
        let entry_key @ (service, bucket, key) = entry_key.value();
        if count == TEND_ENTRIES || bytes > TEND_BYTES {
            found.next = (service.into(), bucket.into(), key.into());
            break;
        }
        bytes += stored.value().len();
        if has_ended(entry_key, stored.value()) {
            let place = (service.into(), bucket.into());
            found.ended.entry(place).or_default().push(key.into());
        }
    }
    Ok(found)
}

/// The value of what is stored for an entry.
fn value(stored: Option<&[u8]>, entry_key: EntryKey<'_>) -> Result<Option<Vec<u8>>, StoreError> {
    let live = stored.map(|stored| unseal(entry_key, stored)).transpose()?;
    let live = live.and_then(|unsealed| unsealed.live());
    Ok(live.map(|live| live.value.to_vec()))
}

fn closed() -> StoreError {
    StoreError::Io("it could not be opened again".into())
}

/// redb panics where a page is not what it wrote: that is an error of this one
/// read or write.
pub(super) fn contain<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        // Of an assertion, the first line says enough.
        let text = panic_text(&*panic);
        Err(StoreError::Broken(
            text.lines().next().unwrap_or_default().into(),
        ))
    })
}

/// Makes the tables of a new file, and refuses one of another format.
pub(super) fn prepare(transaction: &WriteTransaction) -> Result<(), StoreError> {
    let mut meta = transaction.open_table(META)?;
    let format = meta.get("format")?.map(|format| format.value());
    match format {
        Some(FORMAT) => {}
        Some(FORMAT_BEFORE) | None => drop(meta.insert("format", FORMAT)?),
        Some(found) => {
            return Err(StoreError::Format {
                found,
                known: FORMAT,
            });
        }
    }
    transaction.open_table(VALUES)?;
    transaction.open_table(USED)?;
    Ok(())
}

/// The tables of values and of what services use, to be read.
pub(super) type Values =
    redb::ReadOnlyTable<(&'static str, &'static str, &'static str), &'static [u8]>;
pub(super) type Used = redb::ReadOnlyTable<&'static str, u64>;
