//! A whole server from its settings: everything wired together.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::{
    Result,
    admin_listeners::AdminListeners,
    edge::{Edge, peers_can_say},
    every, failure,
    live_settings::{LiveSettings, ReadSettings, bound_principals},
    operator::Operator,
    usage,
};
#[cfg(feature = "compiler")]
use crate::sandbox::{CompileWorker, PROGRAM};
use crate::{
    admin::{Admin, AdminListener, Running, token},
    budget::Budget,
    catalog::{Deploys, LiveCatalog, LoadSettings, MAX_SIZE, ServicePolicies},
    config::{
        Config, Loaded, MemoryPlan, ServiceSettings,
        store::{MAX_CONNECTIONS, Remote},
    },
    dispatch::{Dispatcher, Handle},
    log::AUDIT,
    metrics::{Due, Metrics, snapshot::StoreRow},
    sandbox::{
        CALL_DEPTH, CompilerConfig, HOST_STACK, NESTED_STACK, STACK, Sandbox, SandboxConfig,
    },
    scheduler::Scheduler,
    server::{Buffers, ListenerSettings, Server, ServerSettings, View},
    store::{CACHE, Store, StoreError},
    system::MAX_ENDING,
    transport::Inherited,
};

/// Open files besides connections, and those that end: listeners, log, cache,
/// admin.
const OTHER_FILES: u64 = 64;

/// Beyond its drain, how long the process before this one may take to end.
const TAKE_OVER: Duration = Duration::from_secs(5);

/// One in so many connections is for authenticated peers alone.
const RESERVED: usize = 8;

/// Memory of the process that compiles a component. It is not counted in
/// `memory`.
#[cfg(feature = "compiler")]
const COMPILE_MEMORY: usize = 1 << 30;

/// Time for compiling one component; a large one takes a minute on a slow
/// machine.
#[cfg(feature = "compiler")]
const COMPILE_TIMEOUT: Duration = Duration::from_secs(180);

/// How often the store is tried that another process has open.
const STORE_RETRY: Duration = Duration::from_millis(20);

/// How often it is looked whether the store is there, and what of it has ended.
const TEND_EVERY: Duration = Duration::from_secs(1);

/// How often the audit trail says what principals have used, and a deploy is
/// dropped that nobody came for.
const USAGE_EVERY: Duration = Duration::from_secs(60);

/// A start compacts a store whose file takes at least so many bytes ...
const COMPACT_FROM: u64 = 64 * 1024 * 1024;
/// ... and so many times what is in it.
const COMPACT_SHARE: u64 = 8;

/// What a server is started with.
pub(super) struct ServingPlan {
    pub(super) loaded: Loaded,
    /// Reads the settings once more.
    pub(super) again: Box<ReadSettings>,
    /// As [`compiler`] has it.
    pub(super) compiler: CompilerConfig,
    /// Whether the store is opened even if no service is granted it yet.
    pub(super) always_store: bool,
    /// Listeners that the process was started with.
    pub(super) inherited: Inherited,
    /// Asks for the end.
    pub(super) end: mpsc::Sender<()>,
}

/// A server that was wired together and runs.
pub(super) struct Serving {
    server: Server,
    scheduler: Arc<Scheduler>,
    pub(super) catalog: Arc<LiveCatalog>,
    pub(super) edge: Arc<Edge>,
    pub(super) config: Arc<Config>,
    pub(super) settings: Arc<LiveSettings>,
    /// Where its admin endpoint listens.
    pub(super) admin: Vec<String>,
    endpoint: Running,
    deploys: Arc<Deploys>,
    store: Option<Arc<Store>>,
}

