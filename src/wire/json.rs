//! Whether bytes are one JSON text that everyone downstream can read.

use serde_json::{Value, value::RawValue};

/// How deep arrays and objects may nest. serde_json refuses the 128th level,
/// so a service that parses with it never meets a payload that it can't read.
pub const MAX_DEPTH: usize = 127;

/// What stands in for an empty payload.
pub const NULL: &str = "null";

/// A JSON text as a tree. What no tree holds, such as `1e999` or half of a
/// surrogate pair, is valid by the grammar that is checked here; it becomes a
/// string of the text.
#[must_use]
pub fn tree(text: &RawValue) -> Value {
    serde_json::from_str(text.get()).unwrap_or_else(|_| text.get().into())
}

/// Checks that a payload is one JSON text in UTF-8, nested at most
/// [`MAX_DEPTH`] deep.
///
/// # Errors
/// The first of the three that fails.
pub fn check(payload: &[u8]) -> Result<&str, JsonError> {
    let text = std::str::from_utf8(payload).map_err(|e| JsonError::Encoding {
        at: e.valid_up_to(),
    })?;
    check_text(text)?;
    Ok(text)
}

/// The same for what is known to be UTF-8.
///
/// # Errors
/// As [`check`].
pub fn check_text(text: &str) -> Result<(), JsonError> {
    check_depth(text, MAX_DEPTH)
}

/// The same with another limit, at most [`MAX_DEPTH`]; for what is to stand
/// inside something else, lowered by the levels around it.
///
/// # Errors
/// As [`check`].
pub fn check_depth(text: &str, limit: usize) -> Result<(), JsonError> {
    let found = Text(text.as_bytes()).check(limit.min(MAX_DEPTH));
    found.map_err(|wrong| match wrong {
        Wrong::Depth => JsonError::Depth { limit },
        Wrong::At(at) => {
            let before = &text.as_bytes()[..at];
            let line_start = before
                .iter()
                .rposition(|&byte| byte == b'\n')
                .map_or(0, |newline| newline + 1);
            let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
            JsonError::Grammar {
                line,
                column: at - line_start + 1,
            }
        }
    })
}

/// One pass over the bytes, without a value built or a byte copied.
///
/// Measured beside serde_json's `IgnoredAny` (which needs two further passes,
/// for encoding and depth), sonic-rs and simd-json with 64 B to 1 MiB: this is
/// twice to eight times as fast as the first, and faster than the other two
/// but for long texts that are not ASCII. sonic-rs takes `"\u12g4"` and any
/// depth for JSON. And untrusted bytes are read here without `unsafe`.
struct Text<'a>(&'a [u8]);

/// What is wrong.
enum Wrong {
    /// This byte, or the end there.
    At(usize),
    Depth,
}

