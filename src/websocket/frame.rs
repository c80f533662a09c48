//! Heads of frames, and masking.

use super::Fault;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// Goes on with a message.
    Continuation = 0x0,
    /// Begins a text.
    Text = 0x1,
    /// Begins bytes.
    Binary = 0x2,
    /// Closes.
    Close = 0x8,
    /// Asks for a pong.
    Ping = 0x9,
    /// Answers a ping, or is a sign of life.
    Pong = 0xa,
}

impl Opcode {
    fn parse(bits: u8) -> Option<Self> {
        use Opcode::{Binary, Close, Continuation, Ping, Pong, Text};
        let all = [Continuation, Text, Binary, Close, Ping, Pong];
        all.into_iter().find(|opcode| *opcode as u8 == bits)
    }

    /// Whether it may stand between the pieces of a message.
    #[must_use]
    pub fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// The head of a frame of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHead {
    /// What it is.
    pub opcode: Opcode,
    /// No further frame belongs to its message.
    pub is_last: bool,
    /// Bytes that follow the head.
    pub length: u64,
    /// What they are masked with.
    pub mask: [u8; 4],
}

/// Longest payload of a control frame, in bytes.
const MAX_CONTROL: u64 = 125;

/// Longest head of a frame of a client, in bytes.
pub const MAX_HEAD_SIZE: usize = 14;

impl FrameHead {
    /// Reads a head. Returns it and its size once it is whole.
    ///
    /// # Errors
    /// Reserved bits, unknown opcodes, control frames in pieces or over 125
    /// bytes, lengths that are not written in their shortest form, and frames
    /// without a mask: each as soon as the byte is there that shows it.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Fault> {
        let Some(&first) = bytes.first() else {
            return Ok(None);
        };
        let opcode = Opcode::parse(first & 0x0f).ok_or(Fault::Protocol("a reserved opcode"))?;
        let is_last = first & 0x80 != 0;
        if first & 0x70 != 0 {
            return Err(Fault::Protocol("a reserved bit is set"));
        }
        if opcode.is_control() && !is_last {
            return Err(Fault::Protocol("a control frame in pieces"));
        }
        let Some(&second) = bytes.get(1) else {
            return Ok(None);
        };
        if second & 0x80 == 0 {
            return Err(Fault::Protocol("a frame without a mask"));
        }
        let short = u64::from(second & 0x7f);
        if opcode.is_control() && short > MAX_CONTROL {
            return Err(Fault::Protocol("a control frame of more than 125 bytes"));
        }
        let (extended, least) = match short {
            126 => (2, 126),
            127 => (8, 0x1_0000),
            _ => (0, 0),
        };
        let Some(rest) = bytes.get(2..2 + extended + 4) else {
            return Ok(None);
        };
        let (length, mask) = rest.split_at(extended);
        let length = match length {
            [] => short,
            bytes => bytes
                .iter()
                .fold(0, |length, byte| length << 8 | u64::from(*byte)),
        };
        if length < least || length > i64::MAX as u64 {
            return Err(Fault::Protocol("a length that is not in its shortest form"));
        }
        let mask = [mask[0], mask[1], mask[2], mask[3]];
        let head = Self {
            opcode,
            is_last,
            length,
            mask,
        };
        Ok(Some((head, 2 + extended + 4)))
    }
}

