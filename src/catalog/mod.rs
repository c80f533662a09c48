//! From (service, version) to the component that serves it.

mod compat;
mod deploy;
mod description;
mod inputs;
mod last_known_good;
mod live;
mod load;
mod loader;
mod policy;
mod tree;
mod truncated;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

pub use compat::{breaks, may_break};
pub use deploy::{Deploys, Refusal, Verdict};
pub use description::{Action, Description, DescriptionError, SYSTEM, is_name};
pub use inputs::{Inputs, ValidationError};
pub use live::LiveCatalog;
pub(crate) use load::digest_of;
pub use load::{
    FileError, FileName, LoadSettings, MAX_SIZE, component_files, fingerprint, load_file,
};
use loader::Entry;
pub use loader::Source;
pub use policy::ServicePolicies;

use crate::{
    budget::Rate,
    locks::lock,
    log::Limiter,
    metrics::{ServiceStats, snapshot},
    sandbox::Component,
    wire::Version,
};

/// Longest text about a file that did not load, in bytes.
const MAX_ERROR_SIZE: usize = 2000;
/// What a text ends with that was cut.
const ELLIPSIS: &str = "…";

/// One version of a service, ready to be called.
pub struct Service {
    /// Its name, version and actions.
    pub description: Description,
    /// Where it came from.
    pub file: PathBuf,
    /// `sha256:` and the hexadecimal digest of the file.
    pub digest: String,
    /// Bytes of the file.
    pub size: u64,
    /// What runs.
    pub component: Component,
    /// Schemas that payloads are held against, if the operator asks for it.
    pub inputs: Option<Inputs>,
    /// What is counted.
    pub stats: Arc<ServiceStats>,
    /// How often clients may ask it.
    pub rate: Option<Rate>,
    /// Bounds the log lines about its failed calls: those of one service
    /// shall not hide those of another.
    pub failed_lines: Limiter,
}

/// A file of the folder that serves nobody.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The service that the file's name promises.
    pub name: String,
    /// The version that the file's name promises, if it does.
    pub version: Option<Version>,
    /// The file.
    pub file: PathBuf,
    /// Why, and what to do.
    pub error: String,
}

