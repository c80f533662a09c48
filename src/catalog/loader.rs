//! Follows the files of the folder: which have changed, which load, and which
//! are the last-known-good ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use super::{
    Catalog, FileError, FileName, LoadSettings, Loading, Service,
    last_known_good::{LastKnownGood, Rollback, remove},
    load::{ENDINGS, component_files, digest_of, load_code, read_bounded, read_code},
    truncated::is_truncated,
};
use crate::{
    config::Config,
    files::{self, Stamp},
    locks::lock,
    metrics::ServiceStats,
    sandbox::{ComponentFile, Sandbox},
    wire::Version,
};

/// How long a file that ends too early may still be growing.
const COPYING: Duration = Duration::from_secs(10);

/// Between two attempts to load a file that failed for a reason that may pass.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Time after which the disappearance of all served files is believed to be
/// intended.
const EMPTY_FOR: Duration = Duration::from_secs(10);

/// The files of the folder, and what is served of each.
pub(super) struct Loader {
    sandbox: Arc<Sandbox>,
    settings: LoadSettings,
    /// None where there is no folder for them.
    last_known_good: Option<LastKnownGood>,
    files: BTreeMap<PathBuf, Entry>,
    /// Files that are being loaded, for which callers are advised to wait.
    loading: Arc<Loading>,
    empty_folder: EmptyFolder,
    /// What the operator switched on or off since the start: a version, or
    /// all of a service.
    switched: BTreeMap<(String, Option<Version>), bool>,
    /// Counts the scans: what the same scan loaded was copied together.
    generation: u64,
}

/// How the folder is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScanMode {
    /// A changed file counts once it is the same in two scans.
    Watch,
    /// It counts at once.
    Now,
    /// It counts at once, and all files are read: one may have changed with
    /// the size and the times that it had.
    Reread,
}

/// A file that takes the place of what is served of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Replacement {
    pub(super) path: PathBuf,
    /// `sha256:…`
    pub(super) digest: String,
    /// Digest of what was served of this file before.
    pub(super) before: Option<String>,
    /// It is not among the last-known-good files.
    is_new: bool,
}

/// One file.
pub(super) struct Entry {
    /// None while the file can't be looked at.
    stamp: Option<Stamp>,
    /// Digest of the bytes that were settled; none if they could not be read.
    read: Option<String>,
    /// When it was first seen like this, or tried last.
    since: Instant,
    /// It was loaded or refused as it is.
    settled: bool,
    /// It was refused for a reason that may pass, and is tried again.
    retries: bool,
    pub(super) service: Option<Arc<Service>>,
    /// The version that was served until the settings changed, and its
    /// counters, which continue.
    counted: Option<(Version, Arc<ServiceStats>)>,
    /// When the service was loaded, in changes.
    pub(super) generation: u64,
    pub(super) source: Source,
    /// Why the file, as it is, is not served.
    pub(super) error: Option<String>,
    /// Digest of the file in the folder, where the operator rolled it back.
    pub(super) rolled_back_from: Option<String>,
}

impl Entry {
    /// One that was not looked into.
    fn new(stamp: Option<Stamp>) -> Self {
        Self {
            stamp,
            read: None,
            since: Instant::now(),
            settled: false,
            retries: false,
            service: None,
            counted: None,
            generation: 0,
            source: Source::File,
            error: None,
            rolled_back_from: None,
        }
    }

    /// The file has become another one.
    fn change(&mut self, stamp: Option<Stamp>) {
        (self.stamp, self.since) = (stamp, Instant::now());
        (self.settled, self.retries) = (false, false);
    }

    /// What is served is served on, after a change that failed; where nothing
    /// is, it is tried again.
    fn stays(&mut self, rollback: Option<&Rollback>) {
        self.settled = self.service.is_some();
        self.retries = !self.settled;
        self.rolled_back_from = rollback.map(|rollback| rollback.refused.clone());
    }
}

crate::wire::words! {
    /// Which file a service came from.
    pub enum Source {
        /// The one in the folder, as it is or as it was.
        File = "file",
        /// The last-known-good one, because the one in the folder is broken.
        LastKnownGood = "lastKnownGood",
        /// An earlier one, because the operator went back to it.
        RolledBack = "rolledBack",
    }
}

