//! Components that are deployed over the admin endpoint: checked and held
//! first, served by a second step, and undone by a third, so that several
//! servers can change together or not at all.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::{
    Catalog, LiveCatalog, breaks,
    description::Description,
    load::{FileName, MAX_SIZE, digest_of, load_code, read_code},
    loader::Replacement,
};
use crate::{
    files::{self, Unfinished},
    locks::lock,
    wire::Version,
};

/// How long a component is held that was checked.
const HELD_FOR: Duration = Duration::from_secs(120);

/// The deploys of a running server, one at a time.
pub struct Deploys {
    catalog: Arc<LiveCatalog>,
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The component that is being received or checked, if there is one.
    receiving: Option<String>,
    held: Option<Held>,
    /// The last one that was served.
    done: Option<Replacement>,
}

/// A component that was checked and waits to be served.
struct Held {
    replacement: Replacement,
    file: Unfinished,
    until: Instant,
}

impl Replacement {
    fn is(&self, stem: &str, digest: &str) -> bool {
        super::loader::stem(&self.path) == stem && self.digest == digest
    }
}

/// What the check of a component found.
#[derive(Debug)]
pub struct Verdict {
    /// What the component says of itself.
    pub name: String,
    /// The same.
    pub version: Version,
    /// `sha256:…`
    pub digest: String,
    /// Bytes of the file.
    pub size: u64,
    /// Version and digest of what it replaces.
    pub before: Option<(Version, String)>,
    /// What would break callers, a sentence each.
    pub breaks: Vec<String>,
    /// What the operator should know besides.
    pub warnings: Vec<String>,
}

/// Why a component is not held.
#[derive(Debug)]
pub struct Refusal {
    /// The reason, and what to do.
    pub error: String,
    /// What would break callers, where that is the reason.
    pub breaks: Vec<String>,
}

impl<E: std::fmt::Display> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self {
            error: error.to_string(),
            breaks: Vec::new(),
        }
    }
}

impl Deploys {
    /// None were begun yet.
    #[must_use]
    pub fn new(catalog: Arc<LiveCatalog>, dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            catalog,
            dir: dir.to_owned(),
            state: Mutex::default(),
        })
    }

    /// Receives the file of a component, checks it, and holds it until it is
    /// served or undone, for two minutes at most; or drops it if it was only
    /// to be checked.
    ///
    /// # Errors
    /// Says why it is refused; nothing has changed then.
    pub fn hold(
        &self,
        stem: &str,
        body: &mut dyn Read,
        force: bool,
        check: bool,
    ) -> Result<Verdict, Refusal> {
        let path = self.dir.join(format!("{stem}.wasm"));
        if path.parent() != Some(&self.dir) {
            return Err("the name of a file has no slash".into());
        }
        FileName::parse(&path)?;
        let _receiving = Receiving::begin(self, stem)?;
        // Another server of this folder may hold one as long as this may.
        files::remove_unfinished(&self.dir, 2 * HELD_FOR);
        let folder = |error: io::Error| {
            let dir = self.dir.display();
            format!("the services folder {dir} can't be written: {error}")
        };
        let mut file = Unfinished::create(&path, files::ORDINARY).map_err(folder)?;
        let copied = io::copy(&mut body.take(MAX_SIZE + 1), &mut file.file);
        copied.map_err(|error| format!("the file did not arrive: {error}"))?;
        file.file.sync_all().map_err(folder)?;
        let code = read_code(file.temporary())?;
        let digest = digest_of(code.bytes());
        let replacement = self.catalog.replacement(&path, &digest)?;
        let (sandbox, settings) = self.catalog.to_load();
        let service = load_code(&sandbox, &settings, &path, &code)?;
        let current = self.catalog.current();
        let Compared { breaks, warnings } = compare(&current, &path, &service.description)?;
        if !force && !breaks.is_empty() {
            let error = "it would break callers; give it a new major version and a file of its own, mend it, or --force it";
            return Err(Refusal {
                error: error.into(),
                breaks,
            });
        }
        let replaced = current.all().find(|service| service.file == path);
        let verdict = Verdict {
            name: service.description.name.clone(),
            version: service.description.version,
            digest: digest.clone(),
            size: service.size,
            before: replaced.map(|service| (service.description.version, service.digest.clone())),
            breaks,
            warnings,
        };
        if !check {
            let until = Instant::now() + HELD_FOR;
            let mut state = lock(&self.state);
            // What undoes this one must not undo an earlier one of the same file.
            state.done.take_if(|done| done.is(stem, &digest));
            state.held = Some(Held {
                replacement,
                file,
                until,
            });
        }
        Ok(verdict)
    }

    /// Serves what is held.
    ///
    /// # Errors
    /// Says why not; what was served before is served then.
    pub fn serve(&self, stem: &str, digest: &str) -> Result<String, String> {
        let held = lock(&self.state).take(stem, digest).ok_or(
            "this component is not held: it was not checked, or more than two minutes ago; deploy it again",
        )?;
        let Held {
            replacement, file, ..
        } = held;
        let done = self.catalog.put(&replacement, file)?;
        lock(&self.state).done = Some(replacement);
        Ok(done)
    }

    /// Drops what is held, or serves again what was served before it.
    ///
    /// # Errors
    /// Says why not; nothing has changed then.
    pub fn undo(&self, stem: &str, digest: &str) -> Result<String, String> {
        let mut state = lock(&self.state);
        if state.take(stem, digest).is_some() {
            return Ok("what was held is dropped".into());
        }
        let done = state.done.clone().filter(|done| done.is(stem, digest));
        drop(state);
        let done = done.ok_or("this component is not the last one that was deployed here; mb-server service rollback goes back")?;
        if done.before.as_deref() == Some(digest) {
            return Ok("it was served before, too".into());
        }
        let undone = self.catalog.restore(&done)?;
        lock(&self.state).done = None;
        Ok(undone)
    }

    /// Drops what was held for too long: nobody may come for it. Called once a
    /// minute, so its file goes within three minutes.
    pub fn expire(&self) {
        lock(&self.state).drop_expired();
    }

    /// Drops what is held: the server ends, and its folder is left as it was.
    pub fn end(&self) {
        lock(&self.state).held = None;
    }
}