impl Serving {
    /// Starts a server; `handle` may put something in front of the dispatcher.
    pub(super) fn start(
        plan: ServingPlan,
        handle: impl FnOnce(Dispatcher) -> Arc<dyn Handle>,
    ) -> Result<Self> {
        let ServingPlan {
            loaded,
            again,
            compiler,
            always_store,
            mut inherited,
            end,
        } = plan;
        let config = Arc::new(loaded.config.clone());
        let edge = Edge::load(&config)?;
        let capacity = Capacity::of(&config);
        if let Some(warning) = capacity.warning() {
            tracing::warn!("{warning}");
        }
        let divided = MemoryPlan::of(&config);
        let memory = Budget::new(divided.shared);
        // Where it takes over from another process, that one has the store
        // until it has ended.
        let patience = if inherited.is_empty() {
            Duration::ZERO
        } else {
            config.drain_timeout.0 + TAKE_OVER
        };
        let store = open_store(&config, always_store, patience, &memory);
        if let Some(store) = store.opened() {
            tend(&store).map_err(|error| failure(error.to_string()))?;
        }
        let scheduler = Scheduler::of_this_machine();
        bound_principals(&scheduler, &config.principals);
        let policy = ServicePolicies::new(&config, store.opened(), Arc::clone(&scheduler));
        let sandbox = sandbox_config(&config, &policy, &memory, compiler);
        let sandbox = Sandbox::new(sandbox).map_err(|e| failure(format!("{e:#}")))?;
        let catalog = load_catalog(&config, policy, &sandbox)?;
        let metrics = Arc::new(Metrics::with_history(divided.history));
        let access = Arc::clone(&edge.access);
        let dispatcher = Dispatcher::new(
            catalog.shared(),
            Arc::clone(&config),
            Arc::clone(&metrics),
            access,
            Arc::clone(&memory),
        );
        // The admin endpoint first: what can't listen shall not have served.
        let AdminListeners {
            listeners,
            names: admin,
        } = AdminListeners::open(&config, &mut inherited)?;
        let settings = server_settings(&config, edge.listeners(&config), memory, capacity);
        let access = Arc::clone(&edge.access);
        let trying = dispatcher.clone();
        let server = Server::start(
            settings,
            &mut inherited,
            handle(dispatcher),
            Arc::clone(&metrics),
            access,
        );
        let server = server.map_err(failure)?;
        if !inherited.is_empty() {
            let left = inherited.left().join(", ");
            return Err(usage(format!(
                "inherited sockets that no listener of the settings is for: {left}; set host and port, or \
                 admin.host and admin.port, to the addresses of ListenStream (a port alone means [::])"
            )));
        }
        let settings = Arc::new(LiveSettings::new(
            loaded,
            again,
            Arc::clone(&catalog),
            Arc::clone(&edge),
            Arc::clone(&scheduler),
        ));
        let opened = store.opened();
        let deploys = Deploys::new(Arc::clone(&catalog), &config.services_dir);
        let operator = Operator {
            catalog: Arc::clone(&catalog),
            edge: Arc::clone(&edge),
            view: server.view(),
            end,
            dispatcher: trying,
            settings: Arc::clone(&settings),
            store,
            scheduler: Arc::clone(&scheduler),
            deploys: Arc::clone(&deploys),
        };
        let endpoint = start_admin(&config, (listeners, server.listeners()), operator, metrics)
            .map_err(failure)?;
        let (used, view) = (Arc::clone(&scheduler), server.view());
        // The catalog ends with the server, and not with this thread.
        let held = Arc::downgrade(&deploys);
        every("mb-usage", USAGE_EVERY, move || {
            report_usage(&used, &view);
            if let Some(deploys) = held.upgrade() {
                deploys.expire();
            }
            true
        })
        .map_err(failure)?;
        Ok(Self {
            server,
            scheduler,
            catalog,
            edge,
            config,
            settings,
            admin,
            endpoint,
            deploys,
            store: opened,
        })
    }

    /// Where clients connect.
    pub(super) fn addresses(&self) -> Vec<(SocketAddr, bool)> {
        self.server.addresses()
    }

    /// Ends it in order.
    pub(super) fn drain(self) {
        tracing::info!(
            "draining: begun requests are answered, within {}",
            self.config.drain_timeout
        );
        let view = self.server.view();
        let drained = self.server.drain();
        report_usage(&self.scheduler, &view);
        tracing::info!(
            "drained in {} ms: {} connections, {} of them cut off",
            drained.elapsed.as_millis(),
            drained.connections,
            drained.cut_off
        );
        self.endpoint.finish();
        self.deploys.end();
        if let Some(store) = self.store {
            store.end();
        }
    }
}

/// How many connections there can be, and how many more that are ending: as
/// many as memory and the system's open files allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capacity {
    connections: usize,
    ending: usize,
    /// Open files, where they allow less than the memory does.
    short_of_files: Option<u64>,
}

impl Capacity {
    pub(super) fn of(config: &Config) -> Self {
        let remote = config.store.remote().ok().flatten();
        let to_store = remote.map_or(0, |remote| remote.nodes.len() * MAX_CONNECTIONS);
        Self::within(
            MemoryPlan::of(config).connections,
            crate::system::raise_open_files().map(|files| files.saturating_sub(to_store as u64)),
        )
    }

    fn within(connections: usize, files: Option<u64>) -> Self {
        let wanted = connections as u64 + MAX_ENDING as u64 + OTHER_FILES;
        match files.filter(|files| *files < wanted) {
            None => Self {
                connections,
                ending: MAX_ENDING,
                short_of_files: None,
            },
            Some(files) => {
                // Without the last file nothing works, the admin endpoint included.
                let left = usize::try_from(files.saturating_sub(OTHER_FILES))
                    .unwrap_or(usize::MAX)
                    .max(2);
                let connections = connections.min(left * 3 / 4);
                let ending = MAX_ENDING.min(left - connections);
                Self {
                    connections,
                    ending,
                    short_of_files: Some(files),
                }
            }
        }
    }

