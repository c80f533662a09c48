//! Bytes as they arrive, and what of them was joined to one piece: the memory
//! of every decoder, whatever it decodes.
//!
//! ```text
//!   0          start      assembled      parsed           filled       len
//!   |  consumed  |  pieces  |     gap     |  not parsed yet  |  spare  |
//! ```

use std::ops::Range;

/// An empty buffer keeps at most this much memory, in bytes; what a large
/// message needed beyond it goes back to the system, unless another one of
/// the kind follows.
pub const KEPT_SIZE: usize = 64 * 1024;

/// A new buffer takes this much memory, in bytes, or less where a read is to
/// be smaller; most connections never need more, and many are idle.
const FIRST_SIZE: usize = 1024;

/// A full buffer grows so many times at most at once, for a message that needs
/// it: each step copies what is there.
const GROWTH: usize = 8;

/// A growable buffer. A reader fills [`Buffer::spare`] and says how much came
/// with [`Buffer::advance`]; a decoder looks at [`Buffer::unparsed`], drops of
/// it what only frames a message, and joins the rest.
///
/// Its memory follows what has arrived, never what was promised alone: when it
/// is full it grows to what was announced, but to eight times its size at most,
/// and to the most that it may hold and one read.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// Invariant: `start <= assembled <= parsed <= filled <= bytes.len()`.
    start: usize,
    assembled: usize,
    parsed: usize,
    filled: usize,
    /// Bytes that were announced and have not arrived.
    missing: usize,
    /// Most that it has to hold.
    most: usize,
    read_size: usize,
    /// A read did so since it was empty last.
    is_cramped: bool,
}

impl Buffer {
    /// An empty buffer for messages of up to `most` bytes with what frames
    /// them. It starts small; reads that fill it let it grow to `read_size`,
    /// and messages that are larger beyond that. `read_size` is also the least
    /// that it offers to a read once it has grown to its bound.
    #[must_use]
    pub fn new(most: usize, read_size: usize) -> Self {
        Self {
            bytes: vec![0; read_size.min(FIRST_SIZE)],
            most,
            read_size,
            ..Self::default()
        }
    }

    /// Changes the most that it has to hold.
    pub fn set_most(&mut self, most: usize) {
        self.most = most;
    }

    /// Room for the next read; never empty.
    pub fn spare(&mut self) -> &mut [u8] {
        let capacity = self.next_capacity();
        if self.is_empty() {
            self.restart(capacity);
        } else if self.filled == self.bytes.len() {
            self.compact();
            self.bytes.reserve_exact(capacity - self.bytes.len());
            self.bytes.resize(capacity, 0);
        }
        self.invariants();
        &mut self.bytes[self.filled..]
    }

    /// Memory that the buffer will have once [`Buffer::spare`] was called, in
    /// bytes. Whoever has to ask for memory asks before.
    #[must_use]
    pub fn next_capacity(&self) -> usize {
        let size = self.bytes.len();
        if self.is_empty() {
            let kept = self.kept_size();
            return if size > kept && self.filled <= kept.max(size / 4) {
                self.read_size
            } else if self.is_cramped && size < self.read_size {
                (size * 2).min(self.read_size)
            } else {
                size
            };
        }
        let held = (self.assembled - self.start) + (self.filled - self.parsed);
        if self.filled < size || size - held >= size / 4 {
            return size;
        }
        let steep = (size * GROWTH).min(held + self.missing);
        steep
            .max(size * 2)
            .min(self.most + self.read_size)
            .max(held + self.read_size)
            // Other bytes were put before a message: see `replace`.
            .max(size)
    }

    /// Whether an empty one has memory that only a large message needs: it is
    /// kept for one more of the kind, until [`Buffer::spare`] is called again
    /// and nothing has come. Whoever waits should not do so for long.
    #[must_use]
    pub fn is_kept_large(&self) -> bool {
        self.is_empty() && self.next_capacity() > self.kept_size()
    }

    fn kept_size(&self) -> usize {
        KEPT_SIZE.max(self.read_size)
    }

    /// Takes note that a read put `count` bytes into [`Buffer::spare`].
    ///
    /// # Panics
    /// If that is more than there was room for.
    pub fn advance(&mut self, count: usize) {
        self.filled += count;
        self.is_cramped |= self.filled == self.bytes.len();
        self.invariants();
    }

