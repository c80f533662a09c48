//! From WebAssembly to machine code: on its way into the server, or ahead of
//! time into a file. All of it is left out of a build without a compiler.

use std::{
    borrow::Cow,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::PoisonError,
    time::{Duration, Instant},
};

use wasmtime::{Cache, CacheConfig, Config, Engine, OptLevel, RegallocAlgorithm, component};
use wit_component::ComponentEncoder;

use super::{
    component::{LoadError, Loaded},
    engine::{Allocation as _, CompilerConfig, Sandbox, SandboxConfig, base, default_cache_dir},
    precompiled::{self, hex_digest},
    restore::{self, Restores, Unfit},
};
use crate::budget::Budget;

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

/// What compiling a component costs and gives.
#[derive(Debug, Clone, Copy)]
pub struct Compiled {
    /// How long it took, all processors together at work.
    pub took: Duration,
    /// Bytes of machine code and what belongs to it.
    pub size: usize,
}

impl Sandbox {
    /// Compiles a component, whatever is in the cache, and drops the code.
    ///
    /// # Errors
    /// It does not compile.
    pub fn try_compiling(&self, bytes: &[u8]) -> Result<Compiled, LoadError> {
        let Prepared { component, .. } = Prepared::of(bytes, true)?;
        let begun = Instant::now();
        let code = self
            .engine
            .precompile_component(&component)
            .map_err(LoadError::compile)?;
        Ok(Compiled {
            took: begun.elapsed(),
            size: code.len(),
        })
    }

    /// Compiles a component to a file that a server of this version loads.
    ///
    /// # Errors
    /// It does not compile.
    pub fn precompile(bytes: &[u8], kind: Ahead) -> Result<Vec<u8>, LoadError> {
        let prepared = Prepared::of(bytes, true)?;
        let config = SandboxConfig::for_compiling(None);
        let engine = Self::compiling_engine(&config, kind.on_demand, kind.cpu, None)
            .map_err(LoadError::compile)?;
        let code = engine
            .precompile_component(&prepared.component)
            .map_err(LoadError::compile)?;
        Ok(precompiled::file(
            bytes,
            prepared.wrapped,
            prepared.restores.ok(),
            &code,
        ))
    }

    /// Compiles a component, or takes its compiled code from the cache. Its
    /// instances are put back after each request if that is wanted, and if
    /// they can be with so much memory.
    pub(super) fn compile(
        &self,
        bytes: &[u8],
        restore: bool,
        memory: usize,
    ) -> Result<Loaded, LoadError> {
        let mut prepared = Prepared::of(bytes, restore)?;
        let mut mark = self.mark(&prepared.component);
        let unfit = match &prepared.restores {
            Ok(restores) if restores.first > memory => Some(Unfit::because(format!(
                "it begins with {} bytes, and its limit is {memory}",
                restores.first
            ))),
            // What was compiled once was valid. A mistake made in rewriting
            // shall not keep a service from being served.
            Ok(_) if !mark.as_ref().is_some_and(|mark| mark.is_file()) => {
                restore::check(&prepared.component).err()
            }
            _ => None,
        };
        if let Some(unfit) = unfit {
            prepared = Prepared {
                restores: Err(unfit),
                ..Prepared::of(bytes, false)?
            };
            mark = self.mark(&prepared.component);
        }
        let Prepared {
            component: bytes,
            wrapped,
            restores,
        } = prepared;
        let apart = self
            .config
            .compiler
            .apart
            .as_ref()
            .zip(self.cache_dir.as_ref());
        if let Some(((apart, cache_dir), mark)) =
            apart.zip(mark).filter(|(_, mark)| !mark.is_file())
        {
            let _alone = self
                .compiling
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            apart.compile(self, cache_dir.clone(), &bytes)?;
            // Without the mark it is compiled once more next time.
            let _ = mark.parent().map(fs::create_dir_all);
            let _ = fs::File::create(mark);
        }
        let compiled =
            component::Component::new(&self.engine, &bytes).map_err(LoadError::compile)?;
        Ok(Loaded {
            compiled,
            wrapped,
            restores,
        })
    }

