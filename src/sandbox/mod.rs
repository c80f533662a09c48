//! Runs components: what they may take, how long they may run, and why a
//! call ended.

mod apart;
mod component;
mod engine;
mod instance;
mod limits;
mod pool;
mod ticker;

pub use apart::{CompileApart, Order};
pub use component::{Compiled, Component, LoadError, Terms, componentize};
pub use engine::{Sandbox, SandboxConfig};
pub use instance::{Answer, Call, CallError, CallReport, Phase, Wanted};
pub use ticker::TICK;

/// Stack of a thread beyond the component's own: the server's frames above
/// and the host functions' below it.
pub const HOST_STACK: usize = 512 * 1024;
/// The same for each call that services make of each other, on the same
/// thread.
pub const NESTED_STACK: usize = 128 * 1024;
