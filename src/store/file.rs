//! The file of the store: created whole or not at all, and recognised where an
//! earlier program's creation was cut off.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use redb::{Builder, Database, StorageBackend, backends::FileBackend};
use rustix::fs::{Advice, fadvise, statvfs};

use super::{StoreError, embedded::prepare, journaled::Medium};
use crate::files::{PRIVATE, Unfinished, private_dir};

/// Page of redb, in bytes: what a creation writes before anything else.
const PAGE: usize = 4096;
/// Where redb says that a file is one of its own; written last.
const MAGIC: usize = 9;
/// Larger than any file of which only the first page was written, in bytes.
const MAX_CUT_OFF: u64 = 16 * 1024 * 1024;

/// With less than this on the disk, in bytes, each group of writes is flushed to
/// redb at once, so that a full disk never keeps the journal out of it.
const ROOM: u64 = 64 * 1024 * 1024;

/// What there is under the name of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Absent,
    /// Nothing, or what a creation left that a full disk ended, of so many
    /// bytes: it never held a value, or lost all.
    Empty(u64),
    Present,
}

pub(super) fn state(path: &Path) -> io::Result<State> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::Absent),
        file => file?,
    };
    let size = file.metadata()?.len();
    Ok(if size == 0 || is_cut_off(&file, size)? {
        State::Empty(size)
    } else {
        State::Present
    })
}

/// Whether redb had not written more than the first page when it was ended,
/// and had not called the file its own.
fn is_cut_off(file: &File, size: u64) -> io::Result<bool> {
    if size > MAX_CUT_OFF {
        return Ok(false);
    }
    let mut page = [0; PAGE];
    for at in (0..size).step_by(PAGE) {
        let length = usize::try_from(size - at).unwrap_or(PAGE).min(PAGE);
        file.read_exact_at(&mut page[..length], at)?;
        let zeros = if at == 0 { length.min(MAGIC) } else { length };
        if page[..zeros].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Has a store there, created if need be, for this user alone.
pub(super) fn ensure(path: &Path, cache: usize) -> Result<(), StoreError> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        private_dir(dir)?;
    }
    let state = state(path)?;
    if let State::Empty(size) = state {
        tracing::warn!(
            "store {} is empty ({size} bytes), as a full disk or a truncation leaves it: a new one is created. \
             If it held values, stop the server and restore a backup with mb-server store import",
            path.display()
        );
    }
    if state == State::Present {
        return Ok(());
    }
    let unfinished = Unfinished::create(path, PRIVATE)?;
    let database = Builder::new()
        .set_cache_size(cache)
        .create_with_backend(FileBackend::new(unfinished.file.try_clone()?)?)?;
    let transaction = database.begin_write()?;
    prepare(&transaction)?;
    transaction.commit()?;
    database.close()?;
    match state {
        State::Absent => match unfinished.publish() {
            // Another process was quicker, and has it open most likely.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            published => Ok(published?),
        },
        _ => Ok(unfinished.replace()?),
    }
}

/// The file of redb, and its journal.
#[derive(Debug, Clone)]
pub(super) struct Files {
    database: PathBuf,
    journal: PathBuf,
}

impl Files {
    pub(super) fn of(database: &Path) -> Self {
        Self {
            database: database.to_owned(),
            journal: database.with_extension("journal"),
        }
    }
}

fn backend(file: File) -> io::Result<Box<dyn StorageBackend>> {
    Ok(Box::new(FileBackend::new(file).map_err(io::Error::other)?))
}

fn existing(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// The page cache holds pieces as large as they were first read or written, and
/// a flush writes those that changed whole: 64 KiB in the place of 4.
fn write_only_what_changed(file: &File, advice: Advice) {
    // Without, it is only slower.
    let _ = fadvise(file, 0, None, advice);
}

impl Medium for Files {
    fn database(&self, builder: &Builder) -> Result<Database, StoreError> {
        let file = existing(&self.database)?;
        if file.metadata()?.len() == 0 {
            return Err(StoreError::Empty { size: 0 });
        }
        Ok(builder.create_with_backend(FileBackend::new(file)?)?)
    }

    fn file(&self) -> Result<Box<dyn StorageBackend>, StoreError> {
        Ok(backend(existing(&self.database)?)?)
    }

    fn journal(&self) -> io::Result<Option<Box<dyn StorageBackend>>> {
        match existing(&self.journal) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => {
                let file = file?;
                write_only_what_changed(&file, Advice::Random);
                Ok(Some(backend(file)?))
            }
        }
    }

    fn create_journal(
        &self,
        fill: &mut dyn FnMut(&dyn StorageBackend) -> io::Result<()>,
    ) -> io::Result<Box<dyn StorageBackend>> {
        let unfinished = Unfinished::create(&self.journal, PRIVATE)?;
        let file = backend(unfinished.file.try_clone()?)?;
        fill(&*file)?;
        let opened = unfinished.file.try_clone()?;
        unfinished.replace()?;
        write_only_what_changed(&opened, Advice::DontNeed);
        Ok(file)
    }

    fn remove_journal(&self) -> io::Result<()> {
        fs::remove_file(&self.journal)
    }

    fn has_room(&self) -> bool {
        // Where the system does not say, there is.
        statvfs(&self.database).map_or(true, |disk| {
            disk.f_bavail.saturating_mul(disk.f_frsize) >= ROOM
        })
    }

    fn size(&self) -> u64 {
        // Blocks of stat(2) have 512 bytes.
        fs::metadata(&self.database).map_or(0, |metadata| metadata.blocks() * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_cut_off_creation_leaves_is_distinguished_from_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        let state_of = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            state(&path).unwrap()
        };
        let mut cut_off = vec![0; 73_728];
        cut_off[MAGIC..100].fill(7);
        assert_eq!(state_of(b""), State::Empty(0));
        assert_eq!(state_of(&cut_off), State::Empty(73_728));
        assert_eq!(state_of(&cut_off[..50]), State::Empty(50));
        cut_off[PAGE] = 1;
        assert_eq!(state_of(&cut_off), State::Present);
        assert_eq!(state_of(b"redb"), State::Present);
        fs::remove_file(&path).unwrap();
        assert_eq!(state(&path).unwrap(), State::Absent);
        ensure(&path, 1 << 20).unwrap();
        assert_eq!(state(&path).unwrap(), State::Present);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
