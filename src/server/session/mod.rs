//! What is done for a connection: read, take whole messages out, have them
//! answered, write; until there is nothing to do and it waits (`parking`),
//! until one side ends it (`end`), or until a call takes long: then another
//! thread goes on, and this one leaves when the call has its answer (`slow`).

mod credentials;
mod end;
mod parking;
mod reading;
mod slow;

use std::{
    any::Any,
    cell::{Cell, OnceCell, RefCell},
    io, mem,
    net::SocketAddr,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use credentials::Certificate;
pub(super) use end::{End, tell_denied};
use slow::SERVED;

use super::{
    ListenerSettings, Shared,
    admission::{Permit, Spare},
    connection::Connection,
    linger::LINGER,
    poller::is_on_duty,
    running::Listed,
};
use crate::{
    access::{Failure, Identity},
    budget::Charge,
    dispatch::{Outcome, Reply, Request, internal_error},
    host::Watch,
    log::{AUDIT, Limiter, panic_text},
    transport::{Proxied, ServerTls, Socket, Stream, TlsFault, read_proxy_header},
    wire::{Code, FrameError, Header, Reassembly, Taken},
};

/// Largest message of a peer that has to say who it is and has not, in bytes.
const MAX_MESSAGE_OF_STRANGERS: usize = 16 * 1024;

/// Further reads after the first that one connection gets while others wait for
/// its thread.
const READS_ON_DUTY: usize = 4;

/// Our state machine over one connection, as far as one thread has it.
pub(super) struct Session {
    shared: Arc<Shared>,
    listener: Arc<ListenerSettings>,
    connection: Arc<Connection>,
    /// What TLS was when the connection came.
    tls: Option<Arc<ServerTls>>,
    /// The peer has shown a valid one.
    certificate: Option<Certificate>,
    /// When its credentials were last checked as a whole.
    checked: Instant,
    permit: Arc<Permit>,
    /// The poller tells when there is something to read.
    at_poller: bool,
    /// Who the peer is, as the connection also knows.
    identity: Arc<Identity>,
    /// When a peer that has to say who it is must have done so.
    handshake_until: Instant,
    buffer: Reassembly,
    /// When the last byte arrived, or the last call ended: idleness counts
    /// from here.
    active: Instant,
    /// When the thread began to wait for the rest of a message.
    midway_since: Option<Instant>,
    /// Memory of the buffer beyond its first size.
    charge: Charge,
    /// Ticks that the message at hand has seen.
    ticks: Cell<u32>,
    /// Where the message at hand lies.
    at_hand: Cell<(usize, usize)>,
    /// It takes long, and is shown to whoever looks.
    listed: RefCell<Option<Listed>>,
    /// Another thread has gone on: this one only finishes its call.
    relieved: OnceCell<Spare>,
}

impl Session {
    /// Serves one peer, on this thread until it may wait without one. All of
    /// it is made here: what comes before the protocol may take long.
    pub(super) fn start(
        number: u64,
        socket: Socket,
        from: SocketAddr,
        listener: Arc<ListenerSettings>,
        shared: Arc<Shared>,
        permit: Permit,
    ) {
        let tls = listener.tls.as_ref().map(|tls| tls.load_full());
        let stream = match tls.as_ref().map(|tls| tls.session()) {
            None => Stream::plain(socket),
            Some(Ok(session)) => Stream::tls(socket, session),
            Some(Err(error)) => {
                tracing::error!(connection = number, "no TLS session: {error}");
                return;
            }
        };
        let encrypted = stream.is_encrypted();
        let identity =
            shared
                .access
                .stranger(number.to_string(), from.ip(), encrypted, &listener.terms);
        let settings = &shared.settings;
        let drain = Arc::clone(&shared.drain);
        let connection = Arc::new(Connection::new(
            number,
            stream,
            from,
            identity.clone(),
            drain,
            &settings.memory,
        ));
        permit.hold(Arc::clone(&connection));
        let now = Instant::now();
        let session = Self {
            buffer: Reassembly::new(settings.max_message_size, settings.read_buffer_size),
            active: now,
            midway_since: None,
            charge: Charge::none(&settings.memory),
            identity: Arc::new(identity),
            handshake_until: now + settings.handshake_timeout,
            listener,
            connection,
            tls,
            certificate: None,
            checked: now,
            permit: Arc::new(permit),
            at_poller: false,
            shared,
            ticks: Cell::new(0),
            at_hand: Cell::default(),
            listed: RefCell::default(),
            relieved: OnceCell::new(),
        };
        Box::new(session).run(Self::serve);
    }

    /// Serves until there is nothing to do for now, or until the end. The
    /// last thread to leave ends the connection in order.
    fn run(mut self: Box<Self>, serve: fn(&mut Self) -> Result<Wait, End>) {
        // A defect outside of a request ends this connection, not the thread.
        let served = catch_unwind(AssertUnwindSafe(|| serve(&mut self))).unwrap_or_else(|panic| {
            let error_id = log_panic(&*panic);
            Err(End::Notice(
                Code::InternalError,
                format!("defect of the server, error id {error_id}"),
            ))
        });
        let end = match served {
            Ok(Wait::AtPoller) => return Arc::clone(&self.shared).poller.park(self),
            Ok(Wait::OnThread) => return self.wait_on_thread(),
            Err(end) => end,
        };
        if !matches!(end, End::Relieved) {
            self.connection.ends(end);
            if self.relieved.get().is_some() {
                // The thread that reads hears of it.
                self.connection.stream().stop_reading();
            }
        }
        if self.connection.phase().detach() {
            self.leave_poller();
            if let Some(end) = self.connection.end() {
                self.finish(end);
            }
            self.connection.traffic().end(&self.shared.metrics.ended);
        }
    }

    fn serve(&mut self) -> Result<Wait, End> {
        tracing::debug!(connection = self.connection.number(), peer = %self.connection.peer(), "connection accepted");
        // The drain may have passed by before this connection was to be seen.
        if let Some(farewell) = self.connection.farewell()
            && self.connection.phase().close()
        {
            self.connection.opened();
            return Err(End::Farewell(farewell));
        }
        self.open()?;
        self.serve_on()
    }

    fn serve_on(&mut self) -> Result<Wait, End> {
        loop {
            self.serve_what_is_whole()?;
            if self.shared.poller.is_wanted() && self.may_park() {
                return Ok(Wait::AtPoller);
            }
            if is_on_duty() {
                return Ok(Wait::OnThread);
            }
            let count = self.read()?;
            self.is_open(count)?;
        }
    }

    /// Zero bytes were the end of the stream.
    fn is_open(&self, count: usize) -> Result<(), End> {
        match count {
            0 if self.buffer.is_midway() => Err(End::Truncated),
            0 => Err(End::Peer),
            _ => Ok(()),
        }
    }

    /// Whatever comes before the protocol itself: for whom a load balancer
    /// speaks, the TLS handshake, and whom the certificate stands for.
    fn open(&mut self) -> Result<(), End> {
        let stream = self.connection.stream().clone();
        if self.listener.is_proxy(self.connection.peer().ip()) {
            let read = read_proxy_header(stream.socket(), self.handshake_until);
            match read.map_err(|error| End::Handshake("proxy-header", error.to_string()))? {
                // It speaks for itself, and is let in as any other peer.
                Proxied::Balancer => self.speaks_for(self.connection.peer())?,
                Proxied::Peer(peer) => self.speaks_for(peer)?,
            }
        }
        self.shake_hands(&stream)?;
        self.connection.opened();
        self.read_certificate()?;
        if self.identity.must_say() {
            let address = self.connection.peer().ip();
            if let Some(wait) = self.shared.access.is_shut_out(address, Failure::WrongToken) {
                return Err(End::Throttled(wait));
            }
            self.buffer.set_max_message_size(
                MAX_MESSAGE_OF_STRANGERS.min(self.shared.settings.max_message_size),
            );
        }
        Ok(())
    }

    fn shake_hands(&self, stream: &Stream) -> Result<(), End> {
        let Some(tls) = &self.tls else { return Ok(()) };
        let (access, address) = (&self.shared.access, self.connection.peer().ip());
        let _place = if access.is_throttled(address) {
            let place = self.shared.handshakes.begin(address);
            Some(place.ok_or(End::Throttled(Duration::ZERO))?)
        } else {
            None
        };
        stream.handshake(self.handshake_until).map_err(|error| {
            let fault = TlsFault::of(&error);
            if tls.demands_certificate() && fault.is_of_certificate() {
                access.failed(&self.identity, Failure::Certificate);
            }
            End::Handshake(fault.as_str(), TlsFault::describe(&error))
        })
    }

    fn speaks_for(&mut self, peer: SocketAddr) -> Result<(), End> {
        if !self.listener.lets_in(peer.ip()) {
            return Err(End::Denied);
        }
        self.connection.speaks_for(peer);
        let Identity { caller, .. } = &*self.identity;
        let (id, encrypted) = (caller.connection_id.clone(), caller.encrypted);
        let identity = self
            .shared
            .access
            .stranger(id, peer.ip(), encrypted, &self.listener.terms);
        self.connection.is_now(identity.clone());
        self.identity = Arc::new(identity);
        if self.permit.claim(peer.ip()) {
            return Ok(());
        }
        let message = format!("{} has as many connections as one address may", peer.ip());
        Err(if self.tls.is_some() {
            End::Denied
        } else {
            End::Notice(Code::ServerBusy, message)
        })
    }

    /// The peer has shown who it is.
    fn is_now(&mut self, identity: Identity) {
        let (connection, principal) = (self.connection.number(), &*identity.principal.name);
        tracing::debug!(connection, principal, "authenticated");
        self.set_identity(identity);
        self.checked = Instant::now();
        self.permit.is_known();
        self.buffer
            .set_max_message_size(self.shared.settings.max_message_size);
    }

    /// Serves every whole message in the buffer. Answers leave together, but
    /// for those that a slow call would keep waiting.
    fn serve_what_is_whole(&mut self) -> Result<(), End> {
        let (mut busy, mut waiting, mut served, mut reads) = (false, 0_usize, 0_usize, 0_usize);
        loop {
            self.must_say_in_time()?;
            let taken = self.buffer.take();
            if matches!(taken, Ok(Some(_))) {
                self.update_identity();
            }
            match taken {
                Ok(None)
                    if busy && (reads < READS_ON_DUTY || !is_on_duty()) && self.read_more() =>
                {
                    reads += 1
                }
                Ok(None) => break,
                Ok(Some(_)) if !busy && !self.connection.phase().begin() => return Err(End::Told),
                Ok(Some(_)) if let Some(farewell) = self.connection.farewell() => {
                    // What was begun is answered; this message was not.
                    self.flush()?;
                    self.connection.phase().close();
                    return Err(End::Farewell(farewell));
                }
                Ok(Some(Taken::KeepAlive)) => {
                    busy = true;
                    self.still_authenticated()?;
                    if self.connection.push_keep_alive() >= self.shared.settings.write_buffer_size {
                        self.flush()?;
                    }
                }
                Ok(Some(Taken::Message { body, binary })) => {
                    busy = true;
                    (waiting, served) = (waiting + 1, served + 1);
                    // The next message's time begins when it is waited for. A
                    // keep-alive between two pieces gives no more time.
                    self.midway_since = None;
                    self.ticks.set(0);
                    self.at_hand.set((body.start, body.end));
                    let answered = SERVED.set(self, || self.answer(body, binary));
                    // Whoever looks may hold it for a moment longer.
                    self.listed.take();
                    if self.relieved.get().is_some() {
                        return Err(self.leave_behind());
                    }
                    let bytes = match answered {
                        Answered::Bytes(bytes) => bytes,
                        Answered::Known(bytes, identity) => {
                            self.is_now(*identity);
                            bytes
                        }
                        Answered::Unauthorized => {
                            self.flush()?;
                            return Err(End::Unauthorized);
                        }
                    };
                    let settings = &self.shared.settings;
                    if bytes >= settings.write_buffer_size || waiting >= settings.max_in_flight {
                        waiting = 0;
                        self.flush()?;
                    }
                }
                Err(error) => {
                    self.flush()?;
                    let code = match error {
                        FrameError::TooLarge { .. } => Code::MessageTooLarge,
                        FrameError::ReservedFlags { .. }
                        | FrameError::KeepAliveFlags { .. }
                        | FrameError::KeepAliveLength { .. }
                        | FrameError::MixedPayload => Code::InvalidFrame,
                    };
                    return Err(End::Notice(code, error.to_string()));
                }
            }
        }
        if busy {
            self.connection.answered();
            self.flush()?;
            let begun = mem::replace(&mut self.active, Instant::now());
            self.shared.poller.served(served, self.active - begun);
            let phase = self.connection.phase();
            if phase.rest()
                && let Some(farewell) = self.connection.farewell()
                && phase.close()
            {
                return Err(End::Farewell(farewell));
            }
        }
        Ok(())
    }

    /// A peer that has to authenticate has until `handshake_timeout` to do so,
    /// however much it sends meanwhile.
    fn must_say_in_time(&self) -> Result<(), End> {
        if self.identity.must_say() && Instant::now() >= self.handshake_until {
            return Err(self.said_nothing());
        }
        Ok(())
    }

    fn said_nothing(&self) -> End {
        let millis = self.shared.settings.handshake_timeout.as_millis();
        let message = format!("nobody said hello with a token within {millis} ms");
        End::Notice(Code::ReadTimeout, message)
    }

    /// Sends all that waits. A peer that has to authenticate gets no longer
    /// for it than for that; or than for reading why it is sent away.
    fn flush(&self) -> Result<(), End> {
        let now = Instant::now();
        let mut deadline = now + self.shared.settings.write_timeout;
        if self.identity.must_say() {
            deadline = deadline.min(self.handshake_until.max(now + LINGER));
        }
        self.connection
            .flush(deadline, || self.shared.poller.step_aside())
            .map_err(|error| match error.kind() {
                io::ErrorKind::TimedOut => End::WriteTimeout,
                _ => End::Io(error),
            })
    }
}

/// Where a session goes on that has served all that was there.
enum Wait {
    AtPoller,
    /// On one that has time for it.
    OnThread,
}

/// What has become of one message.
enum Answered {
    /// So many bytes wait to leave.
    Bytes(usize),
    /// The same, and it has come out who the peer is.
    Known(usize, Box<Identity>),
    /// The peer may not ask anything.
    Unauthorized,
}

impl Session {
    /// Has one message answered.
    fn answer(&self, body: Range<usize>, binary: bool) -> Answered {
        let Self {
            shared,
            connection,
            identity,
            ..
        } = self;
        let body = self.buffer.message(body);
        connection.request_read();
        let watch: Arc<dyn Watch> = Arc::<Connection>::clone(connection);
        let request = Request {
            body,
            binary,
            arrived: self.active,
            identity,
            watch,
        };
        let Reply {
            header,
            outcome,
            identity,
        } = catch_unwind(AssertUnwindSafe(|| shared.handle.handle(request)))
            .unwrap_or_else(|panic| internal_error(body, &log_panic(&*panic)));
        let mut unauthorized = false;
        if let Outcome::Error(code, body) = &outcome {
            unauthorized = *code == Some(Code::Unauthorized);
            shared.metrics.count_error(*code);
            if *code == Some(Code::Forbidden) {
                tell_forbidden(connection, &self.identity, header.as_ref(), &body.message);
            }
            tracing::debug!(
                connection = connection.number(),
                request_id = header.and_then(|header| header.request_id).unwrap_or("-"),
                code = %body.code,
                "answered with an error: {}",
                body.message
            );
        }
        let bytes = connection.answer(header.as_ref(), outcome);
        match identity {
            _ if unauthorized => Answered::Unauthorized,
            Some(identity) => Answered::Known(bytes, Box::new(identity)),
            None => Answered::Bytes(bytes),
        }
    }
}

/// Who asks for what its rights do not cover may be trying doors.
fn tell_forbidden(
    connection: &Connection,
    identity: &Identity,
    header: Option<&Header<'_>>,
    message: &str,
) {
    static LINES: Limiter = Limiter::audit();
    if LINES.allows("forbidden") {
        tracing::warn!(
            target: AUDIT,
            security = "rights",
            connection = connection.number(),
            peer = %connection.peer(),
            principal = &*identity.principal.name,
            topic = header.map_or("-", |header| header.topic.as_str()),
            request_id = header.and_then(|header| header.request_id).unwrap_or("-"),
            "forbidden: {message}"
        );
    }
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
