//! One connection, a value that moves: a worker owns it while there is
//! something to do, and it is parked at the poller while there is not.
//! `machine` decides what it does next; here that is done, without ever
//! waiting.

mod close_reason;
mod credentials;
mod decoder;
mod http;
mod machine;
mod message;
mod requests;

use std::{
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
    time::Instant,
};

pub(crate) use close_reason::{CloseReason, RETRY_WHEN_BUSY_MS};
pub(crate) use machine::{Input, State};
use machine::{Machine, Step};
pub(crate) use message::Message;

use super::{
    admission::Permit,
    by_address::Counted,
    common::Common,
    encoding::Encoding,
    peer::{Activity, CloseRequest, Peer, Protocol},
    poller::{Events, Parked},
    settings::ListenerSettings,
};
use crate::{
    access::{Failure, Identity},
    dispatch::{Outcome, Postponed, Redirect},
    log::{AUDIT, Limiter},
    system::{self, Channel},
    transport::{ALPN, HTTP_ALPN, Proxied, ServerTls, TlsFault},
    wire::{Code, Header, Version},
};

/// Handshakes at the same time of an address that has failed to authenticate too
/// often: a peer with a valid certificate is admitted from there too, but each
/// costs much. One more is closed without a word.
const MAX_HANDSHAKES: usize = 8;

/// What has become of a connection.
pub(crate) enum Advance {
    /// It has a message to be answered.
    Call(Call),
    /// There is nothing to do until the next event.
    Wait,
    /// It is closed; what is left is the value, and a socket whose peer must be
    /// able to read what was sent last.
    Closed(Option<Channel>),
}

/// A message that is to be answered, with all that this needs: the connection
/// may go on meanwhile.
pub(crate) struct Call {
    pub(crate) input: Arc<Input>,
    pub(crate) message: Message,
    pub(crate) arrived: Instant,
    pub(crate) identity: Arc<Identity>,
}

/// A certificate that was valid when it was last verified.
struct Certificate {
    /// The CAs and revocation lists that it was verified with.
    by: Arc<ServerTls>,
    expires: Option<Instant>,
}

/// See the module.
pub(crate) struct Connection {
    machine: Machine,
    channel: Option<Channel>,
    peer: Arc<Peer>,
    common: Arc<Common>,
    listener: Arc<ListenerSettings>,
    permit: Permit,
    /// The peer's identity, of which `peer` has a copy.
    identity: Arc<Identity>,
    /// Its certificate, if any.
    certificate: Option<Certificate>,
    /// When its credentials were last checked as a whole.
    checked: Instant,
    /// One of the few handshakes of an address that has failed too often.
    handshake: Option<Counted>,
    /// What HTTP has beside it.
    http: http::Credentials,
}

impl Connection {
    /// Creates the connection of an accepted socket. Returns none where the
    /// system or the TLS library refuses it.
    pub(crate) fn new(
        number: u64,
        stream: TcpStream,
        from: SocketAddr,
        listener: Arc<ListenerSettings>,
        common: Arc<Common>,
        permit: Permit,
    ) -> Option<Self> {
        let spoken = listener.speaks(&common.settings.config);
        let session = listener.tls.as_ref();
        let session = session.map(|tls| tls.load().session(spoken));
        let channel = match session.transpose() {
            Ok(session) => Channel::new(stream, session).map_err(|error| error.to_string()),
            Err(error) => Err(format!("no TLS session: {error}")),
        };
        let channel = channel
            .inspect_err(|error| tracing::error!(connection = number, "not served: {error}"))
            .ok()?;
        Some(Self::over(number, channel, from, listener, common, permit))
    }