    /// What is to be said about it.
    pub(super) fn warning(&self) -> Option<String> {
        let Self {
            connections,
            ending: _,
            short_of_files,
        } = self;
        short_of_files.map(|files| {
            format!(
                "the system allows {files} open files, which is enough for {connections} connections; raise it with \
                 ulimit -n or LimitNOFILE"
            )
        })
    }
}

pub(super) fn sandbox_config(
    config: &Config,
    policy: &ServicePolicies,
    memory: &Arc<Budget>,
    compiler: CompilerConfig,
) -> SandboxConfig {
    SandboxConfig {
        call_depth: CALL_DEPTH,
        verify_resets: config.verify_resets,
        largest_instance: policy.largest_instance(),
        instances: MemoryPlan::of(config).instances,
        memory: Arc::clone(memory),
        compiler,
    }
}

/// The store of a server.
pub(super) enum StoreState {
    /// No service is granted durable values.
    Unwanted,
    Open(Arc<Store>),
    /// Why it could not be opened.
    Unavailable(String),
}

impl StoreState {
    pub(super) fn opened(&self) -> Option<Arc<Store>> {
        match self {
            Self::Open(store) => Some(Arc::clone(store)),
            Self::Unwanted | Self::Unavailable(_) => None,
        }
    }

    /// What the operator sees of it.
    pub(super) fn row(&self) -> Option<StoreRow> {
        match self {
            Self::Unwanted => None,
            Self::Unavailable(error) => Some(StoreRow {
                status: "unavailable",
                error: Some(error.clone()),
                ..StoreRow::default()
            }),
            Self::Open(store) => {
                let (health, size) = (store.health(), store.size().ok());
                let problem = health.problem();
                let status = if problem.is_none() { "ok" } else { "failing" };
                Some(StoreRow {
                    status,
                    error: problem,
                    full: health.full(),
                    failed: health.failed(),
                    damaged: health.damaged(),
                    used_bytes: size.map(|size| size.used),
                    file_bytes: size.map(|size| size.on_disk).filter(|bytes| *bytes > 0),
                })
            }
        }
    }
}

/// Opens the store if any service is granted durable values, or `always`.
/// Without it the
/// others are served all the same.
fn open_store(
    config: &Config,
    always: bool,
    patience: Duration,
    memory: &Arc<Budget>,
) -> StoreState {
    let wanted = |service: &ServiceSettings| service.grants.keyvalue == Some(true);
    if !always && !config.services.values().any(wanted) {
        return StoreState::Unwanted;
    }
    match config.store.remote() {
        Ok(None) => {}
        Ok(Some(remote)) => {
            return match connect_store(remote, memory) {
                Ok(store) => StoreState::Open(store),
                Err(error) => unavailable(format!("store: {error}")),
            };
        }
        Err(problem) => return unavailable(format!("store.url must be {problem}")),
    }
    let file = config.store_file();
    let until = Instant::now() + patience;
    let mut announced = false;
    let opened = loop {
        match Store::open(&file, CACHE) {
            Err(StoreError::Locked) if Instant::now() < until => {
                if !std::mem::replace(&mut announced, true) {
                    tracing::info!(
                        "store {}: waiting for the process before this one to end",
                        file.display()
                    );
                }
                thread::sleep(STORE_RETRY);
            }
            opened => break opened,
        }
    };
    match opened {
        Ok(store) => {
            compact(&store);
            StoreState::Open(store)
        }
        Err(error) => unavailable(format!("store {}: {error}", file.display())),
    }
}

fn unavailable(error: String) -> StoreState {
    tracing::error!("{error}");
    StoreState::Unavailable(error)
}

#[cfg(feature = "redis")]
fn connect_store(remote: Remote, memory: &Arc<Budget>) -> Result<Arc<Store>, StoreError> {
    if remote.password_file.is_some() && !remote.tls {
        tracing::warn!(
            "store: the password goes over connections that are not encrypted; rediss:// encrypts them"
        );
    }
    Store::remote(remote, Some(Arc::clone(memory)))
}

/// Settings that name such a store are out of bounds.
#[cfg(not(feature = "redis"))]
fn connect_store(_: Remote, _: &Arc<Budget>) -> Result<Arc<Store>, StoreError> {
    Err(StoreError::Away("this program has no client for it".into()))
}

/// Does what is due for the store as long as it is used.
fn tend(store: &Arc<Store>) -> io::Result<()> {
    let store = Arc::downgrade(store);
    every("mb-store", TEND_EVERY, move || {
        store.upgrade().map(|store| store.tend()).is_some()
    })
}

