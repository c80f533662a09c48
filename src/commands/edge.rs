//! The edge of the server from its settings: listeners, TLS and who may come
//! in; and what of it is read again while the server runs.

use std::{
    io, mem,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use super::usage;
use crate::{
    access::{Access, ListenerPolicy},
    admin::is_loopback,
    config::{Auth, Config, Tls, access::Listener, given},
    files::Stamp,
    log::Limiter,
    metrics::snapshot::{InvalidCertificate, StaleFiles},
    server::ListenerSettings,
    transport::{ServerTls, resolve},
};

/// How long a read that failed waits for its next try: none the first time,
/// then this, then twice as long each time, up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Times in a minute that one address may fail to authenticate, in each way.
const AUTH_FAILURES: u32 = 10;

/// TLS and tokens of a running server.
pub(super) struct Edge {
    pub(super) access: Arc<Access>,
    tls: Option<(Tls, Arc<ArcSwap<ServerTls>>)>,
    seen: Mutex<Seen>,
    /// Reads that failed since the files were last read.
    failed: Mutex<Vec<FailedRead>>,
    /// Warnings about TLS that the log has already, until they are over.
    warned: Mutex<Vec<String>>,
}

/// How the files looked before they were last read: taken before and not
/// after, so that what changes meanwhile is read once more and not missed.
#[derive(Default)]
struct Seen {
    tls: Vec<Option<Stamp>>,
    tokens: Option<Stamp>,
}

/// Files that are read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    Certificates,
    Tokens,
}

impl Files {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Certificates => "certificates",
            Self::Tokens => "tokens",
        }
    }
}

/// A read that failed. It is done again although the files look the same: the
/// disk, the lack of a descriptor, or a file that was being written may be why.
#[derive(Debug)]
struct FailedRead {
    files: Files,
    error: String,
    pause: Duration,
    /// When it is done again.
    next: Instant,
}

impl Edge {
    /// Reads and checks what the settings name.
    pub(super) fn load(config: &Config) -> Result<Arc<Self>, (super::Exit, String)> {
        let mut seen = Seen {
            tokens: Stamp::of(&config.client_tokens()).ok(),
            ..Seen::default()
        };
        let mut tls = None;
        if config.tls.is_on() {
            seen.tls = stamps(&config.tls);
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
            seen: Mutex::new(seen),
            failed: Mutex::default(),
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
        if self.tls.is_none() {
            return Err("TLS is not switched on: tls.cert is not set".into());
        }
        let loaded = self.load_certificates();
        self.note(Files::Certificates, loaded.as_ref().err(), Instant::now());
        loaded
    }

    fn load_certificates(&self) -> Result<(), String> {
        let Some((files, tls)) = &self.tls else {
            return Ok(());
        };
        let loaded = ServerTls::load(files).map_err(|error| error.to_string())?;
        if let (Some((file, problem)), None) = (loaded.invalid_now(), tls.load().invalid_now()) {
            return Err(format!("{}: {problem}", file.display()));
        }
        tls.store(Arc::new(loaded));
        self.warn_of_tls();
        Ok(())
    }

    /// Files that can't be read or used at present: what was read before holds.
    pub(super) fn stale_files(&self) -> Vec<StaleFiles> {
        let row = |read: &FailedRead| StaleFiles {
            files: read.files.as_str(),
            error: read.error.clone(),
        };
        self.failed().iter().map(row).collect()
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
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in warnings.iter().filter(|warning| !warned.contains(warning)) {
            tracing::warn!("{warning}");
        }
        *warned = warnings;
    }

    /// Reads certificates and tokens again, as a look that finds them changed
    /// does; what can't be used leaves what there was.
    pub(super) fn reload(&self) {
        let now = Instant::now();
        if self.tls.is_some() {
            self.read(Files::Certificates, now);
        }
        self.read(Files::Tokens, now);
    }

    /// Looks for changed files from a thread of its own, until the process
    /// ends.
    pub(super) fn watch(self: &Arc<Self>, every: Duration) -> io::Result<()> {
        let edge = Arc::clone(self);
        let look = move || {
            loop {
                thread::sleep(every);
                edge.look(Instant::now());
            }
        };
        thread::Builder::new()
            .name("mb-edge".into())
            .spawn(look)
            .map(drop)
    }

    /// Reads again what changed since it was last looked at, or could not be
    /// read then.
    fn look(&self, now: Instant) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((files, _)) = &self.tls {
            let tls = stamps(files);
            let changed = mem::replace(&mut seen.tls, tls) != seen.tls;
            self.read_if(changed, Files::Certificates, now);
        }
        self.warn_of_tls();
        let tokens = Stamp::of(self.access.file()).ok();
        let changed = mem::replace(&mut seen.tokens, tokens) != seen.tokens;
        self.read_if(changed, Files::Tokens, now);
    }

