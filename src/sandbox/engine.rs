//! The engine: what all components share.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, Weak},
};

use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::Errno,
};
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

#[cfg(feature = "compiler")]
use super::{cache::Cache, compile, worker::CompileWorker};

use super::{
    limits::{MAX_CORE_INSTANCES, MAX_MEMORIES, MAX_TABLES, TABLE_ELEMENTS},
    pool::{AnyIdle, IdleEviction, IdleInstances},
    slots::{Found, Slots},
    ticker::{KeepAwake, Ticker},
    verify::Verifier,
};
use crate::{
    budget::Budget,
    config::memory::{KEPT_MEMORY, KEPT_TABLES},
    host::{WaitError, Waiter},
    locks::lock,
};

/// Address space of a memory where the host refuses the reservation of 4 GiB.
const SMALL_RESERVATION: u64 = 4 * 1024 * 1024;

/// What the sandbox is made with.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// Depth to which services may call each other.
    pub call_depth: usize,
    /// One of so many resets is verified; 0 for none.
    pub verify_resets: u32,
    /// Linear memory of the largest instance in bytes, all memories together.
    pub largest_instance: usize,
    /// Instances that may live at the same time.
    pub instances: usize,
    /// Bytes for memory of instances beyond what each keeps; shared with
    /// whoever else takes from it.
    pub memory: Arc<Budget>,
    /// How to compile, for a program that can.
    pub compiler: CompilerConfig,
}

/// How components are compiled.
#[derive(Debug, Clone, Default)]
pub struct CompilerConfig {
    /// How to compile in a process of its own; none to compile in this one,
    /// which is for files that this program may trust.
    #[cfg(feature = "compiler")]
    pub worker: Option<CompileWorker>,
    /// Folder of compiled code, where it is not [`cache_dir`].
    pub cache_dir: Option<PathBuf>,
    /// Compile quickly, to code that runs slowly: for a component that is
    /// changed again in a minute.
    pub quick: bool,
    /// What an instance's memory begins with is copied, not mapped. Set where
    /// the system refuses what mapping needs.
    pub copy_memory: bool,
}

/// The engine with its clock, and the places for instances.
pub struct Sandbox {
    pub(super) engine: Engine,
    pub(super) keep_awake: KeepAwake,
    pub(super) config: SandboxConfig,
    pub(super) memory: Arc<Budget>,
    /// Places for instances by the depth of their calls. A call that waits for
    /// another one holds its place: without places that only deeper calls can
    /// take, many such calls at once would wait for each other.
    slots: Vec<Arc<Slots>>,
    pub(super) verifier: Verifier,
    /// There may be idle instances.
    pub(super) any_idle: Arc<AnyIdle>,
    /// Of all components that keep instances.
    idle: Mutex<Vec<Weak<IdleInstances>>>,
    /// Held while something new is compiled: one at a time, as its memory is
    /// not the server's to plan.
    #[cfg(feature = "compiler")]
    pub(super) compiling: Mutex<()>,
    /// None where compiled code is not kept.
    #[cfg(feature = "compiler")]
    pub(super) cache: Option<Cache>,
    /// Instances come from a pool.
    #[cfg_attr(
        not(feature = "compiler"),
        allow(dead_code, reason = "the compiler has to know")
    )]
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
    /// If no engine can be created.
    pub fn new(mut config: SandboxConfig) -> wasmtime::Result<Arc<Self>> {
        if let Err(error) = try_memory_file() {
            tracing::warn!(
                "the first memory of instances is copied, which is slower, because no file in memory can be created: {error}"
            );
            config.compiler.copy_memory = true;
        }
        #[cfg_attr(
            not(feature = "compiler"),
            allow(unused_mut, reason = "nothing to set up")
        )]
        let mut base = base(&config);
        #[cfg(feature = "compiler")]
        compile::set_up(&mut base, &config.compiler);
        let (engine, pooled) = match Engine::new(&base.clone().pooled(&config)) {
            Ok(engine) => (engine, true),
            Err(error) => {
                tracing::warn!(
                    "no pool of {} instances is available, they are allocated on demand, which is \
                     slower: {error:#}",
                    config.instances
                );
                (Engine::new(&base.on_demand())?, false)
            }
        };
        #[cfg(feature = "compiler")]
        let cache = compile::open_cache(config.compiler.cache_dir.clone());
        let ticker = Ticker::start(&engine)?;
        let slots = slots(config.instances, config.call_depth);
        let verifier = Verifier::start(config.verify_resets, super::STACK + super::HOST_STACK);
        let sandbox = Arc::new(Self {
            engine,
            keep_awake: ticker.keep_awake(),
            memory: Arc::clone(&config.memory),
            slots,
            config,
            verifier,
            any_idle: Arc::default(),
            idle: Mutex::default(),
            #[cfg(feature = "compiler")]
            compiling: Mutex::default(),
            #[cfg(feature = "compiler")]
            cache,
            pooled,
            _ticker: ticker,
        });
        // Instances that nobody uses are given up before anyone waits for
        // memory.
        let reclaiming = Arc::downgrade(&sandbox);
        sandbox.memory.reclaim_with(move |all| {
            let sandbox = reclaiming.upgrade();
            sandbox.iter().for_each(|sandbox| {
                sandbox.reclaim(if all {
                    IdleEviction::Memory
                } else {
                    IdleEviction::Surplus
                })
            });
        });
        Ok(sandbox)
    }

    /// Whether instances may be as large as this, in bytes.
    ///
    /// # Errors
    /// Says what is too large, for the operator.
    pub fn fits_pool(&self, instance: usize) -> Result<(), String> {
        let largest = self.config.largest_instance;
        if self.pooled && instance > largest {
            return Err(format!(
                "memory of {instance} bytes is more than the pool of instances was sized for, {largest}: restart"
            ));
        }
        Ok(())
    }

    /// A slot for one more instance of a component, or an idle one.
    pub(super) fn slot(
        &self,
        of: &Arc<IdleInstances>,
        depth: usize,
        waiter: Waiter<'_>,
    ) -> Result<Found, WaitError> {
        let slots = self.slots.get(depth).or(self.slots.last());
        let slots = slots.ok_or(WaitError::Late)?;
        slots.take(of, waiter, |which| self.reclaim(which))
    }

    /// Whether calls wait for a slot.
    pub(super) fn lacks_slots(&self) -> bool {
        self.slots.iter().any(|slots| slots.has_waiters())
    }

    /// Remembers where a component keeps instances, to take them back.
    pub(super) fn remember(&self, idle: &Arc<IdleInstances>) {
        let mut all = lock(&self.idle);
        all.retain(|known| known.strong_count() > 0);
        all.push(Arc::downgrade(idle));
    }

    /// Gives up instances that nobody uses just now.
    pub(super) fn reclaim(&self, which: IdleEviction) {
        if !self.any_idle.take(which) {
            return;
        }
        let idle: Vec<_> = {
            let idle = lock(&self.idle);
            idle.iter().filter_map(Weak::upgrade).collect()
        };
        for idle in &idle {
            if idle.evict(which) && which == IdleEviction::One {
                return;
            }
        }
    }
}

