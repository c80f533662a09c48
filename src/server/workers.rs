//! The threads that serve. A few of them poll: each takes a connection that
//! has something to do, serves it, parks it and looks for the next. None
//! of them waits for a peer. One that is about to wait for a call, or is in a
//! long one, has another thread poll in its place, lets the connection go on,
//! and ends with its call: leaders and followers, with compensation for those
//! that block.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    common::Common,
    connection::{Advance, Call, CloseReason, Connection, Input, RETRY_WHEN_BUSY_MS},
    peer::Peer,
    poller::{Events, Parked, PollOptions, Poller, Queue, Taken},
    running::Listed,
};
use crate::{
    config::Waiting,
    dispatch::{
        self, Answered, Counted, Deferred, Finish, Handle, Outcome, Postponed, Reply, Request,
        internal_error,
    },
    host::{Stop, Watch},
    log::{Limiter, panic_text},
    scheduler::{Cost, Ticket},
    system::{
        self, AtomicBool, AtomicU32, AtomicUsize, Channel, Mutex, MutexGuard,
        Ordering::{Relaxed, SeqCst},
        Pool, Ready, lock,
    },
    wire::{Code, ErrorBody, Header, Version},
};

/// Fewest threads that poll; one for each processor, where there are more.
const FEWEST_POLLERS: usize = 2;

/// Threads more, that poll while all others can't.
pub(crate) const RESERVE: usize = 1;

/// Ticks of the sandbox, a millisecond each, that a call sees before its
/// connection goes on without it: so it has taken 1 to 2 ms. The first one
/// says nothing: a quick call may just have begun.
const TICKS_UNTIL_SLOW: u32 = 2;

/// The same of all calls of a connection, until others are next.
const TICKS_PER_QUANTUM: u32 = 4;

/// Less than this is little: a few times what waking a thread costs.
const QUICK: Duration = Duration::from_micros(100);
/// So many have to have taken little: where more than a few calls in a hundred
/// take long, nobody waits for them. A thousand gave next to nothing, because
/// the system interrupts some of any thousand.
const QUICK_BEFORE_BATCH: u32 = 100;

/// How long a thread waits for the next request of the peer that it has
/// answered, with `waiting = "threads"`. As long, an event that is not the
/// peer's may wait for the connection.
const STAY: Duration = Duration::from_millis(20);

/// Threads that poll.
pub(crate) fn pollers() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    processors.max(FEWEST_POLLERS)
}

/// What all workers share.
pub(crate) struct Workers {
    pub(crate) common: Arc<Common>,
    pub(crate) handle: Arc<dyn Handle>,
    pub(crate) poller: Poller<Connection>,
    pub(crate) threads: Pool,
    /// Calls that wait until they may begin.
    pub(crate) waiting: AtomicUsize,
    /// Deferred answers that may leave.
    pub(crate) due: Queue<LateAnswer>,
}

impl Workers {
    /// Half of the threads at most wait for calls that may not begin.
    pub(crate) fn may_wait(&self) -> bool {
        self.waiting.load(SeqCst) < self.most_waiting()
    }

    fn most_waiting(&self) -> usize {
        self.common.settings.config.max_threads / 2
    }

    /// Has an answer that was deferred leave, by whoever polls next, who is
    /// woken unless more follow at once.
    fn is_due(&self, late: LateAnswer, more: bool) {
        self.due.push(late);
        if !more {
            self.poller.wake();
        }
    }

    /// Closes a connection such that its peer can read what was sent last.
    pub(crate) fn linger(&self, channel: Option<Channel>) {
        if let Some(channel) = channel {
            self.poller.forget(&channel);
            self.common.linger.take(channel);
        }
    }
}

/// One thread of the pool, for one job.
pub(crate) struct Worker {
    shared: Arc<Workers>,
    /// Other connections wait for this thread.
    polls: AtomicBool,
    held: Mutex<Work>,
    /// Ticks that the current call has seen.
    ticks: AtomicU32,
    /// Quick connections in a row.
    quick: AtomicU32,
    /// Whether the next one is taken from the queue.
    alternates: AtomicBool,
    /// What the scheduler knows of the current call.
    ticket: Ticket,
    /// The current call goes on when its client resets the connection.
    outlives_reset: AtomicBool,
    /// It polls while all others are absent, and begins no call itself.
    is_reserve: bool,
    /// It should poll, but is in a call without a replacement.
    is_absent: AtomicBool,
    /// Its call is among those that wait to begin.
    queues: AtomicBool,
    /// A connection has gone on without its call.
    has_left: AtomicBool,
}

