//! Requests as they arrive. What is handed out is a message as frames carry it:
//! a header line, then the payload, in one piece.

use std::{io::Write as _, ops::Range};

use super::{
    chunked::{Chunked, ChunkedError},
    head::{Content, Framing, Head, MAX_HEAD_SIZE, Route, find_end},
    response::Refusal,
};
use crate::wire::{Buffer, Code, SYSTEM_VERSION, Version};

/// What [`Incoming::take`] finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// A head: the owner admits it with [`Incoming::admit`], or answers without
    /// its body and calls [`Incoming::skip`] or closes.
    Head(Box<Head>),
    /// A whole message.
    Message {
        /// Where it lies, for [`Buffer::message`].
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

/// Reads requests in a [`Buffer`], which holds up to `max_message_size` and a
/// head.
#[derive(Debug)]
pub struct Incoming {
    buffer: Buffer,
    /// Of the head that is not whole, so much was looked at.
    scanned: usize,
    state: State,
    max_message_size: usize,
}

impl Incoming {
    /// Goes on with the bytes that have arrived.
    #[must_use]
    pub fn new(mut buffer: Buffer, max_message_size: usize) -> Self {
        buffer.set_most(max_message_size + MAX_HEAD_SIZE);
        Self {
            buffer,
            scanned: 0,
            state: State::Head,
            max_message_size,
        }
    }

    /// Takes payloads of up to so many bytes from the next head on.
    pub fn set_max_message_size(&mut self, max_message_size: usize) {
        self.max_message_size = max_message_size;
        self.buffer.set_most(max_message_size + MAX_HEAD_SIZE);
    }

    /// Its memory.
    #[must_use]
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The same, to read into.
    pub fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    /// Returns what is next, or none until more has arrived.
    ///
    /// # Errors
    /// The response to what can't be read on: the connection closes after it.
    pub fn take(&mut self) -> Result<Option<Taken>, Refusal> {
        match &mut self.state {
            State::Head => {
                let unread = self.buffer.unparsed();
                let Some(size) = find_end(unread, &mut self.scanned)? else {
                    return Ok(None);
                };
                let head = Head::parse(&unread[..size])?;
                self.state = State::Admission(size);
                Ok(Some(Taken::Head(Box::new(head))))
            }
            State::Admission(_) => Ok(None),
            State::Length { size, binary } => {
                let arrived = self.buffer.unparsed().len();
                if arrived < *size {
                    self.buffer.expect(*size - arrived);
                    return Ok(None);
                }
                self.buffer.append(*size);
                let binary = *binary;
                Ok(Some(self.taken(binary)))
            }
            State::Chunked { coding, binary } => {
                let binary = *binary;
                coding
                    .decode(&mut self.buffer)
                    .map_err(|error| match error {
                        ChunkedError::Malformed(what) => Refusal::new(Code::MalformedMessage, what),
                        ChunkedError::TooLarge => too_large(self.max_message_size),
                    })?;
                let is_done = coding.is_done();
                Ok(is_done.then(|| self.taken(binary)))
            }
        }
    }

    fn taken(&mut self, binary: bool) -> Taken {
        self.state = State::Head;
        Taken::Message {
            body: self.buffer.finish(),
            binary,
        }
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
            panic!("no head waits");
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
        self.buffer.replace(size, &line(head, request_id));
        self.state = state;
        Ok(())
    }

    /// Drops a head that has no body and is answered otherwise.
    ///
    /// # Panics
    /// If no head waits.
    pub fn skip(&mut self) {
        let State::Admission(size) = self.state else {
            panic!("no head waits");
        };
        self.buffer.skip(size);
        self.state = State::Head;
    }

    /// Goes on with what lies behind the message that was taken last.
    #[must_use]
    pub fn split(&self) -> Self {
        Self::new(self.buffer.split(), self.max_message_size)
    }

    /// Whether it may read without growing, and holds nothing: what a client
    /// sends while its request is served waits in the system otherwise.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.is_midway() && self.buffer.has_room()
    }

    /// Whether a request has begun and not ended.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        !self.buffer.is_empty() || !matches!(self.state, State::Head)
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
    line.extend_from_slice(kind.as_bytes());
    for part in [":", topic, ":"] {
        line.extend_from_slice(part.as_bytes());
    }
    version.append_to(&mut line);
    line.push(b':');
    line.extend_from_slice(request_id.as_bytes());
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
        let mut incoming = Incoming::new(Buffer::new(0, READ), MOST);
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
                        messages.push(incoming.buffer().message(body).to_vec());
                    }
                    Err(refusal) => return (messages, Some(refusal.status)),
                }
            }
            if left.is_empty() {
                return (messages, None);
            }
            let promised = incoming.buffer().next_capacity();
            let spare = incoming.buffer_mut().spare();
            let count = spare.len().min(left.len()).min(pieces.next().unwrap_or(1));
            spare[..count].copy_from_slice(&left[..count]);
            incoming.buffer_mut().advance(count);
            left = &left[count..];
            let capacity = incoming.buffer().capacity();
            assert!(capacity <= promised.max(READ));
            // The line of a message may be longer than its head.
            let bound = MOST + MAX_HEAD_SIZE + READ + 1024;
            assert!(capacity <= bound, "{capacity}");
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

    /// Reads bytes in.
    fn put(incoming: &mut Incoming, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let spare = incoming.buffer_mut().spare();
            let count = spare.len().min(bytes.len());
            spare[..count].copy_from_slice(&bytes[..count]);
            incoming.buffer_mut().advance(count);
            bytes = &bytes[count..];
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
                let mut incoming = Incoming::new(Buffer::new(0, READ), MOST);
                put(&mut incoming, bytes.as_bytes());
                let Ok(Some(Taken::Head(head))) = incoming.take() else {
                    panic!("no head");
                };
                incoming.admit(&head, "id").unwrap();
                let Ok(Some(Taken::Message { body, .. })) = incoming.take() else {
                    panic!("no message");
                };
                let first = body.end - payload.len();
                let place = first + part.start..first + part.end;
                let buffer = incoming.buffer_mut();
                let own = buffer.relabel(place, line.as_bytes());
                let expected = format!("{line}{}", &payload[part.clone()]);
                assert_eq!(buffer.message(own), expected.as_bytes());
                assert_eq!(incoming.take(), Ok(None), "the next head is not whole");
                put(&mut incoming, b" HTTP/1.1\r\nHost: a\r\n\r\n");
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
