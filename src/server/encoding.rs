//! Answers into bytes, by what the peer speaks.

use std::time::SystemTime;

use crate::{
    http::{Asks, Exchange, Response},
    websocket::{self, Opcode},
    wire::{
        Code, ErrorBody, Header, Version,
        message::{append_error, append_line, write_error, write_head},
    },
};

/// How the answer to a message is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As a frame.
    Frames,
    /// As the response of this exchange.
    Http(Box<Exchange>),
    /// As a message of WebSocket.
    WebSocket,
}

impl Encoding {
    /// What is asked for.
    pub(crate) fn asks(&self) -> &Asks {
        match self {
            Self::Http(exchange) => &exchange.asks,
            Self::Frames | Self::WebSocket => &Asks::Topic,
        }
    }

    /// Appends all of an answer but its payload, which is so many bytes and
    /// follows unless [`Encoding::omits_payload`]. Without a header it is all of
    /// the message.
    #[inline]
    pub(crate) fn write_head(
        &self,
        out: &mut Vec<u8>,
        header: Option<&Header<'_>>,
        served: Option<Version>,
        (payload, binary): (usize, bool),
    ) {
        match self {
            Self::Frames => write_head(out, header, payload, binary),
            Self::Http(exchange) => {
                let size = payload;
                Response::Payload { binary, size }.write(out, exchange, served);
            }
            Self::WebSocket => {
                let start = out.len();
                if let Some(header) = header {
                    append_line(out, header);
                }
                let opcode = if binary { Opcode::Binary } else { Opcode::Text };
                frame_websocket(out, start, opcode, payload);
            }
        }
    }

    /// The connection closes behind the answer.
    pub(crate) fn closes(&mut self) {
        if let Self::Http(exchange) = self {
            exchange.closes = true;
        }
    }

    /// Whether the answer says that the connection closes behind it.
    #[inline]
    pub(crate) fn says_close(&self) -> bool {
        matches!(self, Self::Http(exchange) if exchange.closes)
    }

    /// Whether a payload is only announced: HEAD.
    pub(crate) fn omits_payload(&self) -> bool {
        matches!(self, Self::Http(exchange) if exchange.is_head)
    }

    /// Appends a response that only HTTP has, of this status and with JSON or
    /// nothing.
    pub(crate) fn write_response(
        &self,
        out: &mut Vec<u8>,
        served: Option<Version>,
        (status, text): (u16, &str),
    ) {
        if let Self::Http(exchange) = self {
            Response::Status(status, text).write(out, exchange, served);
        }
    }

    /// Appends an ERROR.
    pub(crate) fn write_error(
        &self,
        out: &mut Vec<u8>,
        header: Option<&Header<'_>>,
        served: Option<Version>,
        (code, body): (Option<Code>, &ErrorBody<'_>),
    ) {
        match self {
            Self::Frames => write_error(out, header, body, SystemTime::now()),
            Self::Http(exchange) => Response::Error(code, body).write(out, exchange, served),
            Self::WebSocket => {
                let start = out.len();
                append_error(out, header, body, SystemTime::now());
                frame_websocket(out, start, Opcode::Text, 0);
            }
        }
    }
}

/// Puts the head of a frame before what was written of its message, of which
/// so many bytes follow.
fn frame_websocket(out: &mut Vec<u8>, start: usize, opcode: Opcode, follow: usize) {
    let end = out.len();
    websocket::write_head(out, opcode, end - start + follow);
    let head = out.len() - end;
    out[start..].rotate_right(head);
}