/// What a worker works on. Only its own thread takes the lock: inside a call,
/// the worker is reached through [`Watch`] alone.
#[derive(Default)]
struct Work {
    /// None once it has gone on.
    connection: Option<Box<Connection>>,
    /// The call that runs, if any.
    call: Option<CurrentCall>,
    /// The call, once it takes long.
    slow: Option<SlowCall>,
}

/// Where the message of the current call lies.
struct CurrentCall {
    message: std::ops::Range<usize>,
    arrived: Instant,
}

/// A call that is over, whose answer leaves later than its connection went on.
pub(crate) struct LateAnswer {
    peer: Arc<Peer>,
    call: Call,
    /// The one that was asked for; none where there is no header to answer with.
    version: Option<Version>,
    finish: Finish,
}

/// A long call: what it keeps when its connection goes on without it.
struct SlowCall {
    peer: Arc<Peer>,
    listed: Listed,
}

impl Worker {
    /// Starts one more polling worker, which runs until the shutdown. Returns
    /// false if there is no thread for it.
    #[must_use]
    pub(crate) fn start(shared: &Arc<Workers>) -> bool {
        let worker = Arc::new(Self::new(shared, false));
        shared.threads.execute(move || {
            worker.poll(|| worker.polls.load(Relaxed));
            worker.serve_after_call();
        })
    }

    /// Starts the reserve, which polls while all others are in calls and no
    /// replacement can be started, so that some thread always polls. Returns
    /// false if there is no thread for it.
    #[must_use]
    pub(crate) fn start_reserve(shared: &Arc<Workers>) -> bool {
        let worker = Arc::new(Self::new(shared, true));
        shared.threads.execute(move || {
            let poller = &worker.shared.poller;
            while !poller.is_shut_down() {
                poller.wait_as_reserve();
                worker.poll(|| poller.all_are_absent());
                // A worker that is back takes what the reserve has left.
                poller.wake();
            }
        })
    }

    fn new(shared: &Arc<Workers>, is_reserve: bool) -> Self {
        Self {
            shared: Arc::clone(shared),
            polls: AtomicBool::new(true),
            held: Mutex::default(),
            ticks: AtomicU32::new(0),
            quick: AtomicU32::new(0),
            alternates: AtomicBool::new(false),
            ticket: Ticket::default(),
            outlives_reset: AtomicBool::new(false),
            is_reserve,
            is_absent: AtomicBool::new(false),
            queues: AtomicBool::new(false),
            has_left: AtomicBool::new(false),
        }
    }

    fn poll_options(&self) -> PollOptions {
        let alternates = self.alternates.load(Relaxed);
        self.alternates.store(!alternates, Relaxed);
        PollOptions {
            may_begin: !self.is_reserve && self.shared.may_wait(),
            waits: true,
            takes_queued: alternates,
            is_quick: self.quick.load(Relaxed) >= QUICK_BEFORE_BATCH,
        }
    }

    fn poll(self: &Arc<Self>, goes_on: impl Fn() -> bool) {
        let poller = &self.shared.poller;
        let mut ready = Vec::new();
        let mut now = system::now();
        while goes_on() && !poller.is_shut_down() {
            poller.sweep(now);
            let Some((taken, begun)) = self.next(self.poll_options(), &mut ready) else {
                now = system::now();
                continue;
            };
            self.serve(taken, begun);
            now = system::now();
            let quick = if now.saturating_duration_since(begun) < QUICK {
                self.quick.load(Relaxed).saturating_add(1)
            } else {
                0
            };
            self.quick.store(quick, Relaxed);
        }
    }

