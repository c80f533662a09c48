//! A blocking client: connects, asks, waits for the answer.

use std::{
    fmt, io,
    net::TcpStream,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    transport::{Socket, SocketOptions, resolve},
    wire::{
        FrameError, Header, HeaderError, Incoming, Kind, Origin, Payload, Reassembly, Topic, Version,
        message::write_message,
    },
};

/// Largest answer that a client takes, in bytes: more than any server sends
/// (a payload of 64 MiB and a header line).
const MAX_ANSWER_SIZE: usize = 65 * 1024 * 1024;

/// How much longer than the request's own timeout the client waits, for the
/// answer to travel.
const GRACE: Duration = Duration::from_secs(2);

/// An open connection, used by one request at a time.
pub struct Client {
    socket: Socket,
    buffer: Reassembly,
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Service and action.
    pub topic: Topic<'a>,
    /// The version that the caller was written against.
    pub version: Version,
    /// Joins the answer to it; must not be in flight already.
    pub request_id: &'a str,
    /// How long the server may take.
    pub timeout: Duration,
    /// JSON or bytes.
    pub payload: Payload<'a>,
}

/// RESPONSE or ERROR.
#[derive(Debug, Clone)]
pub enum Answer {
    /// One JSON text.
    Json(String),
    /// Opaque bytes.
    Binary(Vec<u8>),
    /// The server or the service refuses.
    Error(Refusal),
}

/// Payload of an ERROR.
#[derive(Debug, Clone, Deserialize)]
pub struct Refusal {
    /// What went wrong, for a program.
    pub code: String,
    /// What went wrong, for a person.
    pub message: String,
    /// Whose code it is.
    pub origin: Origin,
    /// More of it.
    pub details: Option<Box<RawValue>>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum ClientError {
    /// No connection: nothing was sent.
    Connect {
        /// What was to be reached.
        server: String,
        /// Why it was not.
        source: io::Error,
    },
    /// Sending or receiving failed; the request may have been served.
    Io(io::Error),
    /// The server closed the connection without an answer; the request may
    /// have been served.
    Closed,
    /// What arrived is not this protocol.
    Protocol(String),
}

impl Client {
    /// Connects to `host:port`, trying all addresses of a name in turn.
    ///
    /// # Errors
    /// [`ClientError::Connect`] when none answers within the timeout.
    pub fn connect(server: &str, timeout: Duration) -> Result<Self, ClientError> {
        let error = |source| ClientError::Connect { server: server.to_owned(), source };
        let deadline = Instant::now() + timeout;
        let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "a server is HOST:PORT");
        let (host, port) = server.rsplit_once(':').ok_or_else(wrong).map_err(error)?;
        let port = port.parse().map_err(|_| error(wrong()))?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in resolve(host, port).map_err(error)? {
            let remaining = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, remaining) {
                Ok(stream) => {
                    let _ = SocketOptions { keep_alive: None, no_delay: true }.apply(&stream);
                    let buffer = Reassembly::new(MAX_ANSWER_SIZE, 8 * 1024);
                    return Ok(Self { socket: Socket::new(stream), buffer });
                }
                Err(refused) => last = refused,
            }
        }
        Err(error(last))
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// If none comes; see [`ClientError`] for whether the request may have
    /// been served.
    pub fn call(&mut self, request: &Request<'_>) -> Result<Answer, ClientError> {
        let Request { topic, version, request_id, timeout, payload } = *request;
        let header = Header {
            kind: Kind::Request,
            topic,
            version,
            request_id: Some(request_id),
            parent_request_id: None,
            timeout: Some(timeout),
        };
        let mut frame = Vec::new();
        write_message(&mut frame, &header, payload);
        let deadline = Instant::now() + timeout + GRACE;
        // A server that refuses before it has read everything has said why.
        let sent = self.socket.write_all(&frame, deadline);
        match (sent, self.receive(request_id, deadline)) {
            (Err(error), Err(_)) => Err(ClientError::Io(error)),
            (_, received) => received,
        }
    }

    fn receive(&mut self, request_id: &str, deadline: Instant) -> Result<Answer, ClientError> {
        loop {
            while let Some(incoming) = self.buffer.next()? {
                let Incoming::Message { body, binary } = incoming else { continue };
                let (header, payload) = Header::parse(body)?;
                // What names no request concerns all of them.
                if header.request_id.is_none_or(|id| id == request_id) {
                    return read_answer(&header, payload, binary);
                }
            }
            let count = self.socket.read(self.buffer.spare(), deadline)?;
            if count == 0 {
                return Err(ClientError::Closed);
            }
            self.buffer.advance(count);
        }
    }
}

fn read_answer(header: &Header<'_>, payload: &[u8], binary: bool) -> Result<Answer, ClientError> {
    let text = || std::str::from_utf8(payload).map_err(|e| ClientError::Protocol(e.to_string()));
    match header.kind {
        Kind::Response if binary => Ok(Answer::Binary(payload.to_vec())),
        Kind::Response => Ok(Answer::Json(text()?.to_owned())),
        Kind::Error => {
            serde_json::from_str(text()?).map(Answer::Error).map_err(|e| ClientError::Protocol(e.to_string()))
        }
        Kind::Request | Kind::Publish => {
            Err(ClientError::Protocol(format!("a server does not send {}", header.kind.as_str())))
        }
    }
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl From<HeaderError> for ClientError {
    fn from(error: HeaderError) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { server, source } => {
                write!(f, "can't reach {server}: {source}")?;
                match source.kind() {
                    io::ErrorKind::ConnectionRefused => {
                        f.write_str("; is the server running? `mb-server serve` starts one, --server names another")
                    }
                    _ => Ok(()),
                }
            }
            Self::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
                f.write_str("no answer within the timeout; the request may have been served")
            }
            Self::Io(error) => write!(f, "connection lost: {error}; the request may have been served"),
            Self::Closed => {
                f.write_str("the server closed the connection without an answer; the request may have been served")
            }
            Self::Protocol(error) => write!(f, "what answers there does not speak this protocol: {error}"),
        }
    }
}

impl std::error::Error for ClientError {}