    /// The file that says that these bytes were compiled to the cache; none
    /// where there is no cache.
    fn mark(&self, bytes: &[u8]) -> Option<PathBuf> {
        Some(
            self.cache_dir
                .as_ref()?
                .join("compiled")
                .join(self.fingerprint(bytes)),
        )
    }

    /// Names these bytes compiled by this engine.
    fn fingerprint(&self, bytes: &[u8]) -> String {
        let mut engine = DefaultHasher::new();
        self.engine
            .precompile_compatibility_hash()
            .hash(&mut engine);
        format!("{}-{:016x}", hex_digest(bytes), engine.finish())
    }

    /// An engine that compiles as that of a server does, and runs nothing.
    pub(super) fn compiling_engine(
        config: &SandboxConfig,
        on_demand: bool,
        cpu: Cpu,
        cache: Option<Cache>,
    ) -> wasmtime::Result<Engine> {
        let mut base = base(config);
        set_up(&mut base, config.compiler.quick, cache);
        if cpu == Cpu::Any {
            // Named, it gets what every processor of its kind has.
            base.target(&format!("{}-unknown-linux-gnu", std::env::consts::ARCH))?;
        }
        // Where instances come from does not show in compiled code, but for
        // the address space that each memory gets: the pool's is the default.
        Engine::new(&if on_demand { base.on_demand() } else { base })
    }
}

/// A component as it is compiled.
struct Prepared<'a> {
    component: Cow<'a, [u8]>,
    /// It was a core module.
    wrapped: bool,
    restores: Result<Restores, Unfit>,
}

impl<'a> Prepared<'a> {
    fn of(bytes: &'a [u8], restore: bool) -> Result<Self, LoadError> {
        let component = componentize(bytes)?;
        let wrapped = matches!(component, Cow::Owned(_));
        let rewritten = if restore {
            restore::rewrite(&component)
        } else {
            Err(Unfit::unwanted())
        };
        Ok(match rewritten {
            Ok((rewritten, restores)) => Self {
                component: rewritten.into(),
                wrapped,
                restores: Ok(restores),
            },
            Err(unfit) => Self {
                component,
                wrapped,
                restores: Err(unfit),
            },
        })
    }
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
        return Err(LoadError::NotWasm {
            empty: bytes.is_empty(),
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

impl SandboxConfig {
    /// For an engine that runs nothing; without a compiler's own settings,
    /// nothing is kept.
    pub(super) fn for_compiling(compiler: Option<CompilerConfig>) -> Self {
        Self {
            largest_instance: 0,
            largest_table: 0,
            stack: 256 * 1024,
            instances: 1,
            call_depth: 0,
            memory: Budget::new(0),
            compiler: compiler.unwrap_or_default(),
        }
    }
}

/// Sets up an engine to compile; the folder of compiled code, if there is one.
pub(super) fn prepare(engine: &mut Config, compiler: &CompilerConfig) -> Option<PathBuf> {
    let (cache, dir) = open_cache(compiler).unzip();
    set_up(engine, compiler.quick, cache);
    dir
}

fn set_up(engine: &mut Config, quick: bool, cache: Option<Cache>) {
    engine.cache(cache);
    if quick {
        engine
            .cranelift_opt_level(OptLevel::None)
            .cranelift_regalloc_algorithm(RegallocAlgorithm::SinglePass);
    }
}

/// Opens the cache of compiled code, and says which folder is ours; wasmtime
/// tidies up in a part of it. Without one the server works all the
/// same and compiles at every start, so a folder that can't be used is a
/// warning.
pub(super) fn open_cache(compiler: &CompilerConfig) -> Option<(Cache, PathBuf)> {
    let dir = match &compiler.cache_dir {
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
        return Err(std::io::Error::other(
            "it is not a folder of this user's own",
        ));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(std::io::Error::other(
            "others may use it; chmod 0700 it, or name one that does not exist yet",
        ));
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