    /// Serves one more connection, if one is ready, after each call that was
    /// left. This thread is awake; where calls wait for the disk together, one
    /// of those that poll would have to wake another for that connection.
    fn serve_after_call(self: &Arc<Self>) {
        let poller = &self.shared.poller;
        let mut ready = Vec::new();
        while self.has_left.swap(false, Relaxed) && !poller.is_shut_down() {
            let options = PollOptions {
                waits: false,
                ..self.poll_options()
            };
            let Some((taken, begun)) = self.next(options, &mut ready) else {
                return;
            };
            self.serve(taken, begun);
        }
    }

    /// Answers that are due come first: nothing runs for them.
    fn next(
        &self,
        options: PollOptions,
        ready: &mut Vec<Ready>,
    ) -> Option<(Taken<Connection>, Instant)> {
        loop {
            let Some(late) = self.shared.due.pop() else {
                // What is due meanwhile comes after that: at once, or by the
                // replacement of a thread whose call takes long.
                return self.shared.poller.next(options, ready);
            };
            // What this thread serves next may take long.
            if !options.is_quick && !self.shared.due.is_empty() {
                self.shared.poller.wake();
            }
            if let Some(taken) = self.answer_late(late) {
                return Some((taken, system::now()));
            }
        }
    }

    /// Makes an answer that was deferred. Returns its connection, if it is
    /// parked.
    fn answer_late(&self, late: LateAnswer) -> Option<Taken<Connection>> {
        let LateAnswer {
            peer,
            call,
            version,
            finish,
        } = late;
        let answered = catch_unwind(AssertUnwindSafe(finish)).unwrap_or_else(|panic| {
            let body = call.input.message(call.message.body.clone());
            internal_error(body, &log_panic(&*panic)).answered
        });
        self.answer_left(&peer, call, version, answered)
    }

    /// Answers a call whose connection has gone on. Returns that connection, if
    /// it is parked.
    fn answer_left(
        &self,
        peer: &Arc<Peer>,
        call: Call,
        version: Option<Version>,
        answered: Answered,
    ) -> Option<Taken<Connection>> {
        let Answered {
            outcome,
            held: _held,
            used,
            served,
        } = answered;
        let Call {
            input,
            message,
            identity,
            ..
        } = call;
        let mut encoding = message.encoding;
        peer.used(used);
        let common = &self.shared.common;
        // Its connection may have ended, and has been charged then.
        peer.settle(&common.metrics.usages);
        let outcome = outcome_without_connection(outcome);
        let header = version.and_then(|version| {
            let (header, _) = Header::parse(input.message(message.body)).ok()?;
            Some(Header { version, ..header })
        });
        let header = header.as_ref();
        if let Outcome::Error(code, body) = &outcome {
            common.note_error(peer, &identity, header, *code, body);
        }
        if peer.close_request().is_some() {
            encoding.closes();
        }
        peer.answer_late(|late, traffic| {
            late.answer(&encoding, header, outcome, served, traffic);
        });
        self.shared.poller.take_with(peer.slot(), Events::ANSWER)
    }

    /// Whether the connection can go on without an answer that is not due yet,
    /// or has done so.
    fn may_leave(&self) -> bool {
        let held = self.held();
        held.connection
            .as_ref()
            .is_none_or(|connection| connection.may_leave_call())
    }

    /// Serves a connection, and those that it leads to, while there is
    /// something to do.
    fn serve(self: &Arc<Self>, taken: Taken<Connection>, now: Instant) {
        let (mut next, mut now) = (Some(taken), now);
        while let Some(taken) = next {
            let advance = AssertUnwindSafe(|| self.advance(taken, now));
            // A defect outside of a call ends this connection, not the thread.
            next = catch_unwind(advance).unwrap_or_else(|panic| {
                let error_id = log_panic(&*panic);
                let text = format!("defect of the server, error id {error_id}");
                let Work { connection, .. } = std::mem::take(&mut *self.held());
                // One that fails while it closes is not tried again.
                let mut connection = connection.filter(|connection| !connection.is_closing())?;
                connection.close_with(CloseReason::Notice(Code::InternalError, text));
                Some((connection, Events::default()))
            });
            now = system::now();
        }
    }

