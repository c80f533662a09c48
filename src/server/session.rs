//! What a connection's thread does: read, take whole messages out, have them
//! answered, write; until one side ends it, or until a call takes long: then
//! another thread goes on, and this one leaves when the call has its answer.

use std::{
    any::Any,
    cell::{Cell, OnceCell, RefCell},
    fmt, io,
    net::SocketAddr,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    ListenerSettings, SHUTS_DOWN, Shared,
    admission::{Permit, Spare},
    connection::{Connection, RETRY_WHEN_BUSY_MS},
    linger::LINGER,
    running::Listed,
};
use crate::{
    access::Identity,
    budget::Charge,
    dispatch::{Outcome, Reply, Request, internal_error},
    host::{Stop, Watch},
    log::{Limiter, panic_text},
    transport::{Proxied, ServerTls, Socket, Stream, TlsFault, read_proxy_header},
    wire::{Code, ErrorBody, FrameError, Header, Kind, Reassembly, Taken},
};

/// How long a connection that waits for memory may go without looking at the
/// drain.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Largest message of a peer that has to say who it is and has not, in bytes.
const MAX_MESSAGE_OF_STRANGERS: usize = 16 * 1024;

/// Ticks of the sandbox, a millisecond each, that a call sees before another
/// thread goes on with its connection: so it has taken 1 to 2 ms.
const TICKS_UNTIL_SLOW: u32 = 2;

scoped_tls::scoped_thread_local! {
    /// What this thread serves a message of. A call's watch is asked on the
    /// thread of the call, deep inside of it, and finds its session here.
    static SERVED: Session
}

