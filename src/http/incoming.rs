//! The buffer of requests as they arrive. What is handed out is a message as
//! frames carry it: a header line, then the payload, in one piece.
//!
//! ```text
//!   0          start           write            read          filled    len
//!   |  consumed  | line, payload | coding undone | not read yet | spare |
//! ```

use std::{io::Write as _, ops::Range};

use super::{
    chunked::{Chunked, ChunkedError},
    head::{Content, Framing, Head, MAX_HEAD_SIZE, Route, find_end},
    response::Refusal,
};
use crate::wire::{Code, SYSTEM_VERSION, Version};

/// First size of a buffer, in bytes.
const FIRST_SIZE: usize = 1024;
/// A full buffer grows so many times at most at once.
const GROWTH: usize = 8;

/// What [`Incoming::take`] finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// A head: the owner admits it with [`Incoming::admit`], or answers without
    /// its body and calls [`Incoming::skip`] or closes.
    Head(Box<Head>),
    /// A whole message.
    Message {
        /// Where it lies, for [`Incoming::message`].
        body: Range<usize>,
        /// The payload is opaque bytes.
        binary: bool,
    },
}

#[derive(Debug)]
enum State {
    /// Waits for a head.
    Head,
    /// So many bytes of a head wait for their owner to admit it.
    Admission(usize),
    /// Waits for so many bytes.
    Length { size: usize, binary: bool },
    /// Undoes the coding.
    Chunked { coding: Chunked, binary: bool },
}

/// See the module. Its memory follows what has arrived, up to
/// `max_message_size`, a head and one read.
#[derive(Debug)]
pub struct Incoming {
    buf: Vec<u8>,
    /// Invariant: `start <= write <= read <= filled <= buf.len()`.
    start: usize,
    write: usize,
    read: usize,
    filled: usize,
    /// Of the head that is not whole, so much was looked at.
    scanned: usize,
    state: State,
    max_message_size: usize,
    read_size: usize,
    /// A read left no room since it was empty last.
    cramped: bool,
}

impl Incoming {
    /// Creates a buffer that begins with bytes that have arrived.
    #[must_use]
    pub fn new(arrived: &[u8], max_message_size: usize, read_size: usize) -> Self {
        let mut buf = arrived.to_vec();
        buf.resize(arrived.len().max(read_size.min(FIRST_SIZE)), 0);
        Self {
            buf,
            start: 0,
            write: 0,
            read: 0,
            filled: arrived.len(),
            scanned: 0,
            state: State::Head,
            max_message_size,
            read_size,
            cramped: false,
        }
    }

    /// Takes payloads of up to so many bytes from the next head on.
    pub fn set_max_message_size(&mut self, max_message_size: usize) {
        self.max_message_size = max_message_size;
    }

    /// Returns what is next, or none until more has arrived.
    ///
    /// # Errors
    /// The response to what can't be read on: the connection closes after it.
    pub fn take(&mut self) -> Result<Option<Taken>, Refusal> {
        match &mut self.state {
            State::Head => {
                if self.read == self.filled {
                    return Ok(None);
                }
                let unread = &self.buf[self.read..self.filled];
                let Some(size) = find_end(unread, &mut self.scanned)? else {
                    return Ok(None);
                };
                let head = Head::parse(&unread[..size])?;
                self.state = State::Admission(size);
                Ok(Some(Taken::Head(Box::new(head))))
            }
            State::Admission(_) => Ok(None),
            State::Length { size, binary } => {
                if self.filled - self.read < *size {
                    return Ok(None);
                }
                let (size, binary) = (*size, *binary);
                self.read += size;
                self.write = self.read;
                Ok(Some(self.taken(binary)))
            }
            State::Chunked { coding, binary } => {
                let binary = *binary;
                let place = (self.write, self.read, self.filled);
                (self.write, self.read) =
                    coding
                        .decode(&mut self.buf, place)
                        .map_err(|error| match error {
                            ChunkedError::Malformed(what) => {
                                Refusal::new(Code::MalformedMessage, what)
                            }
                            ChunkedError::TooLarge => too_large(self.max_message_size),
                        })?;
                let is_done = coding.is_done();
                Ok(is_done.then(|| self.taken(binary)))
            }
        }
    }

