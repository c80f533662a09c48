//! A stream whose reads and writes end at an instant, not after a duration.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::tls::Tls;

/// A read may end this much after its deadline. The timeout of a socket
/// covers one system call from its beginning; as long as what it is set to
/// is within this much of what remains, it is not set again, which saves a
/// system call for nearly every read.
const SLACK: Duration = Duration::from_millis(10);

/// One TCP connection. Reading and writing share no state but the socket, so
/// one thread may read while another writes.
#[derive(Debug, Clone)]
pub struct Socket {
    stream: Arc<TcpStream>,
    armed: Arc<Armed>,
}

/// What the socket's timeouts are set to, in nanoseconds; 0 for not set.
#[derive(Debug, Default)]
struct Armed {
    read: AtomicU64,
    write: AtomicU64,
}

impl Socket {
    /// Takes a connected, blocking stream.
    #[must_use]
    pub fn new(stream: TcpStream) -> Self {
        Self {
            stream: Arc::new(stream),
            armed: Arc::default(),
        }
    }

    /// The stream itself.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads what is there, waiting for the first byte until the deadline.
    /// Zero bytes are the end of the stream.
    ///
    /// # Errors
    /// `TimedOut` at the deadline; else what the system says.
    pub fn read(&self, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        self.until(
            deadline,
            &self.armed.read,
            TcpStream::set_read_timeout,
            |mut stream| stream.read(buf),
        )
    }

    /// Writes what the system takes at once, waiting until it takes some.
    ///
    /// # Errors
    /// `TimedOut` at the deadline; else what the system says.
    pub fn write(&self, buf: &[u8], deadline: Instant) -> io::Result<usize> {
        let written = self.until(
            deadline,
            &self.armed.write,
            TcpStream::set_write_timeout,
            |mut stream| stream.write(buf),
        )?;
        if written == 0 {
            Err(io::ErrorKind::WriteZero.into())
        } else {
            Ok(written)
        }
    }

    /// Writes what the system takes without waiting.
    ///
    /// # Errors
    /// What the system says; having no room is none.
    pub(super) fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        match SockRef::from(&*self.stream)
            .send_with_flags(buf, libc_flags::DONT_WAIT | libc_flags::NO_SIGNAL)
        {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// Repeats one system call until it is done or the deadline has passed.
    fn until(
        &self,
        deadline: Instant,
        armed: &AtomicU64,
        arm: impl Fn(&TcpStream, Option<Duration>) -> io::Result<()>,
        mut call: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut woke_early = false;
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let set = Duration::from_nanos(armed.load(Relaxed));
            if set.is_zero() || set > remaining + SLACK || woke_early {
                // Below a millisecond a timeout may be rounded to none at all.
                let timeout = remaining.max(Duration::from_millis(1));
                arm(&self.stream, Some(timeout))?;
                armed.store(
                    u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX),
                    Relaxed,
                );
            }
            match call(&self.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => woke_early = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// One TCP connection with or without TLS: what the protocol is spoken over.
#[derive(Debug, Clone)]
pub struct Stream {
    socket: Socket,
    tls: Option<Arc<Tls>>,
}

impl Stream {
    /// Without TLS.
    #[must_use]
    pub fn plain(socket: Socket) -> Self {
        Self { socket, tls: None }
    }

    /// With TLS, before its handshake.
    #[must_use]
    pub fn tls(socket: Socket, session: rustls::Connection) -> Self {
        Self {
            socket,
            tls: Some(Arc::new(Tls::new(session))),
        }
    }

    /// What lies below.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether what is said is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// The TLS handshake, where there is one.
    ///
    /// # Errors
    /// [`TlsFault::of`](super::TlsFault::of) says why it failed. The peer was
    /// sent an alert, if its buffer had space.
    pub fn handshake(&self, deadline: Instant) -> io::Result<()> {
        self.tls
            .as_ref()
            .map_or(Ok(()), |tls| tls.handshake(&self.socket, deadline))
    }

    /// As [`Socket::read`].
    ///
    /// # Errors
    /// As there; `InvalidData` if the peer breaks TLS.
    pub fn read(&self, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.read(buf, deadline),
            Some(tls) => tls.read(&self.socket, buf, deadline),
        }
    }

    /// As [`Socket::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, buf: &[u8], deadline: Instant) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.write(buf, deadline),
            Some(tls) => tls.write(&self.socket, buf, deadline),
        }
    }

    /// Sends encrypted bytes that count as written and have not left.
    ///
    /// # Errors
    /// As [`Socket::write`].
    pub fn flush(&self, deadline: Instant) -> io::Result<()> {
        self.tls
            .as_ref()
            .map_or(Ok(()), |tls| tls.flush(&self.socket, deadline))
    }

    /// Ends both directions at once; a thread that reads wakes up.
    pub fn shut_down(&self) {
        let _ = self.socket.stream.shutdown(Shutdown::Both);
    }
}

/// Flags of `send` that std does not name, with Linux's values.
mod libc_flags {
    pub(super) const DONT_WAIT: i32 = 0x40;
    pub(super) const NO_SIGNAL: i32 = 0x4000;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (Socket, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Socket::new(near), Socket::new(listener.accept().unwrap().0))
    }

    #[test]
    fn a_read_ends_at_its_deadline_whatever_was_set_before() {
        let (near, far) = pair();
        far.write(b"x", Instant::now() + Duration::from_secs(60))
            .unwrap();
        let mut buf = [0; 8];
        assert_eq!(
            near.read(&mut buf, Instant::now() + Duration::from_secs(60))
                .unwrap(),
            1
        );
        for millis in [30, 60] {
            let begun = Instant::now();
            let deadline = begun + Duration::from_millis(millis);
            assert_eq!(
                near.read(&mut buf, deadline).unwrap_err().kind(),
                io::ErrorKind::TimedOut
            );
            assert!(
                begun.elapsed() >= Duration::from_millis(millis - 1),
                "too early"
            );
        }
        assert_eq!(
            near.read(&mut buf, Instant::now()).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        far.stream().shutdown(Shutdown::Write).unwrap();
        assert_eq!(
            near.read(&mut buf, Instant::now() + Duration::from_secs(60))
                .unwrap(),
            0
        );
    }

    #[test]
    fn a_write_that_nobody_takes_ends_at_its_deadline() {
        let (near, _far) = pair();
        let much = vec![0; 16 << 20];
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = loop {
            if let Err(error) = near.write(&much, deadline) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // A few bytes more may fit; then it is full, and says so at once.
        while near.try_write(&much).unwrap() > 0 {}
    }
}
