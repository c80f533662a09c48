//! Connections: accepted, waiting, overtaken by slow calls, drained, and the
//! memory that they hold.

mod connections;
mod drain;
mod memory;
mod overtaking;
mod stalls;
pub mod waiting;
