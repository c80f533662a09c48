//! Whether bytes are one JSON text that everyone downstream can read.

use std::fmt;

use serde::de::IgnoredAny;

/// How deep arrays and objects may nest. serde_json refuses the 128th level,
/// so a service that parses with it never meets a payload that it can't read.
pub const MAX_DEPTH: usize = 127;

/// What stands in for an empty payload.
pub const NULL: &str = "null";

/// Checks that a payload is one JSON text in UTF-8, nested at most
/// [`MAX_DEPTH`] deep.
///
/// `IgnoredAny` reads the grammar without building values, but it looks
/// neither at the encoding nor at the depth; those two are checked here.
///
/// # Errors
/// The first of the three that fails.
pub fn check(payload: &[u8]) -> Result<&str, JsonError> {
    let text = std::str::from_utf8(payload).map_err(|e| JsonError::Encoding { at: e.valid_up_to() })?;
    check_text(text)?;
    Ok(text)
}

/// The same for what is known to be UTF-8.
///
/// # Errors
/// As [`check`].
pub fn check_text(text: &str) -> Result<(), JsonError> {
    check_depth(text, MAX_DEPTH)?;
    let IgnoredAny =
        serde_json::from_str(text).map_err(|e| JsonError::Grammar { column: e.column(), line: e.line() })?;
    Ok(())
}

/// Checks the depth alone; for what is to stand inside something else, with
/// the limit lowered by the levels around it.
///
/// # Errors
/// [`JsonError::Depth`].
pub fn check_depth(text: &str, limit: usize) -> Result<(), JsonError> {
    let mut depth = 0_usize;
    let mut bytes = text.as_bytes().iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                if depth > limit {
                    return Err(JsonError::Depth { limit });
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            // Brackets in a string do not nest. A string without an end is
            // left to the grammar.
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => drop(bytes.next()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Why a payload is no JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JsonError {
    /// Not UTF-8.
    Encoding {
        /// Bytes before the first wrong one.
        at: usize,
    },
    /// Not the grammar of RFC 8259.
    Grammar {
        /// Counted from 1.
        line: usize,
        /// Counted from 1, in bytes.
        column: usize,
    },
    /// Nested too deep.
    Depth {
        /// What is allowed.
        limit: usize,
    },
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Encoding { at } => write!(f, "not UTF-8 after byte {at}"),
            Self::Grammar { line, column } => write!(f, "not JSON at line {line} column {column}"),
            Self::Depth { limit } => write!(f, "nested deeper than the limit of {limit}"),
        }
    }
}

impl std::error::Error for JsonError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts() {
        for good in ["null", " {\"a\": [1, 2.5e3, true, \"\\u00e9\\\"]\"]} ", "0", "\"[[[\"", "1e999"] {
            assert_eq!(check(good.as_bytes()), Ok(good));
        }
        let bad = |text: &[u8], expected| assert_eq!(check(text), Err(expected), "{text:?}");
        bad(b"", JsonError::Grammar { line: 1, column: 0 });
        bad(b"{} {}", JsonError::Grammar { line: 1, column: 4 });
        bad(b"[1,]", JsonError::Grammar { line: 1, column: 4 });
        bad(b"\"\\", JsonError::Grammar { line: 1, column: 2 });
        bad(b"\"a\nb\"", JsonError::Grammar { line: 1, column: 2 });
        bad(b"\"\xff\"", JsonError::Encoding { at: 1 });
    }

    #[test]
    fn depth_is_that_of_serde_json() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for depth in [MAX_DEPTH, MAX_DEPTH + 1] {
            let text = nested(depth);
            let read = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            assert_eq!(check(text.as_bytes()).is_ok(), read, "{depth}");
        }
        assert_eq!(check(nested(MAX_DEPTH + 1).as_bytes()), Err(JsonError::Depth { limit: MAX_DEPTH }));
    }

    proptest! {
        /// What passes here can be read, and what can be read passes here
        /// (numbers beyond f64 apart, which are JSON but not serde_json's).
        #[test]
        fn agrees_with_a_full_parse(text in "[\\[\\]{}:,\"\\\\a0-9eE.+ ntrulfs-]{0,40}") {
            let parsed = serde_json::from_str::<serde_json::Value>(&text);
            let beyond = parsed.as_ref().is_err_and(|e| e.to_string().contains("out of range"));
            prop_assert!(beyond || check(text.as_bytes()).is_ok() == parsed.is_ok(), "{text}");
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = check(&bytes);
        }
    }
}