/// Whether an empty folder is to be believed: one that is unmounted for a
/// moment, or is just being replaced, looks the same.
#[derive(Debug, Default)]
struct EmptyFolder {
    /// When it was first seen empty.
    since: Option<Instant>,
}

impl EmptyFolder {
    /// Takes note of a scan. Returns whether an empty folder is not believed
    /// yet.
    fn applies(&mut self, is_empty: bool, now: Instant) -> bool {
        if !is_empty {
            self.since = None;
            return false;
        }
        now.saturating_duration_since(*self.since.get_or_insert(now)) < EMPTY_FOR
    }
}

/// Why a change by the operator is not possible.
pub type ChangeError = String;

/// What came of a file: what is served, or what is not and why.
type Change = Result<String, String>;

impl Loader {
    /// Creates the loader of a folder that was not scanned yet. It keeps
    /// last-known-good files under `state_dir`, if it can.
    pub(super) fn new(sandbox: &Arc<Sandbox>, settings: LoadSettings, state_dir: &Path) -> Self {
        let kept = LastKnownGood::open(state_dir, &settings.dir).inspect_err(|error| {
            tracing::warn!(
                "last-known-good files are not kept, because the folder {} can't be used: {error}; set state_dir to another",
                state_dir.display()
            );
        });
        Self {
            sandbox: Arc::clone(sandbox),
            settings,
            last_known_good: kept.ok(),
            files: BTreeMap::new(),
            loading: Arc::default(),
            empty_folder: EmptyFolder::default(),
            switched: BTreeMap::new(),
            generation: 0,
        }
    }

    /// Scans the folder and loads what changed.
    ///
    /// # Errors
    /// If the folder can't be read, or what it shows is doubted; nothing has
    /// changed then.
    pub(super) fn scan(&mut self, mode: ScanMode) -> io::Result<Vec<String>> {
        let paths = self.list()?;
        Ok(self.take_in(paths, mode))
    }

    /// The component files of the folder.
    fn list(&mut self) -> io::Result<Vec<PathBuf>> {
        let paths = component_files(&self.settings.dir)
            .map_err(|error| io::Error::new(error.kind(), format!("it can't be read: {error}")))?;
        let loaded = self.files.values().filter(|entry| entry.service.is_some());
        let loaded = loaded.count();
        if self
            .empty_folder
            .applies(paths.is_empty() && loaded > 0, Instant::now())
        {
            return Err(io::Error::other(format!(
                "all its files are gone at once, as where it was unmounted; if that is meant, the {loaded} that \
                 are served end at the first look after {} s",
                EMPTY_FOR.as_secs()
            )));
        }
        Ok(paths)
    }

    fn take_in(&mut self, paths: Vec<PathBuf>, mode: ScanMode) -> Vec<String> {
        self.generation += 1;
        let mut changes = Vec::new();
        let present: BTreeSet<_> = paths.iter().cloned().collect();
        self.files.retain(|path, _| {
            let stays = present.contains(path);
            if !stays {
                let removed = format!("{} was removed", path.display());
                if present.is_empty() {
                    tracing::warn!("{removed}");
                } else {
                    tracing::info!("{removed}");
                }
                changes.push(removed);
            }
            stays
        });
        let (mut unsettled, mut loading) = (Vec::new(), Vec::new());
        for path in paths {
            let stamp = match Stamp::of(&path) {
                Ok(stamp) => Some(stamp),
                // One that vanished meanwhile is removed by the next look.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                // Reading it will say why.
                Err(_) => None,
            };
            let known = self.files.contains_key(&path);
            let mut entry = self
                .files
                .remove(&path)
                .unwrap_or_else(|| Entry::new(stamp));
            let still = known
                && entry.stamp == stamp
                && (mode != ScanMode::Reread || !entry.settled || self.is_as_read(&path, &entry));
            if !still {
                entry.change(stamp);
            }
            if !entry.settled && (entry.error.is_none() || !still) {
                loading.extend(FileName::parse(&path));
            }
            let is_soon = entry.retries && entry.since.elapsed() < RETRY_AFTER;
            if !entry.settled && (mode != ScanMode::Watch || still && !is_soon) {
                unsettled.push((path, entry));
            } else {
                self.files.insert(path, entry);
            }
        }
        self.loading.set(loading);
        for (path, entry, change) in self.settle_all(unsettled) {
            self.files.insert(path, entry);
            changes.extend(change.map(|change| change.unwrap_or_else(|failed| failed)));
        }
        changes
    }

