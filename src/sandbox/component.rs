//! From a file's bytes to something that can be called.

use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use wit_component::ComponentEncoder;

use super::{engine::Sandbox, instance::Guest, limits::Bounds, pool::Idle};
use crate::{
    budget::Budget,
    config::ServiceSettings,
    host::{Granted, HANDLER, LinkError, bindings::FullPre, link},
};

/// What a component runs under.
#[derive(Clone)]
pub struct Terms {
    /// Its settings.
    pub settings: ServiceSettings,
    /// Linear memory of one instance, in bytes.
    pub memory: usize,
    /// Bytes of an answer's payload.
    pub answer_size: usize,
    /// What the operator allows it.
    pub granted: Arc<Granted>,
}

impl Terms {
    pub(super) fn bounds(&self) -> Bounds {
        let ServiceSettings { table_elements, instances, .. } = self.settings;
        Bounds { memory: self.memory, table_elements, instances }
    }

    /// What may cross the border at once. wasmtime has one limit for what a
    /// component hands to a host function and for its answer, which is then
    /// checked again; an answer has some words beside its payload.
    pub(super) fn host_data(&self) -> usize {
        self.settings.host_data.0.max(self.answer_size + 4096)
    }
}

/// A compiled component, its imports linked and its exports looked up: what
/// is left for a call is to instantiate and to run.
pub struct Component {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) pre: FullPre<Guest>,
    pub(super) terms: Terms,
    /// Calls at the same time.
    pub(super) turns: Arc<Budget>,
    pub(super) idle: Arc<Idle>,
    /// Memory of a new instance in bytes; zero until the first one was made.
    first_memory: AtomicUsize,
    imports: Vec<String>,
    wrapped: bool,
}

impl Component {
    /// Compiles a component, or takes its compiled code from the cache. A
    /// core module with embedded WIT, which is what `cargo build` leaves for
    /// a target without components, is turned into a component first.
    ///
    /// # Errors
    /// Says what to do about it, for the author of the component.
    pub fn load(sandbox: &Arc<Sandbox>, bytes: &[u8], terms: Terms) -> Result<Self, LoadError> {
        let bytes = componentize(bytes)?;
        let wrapped = matches!(bytes, Cow::Owned(_));
        let compiled = sandbox.compile(&bytes)?;
        let kind = compiled.component_type();
        let imports: Vec<_> = kind.imports(&sandbox.engine).map(|(name, _)| name.to_owned()).collect();
        let linker = link::<Guest>(&sandbox.engine, &compiled, &terms.granted).map_err(LoadError::Import)?;
        let exports: Vec<_> = kind.exports(&sandbox.engine).map(|(name, _)| name.to_owned()).collect();
        if !exports.iter().any(|name| name == HANDLER) {
            return Err(LoadError::Export { exports });
        }
        let linked = linker.instantiate_pre(&compiled).map_err(LoadError::contract)?;
        let pre = FullPre::new(linked).map_err(LoadError::contract)?;
        let idle = Arc::new(Idle::new(&sandbox.any_idle));
        sandbox.remember(&idle);
        Ok(Self {
            sandbox: Arc::clone(sandbox),
            pre,
            turns: Budget::places(terms.settings.concurrency),
            terms,
            idle,
            first_memory: AtomicUsize::new(0),
            imports,
            wrapped,
        })
    }

    /// Interfaces that the component imports.
    #[must_use]
    pub fn imports(&self) -> &[String] {
        &self.imports
    }

    /// Whether the file was a core module.
    #[must_use]
    pub fn was_wrapped(&self) -> bool {
        self.wrapped
    }

    /// What it runs under.
    #[must_use]
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Memory of a new instance, in bytes.
    #[must_use]
    pub fn first_memory(&self) -> usize {
        self.first_memory.load(Relaxed)
    }

    pub(super) fn note_first_memory(&self, bytes: usize) {
        self.first_memory.store(bytes, Relaxed);
    }
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
        let bytes = componentize(bytes)?;
        let begun = Instant::now();
        let code = self.engine.precompile_component(&bytes).map_err(LoadError::compile)?;
        Ok(Compiled { took: begun.elapsed(), size: code.len() })
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
        Some((u16::from_le_bytes([head[0], head[1]]), u16::from_le_bytes([head[2], head[3]])))
    }) else {
        return Err(LoadError::NotWasm { empty: bytes.is_empty() });
    };
    match layer {
        0 if version == 1 => {
            let encode = || ComponentEncoder::default().validate(true).module(bytes)?.encode();
            encode().map(Cow::Owned).map_err(|e| LoadError::Module(format!("{e:#}")))
        }
        _ => Ok(Cow::Borrowed(bytes)),
    }
}

/// Why a file can't be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadError {
    /// No WebAssembly at all.
    NotWasm {
        /// The file holds nothing.
        empty: bool,
    },
    /// A core module that can't become a component.
    Module(String),
    /// Does not validate or compile.
    Compile(String),
    /// Imports what the server does not offer, or the operator does not grant.
    Import(LinkError),
    /// Lacks the interface that makes it a service.
    Export {
        /// What it exports instead.
        exports: Vec<String>,
    },
    /// The interfaces have the right names but not the right types.
    Contract(String),
}

impl LoadError {
    #[allow(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
    pub(super) fn compile(error: wasmtime::Error) -> Self {
        Self::Compile(format!("{error:#}"))
    }

    #[allow(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
    fn contract(error: wasmtime::Error) -> Self {
        Self::Contract(format!("{error:#}"))
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWasm { empty: true } => f.write_str("the file is empty; was it copied to its end?"),
            Self::NotWasm { empty: false } => f.write_str(
                "not WebAssembly: the file does not begin with the bytes \\0asm; a component in binary form is wanted",
            ),
            Self::Module(error) => write!(
                f,
                "a core module that can't be turned into a component: {error}; build it with the SDK, or with \
                 bindings generated from the world mb:service/service"
            ),
            Self::Compile(error) => write!(f, "does not compile: {error}"),
            Self::Import(error) => error.fmt(f),
            Self::Export { exports } => {
                let exports = if exports.is_empty() { "nothing".into() } else { exports.join(", ") };
                write!(
                    f,
                    "does not export {HANDLER}, so it is no service for this server; it exports {exports}; build it \
                     against the world mb:service/service@1.0.0"
                )
            }
            Self::Contract(error) => {
                write!(f, "does not fit the contract mb:service@1.0.0, was it built against another one? {error}")
            }
        }
    }
}

impl std::error::Error for LoadError {}
