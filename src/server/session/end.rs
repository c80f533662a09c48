//! Why a session is over, and what is said last.

use std::{
    fmt, io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::Session;
use crate::{
    dispatch::TOO_MANY_FAILURES,
    log::{AUDIT, Limiter},
    server::{connection::Farewell, linger::LINGER},
    transport::TlsFault,
    wire::Code,
};

/// Why a session is over.
#[derive(Debug)]
pub(in crate::server) enum End {
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
    /// The peer's address has failed to authenticate too often; when there
    /// will be another chance.
    Throttled(Duration),
    /// The server says why and closes.
    Notice(Code, String),
    /// The same, where the last word is this thread's already.
    Farewell(Farewell),
    /// The drain has said why.
    Told,
    /// Not the session, but this thread's part in it.
    Relieved,
}

/// A peer whose address is not let in was closed without a word.
pub(in crate::server) fn tell_denied(peer: SocketAddr) {
    static LINES: Limiter = Limiter::audit();
    if LINES.allows("address not let in") {
        tracing::warn!(target: AUDIT, security = "address", %peer, "address not let in");
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
            Self::Throttled(_) => f.write_str(TOO_MANY_FAILURES),
            Self::Farewell(Farewell { code, message }) => write!(f, "{code}: {message}"),
            Self::Told => f.write_str("the peer was told why"),
            Self::Relieved => f.write_str("another thread has it"),
        }
    }
}

impl Session {
    /// Says the last word, if there is one, and sees to it that it is read.
    pub(super) fn finish(&self, end: &End) {
        let connection = &self.connection;
        let (number, peer) = (connection.number(), connection.peer());
        let metrics = &self.shared.metrics;
        if !matches!(end, End::Peer | End::Io(_)) {
            // The peer may have to be waited for.
            self.shared.poller.step_aside();
        }
        match end {
            End::Peer | End::Io(_) | End::Relieved => {}
            End::Denied => {
                metrics.denied.add(1);
                tell_denied(peer);
            }
            End::Handshake(reason, problem) => {
                // A balancer's health check may do no more than connect.
                let looked = *reason == TlsFault::Abandoned.as_str()
                    && connection.traffic().bytes_in.get() == 0;
                metrics.handshake_failures.add(reason);
                static LINES: Limiter = Limiter::audit();
                if !looked && LINES.allows("handshake failed") {
                    tracing::warn!(target: AUDIT, security = "handshake", connection = number, %peer, reason, "handshake failed: {problem}");
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
                if connection.phase().close() {
                    connection.push_notice(*code, message);
                    self.close_after(*code);
                } else {
                    self.leave();
                }
            }
            End::Farewell(Farewell { code, message }) => {
                connection.push_notice(*code, message);
                self.close_after(*code);
            }
            End::Throttled(wait) => {
                metrics.auth_failures.add("too-many");
                // Before the handshake nothing can be said.
                if connection.is_open() && connection.phase().close() {
                    let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                    connection.push_refusal(
                        Code::Unauthorized,
                        TOO_MANY_FAILURES,
                        Some(millis.saturating_add(1)),
                    );
                    self.close_after(Code::Unauthorized);
                }
            }
        }
        static LINES: Limiter = Limiter::new();
        if LINES.allows("connection ended") {
            let traffic = connection.traffic();
            tracing::info!(
                connection = number,
                %peer,
                principal = &*self.identity.principal.name,
                millis = connection.age().as_millis() as u64,
                requests = traffic.messages_in.get(),
                bytes_in = traffic.bytes_in.get(),
                bytes_out = traffic.bytes_out.get(),
                "connection ended: {end}"
            );
        }
    }

    /// The last word is in the outbox: sends it, and sees to it that it is read.
    fn close_after(&self, code: Code) {
        self.shared.metrics.count_error(Some(code));
        if self.flush().is_ok() {
            self.connection.stream().half_close();
            self.shared.linger.take(self.connection.stream().clone());
        }
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
        while self
            .connection
            .stream()
            .read(&mut waste, deadline)
            .is_ok_and(|count| count > 0)
        {}
    }
}
