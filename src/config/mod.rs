//! Every setting: its default, unit, bounds and reason.
//!
//! Later sources win: defaults, then the TOML file, then the environment
//! (`MB_PORT`, `MB_ADMIN__PORT`: two underscores between levels), then flags.
//! Nothing starts with a setting that is unknown or out of bounds.

pub mod access;
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

pub use access::{Auth, PrincipalFrom, Principals, Right, Tls, TlsFiles, TlsVersion};
pub use memory::MemoryPlan;
pub use services::{Isolation, LogLevel, ServiceSettings, Services};
pub use source::{ConfigError, Flags, Loaded, Row, load};
pub use units::{Bytes, Millis};

/// All settings of the server. `mb-server check` prints the effective ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Addresses or names to listen on, one or a list. The one default that
    /// differs from the protocol's first document, which has 0.0.0.0: a
    /// server that nobody has configured is not reachable from outside.
    pub host: OneOrMore,
    /// TCP port of the wire; 0 lets the system choose.
    pub port: u16,
    /// Listen on `port` without TLS. Off where only `[tls]` or `[[listeners]]`
    /// are wanted.
    pub plain: bool,
    /// Whether peers are asked who they are: `none`, `optional` or `required`.
    pub auth: Auth,
    /// File of the tokens, as `mb-server token` writes it; empty for
    /// `tokens.json` in the state folder.
    pub tokens: PathBuf,
    /// How often in a minute one address may fail to authenticate, in each way
    /// of its own, 1 to 6,000; after that it is refused for a while.
    pub auth_failures: u32,
    /// Connections that the kernel holds until they are accepted, 1 to 65,535.
    pub backlog: u32,
    /// TCP keep-alive probes on quiet connections.
    pub keep_alive: bool,
    /// Quiet time before the first probe, 1 s to 2 h.
    pub keep_alive_initial_delay: Millis,
    /// TCP_NODELAY: answers leave at once, not when the segment is full.
    pub no_delay: bool,
    /// Memory that the whole server may take, 32 MiB to 1 TiB, for guests,
    /// frames and threads; the rest is derived from it (see [`MemoryPlan`]).
    pub memory: Bytes,
    /// Connections served at the same time, 1 to 100,000. One more is told
    /// SERVER_BUSY. 0: as many as `memory` has room for, 1,024 at most.
    pub max_connections: usize,
    /// Threads that serve connections, 8 to 16,384: a few that poll, and one
    /// for each call that waits or takes more than two milliseconds.
    pub max_threads: usize,
    /// How long a thread waits for the next request of a peer that it has
    /// answered before it serves others, 0 to 100 ms. Worth something where
    /// many clients that block run on the same processors: 50 ms give each of
    /// them a thread. What others want of such a connection waits as long.
    pub linger: Millis,
    /// Connections of one address (of IPv6, one /64), 0 to 10,000; 0 for no
    /// bound.
    pub max_connections_per_address: usize,
    /// Per cent of the connections that are kept for peers who have shown who
    /// they are, 0 to 90. Counts only where peers can.
    pub reserved_connections: usize,
    /// Header line and payload of one message, 1 KiB to 64 MiB; an answer's
    /// payload may be as large.
    pub max_message_size: Bytes,
    /// Answers of one connection that may wait to leave together, 1 to 4,096.
    pub max_in_flight: usize,
    /// First size of a connection's read buffer, 1 KiB to 1 MiB.
    pub read_buffer_size: Bytes,
    /// Answers of this size together leave without waiting for more, 1 KiB to
    /// 16 MiB.
    pub write_buffer_size: Bytes,
    /// From the first byte of a message to its last, 10 ms to 1 h.
    pub read_timeout: Millis,
    /// For a PROXY header, a TLS handshake and, where it is demanded, the hello
    /// together, 10 ms to 1 min.
    pub handshake_timeout: Millis,
    /// For a write to be taken by the peer's system, 10 ms to 1 h.
    pub write_timeout: Millis,
    /// Silence after which a connection is closed, 10 ms to 24 h.
    pub idle_timeout: Millis,
    /// Silence after which clients are asked to send a keep-alive, 10 ms to
    /// 24 h; where half of `idle_timeout` is less, they are asked for that.
    pub keep_alive_interval: Millis,
    /// Age at which a connection is closed in order, 1 s to 30 days; 0 for no
    /// bound.
    pub connection_max_age: Millis,
    /// For a request whose header names no timeout, 1 ms to 1 h.
    pub default_timeout: Millis,
    /// For the whole end of the server, 0 to 10 min. Calls are stopped half a
    /// second before, or at half of it if that is later.
    pub drain_timeout: Millis,
    /// Folder of the components.
    pub services_dir: PathBuf,
    /// Folder of what outlives the process: the store of durable values, the
    /// last good components, the token of the admin endpoint. Made with mode
    /// 0700; empty for the user's state folder.
    pub state_dir: PathBuf,
    /// How often the folder of the components is looked at for changes, 50 ms
    /// to 1 h; 0 for never.
    pub reload_interval: Millis,
    /// Memory that the store may use as cache, 1 MiB to 4 GiB; not counted in
    /// `memory`.
    pub store_cache: Bytes,
    /// Allow what is not safe where strangers can reach the server: a listener
    /// without authentication on an address that is not loopback, and tokens
    /// over connections that are not encrypted.
    pub allow_unsecure: bool,
    /// The process may write into its own folders only (Landlock), and start no
    /// program (seccomp), where the kernel can hold it to that.
    pub landlock: bool,
    /// What is logged: `error`, `warn`, `info`, `debug`, `trace` or `off`, for
    /// all or by target (`info,mb_server::server=debug`).
    pub log: String,
    /// How lines are written: `text`, `json`, or `auto`: text to a terminal,
    /// JSON to anything else.
    pub log_format: Format,
    /// The admin endpoint.
    pub admin: Admin,
    /// What components are loaded and run with.
    pub sandbox: Sandbox,
    /// TLS.
    pub tls: Tls,
    /// What each principal may do: `[principals.NAME]`.
    pub principals: Principals,
    /// Further listeners.
    pub listeners: Vec<access::Listener>,
    /// What each service may take and use: `[services.NAME]` over
    /// `[services.default]`.
    pub services: Services,
}

