//! What holds the values, whatever it is: one trait, so that services find the
//! same behind it.

use std::{
    io::{self, BufRead, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Checked, Digest, Health, KeyPage, Size, StoreError, Unflushed, entry::EntryKey};

/// What was read or done, and until when it is not on the disk, if it is not.
pub(super) type EngineResult<T> = Result<(T, Option<Unflushed>), StoreError>;

/// What holds the values of all services. Its caller has checked all bounds of
/// names, keys, values and batches. Every function ends at the deadline, with
/// an error that says whether the write may have been done.
pub(super) trait Engine: Send + Sync {
    fn get(&self, entry_key: EntryKey<'_>, deadline: Instant) -> EngineResult<Option<Vec<u8>>>;

    fn exists(&self, entry_key: EntryKey<'_>, deadline: Instant) -> EngineResult<bool>;

    /// The values of several keys, as they are on the disk at one time, of at
    /// most `MAX_BATCH_BYTES` together.
    fn get_many(
        &self,
        place: (&str, &str),
        keys: &[String],
        deadline: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, StoreError>;

    /// At most `MAX_PAGE` keys that a bucket has on the disk and that begin so,
    /// in the order of their bytes, from one on that is not below the prefix.
    fn list(
        &self,
        place: (&str, &str),
        prefix: &str,
        from: &str,
        deadline: Instant,
    ) -> Result<KeyPage, StoreError>;

    /// Does a write whole or not at all.
    fn write(&self, op: &Op, deadline: Instant) -> EngineResult<Done>;

    /// Whether who asks it has to wait, for more than the disk.
    fn waits(&self) -> bool {
        false
    }

    /// What a further write should wait for first, so that what is not on the
    /// disk is bounded.
    fn backlog(&self) -> Option<Unflushed> {
        None
    }

    /// What of a bucket is not on the disk yet.
    fn unflushed(&self, _place: (&str, &str)) -> Option<Unflushed> {
        None
    }

    /// There is such a service.
    fn serves(&self, _service: &Arc<str>) {}

    /// What is done every few seconds.
    fn tend(&self) {}

    fn health(&self) -> &Health;

    /// Does not wait.
    fn size(&self) -> Result<Size, StoreError>;

    fn compact(&self) -> Result<(), StoreError>;

    /// Writes a backup, and names what can't be read.
    fn export(&self, out: &mut dyn Write, lost: &mut dyn FnMut(&str)) -> io::Result<Checked>;

    /// Puts its files in order before the process ends.
    fn end(&self) {}

    fn import(&self, input: &mut dyn BufRead, merge: bool) -> Result<u64, StoreError>;
}

/// Keys and their new values; none removes.
pub(super) type Pairs = Vec<(String, Option<Vec<u8>>)>;

/// One write of one service.
pub(super) struct Op {
    pub(super) service: Arc<str>,
    pub(super) quota: u64,
    pub(super) bucket: Box<str>,
    pub(super) change: Change,
}

pub(super) enum Change {
    Put(Pairs),
    /// A value that ends after so long.
    SetFor {
        key: String,
        value: Vec<u8>,
        life: Duration,
    },
    /// Removes those of the keys whose values have ended.
    End(Vec<String>),
    /// Leaves the end of the value as it is; so does `Swap`.
    Increment {
        key: String,
        delta: i64,
    },
    Swap {
        key: String,
        expected: Option<Digest>,
        value: Vec<u8>,
    },
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    Written,
    Number(i64),
    Swapped(bool),
}
