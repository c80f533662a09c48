//! What is shared about one connection: with its thread, with the drain and
//! with whoever looks. Reading belongs to the thread alone; writing goes
//! through the outbox, so that another may write while the thread reads.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;

use super::{
    DrainFlags,
    outbox::{LARGE, Outbox},
    phase::Phase,
    session::End,
};
use crate::{
    access::Identity,
    budget::Budget,
    dispatch::Outcome,
    metrics::{Traffic, snapshot::ConnectionRow},
    transport::Stream,
    wire::{
        Code, ErrorBody, Header, Kind,
        frame::KEEPALIVE_FRAME,
        message::{write_error, write_head, write_message_bytes as write_message},
    },
};

/// What a client that is sent away is told to wait, in milliseconds.
pub(super) const RETRY_WHEN_BUSY_MS: u64 = 1000;

/// What a peer is told that is sent away in order: what it asked before is
/// answered, and nothing is begun any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Farewell {
    pub(super) code: Code,
    pub(super) message: &'static str,
}

impl Farewell {
    pub(super) const SHUTDOWN: Self = Self {
        code: Code::ShuttingDown,
        message: "the server shuts down",
    };
    pub(super) const CLOSED: Self = Self {
        code: Code::ShuttingDown,
        message: "the operator closes this connection",
    };
    pub(super) const PRINCIPAL_CLOSED: Self = Self {
        code: Code::Unauthorized,
        message: "the operator closes the connections of this principal",
    };
    pub(super) const TOO_OLD: Self = Self {
        code: Code::ShuttingDown,
        message: "this connection is as old as connection_max_age allows",
    };
}

/// One connection.
pub(crate) struct Connection {
    number: u64,
    /// Who connected; a load balancer may speak for somebody else.
    from: SocketAddr,
    /// For whom that one speaks.
    peer: OnceLock<SocketAddr>,
    since: (Instant, SystemTime),
    identity: ArcSwap<Identity>,
    /// There is nothing to be said to the peer before the handshake is done.
    open: AtomicBool,
    /// Microseconds from `since` to the end of the last request.
    last_request: AtomicU64,
    traffic: Traffic,
    /// Milliseconds from `since` to the last byte that arrived.
    last_activity: AtomicU64,
    in_flight: AtomicU64,
    midway: AtomicBool,
    phase: Phase,
    /// Why it ends, as whoever found out first says.
    end: OnceLock<End>,
    drain: Arc<DrainFlags>,
    /// Why this one is closed, although the server goes on.
    dismissed: OnceLock<Farewell>,
    stream: Stream,
    outbox: Mutex<Outbox>,
}