    /// Whether the bytes of a file are those that were settled.
    fn is_as_read(&self, path: &Path, entry: &Entry) -> bool {
        let code = read_code(path);
        code.ok().map(|code| digest_of(code.bytes())) == entry.read
    }

    /// Loads files side by side, as many as there are processors: a start
    /// with a thousand of them takes as long as that takes.
    fn settle_all(
        &self,
        unsettled: Vec<(PathBuf, Entry)>,
    ) -> Vec<(PathBuf, Entry, Option<Change>)> {
        let threads = thread::available_parallelism()
            .map_or(1, usize::from)
            .min(unsettled.len());
        let settle = |(path, mut entry): (PathBuf, Entry)| {
            let change = self.settle(&path, &mut entry, false);
            (path, entry, change)
        };
        if threads < 2 {
            return unsettled.into_iter().map(settle).collect();
        }
        let queue = Mutex::new(unsettled.into_iter());
        let next = || lock(&queue).next();
        thread::scope(|scope| {
            let work = || std::iter::from_fn(next).map(settle).collect::<Vec<_>>();
            // What the system refuses threads for, this one does.
            let start = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
            let others: Vec<_> = (1..threads).map_while(start).collect();
            let mut settled = work();
            // A defect in a load is that file's failure already; see `contain`.
            settled.extend(
                others
                    .into_iter()
                    .flat_map(|thread| thread.join().unwrap_or_default()),
            );
            settled
        })
    }

    /// Loads a file as it is, unless the operator went back from it and does not
    /// undo that. None if nothing changes by it.
    fn settle(&self, path: &Path, entry: &mut Entry, undo: bool) -> Option<Change> {
        let code = match read_code(path) {
            Ok(code) => code,
            Err(error) => {
                entry.read = None;
                return self.refuse(path, entry, &error);
            }
        };
        // Nothing is known of how a file came that was there at the start.
        if self.generation > 1 && is_truncated(code.bytes()) && entry.since.elapsed() < COPYING {
            return None;
        }
        let digest = digest_of(code.bytes());
        (entry.settled, entry.read) = (true, Some(digest.clone()));
        let served = entry.service.as_ref().map(|service| service.digest.clone());
        if served.as_ref() == Some(&digest) && entry.source == Source::File {
            // Touched, or changed there and back.
            let kept = self.last_known_good.as_ref();
            if kept.is_some_and(|kept| !kept.has(&stem(path), &digest)) {
                self.keep(path, &digest, &code, None);
            }
            return entry
                .error
                .take()
                .map(|_| Ok(format!("{} is as it was", path.display())));
        }
        let stem = stem(path);
        let rollback = self
            .last_known_good
            .as_ref()
            .and_then(|kept| kept.rollback(&stem));
        if let Some(rollback) = rollback
            .as_ref()
            .filter(|rollback| rollback.refused == digest && !undo)
        {
            return self.go_back(path, entry, rollback);
        }
        match load_code(&self.sandbox, &self.settings, path, &code) {
            Ok(service) => {
                if rollback.is_some() {
                    self.forget_rollback(&stem);
                }
                self.keep(path, &digest, &code, served.as_deref());
                Some(Ok(self.serve(path, entry, service, Source::File)))
            }
            Err(error) => self.refuse(path, entry, &error),
        }
    }

    /// Keeps what is served, in the place of `served`, as a way back.
    fn keep(&self, path: &Path, digest: &str, code: &ComponentFile, served: Option<&str>) {
        if let Some(kept) = &self.last_known_good
            && let Err(error) = kept.keep(&stem(path), digest, code, served)
        {
            tracing::warn!("{} is not kept: {error}", path.display());
        }
    }

