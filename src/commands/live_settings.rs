//! The settings of a running server: read again when the operator asks,
//! applied where that is possible, and named where it is not.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};

use super::edge::{self, Edge};
use crate::{
    catalog::LiveCatalog,
    config::{DEFAULT_PRINCIPAL, Loaded, PrincipalSettings, Principals, Row},
    locks::lock,
    log,
    scheduler::Scheduler,
};

/// Reads the settings from where they came from.
pub(super) type ReadSettings = dyn Fn() -> Result<Loaded, String> + Send + Sync;

/// Settings that are applied while the server runs; all below those that end
/// in a dot.
const LIVE: [&str; 3] = ["log", "principals.", "services."];

/// The settings that hold, and how to read them again.
pub(super) struct LiveSettings {
    /// Held while they are read again, as long as loading services takes.
    reloading: Mutex<()>,
    /// Locked for a copy only: readers do not wait for a reload.
    current: Mutex<Current>,
    again: Box<ReadSettings>,
    catalog: Arc<LiveCatalog>,
    edge: Arc<Edge>,
    scheduler: Arc<Scheduler>,
}

struct Current {
    rows: Vec<Row>,
    /// Changed in their source, and not to be applied before the next start.
    waiting: Vec<String>,
}

/// What a reload came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Applied {
    /// Settings that hold now.
    pub(super) applied: Vec<String>,
    /// Settings that hold from the next start on.
    pub(super) waiting: Vec<String>,
    /// What that changed about services.
    services: Vec<String>,
}

impl Applied {
    pub(super) fn shown(&self) -> Value {
        json!({"applied": self.applied, "nextStart": self.waiting, "changes": self.services})
    }
}

impl LiveSettings {
    pub(super) fn new(
        loaded: Loaded,
        again: Box<ReadSettings>,
        catalog: Arc<LiveCatalog>,
        edge: Arc<Edge>,
        scheduler: Arc<Scheduler>,
    ) -> Self {
        let current = Mutex::new(Current {
            rows: loaded.rows,
            waiting: Vec::new(),
        });
        Self {
            reloading: Mutex::default(),
            current,
            again,
            catalog,
            edge,
            scheduler,
        }
    }

    /// The settings in effect, for the admin side.
    pub(super) fn shown(&self) -> Value {
        let current = lock(&self.current);
        json!({"settings": masked(&current.rows), "nextStart": current.waiting})
    }

    /// Reads them again and applies what can be applied.
    ///
    /// # Errors
    /// What is wrong with them; then nothing has changed.
    pub(super) fn reload(&self) -> Result<Applied, String> {
        let _alone = lock(&self.reloading);
        let Loaded { config, rows } = (self.again)()?;
        edge::check_exposure(&config).map_err(|(_, error)| error)?;
        let changed = differing(&lock(&self.current).rows, &rows);
        let (applied, waiting): (Vec<_>, Vec<_>) =
            changed.into_iter().partition(|key| is_live(key));
        let touches = |prefix: &str| applied.iter().any(|key| key.starts_with(prefix));
        // The only one that can fail comes first.
        let services = if touches("services.") {
            self.catalog.set_policy(&config)?
        } else {
            Vec::new()
        };
        if touches("principals.") {
            bound_principals(&self.scheduler, &config.principals);
            self.edge.access.set_principals(config.principals);
        }
        if applied.iter().any(|key| key == "log") {
            log::set_filter(&config.log)?;
        }
        self.edge.reload();
        let mut current = lock(&self.current);
        let keep = |row: &&Row| !is_live(&row.key);
        let live = rows.into_iter().filter(|row| is_live(&row.key));
        let mut merged: Vec<Row> = current
            .rows
            .iter()
            .filter(keep)
            .cloned()
            .chain(live)
            .collect();
        merged.sort_by(|a, b| a.key.cmp(&b.key));
        *current = Current {
            rows: merged,
            waiting: waiting.clone(),
        };
        drop(current);
        tracing::info!(
            target: log::AUDIT,
            security = "change",
            applied = applied.join(" "),
            next_start = waiting.join(" "),
            "settings were read again"
        );
        Ok(Applied {
            applied,
            waiting,
            services,
        })
    }
}

