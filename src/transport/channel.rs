//! One connection of the server's side: reads and writes that never wait, with
//! TLS or without. It belongs to one owner, which a poller notifies when it is
//! worth trying again.

use std::{
    io::{self, Read as _},
    mem,
    net::{Shutdown, TcpStream},
    time::Duration,
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::RecvFlags,
};
use rustls::pki_types::CertificateDer;

use super::{
    proxy::{self, Proxied},
    socket::{Received, receive, send},
    tls::Tls,
};

/// A connected socket that does not block, but for reads that are to wait.
#[derive(Debug)]
pub struct Channel {
    socket: TcpStream,
    tls: Option<Box<Tls>>,
    /// The socket blocks where a read or write does not say otherwise.
    blocks: bool,
    next_read: RecvFlags,
}

impl Channel {
    /// A connected stream, with a TLS session that has yet to begin or without.
    ///
    /// # Errors
    /// If the system can't make it one that does not block.
    pub fn new(socket: TcpStream, session: Option<rustls::Connection>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let tls = session.map(|session| Box::new(Tls::new(session)));
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
        self.tls
            .as_mut()
            .map_or(Ok(true), |tls| tls.handshake(&self.socket))
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
            Some(tls) => tls.write(&self.socket, buf),
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
            tls.half_close(&self.socket);
        }
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Whether the peer has begun a TLS record, and not ended it.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_midway())
    }

    /// What the peer showed of itself, its own certificate first.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.tls.as_ref()?.session().peer_certificates()
    }

    /// The protocol that both sides have agreed on, after the handshake.
    #[must_use]
    pub fn alpn(&self) -> Option<&[u8]> {
        self.tls.as_ref()?.session().alpn_protocol()
    }

    /// `1.2` or `1.3`, after the handshake.
    #[must_use]
    pub fn tls_version(&self) -> Option<&'static str> {
        match self.tls.as_ref()?.session().protocol_version()? {
            rustls::ProtocolVersion::TLSv1_2 => Some("1.2"),
            rustls::ProtocolVersion::TLSv1_3 => Some("1.3"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write as _, net::TcpListener};

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
}
