//! Runs components: what they may take, how long they may run, and why a
//! call ended.

mod component;
mod engine;
mod instance;
mod limits;
mod ticker;

pub use component::{Component, LoadError};
pub use engine::{Sandbox, SandboxConfig};
pub use instance::{Answer, Call, CallError, CallReport, Phase, Stop, Unwatched, Watch};
pub use limits::MAX_TABLE_ELEMENTS;
pub use ticker::TICK;

/// Stack of a thread beyond the component's own: the server's frames above
/// and the host functions' below it.
pub const HOST_STACK: usize = 512 * 1024;
