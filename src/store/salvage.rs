//! Reading a store of which nothing may change, damaged or not: for backups
//! and for checks.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::{Bound, RangeBounds},
    path::Path,
    sync::Mutex,
};

use redb::{
    BackendError, Builder, Database, ReadOnlyDatabase, ReadTransaction, ReadableDatabase as _,
    ReadableTable as _, StorageBackend,
};

use super::{
    StoreError,
    embedded::{FORMAT, FORMAT_BEFORE, META, SOME_END, USED, VALUES, Values, contain},
    entry::{EntryKey, Unsealed, counted, named, unseal, value_size},
    file::{self, Files, State},
    journal::{Effect, Journal},
    journaled::{Journaled, Medium, generation},
};
use crate::locks::lock;

/// Looks into damaged ranges, all of them together.
const MAX_PROBES: u32 = 50_000;
/// Halvings of a damaged range in which nothing more was read.
const MAX_BARREN: u32 = 7;
/// Characters of a place.
const MAX_ENTRY_KEY: usize = 2048;

/// A store that is only read. What redb writes as it opens and checks a file
/// stays in memory.
pub struct Reader {
    transaction: ReadTransaction,
    /// Why redb's checksums do not hold, where they were verified.
    structure: Option<String>,
    /// What was written after what redb's file has.
    journal: Replayed,
    /// Why that is not all.
    journal_error: Option<StoreError>,
    /// Keeps the file open; none of one that a server has open.
    _database: Option<Opened>,
}

enum Opened {
    Whole(Database),
    Damaged(ReadOnlyDatabase),
}

/// What reading everything found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Entries that were read.
    pub entries: u64,
    /// Places that were named as damaged.
    pub damaged: u64,
}

/// What reading everything meets.
pub(super) enum Met<'a> {
    Entry(EntryKey<'a>, Unsealed<'a>),
    /// What is lost, and where.
    Lost(String),
}

impl Reader {
    /// Opens a file; with `verify`, redb reads all of it and verifies its
    /// checksums.
    ///
    /// # Errors
    /// There is none, it is empty, another process has it open, it is of
    /// another format, or so damaged that nothing in it is found.
    pub fn open(path: &Path, cache: usize, verify: bool) -> Result<Self, StoreError> {
        match file::state(path)? {
            State::Absent => {
                return Err(io::Error::from(io::ErrorKind::NotFound).into());
            }
            State::Empty(size) => return Err(StoreError::Empty { size }),
            State::Present => {}
        }
        Self::with(&Files::of(path), cache, verify)
    }

    /// Reads what is open, as it is now.
    pub(super) fn of(database: &Journaled) -> Result<Self, StoreError> {
        Ok(Self {
            transaction: database.begin_read()?,
            structure: None,
            // redb has what is in the journal, only not on the disk.
            journal: Replayed::default(),
            journal_error: None,
            _database: None,
        })
    }

    pub(super) fn with(
        medium: &dyn Medium,
        cache: usize,
        verify: bool,
    ) -> Result<Self, StoreError> {
        let builder = || {
            let mut builder = Builder::new();
            builder.set_cache_size(cache);
            builder
        };
        let whole =
            || contain(|| Ok(builder().create_with_backend(Overlay::new(medium.file()?, false))?));
        let structure = verify.then(|| {
            let mut database = whole()?;
            contain(|| Ok(database.check_integrity()?))
        });
        let structure = match structure {
            None | Some(Ok(true)) => None,
            Some(Ok(false)) => Some("redb would repair it at the next start".into()),
            Some(Err(StoreError::Broken(error))) => Some(error),
            Some(Err(error)) => return Err(error),
        };
        let database = match whole() {
            Ok(database) => Opened::Whole(database),
            // It was not closed in order, so redb wants it whole. As long as
            // nothing is written, what can be read of it is read.
            Err(StoreError::Broken(_)) => {
                let closed = Overlay::new(medium.file()?, true);
                Opened::Damaged(contain(|| {
                    Ok(builder().open_read_only_with_backend(closed)?)
                })?)
            }
            Err(error) => return Err(error),
        };
        let transaction = contain(|| {
            Ok(match &database {
                Opened::Whole(database) => database.begin_read()?,
                Opened::Damaged(database) => database.begin_read()?,
            })
        })?;
        let format = contain(|| {
            let meta = transaction.open_table(META)?;
            Ok(meta.get("format")?.map(|format| format.value()))
        });
        match format {
            Ok(Some(found)) if ![FORMAT_BEFORE, FORMAT].contains(&found) => {
                return Err(StoreError::Format {
                    found,
                    known: FORMAT,
                });
            }
            // Damaged there, it may be whole elsewhere.
            Ok(_) | Err(StoreError::Broken(_)) => {}
            Err(error) => return Err(error),
        }
        let mut journal = Replayed::default();
        let replayed = contain(|| journal.read(medium, &transaction));
        Ok(Self {
            transaction,
            structure,
            journal,
            journal_error: replayed.err(),
            _database: Some(database),
        })
    }

