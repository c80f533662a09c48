//! Watches the calls of a version that was just deployed: whether they fail or
//! are slow, compared with those of the version before.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{Exit, Result};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// First calls that do not count: caches are empty, instances are created.
const FIRST_CALLS: u64 = 50;
/// Fewer calls say nothing.
const MIN_CALLS: u64 = 500;
/// How many times slower than before is too slow.
const SLOWER: f64 = 2.0;
/// Time after which a server that can't be asked counts as failed.
const SILENT_FOR: Duration = Duration::from_secs(3);

/// What a version has done so far on a server.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Seen {
    calls: u64,
    /// Calls that the server ended.
    errors: u64,
    /// Calls by how long they took: nanoseconds, and how many.
    durations: BTreeMap<u64, u64>,
}

impl Seen {
    /// Reads the page of a service; none where it has no such version.
    pub(super) fn of(page: &Value, version: &str) -> Option<Self> {
        let versions = page["versions"].as_array()?.iter();
        let found = versions
            .filter(|found| found["version"] == *version)
            .find(|found| found["row"].is_object())?;
        let pair = |pair: &Value| {
            let nanoseconds = (pair[0].as_f64()? * 1e9) as u64;
            Some((nanoseconds, pair[1].as_u64()?))
        };
        Some(Self {
            calls: found["row"]["calls"].as_u64()?,
            errors: found["row"]["errors"].as_u64()?,
            durations: found["durations"]
                .as_array()?
                .iter()
                .filter_map(pair)
                .collect(),
        })
    }

    /// What came since.
    fn since(&self, earlier: &Self) -> Self {
        let count = |(at, count): (&u64, &u64)| {
            let before = earlier.durations.get(at).copied().unwrap_or(0);
            (*at, count.saturating_sub(before))
        };
        Self {
            calls: self.calls.saturating_sub(earlier.calls),
            errors: self.errors.saturating_sub(earlier.errors),
            durations: self.durations.iter().map(count).collect(),
        }
    }

    /// The same of several servers.
    fn sum<'a>(all: impl Iterator<Item = &'a Self>) -> Self {
        all.fold(Self::default(), |mut sum, seen| {
            sum.calls += seen.calls;
            sum.errors += seen.errors;
            for (at, count) in &seen.durations {
                *sum.durations.entry(*at).or_default() += count;
            }
            sum
        })
    }

    /// The duration that 99 of 100 calls do not exceed, in milliseconds; none
    /// of few calls.
    fn p99(&self) -> Option<f64> {
        let total: u64 = self.durations.values().sum();
        let rank = total - total / 100;
        let mut seen = 0;
        let found = self.durations.iter().find(|(_, count)| {
            seen += **count;
            seen >= rank
        });
        found
            .filter(|_| total >= MIN_CALLS)
            .map(|(at, _)| *at as f64 / 1e6)
    }

    /// Why these calls are worse than they may be; none if they are not, or
    /// too few.
    fn problem(&self, before: Option<f64>, max_errors: f64) -> Option<String> {
        if self.calls < MIN_CALLS {
            return None;
        }
        let share = self.errors as f64 / self.calls as f64;
        if share > max_errors {
            return Some(format!(
                "the server ended {} of {} calls, {:.1}%, more than {}%",
                self.errors,
                self.calls,
                share * 100.0,
                max_errors * 100.0
            ));
        }
        let (now, before) = self.p99().zip(before)?;
        (now > before * SLOWER).then(|| {
            format!("p99 is {now:.3} ms, more than twice the {before:.3} ms of the version before")
        })
    }
}

/// Why a version is not watched to the end.
pub(super) enum Problem {
    /// It fails, is slow, or its server is gone.
    Worse(String),
    /// Somebody has changed what a server serves or who may look, or has ended
    /// the watch.
    Changed(String),
}

/// How long, and compared with what.
pub(super) struct Watch {
    pub(super) within: Duration,
    /// Share of calls that may end in an error.
    pub(super) max_errors: f64,
    /// What the version before did on each server.
    pub(super) before: Vec<Option<Seen>>,
}

impl Watch {
    /// Looks at the pages of the servers until the time is over. Returns what
    /// was seen.
    ///
    /// # Errors
    /// Says why the version has to go, or why it can't be watched any more.
    pub(super) fn run(
        &self,
        version: &str,
        look: impl Fn() -> Result<Vec<Result<Value>>, Problem>,
    ) -> Result<String, Problem> {
        let end = Instant::now() + self.within;
        let mut counted = Counted::new(self.before.len());
        let mut answered = vec![Instant::now(); self.before.len()];
        loop {
            thread::sleep(LOOK_EVERY.min(end.saturating_duration_since(Instant::now())));
            for (index, page) in look()?.into_iter().enumerate() {
                match page.map(|page| Seen::of(&page, version)) {
                    Ok(Some(seen)) => {
                        counted.take(index, seen);
                        answered[index] = Instant::now();
                    }
                    Ok(None) => {}
                    Err(_) if answered[index].elapsed() < SILENT_FOR => {}
                    Err((Exit::Unreachable, error)) => return Err(Problem::Worse(error)),
                    Err((_, error)) => return Err(Problem::Changed(error)),
                }
            }
            if let Some(problem) = counted.problem(&self.before, self.max_errors) {
                return Err(Problem::Worse(problem));
            }
            if Instant::now() >= end {
                return Ok(counted.summary(self.within));
            }
        }
    }
}

