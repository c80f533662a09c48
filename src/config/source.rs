//! Where the settings come from, and what is said when one is wrong.

use std::{fs::File, path::Path};

use figment::{
    Figment, Metadata, Profile, Provider, Source,
    error::Kind,
    providers::{Env, Format, Serialized, Toml},
    value::{Dict, Map, Value},
};

use super::{Config, services::DEFAULT};
use crate::files;

/// Environment variables that begin with this are settings.
const ENV_PREFIX: &str = "MB_";
/// Longest configuration file, in bytes.
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// Opening brackets in the value of an environment variable.
const MAX_BRACKETS: usize = 256;
/// Names the file, so it is no setting in it.
const ENV_CONFIG: &str = "config";

/// The effective settings, and where each comes from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// One row per setting, in the order of their keys.
    pub rows: Vec<Row>,
}

/// One effective setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Levels joined by dots.
    pub key: String,
    /// As TOML would have it.
    pub value: String,
    /// `default`, a file, a variable or a flag.
    pub source: String,
}

/// Joins all sources and checks the result.
///
/// # Errors
/// A file that can't be read, a key that is unknown, a value of the wrong
/// kind or out of bounds; all of those that can be found at once.
pub fn load(file: Option<&Path>, flags: Flags) -> Result<Loaded, ConfigError> {
    load_over(Config::default(), file, flags)
}

/// The same with other defaults.
///
/// # Errors
/// See [`load`].
pub fn load_over(
    defaults: Config,
    file: Option<&Path>,
    flags: Flags,
) -> Result<Loaded, ConfigError> {
    for (name, value) in std::env::vars_os() {
        let is_setting = name.as_encoded_bytes().starts_with(ENV_PREFIX.as_bytes());
        let opens = |byte: &&u8| matches!(byte, b'[' | b'{');
        // figment's parser recurses for each, and would use up the stack.
        if is_setting && value.as_encoded_bytes().iter().filter(opens).count() > MAX_BRACKETS {
            let name = name.display();
            return Err(ConfigError {
                lines: vec![format!(
                    "environment variable {name}: more than {MAX_BRACKETS} brackets; use the configuration file"
                )],
            });
        }
    }
    load_from(
        defaults,
        file,
        Env::prefixed(ENV_PREFIX).ignore(&[ENV_CONFIG]).split("__"),
        flags,
    )
}

fn load_from(
    defaults: Config,
    file: Option<&Path>,
    environment: impl Provider,
    flags: Flags,
) -> Result<Loaded, ConfigError> {
    let mut figment = Figment::from(Serialized::defaults(defaults));
    if let Some(path) = file {
        figment = figment.merge(TomlFile::read(path)?);
    }
    let figment = figment.merge(environment).merge(flags);
    let written: Config = figment
        .extract()
        .map_err(|e| ConfigError::unreadable(&figment, e))?;
    let wrong = written.out_of_bounds();
    if !wrong.is_empty() {
        let lines = wrong.into_iter().map(|w| {
            format!(
                "`{}` {} (set by {})",
                w.key,
                w.problem,
                source(&figment, &w.key)
            )
        });
        return Err(ConfigError {
            lines: lines.collect(),
        });
    }
    let rows = rows(&figment);
    let config = with_defaults_of_services(figment)
        .extract()
        .map_err(|e| ConfigError {
            lines: vec![e.to_string()],
        })?;
    Ok(Loaded { config, rows })
}

/// Joins `[services.default]` into the tables of services, which leave out what
/// it says. Sources are not found in there any more.
fn with_defaults_of_services(figment: Figment) -> Figment {
    let services = figment
        .extract_inner::<Dict>("services")
        .unwrap_or_default();
    let Some(default) = services.get(DEFAULT) else {
        return figment;
    };
    let tables: Dict = services
        .keys()
        .map(|name| (name.clone(), default.clone()))
        .collect();
    figment.join(Serialized::default("services", tables))
}

fn rows(figment: &Figment) -> Vec<Row> {
    let mut rows = Vec::new();
    for values in figment.data().unwrap_or_default().values() {
        collect_rows(figment, values, "", &mut rows);
    }
    rows.sort_by(|one: &Row, other| one.key.cmp(&other.key));
    rows
}

fn collect_rows(figment: &Figment, values: &Dict, prefix: &str, rows: &mut Vec<Row>) {
    for (name, value) in values {
        let key = format!("{prefix}{name}");
        match value {
            Value::Dict(_, inner) => collect_rows(figment, inner, &format!("{key}."), rows),
            value => rows.push(Row {
                source: figment
                    .get_metadata(value.tag())
                    .map_or_else(|| "default".into(), |found| name_source(found, &key)),
                // JSON writes texts, numbers, lists and truths as TOML does.
                value: serde_json::to_string(value).unwrap_or_default(),
                key,
            }),
        }
    }
}