    /// Serves one connection. Returns the one to serve next, if any.
    fn advance(
        self: &Arc<Self>,
        (connection, events): Taken<Connection>,
        mut now: Instant,
    ) -> Option<Taken<Connection>> {
        let mut held = self.held();
        let mut connection = held.connection.insert(connection);
        connection.take_events(events, now);
        let mut ticks = 0;
        // Only a peer that has just asked is waited for: parking again reports
        // events that bring nothing.
        let mut has_asked = false;
        loop {
            let mut call = match connection.advance(now) {
                Advance::Call(call) => call,
                Advance::Wait if has_asked && self.waits_for_peer(connection) => {
                    has_asked = false;
                    continue;
                }
                Advance::Wait => {
                    let connection = held.connection.take();
                    drop(held);
                    if self.park(connection?) && !self.goes_on() {
                        self.shared.poller.wake();
                    }
                    return None;
                }
                Advance::Closed(channel) => {
                    let connection = held.connection.take();
                    drop(held);
                    self.shared.linger(channel);
                    drop(connection);
                    return None;
                }
            };
            if self.is_reserve
                && let Some(postponed) = self.postponed(&call)
            {
                if now < postponed.until {
                    connection.postpone(call.message, postponed);
                    continue;
                }
                // The handler answers that it is too late.
                call.message.postponed = Some(postponed);
            }
            has_asked = true;
            held.call = Some(CurrentCall {
                message: call.message.body.clone(),
                arrived: call.arrived,
            });
            self.ticks.store(0, Relaxed);
            self.outlives_reset.store(false, Relaxed);
            drop(held);
            // The reply borrows it, and the answer takes its message.
            let asks = call.message.encoding.asks().clone();
            let Reply {
                header,
                identity,
                mut answered,
            } = self.call(Request {
                body: call.input.message(call.message.body.clone()),
                binary: call.message.binary,
                any_version: call.message.any_version,
                asks: &asks,
                postponed: call.message.postponed,
                arrived: call.arrived,
                identity: &call.identity,
                watch: Arc::<Self>::clone(self),
            });
            if matches!(answered.outcome, Outcome::Deferred(_)) && !self.may_leave() {
                self.waits();
                answered = answered.settled();
            }
            self.call_finished();
            held = self.held();
            // A reader may hold it for a moment longer.
            let slow = held.slow.take();
            if slow.is_some() {
                now = system::now();
            }
            held.call = None;
            let version = header.as_ref().map(|header| header.version);
            match held.connection.as_mut() {
                Some(same) if let Outcome::Deferred(deferred) = answered.outcome => {
                    same.leave_call();
                    let peer = Arc::clone(same.peer());
                    self.defer(peer, call, version, deferred);
                    connection = same;
                    ticks += self.ticks.load(Relaxed);
                    if ticks >= TICKS_PER_QUANTUM {
                        connection.end_quantum();
                    }
                }
                Some(same) => {
                    let Answered {
                        outcome,
                        held: _held,
                        used,
                        served,
                    } = answered;
                    same.peer().used(used);
                    match outcome {
                        Outcome::Postponed(postponed) => same.postpone(call.message, postponed),
                        Outcome::Redirect(redirect) => {
                            drop(call.input);
                            same.redirect(call.message, *redirect);
                        }
                        outcome => {
                            let encoding = call.message.encoding;
                            same.answered(encoding, header.as_ref(), outcome, served);
                            // The buffer is the connection's alone again.
                            drop(call.input);
                        }
                    }
                    connection = held.connection.as_mut()?;
                    ticks += self.ticks.load(Relaxed);
                    if ticks >= TICKS_PER_QUANTUM {
                        connection.end_quantum();
                    }
                    if let Some(identity) = identity {
                        connection.authenticate_as(identity);
                    }
                }
                None => {
                    drop(held);
                    self.has_left.store(true, Relaxed);
                    let SlowCall { peer, listed } = slow?;
                    drop(listed);
                    if let Outcome::Deferred(deferred) = answered.outcome {
                        self.defer(peer, call, version, deferred);
                        return None;
                    }
                    return self.answer_left(&peer, call, version, answered);
                }
            }
        }
    }

