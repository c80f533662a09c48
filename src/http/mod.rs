#![doc = include_str!("HTTP.md")]
//!
//! # The module
//!
//! Bytes in, messages with a header line out, and answers back as responses. No
//! I/O and no clock.
//!
//! `head` reads a request's head and decides what is asked, `chunked` undoes
//! the transfer coding, `incoming` joins both over a buffer, `response` writes
//! answers, `upgrade` checks the handshake of WebSocket.

mod chunked;
mod head;
mod incoming;
mod response;
mod upgrade;

pub use head::{Content, Framing, Head, MAX_FIELDS, MAX_HEAD_SIZE, Method, Route};
pub use incoming::{Incoming, Taken};
pub use response::{Exchange, Refusal, Response, status_of};
pub use upgrade::Upgrade;
