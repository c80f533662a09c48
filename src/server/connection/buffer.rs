//! The buffer of a connection, by what its peer speaks.

use std::ops::Range;

use crate::{http::Incoming, wire::Reassembly};

/// Bytes that were read.
#[derive(Debug)]
pub(crate) enum Buffer {
    /// Frames, and whoever has sent nothing yet.
    Frames(Reassembly),
    /// Requests of HTTP.
    Http(Incoming),
}

/// Calls the method of that name.
macro_rules! both {
    ($self:ident, $buffer:ident => $call:expr) => {
        match $self {
            Self::Frames($buffer) => $call,
            Self::Http($buffer) => $call,
        }
    };
}

impl Buffer {
    pub(super) fn set_max_message_size(&mut self, most: usize) {
        both!(self, buffer => buffer.set_max_message_size(most));
    }

    #[inline]
    pub(super) fn spare(&mut self) -> &mut [u8] {
        both!(self, buffer => buffer.spare())
    }

    #[inline]
    pub(super) fn advance(&mut self, count: usize) {
        both!(self, buffer => buffer.advance(count));
    }

    #[inline]
    pub(super) fn next_capacity(&self) -> usize {
        both!(self, buffer => buffer.next_capacity())
    }

    pub(super) fn capacity(&self) -> usize {
        both!(self, buffer => buffer.capacity())
    }

    #[inline]
    pub(super) fn message(&self, body: Range<usize>) -> &[u8] {
        both!(self, buffer => buffer.message(body))
    }

    #[inline]
    pub(super) fn is_midway(&self) -> bool {
        both!(self, buffer => buffer.is_midway())
    }

    pub(super) fn split(&self) -> Self {
        match self {
            Self::Frames(reassembly) => Self::Frames(reassembly.split()),
            Self::Http(incoming) => Self::Http(incoming.split()),
        }
    }

    /// Whether an empty one keeps memory for one more large message.
    #[inline]
    pub(super) fn is_kept_large(&self) -> bool {
        match self {
            Self::Frames(reassembly) => reassembly.is_kept_large(),
            Self::Http(_) => false,
        }
    }

    /// Whether a read can only show whether the peer is still there.
    pub(super) fn has_room(&self) -> bool {
        match self {
            Self::Frames(_) => true,
            Self::Http(incoming) => incoming.has_room(),
        }
    }

    /// Whether a part of a request's body has come with its head.
    pub(super) fn has_more(&self) -> bool {
        match self {
            Self::Frames(_) => false,
            Self::Http(incoming) => incoming.has_body(),
        }
    }
}
