#![doc = include_str!("HTTP.md")]
//!
//! # The module
//!
//! Bytes in, messages with a header line out, and answers back as responses. No
//! I/O and no clock.
//!
//! `head` reads a request's head and decides what is asked, `chunked` undoes
//! the transfer coding, `incoming` joins both over a buffer, `response` writes
//! answers, `upgrade` checks the handshake of WebSocket. `openapi` writes the
//! document of what may be called; `mcp` reads requests of the Model Context
//! Protocol and writes their responses.

mod chunked;
mod head;
mod incoming;
mod mcp;
mod openapi;
mod response;
mod schema;
mod upgrade;

pub use head::{Content, Framing, Head, MAX_FIELDS, MAX_HEAD_SIZE, Method, Route, no_such_path};
pub use incoming::{Incoming, Taken};
pub use mcp::{McpFields, McpReply, McpResponse, McpStep, Tool, is_of_objects};
pub use openapi::{Operation, document};
pub use response::{Asks, Exchange, Refusal, Response, status_of};
pub use upgrade::Upgrade;