    /// Has the answer of a call whose connection has gone on leave when it is
    /// due.
    fn defer(
        &self,
        peer: Arc<Peer>,
        call: Call,
        version: Option<Version>,
        deferred: Box<dyn Deferred>,
    ) {
        let shared = Arc::clone(&self.shared);
        deferred.then(Box::new(move |finish, more| {
            let late = LateAnswer {
                peer,
                call,
                version,
                finish,
            };
            shared.is_due(late, more);
        }));
    }

    /// Leaves a message that needs a call to other workers, until it would be
    /// too late.
    fn postponed(&self, call: &Call) -> Option<Postponed> {
        let Call {
            input,
            message,
            arrived,
            identity,
            ..
        } = call;
        let body = input.message(message.body.clone());
        let timeout = self.shared.common.settings.config.default_timeout.0;
        let until = dispatch::must_begin(body, identity, *arrived, timeout)?;
        let counted = Counted::Nowhere;
        Some(message.postponed.unwrap_or(Postponed { until, counted }))
    }

    /// Whether it looks for the next connection itself.
    fn goes_on(&self) -> bool {
        if self.is_reserve {
            self.shared.poller.all_are_absent()
        } else {
            self.polls.load(Relaxed)
        }
    }

    /// Releases what the finished call held of what workers share.
    fn call_finished(&self) {
        self.begins();
        if self.is_absent.load(Relaxed) {
            self.is_absent.store(false, Relaxed);
            self.shared.poller.is_back();
        }
    }

    /// Whether the connection's next read waits for its peer, in this thread,
    /// while another one polls. Half of the threads are left to calls.
    fn waits_for_peer(&self, connection: &mut Connection) -> bool {
        let waits = self.shared.common.settings.config.waiting == Waiting::Threads
            && !self.is_reserve
            && connection.is_idle()
            && self.shared.threads.threads() < self.shared.most_waiting()
            && self.compensate();
        let is_first = !connection.channel().is_some_and(Channel::may_wait);
        let waits = waits && connection.wait_in_next_read(STAY);
        if waits && is_first {
            self.shared.poller.pause(connection);
        }
        waits
    }

    /// Parks a connection, whose events are reported again.
    fn park(&self, mut connection: Box<Connection>) -> bool {
        if connection.stop_waiting() {
            self.shared.poller.resume(&connection);
        }
        self.shared.poller.park(connection)
    }

    /// Starts a replacement that polls, unless there is one. Returns whether
    /// there is.
    fn compensate(&self) -> bool {
        if self.polls.load(Relaxed) && Self::start(&self.shared) {
            self.polls.store(false, Relaxed);
        }
        !self.polls.load(Relaxed)
    }

    fn call<'a>(&self, request: Request<'a>) -> Reply<'a> {
        let body = request.body;
        catch_unwind(AssertUnwindSafe(|| self.shared.handle.handle(request)))
            .unwrap_or_else(|panic| internal_error(body, &log_panic(&*panic)))
    }

    fn held(&self) -> MutexGuard<'_, Work> {
        lock(&self.held)
    }

    /// Treats the current call as long: it runs longer than two ticks, or is
    /// about to wait. Neither the answers before it nor later requests nor
    /// other connections wait for it, and it is listed. Returns why it must be
    /// stopped, if it must.
    fn is_slow(&self, waits: bool) -> Option<Stop> {
        let mut held = self.held();
        let Work {
            connection,
            call,
            slow,
        } = &mut *held;
        if slow.is_none()
            && let (Some(connection), Some(call)) = (connection.as_ref(), call.as_ref())
        {
            *slow = Some(SlowCall {
                peer: Arc::clone(connection.peer()),
                listed: self.list(connection, call),
            });
        }
        let left = connection.take_if(|connection| connection.leave_call());
        let stop = slow.as_ref().and_then(|slow| {
            slow.listed.call.waits(waits);
            slow.listed.call.stop()
        });
        drop(held);
        let wake = left.is_some_and(|connection| self.park(connection));
        let polled = self.polls.load(Relaxed);
        let is_compensated = self.compensate();
        let was_absent = self.is_absent.load(Relaxed);
        if is_compensated == was_absent {
            self.is_absent.store(!is_compensated, Relaxed);
            if is_compensated {
                self.shared.poller.is_back();
            } else {
                self.shared.poller.is_absent();
            }
        }
        let is_replaced = is_compensated && polled;
        let has_become_absent = !is_compensated && !was_absent;
        // A replacement that has just started looks at everything by itself.
        if !is_replaced && (wake || has_become_absent) {
            self.shared.poller.wake();
        }
        stop.filter(|stop| *stop != Stop::Reset || !self.outlives_reset.load(Relaxed))
    }

    fn list(&self, connection: &Connection, call: &CurrentCall) -> Listed {
        let input: &Input = connection.input();
        let header = Header::parse(input.message(call.message.clone()));
        let header = header.ok().map(|(header, _)| header);
        self.shared.common.running.list(
            connection.peer().number(),
            header.as_ref(),
            connection.identity().caller.principal.clone(),
            call.arrived,
            self.shared.common.settings.config.default_timeout.0,
        )
    }
}

