//! WebSocket's frames (RFC 6455), pure: bytes in, values out, no socket and no
//! clock. No connection speaks it yet.
//!
//! An own codec rather than tungstenite's: that one reserves what a frame
//! promises, and here memory must follow what has arrived. [`frame`] reads and
//! writes frames, [`rules`] holds them against what came before, [`utf8`]
//! checks text as it arrives.

pub mod frame;
pub mod rules;
pub mod utf8;

/// Why a connection closes, as the peer reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
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
}