impl Connection {
    pub(super) fn new(
        number: u64,
        stream: Stream,
        from: SocketAddr,
        identity: Identity,
        drain: Arc<DrainFlags>,
        memory: &Arc<Budget>,
    ) -> Self {
        Self {
            number,
            from,
            peer: OnceLock::new(),
            since: (Instant::now(), SystemTime::now()),
            identity: ArcSwap::from_pointee(identity),
            open: AtomicBool::new(false),
            last_request: AtomicU64::new(0),
            traffic: Traffic::default(),
            last_activity: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            midway: AtomicBool::new(false),
            phase: Phase::new(),
            end: OnceLock::new(),
            drain,
            dismissed: OnceLock::new(),
            stream,
            outbox: Mutex::new(Outbox::new(memory)),
        }
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// For whom the connection speaks, as far as it is known.
    pub(super) fn peer(&self) -> SocketAddr {
        *self.peer.get().unwrap_or(&self.from)
    }

    /// A load balancer has said for whom it speaks.
    pub(super) fn speaks_for(&self, peer: SocketAddr) {
        let _ = self.peer.set(peer);
    }

    pub(super) fn is_now(&self, identity: Identity) {
        self.identity.store(Arc::new(identity));
    }

    /// The handshake is done: what is said from here on is the protocol.
    pub(super) fn opened(&self) {
        self.open.store(true, SeqCst);
    }

    /// How long a peer that has not shown who it is has asked nothing.
    pub(super) fn idle_as_stranger(&self) -> Option<Duration> {
        let quiet = self.phase.is_quiet() && !self.identity.load().is_known();
        quiet.then(|| self.last_answer().elapsed())
    }

    /// When the last request was answered; when it came, before.
    pub(super) fn last_answer(&self) -> Instant {
        self.since.0 + Duration::from_micros(self.last_request.load(Relaxed))
    }

    /// Sends a stranger away for somebody else; says whether that was to be.
    pub(super) fn evict(&self) -> bool {
        let message = "this connection makes room for others, as the one that was idle for longest";
        let told = self.tell_if_quiet(Code::ServerBusy, message);
        if told {
            self.send_last_word();
            // Whoever waits for it wakes up and leaves.
            self.stream.stop_reading();
        }
        told
    }

    pub(super) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// When it was accepted.
    pub(super) fn begun(&self) -> Instant {
        self.since.0
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(SeqCst)
    }

    pub(super) fn age(&self) -> Duration {
        self.since.0.elapsed()
    }

    /// Bytes arrived.
    pub(super) fn heard(&self, count: usize, now: Instant) {
        self.traffic.bytes_in.add(count as u64);
        let millis = now.saturating_duration_since(self.since.0).as_millis();
        self.last_activity
            .store(u64::try_from(millis).unwrap_or(u64::MAX), Relaxed);
    }

    /// The thread is about to wait, for the rest of a message or for a new one.
    pub(super) fn waits(&self, midway: bool) {
        self.midway.store(midway, Relaxed);
    }

    /// Who is busy on it.
    pub(super) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Why it ends; the first one counts.
    pub(super) fn ends(&self, end: End) {
        let _ = self.end.set(end);
    }

    pub(super) fn end(&self) -> Option<&End> {
        self.end.get()
    }

    /// All that there was is answered, and the answers are about to leave: the
    /// peer's idle time begins before it can have seen them.
    pub(super) fn answered(&self) {
        let micros = self.since.0.elapsed().as_micros();
        self.last_request
            .store(u64::try_from(micros).unwrap_or(u64::MAX), Relaxed);
    }

    /// Whether no further call shall be begun.
    pub(super) fn draining(&self) -> bool {
        self.farewell().is_some()
    }

    /// What the peer is told, once no further call shall be begun.
    pub(super) fn farewell(&self) -> Option<Farewell> {
        let dismissed = self.dismissed.get().copied();
        dismissed.or_else(|| self.drain.draining().then_some(Farewell::SHUTDOWN))
    }

    /// No further call shall be begun; whoever serves it says why, the first
    /// reason counts.
    pub(super) fn retire(&self, why: Farewell) {
        let _ = self.dismissed.set(why);
    }

    /// The principal that it speaks for.
    pub(super) fn is_of(&self, principal: &str) -> bool {
        self.identity.load().principal.name == principal
    }

    /// The operator's part: as the drain for this connection alone. Says
    /// whether the peer was told; where somebody is busy, that one tells it.
    pub(super) fn dismiss(&self, why: Farewell) -> bool {
        // As with the drain: the flag first, then the look who is busy.
        self.retire(why);
        let told = self.tell_if_quiet(why.code, why.message);
        if told {
            self.send_last_word();
            // Whoever waits for it wakes up and leaves.
            self.stream.stop_reading();
        }
        told
    }

    /// The drain's part: takes the last word if nobody calls, and says whether
    /// it did. It is then sent by [`Connection::send_last_word`]; the thread
    /// goes on to read, until the peer ends the stream.
    pub(super) fn tell_if_quiet(&self, code: Code, message: &str) -> bool {
        let told = self.phase.tell();
        if told && self.open.load(SeqCst) {
            self.push_notice(code, message);
        }
        told
    }

    /// Sends of the last word what the peer's system takes without waiting;
    /// says whether there is nothing left to send.
    pub(super) fn send_last_word(&self) -> bool {
        let mut outbox = self.outbox();
        self.send_some(&mut outbox);
        let done = outbox.broken || outbox.is_empty() && !self.stream.has_unsent();
        if done {
            self.stream.half_close();
        }
        done
    }

    /// Ends the connection of a peer that was told by the drain and does not
    /// end it itself. One whose thread says the last word is left to that.
    pub(super) fn cut_off_if_told(&self) {
        if self.phase.is_told() {
            self.stream.shut_down();
        }
    }

    /// A request was read.
    pub(super) fn request_read(&self) {
        self.traffic.messages_in.add(1);
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// Puts an answer into the outbox; says how many bytes wait there.
    pub(super) fn answer(&self, header: Option<&Header<'_>>, outcome: Outcome) -> usize {
        let mut outbox = self.outbox();
        match (outcome, header) {
            (Outcome::Silence, _) | (Outcome::Json(_) | Outcome::Binary(_), None) => {
                self.in_flight.fetch_sub(1, Relaxed);
                return outbox.len();
            }
            (Outcome::Json(text), Some(header)) => {
                respond(&mut outbox, header, text.into_bytes(), false)
            }
            (Outcome::Binary(bytes), Some(header)) => respond(&mut outbox, header, bytes, true),
            (Outcome::Error(_, body), header) => {
                self.traffic.errors.add(1);
                write_error(outbox.end(), header, &body, SystemTime::now());
            }
        }
        self.traffic.messages_out.add(1);
        self.in_flight.fetch_sub(1, Relaxed);
        outbox.recharge();
        outbox.len()
    }

    /// Puts a frame into the outbox as it is; returns how many bytes wait there.
    pub(super) fn push(&self, frame: &[u8]) -> usize {
        let mut outbox = self.outbox();
        outbox.end().extend_from_slice(frame);
        outbox.recharge();
        outbox.len()
    }

    /// Puts the last word into the outbox.
    pub(super) fn push_notice(&self, code: Code, message: &str) {
        let wait = (code == Code::ServerBusy).then_some(RETRY_WHEN_BUSY_MS);
        self.push_refusal(code, message, wait);
    }

    /// The same, with the milliseconds after which the peer may come again.
    pub(super) fn push_refusal(&self, code: Code, message: &str, retry_after: Option<u64>) {
        let details = retry_after.map(|millis| serde_json::json!({"retryAfterMs": millis}));
        self.push(&notice(code, message, details.as_ref()));
        self.traffic.messages_out.add(1);
        self.traffic.errors.add(1);
    }

    /// Answers one keep-alive; returns how many bytes wait to be sent.
    pub(super) fn push_keep_alive(&self) -> usize {
        self.traffic.keep_alives.add(1);
        self.push(&KEEPALIVE_FRAME)
    }

    /// Sends all that waits; calls `before_waiting` if the peer's system does
    /// not take it at once.
    pub(super) fn flush(&self, deadline: Instant, before_waiting: impl FnOnce()) -> io::Result<()> {
        let mut outbox = self.outbox();
        if outbox.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let flushed = self.send_all(&mut outbox, deadline, before_waiting);
        if flushed.is_err() {
            outbox.broken = true;
            outbox.clear();
        }
        flushed
    }

    fn send_all(
        &self,
        outbox: &mut Outbox,
        deadline: Instant,
        before_waiting: impl FnOnce(),
    ) -> io::Result<()> {
        let mut before_waiting = Some(before_waiting);
        while !outbox.is_empty() {
            let mut sent = 0;
            if before_waiting.is_some() && !self.stream.is_encrypted() {
                sent = self.stream.try_write(outbox.next())?;
            }
            if sent == 0 {
                if let Some(before_waiting) = before_waiting.take() {
                    before_waiting();
                }
                sent = self.stream.write(outbox.next(), deadline)?;
            }
            self.traffic.bytes_out.add(sent as u64);
            outbox.advance(sent);
        }
        self.stream.flush(deadline)
    }

    /// The same of what waits, if nobody is writing just now.
    pub(super) fn send_early(&self) {
        if let Ok(mut outbox) = self.outbox.try_lock() {
            self.send_some(&mut outbox);
        }
    }

    /// Whether calls that still run are to be stopped.
    pub(super) fn calls_stopped(&self) -> bool {
        self.drain.calls_stopped()
    }

    /// Sends what the peer's system takes without waiting.
    fn send_some(&self, outbox: &mut Outbox) {
        let waits = !outbox.is_empty() || self.stream.has_unsent();
        if waits && !outbox.broken {
            match self.stream.try_write(outbox.next()) {
                Ok(sent) => {
                    self.traffic.bytes_out.add(sent as u64);
                    outbox.advance(sent);
                }
                Err(_) => outbox.broken = true,
            }
        }
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        // A panic between two frames leaves whole frames.
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy for whoever looks.
    pub(super) fn row(&self) -> ConnectionRow {
        let Traffic {
            bytes_in,
            bytes_out,
            messages_in,
            messages_out,
            keep_alives: _,
            errors,
            ..
        } = &self.traffic;
        let state = match () {
            () if self.phase.is_busy() => "calling",
            () if self.phase.is_closing() => "closing",
            () if !self.open.load(Relaxed) => "handshake",
            () if self.midway.load(Relaxed) => "reading",
            () => "idle",
        };
        let last_activity = self.since.1 + Duration::from_millis(self.last_activity.load(Relaxed));
        let identity = self.identity.load();
        let socket = self.stream.socket().stream();
        let text = |time| humantime::format_rfc3339_millis(time).to_string();
        ConnectionRow {
            id: identity.caller.connection_id.clone(),
            peer: self.peer().to_string(),
            ends: socket.local_addr().ok().zip(socket.peer_addr().ok()),
            principal: identity.caller.principal.clone(),
            tls: self.stream.tls_version(),
            state,
            since: text(self.since.1),
            last_activity: text(last_activity),
            bytes_in: bytes_in.get(),
            bytes_out: bytes_out.get(),
            messages_in: messages_in.get(),
            messages_out: messages_out.get(),
            in_flight: self.in_flight.load(Relaxed),
            errors: errors.get(),
        }
    }
}

/// The header of a RESPONSE to this request.
fn answers<'a>(request: &Header<'a>) -> Header<'a> {
    Header {
        kind: Kind::Response,
        parent_request_id: None,
        timeout: None,
        ..*request
    }
}

/// Puts a RESPONSE where it waits; a large payload is not copied once more.
fn respond(outbox: &mut Outbox, request: &Header<'_>, payload: Vec<u8>, binary: bool) {
    let header = answers(request);
    if payload.len() < LARGE {
        write_message(outbox.end(), &header, &payload, binary);
    } else {
        write_head(outbox.end(), &header, payload.len(), binary);
        outbox.push(payload);
    }
}

/// An ERROR that answers no request.
pub(super) fn notice(code: Code, message: &str, details: Option<&serde_json::Value>) -> Vec<u8> {
    let mut body = ErrorBody::server(code, message.to_owned());
    if let Some(details) = details {
        body = body.with_details(details);
    }
    let mut frame = Vec::new();
    write_error(&mut frame, None, &body, SystemTime::now());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{Access, Terms},
        config::{Auth, Principals},
        transport::Socket,
    };
    use std::{
        io::Read as _,
        net::{TcpListener, TcpStream},
    };

