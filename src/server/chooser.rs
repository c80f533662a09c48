//! Where connections wait: each in a thread of its own that reads, or all of
//! them at the poller. Which of the two costs less depends on who asks.
//! Clients that block, on the same processors, are cheapest to wake from a
//! thread that sleeps beside them; one client that sends for many, or a
//! network card, has many connections ready at once, and each thread that is
//! woken for one of them is a change of threads too many. So it is measured,
//! in turns: requests a second, and the processor time that this whole process
//! spends on one.

use std::time::{Duration, Instant};

use crate::config::Waiting;

/// Time over which a cost is measured.
pub(super) const PERIOD: Duration = Duration::from_millis(100);

/// Fewer requests a second say nothing, and where their connections wait does
/// not matter: they wait at the poller.
const BUSY: f64 = 5_000.0;

/// The other way is taken where it is this much better.
const CLEARLY: f64 = 1.1;

/// From one comparison to the next: at first, by the way that was chosen;
/// doubled each time that nothing changes, up to the last. A comparison takes
/// the other way for two periods; and threads that come back from the poller
/// take up to a second until the system has put each beside its client again.
const PAUSE_AT_POLLER: Duration = Duration::from_millis(500);
const PAUSE_IN_THREADS: Duration = Duration::from_secs(8);
const LONGEST_PAUSE: Duration = Duration::from_secs(64);

/// What a process has done since its start, and what it took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) cpu: Duration,
    pub(super) served: u64,
}

/// What was seen in one period.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// Requests a second.
    rate: f64,
    /// Processor time for a request, in seconds.
    cost: f64,
}

impl Turn {
    fn best(self, other: Self) -> Self {
        if self.rate > other.rate { self } else { other }
    }

    fn worst(self, other: Self) -> Self {
        if self.rate > other.rate { other } else { self }
    }

    /// More requests are better; where they are as many, because clients send
    /// no more, less processor time is.
    fn beats(self, other: Self) -> bool {
        let faster = self.rate / other.rate;
        faster > CLEARLY || faster > 1.0 / CLEARLY && self.cost * CLEARLY < other.cost
    }
}

/// Chooses, by comparisons from time to time.
pub(super) struct Chooser {
    choice: Waiting,
    last: Sample,
    /// Those of the comparison at hand: one of the choice, two of the other
    /// way, one of the choice, so that neither gains by what changes meanwhile.
    turns: Vec<Turn>,
    next_comparison: Instant,
    pause: Duration,
    busy: bool,
}

impl Chooser {
    pub(super) fn new(now: Sample) -> Self {
        let choice = Waiting::Poller;
        Self {
            choice,
            last: now,
            turns: Vec::new(),
            next_comparison: now.at,
            pause: PAUSE_AT_POLLER,
            busy: false,
        }
    }

    /// Whether a period has passed since the last step.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last.at) >= PERIOD
    }

    /// Whether the next step should come after one period.
    pub(super) fn is_busy(&self) -> bool {
        self.busy
    }

    /// A period has passed; says where connections wait in the next one.
    pub(super) fn step(&mut self, now: Sample) -> Waiting {
        let served = (now.served - self.last.served) as f64;
        let cpu = now.cpu.saturating_sub(self.last.cpu).as_secs_f64();
        let elapsed = now.at.saturating_duration_since(self.last.at);
        self.last = now;
        let was_busy = std::mem::replace(&mut self.busy, served >= BUSY * elapsed.as_secs_f64());
        if !self.busy {
            self.turns.clear();
            self.choice = Waiting::Poller;
            (self.next_comparison, self.pause) = (now.at, PAUSE_AT_POLLER);
        } else if was_busy && (!self.turns.is_empty() || now.at >= self.next_comparison) {
            self.turns.push(Turn {
                rate: served / elapsed.as_secs_f64(),
                cost: cpu / served,
            });
            if let [own, other, other_again, own_again] = self.turns[..] {
                self.turns.clear();
                tracing::debug!(at = ?self.choice, ?own, ?other, ?other_again, ?own_again, "compared");
                if other.best(other_again).beats(own.best(own_again))
                    && other.worst(other_again).beats(own.worst(own_again))
                {
                    self.choice = self.other();
                    self.pause = if self.choice == Waiting::Poller {
                        PAUSE_AT_POLLER
                    } else {
                        PAUSE_IN_THREADS
                    };
                } else {
                    self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                }
                self.next_comparison = now.at + self.pause;
            }
        }
        if matches!(self.turns.len(), 1 | 2) {
            self.other()
        } else {
            self.choice
        }
    }

    fn other(&self) -> Waiting {
        if self.choice == Waiting::Poller {
            Waiting::Threads
        } else {
            Waiting::Poller
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps with so many requests in each, at costs in microseconds by the
    /// way that was chosen; yields what was chosen for each.
    fn run(
        chooser: &mut Chooser,
        steps: usize,
        requests: u64,
        cost: impl Fn(Waiting) -> u64,
    ) -> Vec<Waiting> {
        let mut way = Waiting::Poller;
        let step = |_| {
            let Sample { at, cpu, served } = chooser.last;
            let cpu = cpu + Duration::from_micros(cost(way) * requests);
            way = chooser.step(Sample {
                at: at + PERIOD,
                cpu,
                served: served + requests,
            });
            way
        };
        (0..steps).map(step).collect()
    }

    fn new() -> Chooser {
        Chooser::new(Sample {
            at: Instant::now(),
            cpu: Duration::ZERO,
            served: 0,
        })
    }

    fn costs(poller: u64, threads: u64) -> impl Fn(Waiting) -> u64 {
        move |way| {
            if way == Waiting::Poller {
                poller
            } else {
                threads
            }
        }
    }

    #[test]
    fn the_cheaper_way_is_found_and_kept_and_left_again() {
        let mut chooser = new();
        let ways = run(&mut chooser, 5, 1000, costs(10, 7));
        assert_eq!(
            ways,
            [
                Waiting::Poller,
                Waiting::Threads,
                Waiting::Threads,
                Waiting::Poller,
                Waiting::Threads
            ]
        );
        let ways = run(&mut chooser, 1000, 1000, costs(10, 7));
        let tried = ways.iter().filter(|way| **way == Waiting::Poller).count();
        assert!(
            chooser.choice == Waiting::Threads && (4..=12).contains(&tried),
            "{tried} periods"
        );
        run(&mut chooser, 2000, 1000, costs(7, 10));
        assert_eq!(chooser.choice, Waiting::Poller);
    }

    #[test]
    fn a_small_gain_is_none() {
        let mut chooser = new();
        run(&mut chooser, 500, 1000, costs(20, 19));
        assert_eq!(chooser.choice, Waiting::Poller);
    }

    #[test]
    fn without_much_to_do_they_wait_at_the_poller() {
        let mut chooser = new();
        run(&mut chooser, 5, 1000, costs(10, 7));
        assert_eq!(chooser.choice, Waiting::Threads);
        let ways = run(&mut chooser, 500, 100, costs(10, 7));
        assert!(ways.iter().all(|way| *way == Waiting::Poller) && !chooser.is_busy());
        run(&mut chooser, 10, 0, costs(10, 7));
        assert!(!chooser.is_busy());
    }
}
