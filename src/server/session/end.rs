//! Why a session is over, and what is said last.

use std::{fmt, io, net::SocketAddr, time::Instant};

use super::Session;
use crate::{
    log::Limiter,
    server::{SHUTS_DOWN, linger::LINGER},
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
    /// The server says why and closes.
    Notice(Code, String),
    /// The drain has said why.
    Told,
    /// Not the session, but this thread's part in it.
    Relieved,
}

/// A peer whose address is not let in was closed without a word.
pub(in crate::server) fn tell_denied(peer: SocketAddr) {
    static LINES: Limiter = Limiter::new();
    if LINES.allows("address not let in") {
        tracing::warn!(security = "address", %peer, "address not let in");
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
                static LINES: Limiter = Limiter::new();
                if !looked && LINES.allows("handshake failed") {
                    tracing::warn!(security = "handshake", connection = number, %peer, reason, "handshake failed: {problem}");
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
