//! Makes a component whose instances can be put back as they were when they
//! were made, so that the next request finds a fresh one without another
//! being made.
//!
//! All that an instance can remember is written by instructions that are known
//! before it runs. So its modules are rewritten before they are compiled: a
//! store also marks the page that it writes to (a write barrier; one mark does
//! for stores near each other), and two functions are added. `mb-checkpoint`
//! keeps what a new instance holds; `mb-restore` puts back the pages that are
//! marked, and the globals. Both run inside the sandbox, as part of the guest,
//! whose own code can't reach what they keep: it lies in memories and globals
//! that did not exist when that code was written. Where each call ends with a
//! post-return function of the module, as those of the SDK do, `mb-restore` is
//! called at its end, which saves the host the call. The walls of the sandbox are
//! those of before, since wasmtime validates and compiles what comes out of
//! here like any other component. A mistake in here could let a request see
//! what an earlier one of the same service left, and nothing else.
//!
//! The host writes to a guest's memory too, by the canonical ABI: to what it
//! allocated by a function of the guest, and to where a call of a host function
//! told it to put its result. Both go through functions that are put in front
//! of the guest's own and mark what is written (`functions`). That nothing
//! gets past them, by way of a table or of another module, is seen to in
//! `parts`.
//!
//! What can't be followed exactly is refused ([`Unfit`]): then every request
//! gets an instance that is made for it. Refused are modules that change their
//! tables, drop segments or have a memory each, and instructions beyond
//! WebAssembly 2.0 with tail calls. The host drops an instance itself where a
//! call ended in an error, where its memory grew, and where it left or
//! reordered handles.
//!
//! Three things differ from an instance that is made anew, none of them
//! between one request and the next: [`SLACK`] pages beyond the memory's first
//! size can be read and written before `memory.grow` has asked for them (it
//! gives them first); functions that are added here may stand in backtraces;
//! and the compiled code is larger.

#[cfg(feature = "compiler")]
mod covered;
#[cfg(feature = "compiler")]
mod functions;
#[cfg(feature = "compiler")]
mod module;
#[cfg(feature = "compiler")]
mod nature;
#[cfg(feature = "compiler")]
mod outer;
#[cfg(feature = "compiler")]
mod parts;
#[cfg(feature = "compiler")]
mod rewrite;
#[cfg(feature = "compiler")]
mod shape;

use std::fmt;

#[cfg(feature = "compiler")]
pub(super) use rewrite::{check, rewrite};
use serde::{Deserialize, Serialize};
use wasmtime::{
    Store,
    component::{Component, ComponentExportIndex, Instance, TypedFunc},
};

/// The function that keeps what a new instance holds; gives the number of
/// pages of [`PAGE`] bytes that it copied, or the greatest number there is
/// where the instance has no memory left to keep them: then it serves one call.
pub(super) const CHECKPOINT: &str = "mb-checkpoint";
/// The function that puts an instance back as it was at its checkpoint.
pub(super) const RESTORE: &str = "mb-restore";

/// The memory that holds the marks, and by which name a module that shares the
/// guest's memory gets it.
#[cfg(feature = "compiler")]
const MARKED_MEMORY: &str = "mb-marked";
#[cfg(feature = "compiler")]
const GIVER: &str = "mb-restore";

/// Refuses an export with the name of one that is added.
#[cfg(feature = "compiler")]
fn no_export_of_ours(name: &str) -> Result<(), Unfit> {
    if [CHECKPOINT, RESTORE, MARKED_MEMORY].contains(&name) {
        return Err(Unfit::because(format!(
            "it has an export {name} of its own"
        )));
    }
    Ok(())
}

/// Unit of what is marked and put back, in bytes.
const PAGE: usize = 1 << PAGE_BITS;
const PAGE_BITS: u32 = 10;

/// Pages of WebAssembly (64 KiB) that a memory which may grow gets beyond its
/// first size. The first ones that a call asks for it then has already, so
/// that its instance need not be given up because it grew. As much as the
/// pool keeps of an instance, together with what the SDK begins with.
#[cfg(feature = "compiler")]
pub(super) const SLACK: u64 = 4;

