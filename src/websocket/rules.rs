//! What a frame may be after those before it.

use super::{
    Fault,
    frame::{FrameHead, Opcode},
};

/// The message in progress.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// Its kind; none between two messages.
    open: Option<Kind>,
    size: u64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Text, of which so many bytes from its beginning are whole characters.
    Text {
        valid: usize,
    },
    Binary,
}

impl Rules {
    /// Whether a message has begun and not ended.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Takes a head, before anything is reserved for what it promises; a
    /// message may have `limit` bytes.
    ///
    /// # Errors
    /// Pieces out of order, and a message over the limit.
    pub(super) fn begin(&mut self, head: &FrameHead, limit: u64) -> Result<(), Fault> {
        match (head.opcode, self.open) {
            (Opcode::Continuation, Some(_)) => {}
            (Opcode::Text, None) => self.open = Some(Kind::Text { valid: 0 }),
            (Opcode::Binary, None) => self.open = Some(Kind::Binary),
            (Opcode::Close | Opcode::Ping | Opcode::Pong, _) => return Ok(()),
            (Opcode::Continuation, None) => {
                return Err(Fault::Protocol("a continuation without a beginning"));
            }
            (Opcode::Text | Opcode::Binary, Some(_)) => {
                return Err(Fault::Protocol("a message begins inside another one"));
            }
        }
        self.size = self.size.saturating_add(head.length);
        if self.size > limit {
            return Err(Fault::TooLarge {
                size: self.size,
                limit,
            });
        }
        Ok(())
    }

    /// Looks at what has arrived of the message, unmasked, from its beginning.
    ///
    /// # Errors
    /// Text that can't be UTF-8 whatever follows.
    pub(super) fn take(&mut self, message: &[u8]) -> Result<(), Fault> {
        if let Some(Kind::Text { valid }) = &mut self.open {
            match std::str::from_utf8(&message[*valid..]) {
                Ok(_) => *valid = message.len(),
                Err(error) if error.error_len().is_none() => *valid += error.valid_up_to(),
                Err(_) => return Err(Fault::NotUtf8),
            }
        }
        Ok(())
    }

    /// Ends a frame of a message. Returns whether the message is bytes, once it
    /// is whole.
    ///
    /// # Errors
    /// A text that ends inside a character.
    pub(super) fn end(&mut self, head: &FrameHead) -> Result<Option<bool>, Fault> {
        if !head.is_last {
            return Ok(None);
        }
        let size = std::mem::take(&mut self.size);
        match self.open.take() {
            Some(Kind::Text { valid }) if valid as u64 != size => Err(Fault::NotUtf8),
            kind => Ok(kind.map(|kind| matches!(kind, Kind::Binary))),
        }
    }
}

/// Reads the code of a close frame, if it has one.
///
/// # Errors
/// One byte, a code that no peer may send, and a reason that is not UTF-8.
pub(super) fn close_code(payload: &[u8]) -> Result<Option<u16>, Fault> {
    let (code, reason) = match payload {
        [] => return Ok(None),
        [high, low, reason @ ..] => (u16::from_be_bytes([*high, *low]), reason),
        [_] => return Err(Fault::Protocol("a close frame of one byte")),
    };
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(Fault::Protocol("a code that no close frame may have"));
    }
    std::str::from_utf8(reason).map_err(|_| Fault::NotUtf8)?;
    Ok(Some(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(opcode: Opcode, is_last: bool, length: u64) -> FrameHead {
        FrameHead {
            opcode,
            is_last,
            length,
            mask: [0; 4],
        }
    }

    fn code(fault: Fault) -> u16 {
        match fault {
            Fault::Protocol(_) => 1002,
            Fault::NotUtf8 => 1007,
            Fault::TooLarge { .. } => 1009,
        }
    }

    /// Frames and their payloads; what comes of the last one.
    fn feed(limit: u64, frames: &[(Opcode, bool, &[u8])]) -> Result<Option<bool>, u16> {
        let mut rules = Rules::default();
        let mut message = Vec::new();
        let mut last = Ok(None);
        for (opcode, is_last, payload) in frames {
            let head = head(*opcode, *is_last, payload.len() as u64);
            rules.begin(&head, limit).map_err(code)?;
            if opcode.is_control() {
                continue;
            }
            message.extend_from_slice(payload);
            rules.take(&message).map_err(code)?;
            last = rules.end(&head).map_err(code);
            last?;
            if *is_last {
                message.clear();
            }
        }
        last
    }

    #[test]
    fn pieces_and_what_may_stand_between_them() {
        use Opcode::{Binary, Continuation, Ping, Text};
        for (frames, expected) in [
            (&[(Text, true, &b"a"[..])][..], Ok(Some(false))),
            (&[(Binary, true, b"")], Ok(Some(true))),
            (
                &[
                    (Text, false, b"\xc3"),
                    (Ping, true, b"\xff"),
                    (Continuation, true, b"\xa9"),
                ],
                Ok(Some(false)),
            ),
            (
                &[(Text, false, b"a"), (Continuation, false, b"b")],
                Ok(None),
            ),
            (
                &[(Binary, false, b"\xff"), (Continuation, true, b"\xff")],
                Ok(Some(true)),
            ),
            (&[(Continuation, true, b"a")], Err(1002)),
            (&[(Text, false, b"a"), (Text, true, b"b")], Err(1002)),
            (&[(Text, false, b"a"), (Binary, true, b"b")], Err(1002)),
            (&[(Text, true, b"a"), (Continuation, true, b"b")], Err(1002)),
            (&[(Text, true, b"\xff")], Err(1007)),
            (&[(Text, true, b"\xc3")], Err(1007)),
            (
                &[(Text, false, b"a\xed"), (Continuation, false, b"\xa0")],
                Err(1007),
            ),
            (&[(Binary, true, &[0; 11])], Err(1009)),
            (
                &[(Binary, false, &[0; 6]), (Continuation, true, &[0; 5])],
                Err(1009),
            ),
            (
                &[(Binary, true, &[0; 10]), (Binary, true, &[0; 10])],
                Ok(Some(true)),
            ),
        ] {
            assert_eq!(feed(10, frames), expected, "{frames:?}");
        }
        let promised = head(Opcode::Text, true, u64::MAX >> 1);
        let begun = Rules::default().begin(&promised, 10);
        assert_eq!(begun.map_err(code), Err(1009));
    }

    #[test]
    fn closes() {
        for (payload, expected) in [
            (&b""[..], Ok(None)),
            (b"\x03\xe8", Ok(Some(1000))),
            (b"\x03\xe8bye \xc3\xa9", Ok(Some(1000))),
            (b"\x0b\xb8", Ok(Some(3000))),
            (b"\x03", Err(1002)),
            (b"\x03\xec", Err(1002)),
            (b"\x03\xed", Err(1002)),
            (b"\x03\xee", Err(1002)),
            (b"\x03\xf7", Err(1002)),
            (b"\x00\x00", Err(1002)),
            (b"\x13\x88", Err(1002)),
            (b"\x03\xe8\xff", Err(1007)),
        ] {
            assert_eq!(close_code(payload).map_err(code), expected, "{payload:?}");
        }
    }
}
