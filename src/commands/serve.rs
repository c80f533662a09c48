//! `mb-server serve`: wires everything together and waits for a signal.

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    Exit, Result,
    connect::DEFAULT_SERVER,
    edge::{self, Edge, peers_can_say},
    failure, notify,
    operator::{self, Operator},
    printable, usage,
};
use crate::{
    admin::{Admin, token},
    budget::Budget,
    catalog::{Catalog, LiveCatalog, LoadSettings, Policy},
    config::{self, Config, ConfigError, Flags, Loaded, MemoryPlan, Row},
    dispatch::{Dispatcher, Handle, Limits},
    log::{self, Limiter},
    metrics::{Metrics, snapshot::Snapshot},
    sandbox::{CompileApart, CompilerConfig, HOST_STACK, NESTED_STACK, Sandbox, SandboxConfig},
    server::{MAX_ENDING, Server, ServerSettings, raise_open_files},
    store::{Store, StoreError},
    transport::{Inherited, SocketOptions, is_absent, listen, resolve},
};

/// What a second signal ends the process with: that of an interrupted one.
const INTERRUPTED: i32 = 130;

/// Open files besides connections, and those that end: listeners, log, cache,
/// admin.
const OTHER_FILES: u64 = 64;

/// Beyond its drain, how long the process before this one may take to end.
const TAKE_OVER: Duration = Duration::from_secs(5);

/// How often the store is tried that another process has open.
const STORE_RETRY: Duration = Duration::from_millis(20);

/// Connections to the admin endpoint that the kernel holds until they are
/// accepted.
const ADMIN_BACKLOG: u32 = 128;

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
    pub(super) fn load(&self) -> std::result::Result<Loaded, ConfigError> {
        let Self { config, host, port, admin_host, admin_port, services } = self.clone();
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
    let Loaded { config, rows: settings } = arguments.load().map_err(usage)?;
    edge::check_exposure(&config)?;
    start_log(&config.log, config.log_format)?;
    let (end, signals) = listen_for_signals().map_err(failure)?;
    let serving = Serving::start(config, settings, false, end, |dispatcher| Arc::new(dispatcher))?;
    let Serving { server, catalog, edge, config, admin } = &serving;
    announce(&server.addresses(), *admin, config, &catalog.current(), begun);
    if config.reload_interval.0 > Duration::ZERO {
        catalog.watch(config.reload_interval.0).map_err(failure)?;
        edge.watch(config.reload_interval.0).map_err(failure)?;
    }

    notify::notify("READY=1");
    // That it takes connections on its own ports is the sign of life.
    let address = server.addresses().first().map(|(address, _)| *address);
    notify::keep_watchdog(move || address.is_none_or(takes_connections)).map_err(failure)?;

    // The sender lives as long as the process: this returns with a signal.
    let _ = signals.recv();
    notify::notify("STOPPING=1");
    serving.drain();
    Ok(Exit::Success)
}

/// Whether somebody accepts there. The kernel alone answers until the backlog
/// is full, which is when nobody has accepted for long.
fn takes_connections(mut address: SocketAddr) -> bool {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    TcpStream::connect_timeout(&address, ALIVE_WITHIN).is_ok()
}

/// A server that was wired together and runs.
pub(super) struct Serving {
    server: Server,
    pub(super) catalog: Arc<LiveCatalog>,
    edge: Arc<Edge>,
    config: Config,
    /// Where its admin endpoint listens.
    pub(super) admin: SocketAddr,
}