impl Watch for Worker {
    fn tick(&self) -> Option<Stop> {
        let ticks = self.ticks.load(Relaxed) + 1;
        self.ticks.store(ticks, Relaxed);
        let stop = (ticks >= TICKS_UNTIL_SLOW).then(|| self.is_slow(false));
        if let Some(stop) = stop.flatten() {
            return Some(stop);
        }
        self.shared
            .common
            .drain
            .calls_stopped()
            .then_some(Stop::Shutdown)
    }

    fn waits(&self) {
        self.is_slow(true);
    }

    fn queues(&self) -> bool {
        if !self.queues.load(Relaxed) {
            let most = self.shared.most_waiting();
            let one_more = |waiting: usize| (waiting < most).then_some(waiting + 1);
            let waiting = &self.shared.waiting;
            let is_below_limit = waiting.fetch_update(SeqCst, SeqCst, one_more).is_ok();
            // A call whose connection has gone on without it can't be
            // postponed.
            if !is_below_limit && self.held().connection.is_some() {
                return false;
            }
            if !is_below_limit {
                waiting.fetch_add(1, SeqCst);
            }
            self.queues.store(true, Relaxed);
        }
        self.waits();
        true
    }

    fn begins(&self) {
        if self.queues.load(Relaxed) {
            self.queues.store(false, Relaxed);
            self.shared.waiting.fetch_sub(1, SeqCst);
            self.shared.poller.retry_postponed();
        }
    }

    fn outlives_reset(&self) {
        self.outlives_reset.store(true, Relaxed);
    }

    fn ticket(&self) -> Option<&Ticket> {
        Some(&self.ticket)
    }

    fn costs(&self, cost: Cost) {
        if let Some(slow) = &self.held().slow {
            slow.listed.call.costs(cost);
        }
    }
}

/// A message whose connection has gone on can't be handled again: it gets an
/// answer.
fn outcome_without_connection(outcome: Outcome) -> Outcome {
    let (Outcome::Postponed(_) | Outcome::Redirect(_) | Outcome::Deferred(_)) = outcome else {
        return outcome;
    };
    let code = Code::ServiceUnavailable;
    let body = ErrorBody::server(code, "the call could not begin at once; nothing ran")
        .with_details(&serde_json::json!({"retryAfterMs": RETRY_WHEN_BUSY_MS}));
    Outcome::Error(Some(code), body)
}

/// Logs a panic under an id, and returns the id for the peer.
fn log_panic(panic: &(dyn Any + Send)) -> String {
    let error_id = uuid::Uuid::new_v4().to_string();
    static LINES: Limiter = Limiter::new();
    if LINES.allows("defect of the server") {
        tracing::error!(
            error_id,
            "defect of the server, please report it: {}",
            panic_text(panic)
        );
    }
    error_id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_could_not_begin_is_answered_without_its_connection() {
        let (until, counted) = (Instant::now(), Counted::Nowhere);
        let postponed = Outcome::Postponed(Postponed { until, counted });
        let outcome = outcome_without_connection(postponed);
        assert!(matches!(
            outcome,
            Outcome::Error(Some(Code::ServiceUnavailable), _)
        ));
        let outcome = outcome_without_connection(Outcome::Silence);
        assert!(matches!(outcome, Outcome::Silence));
    }
}