    /// Reads everything and names what is damaged.
    #[must_use]
    pub fn check(&self, lost: &mut dyn FnMut(&str)) -> Checked {
        let walked = self.walk(&mut |met| {
            if let Met::Lost(what) = met {
                lost(&what);
            }
            Ok(())
        });
        // What is met goes nowhere, so nothing refuses it.
        walked.unwrap_or(Checked {
            entries: 0,
            damaged: 1,
        })
    }

    /// Hands over everything that can be read, each entry once, and names what
    /// can't. In order, but around damage.
    ///
    /// # Errors
    /// `each` fails.
    pub(super) fn walk(
        &self,
        each: &mut dyn FnMut(Met<'_>) -> io::Result<()>,
    ) -> io::Result<Checked> {
        let mut walk = Walk {
            each,
            entries: 0,
            damaged: 0,
            sums: BTreeMap::new(),
        };
        if let Some(error) = &self.structure {
            walk.lose(format!("the checksums of the file do not hold: {error}"))?;
        }
        if let Some(error) = &self.journal_error {
            walk.lose(format!("some of what was written last: {error}"))?;
        }
        let mut written = self.journal.values.iter().peekable();
        let gaps = match contain(|| Ok(self.transaction.open_table(VALUES)?)) {
            Err(error) => {
                walk.lose(format!("all values: {error}"))?;
                true
            }
            Ok(values) => {
                let gaps = read_around(&values, &mut |entry_key, stored| {
                    let place = joined(entry_key);
                    while let Some((place, stored)) = written.next_if(|(next, _)| **next < place) {
                        walk.journaled(place, stored.as_deref())?;
                    }
                    if self.journal.values.contains_key(&place) {
                        return Ok(());
                    }
                    walk.entry(entry_key, stored)
                })?;
                for (after, before, error) in &gaps {
                    walk.lose(format!(
                        "what is after {after} and before {before}: {error}"
                    ))?;
                }
                !gaps.is_empty()
            }
        };
        for (place, stored) in written {
            walk.journaled(place, stored.as_deref())?;
        }
        let recorded = contain(|| {
            let mut recorded = BTreeMap::new();
            for entry in self.transaction.open_table(USED)?.iter()? {
                let (service, used) = entry?;
                recorded.insert(service.value().to_owned(), used.value());
            }
            recorded.extend(self.journal.used.clone());
            Ok(recorded)
        });
        match recorded {
            Err(error) => walk.lose(format!("what each service has used: {error}"))?,
            // Where something is known to be missing, no more is known by this.
            Ok(_) if gaps || self.journal_error.is_some() => {}
            Ok(recorded) => {
                let sums = std::mem::take(&mut walk.sums);
                let names: std::collections::BTreeSet<_> =
                    sums.keys().chain(recorded.keys()).collect();
                for name in names {
                    let of = |counts: &BTreeMap<String, u64>| counts.get(name).copied();
                    let (read, recorded) = (of(&sums).unwrap_or(0), of(&recorded).unwrap_or(0));
                    if read != recorded {
                        walk.lose(format!(
                            "of service {name:?}, {read} bytes were read and {recorded} are recorded"
                        ))?;
                    }
                }
            }
        }
        Ok(Checked {
            entries: walk.entries,
            damaged: walk.damaged,
        })
    }
}

/// What the records of a journal come to.
#[derive(Default)]
struct Replayed {
    /// By place; none was removed.
    values: BTreeMap<String, Option<Vec<u8>>>,
    used: BTreeMap<String, u64>,
}

impl Replayed {
    fn read(
        &mut self,
        medium: &dyn Medium,
        transaction: &ReadTransaction,
    ) -> Result<(), StoreError> {
        let Some(generation) = generation(transaction)? else {
            return Ok(());
        };
        Journal::open(medium.journal()?, generation)?.replay(&mut |effect| {
            match effect {
                Effect::Put(entry_key, stored) => {
                    self.values.insert(joined(entry_key), Some(stored.into()));
                }
                Effect::Remove(entry_key) => drop(self.values.insert(joined(entry_key), None)),
                Effect::Used(service, used) => drop(self.used.insert(service.into(), used)),
            }
            Ok(())
        })
    }
}

/// What is counted while everything is handed over.
struct Walk<'a> {
    each: &'a mut dyn FnMut(Met<'_>) -> io::Result<()>,
    entries: u64,
    damaged: u64,
    /// What the entries of each service count.
    sums: BTreeMap<String, u64>,
}

