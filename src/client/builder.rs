//! How to connect: what can be said of it, and the connecting itself.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, atomic::AtomicU64},
    thread,
    time::{Duration, Instant},
};

use rustls::ClientConfig;

use super::{
    Client, ClientError, End, LONGEST_TIME, link,
    shared::{ClientCore, State, spawn_reader},
};
use crate::transport::{ClientTls, client_config, host_and_port, server_name};

/// How often a request is sent again at most, unless the builder says.
const DEFAULT_RETRIES: u32 = 3;

/// Requests without an answer at the same time, unless the builder says.
const DEFAULT_MAX_WAITING: usize = 1024;

/// Says how to connect; see [`Client::builder`].
#[derive(Debug, Clone)]
pub struct Builder {
    pub(super) server: String,
    pub(super) name: String,
    pub(super) tls: Option<ClientTls>,
    pub(super) token: Option<String>,
    pub(super) allow_unsecure: bool,
    pub(super) connect_timeout: Duration,
    pub(super) handshake_timeout: Duration,
    pub(super) write_timeout: Duration,
    pub(super) keep_alive: Duration,
    pub(super) reconnect: bool,
    pub(super) retries: u32,
    pub(super) max_waiting: usize,
}

/// What the builder says, and what was found with it.
pub(super) struct Settings {
    pub(super) options: Builder,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: Option<(Arc<ClientConfig>, String)>,
}

impl Builder {
    pub(super) fn new(server: String) -> Self {
        Self {
            server,
            name: concat!("mb-server/", env!("CARGO_PKG_VERSION")).into(),
            tls: None,
            token: None,
            allow_unsecure: false,
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            write_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(30),
            reconnect: true,
            retries: DEFAULT_RETRIES,
            max_waiting: DEFAULT_MAX_WAITING,
        }
    }

    /// Uses TLS.
    #[must_use]
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Uses TLS and trusts the CAs of a PEM file.
    #[must_use]
    pub fn ca(mut self, file: impl Into<PathBuf>) -> Self {
        self.tls.get_or_insert_default().ca = Some(file.into());
        self
    }

    /// Shows a certificate; PEM files of its chain and its key.
    #[must_use]
    pub fn certificate(mut self, cert: impl AsRef<Path>, key: impl AsRef<Path>) -> Self {
        self.tls.get_or_insert_default().identity =
            Some((cert.as_ref().into(), key.as_ref().into()));
        self
    }

    /// Says hello with a token. Over a connection that is neither TLS nor to
    /// this machine it is not sent, unless [`Builder::allow_unsecure`] says so.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// Whether the token may leave this machine without TLS, for everybody on
    /// the way to read; it may not, unless said.
    #[must_use]
    pub fn allow_unsecure(mut self, allow: bool) -> Self {
        self.allow_unsecure = allow;
        self
    }

    /// Who the client says it is, as `name/version`.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// For the name to be resolved and TCP to connect; 5 s unless said.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout.min(LONGEST_TIME);
        self
    }

    /// For TLS and the hello together; 5 s unless said.
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout.min(LONGEST_TIME);
        self
    }

    /// For a write to be taken; 10 s unless said. It is that of whoever writes:
    /// a call may wait so long beyond its own timeout for a server that does not
    /// read.
    #[must_use]
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.write_timeout = timeout.min(LONGEST_TIME);
        self
    }

    /// Silence after which a keep-alive is sent; 30 s unless said, or less if
    /// the server asks for it.
    #[must_use]
    pub fn keep_alive(mut self, interval: Duration) -> Self {
        self.keep_alive = interval.min(LONGEST_TIME);
        self
    }

    /// Whether to connect again after a loss; it is, unless said.
    #[must_use]
    pub fn reconnect(mut self, reconnect: bool) -> Self {
        self.reconnect = reconnect;
        self
    }

    /// How often a request is sent again at most; 3 unless said.
    #[must_use]
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// Requests without an answer at the same time; one more waits for room.
    /// 1,024 unless said.
    #[must_use]
    pub fn max_waiting(mut self, requests: usize) -> Self {
        self.max_waiting = requests.max(1);
        self
    }

    /// Checks what was given, and connects to nothing.
    ///
    /// # Errors
    /// [`ClientError::NotSent`] says what can't be: an address, a file, a name.
    pub fn check(&self) -> Result<(), ClientError> {
        let settled = self.clone().settle();
        settled.map(drop).map_err(ClientError::NotSent)
    }

    fn settle(self) -> Result<Settings, String> {
        let (host, port) = host_and_port(&self.server)?;
        let tls = match &self.tls {
            None => None,
            Some(tls) => {
                let config = client_config(tls).map_err(|error| error.to_string())?;
                let name = tls.server_name.clone().unwrap_or_else(|| host.clone());
                server_name(&name).map_err(|error| error.to_string())?;
                Some((config, name))
            }
        };
        Ok(Settings {
            options: self,
            host,
            port,
            tls,
        })
    }

    /// Connects, and says hello.
    ///
    /// # Errors
    /// [`ClientError::NotSent`] says what is wrong: an address, a file, the
    /// server, its certificate or ours; [`ClientError::Answered`], why the
    /// server refuses the hello, as it does with a wrong token.
    pub fn connect(self) -> Result<Client, ClientError> {
        let settings = self.settle().map_err(ClientError::NotSent)?;
        let (link, buffer) = link::open(&settings, 1)?;
        let state = State {
            link: Some(link.clone()),
            active: Some(Instant::now()),
            ..State::default()
        };
        let shared = Arc::new(ClientCore {
            settings,
            state: Mutex::new(state),
            changed: Condvar::new(),
            writing: Mutex::default(),
            ids: AtomicU64::new(1),
            prefix: uuid::Uuid::new_v4().simple().to_string()[..12].to_owned(),
        });
        let no_thread =
            |error: io::Error| ClientError::NotSent(format!("can't start a thread: {error}"));
        let end = End(Arc::clone(&shared));
        spawn_reader(&shared, link, buffer).map_err(no_thread)?;
        let manager = Arc::clone(&shared);
        thread::Builder::new()
            .name("mb-client".into())
            .spawn(move || manager.manage())
            .map_err(no_thread)?;
        Ok(Client {
            shared,
            _end: Arc::new(end),
        })
    }
}
