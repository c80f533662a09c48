//! `mb-server serve`: wires everything together and waits for a signal.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use signal_hook::consts::{SIGHUP, SIGTERM, SIGXFSZ};

use super::{
    Exit, INTERRUPTED, Result,
    confine::confine,
    connect::DEFAULT_SERVER,
    edge, failure, notify, printable,
    serving::{Serving, ServingPlan, compiler},
    spawn, usage,
};
use crate::{
    catalog::Catalog,
    config::{self, Config, ConfigError, Flags, Loaded, MemoryPlan, access::Protocol},
    files,
    log::{self, Limiter},
    transport::Inherited,
    trusted::{self, OpenToOthers},
};

/// How often main looks for a signal that nobody told it of.
const LOOK_FOR_SIGNALS: Duration = Duration::from_secs(1);

/// How long the watchdog's own connection may take.
const ALIVE_WITHIN: Duration = Duration::from_secs(1);

/// Serve the components of a folder
///
/// Later sources of settings win: defaults, the file of --config, environment
/// variables (MB_PORT, MB_ADMIN__PORT), these flags. Ends with Ctrl-C or
/// SIGTERM: answers what was begun first; a second signal ends it at once.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Arguments {
    /// Settings in TOML; `mb-server check` prints all of them
    #[arg(long, value_name = "FILE", env = "MB_CONFIG")]
    config: Option<PathBuf>,
    /// Address or name to listen on [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port; 0 takes a free one [default: 8081]
    #[arg(long)]
    port: Option<u16>,
    /// Address or name of the admin endpoint [default: 127.0.0.1]
    #[arg(long)]
    admin_host: Option<String>,
    /// Port of the admin endpoint; 0 takes a free one [default: 9090]
    #[arg(long)]
    admin_port: Option<u16>,
    /// Folder of the components [default: services/dist]
    #[arg(long, value_name = "DIR")]
    services: Option<String>,
}

impl Arguments {
    pub(super) fn load(&self) -> Result<Loaded, ConfigError> {
        let Self {
            config,
            host,
            port,
            admin_host,
            admin_port,
            services,
        } = self.clone();
        let flags = Flags::default()
            .with("host", host)
            .with("port", port)
            .with("admin.host", admin_host)
            .with("admin.port", admin_port)
            .with("services_dir", services);
        config::load(config.as_deref(), flags)
    }
}

pub(super) fn run(arguments: Arguments) -> Result {
    let begun = Instant::now();
    let loaded = arguments.load().map_err(usage)?;
    edge::check_exposure(&loaded.config)?;
    start_log(&loaded.config.log, loaded.config.log_format)?;
    own_state_dir(&loaded.config.state_dir())?;
    // First of all, so that no process inherits these.
    let inherited = Inherited::from_env().map_err(failure)?;
    let compiler = compiler();
    // It holds for threads that are started later.
    confine(&loaded.config);
    write_log_in_background()?;
    let no_signals = |error: String| failure(format!("signals can't be received: {error}"));
    // Until somebody reacts to it, a SIGHUP would end the process. One of files
    // that grow beyond their limit always would; the write fails as well.
    let reloads = Arc::new(AtomicBool::new(false));
    for (signal, flag) in [(SIGHUP, &reloads), (SIGXFSZ, &Arc::default())] {
        signal_hook::flag::register(signal, Arc::clone(flag))
            .map_err(|error| no_signals(error.to_string()))?;
    }
    let (end, signals) = listen_for_signals().map_err(no_signals)?;
    let terminated = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGTERM, Arc::clone(&terminated))
        .map_err(|error| no_signals(error.to_string()))?;
    let again = Box::new(move || arguments.load().map_err(|error| error.to_string()));
    let plan = ServingPlan {
        loaded,
        again,
        compiler,
        always_store: false,
        inherited,
        end,
    };
    let serving = Serving::start(plan, |dispatcher| Arc::new(dispatcher))?;
    let Serving {
        catalog,
        edge,
        config,
        admin,
        ..
    } = &serving;
    follow_hangups(&serving).map_err(failure)?;
    if reloads.load(SeqCst) {
        signal_hook::low_level::raise(SIGHUP).map_err(failure)?;
    }
    if config.reload_interval.0 > Duration::ZERO {
        catalog.watch(config.reload_interval.0).map_err(failure)?;
        edge.watch(config.reload_interval.0).map_err(failure)?;
    }
    // That it takes connections on its own ports is the sign of life.
    let address = serving.addresses().first().map(|(address, _)| *address);
    notify::keep_watchdog(move || address.is_none_or(takes_connections)).map_err(failure)?;

    notify::notify("READY=1");
    // Last: who reads this comes at once, and may take the descriptors that
    // the start still needs.
    announce(
        &serving.addresses(),
        admin,
        config,
        &catalog.current(),
        begun,
    );

    // The sender lives as long as the process: this returns with a signal.
    // Where the system loses the notice of one, the flag has it.
    while signals.recv_timeout(LOOK_FOR_SIGNALS) == Err(RecvTimeoutError::Timeout)
        && !terminated.load(SeqCst)
    {}
    notify::notify("STOPPING=1");
    serving.drain();
    Ok(Exit::Success)
}

