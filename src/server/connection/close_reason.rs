//! Why a connection closes, and the ERROR that its peer gets.

use std::{borrow::Cow, fmt, io, time::Duration};

use crate::{
    access::TOO_MANY_FAILURES,
    server::peer::CloseRequest,
    websocket::CloseCode,
    wire::{Code, ErrorBody},
};

/// `retryAfterMs` of a refused client.
pub(crate) const RETRY_WHEN_BUSY_MS: u64 = 1000;

/// Why a connection closes.
#[derive(Debug)]
pub(crate) enum CloseReason {
    /// The peer ended the stream, between two messages.
    Peer,
    /// The peer sent a close frame of WebSocket, with this code.
    CloseFrame(Option<u16>),
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
    /// A request was answered with an ERROR that closes.
    ClosingAnswer(Code),
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
    pub(crate) fn closing(&self) -> Option<(Code, ErrorBody<'static>)> {
        match self {
            Self::Notice(code, message) => Some(closing(*code, message.clone(), None)),
            Self::Requested(CloseRequest { code, message }) => Some(closing(*code, *message, None)),
            Self::Throttled(wait) => {
                let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                let millis = Some(millis.saturating_add(1));
                Some(closing(Code::Unauthorized, TOO_MANY_FAILURES, millis))
            }
            _ => None,
        }
    }

    /// Returns the close frame of WebSocket, and whether it says all: a peer
    /// that breaks WebSocket's own rules gets no ERROR before it.
    pub(crate) fn close_frame(&self) -> Option<(u16, String, bool)> {
        let code = match self {
            Self::CloseFrame(code) => {
                let code = code.unwrap_or(CloseCode::Normal as u16);
                return Some((code, String::new(), true));
            }
            Self::ClosingAnswer(code)
            | Self::Notice(code, _)
            | Self::Requested(CloseRequest { code, .. }) => *code,
            Self::Throttled(_) => Code::Unauthorized,
            _ => return None,
        };
        let (close_code, is_all) = match code {
            Code::InvalidFrame => (CloseCode::Protocol, true),
            Code::InvalidPayload => (CloseCode::NotUtf8, true),
            Code::MessageTooLarge => (CloseCode::TooLarge, true),
            Code::ShuttingDown => (CloseCode::GoingAway, false),
            Code::InternalError => (CloseCode::Internal, false),
            _ => (CloseCode::Policy, false),
        };
        Some((close_code as u16, self.to_string(), is_all))
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer => f.write_str("by the peer"),
            Self::CloseFrame(Some(code)) => write!(f, "by the peer, with code {code}"),
            Self::CloseFrame(None) => f.write_str("by the peer, with a close frame"),
            Self::Answered => f.write_str("after its last response"),
            Self::Truncated => f.write_str("by the peer, inside a message"),
            Self::Io(error) => write!(f, "{error}"),
            Self::Handshake(reason, problem) => write!(f, "handshake failed, {reason}: {problem}"),
            Self::Denied => f.write_str("the peer's address is denied"),
            Self::ClosingAnswer(Code::Unauthorized) => {
                f.write_str("the peer has not authenticated")
            }
            Self::ClosingAnswer(code) => write!(f, "by an answer of {code}"),
            Self::WriteTimeout => f.write_str("the peer took no answer"),
            Self::Throttled(_) => f.write_str(TOO_MANY_FAILURES),
            Self::Notice(code, message) => write!(f, "{code}: {message}"),
            Self::Requested(CloseRequest { code, message }) => write!(f, "{code}: {message}"),
        }
    }
}

/// The ERROR that closes. A refused client is given a time to try again.
fn closing(
    code: Code,
    message: impl Into<Cow<'static, str>>,
    retry_after_ms: Option<u64>,
) -> (Code, ErrorBody<'static>) {
    let when_busy = (code == Code::ServerBusy).then_some(RETRY_WHEN_BUSY_MS);
    let body = ErrorBody::server(code, message);
    let body = match retry_after_ms.or(when_busy) {
        Some(millis) => body.with_details(&serde_json::json!({"retryAfterMs": millis})),
        None => body,
    };
    (code, body)
}
