//! The chunked transfer coding of RFC 9112 section 7.1, undone in place.

use crate::wire::Buffer;

/// Bytes of a line of a chunk's size with its extensions, and of all trailers.
const MAX_LINE: usize = 256;
const MAX_TRAILERS: usize = 8 * 1024;

/// Where in the coding the next byte stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// In the line that begins a chunk: its size so far, and its bytes.
    Size {
        size: usize,
        digits: u8,
        bytes: usize,
        extension: bool,
    },
    /// Behind the CR of that line.
    SizeEnd {
        size: usize,
    },
    /// Inside a chunk, of which so much is missing.
    Data {
        left: usize,
    },
    /// Behind a chunk: its CR, then its LF.
    DataCr,
    DataLf,
    /// In the trailers: bytes so far, and of this line.
    Trailer {
        bytes: usize,
        line: usize,
    },
    /// Behind the CR of a line of these.
    TrailerEnd {
        bytes: usize,
        line: usize,
    },
    Done,
}

/// Decodes one body.
#[derive(Debug)]
pub(super) struct Chunked {
    at: At,
    /// Most bytes of the decoded body.
    most: usize,
    /// Bytes of it so far.
    size: usize,
}

/// What is wrong with a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkedError {
    Malformed(&'static str),
    TooLarge,
}

const LINE: At = At::Size {
    size: 0,
    digits: 0,
    bytes: 0,
    extension: false,
};

impl Chunked {
    pub(super) fn new(most: usize) -> Self {
        Self {
            at: LINE,
            most,
            size: 0,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.at == At::Done
    }

    /// Decodes what has arrived.
    pub(super) fn decode(&mut self, buffer: &mut Buffer) -> Result<(), ChunkedError> {
        while let Some(&byte) = buffer.unparsed().first()
            && self.at != At::Done
        {
            if let At::Data { left } = self.at {
                let count = left.min(buffer.unparsed().len());
                buffer.append(count);
                self.at = match left - count {
                    0 => At::DataCr,
                    left => At::Data { left },
                };
                continue;
            }
            self.at = self.step(byte)?;
            buffer.skip(1);
        }
        Ok(())
    }

    fn step(&mut self, byte: u8) -> Result<At, ChunkedError> {
        use ChunkedError::{Malformed, TooLarge};
        Ok(match self.at {
            At::Size {
                size,
                digits,
                bytes,
                extension,
            } => {
                if bytes == MAX_LINE {
                    return Err(Malformed("the line of a chunk's size is too long"));
                }
                let bytes = bytes + 1;
                match (byte, (byte as char).to_digit(16)) {
                    (b'\r', _) if digits > 0 => At::SizeEnd { size },
                    (_, Some(digit)) if !extension => {
                        // Sixteen digits are 64 bits; leading zeros count.
                        if digits == 16 {
                            return Err(Malformed("a chunk's size has more than 16 digits"));
                        }
                        let size = size.checked_mul(16).ok_or(TooLarge)? + digit as usize;
                        if size > self.most {
                            return Err(TooLarge);
                        }
                        At::Size {
                            size,
                            digits: digits + 1,
                            bytes,
                            extension,
                        }
                    }
                    (b';', _) if digits > 0 && !extension => At::Size {
                        size,
                        digits,
                        bytes,
                        extension: true,
                    },
                    (b'\t' | b' '..=b'~', _) if extension => At::Size {
                        size,
                        digits,
                        bytes,
                        extension,
                    },
                    _ => return Err(Malformed("a chunk must begin with its size and CR LF")),
                }
            }
            At::SizeEnd { size } if byte == b'\n' => {
                self.size += size;
                if self.size > self.most {
                    return Err(TooLarge);
                }
                match size {
                    0 => At::Trailer { bytes: 0, line: 0 },
                    left => At::Data { left },
                }
            }
            At::DataCr if byte == b'\r' => At::DataLf,
            At::DataLf if byte == b'\n' => LINE,
            At::Trailer { bytes, .. } if bytes == MAX_TRAILERS => {
                return Err(Malformed("trailers are too long"));
            }
            At::Trailer { line: 0, .. } if matches!(byte, b' ' | b'\t') => {
                return Err(Malformed("a trailer begins with white space"));
            }
            At::Trailer { bytes, line } if byte == b'\r' => At::TrailerEnd { bytes, line },
            At::Trailer { bytes, line } if byte == b'\t' || (b' '..=b'~').contains(&byte) => {
                At::Trailer {
                    bytes: bytes + 1,
                    line: line + 1,
                }
            }
            At::TrailerEnd { line: 0, .. } if byte == b'\n' => At::Done,
            At::TrailerEnd { bytes, .. } if byte == b'\n' => At::Trailer { bytes, line: 0 },
            _ => return Err(Malformed("the chunked body is malformed")),
        })
    }
}