/// Undoes the mask of bytes that lie `offset` bytes behind the head.
pub fn unmask(bytes: &mut [u8], mask: [u8; 4], offset: u64) {
    let mut mask = mask;
    mask.rotate_left((offset % 4) as usize);
    let (chunks, rest) = bytes.as_chunks_mut::<4>();
    let word = u32::from_ne_bytes(mask);
    for chunk in chunks {
        *chunk = (u32::from_ne_bytes(*chunk) ^ word).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

/// Appends the head of a whole frame of the server, which masks nothing.
pub fn write_head(out: &mut Vec<u8>, opcode: Opcode, length: usize) {
    out.push(0x80 | opcode as u8);
    match u16::try_from(length) {
        Ok(length @ ..126) => out.push(length as u8),
        Ok(length) => {
            out.push(126);
            out.extend_from_slice(&length.to_be_bytes());
        }
        Err(_) => {
            out.push(127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// Appends a close frame; of its reason, what there is room for.
pub fn write_close(out: &mut Vec<u8>, code: u16, reason: &str) {
    let reason = &reason[..reason.floor_char_boundary(MAX_CONTROL as usize - 2)];
    write_head(out, Opcode::Close, 2 + reason.len());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(reason.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_to_the_byte() {
        let wrong = Err(());
        let head = |opcode, is_last, length, size| {
            let mask = [1, 2, 3, 4];
            Ok(Some((
                FrameHead {
                    opcode,
                    is_last,
                    length,
                    mask,
                },
                size,
            )))
        };
        for (bytes, expected) in [
            (&b""[..], Ok(None)),
            (b"\x81", Ok(None)),
            (b"\x81\x85\x01\x02\x03", Ok(None)),
            (
                b"\x81\x85\x01\x02\x03\x04Hello",
                head(Opcode::Text, true, 5, 6),
            ),
            (
                b"\x02\x80\x01\x02\x03\x04",
                head(Opcode::Binary, false, 0, 6),
            ),
            (
                b"\x80\xfe\x01\x00\x01\x02\x03\x04",
                head(Opcode::Continuation, true, 256, 8),
            ),
            (
                b"\x82\xff\0\0\0\0\x00\x01\x00\x00\x01\x02\x03\x04",
                head(Opcode::Binary, true, 65536, 14),
            ),
            (
                b"\x89\xfd\x01\x02\x03\x04",
                head(Opcode::Ping, true, 125, 6),
            ),
            (b"\x8a\x80\x01\x02\x03\x04", head(Opcode::Pong, true, 0, 6)),
            (b"\x88\x82\x01\x02\x03\x04", head(Opcode::Close, true, 2, 6)),
            // Reserved bits and opcodes.
            (b"\xc1", wrong),
            (b"\xa1", wrong),
            (b"\x91", wrong),
            (b"\x83", wrong),
            (b"\x87", wrong),
            (b"\x8b", wrong),
            (b"\x8f", wrong),
            // Control frames in pieces, or too long.
            (b"\x09", wrong),
            (b"\x08", wrong),
            (b"\x89\xfe", wrong),
            (b"\x88\xff", wrong),
            // Without a mask, and lengths that are longer than they must be.
            (b"\x81\x05", wrong),
            (b"\x81\xfe\x00\x7d\x01\x02\x03\x04", wrong),
            (b"\x81\xff\0\0\0\0\x00\x00\xff\xff\x01\x02\x03\x04", wrong),
            (b"\x81\xff\x80\0\0\0\0\0\0\0\x01\x02\x03\x04", wrong),
        ] {
            let parse = |bytes| FrameHead::parse(bytes).map_err(drop);
            assert_eq!(parse(bytes), expected, "{bytes:?}");
            for end in 0..bytes.len() {
                let part = parse(&bytes[..end]);
                assert!(part == expected || part == Ok(None), "{:?}", &bytes[..end]);
            }
        }
    }

    #[test]
    fn unmasking_in_pieces_is_the_same() {
        let plain: Vec<u8> = (0..40).collect();
        let mask = [9, 8, 7, 6];
        let masked: Vec<u8> = plain
            .iter()
            .zip(mask.iter().cycle())
            .map(|(a, b)| a ^ b)
            .collect();
        for split in 0..plain.len() {
            let mut bytes = masked.clone();
            let (first, second) = bytes.split_at_mut(split);
            unmask(first, mask, 0);
            unmask(second, mask, split as u64);
            assert_eq!(bytes, plain, "split at {split}");
        }
    }

    #[test]
    fn what_is_written() {
        let written = |length| {
            let mut out = Vec::new();
            write_head(&mut out, Opcode::Text, length);
            out
        };
        assert_eq!(written(125), [0x81, 125]);
        assert_eq!(written(126), [0x81, 126, 0, 126]);
        assert_eq!(written(65_535), [0x81, 126, 255, 255]);
        assert_eq!(written(65_536), [0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
        let mut out = Vec::new();
        write_close(&mut out, 1001, "");
        assert_eq!(out, [0x88, 2, 3, 0xe9]);
        // A reason is cut between two characters.
        out.clear();
        write_close(&mut out, 1008, &"\u{e9}".repeat(100));
        assert_eq!((&out[..4], out.len()), (&[0x88, 124, 3, 0xf0][..], 126));
    }
}
