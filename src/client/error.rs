//! Why a call has no answer, and what may have come of it.

use std::fmt;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::wire::{Code, Origin};

/// Payload of an ERROR.
#[derive(Debug, Clone, Deserialize)]
pub struct ServerError {
    /// What went wrong, for a program.
    pub code: String,
    /// What went wrong, for a person.
    pub message: String,
    /// Whose code it is.
    pub origin: Origin,
    /// More of it.
    pub details: Option<Box<RawValue>>,
}

/// Why there is no good answer. Which of the three it is says what may have
/// happened on the other side.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// Nothing ran: the request did not leave as a whole, or the server has
    /// said that it did not begin it.
    #[error("{0}; nothing was served")]
    NotSent(String),
    /// The request left and no answer came: it may have run.
    #[error("{0}; the request may have been served")]
    Unanswered(String),
    /// The answer is an ERROR.
    #[error("{0}")]
    Answered(ServerError),
    /// The answer is not what was asked for: another kind of payload, or
    /// JSON of another shape. The request has run.
    #[error("{0}")]
    Unexpected(String),
}

impl ClientError {
    /// What is wrong with a connection, on which no request was sent.
    pub(crate) fn of_connection(&self, server: &str) -> String {
        match self {
            Self::NotSent(why) => why.clone(),
            other => format!("{server} does not let us in: {other}"),
        }
    }

    /// Whether the request may have run.
    #[must_use]
    pub fn may_have_run(&self) -> bool {
        match self {
            Self::NotSent(_) => false,
            Self::Unanswered(_) | Self::Unexpected(_) => true,
            Self::Answered(refusal) => !refusal.nothing_ran(),
        }
    }
}

impl ServerError {
    /// Whether the server answers so only before anything was begun. Not of a
    /// code that this program does not know, as of a later server.
    #[must_use]
    pub fn nothing_ran(&self) -> bool {
        // A service may choose any code of its own.
        let own = matches!(self.origin, Origin::Service);
        let known = Code::ALL.iter().find(|code| code.as_str() == self.code);
        !own && known.is_some_and(|code| code.is_before_begin())
    }

    /// How long the server asks to wait, in milliseconds.
    #[must_use]
    pub fn retry_after_ms(&self) -> Option<u64> {
        #[derive(Deserialize)]
        struct Details {
            #[serde(rename = "retryAfterMs")]
            retry_after_ms: u64,
        }
        let details: Details = serde_json::from_str(self.details.as_ref()?.get()).ok()?;
        Some(details.retry_after_ms)
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_may_have_run() {
        let refusal = |code: &str, origin| ServerError {
            code: code.into(),
            message: String::new(),
            origin,
            details: None,
        };
        for (code, origin, nothing_ran) in [
            ("NO_ROUTE_FOUND", Origin::Server, true),
            ("TIMEOUT", Origin::Server, false),
            ("OF_A_LATER_SERVER", Origin::Server, false),
            ("NO_ROUTE_FOUND", Origin::Service, false),
        ] {
            assert_eq!(refusal(code, origin).nothing_ran(), nothing_ran, "{code}");
        }
    }
}
