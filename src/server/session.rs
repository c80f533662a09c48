//! What a connection's thread does: read, take whole messages out, have them
//! answered, write; until one side ends it.

use std::{
    any::Any,
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    SHUTS_DOWN, Shared,
    connection::{Connection, RETRY_WHEN_BUSY_MS},
    linger::LINGER,
};
use crate::{
    budget::Charge,
    dispatch::{Outcome, Reply, Request, internal_error},
    host::Watch,
    log::{Limiter, panic_text},
    transport::half_close,
    wire::{Code, ErrorBody, FrameError, Header, Incoming, Kind, Reassembly},
};

/// How long a connection that waits for memory may go without looking at the
/// drain.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Our state machine over one connection.
pub(super) struct Session {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
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
    /// The peer took no answer within `write_timeout`.
    WriteTimeout,
    /// The server says why and closes.
    Notice(Code, String),
    /// The drain has said why.
    Told,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>, connection: Arc<Connection>) -> Self {
        let settings = &shared.settings;
        let buffer = Reassembly::new(settings.max_message_size, settings.read_buffer_size);
        let charge = Charge::none(&settings.memory);
        Self { buffer, connection, active: Instant::now(), midway_since: None, charge, shared }
    }

    /// Serves until the end, and ends in order.
    pub(super) fn run(mut self) {
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
            return End::Notice(Code::ShuttingDown, SHUTS_DOWN.into());
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
                    let bytes = answer(&self.shared, &self.connection, body, binary, self.active);
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
        match self.connection.socket().read(self.buffer.spare(), deadline) {
            Ok(count) => {
                self.buffer.advance(count);
                self.active = Instant::now();
                self.connection.heard(count, self.active);
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let (code, setting, timeout) = if midway {
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
            self.connection.answer(&Reply { header, outcome: Outcome::Error(Some(Code::ServiceUnavailable), body) });
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
            End::Truncated => {
                metrics.truncated.add(1);
                static LINES: Limiter = Limiter::new();
                if LINES.allows("message cut off by the end of the stream") {
                    tracing::info!(connection = number, %peer, "message cut off by the end of the stream");
                }
            }
            End::WriteTimeout => metrics.write_timeouts.add(1),
            End::Told => self.discard(),
            End::Notice(code, message) => {
                // Where the drain was quicker, it has said it.
                if *code != Code::ShuttingDown && !connection.close() {
                    self.discard();
                } else {
                    metrics.count_error(Some(*code));
                    connection.push_notice(*code, message);
                    if self.flush().is_ok() {
                        half_close(connection.socket().stream());
                        self.shared.linger.take(connection.socket().clone());
                    }
                }
            }
        }
        let millis = connection.age().as_millis();
        let requests = connection.traffic().messages_in.get();
        tracing::debug!(connection = number, %peer, millis, requests, "connection ended: {end}");
    }

    /// Reads and drops until the peer, or the drain, ends the stream.
    fn discard(&self) {
        let deadline = Instant::now() + LINGER;
        let mut waste = vec![0; 64 * 1024];
        while self.connection.socket().read(&mut waste, deadline).is_ok_and(|count| count > 0) {}
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer => f.write_str("by the peer"),
            Self::Truncated => f.write_str("by the peer, inside a message"),
            Self::Io(error) => write!(f, "{error}"),
            Self::WriteTimeout => f.write_str("the peer took no answer"),
            Self::Notice(code, message) => write!(f, "{code}: {message}"),
            Self::Told => f.write_str(SHUTS_DOWN),
        }
    }
}

/// Has one message answered; says how many bytes wait to leave.
fn answer(shared: &Shared, connection: &Arc<Connection>, body: &[u8], binary: bool, arrived: Instant) -> usize {
    connection.request_read();
    let watch: Arc<dyn Watch> = Arc::<Connection>::clone(connection);
    let request = Request { body, binary, arrived, caller: connection.caller(), watch };
    let reply = catch_unwind(AssertUnwindSafe(|| shared.handle.handle(request)))
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
    connection.answer(&reply)
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
