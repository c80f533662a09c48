//! Write services for mb-server in Rust: plain functions with serde types in
//! and out, and one macro that makes a component of them.
//!
//! ```
//! use mb_service::{Failure, service};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Deserialize)]
//! struct Person {
//!     name: String,
//! }
//!
//! #[derive(Serialize)]
//! struct Greeting {
//!     text: String,
//! }
//!
//! fn greet(person: Person) -> Result<Greeting, Failure> {
//!     if person.name.is_empty() {
//!         return Err(Failure::new("NAME_EMPTY", "the name must not be empty"));
//!     }
//!     Ok(Greeting { text: format!("Hello, {}!", person.name) })
//! }
//!
//! service! {
//!     /// Greets a person by name.
//!     "greet" => greet,
//! }
//!
//! # use mb_service::{Guest, Payload};
//! # fn main() {
//! // `service!` declares `Service`, which a native test can call as the server does.
//! let answer = Service::handle("greet".into(), Payload::Json(r#"{"name":"Ada"}"#.into()));
//! assert_eq!(answer, Ok(Payload::Json(r#"{"text":"Hello, Ada!"}"#.into())));
//! # }
//! ```
//!
//! What a service may use beside processor and memory is in [`log`],
//! [`config`], [`keyvalue`] and [`calls`]. A component imports what it uses
//! and nothing else, and each import but that of the log needs a grant of the
//! operator.
//!
//! Natively, as in `cargo test`, the module `mock` stands for the server.
//!
//! See [`service!`] for what the macro takes, [`Arguments`] and [`Answer`] for
//! what a function may take and answer.

pub mod calls;
mod clock;
pub mod config;
pub mod context;
mod describe;
mod handler;
pub mod keyvalue;
pub mod log;
mod macros;
#[cfg(not(target_arch = "wasm32"))]
pub mod mock;
mod payload;
mod schema;

pub use bindings::exports::mb::service::handler::Guest;
pub use bindings::mb::service::types::{Failure, Payload};
pub use clock::now;
pub use describe::{Action, Description};
pub use handler::{Answer, Arguments, call};
/// The level 1, 2 and 3 of what is known of a handler's types.
#[doc(hidden)]
pub use schema::{AnswerSchema, AnyInput, AnyOutput, InputSchema, ResultSchema};
#[doc(hidden)]
pub use schema::{Probe, probe};

/// Generated from the WIT. Public for [`service!`], and for a crate that
/// implements [`Guest`] by hand: `mb_service::bindings::export!(Mine
/// with_types_in mb_service::bindings)`.
#[doc(hidden)]
#[allow(missing_docs)]
pub mod bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "full",
        generate_all,
        pub_export_macro: true,
        additional_derives: [PartialEq, Eq],
        // Holds a handle, which is never equal to another.
        additional_derives_ignore: ["cas-error"],
    });
}

/// Serves from the memory that the instance was born with, and grows it only
/// when that is used up.
///
/// The standard library's own allocator grows the memory at its first
/// allocation, whatever is free. For an instance that lives for one call that
/// is the dearest thing it does: growing costs the server an `mprotect`, giving
/// the memory back another, and both take a lock that the whole process shares.
#[cfg(all(target_arch = "wasm32", feature = "allocator"))]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;