pub(super) fn is_live(key: &str) -> bool {
    LIVE.iter().any(|live| {
        if live.ends_with('.') {
            key.starts_with(live)
        } else {
            key == *live
        }
    })
}

/// Keys whose values are not the same on both sides.
fn differing(before: &[Row], after: &[Row]) -> BTreeSet<String> {
    let pairs = |rows: &[Row]| -> BTreeSet<(String, String)> {
        rows.iter()
            .map(|row| (row.key.clone(), row.value.clone()))
            .collect()
    };
    let (before, after) = (pairs(before), pairs(after));
    before
        .symmetric_difference(&after)
        .map(|(key, _)| key.clone())
        .collect()
}

/// Tells the scheduler what principals may use of the processors.
pub(super) fn bound_principals(scheduler: &Scheduler, principals: &Principals) {
    let own = principals
        .iter()
        .filter(|(name, _)| *name != DEFAULT_PRINCIPAL);
    let bound =
        |(name, settings): (&String, &PrincipalSettings)| (name.clone(), settings.cpu.bound());
    let others = principals.get(DEFAULT_PRINCIPAL);
    scheduler.set_principals(
        own.map(bound).collect(),
        others.and_then(|settings| settings.cpu.bound()),
    );
}

/// The settings for the admin side: what may be secret is masked.
fn masked(rows: &[Row]) -> Value {
    let is_secret = |key: &str| {
        let key = key.to_lowercase();
        key.contains(".grants.config.")
            || key.contains(".grants.secrets.")
            || ["secret", "password", "token"].iter().any(|word| {
                key.rsplit('.')
                    .next()
                    .is_some_and(|last| last.contains(word))
            })
    };
    rows.iter()
        .map(|Row { key, value, source }| {
            let value = if is_secret(key) { "***" } else { value };
            json!({"key": key, "value": value, "source": source})
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn what_has_changed_and_what_of_it_is_live() {
        let row = |key: &str, value: &str| Row {
            key: key.into(),
            value: value.into(),
            source: "default".into(),
        };
        let before = [
            row("max_threads", "1"),
            row("log", "a"),
            row("services.x.rate", "1"),
        ];
        let after = [
            row("max_threads", "2"),
            row("log", "a"),
            row("services.y.rate", "1"),
        ];
        let changed: Vec<_> = differing(&before, &after).into_iter().collect();
        assert_eq!(
            changed,
            ["max_threads", "services.x.rate", "services.y.rate"]
        );
        assert!(is_live("log") && is_live("services.x.rate") && is_live("principals.a.rights"));
        assert!(!is_live("log_format") && !is_live("max_threads") && !is_live("services_dir"));
    }

    #[test]
    fn what_is_live_is_a_setting() {
        let settings = serde_json::to_value(Config::default()).unwrap();
        for live in LIVE {
            let path = format!("/{}", live.trim_end_matches('.').replace('.', "/"));
            let setting = settings.pointer(&path);
            let is_table = setting.unwrap_or_else(|| panic!("{live}")).is_object();
            assert_eq!(is_table, live.ends_with('.'), "{live}");
        }
    }

    #[test]
    fn what_may_be_secret_is_masked() {
        let row = |key: &str| Row {
            key: key.into(),
            value: "\"v\"".into(),
            source: "default".into(),
        };
        let shown = masked(&[
            row("port"),
            row("services.a.grants.config.url"),
            row("services.a.grants.secrets.signing"),
            row("tokens"),
        ]);
        let values: Vec<_> = shown
            .as_array()
            .unwrap()
            .iter()
            .map(|row| row["value"].as_str().unwrap())
            .collect();
        assert_eq!(values, ["\"v\"", "***", "***", "***"]);
    }
}
