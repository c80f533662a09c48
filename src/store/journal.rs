//! The journal: what was written since redb's last flush, in a file beside its
//! own, because one flush of one block makes that durable. STORE.md has the
//! format, and why a record that a crash cut off is never taken for a whole one.

use std::io;

use redb::StorageBackend;
use sha2::{Digest as _, Sha256};

use super::{StoreError, entry::EntryKey};

/// What is flushed together: a block with an acknowledged record is never
/// written again, so that a power cut in the middle of a block costs none.
const BLOCK: usize = 4096;
/// The whole file, in bytes. A larger one saves little: a full one costs two
/// flushes of redb.
const SIZE: usize = 8 * 1024 * 1024;
/// Begins the first block; the file's id follows.
const MAGIC: [u8; 16] = *b"mb-store-journal";
const ID: usize = 16;
/// Bytes of a record's tag.
const TAG: usize = 16;
/// What begins a record: sequence number, length of the rest, tag.
const HEAD: usize = 8 + 4 + TAG;
/// Longest record, in bytes; larger groups go to redb directly.
pub(super) const MAX_RECORD: usize = 1024 * 1024;
/// Entries until redb is flushed, which has to write a page for each at worst;
/// few in tests, so that they see many flushes.
const MAX_ENTRIES: usize = if cfg!(test) { 8 } else { 8192 };

/// Says which journal goes on where redb was flushed last, and what makes its
/// records recognised. Kept in redb alone, chosen at random for each flush.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Generation {
    id: [u8; ID],
    key: [u8; 32],
    /// Number of the first record.
    first: u64,
}

impl Generation {
    /// Bytes of one.
    const SIZE: usize = ID + 32 + 8;

    fn random(id: Option<[u8; ID]>) -> io::Result<Self> {
        let mut bytes = [0; Self::SIZE];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        if let Some(id) = id {
            bytes[..ID].copy_from_slice(&id);
        }
        Self::parse(&bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk()?;
        let (key, rest) = rest.split_first_chunk()?;
        Some(Self {
            id: *id,
            key: *key,
            // A guest can't guess it, nor where it would wrap.
            first: u64::from_le_bytes(rest.try_into().ok()?),
        })
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        [&self.id[..], &self.key, &self.first.to_le_bytes()].concat()
    }

    /// The key stands first and the length before the text, so that without
    /// the key no other text has a known tag.
    fn tag(&self, number: u64, body: &[u8]) -> [u8; TAG] {
        let mut hash = Sha256::new();
        hash.update(self.key);
        hash.update(number.to_le_bytes());
        hash.update((body.len() as u64).to_le_bytes());
        hash.update(body);
        let mut tag = [0; TAG];
        tag.copy_from_slice(&hash.finalize()[..TAG]);
        tag
    }
}

/// What a write leaves behind. To do it twice is to do it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect<'a> {
    /// An entry has this value, as `entry` seals it.
    Put(EntryKey<'a>, &'a [u8]),
    Remove(EntryKey<'a>),
    /// The entries of a service count so much.
    Used(&'a str, u64),
}

/// The effects of a group of writes, as bytes.
#[derive(Debug)]
pub(super) struct Record {
    /// Room for the head, then effects; empty once they would be too many.
    bytes: Vec<u8>,
    entries: usize,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            bytes: vec![0; HEAD],
            entries: 0,
        }
    }
}

impl Record {
    pub(super) fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Notes one more.
    pub(super) fn push(&mut self, effect: Effect<'_>) {
        self.entries += 1;
        let number;
        let (kind, parts): (u8, &[&[u8]]) = match effect {
            Effect::Put((service, bucket, key), value) => (
                1,
                &[service.as_bytes(), bucket.as_bytes(), key.as_bytes(), value],
            ),
            Effect::Remove((service, bucket, key)) => {
                (2, &[service.as_bytes(), bucket.as_bytes(), key.as_bytes()])
            }
            Effect::Used(service, used) => {
                number = used.to_le_bytes();
                (3, &[service.as_bytes(), &number])
            }
        };
        let size: usize = parts.iter().map(|part| 4 + part.len()).sum();
        if self.bytes.is_empty() || self.bytes.len() + 1 + size > MAX_RECORD {
            self.bytes = Vec::new();
            return;
        }
        self.bytes.push(kind);
        for part in parts {
            // No longer than the record.
            self.bytes.extend((part.len() as u32).to_le_bytes());
            self.bytes.extend_from_slice(part);
        }
    }
}

