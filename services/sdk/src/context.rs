//! What a service rarely needs to know about the call it serves.
//!
//! There is a call only inside the server: natively these functions panic, so
//! keep what a native test should reach apart from them.

use std::time::Duration;

use crate::bindings::mb::service::context as imported;
pub use imported::{connection_id, encrypted, parent_request_id, principal, request_id, requested_version};

/// The time until the deadline. At zero the call is stopped wherever it is and
/// the caller gets `TIMEOUT`. To the millisecond.
pub fn remaining() -> Duration {
    Duration::from_millis(imported::remaining_ms())
}
