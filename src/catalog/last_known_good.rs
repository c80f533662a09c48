//! The last-known-good files of each service, kept outside of the services
//! folder: what is served when a new file is broken, and what a rollback goes
//! back to.
//!
//! ```text
//! STATE_DIR/components/FOLDER/calc/00000001-3fa9….wasm
//!                                  00000002-77be….wasm    the newest good one; machine code is called .cwasm
//!                                  rollback               lines: refused digest, served digest
//! ```

use std::{
    ffi::OsStr,
    fmt, fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use super::load::{ENDINGS, digest_of, has_ending, read_bounded};
use crate::{files, sandbox::ComponentFile};

/// Files that are kept of each service.
const MAX_KEPT: usize = 3;
/// Holds a rollback, as long as the file that was refused is in place.
const ROLLBACK: &str = "rollback";

/// Where the files are kept.
#[derive(Debug, Clone)]
pub(super) struct LastKnownGood {
    dir: PathBuf,
}

/// A file that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LastKnownGoodFile {
    order: u64,
    /// `sha256:…`
    pub(super) digest: String,
    pub(super) path: PathBuf,
}

/// The operator went back from one file to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rollback {
    /// Digest of the file that is not served as long as it is in place.
    pub(super) refused: String,
    /// Digest of the one that is served instead.
    pub(super) served: String,
}

impl LastKnownGood {
    /// In this folder, which is made for this user alone; apart from those
    /// of other servers of this user, which have other services folders.
    pub(super) fn open(state_dir: &Path, services_dir: &Path) -> io::Result<Self> {
        let services = fs::canonicalize(services_dir)?;
        let digest = Sha256::digest(services.as_os_str().as_bytes());
        let name: String = digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let dir = state_dir.join("components").join(name);
        files::private_dir(&dir)?;
        Ok(Self { dir })
    }

    /// The files of a stem (`calc`, `calc@1.0.0`), oldest first.
    pub(super) fn files(&self, stem: &str) -> Vec<LastKnownGoodFile> {
        let entries = fs::read_dir(self.dir.join(stem))
            .into_iter()
            .flatten()
            .flatten();
        let mut files: Vec<_> = entries
            .filter_map(|entry| LastKnownGoodFile::parse(entry.path()))
            .collect();
        files.sort_by_key(|file| file.order);
        files
    }

    /// Keeps a good file as the newest of its stem, unless it is that already.
    /// The file with the digest `before`, whose place it takes, is the one
    /// before it: a rollback goes back to what was served, and the next one to
    /// what was served before that.
    pub(super) fn keep(
        &self,
        stem: &str,
        digest: &str,
        code: &ComponentFile,
        before: Option<&str>,
    ) -> io::Result<()> {
        let mut files = self.files(stem);
        if files.last().is_some_and(|newest| newest.digest == digest) {
            return Ok(());
        }
        let dir = self.dir.join(stem);
        let served = files.iter().position(|file| Some(&*file.digest) == before);
        let order = files.last().map_or(0, |newest| newest.order) + 1;
        // From those behind it the operator went back.
        let rejected = served.map_or(Vec::new(), |place| files.split_off(place + 1));
        files::private_dir(&dir)?;
        let ending = ENDINGS[usize::from(code.is_machine())];
        files::remove_unfinished(&dir, Duration::ZERO);
        let name = file_name(order, digest, ending.as_ref());
        files::replace(&dir.join(name), files::PRIVATE, code.bytes())?;
        // One file is kept once: the copy that is older goes, and so does
        // what is too old.
        let older = files.iter().filter(|file| file.digest == digest);
        let others = files.iter().filter(|file| file.digest != digest).count();
        let too_many = files
            .iter()
            .filter(|file| file.digest != digest)
            .take((others + 1).saturating_sub(MAX_KEPT));
        let gone = rejected.iter().chain(older).chain(too_many);
        // One that can't be removed does not keep the others.
        gone.map(|file| remove(&file.path))
            .fold(Ok(()), io::Result::and)
    }

    /// Whether the file with this digest is kept.
    pub(super) fn has(&self, stem: &str, digest: &str) -> bool {
        self.files(stem).iter().any(|file| file.digest == digest)
    }

    /// Forgets the file with this digest, so that no rollback finds it.
    pub(super) fn forget(&self, stem: &str, digest: &str) -> io::Result<()> {
        let mut files = self.files(stem).into_iter();
        let file = files.find(|file| file.digest == digest);
        file.map_or(Ok(()), |file| remove(&file.path))
    }

