//! What a service rarely needs to know about the call it serves. In a native
//! test it is what `mock::context` said.

use std::time::Duration;

#[cfg(target_arch = "wasm32")]
use crate::bindings::mb::service::context as imported;
#[cfg(target_arch = "wasm32")]
pub use imported::{
    connection_id, encrypted, parent_request_id, principal, request_id, requested_version,
};

#[cfg(not(target_arch = "wasm32"))]
pub use native::{
    connection_id, encrypted, parent_request_id, principal, request_id, requested_version,
};

/// The time until the deadline. At zero the call is stopped wherever it is and
/// the caller gets `TIMEOUT`. To the millisecond.
pub fn remaining() -> Duration {
    #[cfg(target_arch = "wasm32")]
    return Duration::from_millis(imported::remaining_ms());
    #[cfg(not(target_arch = "wasm32"))]
    crate::mock::current().remaining
}

#[cfg(not(target_arch = "wasm32"))]
#[allow(
    missing_docs,
    reason = "documented where they are imported from: wit/service.wit"
)]
mod native {
    use crate::mock::current;

    pub fn request_id() -> Option<String> {
        current().request_id
    }

    pub fn parent_request_id() -> Option<String> {
        current().parent_request_id
    }

    pub fn requested_version() -> String {
        current().requested_version
    }

    pub fn principal() -> Option<String> {
        current().principal
    }

    pub fn connection_id() -> String {
        current().connection_id
    }

    pub fn encrypted() -> bool {
        current().encrypted
    }
}