/// Creates the state folder for this user alone, and refuses one that others
/// than this user and root can change. Without one there is something to serve
/// all the same, and who needs it says so.
fn own_state_dir(dir: &Path) -> Result<()> {
    let _ = files::private_dir(dir);
    check_state_dir(dir)
}

/// The same of a folder that is there.
pub(super) fn check_state_dir(dir: &Path) -> Result<()> {
    match trusted::check(dir) {
        Err(error) if OpenToOthers::of(&error).is_some() => {
            Err(usage(format!("state_dir {}: {error}", dir.display())))
        }
        _ => Ok(()),
    }
}

/// Whether somebody accepts there. The kernel alone answers until the backlog
/// is full, which is when nobody has accepted for long.
fn takes_connections(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&reached(address), ALIVE_WITHIN).is_ok()
}

pub(super) fn start_log(filter: &str, format: log::Format) -> Result<()> {
    log::start(filter, format).map_err(|error| usage(format!("`log` = {error}")))?;
    // What panics is caught and answered; the log says where it was.
    static LINES: Limiter = Limiter::new();
    std::panic::set_hook(Box::new(|panic| {
        if LINES.allows("panic") {
            tracing::error!("panic: {panic}");
        }
    }));
    Ok(())
}

/// From here on nobody waits for whoever reads the log.
pub(super) fn write_log_in_background() -> Result<()> {
    log::write_in_background()
        .map_err(|error| failure(format!("no thread can be started for the log: {error}")))
}

/// The first signal is sent on, the second ends the process.
/// Whoever has the sender may do as a signal does.
pub(super) fn listen_for_signals() -> Result<(mpsc::Sender<()>, mpsc::Receiver<()>), String> {
    let (sender, receiver) = mpsc::channel();
    let end = sender.clone();
    let again = Arc::new(AtomicBool::new(false));
    let on_signal = move || {
        if again.swap(true, SeqCst) {
            log::flush();
            std::process::exit(INTERRUPTED);
        }
        let _ = sender.send(());
    };
    follow(SIGTERM, "mb-signals", on_signal.clone()).map_err(|error| error.to_string())?;
    ctrlc::set_handler(on_signal).map_err(|error| error.to_string())?;
    Ok((end, receiver))
}

/// SIGHUP has the settings read again.
fn follow_hangups(serving: &Serving) -> io::Result<()> {
    let settings = Arc::clone(&serving.settings);
    follow(SIGHUP, "mb-hangups", move || {
        notify::notify("RELOADING=1");
        if let Err(error) = settings.reload() {
            tracing::error!(target: log::AUDIT, security = "change", "SIGHUP: the settings stay as they were: {error}");
        }
        notify::notify("READY=1");
    })
}

