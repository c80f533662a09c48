//! Every setting: its default, unit, bounds and reason.
//!
//! Later sources win: defaults, then the TOML file, then the environment
//! (`MB_PORT`, `MB_ADMIN__PORT`: two underscores between levels), then flags.
//! Nothing starts with a setting that is unknown or out of bounds.

pub mod access;
mod define;
pub mod memory;
pub mod services;
mod source;
pub mod store;
mod units;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::log::Format;

pub use access::{Auth, DEFAULT_PRINCIPAL, PrincipalSettings, Principals, Right, Tls};
#[cfg(test)]
pub(crate) use define::Entry;
pub use define::OutOfBounds;
use define::{Bounds, settings};
pub use memory::MemoryPlan;
pub use services::{Isolation, LogLevel, ServiceSettings, Services};
pub use source::{ConfigError, Flags, Loaded, Row, load, load_over};
pub use units::{Bytes, Millis, Share};

/// Answers of one connection that the server collects before it writes them, and
/// slow calls of one connection that run side by side.
pub const MAX_IN_FLIGHT: usize = 64;

const LEAST: Millis = Millis::new(10);
const HOUR: Millis = Millis::secs(3600);
const DAY: Millis = Millis::secs(24 * 3600);

settings! {
    /// All settings of the server. `mb-server check` prints the effective ones.
    pub struct Config {
        /// Address or name to listen on, IPv4 or IPv6, or a list. An
        /// address that is not loopback needs `auth`, a required client certificate, or
        /// `allow_unsecure`.
        // The protocol's first document has 0.0.0.0: a server that nobody has
        // configured is not to be reachable from outside.
        pub host: OneOrMore = OneOrMore::One("127.0.0.1".into()),
        /// TCP port on each address of `host`. 0: the system chooses a free one for
        /// each.
        pub port: u16 = 8081,
        /// Listen on `port` without TLS.
        pub plain: bool = true,
        /// What is spoken: `frames`, `http` (with WebSocket) or both. The first
        /// byte of a connection decides.
        pub protocols: Vec<access::Protocol> = access::Protocol::ALL.to_vec(),
        /// Whether peers authenticate: `none`, `optional` or `required`.
        pub auth: Auth = Auth::None,
        /// File of the tokens of clients, as `mb-server token` writes it. Empty:
        /// `tokens.json` in `state_dir`.
        pub tokens: PathBuf = PathBuf::new(),
        /// Memory for connections, services and messages together. Other sizes follow
        /// from it (see [`MemoryPlan`]).
        pub memory: Bytes = Bytes::mib(256) => Bytes::mib(32)..=Bytes::mib(1024 * 1024),
        /// Connections at the same time; a further one gets `SERVER_BUSY`. A quarter of
        /// `memory` must hold them, at 64 KiB each, 104 KiB with TLS. 0: as many as
        /// that, 1,024 at most.
        pub max_connections: usize = 0 => 0..=100_000,
        /// Threads that serve connections: a few that poll, and one for each call that
        /// waits or takes longer than about two milliseconds. Calls that wait to begin
        /// hold half of them at most; further requests stay unread until one begins.
        pub max_threads: usize = 1280 => 8..=16_384,
        /// Where connections wait for their next request: `"poller"`, without a thread,
        /// or `"threads"`, where each busy one has a thread that reads, up to
        /// `max_threads`. Threads are faster for clients that block on the same
        /// processors, and slower for clients that send for many connections.
        pub waiting: Waiting = Waiting::Poller,
        /// Connections of one address (of IPv6, one /64). 0: no limit.
        pub max_connections_per_address: usize = 0 => 0..=10_000,
        /// Size of one message with its header line, and of the payload of an answer.
        /// Half of the shared memory must hold it.
        pub max_message_size: Bytes = Bytes::mib(1) => Bytes::kib(1)..=Bytes::mib(64),
        /// Time from the first byte of a message to its last.
        pub read_timeout: Millis = Millis::secs(10) => LEAST..=HOUR,
        /// Time for a PROXY header, the TLS handshake and, where authentication is
        /// required, the hello together.
        pub handshake_timeout: Millis = Millis::secs(5) => LEAST..=Millis::secs(60),
        /// Time for a client to take an answer; then the server closes the connection.
        pub write_timeout: Millis = Millis::secs(10) => LEAST..=HOUR,
        /// Time without a byte from the client, and without a call, after which the
        /// server closes the connection.
        pub idle_timeout: Millis = Millis::secs(60) => LEAST..=DAY,
        /// Time after which clients are asked to send a keep-alive; half of
        /// `idle_timeout` where that is less. The server checks the credentials of
        /// silent peers as often.
        pub keep_alive_interval: Millis = Millis::secs(30) => LEAST..=DAY,
        /// Age at which the server closes a connection: what was begun is answered, and
        /// the peer gets `SHUTTING_DOWN`. 1 s to 30 days, or 0 for no limit.
        pub connection_max_age: Millis = Millis::new(0),
        /// Deadline of a request whose header names no timeout.
        pub default_timeout: Millis = Millis::secs(5) => Millis::new(1)..=HOUR,
        /// Time for the whole drain of the server. Calls that still run half a second
        /// before its end are stopped, or at half of it where it is shorter than a
        /// second.
        pub drain_timeout: Millis = Millis::secs(10) => Millis::new(0)..=Millis::secs(600),
        /// One of so many resets of instances is verified, at random and beside the
        /// calls. At most a hundredth of one processor's time is spent on it. 0: none.
        pub verify_resets: u32 = 1000 => 0..=1_000_000_000,
        /// Folder of the components.
        pub services_dir: PathBuf = "services/dist".into(),
        /// Folder of what outlives the process: the store, the last-known-good
        /// components, the token of the admin endpoint. The server creates it with mode
        /// 0700, and refuses one that users other than root and its own can change.
        /// Empty: `$XDG_STATE_HOME/mb-server`, else `~/.local/state/mb-server`, else
        /// `/var/lib/mb-server`.
        pub state_dir: PathBuf = PathBuf::new(),
        /// Time between two looks at the services folder and at the files of tokens and
        /// TLS, 50 ms to 1 h, or 0 for never.
        pub reload_interval: Millis = Millis::new(500),
        /// Allow listeners without authentication on addresses that are not loopback,
        /// and tokens over connections that are not encrypted.
        pub allow_unsecure: bool = false,
        /// What is logged: `error`, `warn`, `info`, `debug`, `trace` or `off`, for all
        /// or by target, such as `info,mb_server::server=debug`.
        pub log: String = "info".into(),
        /// Form of the log: `text`, `json` (one object a line), or `auto`: text to a
        /// terminal, JSON to anything else.
        pub log_format: Format = Format::Auto,
        /// The admin endpoint.
        pub admin: Admin = Admin::default(),
        /// HTTP on the ports of the services.
        pub http: Http = Http::default(),
        /// Where durable values are kept.
        pub store: store::Store = store::Store::default(),
        /// TLS.
        pub tls: Tls = Tls::default(),
        /// What each principal may do: `[principals.NAME]`.
        pub principals: Principals = Principals::new(),
        /// Further listeners.
        pub listeners: Vec<access::Listener> = Vec::new(),
        /// What each service may take and use: `[services.NAME]` over
        /// `[services.default]`.
        pub services: Services = [(services::DEFAULT.into(), ServiceSettings::default())].into(),
    }
}

