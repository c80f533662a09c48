//! Lines in the server's log, under the request that is served.
//!
//! What a call may write is bounded (`log_bytes`, `log_lines`); what is more
//! is dropped and counted, and the call goes on.

use crate::bindings::wasi::logging::logging::{Level, log};

/// Something is broken and needs someone.
pub fn error(message: impl AsRef<str>) {
    log(Level::Error, "", message.as_ref());
}

/// Something is odd.
pub fn warn(message: impl AsRef<str>) {
    log(Level::Warn, "", message.as_ref());
}

/// Something happened that the operator wants to know.
pub fn info(message: impl AsRef<str>) {
    log(Level::Info, "", message.as_ref());
}

/// For whoever looks for a fault. Shown only where the operator grants
/// `log = "debug"`.
pub fn debug(message: impl AsRef<str>) {
    log(Level::Debug, "", message.as_ref());
}

/// More than that.
pub fn trace(message: impl AsRef<str>) {
    log(Level::Trace, "", message.as_ref());
}
