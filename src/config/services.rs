//! Settings of single services: `[services.NAME]` over `[services.default]`.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{Bounds, Bytes, Millis};

/// Quota of durable values where `grants.quota` names none.
pub const DEFAULT_QUOTA: Bytes = Bytes::mib(64);

/// The table that holds for every service.
pub const DEFAULT: &str = "default";

/// All `[services.…]` tables by name.
pub type Services = BTreeMap<String, Overlay>;

/// Settings of one service, each of which may be left out: then the one of
/// `[services.default]` holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Overlay {
    /// Longest a call may take, whatever its caller allows, 1 ms to 1 h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Millis>,
    /// Linear memory of one instance, all memories together, 64 KiB to 4 GiB;
    /// left out, 64 MiB or two thirds of what all calls share, if that is less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// Elements of all tables of an instance, 0 to 1,000,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table_elements: Option<usize>,
    /// Core instances in one component, 1 to 1,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instances: Option<usize>,
    /// Payload of an answer, 1 byte to 64 MiB; never more than
    /// `max_message_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer_size: Option<Bytes>,
    /// What one call of a host function may carry, 1 KiB to 64 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_data: Option<Bytes>,
    /// Handles of the host's resources that an instance holds, 1 to 100,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handles: Option<usize>,
    /// What one call may write to the log, 0 to 16 MiB; the rest is dropped
    /// and counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_bytes: Option<Bytes>,
    /// Lines that the service may write to the log in a second, all calls
    /// together, 0 to 1,000,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_lines: Option<usize>,
    /// Requests of clients to the service in a second, 0 to 10,000,000; 0 for
    /// no bound. A second's worth may come at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<u32>,
    /// Calls of the service at the same time, 1 to 10,000; one more waits for
    /// its turn until its deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<usize>,
    /// `request`: every call finds a fresh instance. `shared`: instances are
    /// used again, so one call may see what another left behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// With `isolation = "request"`: an instance that has answered is reset to
    /// what it was when it was made, and serves the next call, where that is
    /// possible. Without, every call gets a fresh instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reset: Option<bool>,
    /// Calls that an instance serves before it is replaced, 1 to
    /// 1,000,000,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_calls: Option<u64>,
    /// Tell callers the WebAssembly backtrace of a failed call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expose_traps: Option<bool>,
    /// Hold payloads against the input schema of their action before the call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validate: Option<bool>,
    /// `true`, or a list of versions: not served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled: Option<Disabled>,
    /// What the service may use beside processor and memory.
    #[serde(skip_serializing_if = "Grants::is_empty")]
    pub grants: Grants,
}

/// What the operator allows one service. Nothing is allowed but the log,
/// clocks and random numbers, until it stands here.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Grants {
    /// Least level that reaches the log: `trace`, `debug`, `info`, `warn`,
    /// `error`, or `off`, which also refuses a component that imports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<LogLevel>,
    /// Values that the service reads through `wasi:config`, at most 256.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub config: BTreeMap<String, String>,
    /// The same, each read from a file of at most 64 KiB when the service is
    /// loaded; never shown.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, PathBuf>,
    /// Durable values through `wasi:keyvalue`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keyvalue: Option<bool>,
    /// Keys and values of this service together, 4 KiB to 1 TiB; left out,
    /// 64 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<Bytes>,
    /// Topics of other services that it may call, as `calc.add` or `calc.*`,
    /// at most 256.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub calls: Vec<String>,
    /// `sha256:…` of the only file that gets these grants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// Whether instances are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// A fresh instance for every call.
    Request,
    /// Instances are used again.
    Shared,
}

/// Least level of a service's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// All.
    Trace,
    /// From debug.
    Debug,
    /// From info.
    Info,
    /// From warn.
    Warn,
    /// Errors alone.
    Error,
    /// Nothing, and no import of it.
    Off,
}

/// Which versions are not served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "true, false or a list of versions")]
pub enum Disabled {
    /// All or none.
    All(bool),
    /// These.
    Versions(Vec<String>),
}

