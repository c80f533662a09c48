//! Frames as they arrive, unmasked and checked where they lie. What is handed
//! out is a message in one piece.

use std::ops::Range;

use super::{
    Fault, MAX_HEAD_SIZE, Opcode,
    frame::{FrameHead, unmask},
    rules::{Rules, close_code},
};
use crate::wire::Buffer;

/// What [`Incoming::take`] finds. Bytes lie there until the next read, for
/// [`Buffer::message`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// A whole message.
    Message {
        /// Where it lies.
        body: Range<usize>,
        /// It is bytes, not text.
        binary: bool,
    },
    /// Asks for a pong with the same payload.
    Ping(Range<usize>),
    /// Is a sign of life.
    Pong,
    /// The peer closes, with this code if it names one. Nothing follows.
    Close(Option<u16>),
}

/// Reads messages of up to `max_message_size` in a [`Buffer`].
#[derive(Debug)]
pub struct Incoming {
    buffer: Buffer,
    rules: Rules,
    /// The frame of a message whose payload arrives, and how much of it has.
    frame: Option<(FrameHead, u64)>,
    max_message_size: usize,
}

impl Incoming {
    /// Goes on with the bytes that have arrived.
    #[must_use]
    pub fn new(mut buffer: Buffer, max_message_size: usize) -> Self {
        buffer.set_most(max_message_size + MAX_HEAD_SIZE);
        Self {
            buffer,
            rules: Rules::default(),
            frame: None,
            max_message_size,
        }
    }

    /// Takes messages of up to so many bytes from the next frame on.
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
    /// After one the stream can't be read on: drop the buffer.
    pub fn take(&mut self) -> Result<Option<Taken>, Fault> {
        loop {
            let (head, arrived) = match self.frame {
                Some(frame) => frame,
                None => {
                    let Some((head, size)) = FrameHead::parse(self.buffer.unparsed())? else {
                        return Ok(None);
                    };
                    if head.opcode.is_control() {
                        return self.take_control(head, size);
                    }
                    self.rules.begin(&head, self.max_message_size as u64)?;
                    self.buffer.skip(size);
                    (head, 0)
                }
            };
            let bytes = self.buffer.unparsed_mut();
            let missing = usize::try_from(head.length - arrived).unwrap_or(usize::MAX);
            let count = missing.min(bytes.len());
            unmask(&mut bytes[..count], head.mask, arrived);
            self.buffer.append(count);
            self.rules.take(self.buffer.assembled())?;
            if count < missing {
                self.frame = Some((head, arrived + count as u64));
                self.buffer.expect(missing - count);
                return Ok(None);
            }
            self.frame = None;
            if let Some(binary) = self.rules.end(&head)? {
                let body = self.buffer.finish();
                return Ok(Some(Taken::Message { body, binary }));
            }
        }
    }

    /// Takes a control frame once it is whole. It may stand between two pieces
    /// of a message.
    fn take_control(&mut self, head: FrameHead, size: usize) -> Result<Option<Taken>, Fault> {
        let length = head.length as usize;
        let Some(payload) = self.buffer.unparsed_mut().get_mut(size..size + length) else {
            return Ok(None);
        };
        unmask(payload, head.mask, 0);
        let taken = match head.opcode {
            Opcode::Close => Taken::Close(close_code(payload)?),
            Opcode::Ping => {
                let whole = self.buffer.place(size + length);
                Taken::Ping(whole.start + size..whole.end)
            }
            _ => Taken::Pong,
        };
        self.buffer.skip(size + length);
        Ok(Some(taken))
    }

    /// What has arrived of a message that is not whole.
    #[must_use]
    pub fn partial(&self) -> &[u8] {
        self.buffer.assembled()
    }

    /// Goes on with what lies behind the message that was taken last.
    #[must_use]
    pub fn split(&self) -> Self {
        assert!(!self.rules.is_open(), "a message was just taken");
        Self::new(self.buffer.split(), self.max_message_size)
    }

    /// Whether a frame or a message has begun and not ended: an end of stream
    /// now cuts it off.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        self.rules.is_open() || !self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 600;
    const READ: usize = 32;

    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Out {
        Message(Vec<u8>, bool),
        Ping(Vec<u8>),
        Pong,
        Close(Option<u16>),
    }

    /// A frame of a client.
    fn frame(first: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![first];
        match payload.len() {
            length @ ..126 => frame.push(0x80 | length as u8),
            length => {
                frame.push(0xfe);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b));
        frame
    }

    /// Feeds the stream in chunks of the given sizes, over and over.
    fn feed(stream: &[u8], chunks: &[usize]) -> (Vec<Out>, Option<Fault>, bool) {
        let mut incoming = Incoming::new(Buffer::new(0, READ), LIMIT);
        let (mut out, mut rest) = (Vec::new(), stream);
        let mut sizes = chunks.iter().cycle();
        while !rest.is_empty() {
            let announced = incoming.buffer().next_capacity();
            let spare = incoming.buffer_mut().spare();
            let size = (*sizes.next().unwrap()).clamp(1, spare.len());
            let size = size.min(rest.len());
            spare[..size].copy_from_slice(&rest[..size]);
            rest = &rest[size..];
            incoming.buffer_mut().advance(size);
            let capacity = incoming.buffer().capacity();
            assert_eq!(capacity, announced);
            assert!(capacity <= 2 * (LIMIT + MAX_HEAD_SIZE + READ), "{capacity}");
            loop {
                let taken = match incoming.take() {
                    Ok(Some(taken)) => taken,
                    Ok(None) => break,
                    Err(fault) => return (out, Some(fault), true),
                };
                let bytes = |at| incoming.buffer().message(at).to_vec();
                out.push(match taken {
                    Taken::Message { body, binary } => Out::Message(bytes(body), binary),
                    Taken::Ping(payload) => Out::Ping(bytes(payload)),
                    Taken::Pong => Out::Pong,
                    Taken::Close(code) => {
                        out.push(Out::Close(code));
                        return (out, None, false);
                    }
                });
            }
        }
        (out, None, incoming.is_midway())
    }