    fn taken(&mut self, binary: bool) -> Taken {
        let body = self.start..self.write;
        (self.start, self.write) = (self.read, self.read);
        self.state = State::Head;
        Taken::Message { body, binary }
    }

    /// Reads on: the head becomes the header line of a message with this id.
    ///
    /// # Errors
    /// The body is announced to be larger than a message may be.
    ///
    /// # Panics
    /// If no head waits, or what it asks for is refused.
    pub fn admit(&mut self, head: &Head, request_id: &str) -> Result<(), Refusal> {
        let State::Admission(size) = self.state else {
            panic!("a head was taken");
        };
        let binary = head.content == Content::Binary;
        let state = match head.framing {
            Framing::Length(size) => {
                let size = usize::try_from(size)
                    .ok()
                    .filter(|size| *size <= self.max_message_size);
                let size = size.ok_or_else(|| too_large(self.max_message_size))?;
                State::Length { size, binary }
            }
            Framing::Chunked => State::Chunked {
                coding: Chunked::new(self.max_message_size),
                binary,
            },
        };
        let line = line(head, request_id);
        let end = self.read + size;
        if let Some(missing) = line.len().checked_sub(end).filter(|missing| *missing > 0) {
            self.buf.splice(0..0, std::iter::repeat_n(0, missing));
            self.filled += missing;
        }
        let end = end.max(line.len());
        self.start = end - line.len();
        (self.write, self.read) = (end, end);
        self.buf[self.start..end].copy_from_slice(&line);
        self.state = state;
        Ok(())
    }

    /// Drops a head that has no body and is answered otherwise.
    ///
    /// # Panics
    /// If no head waits.
    pub fn skip(&mut self) {
        let State::Admission(size) = self.state else {
            panic!("a head was taken");
        };
        self.read += size;
        (self.start, self.write) = (self.read, self.read);
        self.state = State::Head;
    }

    /// Puts a header line before a part of a message that was taken, and makes
    /// another message of both.
    pub fn relabel(&mut self, payload: Range<usize>, line: &[u8]) -> Range<usize> {
        let missing = line.len().saturating_sub(payload.start);
        if missing > 0 {
            self.buf.reserve_exact(missing);
            self.buf.splice(0..0, std::iter::repeat_n(0, missing));
            for place in [
                &mut self.start,
                &mut self.write,
                &mut self.read,
                &mut self.filled,
            ] {
                *place += missing;
            }
        }
        let (start, end) = (payload.start + missing, payload.end + missing);
        self.buf[start - line.len()..start].copy_from_slice(line);
        start - line.len()..end
    }

    /// A message that was taken; it lies there until the next read.
    #[must_use]
    pub fn message(&self, body: Range<usize>) -> &[u8] {
        &self.buf[body]
    }

    /// A buffer that goes on with what lies behind the message that was taken
    /// last.
    #[must_use]
    pub fn split(&self) -> Self {
        let rest = &self.buf[self.read..self.filled];
        Self::new(rest, self.max_message_size, self.read_size)
    }

