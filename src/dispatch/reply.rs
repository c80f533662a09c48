//! What becomes of a message: an answer now, an answer later, or the message
//! again.

use std::{fmt, ops::Range, time::Instant};

use super::Refusal;
use crate::{
    access::Identity,
    budget::Reservation,
    http::McpReply,
    metrics::Used,
    wire::{Code, ErrorBody, Header, Version},
};

/// A reply.
#[derive(Debug)]
pub struct Reply<'a> {
    /// The header of the request; none where it could not be parsed.
    pub header: Option<Header<'a>>,
    /// The identity, if it has just been authenticated.
    pub identity: Option<Identity>,
    /// What the message came to.
    pub answered: Answered,
}

impl<'a> Reply<'a> {
    /// Creates a reply that leaves the peer's identity as it is.
    #[must_use]
    pub fn new(header: Option<Header<'a>>, outcome: Outcome) -> Self {
        Self {
            header,
            identity: None,
            answered: outcome.into(),
        }
    }
}

/// What a message came to, and what belongs to its answer.
#[derive(Debug)]
pub struct Answered {
    /// The answer.
    pub outcome: Outcome,
    /// Memory that is reserved for the answer until the outbox counts it.
    pub held: Option<Reservation>,
    /// What the call has used, but for those that its service made.
    pub used: Used,
    /// The version that served it.
    pub served: Option<Version>,
}

impl From<Outcome> for Answered {
    /// Nothing belongs to it: no call ran, or its answer brings that later.
    fn from(outcome: Outcome) -> Self {
        Self {
            outcome,
            held: None,
            used: Used::default(),
            served: None,
        }
    }
}

impl Answered {
    /// The same once its answer may leave, for which this waits.
    #[must_use]
    pub fn settled(self) -> Self {
        match self.outcome {
            Outcome::Deferred(deferred) => deferred.wait(),
            _ => self,
        }
    }
}

/// The answer itself.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing is sent: a PUBLISH without an id.
    Silence,
    /// RESPONSE with JSON.
    Json(String),
    /// RESPONSE with bytes.
    Binary(Vec<u8>),
    /// Nothing yet: the message has to be handled again, see
    /// [`Watch::queues`](crate::host::Watch::queues).
    Postponed(Postponed),
    /// ERROR; the code is the server's, or none if it is the service's.
    Error(Option<Code>, ErrorBody<'static>),
    /// A response of HTTP with this status, and JSON or nothing.
    Response(u16, String),
    /// Nothing yet: the message has to be handled again as another one.
    Redirect(Box<Redirect>),
    /// Nothing yet: the call is over, and what its answer says is not on the
    /// disk.
    Deferred(Box<dyn Deferred>),
}

impl Outcome {
    /// Bytes of its payload.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Json(text) | Self::Response(_, text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
            _ => 0,
        }
    }
}

impl From<Refusal> for Outcome {
    fn from(Refusal { code, body }: Refusal) -> Self {
        Self::Error(code, body)
    }
}

/// A call that could not begin and has to be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Postponed {
    /// Its deadline.
    pub until: Instant,
    /// Which rates have counted it.
    pub counted: Counted,
}

/// Which rates have counted a request, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counted {
    /// None.
    Nowhere,
    /// That of its principal.
    ByPrincipal,
    /// That of its service, too.
    ByService,
}

/// An answer that may not leave yet. What it makes is what the client gets, also
/// of a PUBLISH.
pub trait Deferred: fmt::Debug + Send {
    /// Waits for it, until the deadline of its call.
    fn wait(self: Box<Self>) -> Answered;

    /// Hands over what makes the answer, once it may leave, on any thread,
    /// which must not be kept.
    fn then(self: Box<Self>, hand_over: HandOver);
}

/// Takes what makes a deferred answer, and whether others come at once.
pub type HandOver = Box<dyn FnOnce(Finish, bool) + Send>;

/// Makes the answer of a call that was deferred.
pub type Finish = Box<dyn FnOnce() -> Answered + Send>;

/// A call that the payload of a message asks for.
#[derive(Debug)]
pub struct Redirect {
    /// Its header line.
    pub line: String,
    /// Its payload, a part of the message; what is not there follows the line.
    pub payload: Range<usize>,
    /// Its deadline.
    pub until: Instant,
    /// Writes the response.
    pub reply: McpReply,
}