impl Walk<'_> {
    fn lose(&mut self, what: String) -> io::Result<()> {
        self.damaged += 1;
        (self.each)(Met::Lost(what))
    }

    fn entry(&mut self, entry_key: EntryKey<'_>, stored: &[u8]) -> io::Result<()> {
        if entry_key == SOME_END {
            return Ok(());
        }
        let (service, ..) = entry_key;
        // A service's name as long as a damaged page says.
        *self.sums.entry(service.into()).or_default() += counted(entry_key, value_size(stored));
        if let Ok(unsealed) = unseal(entry_key, stored) {
            self.entries += 1;
            (self.each)(Met::Entry(entry_key, unsealed))
        } else {
            self.lose(format!("the value of {}", named(entry_key)))
        }
    }

    fn journaled(&mut self, place: &str, stored: Option<&[u8]>) -> io::Result<()> {
        stored.map_or(Ok(()), |stored| self.entry(parts(place), stored))
    }
}

/// A range in which reading met damage: after which place, before which, and
/// what it was.
type Lost = (String, String, StoreError);

struct Gap {
    from: Bound<String>,
    to: Bound<String>,
    barren: u32,
}

/// Reads all entries, forwards up to a damaged page and backwards down to it;
/// where there are several, what is between them by halving.
fn read_around(
    values: &Values,
    each: &mut dyn FnMut(EntryKey<'_>, &[u8]) -> io::Result<()>,
) -> io::Result<Vec<Lost>> {
    let mut queue = VecDeque::from([Gap {
        from: Bound::Unbounded,
        to: Bound::Unbounded,
        barren: 0,
    }]);
    let (mut lost, mut probes) = (Vec::new(), 0);
    while let Some(Gap { from, to, barren }) = queue.pop_front() {
        probes += 1;
        let (low, forwards) = stretch(values, &from, &to, false, each);
        let Err(stop) = forwards else { continue };
        let error = stop.damage()?;
        let advanced = low.is_some();
        let from = low.map_or(from, Bound::Excluded);
        let (high, backwards) = stretch(values, &from, &to, true, each);
        let Err(stop) = backwards else { continue };
        stop.damage()?;
        let barren = if advanced || high.is_some() {
            0
        } else {
            barren + 1
        };
        let to = high.map_or(to, Bound::Excluded);
        let middle = (probes < MAX_PROBES && barren < MAX_BARREN)
            .then(|| between(text(&from), text(&to)))
            .flatten();
        match middle {
            Some(middle) => {
                queue.push_back(Gap {
                    from,
                    to: Bound::Excluded(middle.clone()),
                    barren,
                });
                queue.push_back(Gap {
                    from: Bound::Included(middle),
                    to,
                    barren,
                });
            }
            None => lost.push((from, to, error)),
        }
    }
    Ok(merged(lost))
}

/// Halves of one range that both failed are one again.
fn merged(mut gaps: Vec<(Bound<String>, Bound<String>, StoreError)>) -> Vec<Lost> {
    gaps.sort_by(|a, b| text(&a.0).cmp(&text(&b.0)));
    let mut merged: Vec<(Bound<String>, Bound<String>, StoreError)> = Vec::new();
    for (from, to, error) in gaps {
        match merged.last_mut() {
            Some((_, end, _)) if matches!((&*end, &from), (Bound::Excluded(a), Bound::Included(b)) if a == b) =>
            {
                *end = to;
            }
            _ => merged.push((from, to, error)),
        }
    }
    let shown = |bound: &Bound<String>, unbounded: &str| {
        text(bound).map_or(unbounded.into(), |entry_key| named(parts(entry_key)))
    };
    merged
        .into_iter()
        .map(|(from, to, error)| (shown(&from, "the beginning"), shown(&to, "the end"), error))
        .collect()
}

fn text(bound: &Bound<String>) -> Option<&str> {
    match bound {
        Bound::Included(entry_key) | Bound::Excluded(entry_key) => Some(entry_key),
        Bound::Unbounded => None,
    }
}

enum Stop {
    Damage(StoreError),
    Output(io::Error),
}

impl Stop {
    fn damage(self) -> io::Result<StoreError> {
        match self {
            Self::Damage(error) => Ok(error),
            Self::Output(error) => Err(error),
        }
    }
}

/// Reads a range until its end or until something is damaged; says how far.
fn stretch(
    values: &Values,
    from: &Bound<String>,
    to: &Bound<String>,
    backwards: bool,
    each: &mut dyn FnMut(EntryKey<'_>, &[u8]) -> io::Result<()>,
) -> (Option<String>, Result<(), Stop>) {
    let mut last: Option<String> = None;
    let read = contain(|| {
        let range: (Bound<EntryKey<'_>>, Bound<EntryKey<'_>>) = (
            from.as_ref().map(|entry_key| parts(entry_key)),
            to.as_ref().map(|entry_key| parts(entry_key)),
        );
        let mut range = values.range(range)?;
        loop {
            let entry = if backwards {
                range.next_back()
            } else {
                range.next()
            };
            let Some(entry) = entry else {
                return Ok(Ok(()));
            };
            let (key, stored) = entry?;
            let entry_key = joined(key.value());
            let within = last.as_ref().is_none_or(|last| {
                if backwards {
                    entry_key < *last
                } else {
                    entry_key > *last
                }
            }) && in_range(&entry_key, from, to);
            if !within {
                return Err(StoreError::Broken("keys are out of order".into()));
            }
            let handed = each(key.value(), stored.value());
            if let Err(error) = handed {
                return Ok(Err(error));
            }
            last = Some(entry_key);
        }
    });
    let result = match read {
        Ok(handed) => handed.map_err(Stop::Output),
        Err(error) => Err(Stop::Damage(error)),
    };
    (last, result)
}

fn in_range(entry_key: &str, from: &Bound<String>, to: &Bound<String>) -> bool {
    RangeBounds::<str>::contains(
        &(
            from.as_ref().map(String::as_str),
            to.as_ref().map(String::as_str),
        ),
        entry_key,
    )
}

/// A place as one text. Names hold no NUL, so texts are in the order of places.
fn joined((service, bucket, key): EntryKey<'_>) -> String {
    [service, bucket, key].join("\0")
}

fn parts(entry_key: &str) -> EntryKey<'_> {
    let mut parts = entry_key.splitn(3, '\0');
    let mut next = || parts.next().unwrap_or_default();
    (next(), next(), next())
}

/// A text about in the middle of two, if there is one: character by character,
/// because what is stored are texts.
fn between(low: Option<&str>, high: Option<&str>) -> Option<String> {
    let mut low = low.unwrap_or_default().chars();
    let mut high = high.map(str::chars);
    let mut middle = String::new();
    for _ in 0..MAX_ENTRY_KEY {
        let a = low.next().map_or(0, u32::from);
        let b = match &mut high {
            Some(high) => u32::from(high.next()?),
            // Most texts are ASCII.
            None if a < 0x7f => 0x80,
            None => u32::from(char::MAX) + 1,
        };
        match b.checked_sub(a)? {
            0 => {}
            // Whatever follows, it is below.
            1 => high = None,
            gap => {
                middle.push(char::from_u32(a + gap / 2).unwrap_or('\u{e000}'));
                return Some(middle);
            }
        }
        middle.push(char::from_u32(a)?);
    }
    None
}

/// A block of what was written over the file, in bytes.
const BLOCK: usize = 4096;
/// Blocks that are written at most; a check writes a few.
const MAX_BLOCKS: usize = 16 * 1024;
/// Where a file of redb says that it was not closed in order, and how.
const FLAGS: u64 = 9;
const NOT_CLOSED: u8 = 2;

/// A file as redb would change it, changed in memory only.
#[derive(Debug)]
struct Overlay {
    file: Box<dyn StorageBackend>,
    /// The file is shown as one that was closed in order.
    closed: bool,
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    /// None as long as it is that of the file.
    len: Option<u64>,
    /// From here on, the file's own bytes do not count.
    cut_at: Option<u64>,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Overlay {
    fn new(file: Box<dyn StorageBackend>, closed: bool) -> Self {
        Self {
            file,
            closed,
            written: Mutex::default(),
        }
    }

    fn read_through(&self, written: &Written, offset: u64, out: &mut [u8]) -> io::Result<()> {
        out.fill(0);
        let end = self.file.len()?.min(written.cut_at.unwrap_or(u64::MAX));
        let own = usize::try_from(end.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(out.len());
        if own > 0 {
            self.file.read(offset, &mut out[..own])?;
        }
        if self.closed
            && let Some(flags) = FLAGS
                .checked_sub(offset)
                .and_then(|at| out.get_mut(usize::try_from(at).ok()?))
        {
            *flags &= !NOT_CLOSED;
        }
        let first = offset / BLOCK as u64;
        let last = (offset + out.len() as u64).div_ceil(BLOCK as u64);
        for (number, block) in written.blocks.range(first..last) {
            let start = number * BLOCK as u64;
            for (at, byte) in (start..).zip(block) {
                if let Some(at) = at.checked_sub(offset)
                    && let Some(out) = out.get_mut(usize::try_from(at).unwrap_or(usize::MAX))
                {
                    *out = *byte;
                }
            }
        }
        Ok(())
    }
}

impl StorageBackend for Overlay {
    fn len(&self) -> Result<u64, io::Error> {
        lock(&self.written).len.map_or_else(|| self.file.len(), Ok)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        if offset + out.len() as u64 > self.len()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read_through(&lock(&self.written), offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        let mut written = lock(&self.written);
        let kept = len / BLOCK as u64;
        written.cut_at = Some(written.cut_at.unwrap_or(u64::MAX).min(len));
        written.blocks.split_off(&(kept + 1));
        if let Some(block) = written.blocks.get_mut(&kept) {
            let rest = usize::try_from(len % BLOCK as u64).unwrap_or(0);
            block[rest..].fill(0);
        }
        written.len = Some(len);
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let mut written = lock(&self.written);
        let mut rest = data;
        let mut offset = offset;
        while !rest.is_empty() {
            let (number, at) = (offset / BLOCK as u64, offset % BLOCK as u64);
            let at = usize::try_from(at).unwrap_or(0);
            let (part, others) = rest.split_at(rest.len().min(BLOCK - at));
            let mut block = match written.blocks.remove(&number) {
                Some(block) => block,
                None if written.blocks.len() < MAX_BLOCKS => {
                    let mut block = vec![0; BLOCK];
                    self.read_through(&written, number * BLOCK as u64, &mut block)?;
                    block
                }
                None => return Err(io::Error::other("looking at it would change too much")),
            };
            block[at..at + part.len()].copy_from_slice(part);
            written.blocks.insert(number, block);
            rest = others;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn close(&self) -> Result<(), io::Error> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_middle_is_between() {
        for (low, high) in [
            ("a", "b"),
            ("a\0b\0k1", "a\0b\0k2"),
            ("a\0b\0k1", "a\0b\0k1x"),
            ("", "é"),
            ("\u{d7ff}", "\u{e001}"),
            ("a\0\0z", "b"),
            ("\u{10ffff}", "\u{10ffff}a"),
        ] {
            let middle = between(Some(low), Some(high)).unwrap();
            assert!(
                low < &*middle && &*middle < high,
                "{low:?} {middle:?} {high:?}"
            );
            assert!(between(Some(low), None).unwrap().as_str() > low);
        }
        assert_eq!(parts(&joined(("s", "b", "k\0y"))), ("s", "b", "k\0y"));
    }

    #[test]
    fn an_overlay_changes_nothing_below() {
        let below = redb::backends::InMemoryBackend::new();
        below.set_len(10_000).unwrap();
        below.write(0, &[7; 10_000]).unwrap();
        let over = Overlay::new(Box::new(below), false);
        let read = |offset, length| {
            let mut out = vec![0; length];
            over.read(offset, &mut out).map(|()| out)
        };
        over.write(4090, &[1; 10]).unwrap();
        assert_eq!(
            read(4088, 14).unwrap(),
            [7, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 7, 7]
        );
        over.set_len(4095).unwrap();
        over.set_len(12_000).unwrap();
        assert_eq!(read(4093, 5).unwrap(), [1, 1, 0, 0, 0]);
        assert_eq!(read(9999, 2).unwrap(), [0, 0]);
        assert!(read(11_999, 2).is_err());
        let mut own = [0; 3];
        over.file.read(4093, &mut own).unwrap();
        assert_eq!((own, over.file.len().unwrap()), ([7; 3], 10_000));
    }
}
