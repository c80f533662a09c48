//! Settings of single services: `[services.NAME]` over `[services.default]`.

use std::{collections::BTreeMap, ops::RangeInclusive, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    Bytes, HOUR, Millis, Share,
    define::{Bounds, settings},
};

/// Quota of durable values where `grants.quota` names none.
pub const DEFAULT_QUOTA: Bytes = Bytes::mib(64);

/// The table that holds for every service.
pub const DEFAULT: &str = "default";

/// Range of the memory of one instance.
const MEMORY: RangeInclusive<Bytes> = Bytes::kib(64)..=Bytes::mib(4096);

/// All `[services.…]` tables by name.
pub type Services = BTreeMap<String, ServiceSettings>;

/// The settings of one service: its own table, into which the default one was
/// merged when it was read, or else the default one.
#[must_use]
pub fn settings_of(services: &Services, name: &str) -> ServiceSettings {
    let settings = services.get(name).or_else(|| services.get(DEFAULT));
    settings.cloned().unwrap_or_default()
}

settings! {
    /// Settings of one service. What its table leaves out, `[services.default]`
    /// says.
    pub struct ServiceSettings {
        /// Linear memory of one instance, all of its memories together. Left out:
        /// 64 MiB, or two thirds of the memory that all calls share where that is less.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub memory: Option<Bytes> = None => MEMORY,
        /// Longest time that a call may take, whatever timeout its caller asks for.
        /// Waiting to begin counts. `describe`, when the file is loaded, may take
        /// as long, and 10 s at most.
        pub timeout: Millis = HOUR => Millis::new(1)..=HOUR,
        /// Requests of clients a second; the requests of one second may come at once.
        /// More get `RATE_LIMITED`. 0: no limit.
        pub rate: u32 = 0 => 0..=10_000_000,
        /// Calls of the service that run at the same time. A further call waits until
        /// one ends, and gets `SERVICE_UNAVAILABLE` at its deadline.
        pub concurrency: usize = 64 => 1..=10_000,
        /// Processors that all calls of the service together may use on average
        /// (`0.5` is half of one, in thousandths); 0 sets no bound. A call beyond
        /// it waits, and ends with `TIMEOUT`, phase `scheduling`, at its deadline.
        /// A tenth of a second's worth may be used at once.
        pub cpu: Share = Share(0) => Share(0)..=Share(1_000_000),
        /// Where more calls compute than there are processors, services get
        /// processor time in proportion to their weights.
        pub weight: u32 = 1 => 1..=1000,
        /// `request`: every call finds an instance in its initial state, a reset one
        /// where the code allows that. `fresh`: the code is not changed for resets, and
        /// every call gets a fresh instance. `shared`: an instance serves several calls
        /// one after another, and a call can see what an earlier one left behind.
        pub isolation: Isolation = Isolation::Request,
        /// Callers of a failed call get its WebAssembly backtrace and the newest 2 KiB
        /// that it printed to standard error. The log has both always.
        pub expose_traps: bool = false,
        /// The server checks each payload against the `input` schema of its action
        /// before the call; one that does not fit gets `INVALID_PAYLOAD`.
        pub validate: bool = false,
        /// `true`, or a list of versions such as `["2.0.0"]`: these are not served.
        pub disabled: Disabled = Disabled::All(false),
        /// What the service may use beside processor and memory.
        pub grants: Grants = Grants::default(),
    }
}

settings! {
    /// What the operator allows one service. Nothing is allowed but the log,
    /// clocks and random numbers, until it stands here.
    pub struct Grants {
        /// Least level of the lines that reach the log: `trace`, `debug`, `info`,
        /// `warn`, `error`, or `off`, with which a component that imports
        /// `wasi:logging` is not loaded. The only grant that
        /// `[services.default]` may hold.
        pub log: LogLevel = LogLevel::Info,
        /// Texts that the service reads through `wasi:config`.
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub config: BTreeMap<String, String> = BTreeMap::new(),
        /// Names of files of at most 64 KiB. The service reads their
        /// contents as it reads `config`; line feeds at the end are cut off. A file is
        /// read when the service is loaded, and refused if users other than root and
        /// the server's can change it.
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub secrets: BTreeMap<String, PathBuf> = BTreeMap::new(),
        /// `true`: durable values through `wasi:keyvalue`. Each service has its own;
        /// no service sees those of another.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub keyvalue: Option<bool> = None,
        /// Size of all durable values of the service. An entry counts
        /// its key, its value, the names of its service and bucket, and 32 bytes. The
        /// file takes two to four times as much. Left out: 64 MiB.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub quota: Option<Bytes> = None => Bytes::kib(4)..=Bytes::mib(1024 * 1024),
        /// Topics of other services that it may call, such as `calc.add` or `calc.*`.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub calls: Vec<String> = Vec::new(),
        /// `sha256:…` of the only file that gets these grants; another file of this
        /// name is not loaded. `mb-server inspect` prints it.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub digest: Option<String> = None,
    }
}

/// Whether instances are used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// An instance in its initial state for every call.
    Request,
    /// A fresh instance for every call.
    Fresh,
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

impl Grants {
    /// Whether there is anything here that an untrusted file must not get.
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
pub(super) fn check(services: &Services, bounds: &mut Bounds) {
    for (name, settings) in services {
        check_one(name, settings, bounds);
        let key = |field: &str| format!("services.{name}.{field}");
        let grants = &settings.grants;
        if name == DEFAULT
            && (grants.is_sensitive() || grants.quota.is_some() || grants.digest.is_some())
        {
            bounds.that(
                key("grants"),
                false,
                "given to a service by its name; only `log` can be given to all",
            );
        }
    }
}

fn check_one(name: &str, settings: &ServiceSettings, bounds: &mut Bounds) {
    settings.check_ranges(&format!("services.{name}."), bounds);
    let key = |field: &str| format!("services.{name}.{field}");
    let grants = &settings.grants;
    grants.check_ranges(&key("grants."), bounds);
    let Grants {
        config,
        secrets,
        calls,
        digest,
        ..
    } = grants;
    let twice = config.keys().find(|key| secrets.contains_key(*key));
    bounds.that(
        key("grants.secrets"),
        twice.is_none(),
        "named unlike the values of grants.config",
    );
    let patterns = calls.iter().all(|pattern| is_pattern(pattern));
    bounds.that(
        key("grants.calls"),
        patterns,
        "topics as `calc.add` or `calc.*`",
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
    if let Disabled::Versions(versions) = &settings.disabled {
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

/// Whether a pattern (`calc.add`, `calc.*`) covers a topic.
#[must_use]
pub fn covers(pattern: &str, topic: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => topic.starts_with(start),
        None => pattern == topic,
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
    fn patterns_cover() {
        assert!(covers("calc.add", "calc.add"));
        assert!(!covers("calc.add", "calc.added"));
        assert!(covers("calc.*", "calc.add") && covers("calc.*", "calc.a.b"));
        assert!(!covers("calc.*", "calcs.add"));
        assert!(covers("a.b.*", "a.b.c") && !covers("a.b.*", "a.c"));
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
