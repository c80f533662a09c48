//! The line in front of every payload:
//! `KIND:topic:version[:requestId[:parentRequestId[:timeout]]]`.

use std::{fmt, io::Write as _, time::Duration};

use super::version::{Version, VersionError};

/// Longest header line, in bytes before the line feed.
pub const MAX_HEADER_SIZE: usize = 1024;
/// Longest topic, in bytes.
pub const MAX_TOPIC_SIZE: usize = 255;
/// Longest request id, in bytes.
pub const MAX_REQUEST_ID_SIZE: usize = 64;
/// Longest timeout that a request may ask for: one hour.
pub const MAX_TIMEOUT: Duration = Duration::from_millis(3_600_000);

crate::words! {
    /// First field of the line. The protocol calls it ACTION; here `action` is
    /// what a topic names, so this is the kind of the message.
    pub enum Kind {
        /// A client asks and gets exactly one answer.
        Request = "REQUEST",
        /// The server answers.
        Response = "RESPONSE",
        /// The server refuses, or the service fails.
        Error = "ERROR",
        /// A client tells, and wants at most to know that it arrived.
        Publish = "PUBLISH",
    }
}

impl Kind {
    fn parse(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str().eq_ignore_ascii_case(text))
    }
}

/// What a message is about: two to five segments joined by dots. The first is
/// the service, the rest its action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic<'a> {
    text: &'a str,
    /// Invariant: the index of the first dot in `text`.
    dot: usize,
}

impl<'a> Topic<'a> {
    /// Checks a topic.
    ///
    /// # Errors
    /// Breaks of the grammar above, or more than 255 bytes.
    pub fn parse(text: &'a str) -> Result<Self, HeaderError> {
        // In one pass: the topic of every message goes through here.
        let (mut dots, mut first_dot, mut begins) = (0, 0, true);
        for (index, &byte) in text.as_bytes().iter().enumerate() {
            match class(byte) {
                LETTER => begins = false,
                DIGIT | MARK if !begins => {}
                DOT if !begins => {
                    (dots, begins) = (dots + 1, true);
                    first_dot = if dots == 1 { index } else { first_dot };
                }
                _ => return Err(HeaderError::Topic),
            }
        }
        let sound = (1..=4).contains(&dots) && !begins && text.len() <= MAX_TOPIC_SIZE;
        if sound {
            Ok(Self {
                text,
                dot: first_dot,
            })
        } else {
            Err(HeaderError::Topic)
        }
    }

    /// The whole topic.
    #[must_use]
    pub fn as_str(&self) -> &'a str {
        self.text
    }

    /// The service's name.
    #[must_use]
    pub fn service(&self) -> &'a str {
        &self.text[..self.dot]
    }

    /// The action, which may hold dots itself.
    #[must_use]
    pub fn action(&self) -> &'a str {
        &self.text[self.dot + 1..]
    }
}

/// A letter, then letters, digits, `-` and `_`: a segment of a topic, and so
/// the name of a service too.
#[must_use]
pub fn is_segment(text: &str) -> bool {
    let mut bytes = text.bytes().map(class);
    bytes.next() == Some(LETTER) && bytes.all(|class| matches!(class, LETTER | DIGIT | MARK))
}

/// 1 to 64 letters, digits, `.`, `_` and `-`.
#[must_use]
pub fn is_request_id(text: &str) -> bool {
    (1..=MAX_REQUEST_ID_SIZE).contains(&text.len())
        && text
            .bytes()
            .all(|byte| matches!(class(byte), LETTER | DIGIT | MARK | DOT))
}

/// What a byte is within a header line, from a table: the lines of all
/// messages go through here byte by byte.
fn class(byte: u8) -> u8 {
    CLASSES[byte as usize]
}

/// Neither printable nor ASCII, or a space: may not be in a line.
const REFUSED: u8 = 0;
/// Printable, but in no name.
const OTHER: u8 = 1;
const LETTER: u8 = 2;
const DIGIT: u8 = 3;
/// `-` and `_`.
const MARK: u8 = 4;
const DOT: u8 = 5;
const COLON: u8 = 6;

