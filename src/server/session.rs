//! What a connection's thread does: read, take whole messages out, have them
//! answered, write; until one side ends it.

use std::{
    any::Any,
    fmt, io,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    ListenerSettings, SHUTS_DOWN, Shared,
    admission::Permit,
    connection::{Connection, RETRY_WHEN_BUSY_MS},
    linger::LINGER,
};
use crate::{
    access::Identity,
    budget::Charge,
    dispatch::{Outcome, Reply, Request, internal_error},
    host::Watch,
    log::{Limiter, panic_text},
    transport::{Proxied, ServerTls, Socket, Stream, TlsFault, read_proxy_header},
    wire::{Code, ErrorBody, FrameError, Header, Incoming, Kind, Reassembly},
};

/// How long a connection that waits for memory may go without looking at the
/// drain.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Largest message of a peer that has to say who it is and has not, in bytes.
const MAX_MESSAGE_OF_STRANGERS: usize = 16 * 1024;

/// Our state machine over one connection.
pub(super) struct Session {
    shared: Arc<Shared>,
    listener: Arc<ListenerSettings>,
    connection: Arc<Connection>,
    /// What TLS was when the connection came.
    tls: Option<Arc<ServerTls>>,
    permit: Permit,
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
}

/// Why a session is over.
#[derive(Debug)]
enum End {
    /// The peer ended the stream, between two messages.
    Peer,
    /// The peer ended the stream inside a message.
    Truncated,
    /// Reading or writing failed.
    Io(io::Error),
    /// A PROXY header or a TLS handshake came to nothing.
    Handshake(&'static str, String),
    /// The peer's address is not let in.
    Denied,
    /// The peer was told UNAUTHORIZED.
    Unauthorized,
    /// The peer took no answer within `write_timeout`.
    WriteTimeout,
    /// The server says why and closes.
    Notice(Code, String),
    /// The drain has said why.
    Told,
}

impl Session {
    /// Serves one peer, from its first byte to its last, on this thread. All
    /// of it is made here and freed here: what one thread allocates and a
    /// thousand others free stays with each of those, in the allocator's
    /// caches.
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
        let identity = shared.access.stranger(number.to_string(), from.ip(), encrypted, &listener.terms);
        let settings = &shared.settings;
        let drain = Arc::clone(&shared.drain);
        let connection = Arc::new(Connection::new(number, stream, from, identity.clone(), drain, &settings.memory));
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
            permit,
            shared,
        };
        session.run();
    }

    /// Serves until the end, and ends in order.
    fn run(mut self) {
        tracing::debug!(connection = self.connection.number(), peer = %self.connection.peer(), "connection accepted");
        // A defect outside of a request ends this connection, not the thread.
        let end = catch_unwind(AssertUnwindSafe(|| self.serve())).unwrap_or_else(|panic| {
            let error_id = log_panic(&*panic);
            End::Notice(Code::InternalError, format!("defect of the server, error id {error_id}"))
        });
        self.finish(&end);
        self.connection.traffic().end(&self.shared.metrics.ended);
    }

    fn serve(&mut self) -> End {
        // The drain may have passed by before this connection was to be seen.
        if self.connection.draining() && self.connection.close() {
            self.connection.opened();
            return End::Notice(Code::ShuttingDown, SHUTS_DOWN.into());
        }
        if let Err(end) = self.open() {
            return end;
        }
        loop {
            if let Err(end) = self.serve_what_is_whole() {
                return end;
            }
            match self.read() {
                Ok(0) if self.buffer.is_midway() => return End::Truncated,
                Ok(0) => return End::Peer,
                Ok(_) => {}
                Err(end) => return end,
            }
        }
    }

    /// Whatever comes before the protocol itself: for whom a load balancer
    /// speaks, the TLS handshake, and whom the certificate stands for.
    fn open(&mut self) -> Result<(), End> {
        let stream = self.connection.stream().clone();
        if self.listener.is_proxy(self.connection.peer().ip()) {
            let read = read_proxy_header(stream.socket(), self.handshake_until);
            match read.map_err(|error| End::Handshake("proxy-header", error.to_string()))? {
                Proxied::Balancer => {}
                Proxied::Peer(peer) => self.speaks_for(peer)?,
            }
        }
        if let Err(error) = stream.handshake(self.handshake_until) {
            return Err(End::Handshake(TlsFault::of(&error).as_str(), error.to_string()));
        }
        self.connection.opened();
        let principal = self.tls.as_ref().and_then(|tls| tls.principal(&stream.peer_certificates()?));
        if let Some(principal) = principal {
            self.is_now(self.shared.access.certified(&self.identity, &principal));
        }
        if self.identity.must_say() {
            self.buffer.set_max_message_size(MAX_MESSAGE_OF_STRANGERS.min(self.shared.settings.max_message_size));
        }
        Ok(())
    }

    fn speaks_for(&mut self, peer: SocketAddr) -> Result<(), End> {
        if !self.listener.lets_in(peer.ip()) {
            return Err(End::Denied);
        }
        self.connection.speaks_for(peer);
        let Identity { caller, .. } = &*self.identity;
        let (id, encrypted) = (caller.connection_id.clone(), caller.encrypted);
        let identity = self.shared.access.stranger(id, peer.ip(), encrypted, &self.listener.terms);
        self.connection.is_now(identity.clone());
        self.identity = Arc::new(identity);
        if self.permit.claim(peer.ip()) {
            return Ok(());
        }
        let message = format!("{} has as many connections as one address may", peer.ip());
        Err(if self.tls.is_some() { End::Denied } else { End::Notice(Code::ServerBusy, message) })
    }

    /// The peer has shown who it is.
    fn is_now(&mut self, identity: Identity) {
        let (connection, principal) = (self.connection.number(), &*identity.principal.name);
        tracing::debug!(connection, principal, "authenticated");
        self.identity = Arc::new(identity.clone());
        self.connection.is_now(identity);
        self.permit.is_known();
        self.buffer.set_max_message_size(self.shared.settings.max_message_size);
    }

    /// Serves every whole message in the buffer. Answers leave together, but
    /// for those that a slow call would keep waiting.
    fn serve_what_is_whole(&mut self) -> Result<(), End> {
        let (mut busy, mut waiting) = (false, 0_usize);
        loop {
            match self.buffer.next() {
                Ok(None) => break,
                Ok(Some(_)) if !busy && !self.connection.begin() => return Err(End::Told),
                Ok(Some(_)) if self.connection.draining() => {
                    // What was begun is answered; this message was not.
                    self.flush()?;
                    self.connection.close();
                    return Err(End::Notice(Code::ShuttingDown, SHUTS_DOWN.into()));
                }
                Ok(Some(Incoming::KeepAlive)) => {
                    busy = true;
                    self.connection.push_keep_alive();
                }
                Ok(Some(Incoming::Message { body, binary })) => {
                    busy = true;
                    waiting += 1;
                    // The next message's time begins when it is waited for. A
                    // keep-alive between two pieces gives no more time.
                    self.midway_since = None;
                    let answered = answer(&self.shared, &self.connection, &self.identity, body, binary, self.active);
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
            self.active = Instant::now();
            if !self.connection.rest() {
                return Err(End::Notice(Code::ShuttingDown, SHUTS_DOWN.into()));
            }
        }
        Ok(())
    }

    /// Waits for bytes: for the rest of a message until `read_timeout` after
    /// the thread began to wait for it, else until `idle_timeout`.
    fn read(&mut self) -> Result<usize, End> {
        self.room()?;
        let settings = &self.shared.settings;
        let midway = self.buffer.is_midway();
        self.connection.waits(midway);
        let deadline = if midway {
            *self.midway_since.get_or_insert_with(Instant::now) + settings.read_timeout
        } else {
            self.midway_since = None;
            self.active + settings.idle_timeout
        };
        // What has to come before anything else does not wait for silence.
        let hello = self.identity.must_say() && self.handshake_until < deadline;
        let deadline = if hello { self.handshake_until } else { deadline };
        match self.connection.stream().read(self.buffer.spare(), deadline) {
            Ok(count) => {
                self.buffer.advance(count);
                self.active = Instant::now();
                self.connection.heard(count, self.active);
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let (code, setting, timeout) = if hello {
                    (Code::ReadTimeout, "nobody said hello with a token", settings.handshake_timeout)
                } else if midway {
                    (Code::ReadTimeout, "a message was begun but not finished", settings.read_timeout)
                } else {
                    (Code::IdleTimeout, "nothing arrived", settings.idle_timeout)
                };
                Err(End::Notice(code, format!("{setting} within {} ms", timeout.as_millis())))
            }
            Err(error) => Err(End::Io(error)),
        }
    }

    /// Sees to it that there is memory for the next read. While the server
    /// has none it does not read, so no read deadline runs; it gives up after
    /// as long.
    fn room(&mut self) -> Result<(), End> {
        let settings = &self.shared.settings;
        let wanted = self.buffer.next_capacity().saturating_sub(settings.read_buffer_size);
        if wanted <= self.charge.held() {
            if wanted < self.charge.held() {
                self.charge.set(wanted);
            }
            return Ok(());
        }
        let begun = Instant::now();
        while !self.charge.raise_until(wanted, Instant::now() + LOOK_EVERY) {
            if self.connection.draining() || begun.elapsed() >= settings.read_timeout {
                self.answer_unread();
                self.flush()?;
                let message = format!(
                    "no memory for the rest of a message within {} ms; {} bytes of {} are taken",
                    begun.elapsed().as_millis(),
                    settings.memory.used(),
                    settings.memory.limit()
                );
                return Err(End::Notice(Code::ServerBusy, message));
            }
        }
        if let Some(since) = &mut self.midway_since {
            *since += begun.elapsed();
        }
        Ok(())
    }

    /// The request whose end can't be read was not begun, and is told so if
    /// its header line is there.
    fn answer_unread(&self) {
        let header = Header::parse(self.buffer.partial()).ok().map(|(header, _)| header);
        if header.is_some_and(|header| header.kind == Kind::Request && header.request_id.is_some()) {
            let body = ErrorBody::server(Code::ServiceUnavailable, "the server's memory is used up; nothing ran")
                .with_details(&serde_json::json!({"retryAfterMs": RETRY_WHEN_BUSY_MS}));
            self.connection.request_read();
            self.shared.metrics.count_error(Some(Code::ServiceUnavailable));
            self.connection.answer(&Reply::new(header, Outcome::Error(Some(Code::ServiceUnavailable), body)));
        }
    }

    fn flush(&self) -> Result<(), End> {
        let deadline = Instant::now() + self.shared.settings.write_timeout;
        self.connection.flush(deadline).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => End::WriteTimeout,
            _ => End::Io(error),
        })
    }

    /// Says the last word, if there is one, and sees to it that it is read.
    fn finish(&mut self, end: &End) {
        let connection = &self.connection;
        let (number, peer) = (connection.number(), connection.peer());
        let metrics = &self.shared.metrics;
        match end {
            End::Peer | End::Io(_) => {}
            End::Denied => metrics.denied.add(1),
            End::Handshake(reason, problem) => {
                // A balancer's health check may do no more than connect.
                let looked = *reason == TlsFault::Abandoned.as_str() && connection.traffic().bytes_in.get() == 0;
                metrics.handshake_failures.add(reason);
                static LINES: Limiter = Limiter::new();
                if !looked && LINES.allows("handshake failed") {
                    tracing::warn!(connection = number, %peer, reason, "handshake failed: {problem}");
                }
                // The peer shall read the alert, not a reset.
                connection.stream().half_close();
                self.shared.linger.take(connection.stream().clone());
            }
            End::Unauthorized => {
                if connection.close() {
                    connection.stream().half_close();
                    self.shared.linger.take(connection.stream().clone());
                }
            }
            End::Truncated => {
                metrics.truncated.add(1);
                static LINES: Limiter = Limiter::new();
                if LINES.allows("message cut off by the end of the stream") {
                    tracing::info!(connection = number, %peer, "message cut off by the end of the stream");
                }
            }
            End::WriteTimeout => metrics.write_timeouts.add(1),
            End::Told => self.leave(),
            End::Notice(code, message) => {
                // Where the drain was quicker, it has said it.
                if *code != Code::ShuttingDown && !connection.close() {
                    self.leave();
                } else {
                    metrics.count_error(Some(*code));
                    connection.push_notice(*code, message);
                    if self.flush().is_ok() {
                        connection.stream().half_close();
                        self.shared.linger.take(connection.stream().clone());
                    }
                }
            }
        }
        let millis = connection.age().as_millis();
        let requests = connection.traffic().messages_in.get();
        tracing::debug!(connection = number, %peer, millis, requests, "connection ended: {end}");
    }

    /// Somebody else has said the last word. Where it has left, this thread
    /// is not needed any more; else it reads and drops until the peer, or the
    /// drain, ends the stream.
    fn leave(&self) {
        if self.connection.send_last_word() {
            self.shared.linger.take(self.connection.stream().clone());
            return;
        }
        let deadline = Instant::now() + LINGER;
        let mut waste = vec![0; 64 * 1024];
        while self.connection.stream().read(&mut waste, deadline).is_ok_and(|count| count > 0) {}
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer => f.write_str("by the peer"),
            Self::Truncated => f.write_str("by the peer, inside a message"),
            Self::Io(error) => write!(f, "{error}"),
            Self::Handshake(reason, problem) => write!(f, "handshake failed, {reason}: {problem}"),
            Self::Denied => f.write_str("the peer's address is not let in"),
            Self::Unauthorized => f.write_str("the peer has not shown who it is"),
            Self::WriteTimeout => f.write_str("the peer took no answer"),
            Self::Notice(code, message) => write!(f, "{code}: {message}"),
            Self::Told => f.write_str(SHUTS_DOWN),
        }
    }
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

