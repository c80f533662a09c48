//! The edge of the server from its settings: listeners, TLS and who may come
//! in; and what of it is read again while the server runs.

use std::{
    collections::BTreeSet,
    io, mem,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use arc_swap::ArcSwap;

use super::{every, usage};
use crate::{
    access::{Access, ListenerPolicy},
    admin::is_loopback,
    config::{Auth, Config, OneOrMore, Tls, access::Listener, given},
    files::Stamp,
    locks::lock,
    log::Limiter,
    metrics::snapshot::{InvalidCertificate, StaleFiles},
    server::ListenerSettings,
    transport::{ServerTls, resolve},
};

/// Times in a minute that one address may fail to authenticate, in each way.
const AUTH_FAILURES: u32 = 10;

/// TLS and tokens of a running server.
pub(super) struct Edge {
    pub(super) access: Arc<Access>,
    tls: Option<LiveTls>,
    certificates: Watched,
    tokens: Watched,
    /// Warnings about TLS that the log has already, until they are over.
    warned: Mutex<Vec<String>>,
}

/// Where the files of TLS are, and what was last read from them.
type LiveTls = (Tls, Arc<ArcSwap<ServerTls>>);

/// Files that are read together, and again when they look different or could
/// not be read: the disk, the lack of a descriptor, or a file that was being
/// written may be why.
struct Watched {
    name: &'static str,
    /// How they looked before they were last read: taken before and not after,
    /// so that what changes meanwhile is read once more and not missed.
    seen: Mutex<Vec<Option<Stamp>>>,
    /// Why they could not be read.
    error: Mutex<Option<String>>,
}

impl Watched {
    fn new(name: &'static str, seen: Vec<Option<Stamp>>) -> Self {
        Self {
            name,
            seen: Mutex::new(seen),
            error: Mutex::default(),
        }
    }

    /// Reads them if that is due.
    fn look(&self, now: Vec<Option<Stamp>>, read: impl FnOnce() -> Result<String, String>) {
        let mut seen = lock(&self.seen);
        let changed = mem::replace(&mut *seen, now) != *seen;
        if changed || lock(&self.error).is_some() {
            let _ = self.note(read());
        }
    }

    /// Notes what came of a read. The same failure is logged once.
    fn note(&self, read: Result<String, String>) -> Result<(), String> {
        static LINES: Limiter = Limiter::new();
        let error = read.as_ref().err().cloned();
        let before = mem::replace(&mut *lock(&self.error), error.clone());
        if (error.is_none() || error != before) && LINES.allows("certificates and tokens") {
            match &read {
                Ok(done) => tracing::info!("{}: {done}", self.name),
                Err(error) => tracing::warn!(
                    "{} stay as they were: {error}; the server tries again until that succeeds",
                    self.name
                ),
            }
        }
        read.map(drop)
    }
}

impl Edge {
    /// Reads and checks what the settings name.
    pub(super) fn load(config: &Config) -> Result<Arc<Self>, (super::Exit, String)> {
        let tokens = Watched::new("tokens", stamps([&*config.client_tokens()]));
        let certificates = Watched::new("certificates", stamps(config.tls.files()));
        let mut tls = None;
        if config.tls.is_on() {
            let loaded =
                ServerTls::load(&config.tls).map_err(|error| usage(format!("tls: {error}")))?;
            tls = Some((config.tls.clone(), Arc::new(ArcSwap::from_pointee(loaded))));
        }
        let access = Access::new(
            config.principals.clone(),
            config.client_tokens(),
            AUTH_FAILURES,
        );
        let edge = Self {
            access: access.map_err(usage)?,
            tls,
            certificates,
            tokens,
            warned: Mutex::default(),
        };
        edge.warn_of_tls();
        Ok(Arc::new(edge))
    }

    /// The listeners that the settings name.
    pub(super) fn listeners(&self, config: &Config) -> Vec<Arc<ListenerSettings>> {
        let build = |listener: Listener| {
            let policy = ListenerPolicy {
                auth: listener.auth.unwrap_or(config.auth),
                rights: listener.rights.clone().map(Into::into),
                allow_unsecure: config.allow_unsecure,
            };
            let tls = self.tls.as_ref().filter(|_| listener.tls);
            Arc::new(ListenerSettings {
                tls: tls.map(|(_, tls)| Arc::clone(tls)),
                policy: Arc::new(policy),
                config: listener,
            })
        };
        config.all_listeners().into_iter().map(build).collect()
    }

    /// Reads the certificates again. Connections from before keep the server's,
    /// and are closed where their own is not valid by what was read.
    pub(super) fn reload_tls(&self) -> Result<(), String> {
        let tls = self.tls.as_ref();
        let tls = tls.ok_or("TLS is not switched on: tls.cert is not set")?;
        self.certificates.note(self.load_certificates(tls))
    }

    fn load_certificates(&self, (files, tls): &LiveTls) -> Result<String, String> {
        let loaded = ServerTls::load(files).map_err(|error| error.to_string())?;
        if let (Some((file, problem)), None) = (loaded.invalid_now(), tls.load().invalid_now()) {
            return Err(format!("{}: {problem}", file.display()));
        }
        tls.store(Arc::new(loaded));
        self.warn_of_tls();
        Ok("read again".into())
    }

    fn load_tokens(&self) -> Result<String, String> {
        let count = self.access.reload().map_err(|error| error.to_string())?;
        Ok(format!("{count} of them"))
    }

    /// Files that can't be read or used at present: what was read before holds.
    pub(super) fn stale_files(&self) -> Vec<StaleFiles> {
        let row = |watched: &Watched| {
            let error = lock(&watched.error).clone()?;
            let files = watched.name;
            Some(StaleFiles { files, error })
        };
        [&self.certificates, &self.tokens]
            .into_iter()
            .filter_map(row)
            .collect()
    }

    /// The server's own certificate, if it is not valid now.
    pub(super) fn invalid_certificates(&self) -> Vec<InvalidCertificate> {
        let tls = self.tls.as_ref().map(|(_, tls)| tls.load());
        let invalid = tls.as_ref().and_then(|tls| tls.invalid_now());
        let row = |(file, error): (&Path, String)| InvalidCertificate {
            file: file.display().to_string(),
            error,
        };
        invalid.map(row).into_iter().collect()
    }

    /// Warns once of what is wrong with the files of TLS, and of what has
    /// come to be wrong since.
    fn warn_of_tls(&self) {
        let Some((_, tls)) = &self.tls else { return };
        let warnings = tls.load().warnings_now();
        let mut warned = lock(&self.warned);
        for warning in warnings.iter().filter(|warning| !warned.contains(warning)) {
            tracing::warn!("{warning}");
        }
        *warned = warnings;
    }

    /// Reads certificates and tokens again, as a look that finds them changed
    /// does; what can't be used leaves what there was.
    pub(super) fn reload(&self) {
        let _ = self.reload_tls();
        let _ = self.tokens.note(self.load_tokens());
    }

    /// Looks for changed files from a thread of its own, until the process
    /// ends.
    pub(super) fn watch(self: &Arc<Self>, pause: Duration) -> io::Result<()> {
        let edge = Arc::clone(self);
        every("mb-edge", pause, move || {
            edge.look();
            true
        })
    }

    fn look(&self) {
        if let Some(tls) = &self.tls {
            let now = stamps(tls.0.files());
            self.certificates.look(now, || self.load_certificates(tls));
        }
        self.warn_of_tls();
        let now = stamps([&**self.access.file()]);
        self.tokens.look(now, || self.load_tokens());
    }
}

fn stamps<'a>(files: impl IntoIterator<Item = &'a Path>) -> Vec<Option<Stamp>> {
    let stamp = |file| Stamp::of(file).ok();
    files.into_iter().map(stamp).collect()
}

