//! What a connection takes out of the bytes of its peer.

use std::ops::Range;

use super::close_reason::CloseReason;
use crate::{
    dispatch::Postponed,
    http::{Exchange, Head, Refusal},
    server::encoding::Encoding,
};

/// What a decoder finds.
pub(super) enum Taken {
    Message(Message),
    KeepAlive(KeepAlive),
    /// A request of HTTP, to be decided on before its body is read.
    Head(Box<Head>),
    /// A request of HTTP that can't be read on: the response is the last one.
    Refused(Refusal, Exchange),
    /// Nothing is read behind it.
    Closed(CloseReason),
}

/// Where a whole message lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) body: Range<usize>,
    pub(crate) binary: bool,
    /// Any version may serve it.
    pub(crate) any_version: bool,
    /// How its answer is written.
    pub(crate) encoding: Encoding,
    /// What is known of its call, where that could not begin before.
    pub(crate) postponed: Option<Postponed>,
}

impl Message {
    pub(super) fn new(body: Range<usize>, binary: bool, encoding: Encoding) -> Self {
        Self {
            body,
            binary,
            any_version: false,
            encoding,
            postponed: None,
        }
    }
}

/// A sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeepAlive {
    /// Of frames.
    Frame,
    /// Of WebSocket, with its payload.
    Ping(Range<usize>),
    /// One that is not answered.
    Pong,
}