    /// Whether it holds nothing, and may read without growing.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.is_empty() && self.filled < self.bytes.len()
    }

    /// Bytes that arrived and were not parsed.
    #[must_use]
    pub fn unparsed(&self) -> &[u8] {
        &self.bytes[self.parsed..self.filled]
    }

    /// The same, to decode them in place.
    pub fn unparsed_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.parsed..self.filled]
    }

    /// What was joined so far.
    #[must_use]
    pub fn assembled(&self) -> &[u8] {
        &self.bytes[self.start..self.assembled]
    }

    /// Notes how many bytes were announced that have not arrived, until some
    /// are joined.
    pub fn expect(&mut self, missing: usize) {
        self.missing = missing;
    }

    /// Drops the first unparsed bytes.
    pub fn skip(&mut self, count: usize) {
        self.parsed += count;
        self.invariants();
    }

    /// Joins the first unparsed bytes to the pieces. The first piece stays
    /// where it is.
    pub fn append(&mut self, count: usize) {
        if self.start == self.assembled {
            (self.start, self.assembled) = (self.parsed, self.parsed);
        }
        if self.assembled != self.parsed {
            let piece = self.parsed..self.parsed + count;
            self.bytes.copy_within(piece, self.assembled);
        }
        self.assembled += count;
        self.parsed += count;
        self.missing = 0;
        self.invariants();
    }

    /// Joins other bytes in the place of the first unparsed ones, which are the
    /// beginning of a message.
    pub fn replace(&mut self, count: usize, with: &[u8]) {
        self.shift(with.len().saturating_sub(self.parsed + count));
        let end = self.parsed + count;
        self.start = end - with.len();
        (self.assembled, self.parsed) = (end, end);
        self.bytes[self.start..end].copy_from_slice(with);
        self.invariants();
    }

    /// Puts other bytes before a part of a message that was ended, in the place
    /// of what lies there. Returns where both lie.
    pub fn relabel(&mut self, part: Range<usize>, with: &[u8]) -> Range<usize> {
        let lacking = with.len().saturating_sub(part.start);
        self.shift(lacking);
        let (start, end) = (part.start + lacking, part.end + lacking);
        self.bytes[start - with.len()..start].copy_from_slice(with);
        start - with.len()..end
    }

    /// Moves everything, for so much room at the beginning.
    fn shift(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        self.bytes.reserve_exact(count);
        self.bytes.splice(0..0, std::iter::repeat_n(0, count));
        self.start += count;
        self.assembled += count;
        self.parsed += count;
        self.filled += count;
        self.invariants();
    }

    /// Ends the message: returns where it lies, for [`Buffer::message`].
    pub fn finish(&mut self) -> Range<usize> {
        let body = self.start..self.assembled;
        (self.start, self.assembled) = (self.parsed, self.parsed);
        body
    }

    /// A message that was ended, or any bytes that were skipped; they lie there
    /// until the next read.
    #[must_use]
    pub fn message(&self, body: Range<usize>) -> &[u8] {
        &self.bytes[body]
    }

    /// Where the first unparsed bytes lie.
    #[must_use]
    pub fn place(&self, count: usize) -> Range<usize> {
        self.parsed..self.parsed + count
    }

    /// A buffer of the same kind that goes on with what was not parsed.
    #[must_use]
    pub fn split(&self) -> Self {
        let rest = self.unparsed();
        let mut buffer = Self::new(self.most, self.read_size);
        buffer.bytes.resize(buffer.bytes.len().max(rest.len()), 0);
        buffer.bytes[..rest.len()].copy_from_slice(rest);
        buffer.filled = rest.len();
        // What the last read left is for this one to read.
        buffer.invariants();
        buffer
    }

    /// Whether all that arrived was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parsed == self.filled && self.start == self.assembled
    }

    /// Bytes of memory that the buffer holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Nothing is held: back to the front, and large memory back.
    fn restart(&mut self, capacity: usize) {
        (self.start, self.assembled, self.parsed, self.filled) = (0, 0, 0, 0);
        if self.bytes.len() != capacity {
            self.bytes = vec![0; capacity];
        }
        self.is_cramped = false;
    }

    /// Moves pieces and unparsed bytes to the front, without the gaps.
    fn compact(&mut self) {
        self.bytes.copy_within(self.start..self.assembled, 0);
        self.assembled -= self.start;
        self.start = 0;
        self.bytes
            .copy_within(self.parsed..self.filled, self.assembled);
        self.filled -= self.parsed - self.assembled;
        self.parsed = self.assembled;
        self.invariants();
    }

    fn invariants(&self) {
        assert!(self.start <= self.assembled, "pieces are a range");
        assert!(
            self.assembled <= self.parsed,
            "pieces come from parsed bytes"
        );
        assert!(self.parsed <= self.filled, "only what arrived is parsed");
        assert!(
            self.filled <= self.bytes.len(),
            "more arrived than the buffer holds"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A longer line in the place of a head makes a buffer larger than it would
    /// grow by itself. Found by a POST of the greatest size, then a short GET and
    /// many more requests in one burst.
    #[test]
    fn one_that_is_larger_than_its_bound_goes_on() {
        let mut buffer = Buffer::new(1000, 100);
        while buffer.filled < 1100 {
            let count = buffer.spare().len();
            buffer.advance(count);
        }
        assert_eq!(buffer.capacity(), 1100);
        buffer.replace(35, &[b'x'; 60]);
        let message = buffer.finish();
        assert_eq!(buffer.message(message).len(), 60);
        buffer.skip(110);
        assert_eq!((buffer.capacity(), buffer.next_capacity()), (1125, 1125));
        assert!(!buffer.spare().is_empty());
        assert_eq!(buffer.unparsed().len(), 955);
    }
}