/// What a look-up finds.
pub enum Found<'a> {
    /// The highest version that is compatible with the one asked for.
    Service(&'a Arc<Service>),
    /// There is a file for it, but it did not load.
    Failed(&'a Failure),
    /// The operator has switched off whatever could serve it.
    Disabled,
    /// Only these versions, none of them compatible.
    OtherVersions(Vec<Version>),
    /// Nobody of this name.
    NoService,
}

/// A version of a service, and what the operator should know of it.
struct Listed {
    service: Arc<Service>,
    source: Source,
    /// Why the file, as it is now, is not what is served.
    error: Option<String>,
    /// Digest of the file as it is now, where the operator went back from it.
    rolled_back_from: Option<String>,
    disabled: bool,
}

/// All services of one folder at one time; never changed.
#[derive(Default)]
pub struct Catalog {
    /// Invariant: each list is sorted by version, highest first, without two
    /// of the same.
    services: BTreeMap<String, Vec<Listed>>,
    failures: Vec<Failure>,
    loading: Arc<Loading>,
}

/// What files promise that are being loaded: shared by a catalog with the one
/// that will take its place.
#[derive(Default)]
struct Loading(Mutex<Vec<FileName>>);

impl Loading {
    fn set(&self, files: Vec<FileName>) {
        *lock(&self.0) = files;
    }
}

impl Catalog {
    /// What the files make together.
    fn assemble(
        files: &BTreeMap<PathBuf, Entry>,
        loading: &Arc<Loading>,
        is_disabled: impl Fn(&Service) -> bool,
    ) -> Self {
        let mut catalog = Self {
            loading: Arc::clone(loading),
            ..Self::default()
        };
        let mut generations = BTreeMap::new();
        for (path, entry) in files {
            match (&entry.service, &entry.error) {
                (Some(service), error) => {
                    generations.insert(path.clone(), entry.generation);
                    let listed = Listed {
                        service: Arc::clone(service),
                        source: entry.source,
                        error: error.clone().map(capped),
                        rolled_back_from: entry.rolled_back_from.clone(),
                        disabled: is_disabled(service),
                    };
                    catalog
                        .services
                        .entry(service.description.name.clone())
                        .or_default()
                        .push(listed);
                }
                (None, Some(error)) => catalog.fail(path, capped(error.clone())),
                // A new file that may still be growing.
                (None, None) => {}
            }
        }
        catalog.refuse_duplicates(&generations);
        catalog.services.retain(|_, versions| !versions.is_empty());
        catalog
    }

    /// Finds who serves a request.
    #[must_use]
    pub fn find(&self, name: &str, asked: Version) -> Found<'_> {
        let versions = self.services.get(name).map_or(&[][..], Vec::as_slice);
        let compatible = || {
            versions
                .iter()
                .filter(|listed| listed.service.description.version.serves(asked))
        };
        if let Some(listed) = compatible().find(|listed| !listed.disabled) {
            return Found::Service(&listed.service);
        }
        if compatible().next().is_some() {
            return Found::Disabled;
        }
        // A file that failed might have been the one: nobody can tell.
        let might_serve = |failure: &&Failure| {
            failure.name == name && failure.version.is_none_or(|v| v.serves(asked))
        };
        match self.failures.iter().find(might_serve) {
            Some(failure) => Found::Failed(failure),
            None if versions.is_empty() && !self.failures.iter().any(|f| f.name == name) => {
                Found::NoService
            }
            None => Found::OtherVersions(
                versions
                    .iter()
                    .map(|listed| listed.service.description.version)
                    .collect(),
            ),
        }
    }

    /// Returns the highest version of a service that is loaded and not disabled.
    #[must_use]
    pub fn highest(&self, name: &str) -> Option<Version> {
        let versions = self.services.get(name)?.iter();
        versions
            .filter(|listed| !listed.disabled)
            .map(|listed| listed.service.description.version)
            .max()
    }

    /// Whether a file is being loaded that may serve a request: its name
    /// promises the service, and the version where it holds one.
    #[must_use]
    pub fn is_loading(&self, name: &str, asked: Version) -> bool {
        lock(&self.loading.0)
            .iter()
            .any(|file| file.name == name && file.version.is_none_or(|v| v.serves(asked)))
    }

    /// All services that are served, by name and then highest version first.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services
            .values()
            .flatten()
            .filter(|listed| !listed.disabled)
            .map(|listed| &listed.service)
    }

    /// All services that are loaded, switched off or not.
    fn all(&self) -> impl Iterator<Item = &Service> {
        self.services
            .values()
            .flatten()
            .map(|listed| &*listed.service)
    }

    /// Whether this file is loaded and what it serves is switched off.
    fn is_disabled(&self, path: &Path) -> bool {
        let mut listed = self.services.values().flatten();
        listed.any(|listed| listed.disabled && listed.service.file == path)
    }

    /// All versions of one service, switched off or not, highest first.
    pub fn versions(&self, name: &str) -> impl Iterator<Item = &Service> {
        self.services
            .get(name)
            .into_iter()
            .flatten()
            .map(|listed| &*listed.service)
    }

    /// Services whose file, as it is now, is not what is served; and why.
    pub fn outdated(&self) -> impl Iterator<Item = (&Service, &str)> {
        self.services
            .values()
            .flatten()
            .filter_map(|listed| Some((&*listed.service, listed.error.as_deref()?)))
    }

    /// The files that serve nobody.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// Rows for the admin side.
    #[must_use]
    pub fn snapshot(&self) -> Vec<snapshot::ServiceRow> {
        let loaded = self.services.values().flatten().map(service_row);
        let failed = self.failures.iter().map(failure_row);
        let mut rows: Vec<_> = loaded.chain(failed).collect();
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        rows
    }

    fn fail(&mut self, file: &Path, error: String) {
        let (name, version) = match FileName::parse(file) {
            Ok(FileName { name, version }) => (name, version),
            Err(_) => (
                file.file_stem()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                None,
            ),
        };
        self.failures.push(Failure {
            name,
            version,
            file: file.to_owned(),
            error,
        });
    }

    /// Two files that claim the same name and version: the one that was
    /// served before the other came stays; where they came together it can't
    /// be known which one the operator means, so neither serves.
    fn refuse_duplicates(&mut self, generations: &BTreeMap<PathBuf, u64>) {
        let mut refused = Vec::new();
        for versions in self.services.values_mut() {
            versions.sort_by_key(|listed| std::cmp::Reverse(listed.service.description.version));
            for same in versions
                .chunk_by(|a, b| a.service.description.version == b.service.description.version)
            {
                let [first, _, ..] = same else { continue };
                let Description { name, version, .. } = &first.service.description;
                let files: Vec<_> = same
                    .iter()
                    .map(|listed| listed.service.file.display().to_string())
                    .collect();
                let generation = |listed: &&Listed| generations.get(&listed.service.file);
                let oldest = same.iter().min_by_key(generation);
                let alone = same
                    .iter()
                    .filter(|listed| generation(listed) == oldest.as_ref().and_then(generation))
                    .count()
                    == 1;
                let kept = oldest
                    .filter(|_| alone)
                    .map(|listed| listed.service.file.clone());
                let outcome = match &kept {
                    Some(kept) => format!("{} is served as before", kept.display()),
                    None => "none of them is served".into(),
                };
                let error = capped(format!(
                    "{name} {version} is claimed by {}, so {outcome}; leave one of them",
                    files.join(" and by ")
                ));
                let others = same
                    .iter()
                    .map(|listed| listed.service.file.clone())
                    .filter(|file| Some(file) != kept.as_ref());
                refused.extend(others.map(|file| (file, error.clone())));
            }
            versions.retain(|listed| !refused.iter().any(|(file, _)| *file == listed.service.file));
        }
        for (file, error) in refused {
            tracing::error!("{} is not served: {error}", file.display());
            self.fail(&file, error);
        }
    }
}