/// Reads the next effect off the front; none where the bytes are no effect.
fn parse<'a>(bytes: &mut &'a [u8]) -> Option<Effect<'a>> {
    fn part<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (length, rest) = bytes.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        let (part, rest) = rest.split_at_checked(length)?;
        *bytes = rest;
        Some(part)
    }
    fn text<'a>(bytes: &mut &'a [u8]) -> Option<&'a str> {
        std::str::from_utf8(part(bytes)?).ok()
    }
    let (kind, rest) = bytes.split_first()?;
    *bytes = rest;
    Some(match kind {
        1 => Effect::Put((text(bytes)?, text(bytes)?, text(bytes)?), part(bytes)?),
        2 => Effect::Remove((text(bytes)?, text(bytes)?, text(bytes)?)),
        3 => Effect::Used(
            text(bytes)?,
            u64::from_le_bytes(part(bytes)?.try_into().ok()?),
        ),
        _ => return None,
    })
}

/// An open journal.
pub(super) struct Journal {
    file: Box<dyn StorageBackend>,
    generation: Generation,
    /// Where the next record begins, and its number.
    end: usize,
    number: u64,
    /// How many entries the records have.
    entries: usize,
}

impl Journal {
    /// Fills a new file: with zeros, because a write over blocks that are there
    /// needs no flush of the file system's own notes. Returns its id.
    pub(super) fn fill(file: &dyn StorageBackend) -> io::Result<[u8; ID]> {
        let Generation { id, .. } = Generation::random(None)?;
        let mut block = vec![0; 16 * BLOCK];
        for at in (0..SIZE).step_by(block.len()).rev() {
            if at == 0 {
                block[..MAGIC.len()].copy_from_slice(&MAGIC);
                block[MAGIC.len()..][..ID].copy_from_slice(&id);
            }
            file.write(at as u64, &block)?;
        }
        file.sync_data()?;
        Ok(id)
    }

    /// Begins with a file that was just filled.
    pub(super) fn begin(file: Box<dyn StorageBackend>, id: [u8; ID]) -> io::Result<Self> {
        Ok(Self::at(file, Generation::random(Some(id))?))
    }

    /// Opens the one that redb goes on with.
    ///
    /// # Errors
    /// It is another.
    pub(super) fn open(
        file: Option<Box<dyn StorageBackend>>,
        generation: Generation,
    ) -> Result<Self, StoreError> {
        let missing = || {
            StoreError::Broken(
                "the journal beside it, which has the last writes, is missing or another's".into(),
            )
        };
        let file = file.ok_or_else(missing)?;
        let mut head = [0; MAGIC.len() + ID];
        if file.len()? < SIZE as u64 {
            return Err(missing());
        }
        file.read(0, &mut head)?;
        if head[..MAGIC.len()] != MAGIC || head[MAGIC.len()..] != generation.id {
            return Err(missing());
        }
        Ok(Self::at(file, generation))
    }

    fn at(file: Box<dyn StorageBackend>, generation: Generation) -> Self {
        Self {
            file,
            end: BLOCK,
            number: generation.first,
            generation,
            entries: 0,
        }
    }

