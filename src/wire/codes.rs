//! Every code that an ERROR of the server carries, and what follows it.

use std::fmt;

/// Longest code that a service may fail with, in bytes.
pub const MAX_SERVICE_CODE_SIZE: usize = 64;

/// A code of the server's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Reserved flag, KEEPALIVE with a length, flags that don't go together.
    InvalidFrame,
    /// A frame or message over the limit.
    MessageTooLarge,
    /// The header line breaks the grammar, or the message is empty.
    MalformedMessage,
    /// RESPONSE or ERROR sent by a client; a wrong payload for `system.`.
    InvalidRequest,
    /// A REQUEST without a request id.
    InvalidRequestId,
    /// Not JSON, not UTF-8, nested too deep.
    InvalidPayload,
    /// No or wrong credentials.
    Unauthorized,
    /// The principal has no right to the topic.
    Forbidden,
    /// Over the principal's or the service's rate.
    RateLimited,
    /// No such service.
    NoRouteFound,
    /// No compatible version of the service.
    VersionNotSupported,
    /// The service has no such action.
    TopicNotSupported,
    /// Not begun; retrying is safe.
    ServiceUnavailable,
    /// Begun, and stopped at the deadline.
    Timeout,
    /// The service trapped or broke a limit.
    ServiceFailed,
    /// No room for another connection.
    ServerBusy,
    /// Nothing arrived for `idle_timeout`.
    IdleTimeout,
    /// A frame or message was begun but not finished in time.
    ReadTimeout,
    /// The server drains.
    ShuttingDown,
    /// A defect of the server.
    InternalError,
}

/// `details.state` of `SERVICE_UNAVAILABLE` while the component of a service
/// is compiled.
pub const COMPILING: &str = "compiling";
/// The same while `mb-server dev` builds it for the first time.
pub const BUILDING: &str = "building";

impl Code {
    /// All of them, in the order of the protocol's table.
    pub const ALL: [Self; 20] = [
        Self::InvalidFrame,
        Self::MessageTooLarge,
        Self::MalformedMessage,
        Self::InvalidRequest,
        Self::InvalidRequestId,
        Self::InvalidPayload,
        Self::Unauthorized,
        Self::Forbidden,
        Self::RateLimited,
        Self::NoRouteFound,
        Self::VersionNotSupported,
        Self::TopicNotSupported,
        Self::ServiceUnavailable,
        Self::Timeout,
        Self::ServiceFailed,
        Self::ServerBusy,
        Self::IdleTimeout,
        Self::ReadTimeout,
        Self::ShuttingDown,
        Self::InternalError,
    ];

    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidFrame => "INVALID_FRAME",
            Self::MessageTooLarge => "MESSAGE_TOO_LARGE",
            Self::MalformedMessage => "MALFORMED_MESSAGE",
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::InvalidRequestId => "INVALID_REQUEST_ID",
            Self::InvalidPayload => "INVALID_PAYLOAD",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Forbidden => "FORBIDDEN",
            Self::RateLimited => "RATE_LIMITED",
            Self::NoRouteFound => "NO_ROUTE_FOUND",
            Self::VersionNotSupported => "VERSION_NOT_SUPPORTED",
            Self::TopicNotSupported => "TOPIC_NOT_SUPPORTED",
            Self::ServiceUnavailable => "SERVICE_UNAVAILABLE",
            Self::Timeout => "TIMEOUT",
            Self::ServiceFailed => "SERVICE_FAILED",
            Self::ServerBusy => "SERVER_BUSY",
            Self::IdleTimeout => "IDLE_TIMEOUT",
            Self::ReadTimeout => "READ_TIMEOUT",
            Self::ShuttingDown => "SHUTTING_DOWN",
            Self::InternalError => "INTERNAL_ERROR",
        }
    }

    /// Position in [`Code::ALL`], for tables of counters.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `details.reason` of `SERVICE_FAILED`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The service trapped: unreachable code, a panic, an access out of bounds.
    Trap,
    /// The service trapped after it was refused more memory.
    Memory,
    /// The service's call stack is exhausted.
    Stack,
    /// The answer is over the limit.
    AnswerSize,
    /// The answer is not JSON, or the failure code breaks its grammar.
    InvalidAnswer,
    /// The service handed over too much in one host call.
    HostData,
    /// The service could not be instantiated.
    Start,
    /// The operator stopped the call.
    Killed,
    /// Its client has reset the connection; nobody is notified.
    Reset,
}

impl Reason {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::AnswerSize => "answer-size",
            Self::InvalidAnswer => "invalid-answer",
            Self::HostData => "host-data",
            Self::Start => "start",
            Self::Killed => "killed",
            Self::Reset => "reset",
        }
    }
}

/// Whether a service may fail with this code: `[A-Z][A-Z0-9_]{0,63}`.
#[must_use]
pub fn is_service_code(code: &str) -> bool {
    let mut bytes = code.bytes();
    code.len() <= MAX_SERVICE_CODE_SIZE
        && bytes.next().is_some_and(|b| b.is_ascii_uppercase())
        && bytes.all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_follows_its_own_grammar() {
        for (index, code) in Code::ALL.into_iter().enumerate() {
            assert_eq!(code.index(), index, "{code}");
            assert!(is_service_code(code.as_str()), "{code}");
        }
    }

    #[test]
    fn service_codes() {
        for good in ["A", "DIVISION_BY_ZERO", "E2", &"A".repeat(64)] {
            assert!(is_service_code(good), "{good}");
        }
        for bad in ["", "a", "2E", "_A", "NOT OK", "É", "A-B", &"A".repeat(65)] {
            assert!(!is_service_code(bad), "{bad}");
        }
    }
}