/// Cuts a text that holds what an untrusted file says.
fn capped(mut text: String) -> String {
    if text.len() > MAX_ERROR_SIZE {
        text.truncate(text.floor_char_boundary(MAX_ERROR_SIZE - ELLIPSIS.len()));
        text += ELLIPSIS;
    }
    text
}

fn service_row(listed: &Listed) -> snapshot::ServiceRow {
    let Listed {
        service,
        source,
        error,
        rolled_back_from,
        disabled,
    } = listed;
    let Service {
        description,
        file,
        digest,
        size,
        component,
        inputs: _,
        stats,
        rate: _,
        failed_lines: _,
    } = &**service;
    let stats = stats.sum();
    let latency = stats.latency();
    let (verified_resets, reset_defects) = component.verified_resets();
    // In whole microseconds: a bucket is wider than that.
    let quantile =
        |share| (latency.quantile(share).unwrap_or_default().as_secs_f64() * 1e6).round() / 1e3;
    snapshot::ServiceRow {
        name: description.name.clone(),
        version: Some(description.version.to_string()),
        state: if *disabled { "disabled" } else { "loaded" },
        source: Some(source.as_str()),
        file: file.display().to_string(),
        digest: Some(digest.clone()),
        size: Some(*size),
        error: error.clone(),
        bytes_in: stats.bytes_in.get(),
        bytes_out: stats.bytes_out.get(),
        host_calls: stats.host_calls.get(),
        peak_memory: stats.peak_memory.get(),
        rolled_back_from: rolled_back_from.clone(),
        calls: stats.calls.get(),
        cpu_seconds: component.policy().granted.cpu().as_secs_f64(),
        failures: stats.failures.get(),
        errors: stats.errors.get(),
        instances: stats.instances.get(),
        fresh_reason: component.fresh_reason(),
        verified_resets,
        reset_defects,
        latency: latency.quantile(0.5).is_some().then(|| snapshot::Latency {
            p50_ms: quantile(0.5),
            p90_ms: quantile(0.9),
            p99_ms: quantile(0.99),
            p999_ms: quantile(0.999),
        }),
        buckets: latency.cumulative().collect(),
        durations: stats.by_outcome().into(),
        waits: stats.waiting(),
    }
}

fn failure_row(failure: &Failure) -> snapshot::ServiceRow {
    let Failure {
        name,
        version,
        file,
        error,
    } = failure;
    snapshot::ServiceRow {
        name: name.clone(),
        version: version.map(|version| version.to_string()),
        state: "failed",
        file: file.display().to_string(),
        error: Some(error.clone()),
        ..snapshot::ServiceRow::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(
            capped("x".repeat(MAX_ERROR_SIZE)),
            "x".repeat(MAX_ERROR_SIZE)
        );
        for shift in 0..2 {
            let cut = capped("x".repeat(shift) + &"é".repeat(MAX_ERROR_SIZE));
            assert!(
                cut.len() <= MAX_ERROR_SIZE
                    && cut.len() >= MAX_ERROR_SIZE - 2
                    && cut.ends_with("é…"),
                "{cut}"
            );
        }
    }
}