impl Serving {
    /// Starts a server that compiles components quickly or well; `end` asks
    /// for its end, `handle` may put something in front of the dispatcher.
    pub(super) fn start(
        config: Config,
        rows: Vec<Row>,
        quick: bool,
        end: mpsc::Sender<()>,
        handle: impl FnOnce(Dispatcher) -> Arc<dyn Handle>,
    ) -> std::result::Result<Self, (Exit, String)> {
        let edge = Edge::load(&config)?;
        let room = Room::of(&config);
        if let Some(warning) = room.warning() {
            tracing::warn!("{warning}");
        }
        let memory = Budget::new(MemoryPlan::of(&config).shared);
        let mut inherited = Inherited::from_env().map_err(failure)?;
        // Where it takes over from another process, that one has the store
        // until it has ended.
        let patience = if inherited.is_empty() { Duration::ZERO } else { config.drain_timeout.0 + TAKE_OVER };
        let policy = Policy::new(&config, open_store(&config, patience));
        let mut sandbox = sandbox_config(&config, &policy, &memory);
        (sandbox.compiler.apart, sandbox.compiler.quick) = (compile_apart(&config), quick);
        let sandbox = Sandbox::new(sandbox).map_err(|e| failure(format!("{e:#}")))?;
        let catalog = load_catalog(&config, policy, &sandbox)?;
        let metrics = Arc::new(Metrics::default());
        let access = Arc::clone(&edge.access);
        let dispatcher = Dispatcher::new(catalog.shared(), limits(&config), Arc::clone(&metrics), access);
        // The admin endpoint first: what can't listen shall not have served.
        let listener = admin_listener(&config, &mut inherited)?;
        let admin = listener.local_addr().map_err(failure)?;
        let settings = ServerSettings { listeners: edge.listeners(&config), ..server_settings(&config, memory, room) };
        let access = Arc::clone(&edge.access);
        let trying = dispatcher.clone();
        let server = Server::start(settings, &mut inherited, handle(dispatcher), Arc::clone(&metrics), access);
        let server = server.map_err(failure)?;
        if !inherited.is_empty() {
            let left = inherited.left().join(", ");
            return Err(usage(format!(
                "inherited sockets that no listener of the settings is for: {left}; set host and port, or \
                 admin.host and admin.port, to the addresses of ListenStream"
            )));
        }
        let (catalog_of, edge_of) = (Arc::clone(&catalog), Arc::clone(&edge));
        let operator = Operator { catalog: catalog_of, edge: edge_of, view: server.view(), end, dispatcher: trying };
        start_admin(&config, &rows, listener, operator, metrics).map_err(failure)?;
        Ok(Self { server, catalog, edge, config, admin })
    }

    /// Where clients connect.
    pub(super) fn addresses(&self) -> Vec<(SocketAddr, bool)> {
        self.server.addresses()
    }

    /// Ends it in order.
    pub(super) fn drain(self) {
        tracing::info!("draining: begun requests are answered, within {}", self.config.drain_timeout);
        let drained = self.server.drain();
        tracing::info!(
            "drained in {} ms: {} connections, {} of them cut off",
            drained.elapsed.as_millis(),
            drained.connections,
            drained.cut_off
        );
    }
}

pub(super) fn start_log(filter: &str, format: log::Format) -> std::result::Result<(), (Exit, String)> {
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

/// The first signal is sent on, the second ends the process.
/// Whoever has the sender may do as a signal does.
pub(super) fn listen_for_signals() -> std::result::Result<(mpsc::Sender<()>, mpsc::Receiver<()>), ctrlc::Error> {
    let (sender, receiver) = mpsc::channel();
    let end = sender.clone();
    let again = AtomicBool::new(false);
    ctrlc::set_handler(move || {
        if again.swap(true, SeqCst) {
            std::process::exit(INTERRUPTED);
        }
        let _ = sender.send(());
    })?;
    Ok((end, receiver))
}

/// How many connections there can be, and how many more that are ending: as
/// many as memory and the system's open files allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    connections: usize,
    ending: usize,
    /// Open files, where they allow less than the memory does.
    short_of_files: Option<u64>,
}

impl Room {
    pub(super) fn of(config: &Config) -> Self {
        Self::within(MemoryPlan::of(config).connections, raise_open_files())
    }

    fn within(connections: usize, files: Option<u64>) -> Self {
        let wanted = connections as u64 + MAX_ENDING as u64 + OTHER_FILES;
        match files.filter(|files| *files < wanted) {
            None => Self { connections, ending: MAX_ENDING, short_of_files: None },
            Some(files) => {
                // Without the last file nothing works, the admin endpoint included.
                let left = usize::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX).max(2);
                let connections = connections.min(left * 3 / 4);
                let ending = MAX_ENDING.min(left - connections);
                Self { connections, ending, short_of_files: Some(files) }
            }
        }
    }

    /// What is to be said about it.
    pub(super) fn warning(&self) -> Option<String> {
        let Self { connections, ending: _, short_of_files } = self;
        short_of_files.map(|files| {
            format!(
                "the system allows {files} open files, which is enough for {connections} connections; raise it with \
                 ulimit -n or LimitNOFILE"
            )
        })
    }
}