/// Has one message answered.
fn answer(
    shared: &Shared,
    connection: &Arc<Connection>,
    identity: &Arc<Identity>,
    body: &[u8],
    binary: bool,
    arrived: Instant,
) -> Answered {
    connection.request_read();
    let watch: Arc<dyn Watch> = Arc::<Connection>::clone(connection);
    let request = Request { body, binary, arrived, identity, watch };
    let mut reply = catch_unwind(AssertUnwindSafe(|| shared.handle.handle(request)))
        .unwrap_or_else(|panic| internal_error(body, &log_panic(&*panic)));
    if let Outcome::Error(code, body) = &reply.outcome {
        shared.metrics.count_error(*code);
        tracing::debug!(
            connection = connection.number(),
            request_id = reply.header.and_then(|header| header.request_id).unwrap_or("-"),
            code = %body.code,
            "answered with an error: {}",
            body.message
        );
    }
    let bytes = connection.answer(&reply);
    match (reply.identity.take(), reply.outcome) {
        (_, Outcome::Error(Some(Code::Unauthorized), _)) => Answered::Unauthorized,
        (Some(identity), _) => Answered::Known(bytes, Box::new(identity)),
        (None, _) => Answered::Bytes(bytes),
    }
}

/// Logs a panic under an id, and returns the id for the peer.
fn log_panic(panic: &(dyn Any + Send)) -> String {
    let error_id = uuid::Uuid::new_v4().to_string();
    static LINES: Limiter = Limiter::new();
    if LINES.allows("defect of the server") {
        tracing::error!(error_id, "defect of the server, please report it: {}", panic_text(panic));
    }
    error_id
}
