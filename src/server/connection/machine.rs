//! What a connection does next, without doing it: bytes come in, messages go to
//! a handler, bytes go out, and each step is given the time. No I/O, no clock,
//! no lock but that of late answers.

use std::{
    io,
    ops::Range,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use super::{
    buffer::Buffer,
    close_reason::{CloseReason, RETRY_WHEN_BUSY_MS, notice},
};
use crate::{
    budget::Reservation,
    dispatch::{Counted, Outcome, Postponed, Redirect},
    http::{self, Asks, Exchange, Head, Refusal, Response},
    server::{
        outbox::Outbox,
        peer::{Activity, Peer},
        settings::ServerSettings,
    },
    system::{LINGER, Received},
    wire::{
        Code, ErrorBody, FrameError, Header, Kind, Reassembly, Taken, Version,
        frame::KEEPALIVE_FRAME,
    },
};

/// Largest message of a peer that must authenticate and has not, in bytes.
const MAX_UNAUTHENTICATED_MESSAGE: usize = 16 * 1024;

/// Reads of one connection before others are served: requests that came
/// together are answered together, so their client sends the next ones
/// together.
const MAX_READS: usize = 5;

/// Messages, and bytes that are written, in one quantum.
const MAX_MESSAGES: usize = 1000;
const MAX_WRITTEN: usize = 1024 * 1024;

/// Quanta after a deadline until it expires although there is something to
/// read: after a pause of the whole process, what came in time lies in the
/// buffers of the system.
const QUANTA_WHEN_LATE: u8 = 8;

/// How long a connection that waits keeps the memory of a large message for
/// the next one of the kind.
const KEPT_LARGE_FOR: Duration = Duration::from_secs(1);

/// How often a connection that waits for memory tries again.
const RETRY_MEMORY: Duration = Duration::from_millis(20);

/// What the owner of a connection does, and with [`Machine::deadline`] until
/// when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Waits for the header of a load balancer.
    ProxyHeader,
    /// Waits for the TLS handshake.
    Handshake,
    /// Waits for a message, or serves one.
    Idle,
    /// Waits for the rest of a message.
    Message {
        /// When it began to.
        since: Instant,
    },
    /// Waits for the memory that the rest of a message needs.
    Memory {
        /// When it began to.
        since: Instant,
    },
    /// Waits for the peer to take what was sent before. Nothing is read.
    Writing {
        /// When it began to.
        since: Instant,
    },
    /// Has a message whose call can't begin yet. Nothing is read.
    Postponed,
    /// Waits for calls in flight, to close after them. Nothing is read.
    Ending,
}

impl From<State> for Activity {
    fn from(state: State) -> Self {
        match state {
            State::ProxyHeader | State::Handshake => Self::Handshake,
            State::Idle => Self::Idle,
            State::Message { .. } | State::Memory { .. } => Self::Reading,
            // Its answers are part of a call.
            State::Writing { .. } | State::Postponed => Self::Calling,
            State::Ending => Self::Closing,
        }
    }
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Read the header of a load balancer.
    ProxyHeader,
    /// Go on with the TLS handshake.
    Handshake,
    /// Read into [`Machine::room`], and say what came.
    Read,
    /// Write what is in the outbox, and say how far that went.
    Write,
    /// Look whether the peer may stay, and answer its keep-alive.
    KeepAlive,
    /// Have a message answered.
    Message(Message),
    /// Decide what to do with a request of HTTP whose head has arrived.
    Head(Box<Head>),
    /// Nothing, until the next event or the deadline.
    Wait,
    /// Close; all that was to be sent has left.
    Close,
}

/// Where a whole message lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) body: Range<usize>,
    pub(crate) binary: bool,
    /// Any version may serve it.
    pub(crate) any_version: bool,
    /// What is known of its call, where that could not begin before.
    pub(crate) postponed: Option<Postponed>,
}

/// What is too late at a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    /// PROXY header or TLS handshake.
    Handshake,
    /// Authentication of the peer.
    Hello,
    /// Anything from the peer.
    Silence,
    /// The rest of a message.
    Message,
    /// Memory for it.
    Memory,
    /// The peer taking answers.
    Writing,
    /// The beginning of a postponed call. Its handler answers that.
    Postponed,
    /// Nothing; it is time to try for memory again.
    Retry,
    /// Nothing; it is time to release the memory of a large message.
    Shrink,
}

/// Bytes that were read, and the memory that they take beyond the first size.
/// A call that reads its message here shares it.
#[derive(Debug)]
pub(crate) struct Input {
    buffer: Buffer,
    reservation: Reservation,
    /// Memory of the first size, once a call keeps it and the connection has
    /// another one.
    left: OnceLock<Reservation>,
}

impl Input {
    fn new(buffer: Buffer, reservation: Reservation) -> Self {
        Self {
            buffer,
            reservation,
            left: OnceLock::new(),
        }
    }

    /// A message that was taken.
    pub(crate) fn message(&self, body: Range<usize>) -> &[u8] {
        self.buffer.message(body)
    }
}

/// What was done since others were served.
#[derive(Default)]
struct Quantum {
    reads: usize,
    messages: usize,
    written: usize,
    /// Its calls took so long that others are served next.
    was_long: bool,
}

/// What is decided of a request of HTTP.
#[derive(Default)]
struct HttpState {
    /// Frames and HTTP are both spoken, and nothing has arrived.
    is_undecided: bool,
    /// Its request that is not answered, unless its call was left.
    exchange: Option<Exchange>,
    any_version: bool,
    /// No further request is read: the call of one was left.
    is_busy: bool,
    /// The connection closes once the present request is answered.
    closes: bool,
}

