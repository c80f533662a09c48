//! One connection of the load generator.

use std::{
    io::{self, Read, Write},
    mem,
    net::TcpStream,
};

use rustls::{ClientConnection, StreamOwned};

use super::protocol::{ParsedReply, Protocol};
use crate::wire::message::MAX_MESSAGE_SIZE;

/// First size of the read buffer, in bytes.
const READ_SIZE: usize = 64 * 1024;

/// A slot without a request.
const FREE: u64 = u64::MAX;

/// A connected stream, with TLS or without.
pub enum LoadStream {
    /// Without.
    Plain(TcpStream),
    /// After the handshake.
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl LoadStream {
    /// Returns the socket.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => &stream.sock,
        }
    }

    /// Whether bytes that were given to it have not left yet.
    fn holds_back(&self) -> bool {
        matches!(self, Self::Tls(stream) if stream.conn.wants_write())
    }
}

impl Read for LoadStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buf),
            Self::Tls(stream) => stream.read(buf),
        }
    }
}

impl Write for LoadStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buf),
            Self::Tls(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// A connection, its protocol, and the requests that wait on it.
pub(super) struct LoadConnection<S> {
    pub(super) stream: LoadStream,
    protocol: S,
    /// Waits until the socket takes more.
    pub(super) blocked: bool,
    /// When each slot's request was sent or due, in nanoseconds; [`FREE`] without
    /// one.
    since: Box<[u64]>,
    free: Vec<usize>,
    /// Of a protocol that answers in order: the slot whose answer is next, and
    /// the one whose request is next.
    order: (usize, usize),
    out: Vec<u8>,
    sent: usize,
    buf: Vec<u8>,
    /// Invariant: `taken <= filled <= buf.len()`.
    taken: usize,
    filled: usize,
}

impl<S: Protocol> LoadConnection<S> {
    pub(super) fn new(stream: LoadStream, protocol: S, depth: usize) -> Self {
        Self {
            stream,
            protocol,
            blocked: false,
            since: vec![FREE; depth].into(),
            free: (0..depth).rev().collect(),
            order: (0, 0),
            out: Vec::new(),
            sent: 0,
            buf: vec![0; READ_SIZE],
            taken: 0,
            filled: 0,
        }
    }

    pub(super) fn has_free_slot(&self) -> bool {
        !self.free.is_empty()
    }

    /// When the requests that wait for their answers were sent or due.
    pub(super) fn open_requests(&self) -> impl Iterator<Item = u64> + '_ {
        self.since.iter().copied().filter(|&since| since != FREE)
    }

    /// Queues one request.
    pub(super) fn ask(&mut self, since: u64) {
        let Some(free) = self.free.pop() else { return };
        let slot = if S::IN_ORDER {
            let slot = self.order.1;
            self.order.1 = (slot + 1) % self.since.len();
            slot
        } else {
            free
        };
        self.since[slot] = since;
        self.protocol.write_request(slot, &mut self.out);
    }

    /// Writes what the system takes. Returns whether that was all.
    pub(super) fn write(&mut self) -> io::Result<bool> {
        while self.sent < self.out.len() {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.sent = 0;
        if self.stream.holds_back() {
            match self.stream.flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                result => result?,
            }
        }
        Ok(true)
    }

    /// Reads once. Returns whether there may be more at once.
    pub(super) fn read(&mut self) -> io::Result<bool> {
        if self.taken == self.filled {
            (self.taken, self.filled) = (0, 0);
        } else if self.filled == self.buf.len() {
            self.buf.copy_within(self.taken..self.filled, 0);
            self.filled -= self.taken;
            self.taken = 0;
            if self.filled >= MAX_MESSAGE_SIZE {
                let problem = format!("an answer of more than {MAX_MESSAGE_SIZE} bytes");
                return Err(io::Error::other(problem));
            }
            if self.filled > self.buf.len() / 2 {
                self.buf.resize(self.buf.len() * 2, 0);
            }
        }
        match self.stream.read(&mut self.buf[self.filled..]) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server has closed a connection",
            )),
            Ok(count) => {
                self.filled += count;
                Ok(self.filled == self.buf.len() || matches!(self.stream, LoadStream::Tls(_)))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Returns the next whole answer, and when its request was sent or due.
    pub(super) fn next(&mut self) -> io::Result<Option<(ParsedReply, u64)>> {
        let waiting = &self.buf[self.taken..self.filled];
        let reply = self
            .protocol
            .parse_reply(waiting)
            .map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))?;
        let Some(reply) = reply else { return Ok(None) };
        self.taken += reply.bytes;
        let slot = reply.slot.unwrap_or(self.order.0);
        if S::IN_ORDER {
            self.order.0 = (slot + 1) % self.since.len();
        }
        let since = self.since.get_mut(slot);
        let since = since.map_or(FREE, |since| mem::replace(since, FREE));
        if since == FREE {
            return Err(io::Error::other("an answer to what was never asked"));
        }
        self.free.push(slot);
        Ok(Some((reply, since)))
    }
}
