//! The catalog of a running server: swapped as a whole when everything about a
//! change is decided.
//!
//! Loading happens under a lock of its own, on the thread of the caller
//! for changes. The wire side reads the current catalog and never waits.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};

use super::{
    Catalog, LoadSettings,
    loader::{ChangeError, Loader, Replacement, ScanMode, is_in_place},
};
use crate::{config::Config, files::Unfinished, locks::lock, sandbox::Sandbox, wire::Version};

/// The current catalog, and the loader that it comes from.
pub struct LiveCatalog {
    current: Arc<ArcSwap<Catalog>>,
    loader: Mutex<Loader>,
    /// Why the last scan of the folder failed.
    folder_error: ArcSwapOption<String>,
}

impl LiveCatalog {
    /// Loads the folder, and keeps last-known-good files under `state_dir`, if
    /// it can.
    ///
    /// # Errors
    /// If the folder of components can't be read.
    pub fn load(
        sandbox: &Arc<Sandbox>,
        settings: LoadSettings,
        state_dir: &Path,
    ) -> io::Result<Arc<Self>> {
        let mut loader = Loader::new(sandbox, settings, state_dir);
        loader.scan(ScanMode::Now)?;
        let current = Arc::new(ArcSwap::from_pointee(loader.assemble()));
        loader.loaded();
        Ok(Arc::new(Self {
            current,
            loader: Mutex::new(loader),
            folder_error: ArcSwapOption::empty(),
        }))
    }

    /// Returns why the last scan of the folder failed, so that what was loaded
    /// before is still served; none if it succeeded.
    #[must_use]
    pub fn folder_error(&self) -> Option<String> {
        self.folder_error.load().as_deref().cloned()
    }

    /// Returns the shared catalog, for a reader of each request.
    #[must_use]
    pub fn shared(&self) -> Arc<ArcSwap<Catalog>> {
        Arc::clone(&self.current)
    }

    /// Returns the current catalog.
    pub fn current(&self) -> Guard<Arc<Catalog>> {
        self.current.load()
    }

    /// Looks for changes now, by the contents of the files. Returns what
    /// changed.
    ///
    /// # Errors
    /// If the folder can't be read, or all its files are gone at once.
    pub fn reload(&self) -> io::Result<Vec<String>> {
        self.look(ScanMode::Reread)
    }

    /// Looks for changes from a thread of its own, until the process ends.
    ///
    /// # Errors
    /// If the thread can't be started.
    pub fn watch(self: &Arc<Self>, interval: Duration) -> io::Result<()> {
        let live = Arc::downgrade(self);
        let follow = move || {
            loop {
                thread::sleep(interval);
                let Some(live) = live.upgrade() else { return };
                // A failure is logged when it begins, a defect by the hook. The
                // folder is followed whatever one look has met.
                let _ = catch_unwind(AssertUnwindSafe(|| live.look(ScanMode::Watch)));
            }
        };
        thread::Builder::new()
            .name("mb-watcher".into())
            .spawn(follow)
            .map(drop)
    }

    /// Goes back to the last-known-good file before the one that is served.
    ///
    /// # Errors
    /// Says why there is none.
    pub fn rollback(&self, name: &str, version: Option<Version>) -> Result<String, ChangeError> {
        self.change(|loader| loader.rollback(name, version))
    }

    /// Serves the file in the folder again that [`Self::rollback`] went back
    /// from.
    ///
    /// # Errors
    /// Says why not; nothing has changed then.
    pub fn undo_rollback(
        &self,
        name: &str,
        version: Option<Version>,
    ) -> Result<String, ChangeError> {
        self.change(|loader| loader.undo_rollback(name, version))
    }

    /// Enables or disables a service, or one version of it, until the next
    /// start.
    ///
    /// # Errors
    /// If there is no such service.
    pub fn switch(
        &self,
        name: &str,
        version: Option<Version>,
        on: bool,
    ) -> Result<String, ChangeError> {
        self.change(|loader| loader.switch(name, version, on))
    }

    /// What a file would be loaded with now.
    pub(super) fn to_load(&self) -> (Arc<Sandbox>, LoadSettings) {
        lock(&self.loader).to_load()
    }

