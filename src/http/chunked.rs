//! The chunked transfer coding of RFC 9112 section 7.1, undone in place.

use crate::wire::Buffer;

/// A line of a chunk's size with its extensions, and all trailers together,
/// are shorter than this, in bytes.
const MAX_LINE: usize = 256;
const MAX_TRAILERS: usize = 8 * 1024;
/// Digits of a chunk's size, leading zeros too: these are 64 bits.
const MAX_DIGITS: usize = 16;

/// What comes next in the coding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// The line that begins a chunk.
    Size,
    /// So many bytes of a chunk.
    Data(usize),
    /// The line end behind a chunk.
    DataEnd,
    /// A line of the trailers.
    Trailers,
    Done,
}

/// Decodes one body.
#[derive(Debug)]
pub(super) struct Chunked {
    at: At,
    /// Most bytes of the decoded body.
    most: usize,
    /// Bytes of it that were announced; invariant: at most `most`.
    size: usize,
    /// Bytes of the trailers; invariant: less than `MAX_TRAILERS`.
    trailers: usize,
}

/// What is wrong with a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkedError {
    Malformed(&'static str),
    TooLarge,
}

const NO_SIZE: ChunkedError = ChunkedError::Malformed("a chunk must begin with its size and CR LF");
const MALFORMED: ChunkedError = ChunkedError::Malformed("the chunked body is malformed");

impl Chunked {
    pub(super) fn new(most: usize) -> Self {
        Self {
            at: At::Size,
            most,
            size: 0,
            trailers: 0,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.at == At::Done
    }

    /// Decodes what has arrived.
    pub(super) fn decode(&mut self, buffer: &mut Buffer) -> Result<(), ChunkedError> {
        use ChunkedError::Malformed;
        loop {
            let bytes = buffer.unparsed();
            let (most, too_long) = match self.at {
                At::Size => (
                    MAX_LINE,
                    Malformed("the line of a chunk's size is too long"),
                ),
                At::Data(left) => {
                    let count = left.min(bytes.len());
                    buffer.append(count);
                    if count < left {
                        self.at = At::Data(left - count);
                        return Ok(());
                    }
                    self.at = At::DataEnd;
                    continue;
                }
                At::DataEnd => (1, MALFORMED),
                At::Trailers => (
                    MAX_TRAILERS - self.trailers,
                    Malformed("trailers are too long"),
                ),
                At::Done => return Ok(()),
            };
            let is_text = |byte: &&u8| matches!(byte, b'\t' | b' '..=b'~');
            let end = bytes.iter().take(most).take_while(is_text).count();
            match &bytes[end..] {
                _ if end == most => return Err(too_long),
                [] | [b'\r'] => return Ok(()),
                [b'\r', b'\n', ..] => {}
                _ if self.at == At::Size => return Err(NO_SIZE),
                _ => return Err(MALFORMED),
            }
            self.at = self.read(&bytes[..end])?;
            buffer.skip(end + 2);
        }
    }

    /// Reads a line, without its end. Returns what comes next.
    fn read(&mut self, line: &[u8]) -> Result<At, ChunkedError> {
        use ChunkedError::{Malformed, TooLarge};
        Ok(match (self.at, line) {
            (At::Size, _) => {
                let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
                let digits = std::str::from_utf8(digits).map_err(|_| MALFORMED)?;
                if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Err(NO_SIZE);
                }
                let counted = &digits[..digits.len().min(MAX_DIGITS)];
                let size = usize::from_str_radix(counted, 16).map_err(|_| TooLarge)?;
                if size > self.most - self.size {
                    return Err(TooLarge);
                }
                if digits.len() > MAX_DIGITS {
                    return Err(Malformed("a chunk's size has more than 16 digits"));
                }
                self.size += size;
                match size {
                    0 => At::Trailers,
                    left => At::Data(left),
                }
            }
            (At::DataEnd, []) => At::Size,
            (At::Trailers, []) => At::Done,
            (At::Trailers, [b' ' | b'\t', ..]) => {
                return Err(Malformed("a trailer begins with white space"));
            }
            (At::Trailers, _) => {
                self.trailers += line.len();
                At::Trailers
            }
            (At::DataEnd | At::Data(_) | At::Done, _) => return Err(MALFORMED),
        })
    }
}