/// Compacts a file that is mostly empty.
fn compact(store: &Store) {
    let Ok(before) = store.size() else { return };
    if before.on_disk < COMPACT_FROM || before.on_disk / COMPACT_SHARE < before.used {
        return;
    }
    tracing::info!("store: compacting {} bytes", before.on_disk);
    match store.compact().and_then(|()| store.size()) {
        Ok(after) => tracing::info!("store: {} bytes after compaction", after.on_disk),
        Err(error) => tracing::warn!("store: not compacted: {error}"),
    }
}

/// How a server compiles, if it can.
pub(super) fn compiler() -> CompilerConfig {
    CompilerConfig {
        #[cfg(feature = "compiler")]
        worker: Some(compile_worker()),
        ..CompilerConfig::default()
    }
}

/// What starts the processes that compile; before the first thread, and before
/// the right to start programs is given up.
#[cfg(feature = "compiler")]
pub(super) fn compile_worker() -> CompileWorker {
    CompileWorker::start(
        std::path::Path::new(PROGRAM),
        COMPILE_MEMORY,
        COMPILE_TIMEOUT,
    )
}

fn load_catalog(
    config: &Config,
    policy: ServicePolicies,
    sandbox: &Arc<Sandbox>,
) -> Result<Arc<LiveCatalog>> {
    let settings = LoadSettings {
        dir: config.services_dir.clone(),
        policy,
    };
    let dir = settings.dir.clone();
    LiveCatalog::load(sandbox, settings, &config.state_dir()).map_err(|error| {
        usage(format!(
            "services folder {}: {error}; --services names another",
            dir.display()
        ))
    })
}

fn server_settings(
    config: &Arc<Config>,
    listeners: Vec<Arc<ListenerSettings>>,
    memory: Arc<Budget>,
    capacity: Capacity,
) -> ServerSettings {
    let reserved = if peers_can_say(config) {
        capacity.connections / RESERVED
    } else {
        0
    };
    ServerSettings {
        config: Arc::clone(config),
        listeners,
        max_connections: capacity.connections,
        reserved,
        max_ending: capacity.ending,
        buffers: Buffers::default(),
        thread_stack: HOST_STACK + (STACK + NESTED_STACK) * (CALL_DEPTH + 1),
        memory,
    }
}

/// Reports in the audit trail what each principal has used since the last
/// time: the sums of its lines are what it has used.
fn report_usage(scheduler: &Scheduler, view: &View) {
    for Due {
        principal,
        usage,
        cpu,
    } in view.usages().due(&scheduler.cpu_by_principal())
    {
        tracing::info!(
            target: AUDIT,
            security = "usage",
            principal,
            requests = usage.requests,
            bytes_in = usage.bytes_in,
            bytes_out = usage.bytes_out,
            host_calls = usage.host_calls,
            cpu_us = cpu.as_micros() as u64,
            peak_memory = usage.peak_memory,
            "used"
        );
    }
}

fn start_admin(
    config: &Config,
    (listeners, of_services): (Vec<AdminListener>, serde_json::Value),
    operator: Operator,
    metrics: Arc<Metrics>,
) -> io::Result<Running> {
    let file = config.token_file();
    let token = token::load_or_create(&file).inspect_err(|error| {
        tracing::warn!(
            "nothing can be changed over the admin endpoint: token {}: {error}",
            file.display()
        );
    });
    let deploy_token = config.admin.deploy.then(|| {
        let file = config.deploy_token_file();
        // Another server may have the same; this one may write to its own
        // folder alone.
        let token = if file.starts_with(config.state_dir()) {
            token::load_or_create(&file)
        } else {
            token::load(&file)
        };
        token.inspect_err(|error| {
            tracing::warn!(
                "nothing can be deployed: token {}: {error}; `openssl rand -hex 32` makes one",
                file.display()
            );
        })
    });
    Admin {
        operations: Box::new(operator),
        listeners: of_services,
        metrics,
        token: token.ok(),
        deploy_token: deploy_token.and_then(Result::ok),
        max_upload: MAX_SIZE as usize,
        allowed_hosts: config.admin.allowed_hosts.clone(),
        memory: MemoryPlan::of(config).admin,
    }
    .start(listeners)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_follow_open_files() {
        let capacity = |connections, files| {
            let Capacity {
                connections,
                ending,
                short_of_files,
            } = Capacity::within(connections, files);
            (connections, ending, short_of_files.is_some())
        };
        assert_eq!(capacity(1024, None), (1024, MAX_ENDING, false));
        assert_eq!(capacity(1024, Some(1_000_000)), (1024, MAX_ENDING, false));
        assert_eq!(capacity(1024, Some(128)), (48, 16, true));
        assert_eq!(capacity(16, Some(128)), (16, 48, true));
        assert_eq!(capacity(1024, Some(8)), (1, 1, true));
    }
}
