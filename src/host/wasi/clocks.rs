//! `wasi:clocks`.

use std::{
    sync::LazyLock,
    time::{Duration, Instant, SystemTime},
};

use wasmtime::component::Resource;

use super::{
    bindings::wasi::clocks::{monotonic_clock, wall_clock},
    io::Pollable,
};
use crate::host::Host;

/// Zero of the monotonic clock: its first use, so that it tells nothing of
/// the machine.
static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);

impl monotonic_clock::Host for Host {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(u64::try_from(ZERO.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn resolution(&mut self) -> wasmtime::Result<u64> {
        Ok(1)
    }

    fn subscribe_instant(&mut self, when: u64) -> wasmtime::Result<Resource<Pollable>> {
        let at = ZERO
            .checked_add(Duration::from_nanos(when))
            .filter(|at| *at < Instant::now());
        let pollable = match at {
            Some(past) => Pollable::at(past),
            None => {
                let now = monotonic_clock::Host::now(self)?;
                Pollable::after(when.saturating_sub(now))
            }
        };
        Ok(self.create_handle(pollable)?)
    }

    fn subscribe_duration(&mut self, duration: u64) -> wasmtime::Result<Resource<Pollable>> {
        Ok(self.create_handle(Pollable::after(duration))?)
    }
}

impl wall_clock::Host for Host {
    fn now(&mut self) -> wasmtime::Result<wall_clock::Datetime> {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Ok(wall_clock::Datetime {
            seconds: now.as_secs(),
            nanoseconds: now.subsec_nanos(),
        })
    }

    fn resolution(&mut self) -> wasmtime::Result<wall_clock::Datetime> {
        Ok(wall_clock::Datetime {
            seconds: 0,
            nanoseconds: 1,
        })
    }
}
