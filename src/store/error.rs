//! Why the store did not do what it was asked, grouped by whose fault it is.

use std::{fmt, io};

use super::{MAX_BUCKET, MAX_KEY, MAX_VALUE};

/// Why the store did not do what it was asked. Nothing was written, but for
/// `Io`, `Full` and `Unconfirmed`, where it can't be known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// An empty or too long key.
    Key {
        /// Its bytes.
        size: usize,
    },
    /// A value over the limit.
    Value {
        /// Its bytes.
        size: usize,
    },
    /// A bucket's name breaks its grammar.
    Bucket,
    /// A time to live out of its range.
    Life,
    /// Too many keys or bytes at once.
    Batch {
        /// How many.
        size: usize,
        /// How many there may be.
        limit: usize,
        /// Of what.
        unit: &'static str,
    },
    /// The service's quota does not allow it.
    Quota {
        /// What there would be, in bytes.
        wanted: u64,
        /// What there may be, in bytes.
        limit: u64,
    },
    /// The value is no number, or the sum would be none.
    NotANumber,
    /// No turn to write before the deadline.
    Busy,
    /// The disk is full.
    Full,
    /// Another process has the file open.
    Locked,
    /// The file is of another version of this program.
    Format {
        /// What the file says.
        found: u64,
        /// What this program knows.
        known: u64,
    },
    /// The file holds no store: a creation was cut off, or it was truncated.
    Empty {
        /// Its bytes.
        size: u64,
    },
    /// What is stored under a key is not what was written.
    Damaged(String),
    /// The structure of the file is damaged.
    Broken(String),
    /// What is imported is not what was exported.
    Import(String),
    /// A part of what is imported was written.
    ImportedPart {
        /// Entries that were.
        entries: u64,
        /// Why no more.
        why: String,
    },
    /// Reading or writing failed.
    Io(String),
    /// The engine can't be reached, or has no data at present. Nothing was done.
    Away(String),
    /// The engine did not answer, so it is not known whether it did it.
    Unconfirmed(String),
    /// The engine refused. Nothing was done.
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

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key { size } => write!(f, "key of {size} bytes is not within 1 to {MAX_KEY}"),
            Self::Value { size } => {
                write!(f, "value of {size} bytes exceeds the limit of {MAX_VALUE}")
            }
            Self::Bucket => {
                write!(
                    f,
                    "a bucket is named with at most {MAX_BUCKET} letters, digits, dots, dashes and underscores"
                )
            }
            Self::Life => f.write_str("a time to live is 1 ms to ten years"),
            Self::Batch { size, limit, unit } => {
                write!(f, "batch of {size} {unit} exceeds the limit of {limit}")
            }
            Self::Quota { wanted, limit } => {
                write!(
                    f,
                    "{wanted} bytes of keys, names and values would exceed the quota of {limit}"
                )
            }
            Self::NotANumber => {
                f.write_str("the value is not a decimal number, or the sum is too large for one")
            }
            Self::Busy => {
                f.write_str("the write did not begin before the deadline; nothing was written")
            }
            Self::Full => f.write_str("the disk is full"),
            Self::Locked => f.write_str(
                "another process has the store open, a running server most likely; stop it first",
            ),
            Self::Format { found, known } => {
                write!(
                    f,
                    "format {found} is not {known}, which this program knows; export with the version that wrote it, and import \
                     here"
                )
            }
            Self::Empty { size } => write!(
                f,
                "the store is empty ({size} bytes), as a full disk or a truncation leaves it; if it held values, \
                 restore a backup with mb-server store import"
            ),
            Self::Damaged(entry_key) => write!(
                f,
                "the value of {entry_key} is damaged on the disk; write it again, or see mb-server store check"
            ),
            Self::Broken(error) => write!(
                f,
                "the file of the store is damaged; see mb-server store check: {error}"
            ),
            Self::Import(error) => write!(f, "can't be imported, nothing was written: {error}"),
            Self::ImportedPart { entries, why } => write!(
                f,
                "{entries} entries were imported, then no more, --merge imports them again: {why}"
            ),
            Self::Io(error) => write!(f, "the store failed: {error}"),
            Self::Away(why) => write!(f, "the store is away, nothing was written: {why}"),
            Self::Unconfirmed(why) => {
                write!(
                    f,
                    "the store did not answer, a write may have been done: {why}"
                )
            }
            Self::Refused(why) => write!(f, "the store refused, nothing was written: {why}"),
        }
    }
}

impl std::error::Error for StoreError {}

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
