//! What a component may import: one capability a file.
//!
//! The bindings are generated from `wit/`, so that the contract that authors
//! read is the one that the server holds.

pub mod context;

pub use context::Context;

/// The generated side of the contract.
#[allow(missing_docs, unreachable_pub, reason = "generated; the documentation is in wit/")]
pub mod bindings {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "service",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// Interfaces that every component may import, as they stand in the
/// contract. Types alone need no grant.
pub const OFFERED: [&str; 2] = ["mb:service/context@1.0.0", "mb:service/types@1.0.0"];

/// The interface that every component exports.
pub const HANDLER: &str = "mb:service/handler@1.0.0";
