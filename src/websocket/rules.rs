//! What a frame may be after those before it.

use super::{
    CloseCode,
    frame::{FrameHead, Opcode},
    utf8::Utf8,
};

/// The message in progress.
#[derive(Debug, Default)]
pub struct Rules {
    /// Its kind; none between two messages.
    open: Option<Kind>,
    size: u64,
    limit: u64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Text(Utf8),
    Binary,
}

impl Rules {
    /// Creates the rules for messages of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// Takes a head, before anything is reserved for what it promises.
    ///
    /// # Errors
    /// 1002 for pieces out of order, 1009 for a message over the limit.
    pub fn begin(&mut self, head: &FrameHead) -> Result<(), CloseCode> {
        match (head.opcode, self.open) {
            (Opcode::Continuation, Some(_)) => {}
            (Opcode::Text, None) => self.open = Some(Kind::Text(Utf8::default())),
            (Opcode::Binary, None) => self.open = Some(Kind::Binary),
            (opcode, _) if opcode.is_control() => return Ok(()),
            _ => return Err(CloseCode::Protocol),
        }
        self.size = self.size.saturating_add(head.length);
        if self.size > self.limit {
            return Err(CloseCode::TooLarge);
        }
        Ok(())
    }

    /// Takes bytes of the message, unmasked, as they arrive.
    ///
    /// # Errors
    /// 1007 for text that can't be UTF-8 whatever follows.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), CloseCode> {
        if let Some(Kind::Text(utf8)) = &mut self.open
            && !utf8.take(bytes)
        {
            return Err(CloseCode::NotUtf8);
        }
        Ok(())
    }

    /// Ends a frame of a message. Returns whether the message is whole, and
    /// whether it is bytes.
    ///
    /// # Errors
    /// 1007 for a text that ends inside a character.
    pub fn end(&mut self, head: &FrameHead) -> Result<Option<bool>, CloseCode> {
        if head.opcode.is_control() || !head.is_last {
            return Ok(None);
        }
        self.size = 0;
        match self.open.take() {
            Some(Kind::Text(utf8)) if !utf8.is_whole() => Err(CloseCode::NotUtf8),
            kind => Ok(kind.map(|kind| matches!(kind, Kind::Binary))),
        }
    }
}

/// Reads the payload of a close frame.
///
/// # Errors
/// 1002 for one byte or a code that no peer may send, 1007 for a reason that is
/// not UTF-8.
pub fn check_close(payload: &[u8]) -> Result<(), CloseCode> {
    let (code, reason) = match payload {
        [] => return Ok(()),
        [high, low, reason @ ..] => (u16::from_be_bytes([*high, *low]), reason),
        [_] => return Err(CloseCode::Protocol),
    };
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(CloseCode::Protocol);
    }
    std::str::from_utf8(reason)
        .map(drop)
        .map_err(|_| CloseCode::NotUtf8)
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

    /// Frames and their payloads; what comes of the last one.
    fn feed(limit: u64, frames: &[(Opcode, bool, &[u8])]) -> Result<Option<bool>, CloseCode> {
        let mut rules = Rules::new(limit);
        let mut last = Ok(None);
        for (opcode, is_last, payload) in frames {
            let head = head(*opcode, *is_last, payload.len() as u64);
            rules.begin(&head)?;
            if !opcode.is_control() {
                rules.take(payload)?;
            }
            last = rules.end(&head);
            last?;
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
            (&[(Continuation, true, b"a")], Err(CloseCode::Protocol)),
            (
                &[(Text, false, b"a"), (Text, true, b"b")],
                Err(CloseCode::Protocol),
            ),
            (
                &[(Text, false, b"a"), (Binary, true, b"b")],
                Err(CloseCode::Protocol),
            ),
            (
                &[(Text, true, b"a"), (Continuation, true, b"b")],
                Err(CloseCode::Protocol),
            ),
            (&[(Text, true, b"\xff")], Err(CloseCode::NotUtf8)),
            (&[(Text, true, b"\xc3")], Err(CloseCode::NotUtf8)),
            (&[(Binary, true, &[0; 11])], Err(CloseCode::TooLarge)),
            (
                &[(Binary, false, &[0; 6]), (Continuation, true, &[0; 5])],
                Err(CloseCode::TooLarge),
            ),
            (
                &[(Binary, true, &[0; 10]), (Binary, true, &[0; 10])],
                Ok(Some(true)),
            ),
        ] {
            assert_eq!(feed(10, frames), expected, "{frames:?}");
        }
        let mut rules = Rules::new(10);
        let promised = head(Opcode::Text, true, u64::MAX >> 1);
        assert_eq!(rules.begin(&promised), Err(CloseCode::TooLarge));
    }

    #[test]
    fn closes() {
        for (payload, expected) in [
            (&b""[..], Ok(())),
            (b"\x03\xe8", Ok(())),
            (b"\x03\xe8bye \xc3\xa9", Ok(())),
            (b"\x0b\xb8", Ok(())),
            (b"\x03", Err(CloseCode::Protocol)),
            (b"\x03\xec", Err(CloseCode::Protocol)),
            (b"\x03\xed", Err(CloseCode::Protocol)),
            (b"\x03\xee", Err(CloseCode::Protocol)),
            (b"\x03\xf7", Err(CloseCode::Protocol)),
            (b"\x00\x00", Err(CloseCode::Protocol)),
            (b"\x13\x88", Err(CloseCode::Protocol)),
            (b"\x03\xe8\xff", Err(CloseCode::NotUtf8)),
        ] {
            assert_eq!(check_close(payload), expected, "{payload:?}");
        }
    }
}
