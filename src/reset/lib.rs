//! Rewrites a component so that its instances can be reset: after a call an
//! instance is as it was when it was made, and the next call finds a fresh one
//! without another being made.
//!
//! All that an instance can remember is written by instructions that are known
//! before it runs. So its modules are rewritten before they are compiled: a
//! store also marks the card of 1 KiB that it writes to (a write barrier; one
//! mark does for stores near each other), and three functions are added.
//! [`CHECKPOINT`] keeps what a new instance holds; [`RESET`] copies back the
//! dirty cards, and the globals; [`VERIFY`] compares all of it. They run inside the sandbox, as part of the
//! guest, whose own code can't reach what they keep: it lies in memories and
//! globals that did not exist when that code was written. Where each call ends
//! with a post-return function of the module, `RESET` is called at its end,
//! which saves the host the call. The walls of the sandbox are those of before,
//! since the result is validated and compiled like any other component. A
//! mistake in here could let a request see what an earlier one of the same
//! service left, and nothing else.
//!
//! The host writes to a guest's memory too, by the canonical ABI: to what it
//! allocated by a function of the guest, and to where a call of a host function
//! told it to put its result. Both go through functions that are put in front
//! of the guest's own and mark what is written (`functions`). That nothing gets
//! past them, by way of a table or of another module, is what the allow-list of
//! `shapes` is for.
//!
//! The argument that this is enough, the costs and the tests: `RESET.md`.
//!
//! In reading order: `graph` (who defines what), `module_shape` (the roles of
//! modules), `shapes` (the allow-list), `shape` and `module` (one module),
//! `functions` (what is added), `elision` (which stores need no mark),
//! `component` (all of it together).

#[cfg(feature = "rewrite")]
mod component;
#[cfg(feature = "rewrite")]
mod elision;
#[cfg(feature = "rewrite")]
mod functions;
#[cfg(feature = "rewrite")]
mod graph;
#[cfg(feature = "rewrite")]
mod module;
#[cfg(feature = "rewrite")]
mod module_shape;
#[cfg(feature = "rewrite")]
mod outer;
#[cfg(feature = "rewrite")]
mod shape;
#[cfg(feature = "rewrite")]
mod shapes;

use std::fmt;

#[cfg(feature = "rewrite")]
pub use component::rewrite;
use serde::{Deserialize, Serialize};

/// The function that keeps what a new instance holds, `() -> u32`; returns the
/// number of cards that it copied, or the greatest number there is where the
/// instance has no memory left to keep them: then it serves one call.
pub const CHECKPOINT: &str = "mb-checkpoint";
/// The function that makes an instance what it was at its checkpoint, `()`.
pub const RESET: &str = "mb-reset";
/// The function that compares memory and globals with the checkpoint, `() ->
/// u32`: zero if nothing differs. Tables are not compared, since WebAssembly
/// can't compare functions; no table changes after the start.
pub const VERIFY: &str = "mb-verify";

/// What is added to a component, in this order, and whether it returns a
/// number.
#[cfg(feature = "rewrite")]
const ADDED: [(&str, bool); 3] = [(CHECKPOINT, true), (RESET, false), (VERIFY, true)];

#[cfg(feature = "rewrite")]
/// The memory of the cards, and by which name a module that shares the guest's
/// memory gets it.
const CARDS_MEMORY: &str = "mb-cards";
#[cfg(feature = "rewrite")]
const CARDS_INSTANCE: &str = "mb-reset";

/// Bytes of a card: the unit of what is marked and copied back.
pub const CARD: usize = 1 << CARD_BITS;
const CARD_BITS: u32 = 10;

/// Pages of WebAssembly (64 KiB) that a memory which may grow gets beyond its
/// first size. The first ones that a call asks for it then has already, so
/// that its instance need not be given up because it grew.
pub const SLACK: u64 = 4;

#[cfg(feature = "rewrite")]
/// Largest memory that is reset, in pages of WebAssembly: 1 GiB. Counts of
/// bytes stay far from 32 bits.
const MAX_PAGES: u64 = 16 * 1024;

#[cfg(feature = "rewrite")]
/// Most globals that are kept: one function reads and writes all of them, and
/// takes compilers seconds for some ten thousand.
const MAX_GLOBALS: usize = 1000;

#[cfg(feature = "rewrite")]
/// The sources of this crate: code that another version of it made is not the
/// code that this one makes.
pub const SOURCES: [&str; 10] = [
    include_str!("component.rs"),
    include_str!("elision.rs"),
    include_str!("functions.rs"),
    include_str!("graph.rs"),
    include_str!("lib.rs"),
    include_str!("module.rs"),
    include_str!("module_shape.rs"),
    include_str!("outer.rs"),
    include_str!("shape.rs"),
    include_str!("shapes.rs"),
];

/// What is to be known of a component that was rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetInfo {
    /// Memory of every new instance that is not the guest's own, in bytes.
    pub added_memory: usize,
    /// The guest's own memory in a new instance, in bytes.
    pub first_memory: usize,
    /// Once there is a checkpoint, an instance resets itself as a call ends,
    /// unless its memory has grown.
    pub resets_itself: bool,
}

/// Why instances of a component can't be reset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreshReason(String);

impl FreshReason {
    /// Longest reason in bytes: names of the component's own can be in it.
    const MAX: usize = 300;

    /// A reason, for the author of the component.
    pub fn because(reason: impl Into<String>) -> Self {
        let mut reason = reason.into();
        reason.truncate(reason.floor_char_boundary(Self::MAX));
        Self(reason)
    }

    #[cfg(feature = "rewrite")]
    /// What can't be in a valid component, as far as is known here.
    fn lost() -> Self {
        Self::because("it is not clear who defines what it uses")
    }
}

impl fmt::Display for FreshReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(feature = "rewrite")]
impl From<wasmparser::BinaryReaderError> for FreshReason {
    fn from(error: wasmparser::BinaryReaderError) -> Self {
        Self::because(error.message())
    }
}

#[cfg(feature = "rewrite")]
/// Refuses an export with the name of one that is added.
fn no_export_of_ours(name: &str) -> Result<(), FreshReason> {
    if [CHECKPOINT, RESET, VERIFY, CARDS_MEMORY].contains(&name) {
        return Err(FreshReason::because(format!(
            "it has an export {name} of its own"
        )));
    }
    Ok(())
}

#[cfg(all(test, feature = "rewrite"))]
mod tests;
