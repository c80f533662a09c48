//! Lines in the server's log, under the request that is served.
//!
//! What a call may write is bounded (`log_bytes`, `log_lines`); what is more
//! is dropped and counted, and the call goes on.
//!
//! With the feature `log`, the macros of the crate `log` write here too:
//! `log::info!("order {number}")`.

/// Something is broken and needs someone.
pub fn error(message: impl AsRef<str>) {
    write(Level::Error, "", message.as_ref());
}

/// Something is odd.
pub fn warn(message: impl AsRef<str>) {
    write(Level::Warn, "", message.as_ref());
}

/// Something happened that the operator wants to know.
pub fn info(message: impl AsRef<str>) {
    write(Level::Info, "", message.as_ref());
}

/// For debugging. Shown only where the operator grants
/// `log = "debug"`.
pub fn debug(message: impl AsRef<str>) {
    write(Level::Debug, "", message.as_ref());
}

/// More than that.
pub fn trace(message: impl AsRef<str>) {
    write(Level::Trace, "", message.as_ref());
}

#[cfg(target_arch = "wasm32")]
use crate::bindings::wasi::logging::logging::{Level, log as write};

#[cfg(not(target_arch = "wasm32"))]
use native::{Level, write};

#[cfg(not(target_arch = "wasm32"))]
mod native {
    pub(super) use crate::bindings::wasi::logging::logging::Level;

    pub(super) fn write(level: Level, _context: &str, text: &str) {
        let level = match level {
            Level::Trace => "trace",
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error | Level::Critical => "error",
        };
        crate::mock::log(level, text);
    }
}

/// Has the crate `log` write here; [`service!`](crate::service) calls it.
#[doc(hidden)]
pub fn start() {
    #[cfg(feature = "log")]
    {
        // A second call of the same instance keeps the first.
        let _ = log::set_logger(&Facade);
        log::set_max_level(log::LevelFilter::Trace);
    }
}

#[cfg(feature = "log")]
struct Facade;

#[cfg(feature = "log")]
impl log::Log for Facade {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let level = match record.level() {
            log::Level::Error => Level::Error,
            log::Level::Warn => Level::Warn,
            log::Level::Info => Level::Info,
            log::Level::Debug => Level::Debug,
            log::Level::Trace => Level::Trace,
        };
        write(level, record.target(), &record.args().to_string());
    }

    fn flush(&self) {}
}
