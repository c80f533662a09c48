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
mod units;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::log::Format;

pub use access::{
    Auth, DEFAULT_PRINCIPAL, PrincipalFrom, PrincipalSettings, Principals, Right, Tls, TlsVersion,
};
pub use define::OutOfBounds;
use define::{Bounds, settings};
pub use memory::MemoryPlan;
pub use services::{Isolation, LogLevel, ServiceSettings, Services};
pub use source::{ConfigError, Flags, Loaded, Row, load};
pub use units::{Bytes, Millis, Share};

const LEAST: Millis = Millis::new(10);
const HOUR: Millis = Millis::secs(3600);
const DAY: Millis = Millis::secs(24 * 3600);

settings! {
    /// All settings of the server. `mb-server check` prints the effective ones.
    pub struct Config {
        /// Addresses or names to listen on, one or a list. The one default that
        /// differs from the protocol's first document, which has 0.0.0.0: a
        /// server that nobody has configured is not reachable from outside.
        pub host: OneOrMore = OneOrMore::One("127.0.0.1".into()),
        /// TCP port of the wire; 0 lets the system choose.
        pub port: u16 = 8081,
        /// Listen on `port` without TLS. Off where only `[tls]` or `[[listeners]]`
        /// are wanted.
        pub plain: bool = true,
        /// Whether peers are asked who they are: `none`, `optional` or `required`.
        pub auth: Auth = Auth::None,
        /// File of the tokens, as `mb-server token` writes it; empty for
        /// `tokens.json` in the state folder.
        pub tokens: PathBuf = PathBuf::new(),
        /// How often in a minute one address may fail to authenticate, in each way
        /// of its own, 1 to 6,000; after that it is refused for a while.
        pub auth_failures: u32 = 10 => 1..=6000,
        /// Connections that the kernel holds until they are accepted, 1 to 65,535.
        pub backlog: u32 = 1024 => 1..=65_535,
        /// TCP keep-alive probes on quiet connections.
        pub keep_alive: bool = true,
        /// Quiet time before the first probe, 1 s to 2 h.
        pub keep_alive_initial_delay: Millis = Millis::secs(60) => Millis::secs(1)..=Millis::secs(7200),
        /// TCP_NODELAY: answers leave at once, not when the segment is full.
        pub no_delay: bool = true,
        /// Memory that the whole server may take, 32 MiB to 1 TiB, for guests,
        /// frames and threads; the rest is derived from it (see [`MemoryPlan`]).
        pub memory: Bytes = Bytes::mib(256) => Bytes::mib(32)..=Bytes::mib(1024 * 1024),
        /// Connections served at the same time, 1 to 100,000. One more is told
        /// SERVER_BUSY. 0: as many as `memory` has room for, 1,024 at most.
        pub max_connections: usize = 0 => 0..=100_000,
        /// Threads that serve connections, 8 to 16,384: a few that poll, and one
        /// for each call that waits or takes more than two milliseconds.
        pub max_threads: usize = 1280 => 8..=16_384,
        /// How long a thread waits for the next request of a peer that it has
        /// answered before it serves others, 0 to 100 ms. Worth something where
        /// many clients that block run on the same processors: 50 ms give each of
        /// them a thread. What others want of such a connection waits as long.
        pub linger: Millis = Millis::new(0) => Millis::new(0)..=Millis::new(100),
        /// Connections of one address (of IPv6, one /64), 0 to 10,000; 0 for no
        /// bound.
        pub max_connections_per_address: usize = 0 => 0..=10_000,
        /// Per cent of the connections that are kept for peers who have shown who
        /// they are, 0 to 90. Counts only where peers can.
        pub reserved_connections: usize = 12 => 0..=90,
        /// Header line and payload of one message, 1 KiB to 64 MiB; an answer's
        /// payload may be as large.
        pub max_message_size: Bytes = Bytes::mib(1) => Bytes::kib(1)..=Bytes::mib(64),
        /// Answers of one connection that may wait to leave together, 1 to 4,096.
        pub max_in_flight: usize = 64 => 1..=4096,
        /// From the first byte of a message to its last, 10 ms to 1 h.
        pub read_timeout: Millis = Millis::secs(10) => LEAST..=HOUR,
        /// For a PROXY header, a TLS handshake and, where it is demanded, the hello
        /// together, 10 ms to 1 min.
        pub handshake_timeout: Millis = Millis::secs(5) => LEAST..=Millis::secs(60),
        /// For a write to be taken by the peer's system, 10 ms to 1 h.
        pub write_timeout: Millis = Millis::secs(10) => LEAST..=HOUR,
        /// Silence after which a connection is closed, 10 ms to 24 h.
        pub idle_timeout: Millis = Millis::secs(60) => LEAST..=DAY,
        /// Silence after which clients are asked to send a keep-alive, 10 ms to
        /// 24 h; where half of `idle_timeout` is less, they are asked for that.
        pub keep_alive_interval: Millis = Millis::secs(30) => LEAST..=DAY,
        /// Age at which a connection is closed in order, 1 s to 30 days; 0 for no
        /// bound.
        pub connection_max_age: Millis = Millis::new(0),
        /// For a request whose header names no timeout, 1 ms to 1 h.
        pub default_timeout: Millis = Millis::secs(5) => Millis::new(1)..=HOUR,
        /// For the whole end of the server, 0 to 10 min. Calls are stopped half a
        /// second before, or at half of it if that is later.
        pub drain_timeout: Millis = Millis::secs(10) => Millis::new(0)..=Millis::secs(600),
        /// Folder of the components.
        pub services_dir: PathBuf = "services/dist".into(),
        /// Folder of what outlives the process: the store of durable values, the
        /// last good components, the token of the admin endpoint. Made with mode
        /// 0700; empty for the user's state folder.
        pub state_dir: PathBuf = PathBuf::new(),
        /// How often the folder of the components is looked at for changes, 50 ms
        /// to 1 h; 0 for never.
        pub reload_interval: Millis = Millis::new(500),
        /// Allow what is not safe where strangers can reach the server: a listener
        /// without authentication on an address that is not loopback, and tokens
        /// over connections that are not encrypted.
        pub allow_unsecure: bool = false,
        /// The process may write into its own folders only (Landlock), and start no
        /// program (seccomp), where the kernel can hold it to that.
        pub landlock: bool = true,
        /// What is logged: `error`, `warn`, `info`, `debug`, `trace` or `off`, for
        /// all or by target (`info,mb_server::server=debug`).
        pub log: String = "info".into(),
        /// How lines are written: `text`, `json`, or `auto`: text to a terminal,
        /// JSON to anything else.
        pub log_format: Format = Format::Auto,
        /// The admin endpoint.
        pub admin: Admin = Admin::default(),
        /// What components are loaded and run with.
        pub sandbox: Sandbox = Sandbox::default(),
        /// TLS.
        pub tls: Tls = Tls::default(),
        /// What each principal may do: `[principals.NAME]`.
        pub principals: Principals = Principals::new(),
        /// Further listeners.
        pub listeners: Vec<access::Listener> = Vec::new(),
        /// What each service may take and use: `[services.NAME]` over
        /// `[services.default]`.
        pub services: Services = services::built_in(),
    }
}

