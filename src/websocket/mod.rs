#![doc = include_str!("WEBSOCKET.md")]
//!
//! # The module
//!
//! Bytes in, messages out, no I/O and no clock. `frame` reads and writes the
//! heads of frames, `rules` holds them against what came before and checks text
//! as it arrives, `incoming` joins them over a buffer.
//!
//! An own codec rather than tungstenite's: that one reserves what a frame
//! promises, and here memory must follow what has arrived.

mod frame;
mod incoming;
mod rules;

pub use frame::{MAX_HEAD_SIZE, Opcode, write_close, write_head};
pub use incoming::{Incoming, Taken};

/// Why a connection closes, as the peer reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
    /// The peer closes, and names no code.
    Normal = 1000,
    /// The server drains.
    GoingAway = 1001,
    /// Frames that break the rules.
    Protocol = 1002,
    /// Text that is not UTF-8.
    NotUtf8 = 1007,
    /// A message after which the server closes.
    Policy = 1008,
    /// A message over the limit.
    TooLarge = 1009,
    /// A defect of the server.
    Internal = 1011,
}

/// What is wrong with a stream. It can't be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Frames that break the rules.
    #[error("{0}")]
    Protocol(&'static str),
    /// Text that is not UTF-8.
    #[error("a text message is not UTF-8")]
    NotUtf8,
    /// A message of at least so many bytes, of so many that it may have.
    #[error("message of {size} bytes exceeds the limit of {limit}")]
    TooLarge {
        /// Bytes that were announced.
        size: u64,
        /// The limit.
        limit: u64,
    },
}
