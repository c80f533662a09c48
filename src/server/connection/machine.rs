//! What a connection does next, without doing it: bytes come in, messages go to
//! a handler, bytes go out, and each step is given the time. No I/O, no clock,
//! no lock but that of late answers.

mod closing;
mod deadlines;
mod http;

use std::{
    io,
    ops::Range,
    sync::{Arc, OnceLock},
    time::Instant,
};

use super::{
    close_reason::CloseReason,
    decoder::Decoder,
    message::{KeepAlive, Message, Taken},
    requests::Requests,
};
use crate::{
    budget::Reservation,
    dispatch::{Counted, Outcome, Postponed, Redirect},
    http::{Asks, Head},
    server::{
        encoding::Encoding,
        outbox::Outbox,
        peer::{Activity, Peer},
        settings::ServerSettings,
    },
    system::Received,
    websocket::{self, Opcode},
    wire::{Buffer, Header, Reassembly, Version, frame::KEEPALIVE_FRAME},
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
    Message,
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
            State::Message | State::Memory { .. } => Self::Reading,
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
    KeepAlive(KeepAlive),
    /// Have a message answered.
    Message(Message),
    /// Decide what to do with a request of HTTP whose head has arrived.
    Head(Box<Head>),
    /// Nothing, until the next event or the deadline.
    Wait,
    /// Close; all that was to be sent has left.
    Close,
}

/// Bytes that were read, and the memory that they take beyond the first size.
/// A call that reads its message here shares it.
#[derive(Debug)]
pub(crate) struct Input {
    decoder: Decoder,
    reservation: Reservation,
    /// Memory of the first size, once a call keeps it and the connection has
    /// another one.
    left: OnceLock<Reservation>,
}

impl Input {
    fn new(decoder: Decoder, reservation: Reservation) -> Self {
        Self {
            decoder,
            reservation,
            left: OnceLock::new(),
        }
    }

    /// A message that was taken.
    #[inline]
    pub(crate) fn message(&self, body: Range<usize>) -> &[u8] {
        self.buffer().message(body)
    }

    #[inline]
    fn buffer(&self) -> &Buffer {
        self.decoder.buffer()
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

/// See the module.
pub(crate) struct Machine {
    settings: Arc<ServerSettings>,
    state: State,
    input: Arc<Input>,
    pub(crate) outbox: Outbox,
    /// Frames and HTTP are both spoken, and nothing has arrived.
    is_undecided: bool,
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
    /// Answers in the outbox, of which `Buffers::in_flight` leave together.
    batch: usize,
    /// The outbox is written before anything else.
    leaves: bool,
    /// Part of a TLS record has come.
    record_begun: bool,
    /// When it began to wait for the rest of the message that has begun.
    begun: Option<Instant>,
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
            Decoder::Frames(reassembly),
            Reservation::empty(&settings.memory),
        );
        Self {
            settings: Arc::clone(settings),
            state,
            input: Arc::new(input),
            outbox: Outbox::new(&settings.memory),
            is_undecided: false,
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
            begun: None,
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
        if !must_authenticate {
            self.hello_until = None;
        }
        self.is_undecided = frames && http;
        if frames {
            self.update_limit();
        } else {
            self.speak_http();
        }
    }

    /// Notes that the peer has authenticated.
    pub(crate) fn authenticated(&mut self) {
        self.hello_until = None;
        self.update_limit();
    }

    fn update_limit(&mut self) {
        let most = self.max_message_size();
        self.own_input().decoder.set_max_message_size(most);
    }

    fn max_message_size(&self) -> usize {
        let most = self.settings.config.max_message_size.0;
        match self.hello_until {
            Some(_) => MAX_UNAUTHENTICATED_MESSAGE.min(most),
            None => most,
        }
    }

    /// What is to be done next.
    #[inline]
    pub(crate) fn next(&mut self, peer: &Peer, now: Instant) -> Step {
        // Nothing may follow a response that says so.
        if self.outbox.said_close() {
            self.close_with(CloseReason::Answered);
        }
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
            State::Idle | State::Message | State::Memory { .. } | State::Ending => {}
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
        if self.is_undecided {
            self.decide(peer);
        }
        match self.own_input().decoder.take() {
            None => {}
            // The next message's time begins when it is waited for. A keep-alive
            // between two pieces gives no more time.
            Some(Taken::Message(message)) => {
                (self.state, self.begun) = (State::Idle, None);
                self.quantum.messages += 1;
                return Step::Message(message);
            }
            Some(Taken::KeepAlive(keep_alive)) => {
                self.quantum.messages += 1;
                return Step::KeepAlive(keep_alive);
            }
            Some(Taken::Head(head)) => return Step::Head(head),
            Some(Taken::Refused(refusal, exchange)) => {
                self.refuse(&refusal, exchange, true, peer);
                return self.next(peer, now);
            }
            Some(Taken::Closed(reason)) => {
                self.close_with(reason);
                return self.finish(peer, now);
            }
        }
        if self.readable
            && self.input.decoder.may_read()
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
        let Some(first) = self.input.buffer().unparsed().first() else {
            return;
        };
        self.is_undecided = false;
        if first.is_ascii_uppercase() {
            self.speak_http();
        }
        peer.speaks(self.input.decoder.protocol());
    }

    fn speak_http(&mut self) {
        self.read_on(|buffer, most| Decoder::Http(Requests::new(buffer, most)));
    }

    /// Goes on with another decoder.
    fn read_on(&mut self, decoder: impl FnOnce(Buffer, usize) -> Decoder) {
        let most = self.max_message_size();
        let input = self.own_input();
        let buffer = std::mem::take(input.decoder.buffer_mut());
        input.decoder = decoder(buffer, most);
    }

    fn may_write(&self) -> bool {
        self.writable && self.quantum.written < MAX_WRITTEN
    }

    /// Whether this read is not the first of the quantum.
    #[inline]
    pub(crate) fn has_read_before(&self) -> bool {
        self.quantum.reads > 1
    }

    /// Returns the buffer for the next read.
    #[inline]
    pub(crate) fn read_buffer(&mut self) -> &mut [u8] {
        self.own_input().decoder.buffer_mut().spare()
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
                self.own_input().decoder.buffer_mut().advance(count);
                (self.arrived, self.active) = (now, now);
                peer.bytes_arrived(count, now);
            }
            // The event was for a connection that had this slot before, or the
            // bytes are not here yet.
            Ok(Received::Nothing) => (self.readable, self.peer_ended) = (false, false),
            Ok(Received::End) => {
                let midway = self.input.decoder.is_midway();
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
        let wanted = input.buffer().next_capacity().saturating_sub(first);
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
            (self.state, self.begun) = (State::Message, Some(now));
        }
        true
    }