    /// Creates a connection over a socket that does not block.
    pub(crate) fn over(
        number: u64,
        channel: Channel,
        from: SocketAddr,
        listener: Arc<ListenerSettings>,
        common: Arc<Common>,
        permit: Permit,
    ) -> Self {
        tracing::debug!(connection = number, peer = %from, "connection accepted");
        let encrypted = channel.is_encrypted();
        let identity = Arc::new(common.access.unauthenticated(
            number.to_string(),
            from.ip(),
            encrypted,
            &listener.policy,
        ));
        let peer = Arc::new(Peer::new(
            (number, permit.slot()),
            from,
            Arc::clone(&identity),
            &common.drain,
            &common.settings.memory,
        ));
        permit.hold(Arc::clone(&peer));
        let now = system::now();
        let state = if listener.is_proxy(from.ip()) {
            State::ProxyHeader
        } else {
            State::Handshake
        };
        let mut connection = Self {
            machine: Machine::new(&common.settings, state, now),
            channel: Some(channel),
            peer,
            common,
            listener,
            permit,
            identity,
            certificate: None,
            checked: now,
            handshake: None,
            http: http::Credentials::default(),
        };
        if state == State::Handshake {
            connection.begin_handshake();
        }
        connection
    }

    pub(crate) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn input(&self) -> &Arc<Input> {
        self.machine.input()
    }

    /// Whether it is about to close.
    pub(crate) fn is_closing(&self) -> bool {
        self.machine.close_reason().is_some()
    }

    /// Closes it, whatever it does.
    pub(crate) fn close_with(&mut self, end: CloseReason) {
        self.machine.close_with(end);
    }

    /// Whether it only waits for its peer's next request.
    pub(crate) fn is_idle(&self) -> bool {
        self.machine.state() == State::Idle
            && !self.machine.goes_on()
            && !self.identity.must_authenticate()
            && self.peer.calls_left() == 0
            && !self.peer.has_late()
            && self.peer.close_request().is_none()
    }

    /// Has its next read wait so long for the peer; says whether it will.
    pub(crate) fn wait_in_next_read(&mut self, time: Duration) -> bool {
        let channel = self.channel.as_mut();
        let waits = channel.is_some_and(|channel| channel.wait_in_next_read(time));
        self.machine.begin_quantum();
        self.machine.readable |= waits;
        waits
    }

    /// No read waits any more. Says whether one could have.
    pub(crate) fn stop_waiting(&mut self) -> bool {
        self.channel.as_mut().is_some_and(Channel::stop_waiting)
    }

    /// Takes events that have been delivered.
    #[inline]
    pub(crate) fn take_events(&mut self, events: Events, now: Instant) {
        self.machine.begin_quantum();
        self.machine.readable |= events.has(Events::READABLE);
        self.machine.writable |= events.has(Events::WRITABLE);
        self.machine.peer_ended |= events.has(Events::PEER_CLOSED);
        if events.has(Events::ANSWER) {
            self.machine.collect_late(&self.peer, now);
        }
        if events.has(Events::RETRY) {
            self.machine.retry();
        }
        if events.has(Events::OVERDUE) {
            self.check(now);
            self.machine.is_late();
        }
    }