/// Has a thread of this name react to each such signal.
fn follow(signal: i32, name: &str, react: impl Fn() + Send + 'static) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    signal_hook::low_level::pipe::register(signal, writer)?;
    spawn(name, move || {
        while reader.read_exact(&mut [0]).is_ok() {
            react();
        }
    })
}

/// Says where it listens and what it serves, on a thread of its own: a reader
/// that has gone or does not read is no reason to end or to wait.
fn announce(
    listening: &[(SocketAddr, bool)],
    admin: &[String],
    config: &Config,
    catalog: &Catalog,
    begun: Instant,
) {
    let mut text = format!("mb-server {}\n", env!("CARGO_PKG_VERSION"));
    for (address, tls) in listening {
        text += &format!(
            "  listening  {address}{}\n",
            if *tls { " with TLS" } else { "" }
        );
    }
    let plain = listening.iter().filter(|(_, tls)| !tls);
    let wire: Vec<_> = plain.map(|(address, _)| *address).collect();
    for name in admin {
        text += &format!("  admin      {name}\n");
    }
    for (index, line) in MemoryPlan::of(config).lines().iter().enumerate() {
        text += &format!("  {:9}  {line}\n", if index == 0 { "memory" } else { "" });
    }
    text += &format!("  services   {}\n", config.services_dir.display());
    for service in catalog.services() {
        let description = &service.description;
        let actions: Vec<_> = description
            .actions
            .iter()
            .map(|action| action.name.as_str())
            .collect();
        text += &format!(
            "    {} {}: {}\n",
            description.name,
            description.version,
            actions.join(", ")
        );
    }
    for (service, error) in catalog.outdated() {
        let file = service.file.display().to_string();
        let instead = "a good one from before is served instead";
        text += &format!(
            "    {} is not served: {}; {instead}\n",
            printable(&file),
            printable(error)
        );
    }
    for failed in catalog.failures() {
        let file = failed.file.display().to_string();
        text += &format!(
            "    {} is not served: {}\n",
            printable(&file),
            printable(&failed.error)
        );
    }
    if catalog.services().next().is_none() {
        text += "    none; put a component into that folder\n";
    }
    let millis = begun.elapsed().as_millis();
    text += &format!(
        "ready in {millis} ms; try: mb-server call system.services{}{}\n",
        server_flag(&wire),
        curl(&wire, config)
    );
    let print = move || {
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    };
    if let Err(error) = spawn("mb-announce", print) {
        tracing::warn!("where it listens is not written to standard output: {error}");
    }
}

/// The flag with which a client on this machine reaches one of the addresses;
/// none where it needs none.
fn server_flag(wire: &[SocketAddr]) -> String {
    let reached: Vec<_> = wire.iter().map(|address| reached(*address)).collect();
    match reached.first() {
        Some(first) if !reached.iter().any(|at| at.to_string() == DEFAULT_SERVER) => {
            format!(" --server {first}")
        }
        _ => String::new(),
    }
}

/// What to try over HTTP, where that is spoken without TLS.
fn curl(wire: &[SocketAddr], config: &Config) -> String {
    match wire.first() {
        Some(first) if config.protocols.contains(&Protocol::Http) => {
            format!(", or curl http://{}/services", reached(*first))
        }
        _ => String::new(),
    }
}

/// How a client on this machine reaches a listener.
fn reached(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_that_reaches_the_server() {
        let check = |wire: &[&str], expected: &str| {
            let wire: Vec<_> = wire
                .iter()
                .map(|address| address.parse().unwrap())
                .collect();
            assert_eq!(server_flag(&wire), expected, "{wire:?}");
        };
        check(&["127.0.0.1:8081"], "");
        check(&["[::1]:8081", "127.0.0.1:8081"], "");
        check(&["0.0.0.0:8081"], "");
        check(&["[::1]:8081"], " --server [::1]:8081");
        check(&["127.0.0.2:8081"], " --server 127.0.0.2:8081");
        check(&["0.0.0.0:9"], " --server 127.0.0.1:9");
        check(&[], "");
    }
}