/// See the module.
pub(crate) struct Machine {
    settings: Arc<ServerSettings>,
    state: State,
    input: Arc<Input>,
    pub(crate) outbox: Outbox,
    /// What HTTP has of its request.
    http: HttpState,
    /// Why it closes: the first reason.
    closing: Option<CloseReason>,
    /// The ERROR that closes is in the outbox.
    closing_said: bool,
    /// There may be something to read.
    pub(crate) readable: bool,
    /// The socket may take bytes again.
    pub(crate) writable: bool,
    /// The peer has ended the stream behind what there is to read.
    pub(crate) peer_ended: bool,
    /// Whole messages may lie in the buffer unread.
    unread: bool,
    quantum: Quantum,
    /// Quanta until a deadline that has passed expires, or until nothing is
    /// left to read. 0 if none has passed.
    late_for: u8,
    /// The message whose call can't begin yet, and whether to try again.
    postponed: Option<Message>,
    retries: bool,
    /// Answers in the outbox, of which `max_in_flight` leave together.
    batch: usize,
    /// The outbox is written before anything else.
    leaves: bool,
    /// Part of a TLS record has come.
    record_begun: bool,
    /// When the last byte arrived.
    arrived: Instant,
    /// When the last byte arrived, or the last answer left: silence counts
    /// from here.
    active: Instant,
    /// Deadline for a peer that must authenticate.
    hello_until: Option<Instant>,
}

