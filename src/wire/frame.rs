//! One length-delimited unit: eight bytes of header, then the body.

/// Bytes of a frame header: `u32` length, `u32` flags, both big-endian.
pub const FRAME_HEADER_SIZE: usize = 8;

/// `0x1`: a sign of life without a message; the length is 0.
pub const KEEPALIVE: u32 = 0x1;
/// `0x2`: the payload is opaque bytes, not JSON.
pub const BINARY: u32 = 0x2;
/// `0x4`: the message goes on in the next frame.
pub const MORE: u32 = 0x4;

/// The whole keep-alive frame.
pub const KEEPALIVE_FRAME: [u8; FRAME_HEADER_SIZE] = [0, 0, 0, 0, 0, 0, 0, 1];

/// A frame header whose flags are known to go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of the body that follow.
    pub length: u32,
    /// The frame is a keep-alive; then the length is 0 and no other flag set.
    pub keep_alive: bool,
    /// The payload of the message is opaque bytes.
    pub binary: bool,
    /// The message goes on in the next frame.
    pub more: bool,
}

impl FrameHeader {
    /// Reads a header.
    ///
    /// # Errors
    /// Reserved flags, and flags or a length that don't go together.
    pub fn parse(bytes: [u8; FRAME_HEADER_SIZE]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, f0, f1, f2, f3] = bytes;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let flags = u32::from_be_bytes([f0, f1, f2, f3]);
        let keep_alive = flags & KEEPALIVE != 0;
        if flags & !(KEEPALIVE | BINARY | MORE) != 0 {
            Err(FrameError::ReservedFlags { length, flags })
        } else if keep_alive && flags != KEEPALIVE {
            Err(FrameError::KeepAliveFlags { flags })
        } else if keep_alive && length != 0 {
            Err(FrameError::KeepAliveLength { length })
        } else {
            Ok(Self {
                length,
                keep_alive,
                binary: flags & BINARY != 0,
                more: flags & MORE != 0,
            })
        }
    }

    /// The eight bytes of this header.
    #[must_use]
    pub fn encode(self) -> [u8; FRAME_HEADER_SIZE] {
        let Self {
            length,
            keep_alive,
            binary,
            more,
        } = self;
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(keep_alive, KEEPALIVE) | flag(binary, BINARY) | flag(more, MORE);
        let mut bytes = [0; FRAME_HEADER_SIZE];
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        bytes[4..].copy_from_slice(&flags.to_be_bytes());
        bytes
    }
}

/// Why the byte stream can't be read on. All of these end the connection,
/// because where the next frame begins is not known any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A flag is set that has no meaning yet.
    #[error("flags {flags:#010x} use a reserved bit; known are 0x1, 0x2 and 0x4{}", likeness(*length, *flags))]
    ReservedFlags {
        /// What would be its length.
        length: u32,
        /// All flags of the frame.
        flags: u32,
    },
    /// KEEPALIVE together with another flag.
    #[error("flags {flags:#010x} join KEEPALIVE with another flag")]
    KeepAliveFlags {
        /// All flags of the frame.
        flags: u32,
    },
    /// KEEPALIVE with a body.
    #[error("keep-alive frame announces {length} bytes, must be 0")]
    KeepAliveLength {
        /// The length that it announced.
        length: u32,
    },
    /// The pieces of one message disagree about BINARY.
    #[error("pieces of one message differ in the flag BINARY")]
    MixedPayload,
    /// The bodies of one message add up to more than the limit.
    #[error("message of {size} bytes exceeds the limit of {limit}")]
    TooLarge {
        /// Bytes so far, with those that this frame announces.
        size: u64,
        /// The limit, `max_message_size`.
        limit: usize,
    },
}

/// What bytes that are no frame look like, where that is plain.
fn likeness(length: u32, flags: u32) -> &'static str {
    let is_text =
        |bytes: u32| (bytes.to_be_bytes().iter()).all(|byte| (b' '..=b'~').contains(byte));
    match (length >> 16, is_text(flags)) {
        // A handshake record, and TLS 1.0 to 1.2 as its version.
        (0x1600..=0x1603, _) => "; this looks like TLS, which this port does not speak",
        (..0x0400, true) => "; this looks like a frame without flags: they follow the length",
        _ if is_text(length) => "; this looks like text, such as HTTP, not like a frame",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: [u8; 8], expected: Result<FrameHeader, FrameError>) {
        let parsed = FrameHeader::parse(bytes);
        assert_eq!(parsed, expected, "{bytes:?}");
        if let Ok(header) = parsed {
            assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn headers() {
        let plain = FrameHeader {
            length: 0,
            keep_alive: false,
            binary: false,
            more: false,
        };
        check([0; 8], Ok(plain));
        check(
            KEEPALIVE_FRAME,
            Ok(FrameHeader {
                keep_alive: true,
                ..plain
            }),
        );
        check(
            [0, 0, 1, 2, 0, 0, 0, 2],
            Ok(FrameHeader {
                length: 258,
                binary: true,
                ..plain
            }),
        );
        check(
            [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 4],
            Ok(FrameHeader {
                length: u32::MAX,
                more: true,
                ..plain
            }),
        );
        check(
            [0, 0, 0, 0, 0, 0, 0, 6],
            Ok(FrameHeader {
                binary: true,
                more: true,
                ..plain
            }),
        );
        check(
            [0, 0, 0, 0, 0, 0, 0, 8],
            Err(FrameError::ReservedFlags {
                length: 0,
                flags: 8,
            }),
        );
        check(
            [0, 0, 0, 0, 0x80, 0, 0, 1],
            Err(FrameError::ReservedFlags {
                length: 0,
                flags: 0x8000_0001,
            }),
        );
        check(
            [0, 0, 0, 0, 0, 0, 0, 3],
            Err(FrameError::KeepAliveFlags { flags: 3 }),
        );
        check(
            [0, 0, 0, 0, 0, 0, 0, 5],
            Err(FrameError::KeepAliveFlags { flags: 5 }),
        );
        check(
            [0, 0, 0, 1, 0, 0, 0, 1],
            Err(FrameError::KeepAliveLength { length: 1 }),
        );
    }

    #[test]
    fn bytes_of_other_protocols_are_named() {
        for (bytes, named) in [
            (*b"\0\0\0\x2aREQU", "without flags"),
            (*b"\x16\x03\x01\x02\0\x01\0\x01", "TLS"),
            (*b"get / HT", "text"),
            (*b"\0\0\0\x2a\0\0\0\x08", "0x4"),
        ] {
            let error = FrameHeader::parse(bytes).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