/// Whether peers can authenticate, so that it makes sense to keep
/// something for those who do.
pub(super) fn peers_can_say(config: &Config) -> bool {
    let asked = |listener: &Listener| {
        listener.auth.unwrap_or(config.auth) != Auth::None
            || listener.tls && given(&config.tls.ca).is_some()
    };
    config.all_listeners().iter().any(asked)
}

/// Refuses what would let others reach the server without authentication,
/// unless that was asked for by name.
pub(super) fn check_exposure(config: &Config) -> Result<(), (super::Exit, String)> {
    let find = |setting: &str,
                host: &str,
                port: u16|
     -> Result<Option<SocketAddr>, (super::Exit, String)> {
        let addresses =
            resolve(host, port).map_err(|e| usage(format!("`{setting}` = {host:?}: {e}")))?;
        Ok(addresses.into_iter().find(|address| !is_loopback(address)))
    };
    let host = &config.admin.host;
    if !host.is_empty()
        && (!config.allow_unsecure || config.admin.deploy)
        && let Some(open) = find("admin.host", host, config.admin.port)?
    {
        if config.admin.deploy {
            return Err(usage(format!(
                "`admin.deploy` = true, and `admin.host` = {host:?} is {}, which others can reach, and the admin endpoint \
                 speaks no TLS: set admin.host to a loopback address, or to \"\" with admin.socket, and deploy over a \
                 tunnel, such as ssh -L 9090:127.0.0.1:9090",
                open.ip()
            )));
        }
        return Err(usage(format!(
            "`admin.host` = {host:?} is {}, which others can reach, and the admin endpoint speaks no TLS: use a tunnel \
             to a loopback address, or set allow_unsecure = true if you mean it; it then takes the token to read, too",
            open.ip()
        )));
    }
    for listener in config.all_listeners() {
        let asked = listener.auth.unwrap_or(config.auth) != Auth::None
            || listener.tls && config.tls.demands_certificate();
        let port = listener.port.unwrap_or(0);
        for host in listener.host.as_slice() {
            let Some(open) = find("host", host, port)?.filter(|_| !asked && !config.allow_unsecure)
            else {
                continue;
            };
            return Err(usage(format!(
                "`host` = {host:?} port {port} is {}, which others can reach without authentication; set auth = \"required\" (MB_AUTH=required), create a token (mb-server token new) and set tls.cert and \
                 tls.key, without which a token is taken from this machine only, or set allow_unsecure = true \
                 (MB_ALLOW_UNSECURE=true) if you mean it",
                open.ip()
            )));
        }
    }
    check_addresses(config)
}