const CLASSES: [u8; 256] = {
    let mut classes = [REFUSED; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = match byte as u8 {
            b'.' => DOT,
            b':' => COLON,
            b'-' | b'_' => MARK,
            b'0'..=b'9' => DIGIT,
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'!'..=b'~' => OTHER,
            _ => REFUSED,
        };
        byte += 1;
    }
    classes
};

/// Fields of a line at most.
const MAX_FIELDS: usize = 6;

/// A header line that follows the grammar. Whether a REQUEST carries an id is
/// not the grammar's business: it has an error code of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header<'a> {
    /// What the message is.
    pub kind: Kind,
    /// What it is about.
    pub topic: Topic<'a>,
    /// The version that the client was written against.
    pub version: Version,
    /// Joins an answer to its request.
    pub request_id: Option<&'a str>,
    /// The request that caused this one.
    pub parent_request_id: Option<&'a str>,
    /// REQUEST only: how long the client waits, 1 ms to 1 h.
    pub timeout: Option<Duration>,
}

impl<'a> Header<'a> {
    /// Splits a message into its header and its payload.
    ///
    /// # Errors
    /// Whatever breaks the grammar, the first that is found from the left.
    pub fn parse(message: &'a [u8]) -> Result<(Self, &'a [u8]), HeaderError> {
        if message.is_empty() {
            return Err(HeaderError::EmptyMessage);
        }
        let searched = &message[..message.len().min(MAX_HEADER_SIZE + 1)];
        let (mut ends, mut colons, mut refused) = ([0; MAX_FIELDS], 0, None);
        let end = searched.iter().enumerate().position(|(index, &byte)| {
            match class(byte) {
                REFUSED if byte == b'\n' => return true,
                REFUSED if refused.is_none() => refused = Some(byte),
                COLON => {
                    if let Some(end) = ends.get_mut(colons) {
                        *end = index;
                    }
                    colons += 1;
                }
                _ => {}
            }
            false
        });
        let Some(end) = end else {
            let too_long = message.len() > MAX_HEADER_SIZE;
            return Err(if too_long {
                HeaderError::TooLong
            } else {
                HeaderError::NoLineFeed
            });
        };
        if let Some(byte) = refused {
            return Err(HeaderError::Byte { byte });
        }
        let line =
            std::str::from_utf8(&message[..end]).map_err(|_| HeaderError::Byte { byte: 0x80 })?;
        if let Some(last) = ends.get_mut(colons) {
            *last = end;
        }
        Ok((
            Self::from_fields(line, ends, colons + 1)?,
            &message[end + 1..],
        ))
    }

    /// The fields of a line by where each of them ends.
    fn from_fields(
        line: &'a str,
        ends: [usize; MAX_FIELDS],
        count: usize,
    ) -> Result<Self, HeaderError> {
        let field = |index: usize| {
            let begin = if index == 0 { 0 } else { ends[index - 1] + 1 };
            Some(&line[begin..ends[index]]).filter(|field| !field.is_empty())
        };
        let optional = |index: usize| if index < count { field(index) } else { None };
        let kind = optional(0).and_then(Kind::parse).ok_or(HeaderError::Kind)?;
        let topic = Topic::parse(optional(1).ok_or(HeaderError::Topic)?)?;
        let version = optional(2).ok_or(HeaderError::Version)?;
        let version = version
            .parse()
            .map_err(|VersionError| HeaderError::Version)?;
        if count > MAX_FIELDS {
            return Err(HeaderError::TooManyFields);
        }
        let (request_id, parent_request_id) = (optional(3), optional(4));
        if ![request_id, parent_request_id]
            .into_iter()
            .flatten()
            .all(is_request_id)
        {
            return Err(HeaderError::RequestId);
        }
        let timeout = match optional(5) {
            None => None,
            Some(_) if kind != Kind::Request => return Err(HeaderError::TimeoutKind { kind }),
            Some(text) => Some(parse_timeout(text).ok_or(HeaderError::Timeout)?),
        };
        Ok(Self {
            kind,
            topic,
            version,
            request_id,
            parent_request_id,
            timeout,
        })
    }
}