/// Memory of the marks, in pages of WebAssembly: one byte for each page of 4
/// GiB, so that no address of 32 bits is beyond it. Only touched where the
/// guest's memory is.
#[cfg(feature = "compiler")]
const MARKS: u64 = (MARKED / (64 * 1024)) as u64;
/// The same in bytes.
pub(super) const MARKED: usize = 1 << (32 - PAGE_BITS);

/// The sources of what rewrites: code that another version of it made is not
/// taken from the cache.
#[cfg(feature = "compiler")]
pub(super) const REWRITER: [&str; 9] = [
    include_str!("mod.rs"),
    include_str!("covered.rs"),
    include_str!("functions.rs"),
    include_str!("module.rs"),
    include_str!("nature.rs"),
    include_str!("outer.rs"),
    include_str!("parts.rs"),
    include_str!("rewrite.rs"),
    include_str!("shape.rs"),
];

/// What is to be known of a component that was rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Restores {
    /// Memory of every instance that is not the guest's own, in bytes.
    pub(super) aside: usize,
    /// Memory that is, at first.
    pub(super) first: usize,
    /// Once there is a checkpoint, an instance puts itself back as a call
    /// ends, unless its memory has grown.
    #[serde(default)]
    pub(super) by_itself: bool,
}

/// How the instances of one component are put back.
pub(super) struct Restore {
    pub(super) restores: Restores,
    /// False for a component whose instances are shared: then the functions
    /// are there and are not called.
    wanted: bool,
    checkpoint: ComponentExportIndex,
    restore: ComponentExportIndex,
}

impl Restore {
    pub(super) fn of(
        component: &Component,
        restores: Restores,
        wanted: bool,
    ) -> Result<Self, Unfit> {
        let find = |name| {
            component
                .get_export_index(None, name)
                .ok_or_else(Unfit::unknown)
        };
        Ok(Self {
            restores,
            wanted,
            checkpoint: find(CHECKPOINT)?,
            restore: find(RESTORE)?,
        })
    }

    /// Why instances are not put back, though they could be.
    pub(super) fn unwanted(&self) -> Option<Unfit> {
        (!self.wanted).then(Unfit::unwanted)
    }

    /// Keeps what a new instance holds: how to put it back, and the bytes that
    /// keeping it takes.
    pub(super) fn checkpoint<T>(
        &self,
        mut store: &mut Store<T>,
        made: &Instance,
    ) -> wasmtime::Result<Option<Restorer>> {
        if !self.wanted {
            return Ok(None);
        }
        let checkpoint = made.get_typed_func::<(), (u32,)>(&mut store, self.checkpoint)?;
        let (pages,) = checkpoint.call(&mut store, ())?;
        if pages == u32::MAX {
            return Ok(None);
        }
        let by_itself = self.restores.by_itself;
        let restore = (!by_itself)
            .then(|| made.get_typed_func(&mut store, self.restore))
            .transpose()?;
        Ok(Some(Restorer {
            restore,
            kept: pages as usize * PAGE,
        }))
    }
}

/// Puts one instance back as it was.
pub(super) struct Restorer {
    /// None if that has been done when a call has ended.
    restore: Option<TypedFunc<(), ()>>,
    /// What is kept for that, in bytes.
    pub(super) kept: usize,
}

impl Restorer {
    /// Sees to it after a call: whether the instance is as it was.
    pub(super) fn restore<T>(&self, store: &mut Store<T>) -> bool {
        self.restore
            .as_ref()
            .is_none_or(|restore| restore.call(store, ()).is_ok())
    }
}

/// Why instances of a component can't be put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unfit(String);

#[cfg(feature = "compiler")]
impl Unfit {
    /// Longest reason in bytes: names of the component's own can be in it.
    const MAX: usize = 300;

    pub(super) fn because(reason: impl Into<String>) -> Self {
        let mut reason = reason.into();
        reason.truncate(reason.floor_char_boundary(Self::MAX));
        Self(reason)
    }
}

impl Unfit {
    /// Nobody wants it.
    pub(super) fn unwanted() -> Self {
        Self("the settings say so".into())
    }

    /// Whoever compiled it knows.
    pub(super) fn unknown() -> Self {
        Self("it was compiled so".into())
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(feature = "compiler")]
impl From<wasmparser::BinaryReaderError> for Unfit {
    fn from(error: wasmparser::BinaryReaderError) -> Self {
        Self::because(error.message())
    }
}

#[cfg(all(test, feature = "compiler"))]
mod tests;
