//! The store behind `wasi:keyvalue`: values by service, bucket and key in one
//! file (redb), durable before they are acknowledged, with a quota for each
//! service.
//!
//! Reads never wait for writers. Writers that come at the same time are
//! committed together (`commit`), because making anything durable costs one
//! flush of the disk, whatever the number.

mod commit;
mod entry;
mod error;
mod file;
mod health;
mod salvage;
mod transfer;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Instant,
};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};

use commit::{Change, Done, Op, Queue};
use entry::unseal;
pub use error::StoreError;
pub use health::Health;
pub use salvage::{Checked, Reader};
pub use transfer::ExportError;

use sha2::{Digest as _, Sha256};

use crate::log::panic_text;

/// Longest key in bytes; an empty one is refused too.
pub const MAX_KEY: usize = 1024;
/// Largest value in bytes.
pub const MAX_VALUE: usize = 1024 * 1024;
/// Longest name of a bucket in bytes.
pub const MAX_BUCKET: usize = 64;
/// Keys in one batch.
pub const MAX_BATCH: usize = 1000;
/// Keys in one page of a listing.
const MAX_PAGE: usize = 1000;
/// What one batch reads or writes, and one page lists, in bytes.
pub const MAX_BATCH_BYTES: usize = 4 * 1024 * 1024;

/// Memory that an open store uses as cache, in bytes. A larger one is no faster:
/// reads come from the page cache.
pub const CACHE: usize = 8 * 1024 * 1024;

/// Version of the tables below, in the file under `format`.
const FORMAT: u64 = 2;

/// SHA-256 of a value: two values with the same one are the same.
pub type Digest = [u8; 32];

/// The digest of a value.
#[must_use]
pub fn digest(value: &[u8]) -> Digest {
    Sha256::digest(value).into()
}

/// (service, bucket, key) to value, as `entry` seals it.
const VALUES: TableDefinition<'_, (&str, &str, &str), &[u8]> = TableDefinition::new("values");
/// What the entries of each service count, in bytes; see `entry`.
const USED: TableDefinition<'_, &str, u64> = TableDefinition::new("used");
/// About the file itself.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// The store of one server.
pub struct Store {
    /// None after an error from which opening again did not recover; the next
    /// one who comes tries.
    database: RwLock<Option<Database>>,
    open: Box<dyn Fn() -> Result<Database, StoreError> + Send + Sync>,
    /// None in tests, which have no file.
    file: Option<PathBuf>,
    queue: Queue,
    health: Health,
}

/// What a store takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// What the entries of all services count.
    pub used: u64,
    /// What the file takes on the disk.
    pub on_disk: u64,
}

impl Store {
    /// Opens the file, or creates it, for this user alone. One that a full
    /// disk left empty at its creation is created again, with a warning.
    ///
    /// # Errors
    /// Another process has it open, it is of another format or damaged, or the
    /// system refuses.
    pub fn open(file: &Path, cache: usize) -> Result<Arc<Self>, StoreError> {
        contain(|| file::ensure(file, cache))?;
        let path = file.to_owned();
        Self::with(Some(file.to_owned()), move || file::open(&path, cache))
    }

    fn with(
        file: Option<PathBuf>,
        open: impl Fn() -> Result<Database, StoreError> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, StoreError> {
        let database = contain(|| {
            let database = open()?;
            prepare(&database)?;
            Ok(database)
        })?;
        Ok(Arc::new(Self {
            database: RwLock::new(Some(database)),
            open: Box::new(open),
            file,
            queue: Queue::default(),
            health: Health::default(),
        }))
    }

    /// How it does.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// What it takes. Reads one number for each service. A reader of the
    /// server asks this, so it neither waits for the file to be opened again
    /// nor opens it, which may read all of it.
    ///
    /// # Errors
    /// If it can't be read, or is closed at present.
    pub fn size(&self) -> Result<Size, StoreError> {
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
            on_disk: self.file.as_deref().map_or(0, file::size_on_disk),
        })
    }

    /// Gives what the file does not need back to the disk. Reads and writes
    /// wait meanwhile. Reads and writes most of the file.
    ///
    /// # Errors
    /// If the disk fails; nothing is lost then.
    pub fn compact(&self) -> Result<(), StoreError> {
        let mut database = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(database) = database.as_mut() else {
            return Err(closed());
        };
        contain(|| Ok(database.compact().map(drop)?))
    }

    /// What one service sees of it.
    #[must_use]
    pub fn namespace(self: &Arc<Self>, service: &str, quota: u64) -> Namespace {
        Namespace {
            store: Arc::clone(self),
            service: service.into(),
            quota,
        }
    }

    /// Works with the database. After an error of the disk redb refuses to go
    /// on, so the file is opened again, now or by who comes next.
    fn work<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
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
            let opened = (self.open)()?;
            prepare(&opened)?;
            Ok(opened)
        })?);
        Ok(())
    }
}

