//! Load: sends requests over many connections from few threads and measures
//! when the answers arrive.
//!
//! A thread drives its connections by `epoll`, so that what measures costs less
//! than what is measured. In a closed loop every answer frees a slot for the
//! next request; in an open one requests are due at a fixed rate, and what is
//! measured begins when a request was due, not when a slot was free: a
//! server that stops for a second is late with every request of that second.
//! Where it has stopped at the end, what waits counts with the time until then.

mod connection;
mod http;
mod protocol;

use std::{
    collections::BTreeMap,
    io,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use connection::LoadConnection;
pub use connection::LoadStream;
use hdrhistogram::Histogram;
pub use http::Http;
pub use protocol::{Frames, ParsedReply, Protocol};
use rustix::event::{Timespec, epoll};

/// Longest time that is distinguished, in nanoseconds: a request without an
/// answer for longer counts as this.
const LONGEST_NS: u64 = 3_600_000_000_000;
/// Significant digits of a measured time.
const DIGITS: u8 = 3;
/// Without any answer for so long, something is broken.
const PATIENCE: Duration = Duration::from_secs(30);

/// When the next request is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// As soon as an answer frees a slot for it.
    Closed,
    /// So many a second, whatever comes back.
    Open(f64),
}

/// When it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// After this time.
    Time(Duration),
    /// After so many answers.
    Count(u64),
}

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct LoadPlan {
    /// Requests that wait for their answers at the same time, by connection;
    /// at least 1.
    pub depth: usize,
    /// When the next request is sent.
    pub pace: Pace,
    /// Time before anything counts.
    pub warm_up: Duration,
    /// How long it counts.
    pub length: Length,
    /// Threads that drive the connections; at least 1.
    pub threads: usize,
}

/// The result of a measurement.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Answers that counted, refusals among them.
    pub answers: u64,
    /// Of them, those that refused, by code.
    pub refused: BTreeMap<String, u64>,
    /// Time in which they came.
    pub elapsed: Duration,
    /// Bytes of these answers.
    pub bytes: u64,
    /// Requests that had no answer when it ended; of an open loop also those
    /// that were due.
    pub unanswered: u64,
    /// How long the oldest of them had waited, in nanoseconds.
    pub oldest_ns: u64,
    /// The slowest answer, in nanoseconds.
    pub slowest_ns: u64,
    /// From when a request was sent, or in an open loop was due, until its
    /// answer was read, in nanoseconds; where answers stopped coming, also what
    /// had none, until the end.
    pub times: Histogram<u64>,
}

impl Measured {
    /// Answers a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        #[allow(clippy::cast_precision_loss)]
        let answers = self.answers as f64;
        answers / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// The time that the given share of the answers, of 1, did not exceed.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        Duration::from_nanos(self.times.value_at_quantile(share))
    }

    /// Whether the server had stopped answering when it ended: a request had
    /// waited for more than a second, and twice as long as any answer took.
    #[must_use]
    pub fn stalled(&self) -> bool {
        let usual = (2 * self.slowest_ns).max(1_000_000_000);
        self.oldest_ns > usual
    }

    fn count(&mut self, bytes: usize, time_ns: u64) {
        self.answers += 1;
        self.bytes += bytes as u64;
        self.slowest_ns = self.slowest_ns.max(time_ns);
        self.times.saturating_record(time_ns.max(1));
    }

    /// Counts requests that got no answer: how many have waited how long. Where
    /// answers still came, their times would be taken for those of answers.
    fn count_open(&mut self, open: &[(u64, u64)]) {
        for (count, waited_ns) in open {
            self.unanswered += count;
            self.oldest_ns = self.oldest_ns.max(*waited_ns);
        }
        if self.stalled() {
            for (count, waited_ns) in open {
                self.times.saturating_record_n((*waited_ns).max(1), *count);
            }
        }
    }

    fn absorb(&mut self, other: &Self) {
        self.answers += other.answers;
        self.bytes += other.bytes;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.unanswered += other.unanswered;
        self.oldest_ns = self.oldest_ns.max(other.oldest_ns);
        self.slowest_ns = self.slowest_ns.max(other.slowest_ns);
        for (code, count) in &other.refused {
            *self.refused.entry(code.clone()).or_default() += count;
        }
        self.times
            .add(&other.times)
            .expect("both have the same bounds");
    }
}

/// What can be seen while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// Answers so far, those of the warm-up among them.
    pub answers: AtomicU64,
    /// Set to end it early; what was measured until then counts.
    pub stop: AtomicBool,
}

