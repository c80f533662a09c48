//! Runs components: what they may take, how long they may run, and why a
//! call ended.

mod answer;
#[cfg(feature = "compiler")]
mod cache;
#[cfg(feature = "compiler")]
mod compile;
mod component;
#[cfg(feature = "compiler")]
mod confinement;
mod engine;
#[cfg(feature = "compiler")]
mod helper;
mod instance;
mod limits;
mod pool;
mod precompiled;
mod reset;
mod slots;
mod ticker;
mod verify;
#[cfg(feature = "compiler")]
mod worker;

pub use answer::{SMALL_ANSWER, ServiceAnswer};
#[cfg(feature = "compiler")]
pub use compile::{Ahead, Cpu, componentize};
pub use component::{
    Compiled, Component, ComponentFile, ComponentPolicy, LoadError, is_machine_code,
};
pub use engine::{CompilerConfig, Sandbox, SandboxConfig, cache_dir};
#[cfg(feature = "compiler")]
pub use helper::{PROGRAM, help};
pub use instance::{Call, CallError, CallReport, Phase, Wanted};
pub use limits::TABLE_ELEMENTS;
pub(crate) use precompiled::hex_digest;
pub use precompiled::{Head, Precompiled, PrecompiledError, Sections};
pub use ticker::TICK;
#[cfg(feature = "compiler")]
pub use worker::{CompileJob, CompileWorker};

pub use crate::host::calls::CALL_DEPTH;

/// Call stack of a component.
pub const STACK: usize = 512 * 1024;
/// Stack of a thread beyond the component's own: the server's frames above
/// and the host functions' below it.
pub const HOST_STACK: usize = 512 * 1024;
/// The same for each call that services make of each other, on the same
/// thread.
pub const NESTED_STACK: usize = 128 * 1024;
