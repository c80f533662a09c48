//! The engine of one machine: one file of redb in this process.

use std::{
    io::BufRead,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Instant,
};

use redb::{ReadableTable as _, TableDefinition, WriteTransaction};

use super::{
    Done, Engine, Health, KeyPage, MAX_BATCH_BYTES, MAX_PAGE, Op, Size, StoreError,
    batch_too_large,
    commit::{self, Queue},
    entry::{EntryKey, unseal},
    file::{self, Files},
    journaled::{Journaled, Medium},
};
use crate::log::panic_text;

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

/// A file of redb and its journal. Reads never wait for writers. Writers that
/// come at the same time are committed together (`commit`), because making
/// anything durable costs one flush of the disk, whatever the number.
pub(super) struct Embedded {
    /// None after an error from which opening again did not recover; the next
    /// one who comes tries.
    pub(super) database: RwLock<Option<Journaled>>,
    medium: Arc<dyn Medium>,
    cache: usize,
    queue: Queue,
    health: Health,
}

impl Embedded {
    /// Opens the file, or creates it, for this user alone. One that a full
    /// disk left empty at its creation is created again, with a warning.
    pub(super) fn open(file: &Path, cache: usize) -> Result<Self, StoreError> {
        contain(|| file::ensure(file, cache))?;
        Self::with(Arc::new(Files::of(file)), cache)
    }

    pub(super) fn with(medium: Arc<dyn Medium>, cache: usize) -> Result<Self, StoreError> {
        let database = contain(|| Journaled::open(Arc::clone(&medium), cache))?;
        Ok(Self {
            database: RwLock::new(Some(database)),
            medium,
            cache,
            queue: Queue::default(),
            health: Health::default(),
        })
    }

    /// Works with the database. After an error of the disk redb refuses to go
    /// on, so the file is opened again, now or by who comes next.
    pub(super) fn work<T>(
        &self,
        work: impl FnOnce(&Journaled) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let is_closed = self
            .database
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none();
        if is_closed {
            self.reopen()?;
        }
        let result = {
            let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
            contain(|| work(database.as_ref().ok_or_else(closed)?))
        };
        if result.as_ref().is_err_and(StoreError::needs_reopening) {
            // The error is this one's; opening again is for the next.
            let _ = self.reopen();
        }
        result
    }

    fn reopen(&self) -> Result<(), StoreError> {
        let mut database = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let old = database.take();
        *database = Some(contain(|| {
            // The old one holds the lock of the file.
            drop(old);
            Journaled::open(Arc::clone(&self.medium), self.cache)
        })?);
        Ok(())
    }

    fn read<T>(&self, read: impl Fn(&Values) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let result = self.work(|database| read(&database.begin_read()?.open_table(VALUES)?));
        self.health.read(&result);
        result
    }
}

impl Engine for Embedded {
    fn get(&self, entry_key: EntryKey<'_>, _: Instant) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|values| value(values, entry_key))
    }

    fn exists(&self, entry_key: EntryKey<'_>, _: Instant) -> Result<bool, StoreError> {
        self.read(|values| Ok(values.get(entry_key)?.is_some()))
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
                let value = value(values, (service, bucket, key))?;
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
                let (entry_key, _) = entry?;
                let (its_service, its_bucket, key) = entry_key.value();
                if its_service != service || its_bucket != bucket {
                    break;
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

    fn write(&self, op: Op, deadline: Instant) -> Result<Done, StoreError> {
        self.queue.submit(op, deadline, |ops| {
            let result = self.work(|database| commit::apply(database, ops));
            self.health.wrote(ops.len(), &result);
            result
        })
    }

    fn health(&self) -> &Health {
        &self.health
    }

    /// Reads one number for each service. A reader of the server asks this, so
    /// it neither waits for the file to be opened again nor opens it, which may
    /// read all of it.
    fn size(&self) -> Result<Size, StoreError> {
        let database = self.database.try_read().map_err(|_| closed())?;
        let used = contain(|| {
            let database = database.as_ref().ok_or_else(closed)?;
            let mut sum = 0;
            for entry in database.begin_read()?.open_table(USED)?.iter()? {
                sum += entry?.1.value();
            }
            Ok(sum)
        })?;
        Ok(Size {
            used,
            on_disk: self.medium.size(),
        })
    }

    /// Reads and writes wait meanwhile. Reads and writes most of the file.
    fn compact(&self) -> Result<(), StoreError> {
        let mut database = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(database) = database.as_mut() else {
            return Err(closed());
        };
        contain(|| database.compact())
    }

    fn end(&self) {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(database) = &*database {
            database.end();
        }
    }

    fn import(&self, input: &mut dyn BufRead, merge: bool) -> Result<u64, StoreError> {
        self.read_backup(input, merge)
    }
}

fn value(values: &Values, entry_key: EntryKey<'_>) -> Result<Option<Vec<u8>>, StoreError> {
    let stored = values.get(entry_key)?;
    stored
        .map(|stored| unseal(entry_key, stored.value()).map(<[u8]>::to_vec))
        .transpose()
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

/// The table of values, to be read.
pub(super) type Values =
    redb::ReadOnlyTable<(&'static str, &'static str, &'static str), &'static [u8]>;