    /// Does everything that can be done without waiting, up to the next call.
    #[inline]
    pub(crate) fn advance(&mut self, now: Instant) -> Advance {
        loop {
            match self.machine.next(&self.peer, now) {
                Step::Read => {
                    let Some(channel) = &mut self.channel else {
                        return Advance::Closed(None);
                    };
                    let waits = channel.waits();
                    let received = channel.read(self.machine.read_buffer());
                    let midway = channel.is_midway();
                    if matches!(&received, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
                    {
                        self.common.running.reset(self.peer.number());
                    }
                    // Calls may have taken their time since the first read.
                    let now = if waits || self.machine.has_read_before() {
                        system::now()
                    } else {
                        now
                    };
                    self.machine.received(received, midway, &self.peer, now);
                }
                Step::Message(message) => {
                    self.update_identity();
                    if let Some(close_request) = self.peer.close_request() {
                        let reason = CloseReason::Requested(close_request);
                        self.machine.close_unbegun(message, reason);
                        continue;
                    }
                    self.peer.set_activity(Activity::Calling);
                    if message.postponed.is_none() {
                        self.peer.traffic().messages_in.add(1);
                    }
                    return Advance::Call(Call {
                        input: Arc::clone(self.machine.input()),
                        message,
                        arrived: self.machine.arrived(),
                        identity: Arc::clone(&self.identity),
                    });
                }
                Step::Head(head) => self.decide_on(&head),
                Step::Write => {
                    self.peer.set_activity(self.machine.state().into());
                    self.write();
                }
                Step::Wait => {
                    self.peer.set_activity(self.machine.state().into());
                    return Advance::Wait;
                }
                Step::KeepAlive(keep_alive) => {
                    self.update_identity();
                    if self.is_authenticated() {
                        self.machine.keep_alive(keep_alive, &self.peer);
                    }
                }
                Step::ProxyHeader => self.read_proxy_header(),
                Step::Handshake => self.go_on_with_handshake(),
                Step::Close => {
                    return Advance::Closed(self.close());
                }
            }
        }
    }

    /// Sends of the outbox what the peer's system takes.
    pub(crate) fn write(&mut self) {
        let Some(channel) = &mut self.channel else {
            return;
        };
        let now = system::now();
        self.peer.answered(now);
        let sent = loop {
            if self.machine.outbox.is_empty() {
                break channel.flush();
            }
            match channel.write(self.machine.outbox.next()) {
                Ok(0) => break Ok(false),
                Ok(count) => {
                    self.peer.traffic().bytes_out.add(count as u64);
                    if !self.machine.wrote(count) && !self.machine.outbox.is_empty() {
                        break Ok(false);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        match sent {
            Ok(true) => self.machine.written(now),
            Ok(false) => self.machine.blocked(now),
            Err(error) => {
                // Nobody is there for what still runs.
                self.common.running.reset(self.peer.number());
                self.machine.close_with(CloseReason::Io(error));
            }
        }
    }

    /// Takes the answer of the current call.
    #[inline]
    pub(crate) fn answered(
        &mut self,
        mut encoding: Encoding,
        header: Option<&Header<'_>>,
        outcome: Outcome,
        served: Option<Version>,
    ) {
        let mut closing = None;
        if let Outcome::Error(code, body) = &outcome {
            let answers = header.is_some_and(|header| header.request_id.is_some());
            closing = code.filter(|code| code.closes(answers));
            if closing.is_some() {
                encoding.closes();
            }
            self.common
                .note_error(&self.peer, &self.identity, header, *code, body);
        }
        self.machine
            .answered(encoding, header, outcome, served, &self.peer);
        if let Some(code) = closing {
            self.machine.close_with(CloseReason::ClosingAnswer(code));
        }
    }

    /// The call of a message can't begin yet.
    pub(crate) fn postpone(&mut self, message: Message, postponed: Postponed) {
        self.machine.postpone(message, postponed);
    }

    /// Has a message handled again, as the call that it asks for.
    pub(crate) fn redirect(&mut self, message: Message, redirect: Redirect) {
        self.machine.redirect(message, redirect);
    }

    /// Its calls have taken so long that others are next.
    pub(crate) fn end_quantum(&mut self) {
        self.machine.end_quantum();
    }

    /// Goes on without the current call, if so many may be left behind; its
    /// answer comes later. What came before it leaves at once.
    pub(crate) fn leave_call(&mut self) -> bool {
        let leaves = self.may_leave_call();
        if !self.machine.outbox.is_empty() {
            self.write();
        }
        if leaves {
            self.machine.split_input();
            self.peer.leave_call();
            self.peer.set_activity(self.machine.state().into());
        }
        leaves
    }

    /// Whether one more call may be left behind.
    pub(crate) fn may_leave_call(&self) -> bool {
        let most = self.common.settings.buffers.in_flight;
        // The current one counts as well.
        self.peer.calls_left() as usize + 1 < most
    }

    /// For whom a load balancer speaks.
    fn read_proxy_header(&mut self) {
        (self.machine.readable, self.machine.writable) = (false, false);
        let Some(channel) = &self.channel else { return };
        match channel.read_proxy_header(self.machine.peer_ended) {
            Ok(None) => return,
            Ok(Some(proxied)) => {
                let address = match proxied {
                    // It speaks for itself, and is admitted as any other peer.
                    Proxied::Balancer => self.peer.address(),
                    Proxied::Peer(address) => address,
                };
                self.machine.proceed(State::Handshake);
                self.speaks_for(address);
                self.begin_handshake();
            }
            Err(error) => {
                let end = CloseReason::Handshake("proxy-header", error.to_string());
                self.machine.close_with(end);
            }
        }
        // What follows the header may be there.
        self.machine.readable = true;
    }

    fn speaks_for(&mut self, address: SocketAddr) {
        if !self.listener.admits(address.ip()) {
            self.machine.close_with(CloseReason::Denied);
            return;
        }
        self.peer.speaks_for(address);
        let caller = &self.identity.caller;
        let (id, encrypted) = (caller.connection_id.clone(), caller.encrypted);
        let policy = &self.listener.policy;
        let identity = self
            .common
            .access
            .unauthenticated(id, address.ip(), encrypted, policy);
        self.set_identity(identity);
        if self.permit.claim(address.ip()) {
            return;
        }
        let text = format!(
            "{} has as many connections as one address may",
            address.ip()
        );
        self.machine.close_with(if self.listener.tls.is_some() {
            CloseReason::Denied
        } else {
            CloseReason::Notice(Code::ServerBusy, text)
        });
    }

    /// Where nothing is encrypted, the protocol begins at once.
    fn begin_handshake(&mut self) {
        if self.machine.close_reason().is_some() {
            return;
        }
        let encrypted = self.channel.as_ref().is_some_and(Channel::is_encrypted);
        if !encrypted {
            return self.open();
        }
        let address = self.peer.address().ip();
        if self.common.access.is_throttled(address) {
            self.handshake = self.common.handshakes.begin(address, MAX_HANDSHAKES);
            if self.handshake.is_none() {
                // Nothing can be said before the handshake.
                self.machine.close_with(CloseReason::Handshake(
                    "throttled",
                    "too many at the same time".into(),
                ));
            }
        }
    }

    fn go_on_with_handshake(&mut self) {
        (self.machine.readable, self.machine.writable) = (false, false);
        let Some(channel) = &mut self.channel else {
            return;
        };
        match channel.handshake() {
            Ok(false) => {}
            Ok(true) => {
                self.handshake = None;
                if let Some(version) = channel.tls_version() {
                    self.peer.has_tls(version);
                }
                // What came with its end may hold messages.
                self.machine.readable = true;
                self.open();
            }
            Err(error) => {
                let fault = TlsFault::of(&error);
                let demanded = self
                    .listener
                    .tls
                    .as_ref()
                    .is_some_and(|tls| tls.load().demands_certificate());
                if demanded && fault.is_of_certificate() {
                    self.common
                        .access
                        .failed(&self.identity, Failure::Certificate);
                }
                let text = TlsFault::describe(&error);
                self.machine
                    .close_with(CloseReason::Handshake(fault.as_str(), text));
            }
        }
    }

    /// The protocol begins.
    fn open(&mut self) {
        let listener = self.listener.speaks(&self.common.settings.config);
        // What TLS has agreed on is what is spoken; else the first byte decides.
        let agreed = self.channel.as_ref().and_then(Channel::alpn);
        let spoken = match agreed {
            Some(ALPN) if listener.0 => (true, false),
            Some(HTTP_ALPN) if listener.1 => (false, true),
            _ => listener,
        };
        self.machine.open(true, spoken);
        match spoken {
            (true, true) => {}
            (true, false) => self.peer.speaks(Protocol::Frames),
            (false, _) => self.peer.speaks(Protocol::Http),
        }
        self.read_certificate();
        if !self.identity.must_authenticate() {
            self.machine.authenticated();
            return;
        }
        let address = self.peer.address().ip();
        let access = &self.common.access;
        if let Some(wait) = access.throttled_for(address, Failure::WrongToken) {
            self.machine.close_with(CloseReason::Throttled(wait));
        }
    }

    /// Closes it and counts why. The peer has yet to read what is on the
    /// returned socket.
    fn close(&mut self) -> Option<Channel> {
        let channel = self.channel.take()?;
        let end = self.machine.close_reason()?;
        let (number, peer) = (self.peer.number(), self.peer.address());
        let (metrics, traffic) = (&self.common.metrics, self.peer.traffic());
        match end {
            CloseReason::Peer
            | CloseReason::CloseFrame(_)
            | CloseReason::Io(_)
            | CloseReason::ClosingAnswer(_)
            | CloseReason::Answered => {}
            CloseReason::Denied => {
                metrics.denied.add(1);
                log_denied(peer);
            }
            CloseReason::Handshake(reason, problem) => {
                // A balancer's health check may do no more than connect.
                let looked = *reason == TlsFault::Abandoned.as_str() && traffic.bytes_in.get() == 0;
                metrics.handshake_failures.add(reason);
                static LINES: Limiter = Limiter::audit();
                if !looked && LINES.allows("handshake failed") {
                    tracing::warn!(target: AUDIT, security = "handshake", connection = number, %peer, reason, "handshake failed: {problem}");
                }
            }
            CloseReason::Truncated => {
                metrics.truncated.add(1);
                static LINES: Limiter = Limiter::new();
                if LINES.allows("message cut off by the end of the stream") {
                    tracing::info!(connection = number, %peer, "message cut off by the end of the stream");
                }
            }
            CloseReason::WriteTimeout => metrics.write_timeouts.add(1),
            CloseReason::Throttled(_) => {
                metrics.auth_failures.add("too-many");
                metrics.count_error(Some(Code::Unauthorized));
            }
            CloseReason::Notice(code, _) | CloseReason::Requested(CloseRequest { code, .. }) => {
                metrics.count_error(Some(*code));
            }
        }
        static LINES: Limiter = Limiter::new();
        if LINES.allows("connection closed") {
            tracing::info!(
                connection = number,
                %peer,
                principal = &*self.identity.principal.name,
                millis = system::now().saturating_duration_since(self.peer.since()).as_millis() as u64,
                requests = traffic.messages_in.get(),
                bytes_in = traffic.bytes_in.get(),
                bytes_out = traffic.bytes_out.get(),
                "connection closed: {end}"
            );
        }
        // The peer must be able to read what was sent last, or the alert: no
        // reset.
        let is_silent = matches!(
            end,
            CloseReason::Peer
                | CloseReason::Io(_)
                | CloseReason::Truncated
                | CloseReason::WriteTimeout
                | CloseReason::Denied
        );
        (!is_silent).then_some(channel)
    }
}

impl Parked for Connection {
    fn slot(&self) -> usize {
        self.peer.slot()
    }

    fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref()
    }

    fn deadline(&self) -> Option<Instant> {
        let own = self.machine.deadline(self.peer.calls_left());
        let own = own.map(|(until, _)| until);
        own.into_iter().chain(self.next_check()).min()
    }

    fn goes_on(&self) -> bool {
        self.machine.goes_on()
    }

    fn is_postponed(&self) -> bool {
        self.machine.state() == State::Postponed
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.peer.settle(&self.common.metrics.usages);
        let (traffic, metrics) = (self.peer.traffic(), &self.common.metrics);
        traffic.end(&metrics.closed);
        for (protocol, requests, _) in self.peer.requests() {
            metrics.protocols.end(protocol, requests);
        }
    }
}

/// Logs a peer whose address is denied.
pub(crate) fn log_denied(peer: SocketAddr) {
    static LINES: Limiter = Limiter::audit();
    if LINES.allows("address denied") {
        tracing::warn!(target: AUDIT, security = "address", %peer, "address denied");
    }
}