impl Text<'_> {
    fn check(&self, limit: usize) -> Result<(), Wrong> {
        let mut at = 0;
        let mut depth = 0;
        // One bit for each level, the innermost lowest: is it an object?
        let mut objects = 0_u128;
        const { assert!(MAX_DEPTH <= 128, "a bit for each level") };
        loop {
            // A value begins.
            at = self.blank(at);
            match self.0.get(at) {
                Some(b'"') => at = self.string(at + 1)?,
                Some(open @ (b'{' | b'[')) => {
                    if depth == limit {
                        return Err(Wrong::Depth);
                    }
                    let object = *open == b'{';
                    at = self.blank(at + 1);
                    if self.0.get(at) == Some(if object { &b'}' } else { &b']' }) {
                        at += 1;
                    } else {
                        depth += 1;
                        objects = objects << 1 | u128::from(object);
                        if object {
                            at = self.key(at)?;
                        }
                        continue;
                    }
                }
                Some(b'-' | b'0'..=b'9') => at = self.number(at)?,
                Some(b't') => at = self.word(at, b"true")?,
                Some(b'f') => at = self.word(at, b"false")?,
                Some(b'n') => at = self.word(at, b"null")?,
                _ => return Err(Wrong::At(at)),
            }
            // A value has ended, and perhaps what it stands in.
            loop {
                at = self.blank(at);
                let object = objects & 1 == 1;
                match self.0.get(at) {
                    None if depth == 0 => return Ok(()),
                    Some(b',') if depth > 0 => {
                        at += 1;
                        if object {
                            at = self.key(self.blank(at))?;
                        }
                        break;
                    }
                    Some(b'}') if depth > 0 && object => {}
                    Some(b']') if depth > 0 && !object => {}
                    _ => return Err(Wrong::At(at)),
                }
                at += 1;
                depth -= 1;
                objects >>= 1;
            }
        }
    }

    #[inline]
    fn blank(&self, mut at: usize) -> usize {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.0.get(at) {
            at += 1;
        }
        at
    }

    /// A key and its colon.
    #[inline]
    fn key(&self, at: usize) -> Result<usize, Wrong> {
        if self.0.get(at) != Some(&b'"') {
            return Err(Wrong::At(at));
        }
        let at = self.blank(self.string(at + 1)?);
        if self.0.get(at) == Some(&b':') {
            Ok(at + 1)
        } else {
            Err(Wrong::At(at))
        }
    }

    #[inline]
    fn word(&self, at: usize, word: &[u8]) -> Result<usize, Wrong> {
        if self.0[at..].starts_with(word) {
            Ok(at + word.len())
        } else {
            Err(Wrong::At(at))
        }
    }

    /// From behind the opening quote to behind the closing one.
    #[inline]
    fn string(&self, mut at: usize) -> Result<usize, Wrong> {
        loop {
            // Most of a text is plain: 64 bytes at once, then 8, then one.
            while self.0.get(at..at + 64).is_some_and(is_plain) {
                at += 64;
            }
            while let Some(word) = self.0.get(at..at + 8) {
                let special = special(word);
                if special != 0 {
                    at += special.trailing_zeros() as usize / 8;
                    break;
                }
                at += 8;
            }
            loop {
                match self.0.get(at) {
                    Some(b'"') => return Ok(at + 1),
                    Some(b'\\') => {
                        at = self.escape(at + 1)?;
                        break;
                    }
                    Some(0..0x20) | None => return Err(Wrong::At(at)),
                    Some(_) => at += 1,
                }
            }
        }
    }

    fn escape(&self, at: usize) -> Result<usize, Wrong> {
        match self.0.get(at) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(at + 1),
            Some(b'u') => {
                let hex = self.0.get(at + 1..at + 5);
                let fine = hex.is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit));
                if fine { Ok(at + 5) } else { Err(Wrong::At(at)) }
            }
            _ => Err(Wrong::At(at)),
        }
    }

    #[inline]
    fn number(&self, mut at: usize) -> Result<usize, Wrong> {
        at += usize::from(self.0.get(at) == Some(&b'-'));
        at = if self.0.get(at) == Some(&b'0') {
            at + 1
        } else {
            self.digits(at)?
        };
        if self.0.get(at) == Some(&b'.') {
            at = self.digits(at + 1)?;
        }
        if let Some(b'e' | b'E') = self.0.get(at) {
            at += 1;
            at += usize::from(matches!(self.0.get(at), Some(b'+' | b'-')));
            at = self.digits(at)?;
        }
        Ok(at)
    }

    #[inline]
    fn digits(&self, at: usize) -> Result<usize, Wrong> {
        let mut end = at;
        while let Some(b'0'..=b'9') = self.0.get(end) {
            end += 1;
        }
        if end > at {
            Ok(end)
        } else {
            Err(Wrong::At(at))
        }
    }
}

/// Whether no byte ends the plain part of a text, in a form that compilers
/// turn into vector instructions. With the second bit turned over, the quote is
/// next to the control characters, and one comparison finds both.
#[inline]
fn is_plain(bytes: &[u8]) -> bool {
    let fold = |(least, backslash): (u8, bool), &byte: &u8| {
        (least.min(byte ^ 2), backslash | (byte == b'\\'))
    };
    let (least, backslash) = bytes.iter().fold((u8::MAX, false), fold);
    least > 0x20 && !backslash
}

/// Of eight bytes, those that end the plain part of a text have their highest
/// bit set: quote, backslash, control character. A byte behind the first of
/// them may be marked wrongly, by the carry. (Hacker's Delight, 6-1.)
#[inline]
fn special(bytes: &[u8]) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    const HIGH: u64 = ONES * 0x80;
    let word = bytes
        .iter()
        .rev()
        .fold(0, |word, &byte| word << 8 | u64::from(byte));
    let zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGH;
    let below_space = word.wrapping_sub(ONES * 0x20) & !word & HIGH;
    zero(word ^ (ONES * u64::from(b'"'))) | zero(word ^ (ONES * u64::from(b'\\'))) | below_space
}