fn parse_timeout(text: &str) -> Option<Duration> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let timeout = Duration::from_millis(text.parse().ok()?);
    (!timeout.is_zero() && timeout <= MAX_TIMEOUT).then_some(timeout)
}

impl fmt::Display for Header<'_> {
    /// The line without its line feed, and without empty fields at its end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = Vec::new();
        self.append_to(&mut line);
        f.write_str(&String::from_utf8_lossy(&line))
    }
}

impl Header<'_> {
    /// Appends the line as it is displayed. An answer's line has neither
    /// parent nor timeout, and needs none of the formatting machinery.
    pub(super) fn append_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.kind.as_str().as_bytes());
        out.push(b':');
        out.extend_from_slice(self.topic.as_str().as_bytes());
        out.push(b':');
        self.version.append_to(out);
        let id = self.request_id.unwrap_or_default();
        let parent = self.parent_request_id.unwrap_or_default();
        // Writing to a vector can't fail.
        let _ = match (id, parent, self.timeout) {
            (_, _, Some(timeout)) => write!(out, ":{id}:{parent}:{}", timeout.as_millis()),
            ("", "", None) => Ok(()),
            (id, "", None) => {
                out.push(b':');
                out.write_all(id.as_bytes())
            }
            (id, parent, None) => write!(out, ":{id}:{parent}"),
        };
    }
}

