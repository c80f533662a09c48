//! From bytes as they arrive to whole messages.
//!
//! The buffer frames and does no I/O. A reader fills [`Reassembly::spare`],
//! says how much came with [`Reassembly::advance`] and takes out what is
//! whole with [`Reassembly::next`], until there is nothing more. A message
//! that came in one frame is handed out where it lies; the pieces of one that
//! came in several are moved together, over the frame headers between them.

use std::ops::Range;

use super::{
    buffer::Buffer,
    frame::{FRAME_HEADER_SIZE, FrameError, FrameHeader},
};

/// What [`Reassembly::next`] hands out.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// A keep-alive frame. It may stand between two pieces of a message.
    KeepAlive,
    /// A whole message.
    Message {
        /// Header line and payload, in one piece.
        body: &'a [u8],
        /// The payload is opaque bytes.
        binary: bool,
    },
}

/// What [`Reassembly::take`] finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// As [`Incoming::KeepAlive`].
    KeepAlive,
    /// A whole message.
    Message {
        /// Where it lies, for [`Buffer::message`].
        body: Range<usize>,
        /// The payload is opaque bytes.
        binary: bool,
    },
}

/// Reassembles frames in a [`Buffer`].
#[derive(Debug)]
pub struct Reassembly {
    buffer: Buffer,
    /// BINARY of the pieces so far; none between two messages, and then the
    /// buffer has no pieces.
    piece: Option<bool>,
    max_message_size: usize,
}

impl Reassembly {
    /// Takes messages of up to `max_message_size` bytes, by reads of
    /// `read_size`.
    #[must_use]
    pub fn new(max_message_size: usize, read_size: usize) -> Self {
        assert!(
            read_size >= FRAME_HEADER_SIZE,
            "a read must hold a frame header"
        );
        Self {
            buffer: Buffer::new(max_message_size + FRAME_HEADER_SIZE, read_size),
            piece: None,
            max_message_size,
        }
    }