    /// Hands over what the records say, in order. Reads the whole file at most.
    ///
    /// # Errors
    /// `each` fails; a record is damaged and those after it are not, so that
    /// it is not one that a crash cut off. Those before it were handed over.
    pub(super) fn replay(
        &self,
        each: &mut dyn FnMut(Effect<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let (mut at, mut number, mut body) = (BLOCK, self.generation.first, Vec::new());
        while self.read(at, number, &mut body)? {
            let mut rest = &*body;
            while !rest.is_empty() {
                let effect = parse(&mut rest)
                    .ok_or_else(|| StoreError::Broken("a record of the journal is none".into()))?;
                each(effect)?;
            }
            at += (HEAD + body.len()).next_multiple_of(BLOCK);
            number = number.wrapping_add(1);
        }
        // A record is written when those before it are on the disk.
        for later in (at + BLOCK..SIZE).step_by(BLOCK) {
            let mut found = [0; 8];
            self.file.read(later as u64, &mut found)?;
            let found = u64::from_le_bytes(found);
            let is_ours = (1..(SIZE / BLOCK) as u64).contains(&found.wrapping_sub(number));
            if is_ours && self.read(later, found, &mut body)? {
                return Err(StoreError::Broken(format!(
                    "the journal is damaged at {at}, before acknowledged writes"
                )));
            }
        }
        Ok(())
    }

    /// Reads the record of this number; false where there is none.
    fn read(&self, at: usize, number: u64, body: &mut Vec<u8>) -> io::Result<bool> {
        let mut head = [0; HEAD];
        if at + HEAD > SIZE {
            return Ok(false);
        }
        self.file.read(at as u64, &mut head)?;
        let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        let fits = length <= MAX_RECORD - HEAD && at + HEAD + length <= SIZE;
        if head[..8] != number.to_le_bytes() || !fits {
            return Ok(false);
        }
        body.resize(length, 0);
        self.file.read((at + HEAD) as u64, body)?;
        Ok(head[12..] == self.generation.tag(number, body))
    }

    /// Whether there is room for one more.
    pub(super) fn fits(&self, record: &Record) -> bool {
        !record.bytes.is_empty()
            && self.end + record.bytes.len() <= SIZE
            && self.entries + record.entries <= MAX_ENTRIES
    }

    /// Writes a record that fits, and returns when it is on the disk.
    ///
    /// # Errors
    /// The disk fails. Then it may be there or not, and the journal must not
    /// be written to again.
    pub(super) fn append(&mut self, record: Record) -> io::Result<()> {
        let Record { mut bytes, entries } = record;
        let tag = self.generation.tag(self.number, &bytes[HEAD..]);
        let length = (bytes.len() - HEAD) as u32;
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..HEAD].copy_from_slice(&tag);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        self.file.write(self.end as u64, &bytes)?;
        self.file.sync_data()?;
        self.end += bytes.len();
        self.number = self.number.wrapping_add(1);
        self.entries += entries;
        Ok(())
    }

    /// What redb is to keep with its next flush.
    pub(super) fn next(&self) -> io::Result<Generation> {
        Generation::random(Some(self.generation.id))
    }

    /// Redb was flushed with this: the records so far are forgotten.
    pub(super) fn restart(self, generation: Generation) -> Self {
        Self::at(self.file, generation)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use redb::backends::InMemoryBackend;

    use super::*;

    /// The same bytes however often it is opened.
    #[derive(Debug, Clone)]
    struct Shared(Arc<InMemoryBackend>);

    impl StorageBackend for Shared {
        fn len(&self) -> Result<u64, io::Error> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
            self.0.read(offset, out)
        }

        fn set_len(&self, len: u64) -> Result<(), io::Error> {
            self.0.set_len(len)
        }

        fn sync_data(&self) -> Result<(), io::Error> {
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
            self.0
                .set_len(self.0.len()?.max(offset + data.len() as u64))?;
            self.0.write(offset, data)
        }
    }

    fn empty() -> (Shared, Journal) {
        let file = Shared(Arc::default());
        let id = Journal::fill(&file).unwrap();
        let journal = Journal::begin(Box::new(file.clone()), id).unwrap();
        (file, journal)
    }

    fn record(name: &str, value: &[u8]) -> Record {
        let mut record = Record::default();
        record.push(Effect::Put(("svc", "b", name), value));
        record.push(Effect::Remove(("svc", "", name)));
        record.push(Effect::Used("svc", value.len() as u64));
        record
    }

    /// The names of the records that are found, each of which is whole.
    fn found(file: &Shared, generation: &Generation) -> Result<Vec<String>, StoreError> {
        let journal = Journal::open(Some(Box::new(file.clone())), generation.clone())?;
        let (mut puts, mut removed, mut used) = (Vec::new(), 0, 0);
        journal.replay(&mut |effect| {
            match effect {
                Effect::Put((_, _, key), _) => puts.push(key.to_owned()),
                Effect::Remove(_) => removed += 1,
                Effect::Used(..) => used += 1,
            }
            Ok(())
        })?;
        assert!(removed == puts.len() && used == puts.len());
        Ok(puts)
    }

