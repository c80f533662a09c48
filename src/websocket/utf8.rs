//! UTF-8 of a text that arrives in pieces.

/// What has been seen of a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Utf8 {
    /// The beginning of a character whose rest has not arrived.
    begun: [u8; 4],
    count: usize,
}

impl Utf8 {
    /// Takes the next piece. Returns false once the text can't be UTF-8,
    /// whatever follows.
    #[must_use]
    pub(super) fn take(&mut self, piece: &[u8]) -> bool {
        let mut rest = piece;
        while self.count > 0 {
            let Some((&byte, behind)) = rest.split_first() else {
                return true;
            };
            self.begun[self.count] = byte;
            self.count += 1;
            rest = behind;
            match std::str::from_utf8(&self.begun[..self.count]) {
                Ok(_) => self.count = 0,
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return false,
            }
        }
        match std::str::from_utf8(rest) {
            Ok(_) => true,
            Err(error) if error.error_len().is_none() => {
                // At most three bytes: a fourth would end the character.
                let begun = &rest[error.valid_up_to()..];
                self.begun[..begun.len()].copy_from_slice(begun);
                self.count = begun.len();
                true
            }
            Err(_) => false,
        }
    }

    /// Whether the text may end here.
    #[must_use]
    pub(super) fn is_whole(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_split_gives_the_same() {
        for text in [
            &b"plain"[..],
            "\u{e9}\u{4e2d}\u{1f600}x\u{10ffff}".as_bytes(),
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
            b"\xc0\xaf",
            b"a\xff",
            b"\xe4\xb8",
            b"\xf0\x9f\x98",
            b"\x80",
        ] {
            let expected = std::str::from_utf8(text).is_ok();
            for first in 0..=text.len() {
                for second in first..=text.len() {
                    let mut utf8 = Utf8::default();
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    let valid = pieces.iter().all(|piece| utf8.take(piece)) && utf8.is_whole();
                    assert_eq!(valid, expected, "{text:?} at {first} and {second}");
                }
            }
        }
    }

    #[test]
    fn it_fails_as_early_as_it_can() {
        let mut utf8 = Utf8::default();
        assert!(utf8.take(b"\xed"));
        assert!(!utf8.take(b"\xa0"), "a surrogate, whatever follows");
    }
}