    /// Takes messages of up to so many bytes from the next frame on.
    pub fn set_max_message_size(&mut self, max_message_size: usize) {
        self.max_message_size = max_message_size;
        self.buffer.set_most(max_message_size + FRAME_HEADER_SIZE);
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

    /// As [`Buffer::spare`].
    pub fn spare(&mut self) -> &mut [u8] {
        self.buffer.spare()
    }

    /// As [`Buffer::advance`].
    ///
    /// # Panics
    /// If that is more than there was room for.
    pub fn advance(&mut self, count: usize) {
        self.buffer.advance(count);
    }

    /// What has arrived of a message that is not whole: its header line is at
    /// the beginning.
    #[must_use]
    pub fn partial(&self) -> &[u8] {
        if self.piece.is_some() {
            return self.buffer.assembled();
        }
        let unparsed = self.buffer.unparsed();
        &unparsed[FRAME_HEADER_SIZE.min(unparsed.len())..]
    }

    /// The next thing that is whole, or none until more has arrived.
    ///
    /// # Errors
    /// After one the stream can't be read on: drop the buffer.
    #[allow(
        clippy::should_implement_trait,
        reason = "what it yields borrows from the buffer"
    )]
    pub fn next(&mut self) -> Result<Option<Incoming<'_>>, FrameError> {
        Ok(self.take()?.map(|taken| match taken {
            Taken::KeepAlive => Incoming::KeepAlive,
            Taken::Message { body, binary } => Incoming::Message {
                body: self.buffer.message(body),
                binary,
            },
        }))
    }

    /// The same without borrowing: where a message lies.
    ///
    /// # Errors
    /// As [`Reassembly::next`].
    pub fn take(&mut self) -> Result<Option<Taken>, FrameError> {
        while let Some((&header, rest)) = self.buffer.unparsed().split_first_chunk() {
            let header = FrameHeader::parse(header)?;
            if header.keep_alive {
                self.buffer.skip(FRAME_HEADER_SIZE);
                return Ok(Some(Taken::KeepAlive));
            }
            self.check(header)?;
            let length = header.length as usize;
            if let Some(missing) = length
                .checked_sub(rest.len())
                .filter(|missing| *missing > 0)
            {
                self.buffer.expect(missing);
                return Ok(None);
            }
            self.buffer.skip(FRAME_HEADER_SIZE);
            self.buffer.append(length);
            if header.more {
                self.piece = Some(header.binary);
                continue;
            }
            self.piece = None;
            return Ok(Some(Taken::Message {
                body: self.buffer.finish(),
                binary: header.binary,
            }));
        }
        Ok(None)
    }

    /// Goes on with what lies behind the message that was taken last.
    #[must_use]
    pub fn split(&self) -> Self {
        assert!(self.piece.is_none(), "a message was just taken");
        Self {
            buffer: self.buffer.split(),
            piece: None,
            max_message_size: self.max_message_size,
        }
    }

    /// Whether a frame or a message has begun and not ended: an end of
    /// stream now cuts it off.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        self.piece.is_some() || !self.buffer.unparsed().is_empty()
    }

    /// What can be refused before the body is there.
    fn check(&self, header: FrameHeader) -> Result<(), FrameError> {
        if self.piece.is_some_and(|binary| binary != header.binary) {
            return Err(FrameError::MixedPayload);
        }
        let size = self.buffer.assembled().len() as u64 + u64::from(header.length);
        if size > self.max_message_size as u64 {
            return Err(FrameError::TooLarge {
                size,
                limit: self.max_message_size,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{buffer::KEPT_SIZE, frame::KEEPALIVE_FRAME};
    use proptest::prelude::*;

    const LIMIT: usize = 300;
    const READ: usize = 16;

    /// What came out, owned: none is a keep-alive.
    type Out = Vec<Option<(Vec<u8>, bool)>>;

    /// Feeds the stream in chunks of the given sizes, over and over.
    fn feed(stream: &[u8], chunks: &[usize]) -> (Out, Result<(), FrameError>, bool) {
        let mut buffer = Reassembly::new(LIMIT, READ);
        let (mut out, mut rest) = (Vec::new(), stream);
        let mut sizes = chunks.iter().cycle();
        while !rest.is_empty() {
            let announced = buffer.buffer().next_capacity();
            let spare = buffer.spare();
            let size = (*sizes.next().unwrap())
                .clamp(1, spare.len())
                .min(rest.len());
            spare[..size].copy_from_slice(&rest[..size]);
            rest = &rest[size..];
            buffer.advance(size);
            assert_eq!(buffer.buffer().capacity(), announced);
            assert!(
                buffer.buffer().capacity() <= 2 * (LIMIT + FRAME_HEADER_SIZE + READ),
                "{}",
                buffer.buffer().capacity()
            );
            loop {
                match buffer.next() {
                    Ok(Some(Incoming::KeepAlive)) => out.push(None),
                    Ok(Some(Incoming::Message { body, binary })) => {
                        out.push(Some((body.to_vec(), binary)))
                    }
                    Ok(None) => break,
                    Err(error) => return (out, Err(error), true),
                }
            }
        }
        let midway = buffer.is_midway();
        (out, Ok(()), midway)
    }

    fn frame(flags: u32, body: &[u8]) -> Vec<u8> {
        [
            &u32::try_from(body.len()).unwrap().to_be_bytes(),
            &flags.to_be_bytes(),
            body,
        ]
        .concat()
    }

    #[test]
    fn every_split_point_gives_the_same_result() {
        let stream = [
            frame(0, b"one"),
            KEEPALIVE_FRAME.to_vec(),
            frame(6, b"tw"),
            frame(6, b""),
            KEEPALIVE_FRAME.to_vec(),
            frame(2, b"o"),
            frame(0, b""),
            frame(4, b""),
            frame(0, &[7; 200]),
        ]
        .concat();
        let expected: Out = vec![
            Some((b"one".to_vec(), false)),
            None,
            None,
            Some((b"two".to_vec(), true)),
            Some((Vec::new(), false)),
            Some((vec![7; 200], false)),
        ];
        for split in 1..stream.len() {
            let (out, result, midway) = feed(&stream, &[split, stream.len() - split]);
            assert_eq!(
                (out, result, midway),
                (expected.clone(), Ok(()), false),
                "split at {split}"
            );
        }
        assert_eq!(feed(&stream, &[1]).0, expected);
    }

    #[test]
    fn limits_hold_before_memory() {
        let too_large = |size| Err(FrameError::TooLarge { size, limit: LIMIT });
        let (out, result, _) = feed(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], &[8]);
        assert_eq!((out, result), (vec![], too_large(u64::from(u32::MAX))));
        let stream = [frame(4, &[0; 200]), frame(4, &[0; 100]), frame(0, &[0; 1])].concat();
        assert_eq!(feed(&stream, &[50]).1, too_large(301));
        assert_eq!(
            feed(&stream[..stream.len() - 1], &[50]).1,
            too_large(301),
            "known from the header"
        );
        let stream = [frame(4, &[0; 200]), frame(0, &[0; 100])].concat();
        assert_eq!(feed(&stream, &[50]).0.len(), 1);
    }

    #[test]
    fn pieces_must_agree() {
        let stream = [frame(4, b"a"), frame(2, b"b")].concat();
        assert_eq!(feed(&stream, &[3]).1, Err(FrameError::MixedPayload));
    }

    #[test]
    fn a_message_in_tiny_pieces_stays_within_the_bound() {
        let mut stream: Vec<u8> = (0..LIMIT - 1).flat_map(|i| frame(4, &[i as u8])).collect();
        stream.extend(frame(0, &[0xff]));
        for chunk in [1, 7, 64, 1000] {
            let (out, result, midway) = feed(&stream, &[chunk]);
            assert_eq!((result, midway, out.len()), (Ok(()), false, 1));
            assert_eq!(out[0].as_ref().unwrap().0.len(), LIMIT);
        }
    }

    #[test]
    fn memory_of_a_large_message_is_kept_for_the_next_one_and_no_longer() {
        let serve = |mut buffer: Reassembly, body: usize| {
            let mut rest = &frame(0, &vec![0; body])[..];
            while !rest.is_empty() {
                let spare = buffer.spare();
                let size = spare.len().min(rest.len());
                spare[..size].copy_from_slice(&rest[..size]);
                rest = &rest[size..];
                buffer.advance(size);
            }
            assert!(
                matches!(buffer.next(), Ok(Some(Incoming::Message { body: whole, .. })) if whole.len() == body)
            );
            (buffer.buffer().is_kept_large(), buffer)
        };
        let kept = |buffer, bodies: &[usize]| {
            bodies
                .iter()
                .fold((false, buffer), |(_, buffer), &body| serve(buffer, body))
        };
        let new = || Reassembly::new(1 << 20, READ);
        assert!(kept(new(), &[500_000]).0);
        assert!(kept(new(), &[500_000, 500_000]).0);
        assert!(
            !kept(new(), &[500_000, 100]).0,
            "a small one needs no such memory"
        );
        assert!(
            !kept(new(), &[500_000, 100_000]).0,
            "nor one that is much smaller"
        );
        let (_, mut buffer) = kept(new(), &[500_000]);
        assert!(buffer.spare().len() >= 500_000);
        assert!(buffer.spare().len() <= KEPT_SIZE, "nothing has come");
    }

    #[test]
    fn the_beginning_of_a_message_can_be_read_before_its_end() {
        let whole = frame(0, b"REQUEST and more");
        let pieces = [frame(4, b"REQUEST"), frame(0, b" and more")[..10].to_vec()].concat();
        for (stream, expected) in [
            (&whole[..12], "REQU"),
            (&whole[..5], ""),
            (&pieces[..], "REQUEST"),
        ] {
            let mut buffer = Reassembly::new(LIMIT, 64);
            buffer.spare()[..stream.len()].copy_from_slice(stream);
            buffer.advance(stream.len());
            assert_eq!(buffer.next(), Ok(None));
            assert_eq!(buffer.partial(), expected.as_bytes());
        }
    }

    #[test]
    fn midway_is_what_an_end_of_stream_would_cut_off() {
        for (stream, expected) in [
            (frame(0, b"abc"), false),
            (frame(4, b"abc"), true),
            (frame(0, b"abc")[..9].to_vec(), true),
            (vec![0], true),
            ([frame(0, b"abc"), vec![0]].concat(), true),
            (KEEPALIVE_FRAME.to_vec(), false),
        ] {
            assert_eq!(feed(&stream, &[100]).2, expected, "{stream:?}");
        }
    }

    proptest! {
        #[test]
        fn messages_survive_any_pieces_and_any_chunks(
            messages in proptest::collection::vec(
                (proptest::collection::vec(any::<u8>(), 0..LIMIT), any::<bool>(), 1..80_usize), 1..6),
            chunks in proptest::collection::vec(1..120_usize, 1..8),
        ) {
            let mut stream = Vec::new();
            for (body, binary, piece) in &messages {
                let flags = if *binary { 2 } else { 0 };
                let pieces: Vec<_> = body.chunks(*piece).collect();
                for piece in pieces.iter().take(pieces.len().saturating_sub(1)) {
                    stream.extend(frame(flags | 4, piece));
                    stream.extend(KEEPALIVE_FRAME);
                }
                stream.extend(frame(flags, pieces.last().unwrap_or(&[].as_slice())));
            }
            let (out, result, midway) = feed(&stream, &chunks);
            let out: Vec<_> = out.into_iter().flatten().collect();
            let sent: Vec<_> = messages.into_iter().map(|(body, binary, _)| (body, binary)).collect();
            prop_assert_eq!((out, result, midway), (sent, Ok(()), false));
        }

        #[test]
        fn any_bytes_give_the_same_in_any_chunks(
            mut stream in proptest::collection::vec(prop_oneof![4 => Just(0_u8), 1 => 0..8_u8, 1 => any::<u8>()], 0..400),
            chunks in proptest::collection::vec(1..60_usize, 1..8),
            start in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut whole = frame(0, &start);
            whole.append(&mut stream);
            let all_at_once = feed(&whole, &[whole.len()]);
            prop_assert_eq!(feed(&whole, &chunks), all_at_once);
        }
    }
}