    /// The rollback that holds for a stem.
    pub(super) fn rollback(&self, stem: &str) -> Option<Rollback> {
        let file = self.dir.join(stem).join(ROLLBACK);
        let lost = |problem: &dyn fmt::Display| {
            tracing::error!(
                "the rollback of {stem} does not hold, because {} can't be read: {problem}; mb-server service rollback goes back again",
                file.display()
            );
        };
        match fs::read_to_string(&file) {
            Ok(text) => match text.trim_end().split_once('\n') {
                Some((refused, served)) => {
                    return Some(Rollback {
                        refused: refused.into(),
                        served: served.into(),
                    });
                }
                None => lost(&"it was changed"),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => lost(&error),
        }
        None
    }

    /// Remembers a rollback, or forgets it.
    pub(super) fn set_rollback(&self, stem: &str, rollback: Option<&Rollback>) -> io::Result<()> {
        let file = self.dir.join(stem).join(ROLLBACK);
        match rollback {
            Some(Rollback { refused, served }) => files::replace(
                &file,
                files::PRIVATE,
                format!("{refused}\n{served}\n").as_bytes(),
            ),
            None => remove(&file),
        }
    }
}

/// Removes a file that another process may have removed already.
pub(super) fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn file_name(order: u64, digest: &str, ending: &OsStr) -> String {
    let hex = digest.trim_start_matches("sha256:");
    format!("{order:08}-{hex}.{}", ending.display())
}

impl LastKnownGoodFile {
    /// Whether it can be read, and is not what was kept.
    pub(super) fn is_damaged(&self) -> bool {
        read_bounded(&self.path).is_ok_and(|bytes| digest_of(&bytes) != self.digest)
    }

    fn parse(path: PathBuf) -> Option<Self> {
        let (order, hex) = path.file_stem()?.to_str()?.split_once('-')?;
        let is_code = ENDINGS.iter().any(|ending| has_ending(&path, ending));
        // There is a next one.
        let is_order = |order: &u64| is_code && *order < u64::MAX;
        let order = order.parse().ok().filter(is_order)?;
        Some(Self {
            order,
            digest: format!("sha256:{hex}"),
            path,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(content: &str) -> ComponentFile {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.wasm");
        fs::write(&file, content).unwrap();
        ComponentFile::read(&file, 100).unwrap()
    }

    #[test]
    fn the_newest_few_are_kept_once_each() {
        let dir = tempfile::tempdir().unwrap();
        let kept = LastKnownGood::open(dir.path(), dir.path()).unwrap();
        let digests = || {
            kept.files("calc")
                .into_iter()
                .map(|file| file.digest)
                .collect::<Vec<_>>()
        };
        for digest in ["sha256:a", "sha256:b", "sha256:b", "sha256:c", "sha256:d"] {
            kept.keep("calc", digest, &code(digest), None).unwrap();
        }
        assert_eq!(digests(), ["sha256:b", "sha256:c", "sha256:d"]);
        kept.keep("calc", "sha256:b", &code("x"), None).unwrap();
        assert_eq!(
            digests(),
            ["sha256:c", "sha256:d", "sha256:b"],
            "an old one that comes back is the newest"
        );
        let served = Some("sha256:c");
        kept.keep("calc", "sha256:e", &code("e"), served).unwrap();
        assert_eq!(
            digests(),
            ["sha256:c", "sha256:e"],
            "a rollback goes back to what was served, and none to what it came from"
        );
        let contents = kept.files("calc");
        let contents = contents.iter().map(|file| fs::read(&file.path).unwrap());
        assert_eq!(
            contents.collect::<Vec<_>>(),
            [b"sha256:c".to_vec(), b"e".to_vec()]
        );
        assert!(kept.has("calc", "sha256:e"));
        kept.forget("calc", "sha256:e").unwrap();
        assert_eq!(digests(), ["sha256:c"]);
        assert_eq!(kept.files("other"), []);
    }

    #[test]
    fn rollbacks_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let kept = LastKnownGood::open(dir.path(), dir.path()).unwrap();
        kept.keep("calc", "sha256:a", &code("a"), None).unwrap();
        assert_eq!(kept.rollback("calc"), None);
        let rollback = Rollback {
            refused: "sha256:b".into(),
            served: "sha256:a".into(),
        };
        kept.set_rollback("calc", Some(&rollback)).unwrap();
        assert_eq!(kept.rollback("calc"), Some(rollback));
        kept.set_rollback("calc", None).unwrap();
        kept.set_rollback("calc", None).unwrap();
        assert_eq!(kept.rollback("calc"), None);
    }
}