/// Two listeners of one address: only one of them would be reached, with its
/// rules and not with the other's.
fn check_addresses(config: &Config) -> Result<(), (super::Exit, String)> {
    let mut taken = BTreeSet::new();
    let admin = Listener {
        host: OneOrMore::One(config.admin.host.clone()),
        port: Some(config.admin.port),
        ..Listener::default()
    };
    let admin = (!config.admin.host.is_empty()).then_some(admin);
    for listener in config.all_listeners().iter().chain(&admin) {
        // 0 is another one each time.
        let Some(port) = listener.port.filter(|port| *port != 0) else {
            continue;
        };
        let mut own = BTreeSet::new();
        for host in listener.host.as_slice() {
            let addresses =
                resolve(host, port).map_err(|e| usage(format!("`host` = {host:?}: {e}")))?;
            own.extend(addresses);
        }
        if let Some(twice) = own.intersection(&taken).next() {
            return Err(usage(format!(
                "two listeners have the address {twice}: give one of port, tls.port, admin.port and those of [[listeners]] \
                 another one"
            )));
        }
        taken.extend(own);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, net::Ipv4Addr, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::access::tokens;

    /// An edge with the tokens of a folder, and whether one of them is taken.
    fn edge_with_tokens(folder: &Path) -> (Arc<Edge>, impl Fn(&str) -> bool) {
        let config = Config {
            state_dir: folder.into(),
            ..Config::default()
        };
        let edge = Edge::load(&config).unwrap_or_else(|(_, error)| panic!("{error}"));
        let policy = ListenerPolicy {
            auth: Auth::Required,
            rights: None,
            allow_unsecure: false,
        };
        let unauthenticated = edge.access.unauthenticated(
            "1".into(),
            Ipv4Addr::LOCALHOST.into(),
            false,
            &Arc::new(policy),
        );
        let access = Arc::clone(&edge.access);
        (edge, move |token: &str| {
            access.authenticate(&unauthenticated, token).is_ok()
        })
    }

    #[test]
    fn two_listeners_of_one_address_are_refused() {
        let problem = |change: &dyn Fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            check_addresses(&config).err().map(|(_, error)| error)
        };
        let on = |host: &str, port| Listener {
            host: OneOrMore::One(host.into()),
            port: Some(port),
            ..Listener::default()
        };
        assert_eq!(problem(&|_| {}), None);
        assert_eq!(
            problem(&|config| config.listeners = vec![on("127.0.0.2", 8081), on("127.0.0.1", 0)]),
            None
        );
        // Of one listener, names of the same address are one.
        let hosts = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        assert_eq!(
            problem(&|config| config.host = OneOrMore::More(hosts.clone())),
            None
        );
        for twice in [
            problem(&|config| config.listeners = vec![on("localhost", 8081)]),
            problem(&|config| config.listeners = vec![on("127.0.0.2", 1), on("127.0.0.2", 1)]),
            problem(&|config| config.admin.port = 8081),
        ] {
            let problem = twice.unwrap_or_default();
            assert!(
                problem.contains("two listeners have the address 127.0.0."),
                "{problem}"
            );
        }
    }

    #[test]
    fn what_changes_after_it_was_read_is_read_at_the_first_look() {
        let folder = tempfile::tempdir().unwrap();
        let (edge, is_admitted) = edge_with_tokens(folder.path());
        let (_, token) = tokens::create(edge.access.file(), "ann", None, None).unwrap();
        assert!(!is_admitted(&token), "nobody has looked yet");
        edge.look();
        assert!(is_admitted(&token));
    }

    #[test]
    fn what_could_not_be_read_is_tried_again_though_it_looks_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let (edge, is_admitted) = edge_with_tokens(folder.path());
        let file = edge.access.file().to_owned();
        let (_, token) = tokens::create(&file, "ann", None, None).unwrap();
        let looks = Stamp::of(&file).ok();
        // Of its folder: the file itself looks the same.
        let mode = |mode| {
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(0o707);
        edge.look();
        let [StaleFiles { files, error }] = &*edge.stale_files() else {
            panic!("one of them failed: {:?}", edge.stale_files());
        };
        assert!(*files == "tokens" && error.contains("chmod"), "{error}");
        edge.look();
        assert!(!is_admitted(&token) && edge.stale_files().len() == 1);
        mode(0o700);
        edge.look();
        assert!(is_admitted(&token), "the next look tries");
        assert!(edge.stale_files().is_empty() && Stamp::of(&file).ok() == looks);
    }
}