settings! {
    /// Settings of the admin endpoint.
    pub struct Admin {
        /// Address or name to listen on. An address that is not loopback needs
        /// `allow_unsecure`. Empty: none, if there is `admin.socket`.
        pub host: String = "127.0.0.1".into(),
        /// TCP port. 0: the system chooses a free one.
        pub port: u16 = 9090,
        /// File of a Unix socket to listen on, at most 107 bytes long, created with mode
        /// 0600. Empty: none.
        pub socket: PathBuf = PathBuf::new(),
        /// Host headers that are answered besides loopback names.
        pub allowed_hosts: Vec<String> = Vec::new(),
        /// Components may be deployed over the endpoint: the server then writes to
        /// `services_dir`. Only where every address of `admin.host` is loopback.
        pub deploy: bool = false,
        /// File of the token that deploying takes, which must be there. Empty: `deploy.token` in
        /// `state_dir`, created at the start with mode 0600.
        pub deploy_token: PathBuf = PathBuf::new(),
    }
}

settings! {
    /// HTTP on the ports of the services.
    pub struct Http {
        /// Origins whose pages may call, such as `https://app.example`.
        pub origins: Vec<String> = Vec::new(),
        /// Networks of proxies, such as `10.0.0.0/8`. Of their requests
        /// the rightmost address in `Forwarded` or `X-Forwarded-For` that is none of
        /// these counts for throttles and logs, never for rights.
        pub forwarded_from: Vec<ipnet::IpNet> = Vec::new(),
        /// Host headers that are answered without authentication besides addresses and
        /// `localhost`.
        pub hosts: Vec<String> = Vec::new(),
        /// Answer the Model Context Protocol at `/mcp`: actions that take objects are
        /// tools.
        pub mcp: bool = false,
    }
}

/// Where connections wait for their next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Waiting {
    /// At the poller, without a thread.
    Poller,
    /// Busy ones in a thread that reads; the others at the poller.
    Threads,
}

/// One value or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
pub enum OneOrMore {
    /// One.
    One(String),
    /// A list; an empty one is out of bounds.
    More(Vec<String>),
}

impl OneOrMore {
    /// All of them.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::More(values) => values,
        }
    }

    const SOUND: &str = "one or more addresses or names, none empty";

    fn is_sound(&self) -> bool {
        let values = self.as_slice();
        !values.is_empty() && values.iter().all(|value| !value.is_empty())
    }
}

/// The path of a setting, unless it is left empty.
#[must_use]
pub fn given(path: &Path) -> Option<&Path> {
    Some(path).filter(|path| !path.as_os_str().is_empty())
}

impl Config {
    /// The file of the store.
    #[must_use]
    pub fn store_file(&self) -> PathBuf {
        self.state_dir().join("store.redb")
    }

