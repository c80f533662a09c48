//! Why a connection closes, and the ERROR that its peer gets.

use std::{fmt, io, time::Duration};

use crate::{
    dispatch::TOO_MANY_FAILURES,
    server::peer::CloseRequest,
    wire::{Code, ErrorBody, message::write_error},
};

/// `retryAfterMs` of a refused client.
pub(crate) const RETRY_WHEN_BUSY_MS: u64 = 1000;

/// Why a connection closes.
#[derive(Debug)]
pub(crate) enum CloseReason {
    /// The peer ended the stream, between two messages.
    Peer,
    /// The last response of HTTP was sent.
    Answered,
    /// The peer ended the stream inside a message.
    Truncated,
    /// Reading or writing failed.
    Io(io::Error),
    /// A PROXY header or a TLS handshake failed.
    Handshake(&'static str, String),
    /// The peer's address is denied.
    Denied,
    /// The peer got UNAUTHORIZED in answer to a request.
    Unauthorized,
    /// The peer took no answer within `write_timeout`.
    WriteTimeout,
    /// The peer's address has failed to authenticate too often; the time until
    /// it may try again.
    Throttled(Duration),
    /// The server sends this ERROR and closes.
    Notice(Code, String),
    /// The drain, the operator or an eviction closes it.
    Requested(CloseRequest),
}

/// The ERROR that closes a connection.
pub(crate) struct Closing<'a> {
    pub(crate) code: Code,
    pub(crate) message: &'a str,
    pub(crate) retry_after_ms: Option<u64>,
}

impl CloseReason {
    /// Whether nothing can be sent any more, because the peer is gone or takes
    /// nothing.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(
            self,
            Self::Io(_) | Self::WriteTimeout | Self::Handshake(..) | Self::Denied
        )
    }

    /// Returns the closing ERROR, if the peer gets one.
    pub(crate) fn closing(&self) -> Option<Closing<'_>> {
        let (code, message) = match self {
            Self::Notice(code, message) => (*code, &**message),
            Self::Requested(CloseRequest { code, message }) => (*code, *message),
            Self::Throttled(wait) => {
                let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                return Some(Closing {
                    code: Code::Unauthorized,
                    message: TOO_MANY_FAILURES,
                    retry_after_ms: Some(millis.saturating_add(1)),
                });
            }
            _ => return None,
        };
        Some(Closing {
            code,
            message,
            retry_after_ms: (code == Code::ServerBusy).then_some(RETRY_WHEN_BUSY_MS),
        })
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer => f.write_str("by the peer"),
            Self::Answered => f.write_str("after its last response"),
            Self::Truncated => f.write_str("by the peer, inside a message"),
            Self::Io(error) => write!(f, "{error}"),
            Self::Handshake(reason, problem) => write!(f, "handshake failed, {reason}: {problem}"),
            Self::Denied => f.write_str("the peer's address is denied"),
            Self::Unauthorized => f.write_str("the peer has not authenticated"),
            Self::WriteTimeout => f.write_str("the peer took no answer"),
            Self::Throttled(_) => f.write_str(TOO_MANY_FAILURES),
            Self::Notice(code, message) => write!(f, "{code}: {message}"),
            Self::Requested(CloseRequest { code, message }) => write!(f, "{code}: {message}"),
        }
    }
}

/// Encodes an ERROR that answers no request.
pub(crate) fn notice(code: Code, message: &str, retry_after_ms: Option<u64>) -> Vec<u8> {
    let mut body = ErrorBody::server(code, message.to_owned());
    if let Some(millis) = retry_after_ms {
        body = body.with_details(&serde_json::json!({"retryAfterMs": millis}));
    }
    let mut frame = Vec::new();
    write_error(&mut frame, None, &body, std::time::SystemTime::now());
    frame
}