/// Sends load over these connections. Returns the result.
///
/// # Errors
/// If a connection is closed, answers in another protocol, or no answer arrives
/// for 30 s.
pub fn run<S: Protocol>(
    streams: Vec<(LoadStream, S)>,
    plan: &LoadPlan,
    progress: &Progress,
) -> io::Result<Measured> {
    let threads = plan.threads.clamp(1, streams.len().max(1));
    let mut shares: Vec<Vec<_>> = (0..threads).map(|_| Vec::new()).collect();
    for (number, stream) in streams.into_iter().enumerate() {
        shares[number % threads].push(stream);
    }
    let drive = |share| Driver::new(share, plan, threads, progress)?.drive();
    thread::scope(|scope| {
        let threads: Vec<_> = shares
            .into_iter()
            .map(|share| thread::Builder::new().spawn_scoped(scope, || drive(share)))
            .collect::<io::Result<_>>()?;
        let mut sum: Option<Measured> = None;
        for thread in threads {
            let measured = thread
                .join()
                .map_err(|_| io::Error::other("defect of the load generator"))??;
            match &mut sum {
                None => sum = Some(measured),
                Some(sum) => sum.absorb(&measured),
            }
        }
        sum.ok_or_else(|| io::Error::other("no connections"))
    })
}

/// One thread of a measurement.
struct Driver<'a, S> {
    connections: Vec<LoadConnection<S>>,
    epoll: rustix::fd::OwnedFd,
    plan: &'a LoadPlan,
    progress: &'a Progress,
    begun: Instant,
    /// Of an open loop: nanoseconds between two requests of this thread.
    interval_ns: f64,
    /// Requests that were sent.
    sent: u64,
    /// Answers that end it: this thread's share of those that count.
    share: u64,
    /// Requests that will be; without a warm-up just as many as answers count.
    to_send: u64,
    /// The connection whose free slots are used next.
    next: usize,
    measured: Measured,
}

