//! Backup: the whole store as lines of JSON, and back.

use std::io::{self, BufRead, Read as _, Write};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use redb::{ReadableTable as _, ReadableTableMetadata as _};
use serde::{Deserialize, Serialize};

use super::{
    Checked, MAX_KEY, MAX_VALUE, Reader, StoreError,
    embedded::{Embedded, SOME_END, USED, VALUES},
    entry::{EntryKey, Unsealed, counted, seal, tail_size, value_size},
    salvage::Met,
};

/// What stands in the first line.
const KIND: &str = "mb-server store";

/// Version of the lines, which do not depend on that of the file.
const BACKUP_FORMAT: u64 = 1;

/// Longest line: a value in base64, a key that is all escapes, and words.
const MAX_LINE: u64 = (MAX_VALUE / 3 * 4 + 6 * MAX_KEY + 1024) as u64;

/// One line of a backup.
#[derive(Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub(super) enum Line {
    First {
        kind: String,
        format: u64,
    },
    Entry {
        service: String,
        bucket: String,
        key: String,
        value: String,
        /// Milliseconds since 1970.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ends: Option<u64>,
    },
    Last {
        entries: u64,
        /// Places that could not be read, and are not in it.
        #[serde(default, skip_serializing_if = "is_zero")]
        damaged: u64,
    },
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Reader {
    /// Writes everything that can be read, as it is at one time, and names what
    /// can't.
    ///
    /// # Errors
    /// What is written to fails.
    pub fn export(&self, out: &mut dyn Write, lost: &mut dyn FnMut(&str)) -> io::Result<Checked> {
        line(out, &first_line())?;
        let checked = self.walk(&mut |met| match met {
            Met::Entry(entry_key, Unsealed { value, end }) => {
                line(out, &entry_line(entry_key, value, end))
            }
            Met::Lost(what) => {
                lost(&what);
                Ok(())
            }
        })?;
        let Checked { entries, damaged } = checked;
        line(out, &Line::Last { entries, damaged })?;
        out.flush()?;
        Ok(checked)
    }
}

impl Embedded {
    /// See [`Store::import`](super::Store::import).
    pub(super) fn read_backup(
        &self,
        input: &mut dyn BufRead,
        merge: bool,
    ) -> Result<u64, StoreError> {
        self.work(|database| {
            let transaction = database.begin_write()?;
            let entries = {
                let mut values = transaction.open_table(VALUES)?;
                let mut used = transaction.open_table(USED)?;
                let marks = u64::from(values.get(SOME_END)?.is_some());
                if !merge && values.len()? > marks {
                    return Err(not_empty());
                }
                read_entries(input, |entry_key, value, ends| {
                    let old = values
                        .insert(entry_key, &*seal(entry_key, &value, ends))?
                        .map(|old| counted(entry_key, value_size(old.value())));
                    let service = entry_key.0;
                    let before = used.get(service)?.map_or(0, |used| used.value());
                    let sum = (before + counted(entry_key, value.len() + tail_size(ends)))
                        .saturating_sub(old.unwrap_or(0));
                    used.insert(service, sum)?;
                    if ends.is_some() && values.get(SOME_END)?.is_none() {
                        values.insert(SOME_END, &*seal(SOME_END, b"", None))?;
                    }
                    Ok(())
                })?
            };
            database.flush(transaction)?;
            Ok(entries)
        })
    }
}

pub(super) fn not_empty() -> StoreError {
    refuse("the store is not empty; --merge lets the backup's values win")
}

/// What says that this is a backup.
pub(super) fn first_line() -> Line {
    Line::First {
        kind: KIND.into(),
        format: BACKUP_FORMAT,
    }
}

pub(super) fn entry_line(
    (service, bucket, key): EntryKey<'_>,
    value: &[u8],
    ends: Option<u64>,
) -> Line {
    Line::Entry {
        service: service.into(),
        bucket: bucket.into(),
        key: key.into(),
        value: BASE64_STANDARD.encode(value),
        ends,
    }
}

/// Reads a backup to its last line, and says how many entries it has.
pub(super) fn read_entries(
    input: &mut dyn BufRead,
    mut each: impl FnMut(EntryKey<'_>, Vec<u8>, Option<u64>) -> Result<(), StoreError>,
) -> Result<u64, StoreError> {
    read_first(input)?;
    let mut read = 0;
    loop {
        let number = read + 2;
        match read_line(input, number)? {
            Line::Entry {
                service,
                bucket,
                key,
                value,
                ends,
            } => {
                let value = BASE64_STANDARD
                    .decode(value)
                    .map_err(|error| refuse(format!("line {number}: {error}")))?;
                each((&service, &bucket, &key), value, ends)?;
                read += 1;
            }
            Line::Last { entries, .. } if entries == read => return Ok(read),
            Line::First { .. } => {
                return Err(refuse(format!("line {number} begins another backup")));
            }
            Line::Last { .. } => {
                return Err(refuse("the last line does not fit the number of entries"));
            }
        }
    }
}

fn read_first(input: &mut dyn BufRead) -> Result<(), StoreError> {
    Err(refuse(match read_line(input, 1)? {
        Line::First {
            kind,
            format: BACKUP_FORMAT,
        } if kind == KIND => return Ok(()),
        Line::First { format, .. } => {
            format!("it has format {format}, this program knows {BACKUP_FORMAT}")
        }
        _ => "line 1 does not say that this is a backup".into(),
    }))
}

pub(super) fn line(out: &mut dyn Write, line: &Line) -> io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    out.write_all(text.as_bytes())
}

fn read_line(input: &mut dyn BufRead, number: u64) -> Result<Line, StoreError> {
    let mut text = String::new();
    let read = input.take(MAX_LINE + 1).read_line(&mut text);
    read.map_err(|error| refuse(format!("line {number}: {error}")))?;
    if text.is_empty() {
        let problem = format!("it ends before line {number}, so it was cut off");
        return Err(refuse(problem));
    }
    serde_json::from_str(&text).map_err(|_| refuse(format!("line {number} is not one of a backup")))
}

fn refuse(problem: impl Into<String>) -> StoreError {
    StoreError::Import(problem.into())
}
