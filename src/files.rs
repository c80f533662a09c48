//! Files that appear under their name whole and synced, or not at all: a full
//! disk, a kill or a power cut leaves what was there before.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io::{self, Read, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process,
    time::{Duration, SystemTime},
};

use uuid::Uuid;

/// Mode of a file that only this user may read.
pub const PRIVATE: u32 = 0o600;
/// Mode of a file as the umask allows.
pub const ORDINARY: u32 = 0o666;
/// Ending of the temporary names.
const UNFINISHED: &str = "part";

/// Distinguishes two states of a file: it was written, or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    size: u64,
    modified: (i64, i64),
    /// Time of the last change of the inode, which `cp -p` can't set.
    changed: (i64, i64),
    inode: u64,
}

impl Stamp {
    /// Looks at a file.
    ///
    /// # Errors
    /// If it can't be looked at.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        })
    }
}

/// Reads to the end, which a device or a pipe may not have.
///
/// # Errors
/// `FileTooLarge` if there are more than `limit` bytes; likewise if it can't be
/// read.
pub fn read_bounded(from: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let count = from.take(limit + 1).read_to_end(&mut bytes)?;
    if count as u64 > limit {
        let problem = format!("exceeds the limit of {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    Ok(bytes)
}

/// The same of a text.
///
/// # Errors
/// `InvalidData` if it is no UTF-8; likewise as [`read_bounded`].
pub fn read_text(from: impl Read, limit: u64) -> io::Result<String> {
    String::from_utf8(read_bounded(from, limit)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

/// Creates a folder that only this user can use, and those above it.
///
/// # Errors
/// If the file system refuses.
pub fn private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Writes a file in the place of one that may be there.
///
/// # Errors
/// If the file system refuses; nothing has changed then.
pub fn replace(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let mut unfinished = Unfinished::create(path, mode)?;
    unfinished.file.write_all(bytes)?;
    unfinished.replace()
}

/// Writes a file that is not there yet.
///
/// # Errors
/// `AlreadyExists` if it is; likewise if the file system refuses. Nothing has
/// changed then.
pub fn create(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let mut unfinished = Unfinished::create(path, mode)?;
    unfinished.file.write_all(bytes)?;
    unfinished.publish()
}

/// A file under a temporary name beside its own; removed when dropped.
#[derive(Debug)]
pub struct Unfinished {
    /// What is written to.
    pub file: File,
    temporary: PathBuf,
    path: PathBuf,
}

impl Unfinished {
    /// Creates it empty, readable and writable, with this mode.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn create(path: &Path, mode: u32) -> io::Result<Self> {
        // Hidden: who follows the folder passes over it. At random: servers that
        // share a folder may have the same number, in a container each.
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        let number = Uuid::new_v4().as_fields().0;
        name.push(format!(".{}.{number}.{UNFINISHED}", process::id()));
        let temporary = path.with_file_name(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        Ok(Self {
            file,
            temporary,
            path: path.to_owned(),
        })
    }

    /// Returns where it is until then.
    #[must_use]
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Puts it under its name, in the place of a file that may be there.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn replace(self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        sync_folder(&self.path)
    }

    /// Puts it under its name, which is free.
    ///
    /// # Errors
    /// `AlreadyExists` if it is not; likewise if the file system refuses.
    pub fn publish(self) -> io::Result<()> {
        self.file.sync_all()?;
        match fs::hard_link(&self.temporary, &self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error),
            // A file system without links; nobody else is likely to come.
            Err(_) if fs::symlink_metadata(&self.path).is_ok() => {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            Err(_) => fs::rename(&self.temporary, &self.path)?,
            Ok(()) => {}
        }
        sync_folder(&self.path)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Renamed, it is not there any more.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Removes what killed processes left unfinished in a folder: what was not
/// written to for so long, and no file that has another name than
/// [`Unfinished`] gives.
pub fn remove_unfinished(folder: &Path, age: Duration) {
    let now = SystemTime::now();
    let is_old = |entry: &fs::DirEntry| -> io::Result<bool> {
        let written = entry.metadata()?.modified()?;
        Ok(now.duration_since(written).unwrap_or_default() >= age)
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if is_unfinished(&entry.path()) && is_old(&entry).unwrap_or(false) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Whether a file is called `.NAME.PROCESS.NUMBER.part`.
fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut parts = name.rsplit('.');
    let is_number = |part: Option<&str>| part.is_some_and(|part| part.parse::<u32>().is_ok());
    name.starts_with('.')
        && parts.next() == Some(UNFINISHED)
        && is_number(parts.next())
        && is_number(parts.next())
}

/// Makes a new name durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    match File::open(folder)?.sync_all() {
        // Some network file systems have nothing to sync there.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        synced => synced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_file_is_replaced_or_created_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        create(&file, PRIVATE, b"one").unwrap();
        let again = create(&file, PRIVATE, b"two").unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&file).unwrap(), b"one");
        replace(&file, PRIVATE, b"three").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"three");
        assert!(replace(folder.path(), PRIVATE, b"a folder").is_err());
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn what_is_read_has_a_bound() {
        assert_eq!(read_text(&b"four"[..], 4).unwrap(), "four");
        let error = read_text(&b"four"[..], 3).unwrap_err();
        assert_eq!(error.to_string(), "exceeds the limit of 3 bytes");
        let error = read_bounded(io::repeat(0), 1 << 20).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert!(read_text(&b"\xff"[..], 4).is_err());
    }

    #[test]
    fn what_fails_on_the_way_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        create(&file, PRIVATE, b"one").unwrap();
        let mut unfinished = Unfinished::create(&file, PRIVATE).unwrap();
        unfinished.file.write_all(b"tw").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        drop(unfinished);
        assert_eq!(fs::read(&file).unwrap(), b"one");
        assert_eq!(names(folder.path()), ["file"]);
        fs::write(folder.path().join(".file.1.0.part"), "killed").unwrap();
        remove_unfinished(folder.path(), Duration::from_secs(600));
        assert_eq!(names(folder.path()).len(), 2, "it may be another server's");
        remove_unfinished(folder.path(), Duration::ZERO);
        assert_eq!(names(folder.path()), ["file"]);
        for other in [".file.part", "file.1.0.part", ".file.x.0.part", ".part"] {
            fs::write(folder.path().join(other), "another's").unwrap();
        }
        remove_unfinished(folder.path(), Duration::ZERO);
        assert_eq!(names(folder.path()).len(), 5);
    }
}
