//! redb behind its journal. A group of writes is durable once its record is in
//! the journal; redb applies it without a flush of its own. When the journal is
//! full, and at the end, redb is flushed, which forgets the journal's records.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use redb::{
    Builder, Database, Durability, ReadTransaction, ReadableDatabase as _, ReadableTable as _,
    StorageBackend, Table, TableDefinition, TableError, WriteTransaction,
};

use super::{
    StoreError,
    embedded::{USED, VALUES, contain, prepare},
    journal::{Effect, Generation, Journal, Record},
};
use crate::locks::lock;

/// Which journal goes on from here, if one does.
const JOURNAL: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("journal");
const GENERATION: &str = "generation";

/// How often a journal that could not be created is tried again.
const RETRY: Duration = Duration::from_secs(60);

/// Where the two files are.
pub(super) trait Medium: Send + Sync {
    /// Opens that of redb, which is there.
    fn database(&self, builder: &Builder) -> Result<Database, StoreError>;
    /// The same, only to look at.
    fn file(&self) -> Result<Box<dyn StorageBackend>, StoreError>;
    /// The journal, if there is one.
    fn journal(&self) -> io::Result<Option<Box<dyn StorageBackend>>>;
    /// Puts a journal there once `fill` has written it.
    fn create_journal(
        &self,
        fill: &mut dyn FnMut(&dyn StorageBackend) -> io::Result<()>,
    ) -> io::Result<Box<dyn StorageBackend>>;
    fn remove_journal(&self) -> io::Result<()>;
    /// Whether redb will have room for what the journal has.
    fn has_room(&self) -> bool;
    /// What redb's file takes on the disk, in bytes.
    fn size(&self) -> u64;
}

/// An open database and its journal.
pub(super) struct Journaled {
    database: Database,
    medium: Arc<dyn Medium>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// None before the first write, where there is no room for one, and while
    /// it is not known whether redb has what its last record says.
    journal: Option<Journal>,
    /// redb's file names a journal, which must not be replaced before redb is
    /// flushed without one.
    is_named: bool,
    /// When creating one failed.
    failed: Option<Instant>,
}

impl State {
    fn flush(
        &mut self,
        transaction: WriteTransaction,
        journal: Option<Journal>,
    ) -> Result<(), StoreError> {
        self.journal = flush(transaction, journal)?;
        self.is_named = self.journal.is_some();
        Ok(())
    }
}

/// The tables that services write to.
pub(super) struct Tables<'txn> {
    pub(super) values: Table<'txn, (&'static str, &'static str, &'static str), &'static [u8]>,
    pub(super) used: Table<'txn, &'static str, u64>,
    record: Record,
}

impl<'txn> Tables<'txn> {
    pub(super) fn open(transaction: &'txn WriteTransaction) -> Result<Self, StoreError> {
        Ok(Self {
            values: transaction.open_table(VALUES)?,
            used: transaction.open_table(USED)?,
            record: Record::default(),
        })
    }

    /// Writes to a table, and notes it for the journal.
    pub(super) fn apply(&mut self, effect: Effect<'_>) -> Result<(), StoreError> {
        match effect {
            Effect::Put(entry_key, stored) => drop(self.values.insert(entry_key, stored)?),
            Effect::Remove(entry_key) => drop(self.values.remove(entry_key)?),
            Effect::Used(service, used) => drop(self.used.insert(service, used)?),
        }
        self.record.push(effect);
        Ok(())
    }

    /// What was written through these.
    pub(super) fn finish(self) -> Record {
        self.record
    }
}

impl Journaled {
    /// Opens both, and brings redb up to the journal.
    pub(super) fn open(medium: Arc<dyn Medium>, cache: usize) -> Result<Self, StoreError> {
        let database = medium.database(Builder::new().set_cache_size(cache))?;
        let this = Self {
            database,
            medium,
            state: Mutex::default(),
        };
        let transaction = this.database.begin_write()?;
        prepare(&transaction)?;
        let journal = match kept(transaction.open_table(JOURNAL)?.get(GENERATION)?)? {
            None => None,
            Some(generation) => {
                let journal = Journal::open(this.medium.journal()?, generation)?;
                let mut tables = Tables::open(&transaction)?;
                journal.replay(&mut |effect| tables.apply(effect))?;
                Some(journal)
            }
        };
        let had_none = journal.is_none();
        let mut state = lock(&this.state);
        state.is_named = journal.is_some();
        state.flush(transaction, journal)?;
        drop(state);
        if had_none {
            // An end that was cut off may have left one.
            let _ = this.medium.remove_journal();
        }
        Ok(this)
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        Ok(self.database.begin_read()?)
    }

    pub(super) fn begin_write(&self) -> Result<WriteTransaction, StoreError> {
        Ok(self.database.begin_write()?)
    }

