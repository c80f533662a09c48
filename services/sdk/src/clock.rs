//! The time of day, which the standard library of the target does not have.

use std::time::{Duration, SystemTime};

/// The time of day, as the server's clock has it. It needs no grant.
#[must_use]
pub fn now() -> SystemTime {
    #[cfg(target_arch = "wasm32")]
    {
        let now = crate::bindings::wasi::clocks::wall_clock::now();
        SystemTime::UNIX_EPOCH + Duration::new(now.seconds, now.nanoseconds)
    }
    #[cfg(not(target_arch = "wasm32"))]
    {
        let real = SystemTime::now();
        real + crate::mock::passed().unwrap_or(Duration::ZERO)
    }
}