/// Settings of the admin endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Address or name to listen on; another than a loopback one takes
    /// `allow_unsecure`. Empty for none, where there is a socket.
    pub host: String,
    /// TCP port; 0 lets the system choose.
    pub port: u16,
    /// File of a Unix socket to listen on, made with mode 0600; empty for none.
    pub socket: PathBuf,
    /// Host headers that are answered besides loopback names, at most 16.
    pub allowed_hosts: Vec<String>,
}

/// Settings of the sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// Call stack of a component, 64 KiB to 2 MiB; each connection's thread
    /// has as much and 128 KiB more for every call that may be nested and the
    /// first, and 512 KiB beside.
    pub stack: Bytes,
    /// Folder of the compiled code, made with mode 0700; empty for the
    /// user's cache folder.
    pub cache_dir: PathBuf,
    /// All compiled code in that folder, 1 MiB to 1 TiB; beyond it, what was
    /// not used for the longest time is removed.
    pub cache_size: Bytes,
    /// Largest component file, 1 KiB to 1 GiB.
    pub max_component_size: Bytes,
    /// For a component to say who it is, when it is loaded, 10 ms to 10 min.
    pub describe_timeout: Millis,
    /// Memory that compiling one component may take, 64 MiB to 64 GiB. It
    /// happens in a process of its own and is not counted in `memory`.
    pub compile_memory: Bytes,
    /// How long compiling one component may take, 100 ms to 1 h.
    pub compile_timeout: Millis,
    /// How deep services may call each other, 0 to 16; each level adds a call
    /// stack to the threads.
    pub call_depth: usize,
    /// Of so many resets of instances one is verified, at random and beside
    /// the calls, 0 to 1,000,000,000; zero for none.
    pub verify_resets: u32,
    /// Every grant of values, secrets, durable values and calls must name the
    /// digest of the file that it is for.
    pub require_digest: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            host: OneOrMore::One("127.0.0.1".into()),
            port: 8081,
            plain: true,
            auth: Auth::None,
            tokens: PathBuf::new(),
            auth_failures: 10,
            backlog: 1024,
            keep_alive: true,
            keep_alive_initial_delay: Millis::secs(60),
            no_delay: true,
            memory: Bytes::mib(256),
            max_connections: 0,
            max_threads: 1280,
            linger: Millis::new(0),
            max_connections_per_address: 0,
            reserved_connections: 12,
            max_message_size: Bytes::mib(1),
            max_in_flight: 64,
            read_buffer_size: Bytes::kib(8),
            write_buffer_size: Bytes::kib(64),
            read_timeout: Millis::secs(10),
            handshake_timeout: Millis::secs(5),
            write_timeout: Millis::secs(10),
            idle_timeout: Millis::secs(60),
            keep_alive_interval: Millis::secs(30),
            connection_max_age: Millis::new(0),
            default_timeout: Millis::secs(5),
            drain_timeout: Millis::secs(10),
            services_dir: "services/dist".into(),
            state_dir: PathBuf::new(),
            reload_interval: Millis::new(500),
            store_cache: Bytes::mib(8),
            allow_unsecure: false,
            landlock: true,
            log: "info".into(),
            log_format: Format::Auto,
            admin: Admin::default(),
            sandbox: Sandbox::default(),
            tls: Tls::default(),
            principals: Principals::new(),
            listeners: Vec::new(),
            services: services::built_in(),
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 9090,
            socket: PathBuf::new(),
            allowed_hosts: Vec::new(),
        }
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            stack: Bytes::kib(512),
            cache_dir: PathBuf::new(),
            cache_size: Bytes::mib(1024),
            max_component_size: Bytes::mib(64),
            describe_timeout: Millis::secs(10),
            compile_memory: Bytes::mib(1024),
            compile_timeout: Millis::secs(60),
            call_depth: 4,
            verify_resets: 1000,
            require_digest: false,
        }
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

