//! The store behind `wasi:keyvalue`: values by service, bucket and key, durable
//! before they are acknowledged, with a quota for each service. `engine` is
//! what holds them: `embedded`, redb and a journal, or `remote`, Valkey or Redis.

mod commit;
mod embedded;
mod engine;
mod entry;
mod error;
mod file;
mod health;
mod journal;
mod journaled;
#[cfg(feature = "redis")]
mod remote;
mod salvage;
mod transfer;

use std::{
    io::{self, BufRead, Write},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

pub use commit::Unflushed;
pub use embedded::CACHE;
use embedded::Embedded;
use engine::{Change, Done, Engine, EngineResult, Op, Pairs};
pub use error::StoreError;
pub use health::Health;
pub use salvage::{Checked, Reader};

use sha2::{Digest as _, Sha256};

use crate::locks::lock;

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

/// Longest time to live of a value: ten years.
const MAX_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// SHA-256 of a value: two values with the same one are the same.
pub type Digest = [u8; 32];

/// The digest of a value.
#[must_use]
pub fn digest(value: &[u8]) -> Digest {
    Sha256::digest(value).into()
}

/// The store of one server.
pub struct Store {
    engine: Arc<dyn Engine>,
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
        Ok(Self::on(Arc::new(Embedded::open(file, cache)?)))
    }

    /// Values in Valkey or Redis; connects to it when it is asked first. Long
    /// answers are taken from the memory that is named.
    ///
    /// # Errors
    /// The file of the CAs can't be read.
    #[cfg(feature = "redis")]
    pub fn remote(
        settings: crate::config::store::Remote,
        memory: Option<Arc<crate::budget::Budget>>,
    ) -> Result<Arc<Self>, StoreError> {
        Ok(Self::on(Arc::new(remote::Remote::new(settings, memory)?)))
    }

    fn on(engine: Arc<dyn Engine>) -> Arc<Self> {
        Arc::new(Self { engine })
    }

    /// How it does.
    #[must_use]
    pub fn health(&self) -> &Health {
        self.engine.health()
    }

    /// Does what is due every few seconds.
    pub fn tend(&self) {
        self.engine.tend();
    }

    /// What it takes; does not wait.
    ///
    /// # Errors
    /// If it can't be read, or is closed at present.
    pub fn size(&self) -> Result<Size, StoreError> {
        self.engine.size()
    }

    /// Gives what the file does not need back to the disk.
    ///
    /// # Errors
    /// If the disk fails; nothing is lost then.
    pub fn compact(&self) -> Result<(), StoreError> {
        self.engine.compact()
    }

    /// Puts its files in order before the process ends: then a copy of the
    /// store's file is a backup, and the next start has nothing to take in.
    pub fn end(&self) {
        self.engine.end();
    }

    /// Writes a backup while services go on, and names what can't be read.
    ///
    /// # Errors
    /// What is written to fails, or the engine.
    pub fn export(&self, out: &mut dyn Write, lost: &mut dyn FnMut(&str)) -> io::Result<Checked> {
        self.engine.export(out, lost)
    }

    /// Reads a backup into this store; says how many entries. Into a file, all
    /// of it or nothing.
    ///
    /// # Errors
    /// The backup is broken or cut off; the store is not empty and `merge` is
    /// not asked for, which lets the backup's values win; the disk fails.
    pub fn import(&self, input: &mut dyn BufRead, merge: bool) -> Result<u64, StoreError> {
        self.engine.import(input, merge)
    }

    /// What one service sees of it.
    #[must_use]
    pub fn namespace(self: &Arc<Self>, service: &str, quota: u64) -> Namespace {
        let service = service.into();
        self.engine.serves(&service);
        Namespace {
            store: Arc::clone(self),
            service,
            quota,
            ahead: None,
        }
    }
}

