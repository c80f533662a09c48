//! What the operator grants one service, ready for use.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{
    budget::Rate,
    config::{Isolation, LogLevel, ServiceSettings, services::DEFAULT_QUOTA},
    files,
    log::Limiter,
    scheduler::Account,
    store::{Namespace, Store},
    trusted::{self, Purpose},
};

/// Lines a second that a service may write to the log.
const LINES_PER_SECOND: u32 = 1000;

/// Largest file of a secret, in bytes.
const MAX_SECRET: u64 = 64 * 1024;

/// The grants of one service, and the bounds of what it does with them.
pub struct Granted {
    pub(super) service: Box<str>,
    /// Who pays for its calls; none where nothing is scheduled.
    pub(super) account: Option<Arc<Account>>,
    pub(super) log: LogLevel,
    pub(super) log_rate: Option<Rate>,
    /// Bounds the lines that say how much was dropped: there may be one a call.
    pub(super) log_dropped: Limiter,
    /// None where neither values nor secrets are granted.
    pub(super) settings: Option<BTreeMap<String, String>>,
    pub(super) keyvalue: Option<Namespace>,
    /// Its instances remember what earlier calls did, so none of them may see
    /// what is not on the disk.
    pub(super) keeps_state: bool,
    /// Topics; empty where no calls are granted.
    pub(super) calls: Vec<String>,
    /// Imports are only looked at: everything may be linked.
    pub(super) inspected: bool,
}

impl Granted {
    /// Whether calls of the service wait for a run permit before they begin.
    #[inline]
    #[must_use]
    pub fn is_over_its_share(&self) -> bool {
        self.account
            .as_ref()
            .is_some_and(|account| account.is_over_share())
    }

    /// Processor time of all calls of the service.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        let account = self.account.as_ref();
        account.map_or(Duration::ZERO, |account| account.cpu())
    }

    /// What the settings grant to the file with this digest.
    ///
    /// # Errors
    /// If a secret can't be read, or the grants are for another file.
    pub fn new(
        service: &str,
        settings: &ServiceSettings,
        digest: &str,
        store: Option<&Arc<Store>>,
        account: Option<Arc<Account>>,
    ) -> Result<Arc<Self>, GrantError> {
        let grants = &settings.grants;
        if let Some(pinned) = grants
            .digest
            .as_ref()
            .filter(|pinned| !pinned.eq_ignore_ascii_case(digest))
        {
            return Err(GrantError::Digest {
                pinned: pinned.clone(),
                found: digest.into(),
            });
        }
        let mut values = grants.config.clone();
        for (key, file) in &grants.secrets {
            let error = |source| GrantError::Secret {
                key: key.clone(),
                file: file.clone(),
                error: source,
            };
            values.insert(key.clone(), read_secret(file).map_err(error)?);
        }
        let keyvalue = match (grants.keyvalue, store) {
            (Some(true), None) => return Err(GrantError::NoStore),
            (Some(true), Some(store)) => {
                Some(store.namespace(service, grants.quota.unwrap_or(DEFAULT_QUOTA).0 as u64))
            }
            (Some(false) | None, _) => None,
        };
        Ok(Arc::new(Self {
            service: service.into(),
            account,
            keeps_state: settings.isolation == Isolation::Shared,
            log: grants.log,
            log_rate: Rate::per_second(LINES_PER_SECOND),
            log_dropped: Limiter::new(),
            settings: (!values.is_empty()).then_some(values),
            keyvalue,
            calls: grants.calls.clone(),
            inspected: false,
        }))
    }

    /// For a component that is only looked at: it may import everything and
    /// use nothing.
    #[must_use]
    pub fn for_inspection(service: &str) -> Arc<Self> {
        Arc::new(Self {
            service: service.into(),
            account: None,
            keeps_state: false,
            log: LogLevel::Off,
            log_rate: None,
            log_dropped: Limiter::new(),
            settings: None,
            keyvalue: None,
            calls: Vec::new(),
            inspected: true,
        })
    }
}

impl Granted {
    /// Whether the service may call others.
    #[must_use]
    pub fn may_call(&self) -> bool {
        !self.calls.is_empty()
    }
}

/// A line feed at the end belongs to the file, not to the secret.
fn read_secret(file: &Path) -> Result<String, String> {
    let mut text = trusted::open(file, Purpose::Data)
        .and_then(|file| files::read_text(file, MAX_SECRET))
        .map_err(|error| error.to_string())?;
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    Ok(text)
}

/// Why a service does not get its grants, and so is not loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// They are for another file.
    #[error(
        "its grants are for a file with digest {pinned}, this one has {found}; if you trust it, set grants.digest to that"
    )]
    Digest {
        /// What the settings say.
        pinned: String,
        /// What the file has.
        found: String,
    },
    /// There is no store for durable values.
    #[error(
        "grants.keyvalue is set, but the store could not be opened; the log says why, state_dir says where"
    )]
    NoStore,
    /// A secret can't be read.
    #[error("secret {key} can't be read from {}: {error}", .file.display())]
    Secret {
        /// Its name.
        key: String,
        /// Its file.
        file: PathBuf,
        /// Why.
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::config::{Config, services::settings_of};

    #[test]
    fn a_pinned_digest_and_a_missing_secret_are_refused() {
        let mut settings = settings_of(&Config::default().services, "x");
        settings.grants.digest = Some("sha256:aa".into());
        assert!(Granted::new("x", &settings, "sha256:AA", None, None).is_ok());
        assert!(matches!(
            Granted::new("x", &settings, "sha256:ab", None, None),
            Err(GrantError::Digest { .. })
        ));
        settings.grants.digest = None;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        settings.grants.secrets.insert("key".into(), file.clone());
        assert!(matches!(
            Granted::new("x", &settings, "", None, None),
            Err(GrantError::Secret { .. })
        ));
        fs::write(&file, "s3cret\n").unwrap();
        let granted = Granted::new("x", &settings, "", None, None).unwrap();
        assert_eq!(granted.settings.as_ref().unwrap()["key"], "s3cret");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o707)).unwrap();
        let error = Granted::new("x", &settings, "", None, None).err().unwrap();
        assert!(error.to_string().contains("others"), "{error}");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&file, vec![b'x'; 70_000]).unwrap();
        assert!(matches!(
            Granted::new("x", &settings, "", None, None),
            Err(GrantError::Secret { .. })
        ));
    }
}
