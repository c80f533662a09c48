//! From WebAssembly to machine code: on its way into the server, or ahead of
//! time into a file. All of it is left out of a build without a compiler.

use std::{
    borrow::Cow,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::Instant,
};

use wasmparser::{Parser, Payload};
use wasmtime::{Config, Engine, OptLevel};
use wit_component::ComponentEncoder;

use super::{
    cache::Cache,
    component::{LoadError, Loaded},
    engine::{Allocation as _, CompilerConfig, Sandbox, SandboxConfig, base, cache_dir},
    precompiled::{self, Precompiled, Sections, hex_digest},
    reset::{FreshReason, NOT_WANTED},
};
use crate::budget::Budget;
use crate::locks::lock;

/// Which processors compiled code is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cpu {
    /// Those that have all that this one has.
    This,
    /// All of this architecture.
    Any,
}

/// For which servers a file is compiled ahead of time.
#[derive(Debug, Clone, Copy)]
pub struct Ahead {
    /// The processors.
    pub cpu: Cpu,
    /// They have no pool of instances, since their host refuses the address
    /// space.
    pub on_demand: bool,
}

impl Sandbox {
    /// Compiles a component, or takes its compiled code from the cache. Its
    /// instances are reset after each request if that is wanted, and if they
    /// can be with so much memory.
    pub(super) fn compile(
        &self,
        bytes: &[u8],
        reset: bool,
        memory: usize,
    ) -> Result<Loaded, LoadError> {
        let loaded = self.compiled(bytes, reset)?;
        let first = match &loaded.reset {
            Ok(info) if info.first_memory > memory => info.first_memory,
            _ => return Ok(loaded),
        };
        let reason = format!("it begins with {first} bytes, and its limit is {memory}");
        let loaded = self.compiled(bytes, false)?;
        Ok(Loaded {
            reset: Err(FreshReason::because(reason)),
            ..loaded
        })
    }

    fn compiled(&self, bytes: &[u8], reset: bool) -> Result<Loaded, LoadError> {
        let name = self.cached_name(bytes, reset);
        if let Some(loaded) = self.cached(&name) {
            return Ok(loaded);
        }
        let _alone = lock(&self.compiling);
        // Another thread may have compiled it meanwhile.
        if let Some(loaded) = self.cached(&name) {
            return Ok(loaded);
        }
        let begun = Instant::now();
        let file = match &self.config.compiler.worker {
            Some(worker) => worker.compile(self, bytes, reset)?,
            None => compile(&self.engine, bytes, reset)?,
        };
        let mut loaded = self.load(&file)?;
        loaded.code.took = Some(begun.elapsed());
        if let Some(Err(error)) = self.cache.as_ref().map(|cache| cache.put(&name, &file)) {
            tracing::warn!("compiled code is not kept: {error}");
        }
        Ok(loaded)
    }

    /// What the cache has under a name. A file that can't be loaded is
    /// replaced.
    fn cached(&self, name: &str) -> Option<Loaded> {
        let loaded = self.load(&self.cache.as_ref()?.get(name)?);
        loaded
            .inspect_err(|error| tracing::warn!("{name} is compiled again: {error}"))
            .ok()
    }

    fn load(&self, file: &[u8]) -> Result<Loaded, LoadError> {
        Ok(Precompiled::of(file)?.load(&self.engine)?)
    }

    /// Names what is compiled from these bytes by this engine.
    fn cached_name(&self, bytes: &[u8], reset: bool) -> String {
        let mut engine = DefaultHasher::new();
        self.engine
            .precompile_compatibility_hash()
            .hash(&mut engine);
        mb_reset::SOURCES.hash(&mut engine);
        precompiled::MAGIC.hash(&mut engine);
        reset.hash(&mut engine);
        format!("{}-{:016x}", hex_digest(bytes), engine.finish())
    }
}

/// Compiles a component or a core module to what [`precompiled`] describes.
/// One whose instances can't be reset is compiled as it is, with the reason.
///
/// # Errors
/// It does not compile.
pub(super) fn compile(engine: &Engine, bytes: &[u8], reset: bool) -> Result<Vec<u8>, LoadError> {
    let component = componentize(bytes)?;
    let wrapped = matches!(component, Cow::Owned(_));
    let rewritten = if reset {
        mb_reset::rewrite(&component)
    } else {
        Err(FreshReason::because(NOT_WANTED))
    };
    // The compiler has limits of its own, and panics at some.
    let (code, reset) = match rewritten.and_then(|(rewritten, info)| {
        let compiled = catch_unwind(AssertUnwindSafe(|| engine.precompile_component(&rewritten)));
        let code = compiled.ok().and_then(Result::ok);
        code.map(|code| (code, info))
            .ok_or_else(|| FreshReason::because("what resets it does not compile"))
    }) {
        Ok((code, info)) => (code, Ok(info)),
        Err(reason) => {
            let code = engine.precompile_component(&component);
            (code.map_err(LoadError::compile)?, Err(reason))
        }
    };
    Ok(precompiled::file(
        bytes,
        wrapped,
        reset,
        sections(bytes),
        &code,
    ))
}