    #[test]
    fn every_split_point_gives_the_same() {
        let mask = [7, 0, 0xff, 3];
        let stream = [
            frame(0x81, b"one", mask),
            frame(0x89, b"ping", mask),
            frame(0x01, b"t\xc3", mask),
            frame(0x8a, b"", mask),
            frame(0x00, b"", [0; 4]),
            frame(0x89, b"", mask),
            frame(0x80, b"\xa9o", mask),
            frame(0x82, &[0xfe; 300], mask),
            frame(0x81, b"", mask),
            frame(0x88, b"\x03\xe8bye", mask),
        ]
        .concat();
        let expected = vec![
            Out::Message(b"one".to_vec(), false),
            Out::Ping(b"ping".to_vec()),
            Out::Pong,
            Out::Ping(Vec::new()),
            Out::Message("t\u{e9}o".as_bytes().to_vec(), false),
            Out::Message(vec![0xfe; 300], true),
            Out::Message(Vec::new(), false),
            Out::Close(Some(1000)),
        ];
        for split in 1..stream.len() {
            let (out, fault, midway) = feed(&stream, &[split, stream.len() - split]);
            assert_eq!((&out, fault, midway), (&expected, None, false), "{split}");
        }
        assert_eq!(feed(&stream, &[1]).0, expected);
    }

    #[test]
    fn limits_hold_before_memory() {
        let mask = [0; 4];
        let large = |size| {
            Some(Fault::TooLarge {
                size,
                limit: LIMIT as u64,
            })
        };
        let promised = [&b"\x82\xff\0\0\0\0\xff\xff\xff\xff"[..], &mask].concat();
        assert_eq!(feed(&promised, &[3]).1, large(0xffff_ffff));
        let pieces = [frame(0x02, &[1; 500], mask), frame(0x00, &[1; 101], mask)].concat();
        assert_eq!(feed(&pieces, &[50]).1, large(601));
        let known = &pieces[..pieces.len() - 101];
        assert_eq!(feed(known, &[50]).1, large(601), "known from the head");
    }

    #[test]
    fn a_text_fails_with_the_first_byte_that_shows_it() {
        let stream = frame(0x81, b"abc\xff and more", [1, 2, 3, 4]);
        let (out, fault, _) = feed(&stream[..10], &[1]);
        assert_eq!((out, fault), (Vec::new(), Some(Fault::NotUtf8)));
    }

    #[test]
    fn midway_is_what_an_end_of_stream_would_cut_off() {
        let mask = [9; 4];
        for (stream, expected) in [
            (frame(0x81, b"abc", mask), false),
            (frame(0x01, b"", mask), true),
            (frame(0x89, b"", mask), false),
            (frame(0x81, b"abc", mask)[..6].to_vec(), true),
            (frame(0x89, b"abc", mask)[..8].to_vec(), true),
            (vec![0x81], true),
        ] {
            assert_eq!(feed(&stream, &[100]).2, expected, "{stream:?}");
        }
    }

    proptest! {
        #[test]
        fn messages_survive_any_pieces_and_any_chunks(
            messages in proptest::collection::vec(
                (proptest::collection::vec(any::<u8>(), 0..LIMIT), 1..80_usize, any::<[u8; 4]>()), 1..6),
            texts in proptest::collection::vec((".{0,100}", 1..80_usize, any::<[u8; 4]>()), 1..6),
            chunks in proptest::collection::vec(1..120_usize, 1..8),
        ) {
            let texts = texts.into_iter().map(|(text, piece, mask)| (text.into_bytes(), false, piece, mask));
            let bytes = messages.into_iter().map(|(bytes, piece, mask)| (bytes, true, piece, mask));
            let (mut stream, mut expected) = (Vec::new(), Vec::new());
            for (body, binary, piece, mask) in texts.chain(bytes) {
                let mut opcode = if binary { 2 } else { 1 };
                for piece in body.chunks(piece) {
                    stream.extend(frame(opcode, piece, mask));
                    stream.extend(frame(0x89, &piece[..piece.len().min(5)], mask));
                    expected.push(Out::Ping(piece[..piece.len().min(5)].to_vec()));
                    opcode = 0;
                }
                stream.extend(frame(0x80 | opcode, b"", mask));
                expected.push(Out::Message(body, binary));
            }
            prop_assert_eq!(feed(&stream, &chunks), (expected, None, false));
        }

        #[test]
        fn any_bytes_give_the_same_in_any_chunks(
            stream in proptest::collection::vec(
                prop_oneof![4 => prop_oneof![Just(0x81_u8), Just(0x01), Just(0x80), Just(0x89)], 2 => 0x80..0x86_u8, 1 => any::<u8>()], 0..400),
            chunks in proptest::collection::vec(1..60_usize, 1..8),
        ) {
            let (out, fault, _) = feed(&stream, &[stream.len().max(1)]);
            let (in_chunks, same, _) = feed(&stream, &chunks);
            prop_assert_eq!((in_chunks, same), (out, fault));
        }
    }
}
