#![doc = include_str!("HTTP.md")]
//!
//! # The module
//!
//! Bytes in, messages with a header line out, and answers back as responses. No
//! I/O and no clock.
//!
//! `head` reads a request's head and decides what is asked, `chunked` undoes
//! the transfer coding, `incoming` is the buffer that joins both, `response`
//! writes answers.

mod chunked;
mod head;
mod incoming;
mod response;

pub use head::{Content, Framing, Head, MAX_FIELDS, MAX_HEAD_SIZE, Method, Route};
pub use incoming::{Incoming, Taken};
pub use response::{Exchange, Refusal, Response, status_of};
