//! Every code that an ERROR of the server carries, and what follows it.

/// Longest code that a service may fail with, in bytes.
pub const MAX_SERVICE_CODE_SIZE: usize = 64;

words! {
    /// A code of the server's own.
    pub enum Code {
        /// Reserved flag, KEEPALIVE with a length, flags that don't go together.
        InvalidFrame = "INVALID_FRAME",
        /// A frame or message over the limit.
        MessageTooLarge = "MESSAGE_TOO_LARGE",
        /// The header line breaks the grammar, or the message is empty.
        MalformedMessage = "MALFORMED_MESSAGE",
        /// RESPONSE or ERROR sent by a client; a wrong payload for `system.`.
        InvalidRequest = "INVALID_REQUEST",
        /// A REQUEST without a request id.
        InvalidRequestId = "INVALID_REQUEST_ID",
        /// Not JSON, not UTF-8, nested too deep.
        InvalidPayload = "INVALID_PAYLOAD",
        /// No or wrong credentials.
        Unauthorized = "UNAUTHORIZED",
        /// The principal has no right to the topic.
        Forbidden = "FORBIDDEN",
        /// Over the principal's or the service's rate.
        RateLimited = "RATE_LIMITED",
        /// No such service.
        NoRouteFound = "NO_ROUTE_FOUND",
        /// No compatible version of the service.
        VersionNotSupported = "VERSION_NOT_SUPPORTED",
        /// The service has no such action.
        TopicNotSupported = "TOPIC_NOT_SUPPORTED",
        /// Not begun; retrying is safe.
        ServiceUnavailable = "SERVICE_UNAVAILABLE",
        /// Begun, and stopped at the deadline.
        Timeout = "TIMEOUT",
        /// The service trapped or broke a limit.
        ServiceFailed = "SERVICE_FAILED",
        /// No room for another connection.
        ServerBusy = "SERVER_BUSY",
        /// Nothing arrived for `idle_timeout`.
        IdleTimeout = "IDLE_TIMEOUT",
        /// A frame or message was begun but not finished in time.
        ReadTimeout = "READ_TIMEOUT",
        /// The server drains.
        ShuttingDown = "SHUTTING_DOWN",
        /// A defect of the server.
        InternalError = "INTERNAL_ERROR",
    }
}

/// `details.state` of `SERVICE_UNAVAILABLE` while the component of a service
/// is compiled.
pub const COMPILING: &str = "compiling";
/// The same while `mb-server dev` builds it for the first time.
pub const BUILDING: &str = "building";

impl Code {
    /// Position in [`Code::ALL`], for tables of counters.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Whether the server closes the connection behind an ERROR of this code,
    /// by the table of the protocol: some codes close only where they answer
    /// no request.
    #[must_use]
    pub const fn closes(self, answers_request: bool) -> bool {
        match self {
            Self::InvalidFrame
            | Self::MessageTooLarge
            | Self::Unauthorized
            | Self::ServerBusy
            | Self::IdleTimeout
            | Self::ReadTimeout => true,
            Self::ShuttingDown | Self::InternalError => !answers_request,
            Self::MalformedMessage
            | Self::InvalidRequest
            | Self::InvalidRequestId
            | Self::InvalidPayload
            | Self::Forbidden
            | Self::RateLimited
            | Self::NoRouteFound
            | Self::VersionNotSupported
            | Self::TopicNotSupported
            | Self::ServiceUnavailable
            | Self::Timeout
            | Self::ServiceFailed => false,
        }
    }

    /// Whether the server answers a request so only before it was begun, so
    /// that sending it again is safe.
    #[must_use]
    pub const fn is_before_begin(self) -> bool {
        match self {
            Self::Timeout | Self::ServiceFailed | Self::ShuttingDown | Self::InternalError => false,
            Self::InvalidFrame
            | Self::MessageTooLarge
            | Self::MalformedMessage
            | Self::InvalidRequest
            | Self::InvalidRequestId
            | Self::InvalidPayload
            | Self::Unauthorized
            | Self::Forbidden
            | Self::RateLimited
            | Self::NoRouteFound
            | Self::VersionNotSupported
            | Self::TopicNotSupported
            | Self::ServiceUnavailable
            | Self::ServerBusy
            | Self::IdleTimeout
            | Self::ReadTimeout => true,
        }
    }
}

words! {
    /// `details.reason` of `SERVICE_FAILED`.
    pub enum Reason {
        /// The service trapped: unreachable code, a panic, an access out of bounds.
        Trap = "trap",
        /// The service trapped after it was refused more memory.
        Memory = "memory",
        /// The service's call stack is exhausted.
        Stack = "stack",
        /// The answer is over the limit.
        AnswerSize = "answer-size",
        /// The answer is not JSON, or the failure code breaks its grammar.
        InvalidAnswer = "invalid-answer",
        /// The service handed over too much in one host call.
        HostData = "host-data",
        /// The service could not be instantiated.
        Start = "start",
        /// The operator stopped the call.
        Killed = "killed",
        /// Its client has reset the connection; nobody is notified.
        Reset = "reset",
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
