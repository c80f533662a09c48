//! From a file's bytes to something that can be called.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use wasmtime::component::{self, InstancePre};

use super::{
    engine::Sandbox,
    instance::Guest,
    limits::{Bounds, TABLE_ELEMENTS},
    pool::IdleInstances,
    precompiled::{Precompiled, PrecompiledError, Sections},
    reset::{FreshReason, NOT_WANTED, Reset, ResetInfo},
    verify::ResetRecord,
};
use crate::{
    budget::Budget,
    config::{Isolation, ServiceSettings},
    files,
    host::{Granted, HANDLER, LinkError, bindings::FullIndices, link},
    trusted::{self, Purpose},
};

/// Why instances of a component that starts by asking the host are not reset.
const ASKS_AS_IT_STARTS: &str = "it asks the host for more than constants as it starts, before \
     there is a caller: a clock, random numbers, the request, a handle";

/// Why instances of a component are no longer reset.
const DEFECTIVE: &str = "one of its instances was reset and was not what it had been, a defect \
     of the server";

/// What one call of a host function may carry, in bytes, where answers may not
/// be as large.
const HOST_DATA: usize = 2 * 1024 * 1024;

/// What a component runs under.
#[derive(Clone)]
pub struct ComponentPolicy {
    /// Its settings.
    pub settings: ServiceSettings,
    /// Linear memory of one instance, in bytes.
    pub memory: usize,
    /// Bytes of an answer's payload.
    pub answer_size: usize,
    /// What the operator allows it.
    pub granted: Arc<Granted>,
}

impl ComponentPolicy {
    pub(super) fn bounds(&self) -> Bounds {
        Bounds {
            memory: self.memory,
            table_elements: TABLE_ELEMENTS,
        }
    }

    /// What may cross the border at once. wasmtime has one limit for what a
    /// component hands to a host function and for its answer, which is then
    /// checked again; an answer has some words beside its payload.
    pub(super) fn host_data(&self) -> usize {
        HOST_DATA.max(self.answer_size + 4096)
    }
}

/// A component's file. Its name decides whether it holds machine code, never
/// its content.
pub struct ComponentFile {
    bytes: Vec<u8>,
    machine: bool,
}

impl ComponentFile {
    /// Reads a file, if it has no more than this many bytes. Of what is called
    /// `.cwasm` nobody but this user and root can have changed the file or the
    /// path to it.
    ///
    /// # Errors
    /// [`OpenToOthers`](crate::trusted::OpenToOthers), or the file can't be read.
    pub fn read(file: &Path, max_size: u64) -> io::Result<Self> {
        let machine = is_machine_code(file);
        let opened = if machine {
            trusted::open(file, Purpose::Code)?
        } else {
            File::open(file)?
        };
        let bytes = files::read_bounded(opened, max_size)?;
        Ok(Self { bytes, machine })
    }

    /// The content.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether it is machine code that this server's compiler made earlier;
    /// else it is WebAssembly, a component or a core module.
    #[must_use]
    pub fn is_machine(&self) -> bool {
        self.machine
    }

    /// Of machine code that a test has made.
    #[cfg(test)]
    pub(super) fn trusted(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            machine: true,
        }
    }
}

/// Whether a file of this name holds machine code.
#[must_use]
pub fn is_machine_code(file: &Path) -> bool {
    file.extension().is_some_and(|ending| ending == "cwasm")
}

/// What compiling a component cost and gave.
#[derive(Debug, Clone, Copy)]
pub struct Compiled {
    /// How long it took; none where the code was there already.
    pub took: Option<Duration>,
    /// Bytes of machine code and what belongs to it.
    pub size: usize,
    /// What the WebAssembly consists of.
    pub sections: Sections,
}

/// What became of a file.
pub(super) struct Loaded {
    pub(super) code: Compiled,
    pub(super) compiled: component::Component,
    /// It was a core module.
    pub(super) wrapped: bool,
    /// What is to be known to reset its instances, or why they can't be.
    pub(super) reset: Result<ResetInfo, FreshReason>,
}