    /// What it takes to serve a file with this digest, and to go back.
    ///
    /// # Errors
    /// Says why that can't be.
    pub(super) fn replacement(
        &self,
        path: &Path,
        digest: &str,
    ) -> Result<Replacement, ChangeError> {
        lock(&self.loader).replacement(path, digest)
    }

    /// Serves a file; where that fails, what was served before is served again.
    ///
    /// # Errors
    /// Says why it is not served.
    pub(super) fn put(
        &self,
        replacement: &Replacement,
        file: Unfinished,
    ) -> Result<String, ChangeError> {
        let Replacement { path, digest, .. } = replacement;
        let mut loader = lock(&self.loader);
        if loader.replacement(path, digest)? != *replacement {
            return Err(
                "what is served has changed since this was checked; deploy it again".into(),
            );
        }
        let done = match file.replace() {
            Ok(()) => loader.settle_now(path),
            Err(error) => {
                let error = format!("{}: {error}", path.display());
                // It may come after the file has its name.
                if !is_in_place(path, digest) {
                    return Err(error);
                }
                Err(error)
            }
        };
        self.swap(&loader);
        let refused = match done {
            Ok(done) if self.serves(path, digest) => {
                let disabled = match self.current().is_disabled(path) {
                    true => "; it is disabled, so nobody can call it: mb-server service enable",
                    false => "",
                };
                return Ok(done + disabled);
            }
            Ok(_) => "another file has its name and version".into(),
            Err(error) => error,
        };
        let restored = loader.restore(replacement);
        self.swap(&loader);
        Err(match restored {
            Ok(_) => format!("{refused}; what was served before is served again"),
            Err(error) => format!("{refused}; and what was served before is not served: {error}"),
        })
    }

    /// Serves again what was served before such a file.
    ///
    /// # Errors
    /// Says why not.
    pub(super) fn restore(&self, undone: &Replacement) -> Result<String, ChangeError> {
        let mut loader = lock(&self.loader);
        if loader.served(&undone.path) != Some(&undone.digest) {
            return Err(
                "what is served has changed since it was deployed; nothing is undone".into(),
            );
        }
        let restored = loader.restore(undone);
        self.swap(&loader);
        restored
    }

    fn serves(&self, path: &Path, digest: &str) -> bool {
        let current = self.current();
        current
            .all()
            .any(|service| service.file == path && service.digest == digest)
    }

    /// Replaces the settings. A service that they concern is loaded again; if
    /// that fails, it is not served, since its earlier grants may have been
    /// withdrawn.
    ///
    /// # Errors
    /// If they need what is fixed at the start; nothing has changed then.
    pub fn set_policy(&self, config: &Config) -> Result<Vec<String>, ChangeError> {
        let changes = self.change(|loader| loader.set_policy(config))?;
        lock(&self.loader).loaded();
        Ok(changes)
    }

    /// Has what is decided under the loader's lock served in one step.
    fn change<T>(
        &self,
        decide: impl FnOnce(&mut Loader) -> Result<T, ChangeError>,
    ) -> Result<T, ChangeError> {
        let mut loader = lock(&self.loader);
        let done = decide(&mut loader);
        // One that failed may have been tried with what is served.
        self.swap(&loader);
        done
    }

    fn look(&self, how: ScanMode) -> io::Result<Vec<String>> {
        let mut loader = lock(&self.loader);
        let scanned = loader.scan(how);
        let folder_error = scanned.as_ref().err().map(ToString::to_string);
        if let Some(folder_error) = &folder_error
            && self.folder_error.load().as_deref() != Some(folder_error)
        {
            tracing::warn!("the services folder: {folder_error}; what was loaded is still served");
        }
        if folder_error.is_none() && self.folder_error.load().is_some() {
            tracing::info!("the services folder can be read again");
        }
        self.folder_error.store(folder_error.map(Arc::new));
        let changes = scanned?;
        if !changes.is_empty() {
            self.swap(&loader);
        }
        loader.loaded();
        Ok(changes)
    }

    fn swap(&self, loader: &Loader) {
        self.current.store(Arc::new(loader.assemble()));
    }
}