/// Where the value of a key comes from, in words; of an entry of a list, where
/// the list does.
fn source(figment: &Figment, key: &str) -> String {
    std::iter::successors(Some(key), |key| Some(key.rsplit_once('.')?.0))
        .find_map(|key| Some(name_source(figment.find_metadata(key)?, key)))
        .unwrap_or_else(|| "default".into())
}

fn name_source(metadata: &Metadata, key: &str) -> String {
    let levels: Vec<_> = key.split('.').collect();
    match &metadata.source {
        Some(Source::File(path)) => path.display().to_string(),
        _ if metadata.name.contains("environment") => {
            format!(
                "environment variable {ENV_PREFIX}{}",
                levels.join("__").to_uppercase()
            )
        }
        _ if metadata.name == Flags::NAME => format!("flag {}", Flags::flag(key)),
        _ => "default".into(),
    }
}

/// The configuration file, read within a bound.
struct TomlFile<'a> {
    path: &'a Path,
    text: String,
}

impl<'a> TomlFile<'a> {
    fn read(path: &'a Path) -> Result<Self, ConfigError> {
        let text = File::open(path).and_then(|file| files::read_text(file, MAX_FILE));
        let text = text.map_err(|error| ConfigError::file(path, &error))?;
        Ok(Self { path, text })
    }
}

impl Provider for TomlFile<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::from("TOML file", self.path)
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Toml::string(&self.text).data()
    }
}

/// Settings given on the command line.
#[derive(Debug, Clone, Default)]
pub struct Flags(Dict);

impl Flags {
    const NAME: &'static str = "command line";

    /// Adds a setting, if the flag was given. Levels of the key are joined by
    /// dots.
    #[must_use]
    pub fn with<T: Into<Value>>(mut self, key: &str, value: Option<T>) -> Self {
        if let Some(value) = value {
            match key.split_once('.') {
                None => drop(self.0.insert(key.into(), value.into())),
                Some((table, key)) => {
                    let entry = self
                        .0
                        .entry(table.into())
                        .or_insert_with(|| Dict::new().into());
                    if let Value::Dict(_, inner) = entry {
                        inner.insert(key.into(), value.into());
                    }
                }
            }
        }
        self
    }

    /// The flag that sets a key.
    fn flag(key: &str) -> String {
        match key {
            "services_dir" => "--services".into(),
            key => format!("--{}", key.replace(['.', '_'], "-")),
        }
    }
}

impl Provider for Flags {
    fn metadata(&self) -> Metadata {
        Metadata::named(Self::NAME)
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.0.clone()))
    }
}

/// Why there is no configuration to start with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .lines.join("\n"))]
pub struct ConfigError {
    lines: Vec<String>,
}

impl ConfigError {
    fn file(path: &Path, error: &std::io::Error) -> Self {
        Self {
            lines: vec![format!("configuration file {}: {error}", path.display())],
        }
    }

    fn unreadable(figment: &Figment, errors: figment::Error) -> Self {
        Self {
            lines: errors
                .into_iter()
                .map(|error| describe(figment, &error))
                .collect(),
        }
    }
}

