#![doc = include_str!("PROTOCOL.md")]
//!
//! # The module
//!
//! Everything here is pure: bytes in, values out, no socket and no clock, so
//! that each rule above is tested without either. In reading order:
//! [`frame`], [`buffer`], [`reassembly`], [`version`], [`header`], [`json`], [`codes`],
//! [`message`].

pub mod buffer;
pub mod codes;
pub mod frame;
pub mod header;
pub mod json;
pub mod message;
pub mod reassembly;
pub mod version;

pub use buffer::Buffer;
pub use codes::{Code, Reason};
pub use frame::{FrameError, FrameHeader};
pub use header::{Header, HeaderError, Kind, Topic};
pub use message::{ErrorBody, FrameWriter, Origin, Payload};
pub use reassembly::{Incoming, Reassembly, Taken};
pub use version::Version;

/// Default of `max_message_size`: 1 MiB, header line included.
pub const DEFAULT_MAX_MESSAGE_SIZE: usize = 1024 * 1024;

/// Time that a request gets whose header names none.
pub const DEFAULT_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(5_000);

/// Version of the protocol that `system.hello` names.
pub const PROTOCOL_VERSION: &str = "1.0";

/// The only version that the `system.` topics have.
pub const SYSTEM_VERSION: Version = Version::new(1, 0, 0);