/// Tries what wasmtime maps the first memory of instances from. It does
/// without by itself where the system has no such files.
fn try_memory_file() -> rustix::io::Result<()> {
    match memfd_create("mb-server", MemfdFlags::CLOEXEC) {
        Ok(_) | Err(Errno::NOSYS) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Divides the places: one in sixteen for each depth beyond the first, at
/// least one.
fn slots(instances: usize, call_depth: usize) -> Vec<Arc<Slots>> {
    let deeper = (instances / 16).max(1);
    let first = instances.saturating_sub(deeper * call_depth).max(1);
    let sizes = std::iter::once(first).chain(std::iter::repeat_n(deeper, call_depth));
    sizes.map(Slots::new).collect()
}

/// What both allocators have in common.
pub(super) fn base(config: &SandboxConfig) -> Config {
    let mut engine = Config::new();
    engine
        .epoch_interruption(true)
        .max_wasm_stack(super::STACK)
        .memory_init_cow(!config.compiler.copy_memory)
        .concurrency_support(false)
        .wasm_memory64(false)
        .wasm_relaxed_simd(false)
        .wasm_component_model(true);
    engine
}

/// The two ways to allocate instances.
pub(super) trait Allocation {
    fn pooled(self, config: &SandboxConfig) -> Self;
    fn on_demand(self) -> Self;
}

impl Allocation for Config {
    fn pooled(mut self, config: &SandboxConfig) -> Self {
        let instances = config.instances.max(config.call_depth + 1);
        let instances = u32::try_from(instances).unwrap_or(u32::MAX);
        let (memories, tables) = (MAX_MEMORIES as u32, MAX_TABLES as u32);
        let core_instances = MAX_CORE_INSTANCES as u32;
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(instances)
            .total_core_instances(instances.saturating_mul(4).max(core_instances))
            .total_memories(instances.saturating_mul(3).max(2 * memories))
            .total_tables(instances.saturating_mul(4).max(2 * tables))
            .max_core_instances_per_component(core_instances)
            .max_memories_per_component(memories)
            .max_tables_per_component(tables)
            .max_memories_per_module(memories)
            .max_tables_per_module(tables)
            .max_component_instance_size(1024 * 1024)
            .max_core_instance_size(1024 * 1024)
            .max_memory_size(config.largest_instance)
            .table_elements(TABLE_ELEMENTS)
            .linear_memory_keep_resident(KEPT_MEMORY.0)
            .table_keep_resident(KEPT_TABLES.0)
            .pagemap_scan(Enabled::No);
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

/// The folder of compiled code: under `$XDG_CACHE_HOME`, else `$HOME/.cache`; a
/// user without either (a service user often is) gets a folder of their own
/// under the one for temporary files.
#[must_use]
pub fn cache_dir() -> PathBuf {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map_or_else(
            || {
                std::env::temp_dir()
                    .join(format!("mb-server-{}", rustix::process::geteuid().as_raw()))
            },
            |cache| cache.join("mb-server"),
        )
}