fn closed() -> StoreError {
    StoreError::Io("it could not be opened again".into())
}

/// redb panics where a page is not what it wrote: that is an error of this one
/// read or write.
fn contain<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        // Of an assertion, the first line says enough.
        let text = panic_text(&*panic);
        Err(StoreError::Broken(
            text.lines().next().unwrap_or_default().into(),
        ))
    })
}

/// Makes the tables of a new file, and refuses one of another format.
fn prepare(database: &Database) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    {
        let mut meta = transaction.open_table(META)?;
        let format = meta.get("format")?.map(|format| format.value());
        match format {
            Some(FORMAT) => {}
            Some(found) => {
                return Err(StoreError::Format {
                    found,
                    known: FORMAT,
                });
            }
            None => drop(meta.insert("format", FORMAT)?),
        }
        transaction.open_table(VALUES)?;
        transaction.open_table(USED)?;
    }
    transaction.commit()?;
    Ok(())
}

/// The table of values, to be read.
type Values = redb::ReadOnlyTable<(&'static str, &'static str, &'static str), &'static [u8]>;

/// One service's part of the store.
#[derive(Clone)]
pub struct Namespace {
    store: Arc<Store>,
    service: Arc<str>,
    /// What the entries of all buckets may count, in bytes.
    quota: u64,
}

/// Some keys of a bucket, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPage {
    /// The keys.
    pub keys: Vec<String>,
    /// Where the next page begins, if there is one.
    pub next: Option<String>,
}

impl Namespace {
    /// Whether a bucket may have this name; every such bucket is there.
    ///
    /// # Errors
    /// If not.
    pub fn open(&self, bucket: &str) -> Result<(), StoreError> {
        check_bucket(bucket)
    }

    /// The value of a key, if there is one.
    ///
    /// # Errors
    /// The key or bucket breaks its bounds, or the disk fails; likewise below.
    pub fn get(&self, bucket: &str, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        check_key(bucket, key)?;
        self.read(|values| self.value(values, bucket, key))
    }

    /// What stands for the value of a key, if there is one: see [`digest`].
    ///
    /// # Errors
    /// As [`Namespace::get`].
    pub fn digest(&self, bucket: &str, key: &str) -> Result<Option<Digest>, StoreError> {
        check_key(bucket, key)?;
        self.read(|values| {
            let value = self.value(values, bucket, key)?;
            Ok(value.map(|value| digest(&value)))
        })
    }

    /// Whether a key has a value.
    ///
    /// # Errors
    /// As [`Namespace::get`].
    pub fn exists(&self, bucket: &str, key: &str) -> Result<bool, StoreError> {
        check_key(bucket, key)?;
        self.read(|values| Ok(values.get((&*self.service, bucket, key))?.is_some()))
    }