/// A compiled component, its imports linked and its exports looked up: what
/// is left for a call is to instantiate and to run.
pub struct Component {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) linked: InstancePre<Guest>,
    pub(super) exports: FullIndices,
    /// How its instances are reset after each request, if they are.
    pub(super) reset: Result<Reset, FreshReason>,
    pub(super) policy: ComponentPolicy,
    /// Calls at the same time.
    pub(super) permits: Arc<Budget>,
    pub(super) idle: Arc<IdleInstances>,
    /// Digest of its file.
    pub(super) digest: Arc<str>,
    /// What verifying its resets has found.
    pub(super) record: Arc<ResetRecord>,
    /// See the function of this name.
    asks_as_it_starts: AtomicBool,
    /// Memory of a new instance in bytes; zero until the first one was made.
    first_memory: AtomicUsize,
    /// What is kept to reset it, in bytes; zero until the first one was made.
    first_kept: AtomicUsize,
    imports: Vec<String>,
    wrapped: bool,
    code: Compiled,
}

impl Component {
    /// Compiles a component, or takes its compiled code from the cache or
    /// from a file of it. A core module with embedded WIT, which is what
    /// `cargo build` leaves for a target without components, is turned into
    /// a component first. The digest is that of its file.
    ///
    /// # Errors
    /// Says what to do about it, for the author of the component.
    pub fn load(
        sandbox: &Arc<Sandbox>,
        code: &ComponentFile,
        digest: &str,
        policy: ComponentPolicy,
    ) -> Result<Self, LoadError> {
        let wanted = policy.settings.isolation == Isolation::Request;
        let Loaded {
            compiled,
            wrapped,
            reset,
            code,
        } = if code.machine {
            Precompiled::of(&code.bytes)?.load(&sandbox.engine)?
        } else if Precompiled::is_one(&code.bytes) {
            return Err(LoadError::MachineCode);
        } else {
            sandbox.compile(&code.bytes, wanted, policy.memory)?
        };
        let verify_resets = sandbox.config.verify_resets;
        let reset = reset.and_then(|info| Reset::of(&compiled, info, wanted, verify_resets));
        let digest = Arc::from(digest);
        let kind = compiled.component_type();
        let imports: Vec<_> = kind
            .imports(&sandbox.engine)
            .map(|(name, _)| name.to_owned())
            .collect();
        let linker = link::<Guest>(&sandbox.engine, &compiled, &policy.granted)
            .map_err(LoadError::Import)?;
        let exports: Vec<_> = kind
            .exports(&sandbox.engine)
            .map(|(name, _)| name.to_owned())
            .collect();
        if !exports.iter().any(|name| is_handler(name)) {
            return Err(LoadError::Export { exports });
        }
        let linked = linker
            .instantiate_pre(&compiled)
            .map_err(LoadError::contract)?;
        let indices = FullIndices::new(&linked).map_err(LoadError::contract)?;
        let idle = Arc::new(IdleInstances::new(&sandbox.any_idle));
        sandbox.remember(&idle);
        Ok(Self {
            sandbox: Arc::clone(sandbox),
            linked,
            exports: indices,
            reset,
            permits: Budget::semaphore(policy.settings.concurrency),
            policy,
            idle,
            record: sandbox.verifier.record(&digest),
            digest,
            asks_as_it_starts: AtomicBool::new(false),
            first_memory: AtomicUsize::new(0),
            first_kept: AtomicUsize::new(0),
            imports,
            wrapped,
            code,
        })
    }

    /// Interfaces that the component imports.
    #[must_use]
    pub fn imports(&self) -> &[String] {
        &self.imports
    }

    /// What compiling it cost and gave.
    #[must_use]
    pub fn code(&self) -> Compiled {
        self.code
    }

    /// Whether the file was a core module.
    #[must_use]
    pub fn was_wrapped(&self) -> bool {
        self.wrapped
    }

    /// Why each call gets a fresh instance; none if instances serve one call
    /// after another, reset or shared.
    #[must_use]
    pub fn fresh_reason(&self) -> Option<String> {
        if self.policy.settings.isolation == Isolation::Shared {
            return None;
        }
        match &self.reset {
            // A file that was compiled ahead of time can do it either way.
            Ok(reset) if !reset.wanted() => Some(NOT_WANTED.into()),
            Ok(_) if self.record.defects() > 0 => Some(DEFECTIVE.into()),
            Ok(_) => self.asks_as_it_starts().then(|| ASKS_AS_IT_STARTS.into()),
            Err(reason) => Some(reason.to_string()),
        }
    }

    /// Resets that were verified, and how many of them were found defective.
    #[must_use]
    pub fn verified_resets(&self) -> (u64, u64) {
        (self.record.verified(), self.record.defects())
    }