impl Machine {
    /// Creates the machine of a new connection, in one of the first three
    /// states.
    pub(crate) fn new(settings: &Arc<ServerSettings>, state: State, now: Instant) -> Self {
        let reassembly = Reassembly::new(settings.config.max_message_size.0, settings.buffers.read);
        let input = Input::new(
            Buffer::Frames(reassembly),
            Reservation::empty(&settings.memory),
        );
        Self {
            settings: Arc::clone(settings),
            state,
            input: Arc::new(input),
            outbox: Outbox::new(&settings.memory),
            http: HttpState::default(),
            closing: None,
            closing_said: false,
            readable: false,
            writable: false,
            peer_ended: false,
            unread: false,
            quantum: Quantum::default(),
            late_for: 0,
            postponed: None,
            retries: false,
            batch: 0,
            leaves: false,
            record_begun: false,
            arrived: now,
            active: now,
            hello_until: Some(now + settings.config.handshake_timeout.0),
        }
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    pub(crate) fn close_reason(&self) -> Option<&CloseReason> {
        self.closing.as_ref()
    }

    /// When the last byte arrived.
    pub(crate) fn arrived(&self) -> Instant {
        self.arrived
    }

    /// Its input, for a call that reads a message there.
    pub(crate) fn input(&self) -> &Arc<Input> {
        &self.input
    }

    /// Its input, which no call shares any more.
    fn own_input(&mut self) -> &mut Input {
        Arc::get_mut(&mut self.input).expect("no call reads a message of it any more")
    }

    /// The header has been read, or the handshake is done.
    pub(crate) fn proceed(&mut self, state: State) {
        self.state = state;
    }

    /// Begins the protocol.
    pub(crate) fn open(&mut self, must_authenticate: bool, (frames, http): (bool, bool)) {
        self.state = State::Idle;
        self.http.is_undecided = frames && http;
        if !frames {
            self.speak_http();
        }
        if must_authenticate {
            let most = MAX_UNAUTHENTICATED_MESSAGE.min(self.settings.config.max_message_size.0);
            self.own_input().buffer.set_max_message_size(most);
        } else {
            self.hello_until = None;
        }
    }

    /// Notes that the peer has authenticated.
    pub(crate) fn authenticated(&mut self) {
        self.hello_until = None;
        let most = self.settings.config.max_message_size.0;
        self.own_input().buffer.set_max_message_size(most);
    }

    /// Closes it after what was begun. The first reason counts.
    pub(crate) fn close_with(&mut self, end: CloseReason) {
        if self.closing.is_some() && !end.is_silent() {
            return;
        }
        if end.is_silent() {
            self.outbox.clear();
            self.closing_said = true;
            self.leaves = false;
        }
        let is_silent = end.is_silent();
        match &mut self.closing {
            None => self.closing = Some(end),
            // It could not be sent why: that is the reason now.
            Some(before) if is_silent => *before = end,
            Some(_) => {}
        }
        if is_silent || !matches!(self.state, State::Writing { .. }) {
            self.state = State::Ending;
        }
    }

    /// What is to be done next.
    #[inline]
    pub(crate) fn next(&mut self, peer: &Peer, now: Instant) -> Step {
        if self.closing.is_some() {
            return self.finish(peer, now);
        }
        match self.state {
            // Nothing can be sent before the protocol begins.
            State::ProxyHeader | State::Handshake
                if let Some(close_request) = peer.close_request() =>
            {
                self.closing_said = true;
                self.close_with(CloseReason::Requested(close_request));
                return self.finish(peer, now);
            }
            State::ProxyHeader | State::Handshake if !self.readable && !self.writable => {
                return self.wait(peer, now);
            }
            State::ProxyHeader => return Step::ProxyHeader,
            State::Handshake => return Step::Handshake,
            State::Writing { .. } if self.may_write() => return Step::Write,
            // What was begun is answered; then the peer gets the ERROR.
            State::Writing { .. } | State::Postponed
                if let Some(close_request) = peer.close_request() =>
            {
                self.close_with(CloseReason::Requested(close_request));
                return self.finish(peer, now);
            }
            State::Writing { .. } => return self.wait(peer, now),
            State::Postponed if self.retries || self.postponed.is_none() => {
                self.retries = false;
                self.state = State::Idle;
                if let Some(message) = self.postponed.take() {
                    return Step::Message(message);
                }
            }
            State::Postponed if !self.outbox.is_empty() => return Step::Write,
            State::Postponed => return self.wait(peer, now),
            State::Idle | State::Message { .. } | State::Memory { .. } | State::Ending => {}
        }
        if self.leaves {
            return Step::Write;
        }
        let is_spent = self.quantum.was_long || self.quantum.messages >= MAX_MESSAGES;
        if is_spent && !matches!(self.state, State::Memory { .. }) {
            self.unread = true;
            if !self.outbox.is_empty() {
                return Step::Write;
            }
            return self.wait(peer, now);
        }
        self.unread = false;
        if self.http.is_undecided {
            self.decide(peer);
        }
        let taken = match &mut self.own_input().buffer {
            Buffer::Frames(reassembly) => reassembly.take(),
            Buffer::Http(_) => {
                if let Some(step) = self.next_http(peer, now) {
                    return step;
                }
                Ok(None)
            }
        };
        match taken {
            Ok(Some(taken)) => {
                // The next message's time begins when it is waited for. A
                // keep-alive between two pieces gives no more time.
                return match taken {
                    Taken::KeepAlive => {
                        self.quantum.messages += 1;
                        Step::KeepAlive
                    }
                    Taken::Message { body, binary } => {
                        self.state = State::Idle;
                        self.quantum.messages += 1;
                        Step::Message(Message {
                            body,
                            binary,
                            any_version: false,
                            postponed: None,
                        })
                    }
                };
            }
            Ok(None) => {}
            Err(error) => {
                let code = match error {
                    FrameError::TooLarge { .. } => Code::MessageTooLarge,
                    FrameError::ReservedFlags { .. }
                    | FrameError::KeepAliveFlags { .. }
                    | FrameError::KeepAliveLength { .. }
                    | FrameError::MixedPayload => Code::InvalidFrame,
                };
                self.close_with(CloseReason::Notice(code, error.to_string()));
                return self.finish(peer, now);
            }
        }
        if self.readable
            && self.may_read()
            && self.quantum.reads < MAX_READS
            && self.has_memory(now)
        {
            self.quantum.reads += 1;
            return Step::Read;
        }
        if !self.outbox.is_empty() {
            return Step::Write;
        }
        if let Some(close_request) = peer.close_request() {
            self.answer_unread(peer);
            self.close_with(CloseReason::Requested(close_request));
            return self.finish(peer, now);
        }
        self.settle(now);
        self.wait(peer, now)
    }

    /// The first byte decides what the peer speaks: a frame's is a length.
    fn decide(&mut self, peer: &Peer) {
        let Buffer::Frames(reassembly) = &self.input.buffer else {
            return;
        };
        let Some(first) = reassembly.unparsed().first() else {
            return;
        };
        let is_http = first.is_ascii_uppercase();
        self.http.is_undecided = false;
        peer.speaks(if is_http { "http" } else { "frames" });
        if is_http {
            self.speak_http();
        }
    }

    fn speak_http(&mut self) {
        let must_authenticate = self.hello_until.is_some();
        let (most, read) = (
            self.settings.config.max_message_size.0,
            self.settings.buffers.read,
        );
        let most = if must_authenticate {
            MAX_UNAUTHENTICATED_MESSAGE.min(most)
        } else {
            most
        };
        let input = self.own_input();
        if let Buffer::Frames(reassembly) = &input.buffer {
            let incoming = http::Incoming::new(reassembly.unparsed(), most, read);
            input.buffer = Buffer::Http(incoming);
        }
    }

    /// The next request of HTTP, once the one before is answered.
    fn next_http(&mut self, peer: &Peer, now: Instant) -> Option<Step> {
        if self.http.is_busy {
            return None;
        }
        if self.http.closes && self.http.exchange.is_none() {
            self.close_with(CloseReason::Answered);
            return Some(self.finish(peer, now));
        }
        let any_version = self.http.any_version;
        let Buffer::Http(incoming) = &mut self.own_input().buffer else {
            return None;
        };
        match incoming.take() {
            Ok(None) => None,
            Ok(Some(http::Taken::Head(head))) => Some(Step::Head(head)),
            Ok(Some(http::Taken::Message { body, binary })) => {
                self.state = State::Idle;
                self.quantum.messages += 1;
                Some(Step::Message(Message {
                    body,
                    binary,
                    any_version,
                    postponed: None,
                }))
            }
            Err(refusal) => {
                let exchange = self.http.exchange.take().unwrap_or_default();
                self.refuse(&refusal, exchange, true, peer);
                Some(self.next(peer, now))
            }
        }
    }

    /// Reads the body of a request whose head was taken.
    pub(crate) fn admit(&mut self, head: &Head, exchange: Exchange, peer: &Peer) {
        let Buffer::Http(incoming) = &mut self.own_input().buffer else {
            return;
        };
        if let Err(refusal) = incoming.admit(head, &exchange.request_id) {
            return self.refuse(&refusal, exchange, true, peer);
        }
        self.http.any_version =
            matches!(head.asked, Ok(http::Route::Message { version: None, .. }));
        self.http.closes = exchange.closes;
        let waits = head.expects_continue && !self.input.buffer.has_more();
        self.http.exchange = Some(exchange);
        if waits && head.framing != http::Framing::Length(0) {
            self.outbox
                .push_response(&Response::Continue, &Exchange::default());
            self.leaves = true;
        }
    }

    /// Answers a request without its body; `closes` where that is not read.
    pub(crate) fn refuse(
        &mut self,
        refusal: &Refusal,
        exchange: Exchange,
        closes: bool,
        peer: &Peer,
    ) {
        peer.traffic().errors.add(1);
        self.respond(&Response::Refusal(refusal), exchange, closes, peer);
    }

    /// The same with any response.
    pub(crate) fn respond(
        &mut self,
        response: &Response<'_>,
        mut exchange: Exchange,
        closes: bool,
        peer: &Peer,
    ) {
        exchange.closes |= closes;
        self.http.closes = exchange.closes;
        self.outbox.push_response(response, &exchange);
        peer.traffic().messages_in.add(1);
        peer.traffic().messages_out.add(1);
        self.quantum.messages += 1;
        self.state = State::Idle;
        if closes {
            return self.close_with(CloseReason::Answered);
        }
        if let Buffer::Http(incoming) = &mut self.own_input().buffer {
            incoming.skip();
        }
        self.batch += 1;
        self.batched();
    }

    /// Whether what arrives may be read: behind a call of HTTP that was left
    /// only as much as shows that the peer is gone.
    fn may_read(&self) -> bool {
        !self.http.is_busy || self.input.buffer.has_room()
    }

    /// The exchange of the message that was taken last.
    pub(crate) fn exchange(&self) -> Option<&Exchange> {
        self.http.exchange.as_ref()
    }

    /// Waits, unless it is too late for what it waits for.
    #[inline]
    fn wait(&mut self, peer: &Peer, now: Instant) -> Step {
        if self.late_for == 0 {
            return Step::Wait;
        }
        self.late_for -= 1;
        if self.goes_on() && self.late_for > 0 {
            return Step::Wait;
        }
        self.late_for = 0;
        let mut was_late = false;
        while let Some((until, late)) = self.deadline(peer.calls_left())
            && until <= now
        {
            self.expires(late, peer, now);
            was_late = true;
        }
        if was_late {
            self.next(peer, now)
        } else {
            Step::Wait
        }
    }

    fn may_write(&self) -> bool {
        self.writable && self.quantum.written < MAX_WRITTEN
    }

    /// What is to be done before it closes: all answers, then the closing
    /// ERROR.
    fn finish(&mut self, peer: &Peer, now: Instant) -> Step {
        let left = peer.calls_left();
        if self.closing.as_ref().is_some_and(CloseReason::is_silent) {
            self.outbox.clear();
        } else {
            peer.collect_late(&mut self.outbox);
            if left == 0 && !self.closing_said {
                self.closing_said = true;
                self.say_closing(peer);
            }
            match self.state {
                State::Writing { .. } if self.may_write() => return Step::Write,
                State::Writing { .. } if self.closing_said && peer.is_cut_off() => {
                    self.outbox.clear();
                }
                State::Writing { .. } => return self.wait(peer, now),
                _ if !self.outbox.is_empty() => return Step::Write,
                _ => {}
            }
        }
        self.state = State::Ending;
        if left > 0 { Step::Wait } else { Step::Close }
    }

    fn say_closing(&mut self, peer: &Peer) {
        let closing = self.closing.as_ref().and_then(CloseReason::closing);
        if let (Some(closing), Buffer::Http(incoming)) = (&closing, &self.input.buffer) {
            let was_asked = self.http.exchange.is_some() || incoming.is_midway();
            if was_asked {
                let refusal = Refusal::new(closing.code, closing.message.to_owned());
                let exchange = Exchange {
                    closes: true,
                    ..self.http.exchange.take().unwrap_or_default()
                };
                self.outbox
                    .push_response(&Response::Refusal(&refusal), &exchange);
                peer.traffic().messages_out.add(1);
                peer.traffic().errors.add(1);
            }
            return;
        }
        if let Some(closing) = closing {
            let frame = notice(closing.code, closing.message, closing.retry_after_ms);
            self.outbox.push_frame(&frame);
            peer.traffic().messages_out.add(1);
            peer.traffic().errors.add(1);
        }
    }

    /// Whether this read is not the first of the quantum.
    #[inline]
    pub(crate) fn has_read_before(&self) -> bool {
        self.quantum.reads > 1
    }

    /// Returns the buffer for the next read.
    #[inline]
    pub(crate) fn read_buffer(&mut self) -> &mut [u8] {
        self.own_input().buffer.spare()
    }

    /// Takes the result of a read.
    #[inline]
    pub(crate) fn received(
        &mut self,
        received: io::Result<Received>,
        record_begun: bool,
        peer: &Peer,
        now: Instant,
    ) {
        self.record_begun = record_begun;
        match received {
            Ok(Received::Bytes { count, more }) => {
                self.readable = more || self.peer_ended;
                self.own_input().buffer.advance(count);
                (self.arrived, self.active) = (now, now);
                peer.bytes_arrived(count, now);
            }
            // The event was for a connection that had this slot before, or the
            // bytes are not here yet.
            Ok(Received::Nothing) => (self.readable, self.peer_ended) = (false, false),
            Ok(Received::End) => {
                let midway = self.input.buffer.is_midway();
                self.close_with(if midway {
                    CloseReason::Truncated
                } else {
                    CloseReason::Peer
                });
            }
            Err(error) => self.close_with(CloseReason::Io(error)),
        }
    }

    /// Whether there is memory for the next read. While there is none nothing
    /// is read, so no deadline for the message runs.
    fn has_memory(&mut self, now: Instant) -> bool {
        let first = self.settings.buffers.read;
        let input = self.own_input();
        let wanted = input.buffer.next_capacity().saturating_sub(first);
        if wanted <= input.reservation.held() {
            if wanted < input.reservation.held() {
                input.reservation.set(wanted);
            }
        } else if !input.reservation.try_raise(wanted) {
            if !matches!(self.state, State::Memory { .. }) {
                self.state = State::Memory { since: now };
            }
            return false;
        }
        if matches!(self.state, State::Memory { .. }) {
            self.state = State::Message { since: now };
        }
        true
    }

    /// Answers a keep-alive.
    pub(crate) fn keep_alive(&mut self, peer: &Peer) {
        peer.traffic().keep_alives.add(1);
        self.outbox.push_frame(&KEEPALIVE_FRAME);
        self.batched();
    }

    /// Takes the answer to a message.
    #[inline]
    pub(crate) fn answered(
        &mut self,
        header: Option<&Header<'_>>,
        outcome: Outcome,
        served: Option<Version>,
        peer: &Peer,
    ) {
        match self.http.exchange.take() {
            None => self.outbox.answer(header, outcome, peer.traffic()),
            Some(mut exchange) => {
                exchange.closes |= peer.close_request().is_some();
                self.outbox
                    .respond_http(&exchange, served, outcome, peer.traffic());
            }
        }
        self.batch += 1;
        self.batched();
    }

    fn batched(&mut self) {
        let settings = &self.settings;
        self.leaves |= self.batch >= settings.config.max_in_flight
            || self.outbox.len() >= settings.buffers.write;
    }

    /// Begins a quantum.
    #[inline]
    pub(crate) fn begin_quantum(&mut self) {
        self.quantum = Quantum::default();
    }

    /// Ends the quantum, because its calls have taken so long that others are
    /// next.
    pub(crate) fn end_quantum(&mut self) {
        self.quantum.was_long = true;
    }

    /// Notes that a deadline has passed. What arrived in time may have yet to
    /// be read.
    pub(crate) fn is_late(&mut self) {
        if self.late_for == 0 {
            self.late_for = QUANTA_WHEN_LATE;
        }
        (self.readable, self.writable) = (true, true);
    }

    /// Postpones a message whose call can't begin yet.
    pub(crate) fn postpone(&mut self, message: Message, postponed: Postponed) {
        self.state = State::Postponed;
        self.postponed = Some(Message {
            postponed: Some(postponed),
            ..message
        });
    }

    /// Has a message handled again, as the call that it asks for.
    pub(crate) fn redirect(&mut self, message: Message, redirect: Redirect) {
        let Redirect {
            line,
            payload,
            until,
            reply,
        } = redirect;
        let Buffer::Http(incoming) = &mut self.own_input().buffer else {
            return;
        };
        let payload = message.body.start + payload.start..message.body.start + payload.end;
        let body = incoming.relabel(payload, line.as_bytes());
        if let Some(exchange) = &mut self.http.exchange {
            exchange.asks = Asks::Tool(reply);
        }
        let message = Message {
            body,
            any_version: true,
            ..message
        };
        let counted = Counted::Nowhere;
        self.postpone(message, Postponed { until, counted });
        self.retry();
    }

    /// Tries the postponed message again at the next step.
    pub(crate) fn retry(&mut self) {
        self.retries = self.postponed.is_some();
    }

    /// Collects late answers; silence counts from there.
    pub(crate) fn collect_late(&mut self, peer: &Peer, now: Instant) {
        peer.collect_late(&mut self.outbox);
        self.active = now;
        if self.http.is_busy && peer.calls_left() == 0 {
            self.http.is_busy = false;
            self.unread = true;
        }
    }

    /// Notes that the outbox is empty.
    #[inline]
    pub(crate) fn written(&mut self, now: Instant) {
        (self.batch, self.leaves) = (0, false);
        self.active = now;
        if self.postponed.is_some() {
            self.state = State::Postponed;
        } else if matches!(self.state, State::Writing { .. }) {
            self.state = State::Idle;
        }
    }

    /// Takes note of written bytes. Returns whether this quantum may write
    /// more.
    #[inline]
    pub(crate) fn wrote(&mut self, count: usize) -> bool {
        self.outbox.advance(count);
        self.quantum.written += count;
        self.quantum.written < MAX_WRITTEN
    }

    /// Waits to write: the peer's system takes no more, or others are served
    /// next.
    pub(crate) fn blocked(&mut self, now: Instant) {
        self.writable = self.quantum.written >= MAX_WRITTEN;
        if !matches!(self.state, State::Writing { .. }) {
            self.state = State::Writing { since: now };
        }
    }

    /// Leaves the buffer to the current call, and copies what lies behind its
    /// message to a new one.
    pub(crate) fn split_input(&mut self) {
        let buffer = self.input.buffer.split();
        let mut reservation = Reservation::empty(&self.settings.memory);
        let first = self.settings.buffers.read;
        reservation.set(buffer.capacity().saturating_sub(first));
        self.unread = buffer.is_midway();
        self.http.is_busy = matches!(buffer, Buffer::Http(_));
        // Its answer comes with what it needs of the exchange.
        self.http.exchange = None;
        // Each connection has one buffer of the first size; this is a second.
        let mut left = Reservation::empty(&self.settings.memory);
        left.set(self.input.buffer.capacity().min(first));
        let _ = self.input.left.set(left);
        self.input = Arc::new(Input::new(buffer, reservation));
    }

    /// Whether there is something to do without an event, after others were
    /// served.
    pub(crate) fn goes_on(&self) -> bool {
        match self.state {
            State::Idle | State::Message { .. } => {
                self.closing.is_none()
                    && (self.readable && self.may_read() || self.unread && !self.http.is_busy)
            }
            State::Writing { .. } => self.writable,
            State::Postponed => self.retries,
            _ => false,
        }
    }

    /// Chooses the state to wait in: for the rest of a message, or for a new
    /// one.
    fn settle(&mut self, now: Instant) {
        // What waits behind a call is not what it waits for.
        let midway = !self.http.is_busy && self.input.buffer.is_midway() || self.record_begun;
        match self.state {
            State::Memory { .. } => return,
            State::Message { .. } if midway => {}
            _ if midway => self.state = State::Message { since: now },
            _ => self.state = State::Idle,
        }
        if !self.input.buffer.is_kept_large() {
            self.shrink();
        }
    }

    /// Releases what a large message needed.
    fn shrink(&mut self) {
        let first = self.settings.buffers.read;
        let Input {
            buffer,
            reservation,
            ..
        } = self.own_input();
        let capacity = buffer.next_capacity();
        if capacity < buffer.capacity() {
            buffer.spare();
        }
        let wanted = capacity.saturating_sub(first);
        if wanted < reservation.held() {
            reservation.set(wanted);
        }
    }

    /// Returns the deadline of what it waits for, and what is late then; none
    /// without a deadline.
    pub(crate) fn deadline(&self, calls_left: u32) -> Option<(Instant, Late)> {
        let settings = &self.settings;
        let own = match self.state {
            State::ProxyHeader | State::Handshake => {
                return self.hello_until.map(|until| (until, Late::Handshake));
            }
            State::Writing { since } => {
                let mut until = since + settings.config.write_timeout.0;
                // A peer that must authenticate gets no longer than for that,
                // or than to read the closing ERROR.
                if let Some(hello) = self.hello_until {
                    until = until.min(hello.max(since + LINGER));
                }
                return Some((until, Late::Writing));
            }
            State::Ending => return None,
            State::Postponed if self.retries => return None,
            State::Postponed => {
                let postponed = self
                    .postponed
                    .as_ref()
                    .and_then(|message| message.postponed);
                return postponed.map(|postponed| (postponed.until, Late::Postponed));
            }
            State::Memory { since } => {
                let until = since + settings.config.read_timeout.0;
                let next = self.active.max(since) + RETRY_MEMORY;
                Some(if next < until {
                    (next, Late::Retry)
                } else {
                    (until, Late::Memory)
                })
            }
            State::Message { since } => {
                Some((since + settings.config.read_timeout.0, Late::Message))
            }
            State::Idle if self.input.buffer.is_kept_large() => {
                Some((self.active + KEPT_LARGE_FOR, Late::Shrink))
            }
            State::Idle if calls_left > 0 => None,
            State::Idle => Some((self.active + settings.config.idle_timeout.0, Late::Silence)),
        };
        let hello = self.hello_until.map(|until| (until, Late::Hello));
        own.into_iter().chain(hello).min_by_key(|(until, _)| *until)
    }

    /// Acts on a deadline that has passed.
    fn expires(&mut self, late: Late, peer: &Peer, now: Instant) {
        let settings = Arc::clone(&self.settings);
        let within =
            |what: &str, timeout: Duration| format!("{what} within {} ms", timeout.as_millis());
        match late {
            Late::Handshake => {
                let reason = if self.state == State::ProxyHeader {
                    "proxy-header"
                } else {
                    "timeout"
                };
                self.close_with(CloseReason::Handshake(reason, "timed out".into()));
            }
            Late::Hello => self.close_with(self.hello_timed_out()),
            Late::Silence => self.close_with(CloseReason::Notice(
                Code::IdleTimeout,
                within("nothing arrived", settings.config.idle_timeout.0),
            )),
            Late::Message => self.close_with(CloseReason::Notice(
                Code::ReadTimeout,
                within(
                    "a message was begun but not finished",
                    settings.config.read_timeout.0,
                ),
            )),
            Late::Memory => {
                self.answer_unread(peer);
                let message = within(
                    "no memory for the rest of a message",
                    settings.config.read_timeout.0,
                );
                let (used, limit) = (settings.memory.used(), settings.memory.limit());
                self.close_with(CloseReason::Notice(
                    Code::ServerBusy,
                    format!("{message}; {used} bytes of {limit} are taken"),
                ));
            }
            Late::Writing => self.close_with(CloseReason::WriteTimeout),
            Late::Postponed => self.retry(),
            // The next step tries.
            Late::Retry => self.active = now,
            Late::Shrink => {
                // The buffer is kept for one more read, which has not come.
                self.read_buffer();
                self.shrink();
            }
        }
    }

    fn hello_timed_out(&self) -> CloseReason {
        let millis = self.settings.config.handshake_timeout.0.as_millis();
        let message = format!("no system.hello with a token arrived within {millis} ms");
        CloseReason::Notice(Code::ReadTimeout, message)
    }

    /// Answers the request whose rest could not be read for want of memory, if
    /// its header line has arrived: nothing ran.
    fn answer_unread(&mut self, peer: &Peer) {
        if !matches!(self.state, State::Memory { .. }) {
            return;
        }
        let input = Arc::clone(&self.input);
        let Buffer::Frames(reassembly) = &input.buffer else {
            return;
        };
        let header = Header::parse(reassembly.partial())
            .ok()
            .map(|(header, _)| header);
        if header.is_some_and(|header| header.kind == Kind::Request && header.request_id.is_some())
        {
            let code = Code::ServiceUnavailable;
            let body = ErrorBody::server(code, "the server's memory is used up; nothing ran")
                .with_details(&serde_json::json!({"retryAfterMs": RETRY_WHEN_BUSY_MS}));
            peer.traffic().messages_in.add(1);
            self.outbox.answer(
                header.as_ref(),
                Outcome::Error(Some(code), body),
                peer.traffic(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::{
        access::{Access, ListenerPolicy},
        budget::Budget,
        config::{Auth, Bytes, Config, Millis, Principals},
        server::{drain::DrainFlags, peer::CloseRequest, settings::Buffers},
        wire::frame::FrameHeader,
    };

    fn settings(memory: usize) -> Arc<ServerSettings> {
        let config = Config {
            max_message_size: Bytes(100_000),
            max_in_flight: 2,
            read_timeout: Millis::secs(5),
            handshake_timeout: Millis::secs(10),
            write_timeout: Millis::secs(20),
            idle_timeout: Millis::secs(60),
            ..Config::default()
        };
        Arc::new(ServerSettings {
            config: Arc::new(config),
            listeners: Vec::new(),
            max_connections: 1,
            reserved: 0,
            max_ending: 1,
            buffers: Buffers {
                read: 64,
                write: 1000,
            },
            thread_stack: 0,
            memory: Budget::new(memory),
        })
    }

    struct Test {
        machine: Machine,
        peer: Peer,
        now: Instant,
    }

    impl Test {
        fn new(state: State, must_authenticate: bool, memory: usize) -> Self {
            let access = Access::new(Principals::new(), "/nowhere".into(), 1).unwrap();
            let policy = Arc::new(ListenerPolicy {
                auth: Auth::None,
                rights: None,
                allow_unsecure: false,
            });
            let unauthenticated =
                access.unauthenticated("1".into(), Ipv4Addr::LOCALHOST.into(), false, &policy);
            let drain = Arc::new(DrainFlags::new().unwrap());
            let settings = settings(memory);
            let from = (Ipv4Addr::LOCALHOST, 1).into();
            let peer = Peer::new(
                (1, 0),
                (from, None),
                Arc::new(unauthenticated),
                &drain,
                &settings.memory,
            );
            let now = Instant::now();
            let mut machine = Machine::new(&settings, state, now);
            if state == State::Idle {
                machine.open(must_authenticate, (true, true));
            }
            Self { machine, peer, now }
        }

        fn next(&mut self) -> Step {
            self.machine.next(&self.peer, self.now)
        }

        /// Reads these bytes, as many as there is room for each time.
        fn arrives(&mut self, mut bytes: &[u8]) -> Step {
            self.machine.readable = true;
            loop {
                match self.next() {
                    Step::Read => {
                        self.read(&mut bytes);
                    }
                    step => return step,
                }
            }
        }

        /// One read of what there is.
        fn read(&mut self, bytes: &mut &[u8]) -> usize {
            let read_buffer = self.machine.read_buffer();
            let count = read_buffer.len().min(bytes.len());
            let (read, rest) = bytes.split_at(count);
            read_buffer[..count].copy_from_slice(read);
            *bytes = rest;
            let received = if count == 0 {
                Received::Nothing
            } else {
                let more = !rest.is_empty();
                Received::Bytes { count, more }
            };
            let (peer, now) = (&self.peer, self.now);
            self.machine.received(Ok(received), false, peer, now);
            count
        }

        /// What becomes of it once the time has passed that it waits for.
        fn too_late(&mut self) -> (Late, u64) {
            let (until, late) = self.machine.deadline(0).expect("a deadline");
            let after = (until - self.now).as_secs();
            self.now = until;
            self.machine.is_late();
            // There is nothing to read, and no room to write.
            let mut step = self.arrives(b"");
            while self.machine.close_reason().is_none() {
                match step {
                    Step::Write => self.machine.blocked(until),
                    Step::ProxyHeader | Step::Handshake => {
                        (self.machine.readable, self.machine.writable) = (false, false);
                    }
                    _ => break,
                }
                step = self.next();
            }
            (late, after)
        }

        fn ends_with(&self) -> String {
            self.machine
                .close_reason()
                .map_or("-".into(), ToString::to_string)
        }

        fn sends(&mut self) -> String {
            let mut all = Vec::new();
            while !self.machine.outbox.is_empty() {
                let next = self.machine.outbox.next().to_vec();
                self.machine.outbox.advance(next.len());
                all.extend(next);
            }
            self.machine.written(self.now);
            String::from_utf8_lossy(&all).into_owned()
        }
    }

    fn frame(body: &str) -> Vec<u8> {
        let header = FrameHeader {
            length: u32::try_from(body.len()).unwrap(),
            binary: false,
            more: false,
            keep_alive: false,
        };
        [&header.encode()[..], body.as_bytes()].concat()
    }

    #[test]
    fn each_state_has_its_deadline() {
        let wait = |state: State, must_authenticate: bool, bytes: &[u8]| {
            let mut test = Test::new(state, must_authenticate, 1 << 20);
            assert_eq!(test.arrives(bytes), Step::Wait);
            let (late, after) = test.too_late();
            (late, after, test.ends_with())
        };
        let mut early = Test::new(State::ProxyHeader, true, 0);
        assert_eq!(early.next(), Step::Wait);
        assert_eq!(early.too_late(), (Late::Handshake, 10));
        assert!(early.ends_with().contains("proxy-header"));
        let idle = wait(State::Idle, false, b"");
        assert_eq!((idle.0, idle.1), (Late::Silence, 60));
        assert!(idle.2.starts_with("IDLE_TIMEOUT"));
        let midway = wait(State::Idle, false, &frame("x")[..5]);
        assert_eq!((midway.0, midway.1), (Late::Message, 5));
        assert!(midway.2.starts_with("READ_TIMEOUT"));
        let nameless = wait(State::Idle, true, b"");
        assert_eq!((nameless.0, nameless.1), (Late::Hello, 10));
        // What comes later of the two does not count.
        let nameless = wait(State::Idle, true, &frame("x")[..5]);
        assert_eq!((nameless.0, nameless.1), (Late::Message, 5));

        let mut stuck = Test::new(State::Idle, false, 1 << 20);
        stuck.machine.keep_alive(&stuck.peer);
        assert_eq!(stuck.next(), Step::Write);
        stuck.machine.blocked(stuck.now);
        stuck.machine.readable = true;
        assert_eq!(stuck.next(), Step::Wait, "nothing is read meanwhile");
        assert_eq!(stuck.too_late(), (Late::Writing, 20));
        assert_eq!(stuck.next(), Step::Close);
    }

    #[test]
    fn messages_are_taken_and_answers_leave_before_the_next_wait() {
        let mut test = Test::new(State::Idle, false, 1 << 20);
        let step = test.arrives(&[frame("one"), frame("two")].concat());
        let Step::Message(Message { body, binary, .. }) = step else {
            panic!("{step:?}");
        };
        assert!(!binary && test.machine.input().message(body) == b"one");
        test.machine.keep_alive(&test.peer);
        assert!(matches!(test.next(), Step::Message(_)), "answers gather");
        assert_eq!(test.next(), Step::Write);
        test.sends();
        assert_eq!(test.next(), Step::Wait);
        assert!(!test.machine.goes_on());
    }

    #[test]
    fn buffers_that_calls_keep_are_paid_for() {
        let mut test = Test::new(State::Idle, false, 1 << 20);
        let memory = Arc::clone(&test.machine.settings.memory);
        let step = test.arrives(&[frame("one"), frame("two"), frame("three")].concat());
        assert!(matches!(step, Step::Message(_)));
        let mut kept = Vec::new();
        for count in 1..3 {
            kept.push(Arc::clone(test.machine.input()));
            test.machine.split_input();
            assert_eq!(memory.used(), 64 * count, "of {count} calls");
            assert!(matches!(test.next(), Step::Message(_)));
        }
        drop(kept);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn what_ends_it_is_said_behind_all_answers() {
        let mut test = Test::new(State::Idle, false, 1 << 20);
        test.peer.leave_call();
        assert_eq!(test.arrives(&[0, 0, 0, 1, 0xff, 0, 0, 0]), Step::Wait);
        assert_eq!(test.machine.state(), State::Ending);
        assert_eq!(test.machine.deadline(1), None, "a call has its own");
        let body = ErrorBody::server(Code::Timeout, "late");
        let outcome = Outcome::Error(Some(Code::Timeout), body);
        test.peer
            .answer_late(|late, traffic| late.answer(None, outcome, traffic));
        assert_eq!(test.next(), Step::Write);
        let said = test.sends();
        let (late, closing) = (said.find("TIMEOUT"), said.find("INVALID_FRAME"));
        assert!(late.is_some() && late < closing, "{said}");
        assert_eq!(test.next(), Step::Close);

        let mut notified = Test::new(State::Idle, false, 1 << 20);
        notified.peer.request_close(CloseRequest::CLOSED);
        assert_eq!(notified.next(), Step::Write);
        assert!(notified.sends().contains("SHUTTING_DOWN"));
        assert_eq!(notified.next(), Step::Close);

        // Before the protocol begins nothing can be said.
        let mut early = Test::new(State::Handshake, true, 1 << 20);
        early.peer.request_close(CloseRequest::CLOSED);
        assert_eq!(early.next(), Step::Close);

        let mut gone = Test::new(State::Idle, false, 1 << 20);
        gone.machine.keep_alive(&gone.peer);
        let reset = Err(io::ErrorKind::ConnectionReset.into());
        gone.machine.received(reset, false, &gone.peer, gone.now);
        assert_eq!(gone.next(), Step::Close);
    }

    #[test]
    fn a_message_waits_for_memory_and_its_request_gets_an_error() {
        let mut test = Test::new(State::Idle, false, 1000);
        let large = frame(&format!("REQUEST:a.b:1.0.0:7\n{}", "x".repeat(5000)));
        assert_eq!(test.arrives(&large), Step::Wait);
        assert!(matches!(test.machine.state(), State::Memory { .. }));
        assert_eq!(test.too_late(), (Late::Retry, 0));
        while test.machine.close_reason().is_none() {
            assert_eq!(test.next(), Step::Wait);
            test.too_late();
        }
        assert_eq!(test.next(), Step::Write);
        let said = test.sends();
        assert!(said.contains("ERROR:a.b:1.0.0:7\n{\"code\":\"SERVICE_UNAVAILABLE\""));
        assert!(said.contains("SERVER_BUSY"), "{said}");
        assert_eq!(test.next(), Step::Close);
    }

    #[test]
    fn others_are_served_after_so_many_reads() {
        let mut test = Test::new(State::Idle, false, 1 << 20);
        test.machine.readable = true;
        for _ in 0..MAX_READS {
            assert_eq!(test.next(), Step::Read);
            let read_buffer = test.machine.read_buffer();
            let count = read_buffer.len();
            read_buffer.copy_from_slice(&frame("").repeat(count / 8)[..count]);
            let received = Ok(Received::Bytes { count, more: true });
            test.machine.received(received, false, &test.peer, test.now);
            while matches!(test.next(), Step::Message(_)) {}
            if test.machine.quantum.reads == MAX_READS {
                break;
            }
        }
        assert_eq!(test.next(), Step::Wait);
        assert!(test.machine.goes_on());
        test.machine.begin_quantum();
        assert_eq!(test.next(), Step::Read);
    }

    #[test]
    fn others_are_served_after_so_many_messages_and_long_calls() {
        let mut test = Test::new(State::Idle, false, 1 << 20);
        let settings = ServerSettings {
            buffers: Buffers {
                read: 64 * 1024,
                ..settings(1 << 20).buffers
            },
            ..ServerSettings::clone(&settings(1 << 20))
        };
        test.machine = Machine::new(&Arc::new(settings), State::Idle, test.now);
        test.machine.open(false, (true, true));
        let (mut messages, mut quantum, mut longest) = (0, 0, 0);
        // The buffer grows with what it is filled by.
        let all = frame("").repeat(30 * MAX_MESSAGES);
        let mut rest = &all[..];
        test.machine.readable = true;
        while messages < 30 * MAX_MESSAGES {
            match test.next() {
                Step::Read => {
                    let count = test.read(&mut rest);
                    assert!(count > 0);
                }
                Step::Message(_) => {
                    (messages, quantum) = (messages + 1, quantum + 1);
                    longest = longest.max(quantum);
                }
                Step::Wait => {
                    assert!(test.machine.goes_on());
                    test.machine.begin_quantum();
                    quantum = 0;
                }
                step => panic!("{step:?}"),
            }
        }
        assert_eq!(longest, MAX_MESSAGES);
        let mut test = Test::new(State::Idle, false, 1 << 20);
        let step = test.arrives(&frame("x").repeat(2));
        assert!(matches!(step, Step::Message(_)));
        test.machine.end_quantum();
        assert_eq!(test.next(), Step::Wait);
        assert!(test.machine.goes_on());
        test.machine.begin_quantum();
        assert!(matches!(test.next(), Step::Message(_)));
    }

    #[test]
    fn others_are_served_after_so_many_bytes() {
        let mut test = Test::new(State::Idle, false, 1 << 24);
        let large = Outcome::Binary(vec![7; 3 * MAX_WRITTEN / 2]);
        let (header, _) = Header::parse(b"REQUEST:a.b:1.0.0:7\n").unwrap();
        test.machine
            .answered(Some(&header), large, None, &test.peer);
        assert_eq!(test.next(), Step::Write);
        let mut quanta = 1;
        loop {
            let count = test.machine.outbox.next().len().min(64 * 1024);
            if !test.machine.wrote(count) {
                test.machine.blocked(test.now);
                assert_eq!(test.next(), Step::Wait);
                assert!(test.machine.goes_on());
                test.machine.begin_quantum();
                assert_eq!(test.next(), Step::Write);
                quanta += 1;
            }
            if test.machine.outbox.is_empty() {
                break;
            }
        }
        assert_eq!(quanta, 2);
        test.machine.written(test.now);
        assert_eq!(test.next(), Step::Wait);
        assert!(!test.machine.goes_on());
    }

    #[test]
    fn what_came_in_time_is_read_before_it_is_too_late() {
        let mut test = Test::new(State::Idle, false, 1 << 20);
        let all = frame("x");
        assert_eq!(test.arrives(&all[..5]), Step::Wait);
        // The whole process stood still for as long as one likes.
        test.now += Duration::from_secs(100);
        test.machine.is_late();
        assert!(matches!(test.arrives(&all[5..]), Step::Message(_)));
        assert_eq!(test.next(), Step::Wait);
        assert!(test.machine.close_reason().is_none());
        // A message that comes in drops has no more time than that.
        assert_eq!(test.arrives(&all[..5]), Step::Wait);
        test.now += Duration::from_secs(5);
        test.machine.is_late();
        assert_eq!(test.arrives(&all[5..6]), Step::Write);
        assert!(test.ends_with().starts_with("READ_TIMEOUT"));
    }

    #[test]
    fn what_is_postponed_is_tried_again_and_nothing_is_read_meanwhile() {
        let mut test = Test::new(State::Idle, false, 1 << 20);
        let Step::Message(message) = test.arrives(&[frame("one"), frame("two")].concat()) else {
            panic!("no message");
        };
        test.machine.keep_alive(&test.peer);
        let postponed = Postponed {
            until: test.now + Duration::from_secs(3),
            counted: Counted::ByPrincipal,
        };
        test.machine.postpone(message.clone(), postponed);
        assert_eq!(test.next(), Step::Write, "what was answered leaves");
        test.sends();
        test.machine.readable = true;
        assert_eq!(test.next(), Step::Wait);
        assert_eq!(test.machine.state(), State::Postponed);
        test.machine.retry();
        let Step::Message(again) = test.next() else {
            panic!("not tried again");
        };
        assert_eq!(
            (message.postponed, again.postponed),
            (None, Some(postponed))
        );
        assert_eq!(again.body, message.body);

        // Its handler has to say that it is too late.
        test.machine.postpone(again, postponed);
        assert_eq!(test.next(), Step::Wait);
        let (until, late) = test.machine.deadline(0).unwrap();
        assert_eq!((until, late), (postponed.until, Late::Postponed));
        test.now = until;
        test.machine.is_late();
        let Step::Message(again) = test.next() else {
            panic!("not tried when it is too late");
        };
        assert!(matches!(test.next(), Step::Message(_)));

        test.machine.postpone(again, postponed);
        test.peer.request_close(CloseRequest::CLOSED);
        assert_eq!(test.next(), Step::Write, "it is not begun any more");
        assert!(test.sends().contains("SHUTTING_DOWN"));
        assert_eq!(test.next(), Step::Close);
    }
}