    /// Serves a loaded service in place of the one that was served of the file
    /// before.
    fn serve(
        &self,
        path: &Path,
        entry: &mut Entry,
        mut service: Service,
        source: Source,
    ) -> String {
        let description = &service.description;
        let what = format!(
            "{} {} is served from {}",
            description.name,
            description.version,
            path.display()
        );
        let before = entry
            .service
            .as_ref()
            .map(|before| (before.description.version, Arc::clone(&before.stats)));
        // The name is that of the file, so it is the same.
        if let Some((version, stats)) = before.or(entry.counted.take())
            && version == description.version
        {
            service.stats = stats;
        }
        *entry = Entry {
            stamp: entry.stamp,
            read: entry.read.take(),
            since: entry.since,
            settled: true,
            retries: false,
            service: Some(Arc::new(service)),
            counted: None,
            generation: self.generation,
            source,
            error: None,
            rolled_back_from: None,
        };
        tracing::info!("{what}");
        what
    }

    /// A broken file leaves what was served from it before, or the
    /// last-known-good one of an earlier process. None where it was tried again
    /// with the same result.
    fn refuse(&self, path: &Path, entry: &mut Entry, cause: &FileError) -> Option<Change> {
        let mut may_pass = cause.may_pass();
        let error = cause.to_string();
        let is_known = entry.retries && entry.error.as_ref() == Some(&error);
        let stem = stem(path);
        entry.rolled_back_from = None;
        // Where the operator had gone back, that is the last-known-good one.
        let candidates = |kept: &LastKnownGood| {
            let (mut files, rollback) = (kept.files(&stem), kept.rollback(&stem));
            files.retain(|file| {
                rollback
                    .as_ref()
                    .is_none_or(|rollback| file.digest == rollback.served)
            });
            files
        };
        let mut serves_now = false;
        if entry.service.is_none() && !matches!(cause, FileError::Kept { .. }) {
            let files = self.last_known_good.iter().flat_map(candidates);
            // The newest one that was not damaged.
            for last in files.collect::<Vec<_>>().iter().rev() {
                match self.load_last_known_good(path, &last.path, &last.digest) {
                    Ok(service) => {
                        self.serve(path, entry, service, Source::LastKnownGood);
                        serves_now = true;
                        break;
                    }
                    Err(error) => {
                        if !is_known {
                            let file = last.path.display();
                            tracing::warn!(
                                "the last-known-good file {file} can't be served either: {error}"
                            );
                        }
                        if error.may_pass() {
                            may_pass = true;
                            break;
                        }
                    }
                }
            }
        }
        let instead = match (&entry.service, entry.source) {
            (None, _) => "",
            (Some(_), Source::LastKnownGood) => "; the last-known-good file is served instead",
            (Some(_), _) => "; what was loaded before is still served",
        };
        let what = format!("{} is not served: {error}{instead}", path.display());
        entry.error = Some(error);
        (entry.settled, entry.retries) = (!may_pass, may_pass);
        entry.since = Instant::now();
        (!is_known || serves_now).then(|| {
            tracing::error!("{what}");
            Err(what)
        })
    }

    /// Loads a last-known-good file under the name of the one in the folder.
    fn load_last_known_good(
        &self,
        path: &Path,
        kept: &Path,
        digest: &str,
    ) -> Result<Service, FileError> {
        let code = read_code(kept)?;
        if digest_of(code.bytes()) != digest {
            return Err(FileError::Unfit("it was changed".into()));
        }
        load_code(&self.sandbox, &self.settings, path, &code)
    }

    pub(super) fn rollback(
        &mut self,
        name: &str,
        version: Option<Version>,
    ) -> Result<String, ChangeError> {
        let kept = self.last_known_good.clone().ok_or(
            "last-known-good files are not kept; set state_dir to a folder that can be written",
        )?;
        let path = self.path_of(name, version)?;
        let stem = stem(&path);
        let current = self
            .files
            .get(&path)
            .and_then(|entry| entry.service.as_ref())
            .map(|service| service.digest.clone());
        let earlier = kept.rollback(&stem);
        // One that fails for a moment is gone back from all the same.
        let current = current.or(earlier.as_ref().map(|earlier| earlier.served.clone()));
        let in_place = read_bounded(&path).map(|bytes| digest_of(&bytes));
        let in_place = in_place.map_err(|error| format!("{}: {error}", path.display()))?;
        let files = kept.files(&stem);
        let before = files
            .iter()
            .rposition(|file| Some(&file.digest) == current.as_ref())
            .unwrap_or(files.len());
        let back = files[..before]
            .iter()
            .rfind(|file| !file.is_damaged())
            .ok_or_else(|| match files[..before].last() {
                Some(file) => format!(
                    "{} was changed, and no earlier file of {name} is kept",
                    file.path.display()
                ),
                None => format!("no earlier file of {name} is kept"),
            })?;
        let rollback = Rollback {
            refused: in_place,
            served: back.digest.clone(),
        };
        kept.set_rollback(&stem, Some(&rollback))
            .map_err(|error| format!("can't be remembered: {error}"))?;
        self.generation += 1;
        let mut entry = self.files.remove(&path).ok_or("it was removed meanwhile")?;
        entry.retries = false;
        let done = self.go_back(&path, &mut entry, &rollback);
        let done = done.unwrap_or_else(|| Err("it is as it was".into()));
        let done = done.map_err(|failed| {
            entry.stays(earlier.as_ref());
            match kept.set_rollback(&stem, earlier.as_ref()) {
                Ok(()) => failed,
                Err(error) => format!("{failed}; and it can't be remembered: {error}"),
            }
        });
        self.files.insert(path, entry);
        done
    }