/// One service's part of the store.
pub struct Namespace {
    store: Arc<Store>,
    service: Arc<str>,
    /// What the entries of all buckets may count, in bytes.
    quota: u64,
    /// What was done and read here rests on that; where there is no place for
    /// it, each of them waits for the disk.
    ahead: Option<Mutex<Option<Unflushed>>>,
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
    /// Whether who asks it has to wait, for more than the disk.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.store.engine.waits()
    }

    /// The same for one who does not wait for the disk each time, but tells
    /// nobody before what [`Namespace::unflushed`] returns is on the disk.
    #[must_use]
    pub fn ahead(&self) -> Self {
        Self {
            ahead: Some(Mutex::default()),
            ..self.durable()
        }
    }

    /// The same for one who waits for the disk.
    #[must_use]
    pub fn durable(&self) -> Self {
        Self {
            store: Arc::clone(&self.store),
            service: Arc::clone(&self.service),
            quota: self.quota,
            ahead: None,
        }
    }

    /// What was done and read here ahead of the disk.
    #[must_use]
    pub fn unflushed(self) -> Option<Unflushed> {
        let unflushed = self.ahead?.into_inner();
        unflushed.unwrap_or_else(PoisonError::into_inner)
    }

    /// What a write should wait for first: the disk is behind.
    #[must_use]
    pub fn backlog(&self) -> Option<Unflushed> {
        self.store.engine.backlog()
    }

    /// What one who reads several keys of a bucket should wait for first: they
    /// are read from the disk.
    #[must_use]
    pub fn unflushed_of(&self, bucket: &str) -> Option<Unflushed> {
        let place = (&*self.service, bucket);
        self.store.engine.unflushed(place)
    }

    fn settle<T>(&self, result: EngineResult<T>, deadline: Instant) -> Result<T, StoreError> {
        let (value, unflushed) = result?;
        match (unflushed, &self.ahead) {
            (None, _) => {}
            (Some(unflushed), None) => unflushed.wait(deadline)?,
            (Some(unflushed), Some(ahead)) => {
                let mut ahead = lock(ahead);
                Unflushed::join(&mut ahead, unflushed);
            }
        }
        Ok(value)
    }

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
    /// The key or bucket breaks its bounds, or the engine fails; likewise below.
    pub fn get(
        &self,
        bucket: &str,
        key: &str,
        deadline: Instant,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        check_key(bucket, key)?;
        let entry_key = (&*self.service, bucket, key);
        self.settle(self.store.engine.get(entry_key, deadline), deadline)
    }

    /// What stands for the value of a key, if there is one: see [`digest`].
    ///
    /// # Errors
    /// As [`Namespace::get`].
    pub fn digest(
        &self,
        bucket: &str,
        key: &str,
        deadline: Instant,
    ) -> Result<Option<Digest>, StoreError> {
        let value = self.get(bucket, key, deadline)?;
        Ok(value.map(|value| digest(&value)))
    }

    /// Whether a key has a value.
    ///
    /// # Errors
    /// As [`Namespace::get`].
    pub fn exists(&self, bucket: &str, key: &str, deadline: Instant) -> Result<bool, StoreError> {
        check_key(bucket, key)?;
        let entry_key = (&*self.service, bucket, key);
        self.settle(self.store.engine.exists(entry_key, deadline), deadline)
    }

    /// The values of several keys, as they are at one time.
    ///
    /// # Errors
    /// As [`Namespace::get`]; too many or too large together.
    pub fn get_many(
        &self,
        bucket: &str,
        keys: &[String],
        deadline: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        check_bucket(bucket)?;
        check_batch(keys.len())?;
        keys.iter().try_for_each(|key| check_key(bucket, key))?;
        let place = (&*self.service, bucket);
        self.store.engine.get_many(place, keys, deadline)
    }

    /// Keys of a bucket that begin so, in order, from one on.
    ///
    /// # Errors
    /// As [`Namespace::get`].
    pub fn list(
        &self,
        bucket: &str,
        prefix: &str,
        from: Option<&str>,
        deadline: Instant,
    ) -> Result<KeyPage, StoreError> {
        check_bucket(bucket)?;
        let from = from.unwrap_or_default();
        for part in [prefix, from] {
            if part.len() > MAX_KEY {
                return Err(StoreError::Key { size: part.len() });
            }
        }
        let place = (&*self.service, bucket);
        let from = from.max(prefix);
        self.store.engine.list(place, prefix, from, deadline)
    }

    /// Sets a value.
    ///
    /// # Errors
    /// As [`Namespace::get`]; over the quota; the deadline had passed, so
    /// nothing was written; or it passed before it was on the disk.
    pub fn set(
        &self,
        bucket: &str,
        key: String,
        value: Vec<u8>,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        self.set_many(bucket, vec![(key, value)], deadline)
    }

    /// Sets a value that ends after so long.
    ///
    /// # Errors
    /// As [`Namespace::set`]; a time that is too short or too long.
    pub fn set_for(
        &self,
        bucket: &str,
        key: String,
        value: Vec<u8>,
        life: Duration,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        check_key(bucket, &key)?;
        check_value(&value)?;
        if !(Duration::from_millis(1)..=MAX_LIFE).contains(&life) {
            return Err(StoreError::Life);
        }
        let change = Change::SetFor { key, value, life };
        self.write(bucket, change, deadline).map(drop)
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

    fn put(&self, bucket: &str, pairs: Pairs, deadline: Instant) -> Result<(), StoreError> {
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
        self.settle(self.store.engine.write(&op, deadline), deadline)
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
