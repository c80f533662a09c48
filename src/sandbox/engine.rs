//! The engine: what all components share.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use wasmtime::{
    Cache, CacheConfig, Config, Enabled, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig,
    RegallocAlgorithm,
};

use super::{
    apart::CompileApart,
    limits::{MAX_MEMORIES, MAX_TABLES},
    pool::{Idle, Place, take},
    ticker::{Pulse, Ticker},
};
use crate::{
    budget::Budget,
    config::memory::{KEPT_MEMORY, KEPT_TABLES},
    host::Watch,
};

/// Core instances in one component: those of Python come in dozens.
const MAX_CORE_INSTANCES: u32 = 1000;
/// Address space of a memory where the host refuses the reservation of 4 GiB.
const SMALL_RESERVATION: u64 = 4 * 1024 * 1024;

/// What the sandbox is made with.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// Linear memory of the largest instance in bytes, all memories together.
    pub largest_instance: usize,
    /// Elements of the largest table of any instance.
    pub largest_table: usize,
    /// Call stack of a component in bytes.
    pub stack: usize,
    /// Instances that may live at the same time.
    pub instances: usize,
    /// How deep services may call each other.
    pub call_depth: usize,
    /// Bytes for memory of instances beyond what each keeps; shared with
    /// whoever else takes from it.
    pub memory: Arc<Budget>,
    /// Folder of the compiled code; none to find one, empty parent folders
    /// are made.
    pub cache_dir: Option<PathBuf>,
    /// How to compile in a process of its own; none to compile in this one.
    pub apart: Option<CompileApart>,
    /// Compile quickly, to code that runs slowly: for a component that is
    /// changed again in a minute.
    pub quick: bool,
}

/// The engine with its clock, and the places for instances.
pub struct Sandbox {
    pub(super) engine: Engine,
    pub(super) pulse: Pulse,
    pub(super) config: SandboxConfig,
    pub(super) memory: Arc<Budget>,
    /// Places for instances by the depth of their calls. A call that waits for
    /// another one holds its place: without places that only deeper calls can
    /// take, many such calls at once would wait for each other.
    places: Vec<Arc<Budget>>,
    /// There may be idle instances.
    pub(super) any_idle: Arc<AtomicBool>,
    /// Of all components that keep instances.
    idle: Mutex<Vec<Weak<Idle>>>,
    /// Held while something new is compiled: one at a time, as its memory is
    /// not the server's to plan.
    pub(super) compiling: Mutex<()>,
    /// None where compiled code is not kept.
    pub(super) cache_dir: Option<PathBuf>,
    /// Instances come from a pool.
    pub(super) pooled: bool,
    /// Ends with the sandbox.
    _ticker: Ticker,
}

impl Sandbox {
    /// Makes the engine. Where the host refuses to reserve address space for
    /// all instances, they are allocated on demand; that is slower and is
    /// said in the log.
    ///
    /// # Errors
    /// If there is no engine to be had at all.
    pub fn new(config: SandboxConfig) -> wasmtime::Result<Arc<Self>> {
        let cache = open_cache(config.cache_dir.as_deref());
        let cache_dir = cache.as_ref().map(|(_, dir)| dir.clone());
        let cache = cache.map(|(cache, _)| cache);
        let (engine, pooled) = match Engine::new(&base(&config, cache.clone()).pooled(&config)) {
            Ok(engine) => (engine, true),
            Err(error) => {
                tracing::warn!(
                    "there is no pool of {} instances to be had, they are allocated on demand, which is \
                     slower: {error:#}",
                    config.instances
                );
                (Engine::new(&base(&config, cache).on_demand())?, false)
            }
        };
        let ticker = Ticker::start(&engine)?;
        let places = places(config.instances, config.call_depth);
        let sandbox = Arc::new(Self {
            engine,
            pulse: ticker.pulse(),
            memory: Arc::clone(&config.memory),
            places: places.clone(),
            config,
            any_idle: Arc::default(),
            idle: Mutex::default(),
            compiling: Mutex::default(),
            cache_dir,
            pooled,
            _ticker: ticker,
        });
        // Instances that nobody uses are given up before anyone waits for a
        // place or for memory.
        for budget in places.iter().chain([&sandbox.memory]) {
            let sandbox = Arc::downgrade(&sandbox);
            budget.reclaim_with(move || sandbox.upgrade().iter().for_each(|sandbox| sandbox.reclaim()));
        }
        Ok(sandbox)
    }

    /// An engine that compiles as that of a server does, and runs nothing.
    pub(super) fn compiling_engine(config: &SandboxConfig, on_demand: bool) -> wasmtime::Result<Engine> {
        let cache = open_cache(config.cache_dir.as_deref()).map(|(cache, _)| cache);
        let base = base(config, cache);
        // Where instances come from does not show in compiled code, but for
        // the address space that each memory gets: the pool's is the default.
        Engine::new(&if on_demand { base.on_demand() } else { base })
    }

    /// A place for one more instance, until the deadline.
    pub(super) fn place(&self, depth: usize, watch: &dyn Watch, deadline: Instant) -> Option<Place> {
        let places = self.places.get(depth).or(self.places.last())?;
        take(places, watch, deadline).then(|| Place(Arc::clone(places)))
    }

