//! One connection of the server's side: reads and writes that never wait, with
//! TLS or without. It belongs to one owner, which a poller notifies when it is
//! worth trying again.

use std::{
    fmt,
    io::{self, Read, Write as _},
    mem,
    net::{Shutdown, TcpStream},
    time::Duration,
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{RecvFlags, SendFlags},
};
use rustls::pki_types::CertificateDer;

use super::proxy::{self, Proxied};

/// Plaintext that is encrypted at once, in bytes: a record.
const RECORD_SIZE: usize = 16 * 1024;

/// Reads of ciphertext that brings no data, as a peer may send without end,
/// until others are served.
const MAX_RECORDS_WITHOUT_DATA: usize = 16;

/// A TLS record begins with its type, version and length.
const RECORD_HEADER_SIZE: usize = 5;

/// What a read has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, and whether there may be more just now.
    Bytes {
        /// None where all that has come was not data.
        count: usize,
        /// False once all that had arrived was taken.
        more: bool,
    },
    /// Nothing for now.
    Nothing,
    /// The peer has ended the stream.
    End,
}

/// Writes never wait, and cause no signal where the peer is gone.
const SEND_FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// A connected socket that does not block, but for reads that are to wait.
pub struct Channel {
    socket: TcpStream,
    tls: Option<Box<Tls>>,
    /// The socket blocks where a read or write does not say otherwise.
    blocks: bool,
    next_read: RecvFlags,
}

struct Tls {
    session: rustls::Connection,
    records: Records,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("socket", &self.socket)
            .field("tls", &self.tls.is_some())
            .finish()
    }
}

impl Channel {
    /// A connected stream, with a TLS session that has yet to begin or without.
    ///
    /// # Errors
    /// If the system can't make it one that does not block.
    pub fn new(socket: TcpStream, session: Option<rustls::Connection>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let tls = session.map(|session| {
            Box::new(Tls {
                session,
                records: Records::default(),
            })
        });
        Ok(Self {
            socket,
            tls,
            blocks: false,
            next_read: RecvFlags::DONTWAIT,
        })
    }

    /// What lies below.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Gives up what is spoken over it.
    #[must_use]
    pub fn into_socket(mut self) -> TcpStream {
        self.stop_waiting();
        self.socket
    }