    /// The values of several keys, as they are at one time.
    ///
    /// # Errors
    /// As [`Namespace::get`]; too many or too large together.
    pub fn get_many(
        &self,
        bucket: &str,
        keys: &[String],
    ) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        check_batch(keys.len())?;
        keys.iter().try_for_each(|key| check_key(bucket, key))?;
        self.read(|values| {
            let mut bytes = 0;
            let mut one = |key: &String| {
                let value = self.value(values, bucket, key)?;
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

    /// Keys of a bucket in order, from one on.
    ///
    /// # Errors
    /// As [`Namespace::get`].
    pub fn list(&self, bucket: &str, from: Option<&str>) -> Result<KeyPage, StoreError> {
        check_bucket(bucket)?;
        self.read(|values| {
            let mut page = KeyPage {
                keys: Vec::new(),
                next: None,
            };
            let mut bytes = 0;
            for entry in values.range((&*self.service, bucket, from.unwrap_or_default())..)? {
                let (entry_key, _) = entry?;
                let (service, its_bucket, key) = entry_key.value();
                if service != &*self.service || its_bucket != bucket {
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

    /// Sets a value.
    ///
    /// # Errors
    /// As [`Namespace::get`]; over the quota; no turn before the deadline, and
    /// then nothing was written.
    pub fn set(
        &self,
        bucket: &str,
        key: String,
        value: Vec<u8>,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        self.set_many(bucket, vec![(key, value)], deadline)
    }

    /// Removes a key; one without a value is no error.
    ///
    /// # Errors
    /// As [`Namespace::set`].
    pub fn delete(&self, bucket: &str, key: String, deadline: Instant) -> Result<(), StoreError> {
        self.delete_many(bucket, vec![key], deadline)
    }

    /// Sets several values, all or none.
    ///
    /// # Errors
    /// As [`Namespace::set`].
    pub fn set_many(
        &self,
        bucket: &str,
        pairs: Vec<(String, Vec<u8>)>,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let bytes: usize = pairs
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        if bytes > MAX_BATCH_BYTES {
            return Err(batch_too_large(bytes));
        }
        pairs.iter().try_for_each(|(_, value)| check_value(value))?;
        self.put(
            bucket,
            pairs
                .into_iter()
                .map(|(key, value)| (key, Some(value)))
                .collect(),
            deadline,
        )
    }

    /// Removes several keys, all or none.
    ///
    /// # Errors
    /// As [`Namespace::set`].
    pub fn delete_many(
        &self,
        bucket: &str,
        keys: Vec<String>,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        self.put(
            bucket,
            keys.into_iter().map(|key| (key, None)).collect(),
            deadline,
        )
    }

    fn put(&self, bucket: &str, pairs: commit::Pairs, deadline: Instant) -> Result<(), StoreError> {
        check_batch(pairs.len())?;
        pairs
            .iter()
            .try_for_each(|(key, _)| check_key(bucket, key))?;
        self.write(bucket, Change::Put(pairs), deadline).map(drop)
    }

    /// Adds to a number, which is kept as decimal text, and returns the sum.
    /// A key without a value counts as zero.
    ///
    /// # Errors
    /// As [`Namespace::set`]; the value is no number, or the sum too large.
    pub fn increment(
        &self,
        bucket: &str,
        key: String,
        delta: i64,
        deadline: Instant,
    ) -> Result<i64, StoreError> {
        check_key(bucket, &key)?;
        match self.write(bucket, Change::Increment { key, delta }, deadline)? {
            Done::Number(sum) => Ok(sum),
            Done::Written | Done::Swapped(_) => Err(StoreError::Io("unexpected outcome".into())),
        }
    }

    /// Sets a value if the present one has the digest that is expected, or if
    /// there is none and none is; says whether it was so.
    ///
    /// # Errors
    /// As [`Namespace::set`].
    pub fn swap(
        &self,
        bucket: &str,
        key: String,
        expected: Option<Digest>,
        value: Vec<u8>,
        deadline: Instant,
    ) -> Result<bool, StoreError> {
        check_key(bucket, &key)?;
        check_value(&value)?;
        match self.write(
            bucket,
            Change::Swap {
                key,
                expected,
                value,
            },
            deadline,
        )? {
            Done::Swapped(swapped) => Ok(swapped),
            Done::Written | Done::Number(_) => Err(StoreError::Io("unexpected outcome".into())),
        }
    }

    fn write(&self, bucket: &str, change: Change, deadline: Instant) -> Result<Done, StoreError> {
        let op = Op {
            service: Arc::clone(&self.service),
            quota: self.quota,
            bucket: bucket.into(),
            change,
        };
        self.store.queue.submit(op, deadline, |ops| {
            let result = self.store.work(|database| commit::apply(database, ops));
            self.store.health.wrote(ops.len(), &result);
            result
        })
    }

    fn read<T>(&self, read: impl Fn(&Values) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let result = self
            .store
            .work(|database| read(&database.begin_read()?.open_table(VALUES)?));
        self.store.health.read(&result);
        result
    }

    fn value(
        &self,
        values: &Values,
        bucket: &str,
        key: &str,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let entry_key = (&*self.service, bucket, key);
        let stored = values.get(entry_key)?;
        stored
            .map(|stored| unseal(entry_key, stored.value()).map(<[u8]>::to_vec))
            .transpose()
    }
}

fn check_bucket(bucket: &str) -> Result<(), StoreError> {
    let fine = bucket.len() <= MAX_BUCKET
        && bucket
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if fine {
        Ok(())
    } else {
        Err(StoreError::Bucket)
    }
}

fn check_key(bucket: &str, key: &str) -> Result<(), StoreError> {
    check_bucket(bucket)?;
    if (1..=MAX_KEY).contains(&key.len()) {
        Ok(())
    } else {
        Err(StoreError::Key { size: key.len() })
    }
}

fn check_value(value: &[u8]) -> Result<(), StoreError> {
    if value.len() <= MAX_VALUE {
        Ok(())
    } else {
        Err(StoreError::Value { size: value.len() })
    }
}

fn check_batch(count: usize) -> Result<(), StoreError> {
    if count <= MAX_BATCH {
        Ok(())
    } else {
        Err(StoreError::Batch {
            size: count,
            limit: MAX_BATCH,
            unit: "keys",
        })
    }
}

fn batch_too_large(bytes: usize) -> StoreError {
    StoreError::Batch {
        size: bytes,
        limit: MAX_BATCH_BYTES,
        unit: "bytes",
    }
}

#[cfg(test)]
mod tests;