/// Bytes of a file by what they are, all modules together.
fn sections(bytes: &[u8]) -> Sections {
    let mut sections = Sections::default();
    for payload in Parser::new(0).parse_all(bytes).map_while(Result::ok) {
        match payload {
            Payload::CodeSectionStart { range, .. } => sections.code += range.len() as u64,
            Payload::DataSection(section) => sections.data += section.range().len() as u64,
            Payload::CustomSection(section) => sections.custom += section.data().len() as u64,
            _ => {}
        }
    }
    sections
}

/// An engine that compiles as that of a server does, and runs nothing.
pub(super) fn compiling_engine(
    config: &SandboxConfig,
    on_demand: bool,
    cpu: Cpu,
) -> wasmtime::Result<Engine> {
    let mut base = base(config);
    set_up(&mut base, &config.compiler);
    if cpu == Cpu::Any {
        // Named, it gets what every processor of its kind has.
        base.target(&format!("{}-unknown-linux-gnu", std::env::consts::ARCH))?;
    }
    // Where instances come from does not show in compiled code, but for
    // the address space that each memory gets: the pool's is the default.
    Engine::new(&if on_demand { base.on_demand() } else { base })
}

/// Takes a component as it is, and makes one of a core module with embedded
/// WIT.
///
/// # Errors
/// It is no WebAssembly, or a core module that can't become a component.
pub fn componentize(bytes: &[u8]) -> Result<Cow<'_, [u8]>, LoadError> {
    const MAGIC: &[u8] = b"\0asm";
    let Some((version, layer)) = bytes.strip_prefix(MAGIC).and_then(|rest| {
        let (head, _) = rest.split_first_chunk::<4>()?;
        Some((
            u16::from_le_bytes([head[0], head[1]]),
            u16::from_le_bytes([head[2], head[3]]),
        ))
    }) else {
        return Err(if bytes.is_empty() {
            LoadError::Empty
        } else {
            LoadError::NotWasm
        });
    };
    match layer {
        0 if version == 1 => {
            let encode = || {
                ComponentEncoder::default()
                    .validate(true)
                    .module(bytes)?
                    .encode()
            };
            encode()
                .map(Cow::Owned)
                .map_err(|e| LoadError::Module(format!("{e:#}")))
        }
        _ => Ok(Cow::Borrowed(bytes)),
    }
}

/// Bytes of all compiled code that is kept; what was not used for the longest
/// time goes first.
const CACHE_SIZE: u64 = 1 << 30;

impl SandboxConfig {
    /// For an engine that runs nothing.
    pub(super) fn for_compiling(quick: bool, copy_memory: bool) -> Self {
        Self {
            call_depth: 0,
            verify_resets: 0,
            largest_instance: 0,
            instances: 1,
            memory: Budget::new(0),
            compiler: CompilerConfig {
                quick,
                copy_memory,
                ..CompilerConfig::default()
            },
        }
    }
}

pub(super) fn set_up(engine: &mut Config, compiler: &CompilerConfig) {
    if compiler.quick {
        // Registers are allocated as ever: in one pass it is quicker still, but
        // the stack frames of an interpreter get so large that 20 nested calls
        // in JavaScript were too many.
        engine.cranelift_opt_level(OptLevel::None);
    }
}

/// Opens the cache of compiled code. Without one the server works all the
/// same and compiles at every start, so a folder that can't be used is a
/// warning.
pub(super) fn open_cache(dir: Option<PathBuf>) -> Option<Cache> {
    let dir = std::path::absolute(dir.unwrap_or_else(cache_dir)).ok()?;
    match Cache::open(dir.clone(), CACHE_SIZE) {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::warn!(
                "compiled code is not kept between starts, because the folder {} can't be used: {error}; \
                 set XDG_CACHE_HOME to another",
                dir.display()
            );
            None
        }
    }
}