    /// The file of the tokens that clients show.
    #[must_use]
    pub fn client_tokens(&self) -> PathBuf {
        given(&self.tokens).map_or_else(|| self.state_dir().join("tokens.json"), Path::to_owned)
    }

    /// Silence after which clients are asked to send a keep-alive.
    #[must_use]
    pub fn keep_alive_within(&self) -> Duration {
        self.keep_alive_interval.0.min(self.idle_timeout.0 / 2)
    }

    /// All listeners: the plain one, the one of `[tls]`, and the further ones.
    #[must_use]
    pub fn all_listeners(&self) -> Vec<access::Listener> {
        let built_in = |port, tls| access::Listener {
            host: self.host.clone(),
            port: Some(port),
            tls,
            ..access::Listener::default()
        };
        let plain = self.plain.then(|| built_in(self.port, false));
        let tls = self.tls.is_on().then(|| built_in(self.tls.port, true));
        plain
            .into_iter()
            .chain(tls)
            .chain(self.listeners.iter().cloned())
            .collect()
    }

    /// The file of the token that changing things over the admin endpoint takes.
    #[must_use]
    pub fn token_file(&self) -> PathBuf {
        self.state_dir().join("admin.token")
    }

    /// The file of the token that deploying components takes.
    #[must_use]
    pub fn deploy_token_file(&self) -> PathBuf {
        given(&self.admin.deploy_token)
            .map_or_else(|| self.state_dir().join("deploy.token"), Path::to_owned)
    }

    /// Folder of what outlives the process: the setting, else
    /// `$XDG_STATE_HOME/mb-server`, else `$HOME/.local/state/mb-server`, else
    /// `/var/lib/mb-server`.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        if let Some(dir) = given(&self.state_dir) {
            return dir.to_owned();
        }
        let absolute = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let home = || absolute("HOME").map(|home| home.join(".local/state"));
        absolute("XDG_STATE_HOME")
            .or_else(home)
            .unwrap_or_else(|| "/var/lib".into())
            .join("mb-server")
    }

    /// Has the relative paths of files and folders count from a folder, and not
    /// from the one that the process was started in.
    pub fn paths_from(&mut self, dir: &Path) {
        let Tls {
            cert, key, ca, crl, ..
        } = &mut self.tls;
        let secrets = self.services.values_mut();
        let secrets = secrets.flat_map(|service| service.grants.secrets.values_mut());
        [
            &mut self.tokens,
            &mut self.services_dir,
            &mut self.state_dir,
            &mut self.admin.socket,
            &mut self.store.password_file,
            &mut self.store.ca,
            &mut self.admin.deploy_token,
            cert,
            key,
            ca,
            crl,
        ]
        .into_iter()
        .chain(secrets)
        .filter(|path| !path.as_os_str().is_empty())
        .for_each(|path| *path = dir.join(&path));
    }

    /// Every setting that is out of its bounds.
    #[must_use]
    pub fn out_of_bounds(&self) -> Vec<OutOfBounds> {
        let mut bounds = Bounds(Vec::new());
        let Self {
            host, admin, tls, ..
        } = self;
        bounds.that("host", host.is_sound(), OneOrMore::SOUND);
        let some = self.plain || tls.is_on() || !self.listeners.is_empty();
        bounds.that("plain", some, "true, or another listener given");
        access::check(tls, &self.principals, &self.listeners, &mut bounds);
        self.check_ranges("", &mut bounds);
        self.http.check_ranges("http.", &mut bounds);
        admin.check_ranges("admin.", &mut bounds);
        self.store.check_ranges("store.", &mut bounds);
        if self.connection_max_age.unless_zero().is_some() {
            bounds.range(
                "connection_max_age",
                self.connection_max_age,
                Millis::secs(1)..=Millis::secs(30 * 24 * 3600),
            );
        }
        bounds.that(
            "services_dir",
            !self.services_dir.as_os_str().is_empty(),
            "a folder",
        );
        let interval = self.reload_interval;
        bounds.that(
            "reload_interval",
            interval == Millis::new(0) || (Millis::new(50)..=HOUR).contains(&interval),
            "0, or 50ms to 1h",
        );
        let filter = self.log.parse::<tracing_subscriber::filter::Targets>();
        bounds.that(
            "log",
            filter.is_ok(),
            "a level (error, warn, info, debug, trace, off), or target=level, with commas",
        );
        let socket = admin.socket.as_os_str();
        bounds.that(
            "admin.host",
            !admin.host.is_empty() || !socket.is_empty(),
            "an address or a name, or empty if there is admin.socket",
        );
        bounds.that(
            "admin.socket",
            socket.len() <= 107,
            "a path of at most 107 bytes, as the system has it",
        );
        bounds.that(
            "protocols",
            !self.protocols.is_empty(),
            "frames, http or both",
        );
        self.store.check(&mut bounds);
        services::check(&self.services, &mut bounds);
        if bounds.0.is_empty() {
            bounds.0 = MemoryPlan::of(self).conflicts(self);
        }
        bounds.0
    }
}
