//! Why the store did not do what it was asked, grouped by whose fault it is.

use std::io;

use super::{MAX_BUCKET, MAX_KEY, MAX_VALUE};

/// Why the store did not do what it was asked. Nothing was written, but for
/// `Io`, `Full` and `Unconfirmed`, where it can't be known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// An empty or too long key.
    #[error("key of {size} bytes is not within 1 to {MAX_KEY}")]
    Key {
        /// Its bytes.
        size: usize,
    },
    /// A value over the limit.
    #[error("value of {size} bytes exceeds the limit of {MAX_VALUE}")]
    Value {
        /// Its bytes.
        size: usize,
    },
    /// A bucket's name breaks its grammar.
    #[error(
        "a bucket is named with at most {MAX_BUCKET} letters, digits, dots, dashes and underscores"
    )]
    Bucket,
    /// A time to live out of its range.
    #[error("a time to live is 1 ms to ten years")]
    Life,
    /// Too many keys or bytes at once.
    #[error("batch of {size} {unit} exceeds the limit of {limit}")]
    Batch {
        /// How many.
        size: usize,
        /// How many there may be.
        limit: usize,
        /// Of what.
        unit: &'static str,
    },
    /// The service's quota does not allow it.
    #[error("{wanted} bytes of keys, names and values would exceed the quota of {limit}")]
    Quota {
        /// What there would be, in bytes.
        wanted: u64,
        /// What there may be, in bytes.
        limit: u64,
    },
    /// The value is no number, or the sum would be none.
    #[error("the value is not a decimal number, or the sum is too large for one")]
    NotANumber,
    /// No turn to write before the deadline.
    #[error("the write did not begin before the deadline; nothing was written")]
    Busy,
    /// The disk is full.
    #[error("the disk is full")]
    Full,
    /// Another process has the file open.
    #[error("another process has the store open, a running server most likely; stop it first")]
    Locked,
    /// The file is of another version of this program.
    #[error(
        "format {found} is not {known}, which this program knows; export with the version that wrote it, and import here"
    )]
    Format {
        /// What the file says.
        found: u64,
        /// What this program knows.
        known: u64,
    },
    /// The file holds no store: a creation was cut off, or it was truncated.
    #[error(
        "the store is empty ({size} bytes), as a full disk or a truncation leaves it; if it held values, restore a backup with \
        mb-server store import"
    )]
    Empty {
        /// Its bytes.
        size: u64,
    },
    /// What is stored under a key is not what was written.
    #[error(
        "the value of {0} is damaged on the disk; write it again, or see mb-server store check"
    )]
    Damaged(String),
    /// The structure of the file is damaged.
    #[error("the file of the store is damaged; see mb-server store check: {0}")]
    Broken(String),
    /// What is imported is not what was exported.
    #[error("can't be imported, nothing was written: {0}")]
    Import(String),
    /// A part of what is imported was written.
    #[error("{entries} entries were imported, then no more, --merge imports them again: {why}")]
    ImportedPart {
        /// Entries that were.
        entries: u64,
        /// Why no more.
        why: String,
    },
    /// Reading or writing failed.
    #[error("the store failed: {0}")]
    Io(String),
    /// The engine can't be reached, or has no data at present. Nothing was done.
    #[error("the store is away, nothing was written: {0}")]
    Away(String),
    /// The engine did not answer, so it is not known whether it did it.
    #[error("the store did not answer, a write may have been done: {0}")]
    Unconfirmed(String),
    /// The engine refused. Nothing was done.
    #[error("the store refused, nothing was written: {0}")]
    Refused(String),
}

impl StoreError {
    /// Whether redb goes on only once the file is opened again.
    pub(super) fn needs_reopening(&self) -> bool {
        matches!(self, Self::Full | Self::Io(_))
    }
}

impl StoreError {
    /// The text for a service, without what machines of the engine said.
    pub(crate) fn for_service(&self) -> String {
        let why = match self {
            Self::Away(why) | Self::Unconfirmed(why) | Self::Refused(why) => why,
            other => return other.to_string(),
        };
        let text = self.to_string();
        text.strip_suffix(&format!(": {why}"))
            .map_or(text.clone(), str::to_owned)
    }
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::Full,
            _ => Self::Io(error.to_string()),
        }
    }
}

impl From<redb::Error> for StoreError {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::DatabaseAlreadyOpen => Self::Locked,
            redb::Error::Io(error) => error.into(),
            redb::Error::Corrupted(error) => Self::Broken(error),
            other => Self::Io(other.to_string()),
        }
    }
}

macro_rules! through_redb {
    ($($error:ident),*) => {
        $(impl From<redb::$error> for StoreError {
            fn from(error: redb::$error) -> Self {
                redb::Error::from(error).into()
            }
        })*
    };
}

through_redb!(
    StorageError,
    TableError,
    TransactionError,
    CommitError,
    DatabaseError,
    SetDurabilityError,
    CompactionError
);