/// What is counted on each server, once its first calls are over.
struct Counted(Vec<Server>);

#[derive(Default)]
struct Server {
    /// When it was looked at first.
    begun: Option<Seen>,
    /// When the first calls were over.
    start: Option<Seen>,
    since: Seen,
}

impl Counted {
    fn new(servers: usize) -> Self {
        Self((0..servers).map(|_| Server::default()).collect())
    }

    fn take(&mut self, index: usize, seen: Seen) {
        let server = &mut self.0[index];
        // After a restart it counts from the beginning.
        if server
            .begun
            .as_ref()
            .is_some_and(|begun| seen.calls < begun.calls)
        {
            *server = Server::default();
        }
        let begun = server.begun.get_or_insert_with(|| seen.clone());
        if server.start.is_none() && seen.calls - begun.calls >= FIRST_CALLS {
            server.start = Some(seen.clone());
        }
        if let Some(start) = &server.start {
            server.since = seen.since(start);
        }
    }

    /// What is wrong on a server, or on all together.
    fn problem(&self, before: &[Option<Seen>], max_errors: f64) -> Option<String> {
        let own = self.0.iter().zip(before).find_map(|(server, before)| {
            let before = before.as_ref().and_then(Seen::p99);
            server.since.problem(before, max_errors)
        });
        own.or_else(|| {
            let before = Seen::sum(before.iter().flatten());
            self.all().problem(before.p99(), max_errors)
        })
    }

    fn all(&self) -> Seen {
        Seen::sum(self.0.iter().map(|server| &server.since))
    }

    fn summary(&self, within: Duration) -> String {
        let all = self.all();
        let seconds = within.as_secs_f64();
        if all.calls < MIN_CALLS {
            return format!(
                "watched for {seconds} s: {} calls are too few to judge by ({MIN_CALLS} after the first {FIRST_CALLS}); it stays",
                all.calls
            );
        }
        let p99 = all.p99().map(|p99| format!(", p99 {p99:.3} ms"));
        format!(
            "watched for {seconds} s: {} calls, {} of them ended by the server{}; it stays",
            all.calls,
            all.errors,
            p99.unwrap_or_default()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(calls: u64, errors: u64, durations: &[(u64, u64)]) -> Seen {
        Seen {
            calls,
            errors,
            durations: durations.iter().copied().collect(),
        }
    }

    #[test]
    fn errors_and_slow_calls_are_problems_of_enough_calls() {
        let fast = [(1_000_000, 1000)];
        let check = |seen: Seen, before: Option<f64>, expected: Option<&str>| {
            let problem = seen.problem(before, 0.01);
            match (&problem, expected) {
                (None, None) => {}
                (Some(problem), Some(expected)) => assert!(problem.contains(expected), "{problem}"),
                _ => panic!("{seen:?}: {problem:?}"),
            }
        };
        check(seen(1000, 10, &fast), Some(1.0), None);
        check(seen(1000, 11, &fast), Some(1.0), Some("11 of 1000"));
        check(seen(499, 499, &[]), None, None);
        check(seen(1000, 0, &[(2_100_000, 1000)]), Some(1.0), Some("p99"));
        check(seen(1000, 0, &[(2_000_000, 1000)]), Some(1.0), None);
        check(seen(1000, 0, &[(9_000_000, 1000)]), None, None);
        // One call in a hundred may be slow.
        check(
            seen(1000, 0, &[(1_000_000, 990), (9_000_000, 10)]),
            Some(1.0),
            None,
        );
        check(
            seen(1000, 0, &[(1_000_000, 989), (9_000_000, 11)]),
            Some(1.0),
            Some("p99"),
        );
    }

    #[test]
    fn the_first_calls_do_not_count_and_a_restart_begins_again() {
        let mut counted = Counted::new(2);
        counted.take(0, seen(1000, 900, &[]));
        counted.take(0, seen(1049, 940, &[]));
        assert_eq!(counted.all().calls, 0);
        counted.take(0, seen(1060, 950, &[]));
        counted.take(0, seen(1560, 950, &[]));
        assert_eq!((counted.all().calls, counted.all().errors), (500, 0));
        assert_eq!(counted.problem(&[None, None], 0.01), None);
        counted.take(1, seen(0, 0, &[]));
        counted.take(1, seen(60, 0, &[]));
        counted.take(1, seen(660, 20, &[]));
        assert!(counted.problem(&[None, None], 0.01).is_some());
        counted.take(1, seen(10, 0, &[]));
        assert_eq!(counted.problem(&[None, None], 0.01), None);
    }
}
