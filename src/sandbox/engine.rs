//! The engine: what all components share.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use wasmtime::{
    Cache, CacheConfig, Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, component::Linker,
};

use super::{
    instance::Guest,
    limits::MAX_TABLE_ELEMENTS,
    ticker::{Pulse, Ticker},
};
use crate::host::{self, bindings::mb::service::context};

/// Memory of a slot that is kept for its next instance, and cleared by
/// writing zeros instead of by asking the kernel. Covers what the SDK's
/// guests have in all (256 KiB).
const KEPT_MEMORY: usize = 512 * 1024;
/// Likewise for tables.
const KEPT_TABLE: usize = 64 * 1024;
/// Memories and tables of one component. JavaScript takes up to three of
/// each, Python more.
const MAX_MEMORIES: u32 = 8;
const MAX_TABLES: u32 = 16;
/// Core instances in one component: those of Python come in dozens.
const MAX_CORE_INSTANCES: u32 = 128;
/// Address space of a memory where the host refuses the reservation of 4 GiB.
const SMALL_RESERVATION: u64 = 4 * 1024 * 1024;

/// What the sandbox is made with.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// Linear memory of one instance in bytes, all memories together.
    pub memory: usize,
    /// Call stack of a component in bytes.
    pub stack: usize,
    /// Instances that may live at the same time.
    pub instances: u32,
    /// Bytes that a component may hand to the host in one call: its answer
    /// or the arguments of an import.
    pub host_data: usize,
    /// Folder of the compiled code; none to find one, empty parent folders
    /// are made.
    pub cache_dir: Option<PathBuf>,
}

/// The engine with its clock and what components may import.
pub struct Sandbox {
    pub(super) engine: Engine,
    pub(super) linker: Linker<Guest>,
    pub(super) pulse: Pulse,
    pub(super) config: SandboxConfig,
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
        let engine = match Engine::new(&base(&config, cache.clone()).pooled(&config)) {
            Ok(engine) => engine,
            Err(error) => {
                tracing::warn!(
                    "there is no pool of {} instances to be had, they are allocated on demand, which is \
                     slower: {error:#}",
                    config.instances
                );
                Engine::new(&base(&config, cache).on_demand())?
            }
        };
        let mut linker = Linker::new(&engine);
        context::add_to_linker::<Guest, wasmtime::component::HasSelf<host::Context>>(&mut linker, |guest| {
            guest.context()
        })?;
        // An interface of types alone, which some tool chains import.
        linker.instance("mb:service/types@1.0.0")?;
        let ticker = Ticker::start(&engine)?;
        let pulse = ticker.pulse();
        Ok(Arc::new(Self { engine, linker, pulse, config, _ticker: ticker }))
    }
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
    engine
}

/// The two ways to allocate instances.
trait Allocation {
    fn pooled(self, config: &SandboxConfig) -> Self;
    fn on_demand(self) -> Self;
}

impl Allocation for Config {
    fn pooled(mut self, config: &SandboxConfig) -> Self {
        let instances = config.instances;
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(instances)
            .total_core_instances(instances.saturating_mul(4).max(MAX_CORE_INSTANCES))
            .total_memories(instances.saturating_mul(2).max(MAX_MEMORIES))
            .total_tables(instances.saturating_mul(4).max(MAX_TABLES))
            .max_core_instances_per_component(MAX_CORE_INSTANCES)
            .max_memories_per_component(MAX_MEMORIES)
            .max_tables_per_component(MAX_TABLES)
            .max_component_instance_size(1024 * 1024)
            .max_core_instance_size(1024 * 1024)
            .max_memory_size(config.memory)
            .table_elements(MAX_TABLE_ELEMENTS)
            .linear_memory_keep_resident(KEPT_MEMORY)
            .table_keep_resident(KEPT_TABLE)
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

/// Opens the cache of compiled code. Without one the server works all the
/// same and compiles at every start, so a folder that can't be used is a
/// warning.
fn open_cache(configured: Option<&Path>) -> Option<Cache> {
    let dir = match configured {
        Some(dir) => std::path::absolute(dir).ok()?,
        None => default_cache_dir(),
    };
    let open = || -> wasmtime::Result<Cache> {
        make_private(&dir)?;
        let mut config = CacheConfig::new();
        config.with_directory(&dir);
        Cache::new(config)
    };
    match open() {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::warn!(
                "compiled code is not kept between starts, because the folder {} can't be used: {error:#}; \
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