settings! {
    /// Settings of the admin endpoint.
    pub struct Admin {
        /// Address or name to listen on; another than a loopback one takes
        /// `allow_unsecure`. Empty for none, where there is a socket.
        pub host: String = "127.0.0.1".into(),
        /// TCP port; 0 lets the system choose.
        pub port: u16 = 9090,
        /// File of a Unix socket to listen on, made with mode 0600; empty for none.
        pub socket: PathBuf = PathBuf::new(),
        /// Host headers that are answered besides loopback names, at most 16.
        pub allowed_hosts: Vec<String> = Vec::new(),
    }
}

settings! {
    /// Settings of the sandbox.
    pub struct Sandbox {
        /// Call stack of a component, 64 KiB to 2 MiB; each connection's thread
        /// has as much and 128 KiB more for every call that may be nested and the
        /// first, and 512 KiB beside.
        pub stack: Bytes = Bytes::kib(512) => Bytes::kib(64)..=Bytes::mib(2),
        /// Folder of the compiled code, made with mode 0700; empty for the
        /// user's cache folder.
        pub cache_dir: PathBuf = PathBuf::new(),
        /// All compiled code in that folder, 1 MiB to 1 TiB; beyond it, what was
        /// not used for the longest time is removed.
        pub cache_size: Bytes = Bytes::mib(1024) => Bytes::mib(1)..=Bytes::mib(1024 * 1024),
        /// Memory that compiling one component may take, 64 MiB to 64 GiB. It
        /// happens in a process of its own and is not counted in `memory`.
        pub compile_memory: Bytes = Bytes::mib(1024) => Bytes::mib(64)..=Bytes::mib(64 * 1024),
        /// How long compiling one component may take, 100 ms to 1 h.
        pub compile_timeout: Millis = Millis::secs(60) => Millis::new(100)..=HOUR,
        /// How deep services may call each other, 0 to 16; each level adds a call
        /// stack to the threads.
        pub call_depth: usize = 4 => 0..=16,
        /// Of so many resets of instances one is verified, at random and beside
        /// the calls, 0 to 1,000,000,000; zero for none.
        pub verify_resets: u32 = 1000 => 0..=1_000_000_000,
        /// Every grant of values, secrets, durable values and calls must name the
        /// digest of the file that it is for.
        pub require_digest: bool = false,
    }
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
        let built_in = |port, tls| access::Listener::new(self.host.clone(), port, tls);
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
        let secrets = secrets.flat_map(|overlay| overlay.grants.secrets.values_mut());
        [
            &mut self.tokens,
            &mut self.services_dir,
            &mut self.state_dir,
            &mut self.admin.socket,
            &mut self.sandbox.cache_dir,
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
            host,
            admin,
            sandbox,
            tls,
            ..
        } = self;
        let hosts = host.as_slice();
        bounds.that(
            "host",
            (1..=64).contains(&hosts.len()),
            "1 to 64 addresses or names",
        );
        bounds.that(
            "host",
            hosts.iter().all(|host| !host.is_empty()),
            "addresses or names, none empty",
        );
        let some = self.plain || tls.is_on() || !self.listeners.is_empty();
        bounds.that("plain", some, "true, or another listener given");
        access::check(tls, &self.principals, &self.listeners, &mut bounds);
        self.check_ranges("", &mut bounds);
        admin.check_ranges("admin.", &mut bounds);
        sandbox.check_ranges("sandbox.", &mut bounds);
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
            "admin.allowed_hosts",
            admin.allowed_hosts.len() <= 16,
            "at most 16 names",
        );
        services::check(&self.services, sandbox.require_digest, &mut bounds);
        if bounds.0.is_empty() {
            bounds.0 = MemoryPlan::of(self).conflicts(self);
        }
        bounds.0
    }
}