    /// Whether instances are not reset although they could be: an instance
    /// asked the host as it started, or was not what it had been.
    pub(super) fn gave_up_resetting(&self) -> bool {
        self.asks_as_it_starts() || self.record.defects() > 0
    }

    /// Whether an instance asked the host for more than constants as it
    /// started: then it is started for one caller, and serves one call.
    fn asks_as_it_starts(&self) -> bool {
        self.asks_as_it_starts.load(Relaxed)
    }

    pub(super) fn note_that_it_asks(&self) {
        self.asks_as_it_starts.store(true, Relaxed);
    }

    /// What it runs under.
    #[must_use]
    pub fn policy(&self) -> &ComponentPolicy {
        &self.policy
    }

    /// Memory of a new instance, in bytes.
    #[must_use]
    pub fn first_memory(&self) -> usize {
        self.first_memory.load(Relaxed)
    }

    /// The same, with what is kept to reset it.
    pub(super) fn first_reservation(&self) -> usize {
        self.first_memory() + self.first_kept.load(Relaxed)
    }

    pub(super) fn note_first_memory(&self, bytes: usize, kept: usize) {
        self.first_memory.store(bytes, Relaxed);
        self.first_kept.store(kept, Relaxed);
    }
}

#[cfg(not(feature = "compiler"))]
impl Sandbox {
    /// Stands for the compiler where there is none.
    #[allow(clippy::unused_self, reason = "the compiler uses it")]
    fn compile(&self, _: &[u8], _: bool, _: usize) -> Result<Loaded, LoadError> {
        Err(LoadError::NoCompiler)
    }
}

/// Why a file can't be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The file holds nothing.
    #[error("the file is empty; was it copied to its end?")]
    Empty,
    /// No WebAssembly at all.
    #[error(
        "not WebAssembly: the file does not begin with the bytes \\0asm; a component in binary form is wanted"
    )]
    NotWasm,
    /// A core module that can't become a component.
    #[error(
        "a core module that can't be turned into a component: {0}; build it with the SDK, or with bindings generated from \
        the world mb:service/service"
    )]
    Module(String),
    /// Does not validate or compile.
    #[error("does not compile: {0}")]
    Compile(String),
    /// The system refuses a process to compile it in.
    #[error("does not compile: no process to compile it in: {0}")]
    NoProcess(String),
    /// The same, in the words of the worker that compiled it.
    #[error("{0}")]
    Worker(String),
    /// Imports what the server does not offer, or the operator does not grant.
    #[error(transparent)]
    Import(LinkError),
    /// Lacks the interface that makes it a service.
    #[error("does not export {HANDLER}.0.0, so it is no service for this server; it exports {}; build it against the world \
        mb:service/service@1.1.0", if exports.is_empty() { "nothing".into() } else { exports.join(", ") })]
    Export {
        /// What it exports instead.
        exports: Vec<String>,
    },
    /// The interfaces have the right names but not the right types.
    #[error("does not fit the contract mb:service@1.1.0, was it built against another one? {0}")]
    Contract(String),
    /// WebAssembly, and this program was built without a compiler.
    #[error(
        "this build of mb-server has no compiler: run mb-server compile on this file where one has, and put the .cwasm that \
        it makes here"
    )]
    NoCompiler,
    /// Machine code in a file whose name does not say so.
    #[error(
        "machine code, which is loaded only from a file called NAME.cwasm: rename it if you know who compiled it, or take the \
        .wasm that it was compiled from"
    )]
    MachineCode,
    /// Compiled code that may not be loaded.
    #[error(transparent)]
    Precompiled(#[from] PrecompiledError),
}

impl LoadError {
    #[cfg(feature = "compiler")]
    #[allow(
        clippy::needless_pass_by_value,
        reason = "used as a function in map_err"
    )]
    pub(super) fn compile(error: wasmtime::Error) -> Self {
        Self::Compile(format!("{error:#}"))
    }

    #[allow(
        clippy::needless_pass_by_value,
        reason = "used as a function in map_err"
    )]
    fn contract(error: wasmtime::Error) -> Self {
        Self::Contract(format!("{error:#}"))
    }
}

/// Whether an export is the handler, in any minor version that has come so far.
fn is_handler(export: &str) -> bool {
    export
        .strip_prefix(HANDLER)
        .is_some_and(|rest| rest.starts_with('.'))
}