/// Our state machine over one connection, as far as one thread has it.
pub(super) struct Session {
    shared: Arc<Shared>,
    listener: Arc<ListenerSettings>,
    connection: Arc<Connection>,
    /// What TLS was when the connection came.
    tls: Option<Arc<ServerTls>>,
    permit: Arc<Permit>,
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

/// Why a session is over.
#[derive(Debug)]
pub(super) enum End {
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
    /// Not the session, but this thread's part in it.
    Relieved,
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
            permit: Arc::new(permit),
            shared,
            ticks: Cell::new(0),
            at_hand: Cell::default(),
            listed: RefCell::default(),
            relieved: OnceCell::new(),
        };
        session.run(Self::serve);
    }

    /// Serves until the end. The last thread to leave ends the connection in
    /// order.
    fn run(mut self, serve: fn(&mut Self) -> End) {
        // A defect outside of a request ends this connection, not the thread.
        let end = catch_unwind(AssertUnwindSafe(|| serve(&mut self))).unwrap_or_else(|panic| {
            let error_id = log_panic(&*panic);
            End::Notice(Code::InternalError, format!("defect of the server, error id {error_id}"))
        });
        if !matches!(end, End::Relieved) {
            self.connection.ends(end);
            if self.relieved.get().is_some() {
                // The thread that reads hears of it.
                self.connection.stream().stop_reading();
            }
        }
        if self.connection.phase().detach() {
            if let Some(end) = self.connection.end() {
                self.finish(end);
            }
            self.connection.traffic().end(&self.shared.metrics.ended);
        }
    }

    fn serve(&mut self) -> End {
        tracing::debug!(connection = self.connection.number(), peer = %self.connection.peer(), "connection accepted");
        // The drain may have passed by before this connection was to be seen.
        if self.connection.draining() && self.connection.phase().close() {
            self.connection.opened();
            return End::Notice(Code::ShuttingDown, SHUTS_DOWN.into());
        }
        if let Err(end) = self.open() {
            return end;
        }
        self.serve_on()
    }

    fn serve_on(&mut self) -> End {
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
            match self.buffer.take() {
                Ok(None) => break,
                Ok(Some(_)) if !busy && !self.connection.phase().begin() => return Err(End::Told),
                Ok(Some(_)) if self.connection.draining() => {
                    // What was begun is answered; this message was not.
                    self.flush()?;
                    self.connection.phase().close();
                    return Err(End::Notice(Code::ShuttingDown, SHUTS_DOWN.into()));
                }
                Ok(Some(Taken::KeepAlive)) => {
                    busy = true;
                    self.connection.push_keep_alive();
                }
                Ok(Some(Taken::Message { body, binary })) => {
                    busy = true;
                    waiting += 1;
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
            self.active = Instant::now();
            let phase = self.connection.phase();
            if phase.rest() && self.connection.draining() && phase.close() {
                return Err(End::Notice(Code::ShuttingDown, SHUTS_DOWN.into()));
            }
        }
        Ok(())
    }

    /// Another thread goes on while this one is in a slow call, if there is
    /// one and the bound of calls at the same time allows it.
    fn hand_over(&self) {
        let phase = self.connection.phase();
        if self.relieved.get().is_some()
            || self.connection.draining()
            || phase.attached() as usize >= self.shared.settings.max_in_flight
        {
            return;
        }
        let settings = &self.shared.settings;
        let buffer = self.buffer.split();
        let mut charge = Charge::none(&settings.memory);
        charge.set(buffer.capacity().saturating_sub(settings.read_buffer_size));
        let next = Self {
            buffer,
            charge,
            shared: Arc::clone(&self.shared),
            listener: Arc::clone(&self.listener),
            connection: Arc::clone(&self.connection),
            tls: self.tls.clone(),
            permit: Arc::clone(&self.permit),
            identity: Arc::clone(&self.identity),
            handshake_until: self.handshake_until,
            active: self.active,
            midway_since: None,
            ticks: Cell::new(0),
            at_hand: Cell::default(),
            listed: RefCell::default(),
            relieved: OnceCell::new(),
        };
        phase.attach();
        match self.permit.relieve(move || next.run(Self::serve_on)) {
            Some(spare) => drop(self.relieved.set(spare)),
            // This thread stays attached, so it is not the last one that goes.
            None => drop(phase.detach()),
        }
    }

    /// Shows the call at hand to whoever looks, and says whether the operator
    /// wants it stopped.
    fn list(&self, waits: bool) -> bool {
        let mut listed = self.listed.borrow_mut();
        let listed = listed.get_or_insert_with(|| {
            let (begin, end) = self.at_hand.get();
            let header = Header::parse(self.buffer.message(begin..end)).ok().map(|(header, _)| header);
            let principal = self.identity.caller.principal.clone();
            let timeout = self.shared.settings.default_timeout;
            self.shared.running.list(self.connection.number(), header.as_ref(), principal, self.active, timeout)
        });
        listed.call.waits(waits);
        listed.call.is_killed()
    }

    /// The slow call has its answer; the connection is another thread's.
    fn leave_behind(&self) -> End {
        self.connection.answered();
        if let Err(end) = self.flush() {
            return end;
        }
        let told = |connection: &Connection| connection.tell_if_quiet(Code::ShuttingDown, SHUTS_DOWN);
        if self.connection.phase().rest() && self.connection.draining() && told(&self.connection) {
            // As the drain does where nobody is busy; the other thread reads.
            self.shared.metrics.count_error(Some(Code::ShuttingDown));
            self.connection.send_last_word();
        }
        End::Relieved
    }

    /// Waits for bytes: for the rest of a message until `read_timeout` after
    /// the thread began to wait for it, else until `idle_timeout`.
    fn read(&mut self) -> Result<usize, End> {
        loop {
            let read = self.read_once();
            // Answers that come later than this thread has read count too.
            if !matches!(read, Err(End::Notice(Code::IdleTimeout, _))) {
                return read;
            }
            let now = Instant::now();
            let busy = self.connection.phase().attached() > 1;
            let since = if busy { now } else { self.connection.last_answer() };
            if since + self.shared.settings.idle_timeout <= now {
                return read;
            }
            self.active = since;
        }
    }

    fn read_once(&mut self) -> Result<usize, End> {
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
            self.connection.answer(header.as_ref(), Outcome::Error(Some(Code::ServiceUnavailable), body));
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
    fn finish(&self, end: &End) {
        let connection = &self.connection;
        let (number, peer) = (connection.number(), connection.peer());
        let metrics = &self.shared.metrics;
        match end {
            End::Peer | End::Io(_) | End::Relieved => {}
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
                if connection.phase().close() {
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
                if *code != Code::ShuttingDown && !connection.phase().close() {
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
            Self::Relieved => f.write_str("another thread has it"),
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

impl Session {
    /// Has one message answered.
    fn answer(&self, body: Range<usize>, binary: bool) -> Answered {
        let Self { shared, connection, identity, .. } = self;
        let body = self.buffer.message(body);
        connection.request_read();
        let watch: Arc<dyn Watch> = Arc::<Connection>::clone(connection);
        let request = Request { body, binary, arrived: self.active, identity, watch };
        let Reply { header, outcome, identity } = catch_unwind(AssertUnwindSafe(|| shared.handle.handle(request)))
            .unwrap_or_else(|panic| internal_error(body, &log_panic(&*panic)));
        let mut unauthorized = false;
        if let Outcome::Error(code, body) = &outcome {
            unauthorized = *code == Some(Code::Unauthorized);
            shared.metrics.count_error(*code);
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

/// While a call takes long, neither the answers before it nor the requests
/// after it shall wait for it.
impl Watch for Connection {
    fn tick(&self) -> Option<Stop> {
        let killed = served(|session| {
            session.ticks.set(session.ticks.get() + 1);
            if session.ticks.get() >= TICKS_UNTIL_SLOW {
                session.hand_over();
            }
            session.list(false)
        });
        self.send_early();
        let killed = killed.unwrap_or(false).then_some(Stop::Killed);
        killed.or_else(|| self.calls_stopped().then_some(Stop::Shutdown))
    }

    fn waits(&self) {
        served(|session| {
            session.hand_over();
            session.list(true);
        });
        self.send_early();
    }
}

/// With what this thread serves; nothing in a test of a part.
fn served<R>(act: impl FnOnce(&Session) -> R) -> Option<R> {
    SERVED.is_set().then(|| SERVED.with(act))
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