/// Why a message has no readable header. The answer is `MALFORMED_MESSAGE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The message holds no byte.
    #[error("empty message")]
    EmptyMessage,
    /// The message ends before its header line does.
    #[error("no line feed after the header line")]
    NoLineFeed,
    /// The line is longer than 1,024 bytes.
    #[error("header line exceeds the limit of {MAX_HEADER_SIZE} bytes")]
    TooLong,
    /// A byte that is not printable ASCII, or a space.
    #[error("byte {byte:#04x} in the header line, allowed is printable ASCII without spaces")]
    Byte {
        /// The first such byte.
        byte: u8,
    },
    /// The first field is none of the four words.
    #[error("first field must be REQUEST or PUBLISH")]
    Kind,
    /// The second field is no topic.
    #[error(
        "second field must be a topic: 2 to 5 segments joined by dots, at most {MAX_TOPIC_SIZE} bytes, each a letter then \
        letters, digits, - and _"
    )]
    Topic,
    /// The third field is no version.
    #[error("third field must be a version: {VersionError}")]
    Version,
    /// The fourth or fifth field is no request id.
    #[error("a request id is 1 to {MAX_REQUEST_ID_SIZE} letters, digits, dots, - and _")]
    RequestId,
    /// The sixth field is no timeout.
    #[error("sixth field must be a timeout of 1 to {} ms", MAX_TIMEOUT.as_millis())]
    Timeout,
    /// A timeout on anything but a REQUEST.
    #[error("a timeout goes with REQUEST only, not with {kind}")]
    TimeoutKind {
        /// What it stood on.
        kind: Kind,
    },
    /// More than six fields.
    #[error("more than 6 fields")]
    TooManyFields,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good(line: &str) -> String {
        let message = format!("{line}\n{{}}");
        let (header, payload) =
            Header::parse(message.as_bytes()).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert_eq!(payload, b"{}", "{line}");
        let mut appended = Vec::new();
        header.append_to(&mut appended);
        assert_eq!(
            appended,
            header.to_string().as_bytes(),
            "both ways to write it"
        );
        header.to_string()
    }

    #[test]
    fn lines_that_follow_the_grammar() {
        for line in [
            "REQUEST:service.action:1.0.0:req-uuid",
            "REQUEST:a.b:0.0.0",
            "PUBLISH:a.b.c.d.e:1.2.3",
            "REQUEST:calc.add:1.0.0:1:p.1:250",
            "REQUEST:calc.add:1.0.0:1::3600000",
            "REQUEST:calc.add:1.0.0::p_1",
            "ERROR:system.error:1.0.0",
            "RESPONSE:A-1.b_2:1.0.0:x",
        ] {
            assert_eq!(good(line), line);
        }
        assert_eq!(good("request:a.b:1.0.0:::"), "REQUEST:a.b:1.0.0");
        assert_eq!(good("ReQuEsT:a.b:1.0.0:7::"), "REQUEST:a.b:1.0.0:7");
        let topic = Topic::parse("orders.create.bulk").unwrap();
        assert_eq!((topic.service(), topic.action()), ("orders", "create.bulk"));
    }

    #[test]
    fn lines_that_break_it() {
        let check = |message: &[u8], expected: HeaderError| {
            assert_eq!(
                Header::parse(message),
                Err(expected),
                "{:?}",
                String::from_utf8_lossy(message)
            );
        };
        check(b"", HeaderError::EmptyMessage);
        check(b"REQUEST:a.b:1.0.0:1", HeaderError::NoLineFeed);
        check(b"\n", HeaderError::Kind);
        check(b":a.b:1.0.0\n", HeaderError::Kind);
        check(b"ASK:a.b:1.0.0\n", HeaderError::Kind);
        check(b"REQUEST\n", HeaderError::Topic);
        check(b"REQUEST::1.0.0\n", HeaderError::Topic);
        for topic in [
            "a",
            "a.",
            ".a",
            "a..b",
            "1a.b",
            "a.1",
            "a.b.c.d.e.f",
            "a.b$",
            "-a.b",
        ] {
            check(
                format!("REQUEST:{topic}:1.0.0:1\n").as_bytes(),
                HeaderError::Topic,
            );
        }
        check(
            format!("REQUEST:a.{}:1.0.0\n", "b".repeat(254)).as_bytes(),
            HeaderError::Topic,
        );
        assert!(Topic::parse(&format!("a.{}", "b".repeat(253))).is_ok());
        check(b"REQUEST:a.b\n", HeaderError::Version);
        check(b"REQUEST:a.b:1.0\n", HeaderError::Version);
        check(b"REQUEST:a.b:1.0.0:a/b\n", HeaderError::RequestId);
        check(b"REQUEST:a.b:1.0.0:1:a/b\n", HeaderError::RequestId);
        check(
            format!("REQUEST:a.b:1.0.0:{}\n", "i".repeat(65)).as_bytes(),
            HeaderError::RequestId,
        );
        for timeout in [
            "0",
            "-1",
            "+1",
            "1.5",
            "3600001",
            "99999999999999999999999",
            "5s",
        ] {
            check(
                format!("REQUEST:a.b:1.0.0:1::{timeout}\n").as_bytes(),
                HeaderError::Timeout,
            );
        }
        check(
            b"PUBLISH:a.b:1.0.0:1::5\n",
            HeaderError::TimeoutKind {
                kind: Kind::Publish,
            },
        );
        check(b"REQUEST:a.b:1.0.0:1:2:3:4\n", HeaderError::TooManyFields);
        check(b"REQUEST:a.b:1.0.0:1::::\n", HeaderError::TooManyFields);
        check(
            b"REQUEST:a.b:1.0.0:1\r\n",
            HeaderError::Byte { byte: b'\r' },
        );
        check(b"REQUEST:a b:1.0.0:1\n", HeaderError::Byte { byte: b' ' });
        check(
            "REQUEST:ä.b:1.0.0:1\n".as_bytes(),
            HeaderError::Byte { byte: 0xc3 },
        );
        check(
            &[b"REQUEST:a.b:1.0.0:".as_slice(), &[b'x'; 1100], b"\n"].concat(),
            HeaderError::TooLong,
        );
    }

    #[test]
    fn the_longest_line() {
        let pad = MAX_HEADER_SIZE - "REQUEST:a.b:1.0.0::::".len();
        let line = format!("REQUEST:a.b:1.0.0:{}\n", ":".repeat(3 + pad));
        assert_eq!(line.len(), MAX_HEADER_SIZE + 1);
        assert_eq!(
            Header::parse(line.as_bytes()),
            Err(HeaderError::TooManyFields)
        );
        let line = format!("REQUEST:a.b:1.0.0:{}\n", ":".repeat(4 + pad));
        assert_eq!(Header::parse(line.as_bytes()), Err(HeaderError::TooLong));
    }
}