    /// Returns the only file of this name or service.
    fn path_of(&self, name: &str, version: Option<Version>) -> Result<PathBuf, ChangeError> {
        let wanted = FileName {
            name: name.to_owned(),
            version,
        };
        let named = |path: &Path| FileName::parse(path).is_ok_and(|file| file == wanted);
        let served = |entry: &Entry| {
            entry.service.as_ref().is_some_and(|service| {
                service.description.name == name
                    && version.is_none_or(|v| v == service.description.version)
            })
        };
        let mut paths: Vec<_> = self
            .files
            .iter()
            .filter(|(path, entry)| named(path) || served(entry))
            .map(|(p, _)| p)
            .collect();
        paths.dedup();
        match paths.as_slice() {
            [] => Err(format!(
                "no service {name}{}",
                version.map(|v| format!(" {v}")).unwrap_or_default()
            )),
            [path] => Ok((*path).clone()),
            _ => Err(format!("there are several versions of {name}; name one")),
        }
    }

    /// Undoes a rollback: serves the file in the folder again.
    pub(super) fn undo_rollback(
        &mut self,
        name: &str,
        version: Option<Version>,
    ) -> Result<String, ChangeError> {
        let path = self.path_of(name, version)?;
        let stem = stem(&path);
        let kept = self.last_known_good.clone();
        let (kept, rollback) = kept
            .and_then(|kept| kept.rollback(&stem).map(|rollback| (kept, rollback)))
            .ok_or_else(|| format!("{name} was not rolled back, so there is nothing to undo"))?;
        self.generation += 1;
        let mut entry = self.files.remove(&path).ok_or("it was removed meanwhile")?;
        let done = self.settle(&path, &mut entry, true).unwrap_or_else(|| {
            let known = entry.error.clone();
            Err(known.unwrap_or_else(|| "the file ends too early".into()))
        });
        if done.is_err() {
            entry.stays(Some(&rollback));
        }
        self.files.insert(path, entry);
        let done = done?;
        match kept.rollback(&stem) {
            None => Ok(done),
            Some(_) => Err(format!(
                "{done}; but that can't be remembered in state_dir, so the next start goes back again"
            )),
        }
    }

    /// Serves the file that a rollback names. Where that fails, the rollback
    /// holds: what the operator went back from is not served instead.
    fn go_back(&self, path: &Path, entry: &mut Entry, rollback: &Rollback) -> Option<Change> {
        let stem = stem(path);
        let files = self
            .last_known_good
            .iter()
            .flat_map(|kept| kept.files(&stem));
        let found = files
            .into_iter()
            .find(|file| file.digest == rollback.served);
        let failed = |problem: &dyn std::fmt::Display, may_pass| FileError::Kept {
            problem: format!(
                "{problem}; while the rollback holds, mb-server service rollback {stem} --undo serves the file in the \
                 folder"
            ),
            may_pass,
        };
        let loaded = match found {
            Some(file) => self
                .load_last_known_good(path, &file.path, &file.digest)
                .map_err(|error| {
                    let problem = format!("the earlier file {}: {error}", file.path.display());
                    failed(&problem, error.may_pass())
                }),
            None => Err(failed(&"the earlier file is no longer kept", false)),
        };
        match loaded {
            Ok(service) => {
                let what = self.serve(path, entry, service, Source::RolledBack);
                entry.rolled_back_from = Some(rollback.refused.clone());
                tracing::warn!(
                    "{} is not served, because the operator rolled it back; mb-server service rollback --undo serves it",
                    path.display()
                );
                Some(Ok(format!("{what}, as it was before the present file")))
            }
            Err(error) => self.refuse(path, entry, &error),
        }
    }