    /// Whether what is said is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Takes the PROXY header, and not a byte more; none as long as it is not
    /// whole. The peer may have `ended` the stream behind what is there.
    ///
    /// # Errors
    /// `InvalidData` if it is none, `UnexpectedEof` if the stream ends.
    pub fn read_proxy_header(&self, ended: bool) -> io::Result<Option<Proxied>> {
        let mut seen = [0; proxy::MAX_SIZE];
        let peeked =
            retry_on_intr(|| rustix::net::recv(&self.socket, &mut seen[..], RecvFlags::PEEK));
        let count = match peeked {
            Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, count)) => count,
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some((proxied, length)) = proxy::parse(&seen[..count])? else {
            return if ended {
                Err(io::ErrorKind::UnexpectedEof.into())
            } else {
                Ok(None)
            };
        };
        (&self.socket).read_exact(&mut seen[..length])?;
        Ok(Some(proxied))
    }

    /// Goes on with the TLS handshake, if there is one; says whether it is
    /// done.
    ///
    /// # Errors
    /// [`TlsFault::of`](super::TlsFault::of) says why it failed. The peer was
    /// sent an alert, if its buffer had space.
    pub fn handshake(&mut self) -> io::Result<bool> {
        let Self { socket, tls, .. } = self;
        let Some(tls) = tls else { return Ok(true) };
        loop {
            let sent = tls.send(socket)?;
            if !tls.session.is_handshaking() {
                return Ok(sent);
            }
            match tls.receive(socket, RecvFlags::DONTWAIT)? {
                Received::Bytes { .. } => {}
                Received::Nothing => return Ok(false),
                Received::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// What the system says; `InvalidData` if the peer breaks TLS.
    #[inline]
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<Received> {
        let flags = mem::replace(&mut self.next_read, RecvFlags::DONTWAIT);
        match &mut self.tls {
            None => receive(&self.socket, buf, flags),
            Some(tls) => tls.read(&self.socket, buf, flags),
        }
    }

    /// Has the next read wait so long for its first bytes, of TLS its first
    /// record: one system call instead of two. Says whether it will; all other
    /// reads and writes never wait.
    #[must_use]
    pub fn wait_in_next_read(&mut self, time: Duration) -> bool {
        if !self.blocks {
            self.blocks = self.socket.set_read_timeout(Some(time)).is_ok()
                && self.socket.set_nonblocking(false).is_ok();
        }
        if self.blocks {
            self.next_read = RecvFlags::empty();
        }
        self.blocks
    }

    /// Whether reads may have waited.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.blocks
    }

    /// Whether the next read waits.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.next_read.is_empty()
    }

    /// No read waits any more. Says whether one could have.
    pub fn stop_waiting(&mut self) -> bool {
        self.next_read = RecvFlags::DONTWAIT;
        mem::take(&mut self.blocks) && self.socket.set_nonblocking(true).is_ok()
    }

    /// Writes what there is room for; 0 for none. With TLS, what it says was
    /// written may still wait: see [`Channel::flush`].
    ///
    /// # Errors
    /// What the system says.
    #[inline]
    pub fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => send(&self.socket, buf),
            Some(tls) => {
                if !tls.send(&self.socket)? {
                    return Ok(0);
                }
                let record = &buf[..buf.len().min(RECORD_SIZE)];
                let taken = tls.session.writer().write(record)?;
                tls.send(&self.socket)?;
                Ok(taken)
            }
        }
    }

    /// Sends what is encrypted already; says whether all of it has left.
    ///
    /// # Errors
    /// What the system says.
    #[inline]
    pub fn flush(&mut self) -> io::Result<bool> {
        self.tls
            .as_mut()
            .map_or(Ok(true), |tls| tls.send(&self.socket))
    }

    /// Says that nothing more will be written. A peer that is gone already
    /// does not mind.
    pub fn half_close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.session.send_close_notify();
            let _ = tls.send(&self.socket);
        }
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Whether the peer has begun a TLS record, and not ended it.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.records.is_midway())
    }

    /// What the peer showed of itself, its own certificate first.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.tls.as_ref()?.session.peer_certificates()
    }

    /// The protocol that both sides have agreed on, after the handshake.
    #[must_use]
    pub fn alpn(&self) -> Option<&[u8]> {
        self.tls.as_ref()?.session.alpn_protocol()
    }

    /// `1.2` or `1.3`, after the handshake.
    #[must_use]
    pub fn tls_version(&self) -> Option<&'static str> {
        match self.tls.as_ref()?.session.protocol_version()? {
            rustls::ProtocolVersion::TLSv1_2 => Some("1.2"),
            rustls::ProtocolVersion::TLSv1_3 => Some("1.3"),
            _ => None,
        }
    }
}

fn receive(socket: &TcpStream, buf: &mut [u8], flags: RecvFlags) -> io::Result<Received> {
    match retry_on_intr(|| rustix::net::recv(socket, &mut *buf, flags)) {
        Ok((_, 0)) => Ok(Received::End),
        // A read that leaves room has taken all that was there.
        Ok((_, count)) => Ok(Received::Bytes {
            count,
            more: count == buf.len(),
        }),
        Err(Errno::AGAIN) => Ok(Received::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn send(socket: &TcpStream, buf: &[u8]) -> io::Result<usize> {
    match retry_on_intr(|| rustix::net::send(socket, buf, SEND_FLAGS)) {
        Err(Errno::AGAIN) => Ok(0),
        result => Ok(result?),
    }
}

impl Tls {
    fn read(
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
                nothing_or_end => return Ok(nothing_or_end),
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
        // A peer that is gone is found out by the next read.
        let _ = self.send(socket);
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(received)
    }

    /// Says whether all of it left.
    fn send(&mut self, socket: &TcpStream) -> io::Result<bool> {
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
    use std::net::TcpListener;

    fn pair() -> (Channel, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let near = listener.accept().unwrap().0;
        (Channel::new(near, None).unwrap(), far)
    }

    #[test]
    fn nothing_waits() {
        let (mut near, mut far) = pair();
        let mut buf = [0; 4];
        assert_eq!(near.read(&mut buf).unwrap(), Received::Nothing);
        let much = vec![0; 1 << 20];
        while near.write(&much).unwrap() > 0 {}
        assert_eq!(near.write(b"x").unwrap(), 0);
        far.write_all(b"12345").unwrap();
        let read = |near: &mut Channel, buf: &mut [u8]| loop {
            match near.read(buf).unwrap() {
                Received::Nothing => std::thread::yield_now(),
                received => return received,
            }
        };
        let first = read(&mut near, &mut buf);
        assert_eq!(
            first,
            Received::Bytes {
                count: 4,
                more: true
            }
        );
        let second = read(&mut near, &mut buf);
        assert_eq!(
            second,
            Received::Bytes {
                count: 1,
                more: false
            }
        );
        far.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read(&mut near, &mut buf), Received::End);
    }

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
