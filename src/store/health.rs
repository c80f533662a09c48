//! How the store does, for the operator: writes that the disk refused, values
//! that were damaged.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::StoreError;
use crate::{locks::lock, log::Limiter};

/// How often the log says again that writes are refused.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Counts of the store since the start.
#[derive(Debug, Default)]
pub struct Health {
    full: AtomicU64,
    failed: AtomicU64,
    damaged: AtomicU64,
    /// Whether there is a problem, to be seen without the lock.
    failing: AtomicBool,
    state: Mutex<State>,
    lines: Limiter,
}

#[derive(Debug, Default)]
struct State {
    /// Why the last write failed; none if it succeeded.
    problem: Option<String>,
    /// When the write began whose success ended the last problem. An earlier one
    /// that fails later says nothing new.
    works_since: Option<Instant>,
    /// When the log said last that writes are refused. Where some succeed and
    /// some do not, it does not say so each time.
    last_logged: Option<Instant>,
    /// It did, and not yet that they succeed again.
    announced: bool,
    /// Writes refused since then.
    refused: u64,
}

impl Health {
    /// Writes refused because the disk is full.
    #[must_use]
    pub fn full(&self) -> u64 {
        self.full.load(Relaxed)
    }

    /// Writes that failed for another reason of the disk or the file.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Reads that met a damaged page or value.
    #[must_use]
    pub fn damaged(&self) -> u64 {
        self.damaged.load(Relaxed)
    }

    /// Why the last writes failed; none if the last one succeeded.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        if !self.failing.load(Relaxed) {
            return None;
        }
        lock(&self.state).problem.clone()
    }

    /// Notes what came of committing so many writes.
    pub(super) fn wrote<T>(&self, writes: usize, result: &Result<T, StoreError>) {
        match result {
            Ok(_) => self.succeeded(Instant::now),
            Err(error) => self.refused(writes as u64, error, Instant::now()),
        }
    }

    /// Notes what came of a read.
    pub(super) fn read<T>(&self, result: &Result<T, StoreError>) {
        let Err(error @ (StoreError::Damaged(_) | StoreError::Broken(_) | StoreError::Io(_))) =
            result
        else {
            return;
        };
        self.damaged.fetch_add(1, Relaxed);
        if self.lines.allows("reads of the store that failed") {
            tracing::error!("store: {error}");
        }
    }

    /// Notes what came of a question over the network, and when it was asked:
    /// reads fail like writes, and several are under way.
    #[cfg(feature = "redis")]
    pub(super) fn asked<T>(&self, result: &Result<T, StoreError>, begun: Instant) {
        match result {
            Err(
                error @ (StoreError::Away(_) | StoreError::Unconfirmed(_) | StoreError::Refused(_)),
            ) => self.refused(1, error, begun),
            _ => self.succeeded(|| begun),
        }
    }

    fn refused(&self, writes: u64, error: &StoreError, begun: Instant) {
        let count = match error {
            StoreError::Full => &self.full,
            _ => &self.failed,
        };
        count.fetch_add(writes, Relaxed);
        let now = Instant::now();
        let mut state = lock(&self.state);
        if state.works_since.is_some_and(|since| begun < since) {
            return;
        }
        state.problem = Some(error.to_string());
        state.refused += writes;
        self.failing.store(true, Relaxed);
        if state
            .last_logged
            .is_some_and(|last_logged| now - last_logged < LOG_EVERY)
        {
            return;
        }
        (state.last_logged, state.announced) = (Some(now), true);
        let refused = std::mem::take(&mut state.refused);
        drop(state);
        tracing::error!(
            "store: {refused} reads or writes were refused, services get STORE_FAILED; the log says so once a minute: {error}"
        );
    }

    fn succeeded(&self, begun: impl FnOnce() -> Instant) {
        if !self.failing.load(Relaxed) {
            return;
        }
        let mut state = lock(&self.state);
        (state.problem, state.works_since) = (None, state.works_since.max(Some(begun())));
        self.failing.store(false, Relaxed);
        let refused = state.refused;
        if std::mem::take(&mut state.announced) {
            drop(state);
            tracing::warn!("store: it works again, after {refused} more were refused");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_writes_are_counted_until_one_succeeds() {
        let health = Health::default();
        health.wrote(1, &Ok(()));
        assert_eq!((health.full(), health.problem()), (0, None));
        health.wrote(3, &Err::<(), _>(StoreError::Full));
        health.wrote(1, &Err::<(), _>(StoreError::Io("broken".into())));
        assert_eq!((health.full(), health.failed()), (3, 1));
        assert!(health.problem().unwrap().contains("broken"));
        health.wrote(1, &Ok(()));
        assert_eq!((health.full(), health.problem()), (3, None));
        health.read(&Err::<(), _>(StoreError::Key { size: 0 }));
        health.read(&Err::<(), _>(StoreError::Damaged("here".into())));
        assert_eq!(health.damaged(), 1);
    }

    /// Several are under way.
    #[cfg(feature = "redis")]
    #[test]
    fn what_began_before_the_recovery_says_nothing_new() {
        let health = Health::default();
        let begun = Instant::now();
        let away = Err::<(), _>(StoreError::Away("away".into()));
        health.asked(&away, begun);
        assert!(health.problem().is_some());
        health.asked(&Ok(()), begun + Duration::from_millis(1));
        health.asked(&away, begun);
        assert_eq!((health.failed(), health.problem()), (2, None));
        health.asked(&away, begun + Duration::from_millis(2));
        assert!(health.problem().is_some());
        health.asked(&Ok(()), begun);
        assert_eq!(health.problem(), None);
    }
}
