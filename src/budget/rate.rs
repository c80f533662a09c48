//! How often something may happen.

use std::{num::NonZeroU32, time::Duration};

use governor::{
    DefaultDirectRateLimiter, Quota,
    clock::{Clock as _, DefaultClock},
};

/// So many times a second, of which a second's worth may come at once.
#[derive(Debug)]
pub struct Rate {
    limiter: DefaultDirectRateLimiter,
    per_second: NonZeroU32,
}

impl Rate {
    /// None for 0, which is no bound.
    #[must_use]
    pub fn per_second(times: u32) -> Option<Self> {
        let per_second = NonZeroU32::new(times)?;
        Some(Self {
            limiter: DefaultDirectRateLimiter::direct(Quota::per_second(per_second)),
            per_second,
        })
    }

    /// How often that is.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.per_second.get()
    }

    /// Takes one.
    ///
    /// # Errors
    /// After how long there will be one.
    pub fn take(&self) -> Result<(), Duration> {
        self.limiter
            .check()
            .map_err(|later| later.wait_time_from(DefaultClock::default().now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seconds_worth_at_once_and_then_a_word_on_when() {
        assert!(Rate::per_second(0).is_none());
        // One in a thousand seconds of test time would still leave a margin.
        let rate = Rate::per_second(2).unwrap();
        assert!(rate.take().is_ok() && rate.take().is_ok());
        let wait = rate.take().unwrap_err();
        assert!(
            wait > Duration::ZERO && wait <= Duration::from_millis(500),
            "{wait:?}"
        );
    }
}
