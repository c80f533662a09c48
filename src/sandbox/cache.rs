//! The folder of compiled code: files as [`super::precompiled`] describes,
//! named by what they were compiled from and for which engine.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::{
    files,
    trusted::{self, Purpose},
};

/// A private folder of compiled code, bounded by its size.
#[derive(Debug)]
pub(super) struct Cache {
    dir: PathBuf,
    /// Bytes of all files together.
    max_size: u64,
}

impl Cache {
    /// Opens the folder and creates it if need be.
    ///
    /// # Errors
    /// If it can't be created, or others may use it: what lies in it is run.
    pub(super) fn open(dir: PathBuf, max_size: u64) -> io::Result<Self> {
        create_private(&dir)?;
        Ok(Self { dir, max_size })
    }

    /// Returns the file of that name, if there is one, and marks it as used.
    pub(super) fn get(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.dir.join(name);
        let bytes = fs::read(&path).ok()?;
        // A folder that can't be written to serves all the same.
        let touch = File::options().append(true).open(&path);
        let _ = touch.and_then(|file| file.set_modified(SystemTime::now()));
        Some(bytes)
    }

    /// Keeps a file under a name, in the place of one that is there.
    ///
    /// # Errors
    /// If the file system refuses.
    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        files::replace(&self.dir.join(name), files::PRIVATE, bytes)?;
        self.evict(&self.dir.join(name))
    }

    /// Removes what was not used for the longest time, until the rest is
    /// within the bound. `newest` stays, whatever its size.
    fn evict(&self, newest: &Path) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            // Another process may have removed it meanwhile.
            let Ok(metadata) = path.symlink_metadata() else {
                continue;
            };
            if metadata.is_file() && path != newest {
                files.push((metadata.modified()?, metadata.len(), path));
            }
        }
        files.sort();
        let newest = newest.metadata()?.len();
        let mut size = newest + files.iter().map(|(_, size, _)| size).sum::<u64>();
        for (_, bytes, path) in files {
            if size <= self.max_size {
                break;
            }
            fs::remove_file(path)?;
            size -= bytes;
        }
        Ok(())
    }
}

/// Creates a folder that nobody else can use, and refuses one that somebody
/// else can.
fn create_private(dir: &Path) -> io::Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return trusted::check_for(dir, Purpose::Code),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let metadata = fs::symlink_metadata(dir)?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("it is not a folder of this user's own"));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(io::Error::other(
            "others may use it; chmod 0700 it, or name one that does not exist yet",
        ));
    }
    // Who can rename a folder above it can put another one in its place.
    trusted::check_for(dir, Purpose::Code)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, time::Duration};

    use super::*;

    #[test]
    fn the_folder_is_private() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        create_private(&dir).unwrap();
        let mode = |dir: &Path| fs::metadata(dir).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        create_private(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(create_private(&dir).is_err());
        let link = parent.path().join("link");
        symlink(&dir, &link).unwrap();
        assert!(create_private(&link).is_err());
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        let above = parent.path().join("a");
        fs::set_permissions(&above, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(create_private(&dir).is_err(), "others can replace it");
        assert!(create_private(&above.join("new")).is_err());
    }

    #[test]
    fn a_file_is_whole_or_not_there() {
        let parent = tempfile::tempdir().unwrap();
        let cache = Cache::open(parent.path().join("code"), 100).unwrap();
        assert_eq!(cache.get("a"), None);
        cache.put("a", b"first").unwrap();
        cache.put("a", b"second").unwrap();
        assert_eq!(cache.get("a").unwrap(), b"second");
        let folder = cache.dir.join("folder");
        fs::create_dir(&folder).unwrap();
        assert!(cache.put("folder", b"").is_err());
        fs::remove_dir(&folder).unwrap();
        assert_eq!(fs::read_dir(&cache.dir).unwrap().count(), 1);
    }

    #[test]
    fn what_was_not_used_for_the_longest_time_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let cache = Cache::open(parent.path().join("code"), 100).unwrap();
        let put = |name: &str, size: usize, age: u64| {
            cache.put(name, &vec![0; size]).unwrap();
            let file = File::options().append(true).open(cache.dir.join(name));
            let used = SystemTime::now() - Duration::from_secs(age);
            file.unwrap().set_modified(used).unwrap();
        };
        put("old", 40, 30);
        put("older", 40, 60);
        // Used again, so the other one is the oldest.
        assert!(cache.get("older").is_some());
        put("new", 40, 0);
        assert_eq!(cache.get("old"), None);
        assert!(cache.get("older").is_some() && cache.get("new").is_some());
        put("large", 1000, 0);
        assert!(cache.get("large").is_some() && cache.get("new").is_none());
    }
}
