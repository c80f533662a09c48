//! Calls of other services: the grant `calls`, which lists their topics.
//!
//! The other service runs on the same thread and within the time that this
//! call has left.

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Failure, Payload, bindings::mb::service::calls as imported};

pub use imported::{CallError, Origin};

/// Calls `topic` (`calc.add`) in a version that is compatible with `version`.
///
/// # Errors
/// What came back instead of an answer. As a [`Failure`] of this service it
/// keeps the other service's own code; a refusal of the server is
/// `CALL_FAILED`.
pub fn call<A: Serialize, R: DeserializeOwned>(
    topic: &str,
    version: &str,
    arguments: &A,
) -> Result<R, Failure> {
    call_raw(topic, version, &Payload::json(arguments)?, None)?.parse()
}

/// The same with payloads as they are, and at most this much time.
///
/// # Errors
/// What came back instead of an answer.
pub fn call_raw(
    topic: &str,
    version: &str,
    payload: &Payload,
    timeout: Option<Duration>,
) -> Result<Payload, CallError> {
    let millis = timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
    #[cfg(target_arch = "wasm32")]
    return imported::call(topic, version, payload, millis);
    #[cfg(not(target_arch = "wasm32"))]
    {
        let _ = (version, millis);
        crate::mock::call(topic, payload)
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let CallError {
            code,
            message,
            origin,
            details,
        } = error;
        match origin {
            Origin::Service => Self {
                code,
                message,
                details,
            },
            Origin::Server => Self {
                code: "CALL_FAILED".into(),
                message: format!("{code}: {message}"),
                details,
            },
        }
    }
}