    fn read_if(&self, changed: bool, files: Files, now: Instant) {
        if changed {
            // The content is another one: its failure is logged, and the next
            // look tries again.
            self.failed().retain(|read| read.files != files);
        }
        let due = |read: &FailedRead| read.files == files && read.next <= now;
        if changed || self.failed().iter().any(due) {
            self.read(files, now);
        }
    }

    fn read(&self, files: Files, now: Instant) {
        let read = match files {
            Files::Certificates => self.load_certificates().map(|()| "read again".into()),
            Files::Tokens => self
                .access
                .reload()
                .map(|count| format!("{count} of them"))
                .map_err(|error| error.to_string()),
        };
        self.note(files, read.as_ref().err(), now);
        static LINES: Limiter = Limiter::new();
        if let Ok(done) = read
            && LINES.allows("certificates and tokens")
        {
            tracing::info!("{}: {done}", files.as_str());
        }
    }

    /// Notes what came of a read. The same failure is logged once.
    fn note(&self, files: Files, error: Option<&String>, now: Instant) {
        let mut failed = self.failed();
        let before = failed
            .iter()
            .position(|read| read.files == files)
            .map(|at| failed.swap_remove(at));
        let Some(error) = error else { return };
        let pause = before.as_ref().map_or(Duration::ZERO, |read| {
            (2 * read.pause).clamp(FIRST_RETRY, LONGEST_RETRY)
        });
        let is_known = before.is_some_and(|read| read.error == *error);
        failed.push(FailedRead {
            files,
            error: error.clone(),
            pause,
            next: now + pause,
        });
        drop(failed);
        static LINES: Limiter = Limiter::new();
        if !is_known && LINES.allows("certificates and tokens that failed") {
            tracing::warn!(
                "{} stay as they were: {error}; the server tries again until that succeeds",
                files.as_str()
            );
        }
    }

    fn failed(&self) -> MutexGuard<'_, Vec<FailedRead>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stamps(tls: &Tls) -> Vec<Option<Stamp>> {
    tls.files().map(|file| Stamp::of(file).ok()).collect()
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
    fn what_changes_after_it_was_read_is_read_at_the_first_look() {
        let folder = tempfile::tempdir().unwrap();
        let (edge, is_admitted) = edge_with_tokens(folder.path());
        let (_, token) = tokens::create(edge.access.file(), "ann", None, None).unwrap();
        assert!(!is_admitted(&token), "nobody has looked yet");
        edge.look(Instant::now());
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
        let now = Instant::now();
        let look_after = |millis| edge.look(now + Duration::from_millis(millis));

        mode(0o707);
        look_after(0);
        let [StaleFiles { files, error }] = &*edge.stale_files() else {
            panic!("one of them failed: {:?}", edge.stale_files());
        };
        assert!(*files == "tokens" && error.contains("chmod"), "{error}");
        mode(0o700);
        look_after(0);
        assert!(is_admitted(&token), "the next look tries");
        assert!(edge.stale_files().is_empty() && Stamp::of(&file).ok() == looks);

        let (_, other) = tokens::create(&file, "bob", None, None).unwrap();
        mode(0o707);
        look_after(0);
        look_after(0);
        mode(0o700);
        look_after(999);
        assert!(
            !is_admitted(&other),
            "the second try was the last for a second"
        );
        look_after(1000);
        assert!(is_admitted(&other));

        mode(0o707);
        edge.reload();
        for _ in 0..20 {
            look_after(3_600_000);
            edge.failed()[0].next = now;
        }
        assert_eq!(edge.failed()[0].pause, LONGEST_RETRY);
    }
}
