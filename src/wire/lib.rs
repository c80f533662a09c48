#![doc = include_str!("PROTOCOL.md")]
//!
//! # The module
//!
//! Everything here is pure: bytes in, values out, no socket and no clock, so
//! that each rule above is tested without either. In reading order:
//! [`frame`], [`buffer`], [`reassembly`], [`version`], [`header`], [`json`], [`codes`],
//! [`message`].

/// Defines an enum each of whose variants has a word, on the wire or elsewhere:
/// each is written once, and all of them are in `ALL`.
#[macro_export]
macro_rules! words {
    (
        $(#[$meta:meta])*
        pub enum $name:ident {
            $($(#[$about:meta])* $variant:ident = $word:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$about])* $variant,)*
        }

        impl $name {
            /// All of them, in this order.
            pub const ALL: [Self; [$($word),*].len()] = [$(Self::$variant),*];

            /// Its word.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

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
pub use message::{ErrorBody, Origin, Payload};
pub use reassembly::{Incoming, Reassembly, Taken};
pub use version::Version;

/// Time that a request gets whose header names none.
pub const DEFAULT_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(5_000);

/// Version of the protocol that `system.hello` names.
pub const PROTOCOL_VERSION: &str = "1.0";

/// The only version that the `system.` topics have.
pub const SYSTEM_VERSION: Version = Version::new(1, 0, 0);
