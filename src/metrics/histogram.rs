//! Durations in buckets that grow with them.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::snapshot::Distribution;

/// Buckets for each doubling: a quantile is off by at most an eighth.
const STEPS: usize = 8;
/// Shorter than 2^10 ns, about a microsecond, is the first bucket.
const LOWEST: u32 = 10;
/// From 2^41 ns, about 37 minutes, on is the last one.
const HIGHEST: u32 = 41;
const BUCKETS: usize = (HIGHEST - LOWEST) as usize * STEPS + 1;

/// A histogram of durations that many threads add to at once.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            sum_ns: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Adds one duration.
    pub fn record(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)].fetch_add(1, Relaxed);
        self.sum_ns.fetch_add(ns, Relaxed);
    }

    /// Adds all of another one's.
    pub fn absorb(&self, other: &Self) {
        for (bucket, more) in self.buckets.iter().zip(&other.buckets) {
            bucket.fetch_add(more.load(Relaxed), Relaxed);
        }
        self.sum_ns.fetch_add(other.sum_ns.load(Relaxed), Relaxed);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    /// Their sum.
    #[must_use]
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.load(Relaxed))
    }

    /// The duration that the given share of them does not exceed, to an
    /// eighth above; none if there is none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let counts: Vec<_> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Relaxed))
            .collect();
        let total: u64 = counts.iter().sum();
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        let rank = ((share * total as f64).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        let index = counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(Duration::from_nanos(upper(index)))
    }

    /// Pairs of a bound in seconds, at most an eighth above, and how many are
    /// below it and not below the bound before; without those that hold none.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let counted = self.buckets.iter().enumerate();
        counted.filter_map(|(index, count)| {
            let count = count.load(Relaxed);
            (count > 0).then(|| (Duration::from_nanos(upper(index)).as_secs_f64(), count))
        })
    }

    /// As Prometheus has it.
    #[must_use]
    pub fn distribution(&self) -> Distribution {
        // Counters are read one by one: what comes meanwhile is left out.
        let count = self.count();
        let buckets = self
            .cumulative()
            .map(|(bound, seen)| (bound, seen.min(count)))
            .collect();
        Distribution {
            buckets,
            seconds: self.sum().as_secs_f64(),
            count,
        }
    }

    /// Pairs of a bound in seconds and how many are at or below it, the
    /// bounds doubling from 8 µs to 34 s: what Prometheus calls `le`.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut seen = 0;
        let mut done = 0;
        (13..=35).map(move |power: u32| {
            let end = (power - LOWEST) as usize * STEPS + 1;
            seen += self.buckets[done..end]
                .iter()
                .map(|bucket| bucket.load(Relaxed))
                .sum::<u64>();
            done = end;
            (Duration::from_nanos(1 << power).as_secs_f64(), seen)
        })
    }
}

fn bucket(ns: u64) -> usize {
    let Some(power) = ns.checked_ilog2().filter(|&power| power >= LOWEST) else {
        return 0;
    };
    let step = (ns >> (power - 3)) as usize & (STEPS - 1);
    (((power - LOWEST) as usize) * STEPS + step + 1).min(BUCKETS - 1)
}

/// Where a bucket ends, in nanoseconds.
fn upper(index: usize) -> u64 {
    let (power, step) = (index / STEPS, index % STEPS);
    (1 << (LOWEST as usize + power)) + ((step as u64) << (LOWEST as usize + power - 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_hold_what_they_say() {
        let mut last = 0;
        for ns in (0..4_000_000).step_by(37) {
            let index = bucket(ns);
            assert!(index >= last, "{ns}");
            assert!(ns < upper(index), "{ns} is not below {}", upper(index));
            assert!(
                index == 0 || ns >= upper(index - 1),
                "{ns} is below {}",
                upper(index - 1)
            );
            last = index;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_and_bounds() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        for ms in 1..=100 {
            histogram.record(Duration::from_millis(ms));
        }
        let near = |share, ms: f64| {
            let found = histogram.quantile(share).unwrap().as_secs_f64() * 1000.0;
            assert!(found >= ms && found <= ms * 1.125, "{share}: {found}");
        };
        near(0.5, 50.0);
        near(0.99, 99.0);
        near(1.0, 100.0);
        let buckets: Vec<_> = histogram.buckets().collect();
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 100);
        assert_eq!(
            (histogram.count(), histogram.sum()),
            (100, Duration::from_millis(5050))
        );
        let at = |bound: f64| {
            histogram
                .cumulative()
                .find(|(le, _)| (le - bound).abs() < 1e-9)
                .unwrap()
                .1
        };
        assert_eq!(
            (at(0.000_008_192), at(0.016_777_216), at(34.359_738_368)),
            (0, 16, 100)
        );
    }
}