/// One line for one of figment's errors: the key, its source, what is allowed.
fn describe(figment: &Figment, error: &figment::Error) -> String {
    let mut levels = error.path.clone();
    if let Kind::UnknownField(name, known) = &error.kind {
        if levels.last() != Some(name) {
            levels.push(name.clone());
        }
        let key = levels.join(".");
        return format!(
            "unknown setting `{key}` (set by {}); known here are {}",
            source(figment, &key),
            known.join(", ")
        );
    }
    let key = levels.join(".");
    // Where a value was read in two steps, the error does not name its source.
    let origin = match &error.metadata {
        Some(metadata) if key.is_empty() => name_source(metadata, &key),
        _ => source(figment, &key),
    };
    match &error.kind {
        Kind::UnknownVariant(found, known) => format!(
            "`{key}`: `{found}` is not known (set by {origin}); known are {}",
            known.join(", ")
        ),
        Kind::Message(message) if key.is_empty() => format!("{origin}: {message}"),
        kind => format!("`{key}`: {kind} (set by {origin})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Bytes, LogLevel, services::settings_of};

    /// Stands for the environment, under the metadata that figment gives it.
    struct Environment(Vec<(&'static str, &'static str)>);

    impl Provider for Environment {
        fn metadata(&self) -> Metadata {
            Metadata::named("`MB_` environment variable(s)")
        }

        fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
            let mut flags = Flags::default();
            for (key, value) in &self.0 {
                let value: Value = value.parse().expect("values always parse");
                flags = flags.with(key, Some(value));
            }
            flags.data()
        }
    }

    fn try_load(
        toml: &str,
        environment: &[(&'static str, &'static str)],
        flags: Flags,
    ) -> Result<Loaded, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, toml.as_bytes()).unwrap();
        let environment = Environment(environment.to_vec());
        let loaded = load_from(Config::default(), Some(file.path()), environment, flags);
        loaded.map_err(|e| {
            e.to_string()
                .replace(&file.path().display().to_string(), "FILE")
        })
    }

    #[test]
    fn later_sources_win() {
        let toml = "port = 1\nmax_threads = 20\nidle_timeout = 60000\n[admin]\nport = 3";
        let flags = Flags::default()
            .with("port", Some(7))
            .with("admin.port", None::<u16>);
        let loaded = try_load(
            toml,
            &[("port", "5"), ("admin.port", "6"), ("read_timeout", "2s")],
            flags,
        )
        .unwrap();
        let config = &loaded.config;
        assert_eq!(
            (config.port, config.max_threads, config.admin.port),
            (7, 20, 6)
        );
        assert_eq!(
            (config.idle_timeout, config.read_timeout),
            (
                Config::default().idle_timeout,
                super::super::Millis::secs(2)
            )
        );
        let source = |key: &str| {
            loaded
                .rows
                .iter()
                .find(|row| row.key == key)
                .unwrap()
                .source
                .clone()
        };
        assert_eq!(source("port"), "flag --port");
        assert_eq!(source("admin.port"), "environment variable MB_ADMIN__PORT");
        assert!(source("max_threads").starts_with('/'));
        assert_eq!(source("plain"), "default");
    }

    #[test]
    fn a_service_falls_back_to_the_default_table() {
        let toml = "services.default = { weight = 7, memory = \"2MiB\", grants.log = \"error\" }\n\
                    services.calc = { concurrency = 1, memory = \"1MiB\", grants.calls = [\"a.b\"] }";
        let loaded = try_load(toml, &[], Flags::default()).unwrap();
        let services = &loaded.config.services;
        let calc = settings_of(services, "calc");
        assert_eq!(
            (calc.weight, calc.concurrency, calc.memory),
            (7, 1, Some(Bytes::mib(1)))
        );
        assert_eq!(
            (calc.grants.log, &*calc.grants.calls),
            (LogLevel::Error, &["a.b".to_owned()][..])
        );
        let other = settings_of(services, "other");
        assert_eq!(
            (other.weight, other.concurrency, other.memory),
            (7, 64, Some(Bytes::mib(2)))
        );
        let is_shown = |key: &str| loaded.rows.iter().any(|row| row.key == key);
        assert!(is_shown("services.calc.memory") && !is_shown("services.calc.weight"));
        let wrong = "services.default.weight = 0\nservices.calc.concurrency = 1";
        let error = try_load(wrong, &[], Flags::default()).unwrap_err();
        assert_eq!(
            error,
            "`services.default.weight` is 0, allowed is 1 to 1000 (set by FILE)"
        );
    }

    #[test]
    fn hosts_may_be_several() {
        let loaded = try_load("host = [\"localhost\", \"::1\"]", &[], Flags::default()).unwrap();
        assert_eq!(loaded.config.host.as_slice(), ["localhost", "::1"]);
    }

    #[test]
    fn wrong_settings_are_named_with_their_source() {
        let check =
            |toml: &str, environment: &[(&'static str, &'static str)], expected: &[&str]| {
                let error = try_load(toml, environment, Flags::default()).unwrap_err();
                for part in expected {
                    assert!(error.contains(part), "{error:?} lacks {part:?}");
                }
            };
        check("prot = 1", &[], &["unknown setting `prot`", "FILE", "port"]);
        check(
            "[admin]\nprot = 1",
            &[],
            &["unknown setting `admin.prot`", "FILE", "allowed_hosts"],
        );
        check("", &[("prot", "1")], &["unknown setting `prot`", "MB_PROT"]);
        check("port = 99999", &[], &["`port`", "99999", "u16", "FILE"]);
        check("", &[("port", "no")], &["`port`", "no", "MB_PORT"]);
        check(
            "idle_timeout = \"soon\"",
            &[],
            &["`idle_timeout`", "soon", "60s", "FILE"],
        );
        check(
            "max_message_size = 1\nmax_threads = 0",
            &[],
            &[
                "`max_message_size` is 1B",
                "1KiB to 64MiB",
                "`max_threads` is 0",
            ],
        );
        check(
            "",
            &[("max_connections", "200000")],
            &[
                "`max_connections` is 200000",
                "0 to 100000",
                "MB_MAX_CONNECTIONS",
            ],
        );
        check("host = []", &[], &["`host` must be one or more"]);
        check(
            "[[listeners]]\nhost = \"::1\"",
            &[],
            &["`listeners.0.port` must be given", "FILE"],
        );
        check("port = [", &[], &["FILE"]);
        let missing = load(Some(Path::new("/nowhere/x.toml")), Flags::default()).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/x.toml"), "{missing}");
    }

    #[test]
    fn the_defaults_are_within_bounds_and_survive_a_round_trip() {
        assert_eq!(Config::default().out_of_bounds(), []);
        assert_eq!(
            try_load("", &[], Flags::default()).unwrap().config,
            Config::default()
        );
    }
}