    /// Answers a keep-alive.
    pub(crate) fn keep_alive(&mut self, keep_alive: KeepAlive, peer: &Peer) {
        peer.traffic().keep_alives.add(1);
        match keep_alive {
            KeepAlive::Frame => self.outbox.push_bytes(&KEEPALIVE_FRAME),
            KeepAlive::Ping(payload) => {
                let mut pong = Vec::new();
                websocket::write_head(&mut pong, Opcode::Pong, payload.len());
                pong.extend_from_slice(self.input.buffer().message(payload));
                self.outbox.push_bytes(&pong);
            }
            KeepAlive::Pong => {}
        }
        self.batched();
    }

    /// Takes the answer to a message.
    #[inline]
    pub(crate) fn answered(
        &mut self,
        mut encoding: Encoding,
        header: Option<&Header<'_>>,
        outcome: Outcome,
        served: Option<Version>,
        peer: &Peer,
    ) {
        if peer.close_request().is_some() {
            encoding.closes();
        }
        let traffic = peer.traffic();
        self.outbox
            .answer(&encoding, header, outcome, served, traffic);
        self.batch += 1;
        self.batched();
    }

    fn batched(&mut self) {
        let settings = &self.settings;
        self.leaves |=
            self.batch >= settings.buffers.in_flight || self.outbox.len() >= settings.buffers.write;
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
        let payload = message.body.start + payload.start..message.body.start + payload.end;
        let buffer = self.own_input().decoder.buffer_mut();
        let mut message = Message {
            body: buffer.relabel(payload, line.as_bytes()),
            any_version: true,
            ..message
        };
        if let Encoding::Http(exchange) = &mut message.encoding {
            exchange.asks = Asks::Tool(reply);
        }
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
        if peer.calls_left() == 0 {
            self.own_input().decoder.resume();
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
        let decoder = self.input.decoder.split();
        let mut reservation = Reservation::empty(&self.settings.memory);
        let first = self.settings.buffers.read;
        reservation.set(decoder.buffer().capacity().saturating_sub(first));
        self.unread = decoder.is_midway();
        // Each connection has one buffer of the first size; this is a second.
        let mut left = Reservation::empty(&self.settings.memory);
        left.set(self.input.buffer().capacity().min(first));
        let _ = self.input.left.set(left);
        self.input = Arc::new(Input::new(decoder, reservation));
    }

    /// Whether there is something to do without an event, after others were
    /// served.
    pub(crate) fn goes_on(&self) -> bool {
        match self.state {
            State::Idle | State::Message => {
                let decoder = &self.input.decoder;
                self.closing.is_none()
                    && (self.readable && decoder.may_read() || self.unread && !decoder.is_busy())
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
        let decoder = &self.input.decoder;
        let midway = !decoder.is_busy() && decoder.is_midway() || self.record_begun;
        if matches!(self.state, State::Memory { .. }) {
            return;
        }
        (self.state, self.begun) = if midway {
            (State::Message, self.begun.or(Some(now)))
        } else {
            (State::Idle, None)
        };
        if !self.input.buffer().is_kept_large() {
            self.shrink();
        }
    }

    /// Releases what a large message needed.
    fn shrink(&mut self) {
        let first = self.settings.buffers.read;
        let Input {
            decoder,
            reservation,
            ..
        } = self.own_input();
        let buffer = decoder.buffer_mut();
        let capacity = buffer.next_capacity();
        if capacity < buffer.capacity() {
            buffer.spare();
        }
        let wanted = capacity.saturating_sub(first);
        if wanted < reservation.held() {
            reservation.set(wanted);
        }
    }
}

#[cfg(test)]
mod tests;