    /// Whether it may read without growing, and holds nothing: what a client
    /// sends while its request is served waits in the system otherwise.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.is_midway() && self.filled < self.buf.len()
    }

    /// Whether bytes lie behind the head that was admitted.
    #[must_use]
    pub fn has_body(&self) -> bool {
        self.read < self.filled
    }

    /// Whether a request has begun and not ended.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        self.start < self.filled || !matches!(self.state, State::Head)
    }

    /// Bytes of memory that the buffer holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.buf.capacity()
    }

    /// Memory that the buffer will have once [`Incoming::spare`] was called.
    #[must_use]
    pub fn next_capacity(&self) -> usize {
        let size = self.buf.len();
        if !self.is_midway() {
            return if self.cramped && size < self.read_size {
                (size * 2).min(self.read_size)
            } else {
                size.min(self.read_size)
            };
        }
        let held = (self.write - self.start) + (self.filled - self.read);
        if self.filled < size || size - held >= size / 4 {
            return size;
        }
        let missing = match self.state {
            State::Length { size, .. } => size.saturating_sub(self.filled - self.read),
            _ => 0,
        };
        let bound = self.max_message_size + MAX_HEAD_SIZE + self.read_size;
        let steep = (size * GROWTH).min(held + missing);
        steep.max(size * 2).min(bound).max(held + self.read_size)
    }

    /// Room for the next read; never empty.
    pub fn spare(&mut self) -> &mut [u8] {
        let capacity = self.next_capacity();
        if !self.is_midway() {
            (self.start, self.write, self.read, self.filled) = (0, 0, 0, 0);
            self.cramped = false;
            if self.buf.len() != capacity {
                self.buf = vec![0; capacity];
            }
        } else if self.filled == self.buf.len() {
            self.compact();
            if capacity > self.buf.len() {
                self.buf.reserve_exact(capacity - self.buf.len());
                self.buf.resize(capacity, 0);
            }
        }
        &mut self.buf[self.filled..]
    }

    /// Takes note that a read put `count` bytes into [`Incoming::spare`].
    ///
    /// # Panics
    /// If that is more than there was room for.
    pub fn advance(&mut self, count: usize) {
        self.filled += count;
        assert!(
            self.filled <= self.buf.len(),
            "more arrived than there was room for"
        );
        self.cramped |= self.filled == self.buf.len();
    }

    /// Moves what is held to the front, without the gap.
    fn compact(&mut self) {
        self.buf.copy_within(self.start..self.write, 0);
        self.write -= self.start;
        self.start = 0;
        self.buf.copy_within(self.read..self.filled, self.write);
        self.filled -= self.read - self.write;
        self.read = self.write;
    }
}

fn too_large(most: usize) -> Refusal {
    let message = format!("the body is larger than {most} bytes, which max_message_size allows");
    Refusal::new(Code::MessageTooLarge, message)
}

