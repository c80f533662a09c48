//! How the store does, for the operator: writes that the disk refused, values
//! that were damaged.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::StoreError;
use crate::log::Limiter;

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
        self.lock().problem.clone()
    }

    /// Notes what came of committing so many writes.
    pub(super) fn wrote<T>(&self, writes: usize, result: &Result<T, StoreError>) {
        match result {
            Ok(_) if self.failing.load(Relaxed) => self.recovered(),
            Ok(_) => {}
            Err(error) => self.refused(writes as u64, error),
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

    /// Notes what came of a question over the network: reads fail like writes.
    #[cfg(feature = "redis")]
    pub(super) fn asked<T>(&self, result: &Result<T, StoreError>) {
        match result {
            Err(
                error @ (StoreError::Away(_) | StoreError::Unconfirmed(_) | StoreError::Refused(_)),
            ) => self.refused(1, error),
            _ => self.wrote(1, &Ok(())),
        }
    }

    fn refused(&self, writes: u64, error: &StoreError) {
        let count = match error {
            StoreError::Full => &self.full,
            _ => &self.failed,
        };
        count.fetch_add(writes, Relaxed);
        let now = Instant::now();
        let mut state = self.lock();
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

    fn recovered(&self) {
        let mut state = self.lock();
        state.problem = None;
        self.failing.store(false, Relaxed);
        let refused = state.refused;
        if std::mem::take(&mut state.announced) {
            drop(state);
            tracing::warn!("store: it works again, after {refused} more were refused");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
}