    fn bytes(file: &Shared, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        file.read(at as u64, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn records_come_back_in_order_and_only_to_their_own_generation() {
        let (file, mut journal) = empty();
        for name in ["a", "b"] {
            let record = record(name, &[7; 5000]);
            assert!(journal.fits(&record));
            journal.append(record).unwrap();
        }
        let before = journal.generation.clone();
        assert_eq!(found(&file, &before).unwrap(), ["a", "b"]);
        let next = journal.next().unwrap();
        let mut journal = journal.restart(next.clone());
        assert!(found(&file, &next).unwrap().is_empty());
        journal.append(record("d", b"")).unwrap();
        assert_eq!(found(&file, &next).unwrap(), ["d"]);
        let other = Generation::random(None).unwrap();
        assert!(matches!(found(&file, &other), Err(StoreError::Broken(_))));
        assert!(Journal::open(None, next).is_err());
    }

    #[test]
    fn a_group_that_does_not_fit_is_refused_and_takes_no_memory() {
        let (_, mut journal) = empty();
        let large = record("large", &vec![0; MAX_RECORD]);
        assert!(!journal.fits(&large) && large.bytes.capacity() == 0 && !large.is_empty());
        let mut written = 0;
        loop {
            let record = record("k", &vec![0; MAX_RECORD - 100]);
            if !journal.fits(&record) {
                break;
            }
            journal.append(record).unwrap();
            journal.entries = 0;
            written += 1;
        }
        assert_eq!(written, SIZE / MAX_RECORD - 1);
        let (_, mut journal) = empty();
        journal.entries = MAX_ENTRIES - 2;
        assert!(!journal.fits(&record("k", b"")));
    }

    #[test]
    fn damage_before_acknowledged_records_is_found_wherever_it_is() {
        let (file, mut journal) = empty();
        for name in ["a", "b", "c"] {
            journal.append(record(name, b"value")).unwrap();
        }
        let length = record("b", b"value").bytes.len();
        for at in 0..length {
            let at = (2 * BLOCK + at) as u64;
            let mut byte = [0];
            file.read(at, &mut byte).unwrap();
            file.write(at, &[byte[0] ^ 0x10]).unwrap();
            let damaged = found(&file, &journal.generation);
            assert!(matches!(damaged, Err(StoreError::Broken(_))), "{at}");
            file.write(at, &byte).unwrap();
        }
        assert_eq!(found(&file, &journal.generation).unwrap().len(), 3);
    }

    /// Cuts the last record off at each of its bytes, over what guests chose
    /// to have there: never less than the others, and it whole or not at all.
    #[test]
    fn a_record_that_is_cut_off_at_any_byte_was_never_there() {
        let (file, mut journal) = empty();
        journal.append(record("a", b"1")).unwrap();
        journal.append(record("b", &[0; BLOCK])).unwrap();
        let (generation, at) = (journal.generation.clone(), journal.end);
        // As long as what it is written over, and with one of its ends.
        let value = [b"guests choose this ".repeat(300), vec![0; 40]].concat();
        journal.append(record("c", &value)).unwrap();
        let whole = bytes(&file, at, journal.end - at);
        let length = record("c", &value).bytes.len();
        // A record of another generation, which a guest might know.
        let mut guessed = Journal::at(
            Box::new(file.clone()),
            Generation {
                key: [0; 32],
                ..generation.clone()
            },
        );
        (guessed.end, guessed.number) = (at, generation.first.wrapping_add(2));
        guessed.append(record("x", &value)).unwrap();
        let hostile = bytes(&file, at, whole.len());
        for old in [
            vec![0; whole.len()],
            hostile,
            value.repeat(2)[..whole.len()].to_vec(),
        ] {
            for cut in 0..=whole.len() {
                let torn = [&whole[..cut], &old[cut..]].concat();
                file.write(at as u64, &torn).unwrap();
                let names = found(&file, &generation).unwrap();
                let is_whole = torn[..length] == whole[..length];
                assert_eq!(names.len(), if is_whole { 3 } else { 2 }, "{cut}");
                assert_eq!(names[..2], ["a", "b"]);
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_effects_or_none(bytes in proptest::collection::vec(0..4_u8, 0..60)) {
            let mut rest = &*bytes;
            while let Some(effect) = parse(&mut rest) {
                let mut again = Record::default();
                again.push(effect);
                let mut again = &again.bytes[HEAD..];
                prop_assert_eq!(parse(&mut again), Some(effect));
            }
        }
    }
}