    /// Remembers where a component keeps instances, to take them back.
    pub(super) fn remember(&self, idle: &Arc<Idle>) {
        let mut all = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|known| known.strong_count() > 0);
        all.push(Arc::downgrade(idle));
    }

    /// Gives up all instances that nobody uses just now.
    pub(super) fn reclaim(&self) {
        // Asked by everyone who waits, most often for nothing.
        if !self.any_idle.swap(false, Relaxed) {
            return;
        }
        let all: Vec<_> = {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.iter().filter_map(Weak::upgrade).collect()
        };
        all.iter().for_each(|idle| idle.clear());
    }
}

/// Divides the places: one in sixteen for each depth beyond the first, at
/// least one.
fn places(instances: usize, call_depth: usize) -> Vec<Arc<Budget>> {
    let deeper = (instances / 16).max(1);
    let first = instances.saturating_sub(deeper * call_depth).max(1);
    let sizes = std::iter::once(first).chain(std::iter::repeat_n(deeper, call_depth));
    sizes.map(Budget::places).collect()
}

/// What both allocators have in common.
fn base(config: &SandboxConfig, cache: Option<Cache>) -> Config {
    let mut engine = Config::new();
    engine
        .cache(cache)
        .epoch_interruption(true)
        .max_wasm_stack(config.stack)
        .concurrency_support(false)
        .wasm_memory64(false)
        .wasm_relaxed_simd(false)
        .wasm_component_model(true);
    if config.quick {
        engine.cranelift_opt_level(OptLevel::None).cranelift_regalloc_algorithm(RegallocAlgorithm::SinglePass);
    }
    engine
}

/// The two ways to allocate instances.
trait Allocation {
    fn pooled(self, config: &SandboxConfig) -> Self;
    fn on_demand(self) -> Self;
}

impl Allocation for Config {
    fn pooled(mut self, config: &SandboxConfig) -> Self {
        let instances = config.instances.max(config.call_depth + 1);
        let instances = u32::try_from(instances).unwrap_or(u32::MAX);
        let (memories, tables) = (MAX_MEMORIES as u32, MAX_TABLES as u32);
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(instances)
            .total_core_instances(instances.saturating_mul(4).max(MAX_CORE_INSTANCES))
            .total_memories(instances.saturating_mul(2).max(2 * memories))
            .total_tables(instances.saturating_mul(4).max(2 * tables))
            .max_core_instances_per_component(MAX_CORE_INSTANCES)
            .max_memories_per_component(memories)
            .max_tables_per_component(tables)
            .max_memories_per_module(memories)
            .max_tables_per_module(tables)
            .max_component_instance_size(1024 * 1024)
            .max_core_instance_size(1024 * 1024)
            .max_memory_size(config.largest_instance)
            .table_elements(config.largest_table)
            .linear_memory_keep_resident(KEPT_MEMORY.0)
            .table_keep_resident(KEPT_TABLES.0)
            .pagemap_scan(Enabled::Auto);
        self.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
        self
    }

    fn on_demand(mut self) -> Self {
        self.allocation_strategy(InstanceAllocationStrategy::OnDemand)
            .memory_reservation(SMALL_RESERVATION)
            .memory_reservation_for_growth(SMALL_RESERVATION)
            .memory_guard_size(64 * 1024);
        self
    }
}

/// Opens the cache of compiled code, and says which folder is ours; wasmtime
/// tidies up in a part of it. Without one the server works all the
/// same and compiles at every start, so a folder that can't be used is a
/// warning.
fn open_cache(configured: Option<&Path>) -> Option<(Cache, PathBuf)> {
    let dir = match configured {
        Some(dir) => std::path::absolute(dir).ok()?,
        None => default_cache_dir(),
    };
    let open = || -> wasmtime::Result<Cache> {
        make_private(&dir)?;
        let mut config = CacheConfig::new();
        config.with_directory(dir.join("code"));
        Cache::new(config)
    };
    match open() {
        Ok(cache) => Some((cache, dir)),
        Err(error) => {
            tracing::warn!(
                "compiled code is not kept between starts, and components are compiled within the server without its \
                 limits of memory and time, because the folder {} can't be used: {error:#}; \
                 set sandbox.cache_dir to another",
                dir.display()
            );
            None
        }
    }
}

/// `$XDG_CACHE_HOME`, else `$HOME/.cache`; a user without either (a service
/// user often is) gets a folder of their own under the one for temporary files.
fn default_cache_dir() -> PathBuf {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache"))).map_or_else(
        || std::env::temp_dir().join(format!("mb-server-{}", rustix::process::geteuid().as_raw())),
        |cache| cache.join("mb-server"),
    )
}

/// Makes a folder that nobody else can write to, and refuses one that is
/// somebody else's: what lies in it is run as native code.
fn make_private(dir: &Path) -> std::io::Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let metadata = fs::symlink_metadata(dir)?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(std::io::Error::other("it is not a folder of this user's own"));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(std::io::Error::other("others may use it; chmod 0700 it, or name one that does not exist yet"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_folder_is_private() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        make_private(&dir).unwrap();
        let mode = |dir: &Path| fs::metadata(dir).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        make_private(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_private(&dir).is_err());
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        assert!(make_private(&link).is_err());
    }
}