/// Settings of one service, none left out.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the fields of `Overlay`")]
pub struct ServiceSettings {
    pub timeout: Millis,
    /// None if it follows from what all calls share.
    pub memory: Option<Bytes>,
    pub table_elements: usize,
    pub instances: usize,
    pub answer_size: Bytes,
    pub host_data: Bytes,
    pub handles: usize,
    pub log_bytes: Bytes,
    pub log_lines: usize,
    pub rate: u32,
    pub concurrency: usize,
    pub isolation: Isolation,
    pub reset: bool,
    pub max_calls: u64,
    pub expose_traps: bool,
    pub validate: bool,
    pub disabled: Disabled,
    pub log: LogLevel,
    pub grants: Grants,
}

/// `[services.default]` as it is when nobody sets it.
pub(super) fn built_in() -> Services {
    let default = Overlay {
        timeout: Some(Millis::secs(3600)),
        memory: None,
        table_elements: Some(40_000),
        instances: Some(128),
        answer_size: Some(Bytes::mib(64)),
        host_data: Some(Bytes::mib(2)),
        handles: Some(1000),
        log_bytes: Some(Bytes::kib(64)),
        log_lines: Some(1000),
        rate: Some(0),
        concurrency: Some(64),
        isolation: Some(Isolation::Request),
        reset: Some(true),
        max_calls: Some(10_000),
        expose_traps: Some(false),
        validate: Some(false),
        disabled: Some(Disabled::All(false)),
        grants: Grants {
            log: Some(LogLevel::Info),
            ..Grants::default()
        },
    };
    [(DEFAULT.to_owned(), default)].into()
}

/// The settings of one service: its own table over the default one over the
/// built-in one.
#[must_use]
pub fn settings_of(services: &Services, name: &str) -> ServiceSettings {
    let built_in = built_in().remove(DEFAULT).unwrap_or_default();
    let none = Overlay::default();
    let own = services
        .get(name)
        .filter(|_| name != DEFAULT)
        .unwrap_or(&none);
    let shared = services.get(DEFAULT).unwrap_or(&none);
    // A closure can't be generic, so each field names itself three times.
    macro_rules! first {
        ($($field:ident).+) => {
            [own, shared, &built_in].into_iter().find_map(|o| o.$($field).+.clone()).expect("built in")
        };
    }
    ServiceSettings {
        timeout: first!(timeout),
        memory: own.memory.or(shared.memory),
        table_elements: first!(table_elements),
        instances: first!(instances),
        answer_size: first!(answer_size),
        host_data: first!(host_data),
        handles: first!(handles),
        log_bytes: first!(log_bytes),
        log_lines: first!(log_lines),
        rate: first!(rate),
        concurrency: first!(concurrency),
        isolation: first!(isolation),
        reset: first!(reset),
        max_calls: first!(max_calls),
        expose_traps: first!(expose_traps),
        validate: first!(validate),
        disabled: first!(disabled),
        log: first!(grants.log),
        grants: own.grants.clone(),
    }
}

impl Grants {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether there is anything here that a stranger's file must not get.
    #[must_use]
    pub fn is_sensitive(&self) -> bool {
        let Self {
            log: _,
            config,
            secrets,
            keyvalue,
            quota: _,
            calls,
            digest: _,
        } = self;
        !config.is_empty() || !secrets.is_empty() || *keyvalue == Some(true) || !calls.is_empty()
    }
}

/// Checks every table.
pub(super) fn check(services: &Services, require_digest: bool, bounds: &mut Bounds) {
    for (name, overlay) in services {
        check_one(name, overlay, bounds);
        let key = |field: &str| format!("services.{name}.{field}");
        let grants = &overlay.grants;
        if name == DEFAULT
            && (grants.is_sensitive() || grants.quota.is_some() || grants.digest.is_some())
        {
            bounds.that(
                key("grants"),
                false,
                "given to a service by its name; only `log` can be given to all",
            );
        }
        if require_digest && grants.is_sensitive() && grants.digest.is_none() {
            bounds.that(
                key("grants.digest"),
                false,
                "given, because sandbox.require_digest is true",
            );
        }
    }
}