impl<'a, S: Protocol> Driver<'a, S> {
    fn new(
        streams: Vec<(LoadStream, S)>,
        plan: &'a LoadPlan,
        threads: usize,
        progress: &'a Progress,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut connections = Vec::with_capacity(streams.len());
        for (number, (stream, protocol)) in streams.into_iter().enumerate() {
            stream.socket().set_nonblocking(true)?;
            epoll::add(
                &epoll,
                stream.socket(),
                epoll::EventData::new_u64(number as u64),
                epoll::EventFlags::IN,
            )?;
            connections.push(LoadConnection::new(stream, protocol, plan.depth));
        }
        let interval_ns = match plan.pace {
            Pace::Closed => 0.0,
            #[allow(clippy::cast_precision_loss)]
            Pace::Open(rate) => 1e9 * threads as f64 / rate,
        };
        let times = Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).map_err(io::Error::other)?;
        let measured = Measured {
            answers: 0,
            refused: BTreeMap::new(),
            elapsed: Duration::ZERO,
            bytes: 0,
            unanswered: 0,
            oldest_ns: 0,
            slowest_ns: 0,
            times,
        };
        let share = match plan.length {
            Length::Count(count) => count.div_ceil(threads as u64),
            Length::Time(_) => u64::MAX,
        };
        let to_send = match plan.warm_up.is_zero() {
            true => share,
            false => u64::MAX,
        };
        let begun = Instant::now();
        Ok(Self {
            connections,
            epoll,
            plan,
            progress,
            begun,
            interval_ns,
            sent: 0,
            share,
            to_send,
            next: 0,
            measured,
        })
    }

    fn drive(mut self) -> io::Result<Measured> {
        if self.plan.pace == Pace::Closed {
            for number in 0..self.connections.len() {
                let now = self.now();
                while self.sent < self.to_send && self.connections[number].has_free_slot() {
                    self.connections[number].ask(now);
                    self.sent += 1;
                }
                self.send(number)?;
            }
        }
        let mut events = Vec::with_capacity(self.connections.len().min(1024));
        let mut last_answer = Instant::now();
        let mut first_counted = None;
        loop {
            let wait = self.send_what_is_due()?;
            epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&wait),
            )?;
            let now = self.now();
            let counts = Duration::from_nanos(now) >= self.plan.warm_up;
            if counts && first_counted.is_none() {
                first_counted = Some(now);
            }
            let mut answers = 0;
            for event in events.drain(..) {
                answers += self.serve(
                    usize::try_from(event.data.u64()).unwrap_or(0),
                    event.flags,
                    counts,
                )?;
            }
            if answers > 0 {
                self.progress.answers.fetch_add(answers, Relaxed);
                last_answer = Instant::now();
            } else if last_answer.elapsed() > PATIENCE && self.waits_for_answers() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "nothing was answered for 30 s",
                ));
            }
            if let Some(first) = first_counted
                && self.is_done(first)
            {
                self.measured.elapsed = Duration::from_nanos(self.now() - first);
                self.count_open_requests();
                return Ok(self.measured);
            }
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn is_done(&self, first_counted: u64) -> bool {
        let over = match self.plan.length {
            Length::Time(length) => Duration::from_nanos(self.now() - first_counted) >= length,
            // The last answers come together.
            Length::Count(_) => self.measured.answers >= self.share,
        };
        over || self.progress.stop.load(Relaxed)
    }

    fn waits_for_answers(&self) -> bool {
        self.connections
            .iter()
            .any(|connection| connection.open_requests().next().is_some())
    }

    /// Counts what got no answer: what was sent, and what was due.
    fn count_open_requests(&mut self) {
        /// What was due is counted in so many steps at most.
        const STEPS: u64 = 10_000;
        let now = self.now();
        let mut open: Vec<_> = self
            .connections
            .iter()
            .flat_map(LoadConnection::open_requests)
            .map(|since| (1, now.saturating_sub(since)))
            .collect();
        let due = match self.plan.pace {
            Pace::Closed => self.sent,
            #[allow(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss
            )]
            Pace::Open(_) => (now as f64 / self.interval_ns) as u64,
        };
        let mut next = self.sent;
        let due = due.min(self.to_send);
        let step = due.saturating_sub(next).div_ceil(STEPS);
        while next < due {
            let count = step.min(due - next);
            open.push((count, now.saturating_sub(self.due(next))));
            next += count;
        }
        self.measured.count_open(&open);
    }

    /// When a request of an open loop is due, in nanoseconds.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    fn due(&self, number: u64) -> u64 {
        (number as f64 * self.interval_ns) as u64
    }

    /// Sends what is due in an open loop, where slots are free. Returns the
    /// time until the next request is due.
    fn send_what_is_due(&mut self) -> io::Result<Timespec> {
        const IDLE: Duration = Duration::from_millis(100);
        if self.plan.pace == Pace::Closed {
            return Timespec::try_from(IDLE).map_err(io::Error::other);
        }
        let mut touched = Vec::new();
        let wait = loop {
            let due = self.due(self.sent);
            let now = self.now();
            if self.sent >= self.to_send {
                break IDLE;
            }
            if due > now {
                break Duration::from_nanos(due - now).min(IDLE);
            }
            let count = self.connections.len();
            let free = (0..count)
                .map(|step| (self.next + step) % count)
                .find(|&number| self.connections[number].has_free_slot());
            // Without room it waits for answers; what is due stays due.
            let Some(number) = free else { break IDLE };
            self.connections[number].ask(due);
            self.next = number + 1;
            self.sent += 1;
            touched.push(number);
        };
        touched.sort_unstable();
        touched.dedup();
        for number in touched {
            self.send(number)?;
        }
        Timespec::try_from(wait).map_err(io::Error::other)
    }

    /// Reads what a connection has, and answers in a closed loop.
    fn serve(&mut self, number: usize, flags: epoll::EventFlags, counts: bool) -> io::Result<u64> {
        let closed = self.plan.pace == Pace::Closed;
        let mut answers = 0;
        if !(flags & !epoll::EventFlags::OUT).is_empty() {
            loop {
                let more = self.connections[number].read()?;
                let now = self.now();
                while let Some((reply, since)) = self.connections[number].next()? {
                    answers += 1;
                    if counts {
                        self.measured.count(reply.bytes, now.saturating_sub(since));
                        if let Some(code) = reply.refused {
                            *self.measured.refused.entry(code).or_default() += 1;
                        }
                    }
                    if closed && self.sent < self.to_send {
                        self.connections[number].ask(now);
                        self.sent += 1;
                    }
                }
                if !more {
                    break;
                }
            }
        }
        self.send(number)?;
        Ok(answers)
    }

    /// Writes what waits, and asks for an event when the rest can be written.
    fn send(&mut self, number: usize) -> io::Result<()> {
        let connection = &mut self.connections[number];
        let blocked = !connection.write()?;
        if blocked != connection.blocked {
            connection.blocked = blocked;
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, blocked);
            epoll::modify(
                &self.epoll,
                connection.stream.socket(),
                epoll::EventData::new_u64(number as u64),
                flags,
            )?;
        }
        Ok(())
    }
}