pub(super) fn sandbox_config(config: &Config, policy: &Policy, memory: &Arc<Budget>) -> SandboxConfig {
    let cache_dir = &config.sandbox.cache_dir;
    SandboxConfig {
        largest_instance: policy.largest_instance(),
        largest_table: policy.largest_table(),
        stack: config.sandbox.stack.0,
        instances: MemoryPlan::of(config).instances,
        call_depth: config.sandbox.call_depth,
        memory: Arc::clone(memory),
        compiler: CompilerConfig {
            cache_dir: (!cache_dir.as_os_str().is_empty()).then(|| cache_dir.clone()),
            ..CompilerConfig::default()
        },
    }
}

/// Opens the store if any service is granted durable values. Without it the
/// others are served all the same.
fn open_store(config: &Config, patience: Duration) -> Option<Arc<Store>> {
    config.services.values().find(|overlay| overlay.grants.keyvalue == Some(true))?;
    let file = config.store_file();
    let until = Instant::now() + patience;
    let mut said = false;
    let opened = loop {
        match Store::open(&file, config.store_cache.0) {
            Err(StoreError::Locked) if Instant::now() < until => {
                if !std::mem::replace(&mut said, true) {
                    tracing::info!("store {}: waiting for the process before this one to end", file.display());
                }
                thread::sleep(STORE_RETRY);
            }
            opened => break opened,
        }
    };
    opened.inspect_err(|error| tracing::error!("store {}: {error}", file.display())).ok()
}

/// Components are compiled by a process of their own, if this program can be
/// found to start it from.
fn compile_apart(config: &Config) -> Option<CompileApart> {
    // Works even if the file was replaced by a newer version meanwhile.
    let program = PathBuf::from("/proc/self/exe");
    if let Err(error) = program.metadata() {
        tracing::warn!("components are compiled within the server: {}: {error}", program.display());
        return None;
    }
    let (memory, timeout) = (config.sandbox.compile_memory.0, config.sandbox.compile_timeout.0);
    Some(CompileApart { program, memory, timeout })
}

fn load_catalog(
    config: &Config,
    policy: Policy,
    sandbox: &Arc<Sandbox>,
) -> std::result::Result<Arc<LiveCatalog>, (Exit, String)> {
    let settings = LoadSettings {
        dir: config.services_dir.clone(),
        max_size: config.sandbox.max_component_size.0,
        describe_timeout: config.sandbox.describe_timeout.0,
        policy,
    };
    let dir = settings.dir.clone();
    LiveCatalog::load(sandbox, settings, &config.state_dir())
        .map_err(|error| usage(format!("services folder {}: {error}; --services names another", dir.display())))
}

fn limits(config: &Config) -> Limits {
    Limits {
        max_message_size: config.max_message_size.0,
        max_in_flight: config.max_in_flight,
        keep_alive_interval: config.keep_alive_interval.0.min(config.idle_timeout.0 / 2),
        idle_timeout: config.idle_timeout.0,
        default_timeout: config.default_timeout.0,
        call_depth: config.sandbox.call_depth,
    }
}

fn server_settings(config: &Config, memory: Arc<Budget>, room: Room) -> ServerSettings {
    let reserved = if peers_can_say(config) { room.connections * config.reserved_connections / 100 } else { 0 };
    ServerSettings {
        listeners: Vec::new(),
        backlog: config.backlog,
        options: SocketOptions {
            keep_alive: config.keep_alive.then_some(config.keep_alive_initial_delay.0),
            no_delay: config.no_delay,
        },
        max_connections: room.connections,
        reserved,
        per_address: config.max_connections_per_address,
        max_ending: room.ending,
        max_message_size: config.max_message_size.0,
        max_in_flight: config.max_in_flight,
        read_buffer_size: config.read_buffer_size.0,
        write_buffer_size: config.write_buffer_size.0,
        default_timeout: config.default_timeout.0,
        read_timeout: config.read_timeout.0,
        handshake_timeout: config.handshake_timeout.0,
        write_timeout: config.write_timeout.0,
        idle_timeout: config.idle_timeout.0,
        drain_timeout: config.drain_timeout.0,
        thread_stack: HOST_STACK + (config.sandbox.stack.0 + NESTED_STACK) * (config.sandbox.call_depth + 1),
        memory,
    }
}

fn admin_listener(
    config: &Config,
    inherited: &mut Inherited,
) -> std::result::Result<std::net::TcpListener, (Exit, String)> {
    let (host, port) = (&config.admin.host, config.admin.port);
    let mut open = || {
        let mut last = io::ErrorKind::NotFound.into();
        for address in resolve(host, port)? {
            match inherited.take(address).map_or_else(|| listen(address, ADMIN_BACKLOG), Ok) {
                Err(error) if is_absent(&error) => last = error,
                result => return result,
            }
        }
        Err(last)
    };
    open().map_err(|error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => "; is another server running? --admin-port 0 takes a free one",
            _ => "",
        };
        failure(format!("admin endpoint can't listen on {host} port {port}: {error}{hint}"))
    })
}