/// A setting out of its bounds: its key and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutOfBounds {
    /// Levels joined by dots.
    pub key: String,
    /// What it is, and what it may be.
    pub problem: String,
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
        if self.tokens.as_os_str().is_empty() {
            self.state_dir().join("tokens.json")
        } else {
            self.tokens.clone()
        }
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
            port,
            tls,
            auth: None,
            rights: None,
            allow: Vec::new(),
            deny: Vec::new(),
            proxy_from: Vec::new(),
        };
        let plain = self.plain.then(|| built_in(self.port, false));
        let tls = self.tls.files().map(|_| built_in(self.tls.port, true));
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
        if !self.state_dir.as_os_str().is_empty() {
            return self.state_dir.clone();
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
        // Destructured, so that a new setting without a bound does not compile.
        let Self {
            host,
            port: _,
            plain,
            auth: _,
            tokens: _,
            auth_failures,
            backlog,
            keep_alive: _,
            keep_alive_initial_delay,
            no_delay: _,
            memory,
            max_connections,
            max_threads,
            linger,
            max_connections_per_address,
            reserved_connections,
            max_message_size,
            max_in_flight,
            read_buffer_size,
            write_buffer_size,
            read_timeout,
            handshake_timeout,
            write_timeout,
            idle_timeout,
            keep_alive_interval,
            connection_max_age,
            default_timeout,
            drain_timeout,
            services_dir,
            state_dir: _,
            reload_interval,
            store_cache,
            allow_unsecure: _,
            landlock: _,
            log,
            log_format: _,
            admin:
                Admin {
                    host: admin_host,
                    port: _,
                    socket: admin_socket,
                    allowed_hosts,
                },
            sandbox:
                Sandbox {
                    stack,
                    cache_dir: _,
                    cache_size,
                    max_component_size,
                    describe_timeout,
                    compile_memory,
                    compile_timeout,
                    call_depth,
                    verify_resets,
                    require_digest,
                },
            tls,
            principals,
            listeners,
            services,
        } = self;
        let hour = Millis::secs(3600);
        let day = Millis::secs(24 * 3600);
        let least = Millis::new(10);
        let mut bounds = Bounds(Vec::new());
        bounds.that(
            "host",
            (1..=64).contains(&host.as_slice().len()),
            "1 to 64 addresses or names",
        );
        bounds.that(
            "host",
            host.as_slice().iter().all(|h| !h.is_empty()),
            "addresses or names, none empty",
        );
        bounds.range("backlog", *backlog, 1, 65_535);
        bounds.range(
            "keep_alive_initial_delay",
            *keep_alive_initial_delay,
            Millis::secs(1),
            Millis::secs(7200),
        );
        bounds.range("memory", *memory, Bytes::mib(32), Bytes::mib(1024 * 1024));
        bounds.range("max_connections", *max_connections, 0, 100_000);
        bounds.range("max_threads", *max_threads, 8, 16_384);
        bounds.range("linger", *linger, Millis::new(0), Millis::new(100));
        bounds.range(
            "max_connections_per_address",
            *max_connections_per_address,
            0,
            10_000,
        );
        bounds.range("reserved_connections", *reserved_connections, 0, 90);
        bounds.range("auth_failures", *auth_failures, 1, 6000);
        bounds.range(
            "handshake_timeout",
            *handshake_timeout,
            least,
            Millis::secs(60),
        );
        let some = *plain || tls.files().is_some() || !listeners.is_empty();
        bounds.that("plain", some, "true, or another listener given");
        access::check(tls, principals, listeners, &mut bounds);
        bounds.range(
            "max_message_size",
            *max_message_size,
            Bytes::kib(1),
            Bytes::mib(64),
        );
        bounds.range("max_in_flight", *max_in_flight, 1, 4096);
        bounds.range(
            "read_buffer_size",
            *read_buffer_size,
            Bytes::kib(1),
            Bytes::mib(1),
        );
        bounds.range(
            "write_buffer_size",
            *write_buffer_size,
            Bytes::kib(1),
            Bytes::mib(16),
        );
        bounds.range("read_timeout", *read_timeout, least, hour);
        bounds.range("write_timeout", *write_timeout, least, hour);
        bounds.range("idle_timeout", *idle_timeout, least, day);
        bounds.range("keep_alive_interval", *keep_alive_interval, least, day);
        if *connection_max_age != Millis::new(0) {
            let month = Millis::secs(30 * 24 * 3600);
            bounds.range(
                "connection_max_age",
                *connection_max_age,
                Millis::secs(1),
                month,
            );
        }
        bounds.range("default_timeout", *default_timeout, Millis::new(1), hour);
        bounds.range(
            "drain_timeout",
            *drain_timeout,
            Millis::new(0),
            Millis::secs(600),
        );
        bounds.that(
            "services_dir",
            !services_dir.as_os_str().is_empty(),
            "a folder",
        );
        let often = *reload_interval == Millis::new(0) || *reload_interval >= Millis::new(50);
        bounds.that(
            "reload_interval",
            often && *reload_interval <= hour,
            "0, or 50ms to 1h",
        );
        bounds.range(
            "sandbox.cache_size",
            *cache_size,
            Bytes::mib(1),
            Bytes::mib(1024 * 1024),
        );
        bounds.range("store_cache", *store_cache, Bytes::mib(1), Bytes::mib(4096));
        let filter = log.parse::<tracing_subscriber::filter::Targets>();
        bounds.that(
            "log",
            filter.is_ok(),
            "a level (error, warn, info, debug, trace, off), or target=level, with commas",
        );
        let any = !admin_host.is_empty() || !admin_socket.as_os_str().is_empty();
        bounds.that(
            "admin.host",
            any,
            "an address or a name, or empty if there is admin.socket",
        );
        let length = admin_socket.as_os_str().len();
        bounds.that(
            "admin.socket",
            length <= 107,
            "a path of at most 107 bytes, as the system has it",
        );
        bounds.that(
            "admin.allowed_hosts",
            allowed_hosts.len() <= 16,
            "at most 16 names",
        );
        bounds.range("sandbox.stack", *stack, Bytes::kib(64), Bytes::mib(2));
        bounds.range(
            "sandbox.max_component_size",
            *max_component_size,
            Bytes::kib(1),
            Bytes::mib(1024),
        );
        bounds.range(
            "sandbox.describe_timeout",
            *describe_timeout,
            least,
            Millis::secs(600),
        );
        bounds.range(
            "sandbox.compile_memory",
            *compile_memory,
            Bytes::mib(64),
            Bytes::mib(64 * 1024),
        );
        bounds.range(
            "sandbox.compile_timeout",
            *compile_timeout,
            Millis::new(100),
            hour,
        );
        bounds.range("sandbox.call_depth", *call_depth, 0, 16);
        bounds.range("sandbox.verify_resets", *verify_resets, 0, 1_000_000_000);
        services::check(services, *require_digest, &mut bounds);
        if bounds.0.is_empty() {
            bounds.0 = MemoryPlan::of(self).conflicts(self);
        }
        bounds.0
    }
}

struct Bounds(Vec<OutOfBounds>);

impl Bounds {
    fn range<T>(&mut self, key: impl Into<String>, value: T, least: T, most: T)
    where
        T: PartialOrd + Copy + std::fmt::Display,
    {
        if !(least..=most).contains(&value) {
            let problem = format!("is {value}, allowed is {least} to {most}");
            self.0.push(OutOfBounds {
                key: key.into(),
                problem,
            });
        }
    }

    fn optional<T>(&mut self, key: impl Into<String>, value: Option<T>, least: T, most: T)
    where
        T: PartialOrd + Copy + std::fmt::Display,
    {
        if let Some(value) = value {
            self.range(key, value, least, most);
        }
    }

    fn that(&mut self, key: impl Into<String>, holds: bool, allowed: &str) {
        if !holds {
            self.0.push(OutOfBounds {
                key: key.into(),
                problem: format!("must be {allowed}"),
            });
        }
    }
}