    /// What a file would be loaded with.
    pub(super) fn to_load(&self) -> (Arc<Sandbox>, LoadSettings) {
        (Arc::clone(&self.sandbox), self.settings.clone())
    }

    /// Digest of what is served of a file.
    pub(super) fn served(&self, path: &Path) -> Option<&str> {
        let service = self.files.get(path)?.service.as_ref()?;
        Some(&service.digest)
    }

    /// Checks that a file with this digest may take the place of another one,
    /// and that the way back is open.
    pub(super) fn replacement(
        &self,
        path: &Path,
        digest: &str,
    ) -> Result<Replacement, ChangeError> {
        let stem = stem(path);
        let kept = self.last_known_good.as_ref().ok_or(
            "last-known-good files are not kept, so there would be no way back; set state_dir to a folder that can be written",
        )?;
        if kept
            .rollback(&stem)
            .is_some_and(|rollback| rollback.refused == digest)
        {
            return Err(format!(
                "the operator went back from this very file; mb-server service rollback {stem} --undo serves it again"
            ));
        }
        let before = self.served(path);
        if before.is_none() && fs::symlink_metadata(path).is_ok_and(|found| !found.is_dir()) {
            return Err(format!(
                "{} is there and is not served, so it would be lost; mb-server status says why, remove or mend it",
                path.display()
            ));
        }
        if before.is_some_and(|before| !kept.has(&stem, before)) {
            return Err(format!(
                "what is served of {} is not kept, so there would be no way back; copy it there again",
                path.display()
            ));
        }
        let machine = path.with_extension(ENDINGS[1]);
        if fs::symlink_metadata(&machine).is_ok() {
            return Err(format!(
                "{} is there, and only one of both is served; remove it",
                machine.display()
            ));
        }
        Ok(Replacement {
            path: path.to_owned(),
            digest: digest.to_owned(),
            before: before.map(str::to_owned),
            is_new: !kept.has(&stem, digest),
        })
    }

    /// Puts the last-known-good file with this digest into the folder again; none
    /// removes what is there. No rollback finds the `undone` file afterwards,
    /// unless it was kept before.
    pub(super) fn restore(&mut self, undone: &Replacement) -> Result<String, ChangeError> {
        let Replacement { path, digest, .. } = undone;
        let restored = self.serve_earlier(path, undone.before.as_deref())?;
        if undone.is_new
            && let Some(kept) = &self.last_known_good
            && let Err(error) = kept.forget(&stem(path), digest)
        {
            tracing::warn!("{}: what was undone is still kept: {error}", path.display());
        }
        Ok(restored)
    }

    fn serve_earlier(&mut self, path: &Path, before: Option<&str>) -> Result<String, ChangeError> {
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let Some(before) = before else {
            remove(path).map_err(|error| failed(&error))?;
            self.files.remove(path);
            let removed = format!("{} was removed", path.display());
            tracing::info!("{removed}");
            return Ok(removed);
        };
        if is_in_place(path, before) {
            return self.settle_now(path);
        }
        let files = self
            .last_known_good
            .as_ref()
            .map(|kept| kept.files(&stem(path)));
        let file = files
            .into_iter()
            .flatten()
            .find(|file| file.digest == before);
        let file = file.ok_or_else(|| failed(&"the earlier file is no longer kept"))?;
        let code = read_code(&file.path).map_err(|error| failed(&error))?;
        if digest_of(code.bytes()) != before {
            return Err(failed(&"the earlier file was changed where it was kept"));
        }
        files::replace(path, files::ORDINARY, code.bytes()).map_err(|error| failed(&error))?;
        self.settle_now(path)
    }