/// Why a payload is no JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Not UTF-8.
    #[error("not UTF-8 after byte {at}")]
    Encoding {
        /// Bytes before the first wrong one.
        at: usize,
    },
    /// Not the grammar of RFC 8259.
    #[error("not JSON at line {line} column {column}")]
    Grammar {
        /// Counted from 1.
        line: usize,
        /// Counted from 1, in bytes.
        column: usize,
    },
    /// Nested too deep.
    #[error("nested deeper than the limit of {limit}")]
    Depth {
        /// What is allowed.
        limit: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts() {
        for good in [
            "null",
            " {\"a\": [1, 2.5e3, true, \"\\u00e9\\\"]\"]} ",
            "0",
            "\"[[[\"",
            "1e999",
        ] {
            assert_eq!(check(good.as_bytes()), Ok(good));
        }
        let bad = |text: &[u8], expected| assert_eq!(check(text), Err(expected), "{text:?}");
        bad(b"", JsonError::Grammar { line: 1, column: 1 });
        bad(b"{} {}", JsonError::Grammar { line: 1, column: 4 });
        bad(b"[1,]", JsonError::Grammar { line: 1, column: 4 });
        bad(b"\"\\", JsonError::Grammar { line: 1, column: 3 });
        bad(b"\"a\nb\"", JsonError::Grammar { line: 1, column: 3 });
        bad(b"[1,\n 2,, 3]", JsonError::Grammar { line: 2, column: 4 });
        bad(b"\"\xff\"", JsonError::Encoding { at: 1 });
    }

    #[test]
    fn every_byte_counts_anywhere_in_a_text() {
        let length = 150;
        for at in 0..length {
            for byte in 0..0x80 {
                let mut text = vec![b'x'; length];
                text[at] = byte;
                let text = format!("\"{}\"", String::from_utf8(text).unwrap());
                let read = serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok();
                assert_eq!(check_text(&text).is_ok(), read, "{byte:#x} at {at}");
            }
        }
    }

    #[test]
    fn depth_is_that_of_serde_json() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for depth in [MAX_DEPTH, MAX_DEPTH + 1] {
            let text = nested(depth);
            let read = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            assert_eq!(check(text.as_bytes()).is_ok(), read, "{depth}");
        }
        assert_eq!(
            check(nested(MAX_DEPTH + 1).as_bytes()),
            Err(JsonError::Depth { limit: MAX_DEPTH })
        );
    }

    /// Values of every kind, and what is near them.
    const WORDS: [&str; 22] = [
        "0",
        "-0",
        "-12.5e+3",
        "1E9",
        "10.0",
        "true",
        "false",
        "null",
        "\"\"",
        "[]",
        "{}",
        "[[{}]]",
        "{\"a\":{\"b\":[1]}}",
        r#""\u00e9\"\\\/\b\f\n\r\t""#,
        r#""\ud834\udd1e""#,
        "\"Zähl ☃ 𝄞\"",
        "\"\u{7f}\u{80}\"",
        "\"a text of just thirty-one bytes\"",
        "\"a text that is longer than the sixty-four bytes of two rounds, by a bit\"",
        "\"seven..\"",
        "\"eight...\"",
        "1e999",
    ];

    proptest! {
        /// What passes here can be read, and what can be read passes here
        /// (numbers beyond f64 apart, which are JSON but not serde_json's).
        #[test]
        fn agrees_with_a_full_parse(text in "[\\[\\]{}:,\"\\\\a0-9eE.+ ntrulfs-]{0,40}") {
            let parsed = serde_json::from_str::<serde_json::Value>(&text);
            let beyond = parsed.as_ref().is_err_and(|e| e.to_string().contains("out of range"));
            prop_assert!(beyond || check(text.as_bytes()).is_ok() == parsed.is_ok(), "{text}");
        }

        /// A text that was in order, with some bytes replaced, removed or
        /// inserted: the grammar is exactly that of serde_json.
        #[test]
        fn agrees_on_the_grammar(
            words in proptest::collection::vec(0..WORDS.len(), 1..40),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), 0..3, any::<u8>()), 0..3),
            blanks in any::<bool>(),
        ) {
            let values: Vec<_> = words.iter().map(|&word| WORDS[word]).collect();
            let mut text = format!("{{\"list\":[{}],\"last\":{}}}", values.join(","), values[0]).into_bytes();
            if blanks {
                text = String::from_utf8(text).unwrap().replace(',', " ,\n\t").replace(':', " :\r ").into_bytes();
            }
            for (index, kind, byte) in changes {
                let at = index.index(text.len());
                match kind {
                    0 => text[at] = byte,
                    1 => drop(text.remove(at)),
                    _ => text.insert(at, byte),
                }
            }
            let read = std::str::from_utf8(&text)
                .is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok());
            prop_assert_eq!(check(&text).is_ok(), read, "{}", String::from_utf8_lossy(&text));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = check(&bytes);
        }
    }
}