fn start_admin(
    config: &Config,
    rows: &[Row],
    listener: std::net::TcpListener,
    operator: Operator,
    metrics: Arc<Metrics>,
) -> io::Result<()> {
    let file = config.token_file();
    let token = token::load_or_create(&file).inspect_err(|error| {
        tracing::warn!("nothing can be changed over the admin endpoint: token {}: {error}", file.display());
    });
    let (view, catalog, described) = (operator.view.clone(), operator.catalog.clone(), operator.catalog.clone());
    let snapshot = move || Snapshot {
        accepting: view.accepting(),
        totals: view.totals(),
        connections: view.connections(),
        calls: view.calls(),
        services: catalog.current().snapshot(),
    };
    Admin {
        snapshot: Box::new(snapshot),
        services: Box::new(move |name| operator::described(&described.current(), name)),
        settings: operator::masked(rows),
        metrics,
        commands: Box::new(operator),
        token: token.ok(),
        allowed_hosts: config.admin.allowed_hosts.clone(),
        changing: AtomicUsize::new(0),
    }
    .start(listener)
}

/// Says where it listens and what it serves. A reader that has gone is no
/// reason to end.
fn announce(listening: &[(SocketAddr, bool)], admin: SocketAddr, config: &Config, catalog: &Catalog, begun: Instant) {
    let mut text = format!("mb-server {}\n", env!("CARGO_PKG_VERSION"));
    for (address, tls) in listening {
        text += &format!("  listening  {address}{}\n", if *tls { " with TLS" } else { "" });
    }
    let plain = listening.iter().filter(|(_, tls)| !tls);
    let wire: Vec<_> = plain.map(|(address, _)| *address).collect();
    text += &format!("  admin      http://{admin}/\n");
    for (index, line) in MemoryPlan::of(config).lines().iter().enumerate() {
        text += &format!("  {:9}  {line}\n", if index == 0 { "memory" } else { "" });
    }
    text += &format!("  services   {}\n", config.services_dir.display());
    for service in catalog.services() {
        let said = &service.description;
        let actions: Vec<_> = said.actions.iter().map(|action| action.name.as_str()).collect();
        text += &format!("    {} {}: {}\n", said.name, said.version, actions.join(", "));
    }
    for (service, error) in catalog.outdated() {
        let file = service.file.display().to_string();
        let instead = "a good one from before is served instead";
        text += &format!("    {} is not served: {}; {instead}\n", printable(&file), printable(error));
    }
    for failed in catalog.failures() {
        let file = failed.file.display().to_string();
        text += &format!("    {} is not served: {}\n", printable(&file), printable(&failed.error));
    }
    if catalog.services().next().is_none() {
        text += "    none; put a component into that folder\n";
    }
    let millis = begun.elapsed().as_millis();
    text += &format!("ready in {millis} ms; try: mb-server call system.services{}\n", server_flag(&wire));
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The flag with which a client on this machine reaches one of the addresses;
/// none where it needs none.
fn server_flag(wire: &[SocketAddr]) -> String {
    let reached = |address: &SocketAddr| {
        let ip = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, address.port()).to_string()
    };
    let reached: Vec<_> = wire.iter().map(reached).collect();
    match reached.first() {
        Some(first) if !reached.iter().any(|address| address == DEFAULT_SERVER) => format!(" --server {first}"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_open_files() {
        let room = |connections, files| {
            let Room { connections, ending, short_of_files } = Room::within(connections, files);
            (connections, ending, short_of_files.is_some())
        };
        assert_eq!(room(1024, None), (1024, MAX_ENDING, false));
        assert_eq!(room(1024, Some(1_000_000)), (1024, MAX_ENDING, false));
        assert_eq!(room(1024, Some(128)), (48, 16, true));
        assert_eq!(room(16, Some(128)), (16, 48, true));
        assert_eq!(room(1024, Some(8)), (1, 1, true));
    }

    #[test]
    fn the_flag_that_reaches_the_server() {
        let check = |wire: &[&str], expected: &str| {
            let wire: Vec<_> = wire.iter().map(|address| address.parse().unwrap()).collect();
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