    /// Loads a file that is known to be whole.
    pub(super) fn settle_now(&mut self, path: &Path) -> Result<String, ChangeError> {
        self.generation += 1;
        let stamp = Stamp::of(path).ok();
        let mut entry = self.files.remove(path).unwrap_or_else(|| Entry::new(stamp));
        entry.change(stamp);
        let change = self.settle(path, &mut entry, false);
        self.files.insert(path.to_owned(), entry);
        change.unwrap_or_else(|| Ok(format!("{} is as it was", path.display())))
    }

    fn forget_rollback(&self, stem: &str) {
        if let Some(kept) = &self.last_known_good
            && let Err(error) = kept.set_rollback(stem, None)
        {
            tracing::warn!("the rollback of {stem} can't be forgotten: {error}");
        }
    }

    /// Enables or disables a service, or one version of it.
    pub(super) fn switch(
        &mut self,
        name: &str,
        version: Option<Version>,
        on: bool,
    ) -> Result<String, ChangeError> {
        let known = self
            .files
            .values()
            .filter_map(|entry| entry.service.as_ref())
            .any(|service| {
                service.description.name == name
                    && version.is_none_or(|version| version == service.description.version)
            });
        if !known {
            return Err(format!(
                "no service {name}{}",
                version.map(|v| format!(" {v}")).unwrap_or_default()
            ));
        }
        if version.is_none() {
            self.switched.retain(|(switched, _), _| switched != name);
        }
        self.switched.insert((name.to_owned(), version), on);
        let what = version.map_or_else(
            || format!("service {name}"),
            |version| format!("{name} {version}"),
        );
        let done = format!("{what} is {}", if on { "enabled" } else { "disabled" });
        tracing::warn!("{done} by the operator");
        Ok(done)
    }

    /// Takes other settings, and reloads what they concern.
    pub(super) fn set_policy(&mut self, config: &Config) -> Result<Vec<String>, ChangeError> {
        let policy = self.settings.policy.renewed(config)?;
        self.sandbox.fits_pool(policy.largest_instance())?;
        // What can't be read now would leave nothing to serve.
        let paths = self
            .list()
            .map_err(|error| format!("the services folder: {error}"))?;
        let before = std::mem::replace(&mut self.settings.policy, policy.clone());
        for (path, entry) in &mut self.files {
            let name = FileName::parse(path)
                .map(|file| file.name)
                .unwrap_or_default();
            if entry.service.is_none() || before.settings(&name) != policy.settings(&name) {
                entry.settled = false;
                let served = entry.service.take();
                let counted =
                    served.map(|service| (service.description.version, Arc::clone(&service.stats)));
                entry.counted = counted.or(entry.counted.take());
            }
        }
        Ok(self.take_in(paths, ScanMode::Now))
    }

    /// Loads the files that were left for later, once the others are served.
    pub(super) fn loaded(&self) {
        let waiting = self
            .files
            .iter()
            .filter(|(_, entry)| !entry.settled && entry.error.is_none())
            .filter_map(|(path, _)| FileName::parse(path).ok());
        self.loading.set(waiting.collect());
    }

    pub(super) fn assemble(&self) -> Catalog {
        let disabled = |service: &Service| {
            let (name, version) = (&service.description.name, service.description.version);
            let switched = [Some(version), None]
                .into_iter()
                .find_map(|version| self.switched.get(&(name.clone(), version)));
            switched.map_or_else(|| self.settings.policy.is_disabled(name, version), |on| !on)
        };
        Catalog::assemble(&self.files, &self.loading, disabled)
    }
}

/// Whether the folder has the file with this digest.
pub(super) fn is_in_place(path: &Path, digest: &str) -> bool {
    read_bounded(path).is_ok_and(|bytes| digest_of(&bytes) == digest)
}

/// The name of a file without its ending.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_folder_is_doubted_for_a_while() {
        let (mut empty_folder, begun) = (EmptyFolder::default(), Instant::now());
        let mut look = |is_empty, seconds| {
            empty_folder.applies(is_empty, begun + Duration::from_secs_f64(seconds))
        };
        assert!(!look(false, 0.0));
        assert!(look(true, 100.0), "the first look never counts");
        assert!(look(true, 109.9));
        assert!(!look(false, 109.95), "mounted again");
        assert!(look(true, 110.0));
        assert!(!look(true, 120.0));
        assert!(!look(true, 121.0));
    }
}