impl State {
    fn drop_expired(&mut self) {
        self.held.take_if(|held| held.until <= Instant::now());
    }

    fn take(&mut self, stem: &str, digest: &str) -> Option<Held> {
        self.drop_expired();
        self.held.take_if(|held| held.replacement.is(stem, digest))
    }
}

/// The one deploy that is being received or checked; ends when dropped.
struct Receiving<'a>(&'a Deploys);

impl<'a> Receiving<'a> {
    fn begin(deploys: &'a Deploys, stem: &str) -> Result<Self, String> {
        let mut state = lock(&deploys.state);
        state.drop_expired();
        if let Some(other) = &state.receiving {
            return Err(format!("a deploy of {other} is in progress; try again"));
        }
        if let Some(Held {
            replacement, until, ..
        }) = &state.held
        {
            let seconds = until.saturating_duration_since(Instant::now()).as_secs() + 1;
            return Err(format!(
                "a deploy of {} is in progress and is held for {seconds} s at most; try again",
                super::loader::stem(&replacement.path)
            ));
        }
        state.receiving = Some(stem.to_owned());
        Ok(Self(deploys))
    }
}

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).receiving = None;
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Compared {
    breaks: Vec<String>,
    warnings: Vec<String>,
}

/// Compares what a file holds with what is loaded, as callers are routed once
/// it is served.
fn compare(catalog: &Catalog, path: &Path, new: &Description) -> Result<Compared, String> {
    let loaded: Vec<_> = catalog
        .versions(&new.name)
        .map(|service| (&service.description, service.file == path))
        .collect();
    if loaded
        .iter()
        .any(|(old, replaced)| !replaced && old.version == new.version)
    {
        return Err(format!(
            "another file has {} {} already; replace that one, or raise the version",
            new.name, new.version
        ));
    }
    let others: Vec<_> = loaded
        .iter()
        .filter(|(_, replaced)| !replaced)
        .map(|(old, _)| old.version)
        .collect();
    let mut compared = Compared::default();
    for (old, replaced) in loaded {
        // Its callers go to another file that stays.
        let elsewhere = others.iter().any(|other| {
            other.serves(old.version) && (*other > new.version || !new.version.serves(old.version))
        });
        if elsewhere {
            continue;
        }
        if new.version.serves(old.version) {
            let found = breaks(old, new).into_iter();
            compared
                .breaks
                .extend(found.map(|found| format!("for callers of {}: {found}", old.version)));
        } else if replaced && new.version < old.version {
            compared.breaks.push(format!(
                "callers of {} are not served by {}, which is older",
                old.version, new.version
            ));
        } else if replaced {
            compared.warnings.push(format!(
                "callers of {} are no longer served; a file called {}@{}.wasm beside it serves both",
                old.version, new.name, new.version
            ));
        }
    }
    Ok(compared)
}
