//! Bytes into messages, by what the peer speaks. How their answers are written
//! goes with each message.

use super::{
    close_reason::CloseReason,
    message::{KeepAlive, Message, Taken},
    requests::Requests,
};
use crate::{
    server::{encoding::Encoding, peer::Protocol},
    websocket::{self, Fault},
    wire::{self, Buffer, Code, FrameError, Reassembly},
};

/// What was read, and how it is read on.
#[derive(Debug)]
pub(super) enum Decoder {
    /// Frames, and whoever has sent nothing yet.
    Frames(Reassembly),
    /// Requests of HTTP.
    Http(Requests),
    /// Messages of WebSocket.
    WebSocket(websocket::Incoming),
}

impl Decoder {
    pub(super) fn protocol(&self) -> Protocol {
        match self {
            Self::Frames(_) => Protocol::Frames,
            Self::Http(_) => Protocol::Http,
            Self::WebSocket(_) => Protocol::WebSocket,
        }
    }

    #[inline]
    pub(super) fn buffer(&self) -> &Buffer {
        match self {
            Self::Frames(reassembly) => reassembly.buffer(),
            Self::Http(requests) => requests.incoming.buffer(),
            Self::WebSocket(incoming) => incoming.buffer(),
        }
    }

    #[inline]
    pub(super) fn buffer_mut(&mut self) -> &mut Buffer {
        match self {
            Self::Frames(reassembly) => reassembly.buffer_mut(),
            Self::Http(requests) => requests.incoming.buffer_mut(),
            Self::WebSocket(incoming) => incoming.buffer_mut(),
        }
    }

    pub(super) fn set_max_message_size(&mut self, most: usize) {
        match self {
            Self::Frames(reassembly) => reassembly.set_max_message_size(most),
            Self::Http(requests) => requests.incoming.set_max_message_size(most),
            Self::WebSocket(incoming) => incoming.set_max_message_size(most),
        }
    }

    /// What is next, or none until more has arrived.
    #[inline]
    pub(super) fn take(&mut self) -> Option<Taken> {
        match self {
            Self::Frames(reassembly) => match reassembly.take() {
                Ok(None) => None,
                Ok(Some(wire::Taken::KeepAlive)) => Some(Taken::KeepAlive(KeepAlive::Frame)),
                Ok(Some(wire::Taken::Message { body, binary })) => {
                    Some(Taken::Message(Message::new(body, binary, Encoding::Frames)))
                }
                Err(error) => Some(Taken::Closed(broken_frame(&error))),
            },
            Self::Http(requests) => requests.take(),
            Self::WebSocket(incoming) => match incoming.take() {
                Ok(None) => None,
                Ok(Some(taken)) => Some(websocket_taken(taken)),
                Err(fault) => Some(Taken::Closed(broken_message(&fault))),
            },
        }
    }

    /// What has arrived of a message that is not whole and can be answered on
    /// its own, and how.
    pub(super) fn partial(&self) -> Option<(&[u8], Encoding)> {
        match self {
            Self::Frames(reassembly) => Some((reassembly.partial(), Encoding::Frames)),
            Self::Http(_) => None,
            Self::WebSocket(incoming) => Some((incoming.partial(), Encoding::WebSocket)),
        }
    }

    /// How the ERROR that closes is written; none where nobody waits for one.
    /// `postponed` is the message whose call has not begun.
    pub(super) fn closing_encoding(&self, postponed: Option<Message>) -> Option<Encoding> {
        match self {
            Self::Frames(_) => Some(Encoding::Frames),
            Self::Http(requests) => requests.closing_encoding(postponed),
            Self::WebSocket(_) => Some(Encoding::WebSocket),
        }
    }

    /// Whether a message has begun and not ended.
    #[inline]
    pub(super) fn is_midway(&self) -> bool {
        match self {
            Self::Frames(reassembly) => reassembly.is_midway(),
            Self::Http(requests) => requests.incoming.is_midway(),
            Self::WebSocket(incoming) => incoming.is_midway(),
        }
    }

    /// Goes on behind the message that was taken last, whose call is left.
    pub(super) fn split(&self) -> Self {
        match self {
            Self::Frames(reassembly) => Self::Frames(reassembly.split()),
            Self::Http(requests) => Self::Http(requests.split()),
            Self::WebSocket(incoming) => Self::WebSocket(incoming.split()),
        }
    }

    /// Whether what follows waits for the calls that were left: responses of
    /// HTTP come in order.
    #[inline]
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Self::Http(requests) if requests.is_busy)
    }

    /// No call is left any more.
    pub(super) fn resume(&mut self) {
        if let Self::Http(requests) = self {
            requests.is_busy = false;
        }
    }

    /// Whether what arrives may be read: behind a call of HTTP that was left,
    /// only as much as shows that the peer is gone.
    #[inline]
    pub(super) fn may_read(&self) -> bool {
        match self {
            Self::Http(requests) => !requests.is_busy || requests.incoming.has_room(),
            Self::Frames(_) | Self::WebSocket(_) => true,
        }
    }
}

fn broken_frame(error: &FrameError) -> CloseReason {
    let code = match error {
        FrameError::TooLarge { .. } => Code::MessageTooLarge,
        FrameError::ReservedFlags { .. }
        | FrameError::KeepAliveFlags { .. }
        | FrameError::KeepAliveLength { .. }
        | FrameError::MixedPayload => Code::InvalidFrame,
    };
    CloseReason::Notice(code, error.to_string())
}

fn broken_message(fault: &Fault) -> CloseReason {
    let code = match fault {
        Fault::TooLarge { .. } => Code::MessageTooLarge,
        Fault::Protocol(_) => Code::InvalidFrame,
        Fault::NotUtf8 => Code::InvalidPayload,
    };
    CloseReason::Notice(code, fault.to_string())
}

fn websocket_taken(taken: websocket::Taken) -> Taken {
    match taken {
        websocket::Taken::Message { body, binary } => {
            Taken::Message(Message::new(body, binary, Encoding::WebSocket))
        }
        websocket::Taken::Ping(payload) => Taken::KeepAlive(KeepAlive::Ping(payload)),
        websocket::Taken::Pong => Taken::KeepAlive(KeepAlive::Pong),
        websocket::Taken::Close(code) => Taken::Closed(CloseReason::CloseFrame(code)),
    }
}