    /// Makes what a transaction wrote through [`Tables`] durable, and then
    /// seen.
    pub(super) fn commit(
        &self,
        mut transaction: WriteTransaction,
        record: Record,
    ) -> Result<(), StoreError> {
        if record.is_empty() {
            return Ok(transaction.abort()?);
        }
        let mut state = lock(&self.state);
        // Back once redb has what it has; what fails before leaves it out, and
        // the next flush of redb forgets it.
        let mut journal = state.journal.take();
        let fits = |journal: &mut Journal| journal.fits(&record) && self.medium.has_room();
        if let Some(mut journal) = journal.take_if(fits) {
            match journal.append(record) {
                Ok(()) => {
                    let committed = contain(|| {
                        transaction.set_durability(Durability::None)?;
                        Ok(transaction.commit()?)
                    });
                    // It is on the disk, and seen once the file is opened again.
                    committed.map_err(|error| StoreError::Io(error.to_string()))?;
                    state.journal = Some(journal);
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!("store: the journal failed, redb does without: {error}");
                    state.failed = Some(Instant::now());
                }
            }
        }
        if journal.is_none() && !state.is_named {
            journal = self.create(&mut state);
        }
        state.flush(transaction, journal)
    }

    /// The same without the journal, for what is no group of writes.
    pub(super) fn flush(&self, transaction: WriteTransaction) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        let journal = state.journal.take();
        state.flush(transaction, journal)
    }

    /// Gives what redb's file does not need back to the disk.
    pub(super) fn compact(&mut self) -> Result<(), StoreError> {
        self.flush(self.begin_write()?)?;
        self.database.compact()?;
        Ok(())
    }

    /// Leaves all in redb's file. Where that fails, the journal is left for the
    /// next start.
    pub(super) fn end(&self) {
        if lock(&self.state).journal.is_none() {
            return;
        }
        let _ = contain(|| {
            // In the order of a commit.
            let transaction = self.begin_write()?;
            let mut state = lock(&self.state);
            state.journal = None;
            state.flush(transaction, None)?;
            Ok(self.medium.remove_journal()?)
        });
    }

    fn create(&self, state: &mut State) -> Option<Journal> {
        if state.failed.is_some_and(|at| at.elapsed() < RETRY) || !self.medium.has_room() {
            return None;
        }
        let mut id = None;
        let mut fill = |file: &dyn StorageBackend| {
            id = Some(Journal::fill(file)?);
            Ok(())
        };
        let created = self.medium.create_journal(&mut fill);
        let begin = |file| Journal::begin(file, id.ok_or(io::ErrorKind::InvalidData)?);
        match created.and_then(begin) {
            Ok(journal) => {
                state.failed = None;
                Some(journal)
            }
            Err(error) => {
                tracing::warn!("store: no journal, so writes are slower: {error}");
                state.failed = Some(Instant::now());
                None
            }
        }
    }
}

impl Drop for Journaled {
    fn drop(&mut self) {
        self.end();
    }
}

/// Commits to redb with all that was not flushed before. The journal's records
/// so far are forgotten with it, or the whole journal where none is given.
fn flush(
    mut transaction: WriteTransaction,
    journal: Option<Journal>,
) -> Result<Option<Journal>, StoreError> {
    let generation = journal.as_ref().map(Journal::next).transpose()?;
    {
        let mut table = transaction.open_table(JOURNAL)?;
        match &generation {
            Some(generation) => drop(table.insert(GENERATION, &*generation.bytes())?),
            None => drop(table.remove(GENERATION)?),
        }
    }
    transaction.set_durability(Durability::Immediate)?;
    // Services choose what is written: with two phases a commit that a crash
    // cuts off can't be made to look like a whole one. Implied by the other,
    // which keeps opening after a crash short.
    transaction.set_two_phase_commit(true);
    transaction.set_quick_repair(true);
    transaction.commit()?;
    let restarted = journal.zip(generation);
    Ok(restarted.map(|(journal, generation)| journal.restart(generation)))
}

/// The journal that goes on from what a transaction reads, if one does.
pub(super) fn generation(transaction: &ReadTransaction) -> Result<Option<Generation>, StoreError> {
    match transaction.open_table(JOURNAL) {
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        table => kept(table?.get(GENERATION)?),
    }
}

fn kept(
    stored: Option<redb::AccessGuard<'_, &'static [u8]>>,
) -> Result<Option<Generation>, StoreError> {
    let parse = |stored: redb::AccessGuard<'_, &'static [u8]>| {
        Generation::parse(stored.value())
            .ok_or_else(|| StoreError::Broken("what it says of its journal is damaged".into()))
    };
    stored.map(parse).transpose()
}