fn check_one(name: &str, overlay: &Overlay, bounds: &mut Bounds) {
    // Destructured, so that a new setting without a bound does not compile.
    let Overlay {
        timeout,
        memory,
        table_elements,
        instances,
        answer_size,
        host_data,
        handles,
        log_bytes,
        log_lines,
        rate,
        concurrency,
        isolation: _,
        reset: _,
        max_calls,
        expose_traps: _,
        validate: _,
        disabled,
        grants:
            Grants {
                log: _,
                config,
                secrets,
                keyvalue: _,
                quota,
                calls,
                digest,
            },
    } = overlay;
    let key = |field: &str| format!("services.{name}.{field}");
    let large = Bytes::mib(64);
    bounds.optional(key("timeout"), *timeout, Millis::new(1), Millis::secs(3600));
    bounds.optional(key("memory"), *memory, Bytes::kib(64), Bytes::mib(4096));
    bounds.optional(key("table_elements"), *table_elements, 0, 1_000_000);
    bounds.optional(key("instances"), *instances, 1, 1000);
    bounds.optional(key("answer_size"), *answer_size, Bytes(1), large);
    bounds.optional(key("host_data"), *host_data, Bytes::kib(1), large);
    bounds.optional(key("handles"), *handles, 1, 100_000);
    bounds.optional(key("log_bytes"), *log_bytes, Bytes(0), Bytes::mib(16));
    bounds.optional(key("log_lines"), *log_lines, 0, 1_000_000);
    bounds.optional(key("rate"), *rate, 0, 10_000_000);
    bounds.optional(key("concurrency"), *concurrency, 1, 10_000);
    bounds.optional(key("max_calls"), *max_calls, 1, 1_000_000_000);
    bounds.optional(
        key("grants.quota"),
        *quota,
        Bytes::kib(4),
        Bytes::mib(1024 * 1024),
    );
    bounds.that(
        key("grants.config"),
        config.len() <= 256,
        "at most 256 values",
    );
    bounds.that(
        key("grants.secrets"),
        secrets.len() <= 256,
        "at most 256 files",
    );
    let twice = config.keys().find(|key| secrets.contains_key(*key));
    bounds.that(
        key("grants.secrets"),
        twice.is_none(),
        "named unlike the values of grants.config",
    );
    let patterns = calls.len() <= 256 && calls.iter().all(|pattern| is_pattern(pattern));
    bounds.that(
        key("grants.calls"),
        patterns,
        "at most 256 topics, each as `calc.add` or `calc.*`",
    );
    let is_digest = |text: &String| {
        text.strip_prefix("sha256:")
            .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    bounds.that(
        key("grants.digest"),
        digest.as_ref().is_none_or(is_digest),
        "sha256: and 64 hexadecimal digits",
    );
    if let Some(Disabled::Versions(versions)) = disabled {
        let is_version = |text: &String| {
            text.split('.').count() == 3 && text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
        };
        bounds.that(
            key("disabled"),
            versions.iter().all(is_version),
            "true, false or versions as \"1.2.0\"",
        );
    }
}

/// `service.action`, where the action may be `*` or end in `.*`.
pub(super) fn is_pattern(text: &str) -> bool {
    let mut segments = text.split('.').peekable();
    let is_word = |s: &str| {
        !s.is_empty()
            && s.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let mut count = 0;
    while let Some(segment) = segments.next() {
        count += 1;
        let last = segments.peek().is_none();
        if !(is_word(segment) || segment == "*" && last && count > 1) {
            return false;
        }
    }
    count > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_falls_back_to_the_default_table() {
        let mut services = built_in();
        services.entry(DEFAULT.into()).or_default().handles = Some(7);
        let own = Overlay {
            concurrency: Some(1),
            memory: Some(Bytes::mib(1)),
            ..Overlay::default()
        };
        services.insert("calc".into(), own);
        let calc = settings_of(&services, "calc");
        assert_eq!(
            (calc.handles, calc.concurrency, calc.memory),
            (7, 1, Some(Bytes::mib(1)))
        );
        let other = settings_of(&services, "other");
        assert_eq!(
            (other.handles, other.concurrency, other.memory),
            (7, 64, None)
        );
    }

    #[test]
    fn patterns() {
        for good in ["calc.add", "calc.*", "a.b.*", "a-b.c_d"] {
            assert!(is_pattern(good), "{good}");
        }
        for bad in [
            "", "*", "calc", "*.add", "calc.*.x", "calc.", "calc.a*", "c lc.add",
        ] {
            assert!(!is_pattern(bad), "{bad}");
        }
    }
}