/// The header line for a head that asks for something that exists.
fn line(head: &Head, request_id: &str) -> Vec<u8> {
    let (topic, version, kind) = match &head.asked {
        Ok(Route::Message {
            topic,
            version,
            is_publish,
        }) => (
            &**topic,
            version.unwrap_or(Version::new(0, 0, 0)),
            if *is_publish { "PUBLISH" } else { "REQUEST" },
        ),
        Ok(route) => (route.system_topic(), SYSTEM_VERSION, "REQUEST"),
        Err(_) => panic!("what is refused is not admitted"),
    };
    let mut line = Vec::with_capacity(128);
    let parent = head.parent_request_id.as_deref().unwrap_or_default();
    // Writing to a vector can't fail.
    let _ = write!(line, "{kind}:{topic}:{version}:{request_id}");
    match head.timeout.filter(|_| kind == "REQUEST") {
        Some(timeout) => {
            let _ = write!(line, ":{parent}:{}", timeout.as_millis());
        }
        None if !parent.is_empty() => {
            let _ = write!(line, ":{parent}");
        }
        None => {}
    }
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: usize = 20_000;
    const READ: usize = 256;

    /// Feeds bytes in pieces. Returns the messages, and the status of the
    /// refusal that ended it.
    fn feed(bytes: &[u8], pieces: &[usize]) -> (Vec<Vec<u8>>, Option<u16>) {
        let mut incoming = Incoming::new(&[], MOST, READ);
        let (mut messages, mut left) = (Vec::new(), bytes);
        let mut pieces = pieces.iter().copied().cycle();
        loop {
            loop {
                match incoming.take() {
                    Ok(None) => break,
                    Ok(Some(Taken::Head(head))) if head.asked.is_ok() => {
                        if let Err(refusal) = incoming.admit(&head, "id") {
                            return (messages, Some(refusal.status));
                        }
                    }
                    Ok(Some(Taken::Head(head))) if head.framing == Framing::Length(0) => {
                        incoming.skip();
                    }
                    Ok(Some(Taken::Head(_))) => return (messages, None),
                    Ok(Some(Taken::Message { body, .. })) => {
                        messages.push(incoming.message(body).to_vec());
                    }
                    Err(refusal) => return (messages, Some(refusal.status)),
                }
            }
            if left.is_empty() {
                return (messages, None);
            }
            let promised = incoming.next_capacity();
            let spare = incoming.spare();
            let count = spare.len().min(left.len()).min(pieces.next().unwrap_or(1));
            spare[..count].copy_from_slice(&left[..count]);
            incoming.advance(count);
            left = &left[count..];
            assert!(incoming.buf.len() <= promised.max(READ));
            // The line of a message may be longer than its head.
            let bound = MOST + MAX_HEAD_SIZE + READ + 1024;
            assert!(incoming.capacity() <= bound, "{}", incoming.capacity());
        }
    }

    fn request(payload: &str, chunk: Option<usize>) -> String {
        let head = "POST /call/a.b HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n";
        let Some(chunk) = chunk else {
            return format!("{head}Content-Length: {}\r\n\r\n{payload}", payload.len());
        };
        let mut text = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
        for piece in payload.as_bytes().chunks(chunk) {
            let piece = String::from_utf8_lossy(piece);
            text += &format!("{:x};x=y\r\n{piece}\r\n", piece.len());
        }
        text + "0\r\nA: b\r\n\r\n"
    }

    proptest! {
        /// However the bytes are split, the messages are the same.
        #[test]
        fn messages_are_what_was_sent(
            sent in proptest::collection::vec(
                ("[ -~]{0,3000}", proptest::option::of(1..700usize)), 1..6),
            pieces in proptest::collection::vec(1..2000usize, 1..20),
        ) {
            let bytes: String = sent.iter().map(|(text, chunk)| request(text, *chunk)).collect();
            let expected: Vec<_> = sent.iter()
                .map(|(text, _)| format!("REQUEST:a.b:0.0.0:id\n{text}").into_bytes())
                .collect();
            prop_assert_eq!(feed(bytes.as_bytes(), &pieces), (expected, None));
        }

        /// What is broken is read alike however it is split, within its bounds.
        #[test]
        fn broken_bytes_are_read_alike(
            text in "[ -~]{0,200}",
            chunk in proptest::option::of(1..50usize),
            broken in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            pieces in proptest::collection::vec(1..100usize, 1..9),
        ) {
            let mut bytes = request(&text, chunk).repeat(2).into_bytes();
            for (at, byte) in broken {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            prop_assert_eq!(feed(&bytes, &pieces), feed(&bytes, &[1_000_000]));
        }
    }

    #[test]
    fn a_part_of_a_message_is_relabelled_wherever_it_lies() {
        for (payload, part) in [
            ("{\"a\":[1]}", 5..8),
            ("[1]", 0..3),
            (&*"x".repeat(3000), 2999..3000),
            ("{}", 2..2),
        ] {
            for line in ["REQUEST:a.b:0.0.0:id\n", &"L".repeat(600)] {
                let bytes = request(payload, None) + "GET /services";
                let mut incoming = Incoming::new(bytes.as_bytes(), MOST, READ);
                let Ok(Some(Taken::Head(head))) = incoming.take() else {
                    panic!("no head");
                };
                incoming.admit(&head, "id").unwrap();
                let Ok(Some(Taken::Message { body, .. })) = incoming.take() else {
                    panic!("no message");
                };
                let first = body.end - payload.len();
                let own = incoming.relabel(first + part.start..first + part.end, line.as_bytes());
                let expected = format!("{line}{}", &payload[part.clone()]);
                assert_eq!(incoming.message(own), expected.as_bytes());
                assert_eq!(incoming.take(), Ok(None), "the next head is not whole");
                incoming.spare();
                let rest = b" HTTP/1.1\r\nHost: a\r\n\r\n";
                incoming.spare()[..rest.len()].copy_from_slice(rest);
                incoming.advance(rest.len());
                let Ok(Some(Taken::Head(head))) = incoming.take() else {
                    panic!("no second head");
                };
                assert_eq!(head.asked, Ok(Route::Services));
            }
        }
    }

    #[test]
    fn bounds_hold_for_what_is_announced() {
        let announced = |length: usize| {
            let head = "POST /call/a.b HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n";
            feed(
                format!("{head}Content-Length: {length}\r\n\r\n").as_bytes(),
                &[7],
            )
            .1
        };
        assert_eq!((announced(MOST), announced(MOST + 1)), (None, Some(413)));
        let text = "x".repeat(MOST + 1);
        assert_eq!(
            feed(request(&text, Some(999)).as_bytes(), &[5000]).1,
            Some(413)
        );
        let long = format!("GET /healthz HTTP/1.1\r\nX: {}", "x".repeat(20_000));
        assert_eq!(feed(long.as_bytes(), &[300]).1, Some(431));
    }
}