    fn pair() -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let (stream, address) = listener.accept().unwrap();
        let access = Access::new(Principals::new(), "/nowhere/tokens.json".into(), 1).unwrap();
        let terms = Arc::new(Terms {
            auth: Auth::None,
            rights: None,
            allow_unsecure: false,
        });
        let identity = access.stranger("1".into(), address.ip(), false, &terms);
        let stream = Stream::plain(Socket::new(stream));
        let drain = Arc::new(DrainFlags::new().unwrap());
        let connection = Connection::new(1, stream, address, identity, drain, &Budget::new(0));
        connection.opened();
        (connection, peer)
    }

    #[test]
    fn a_peer_without_room_is_told_when_it_has_some() {
        let (connection, mut peer) = pair();
        let waste = vec![0; 1 << 20];
        let mut filled = 0;
        loop {
            match connection.stream.try_write(&waste).unwrap() {
                0 => break,
                sent => filled += sent,
            }
        }
        assert!(connection.tell_if_quiet(Code::ShuttingDown, "the end"));
        assert!(
            !connection.tell_if_quiet(Code::ShuttingDown, "the end"),
            "once"
        );
        assert!(!connection.phase.begin() && !connection.phase.close());
        assert!(!connection.send_last_word(), "there is no room");
        assert_eq!(connection.traffic.bytes_out.get(), 0, "nothing was written");
        let reader = std::thread::spawn(move || {
            let mut read = Vec::new();
            peer.read_to_end(&mut read).unwrap();
            read
        });
        while !connection.send_last_word() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let read = reader.join().unwrap();
        let word = notice(Code::ShuttingDown, "the end", None);
        assert_eq!(read.len(), filled + word.len());
        assert!(read.ends_with(b"}") && read[filled..].windows(7).any(|text| text == b"the end"));
        assert_eq!(connection.traffic.bytes_out.get(), word.len() as u64);
    }

    #[test]
    fn the_drain_cuts_off_those_that_it_told_and_nobody_else() {
        let cut_off = |connection: &Connection, mut peer: TcpStream| {
            connection.cut_off_if_told();
            peer.set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            peer.read_to_end(&mut Vec::new()).is_ok()
        };
        let (connection, peer) = pair();
        assert!(connection.tell_if_quiet(Code::ShuttingDown, "the end"));
        assert!(cut_off(&connection, peer));
        let (connection, peer) = pair();
        assert!(connection.phase.close());
        assert!(!cut_off(&connection, peer), "its thread still speaks");
        let (connection, peer) = pair();
        assert!(!cut_off(&connection, peer));
    }

    #[test]
    fn bytes_that_nobody_took_are_not_counted_as_written() {
        let (connection, mut peer) = pair();
        connection.push(&vec![0; 16 << 20]);
        let deadline = Instant::now() + Duration::from_millis(100);
        assert_eq!(
            connection.flush(deadline, || ()).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        connection.stream.shut_down();
        let mut read = Vec::new();
        let _ = peer.read_to_end(&mut read);
        assert_eq!(connection.traffic.bytes_out.get(), read.len() as u64);
    }
}
