//! A TLS session whose reads and writes never wait.

use std::{
    fmt,
    io::{self, Read, Write as _},
    net::TcpStream,
};

use rustix::net::RecvFlags;

use super::socket::{Received, receive, send};

/// Name of the protocol in the handshake (ALPN).
pub const ALPN: &[u8] = b"mb/1";
/// The same of HTTP, which servers speak.
#[cfg(feature = "runtime")]
pub const HTTP_ALPN: &[u8] = b"http/1.1";

/// Plaintext that is encrypted at once, in bytes: a record.
const RECORD_SIZE: usize = 16 * 1024;

/// Reads of ciphertext that brings no data, as a peer may send without end,
/// until others are served.
const MAX_RECORDS_WITHOUT_DATA: usize = 16;

/// A TLS record begins with its type, version and length.
const RECORD_HEADER_SIZE: usize = 5;

/// One session. It belongs to no socket; each call is given the same.
pub(super) struct Tls {
    session: rustls::Connection,
    records: Records,
    /// Why something could not be sent while reading. The system says it once,
    /// and then shows an end like any other.
    failed: Option<io::Error>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    pub(super) fn new(session: rustls::Connection) -> Self {
        Self {
            session,
            records: Records::default(),
            failed: None,
        }
    }

    pub(super) fn session(&self) -> &rustls::Connection {
        &self.session
    }

    /// Whether the peer has begun a record, and not ended it.
    pub(super) fn is_midway(&self) -> bool {
        self.records.is_midway()
    }

    /// Goes on with the handshake; says whether it is done.
    pub(super) fn handshake(&mut self, socket: &TcpStream) -> io::Result<bool> {
        loop {
            let sent = self.send(socket)?;
            if !self.session.is_handshaking() {
                return Ok(sent);
            }
            match self.receive(socket, RecvFlags::DONTWAIT)? {
                Received::Bytes { .. } => {}
                Received::Nothing => return Ok(false),
                Received::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Takes a record, once all that was taken before has left; 0 if it has
    /// not.
    pub(super) fn write(&mut self, socket: &TcpStream, buf: &[u8]) -> io::Result<usize> {
        if !self.send(socket)? {
            return Ok(0);
        }
        let record = &buf[..buf.len().min(RECORD_SIZE)];
        let taken = self.session.writer().write(record)?;
        self.send(socket)?;
        Ok(taken)
    }

    /// Says that nothing more will be written.
    pub(super) fn half_close(&mut self, socket: &TcpStream) {
        self.session.send_close_notify();
        let _ = self.send(socket);
    }

    /// Reads what is there.
    pub(super) fn read(
        &mut self,
        socket: &TcpStream,
        buf: &mut [u8],
        mut flags: RecvFlags,
    ) -> io::Result<Received> {
        let mut more = true;
        for _ in 0..MAX_RECORDS_WITHOUT_DATA {
            match self.session.reader().read(buf) {
                Ok(0) => return Ok(Received::End),
                Ok(count) => {
                    let more = more || count == buf.len();
                    return Ok(Received::Bytes { count, more });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without a word of the session's end. What was cut off is
                // found out by the framing; many peers never say that word.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(Received::End);
                }
                Err(error) => return Err(error),
            }
            match self.receive(socket, flags)? {
                Received::Bytes { more: rest, .. } => more = rest,
                Received::Nothing => return Ok(Received::Nothing),
                Received::End => return self.failed.take().map_or(Ok(Received::End), Err),
            }
            flags = RecvFlags::DONTWAIT;
        }
        Ok(Received::Bytes {
            count: 0,
            more: true,
        })
    }

    /// Hands ciphertext to the session. What that has to say, an alert or
    /// new keys, leaves if there is room.
    fn receive(&mut self, socket: &TcpStream, flags: RecvFlags) -> io::Result<Received> {
        let mut tap = Tap {
            socket,
            flags,
            records: &mut self.records,
            more: true,
        };
        let received = match self.session.read_tls(&mut tap) {
            Ok(0) => return Ok(Received::End),
            Ok(count) => Received::Bytes {
                count,
                more: tap.more,
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Received::Nothing);
            }
            Err(error) => return Err(error),
        };
        let processed = self.session.process_new_packets();
        if let Err(error) = self.send(socket) {
            self.failed = Some(error);
        }
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(received)
    }

    /// Sends what is encrypted already; says whether all of it has left.
    pub(super) fn send(&mut self, socket: &TcpStream) -> io::Result<bool> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut Quiet(socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// Reads ciphertext, and looks where its records end.
struct Tap<'a> {
    socket: &'a TcpStream,
    flags: RecvFlags,
    records: &'a mut Records,
    /// The last read may have left something.
    more: bool,
}

impl Read for Tap<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match receive(self.socket, buf, self.flags)? {
            Received::Bytes { count, more } => {
                self.records.pass(&buf[..count]);
                self.more = more;
                Ok(count)
            }
            Received::Nothing => Err(io::ErrorKind::WouldBlock.into()),
            Received::End => Ok(0),
        }
    }
}

/// Writes without a signal where the peer is gone.
struct Quiet<'a>(&'a TcpStream);

impl io::Write for Quiet<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match send(self.0, buf)? {
            0 if !buf.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
            sent => Ok(sent),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where the records of a stream end: a header says how long the rest is.
#[derive(Debug, Default)]
struct Records {
    header: [u8; RECORD_HEADER_SIZE],
    /// Invariant: `seen < RECORD_HEADER_SIZE`.
    seen: usize,
    /// Bytes of the body that are to come.
    rest: usize,
}

impl Records {
    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let passed = self.rest.min(bytes.len());
                (self.rest, bytes) = (self.rest - passed, &bytes[passed..]);
                continue;
            }
            let taken = (RECORD_HEADER_SIZE - self.seen).min(bytes.len());
            self.header[self.seen..self.seen + taken].copy_from_slice(&bytes[..taken]);
            (self.seen, bytes) = (self.seen + taken, &bytes[taken..]);
            if self.seen == RECORD_HEADER_SIZE {
                let [.., high, low] = self.header;
                self.rest = usize::from(u16::from_be_bytes([high, low]));
                self.seen = 0;
            }
        }
    }

    fn is_midway(&self) -> bool {
        self.seen > 0 || self.rest > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_end_where_their_headers_say() {
        let stream = [23, 3, 3, 0, 2, 7, 7, 22, 3, 3, 1, 0];
        for size in 1..=stream.len() {
            let mut records = Records::default();
            let mut passed = 0;
            for piece in stream.chunks(size) {
                records.pass(piece);
                passed += piece.len();
                assert_eq!(records.is_midway(), passed != 7, "{passed} in {size}");
            }
            assert_eq!(records.rest, 256);
        }
    }
}
