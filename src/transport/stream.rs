//! A stream whose reads and writes end at an instant, not after a duration.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rustix::{event::PollFlags, net::RecvFlags};

use super::{
    socket::{Received, wait},
    tls::Tls,
};
use crate::locks::lock;

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

/// One TCP connection with or without TLS: what the protocol is spoken over. One
/// thread may read while another writes.
#[derive(Debug, Clone)]
pub struct Stream {
    socket: Socket,
    /// Nobody waits while holding it.
    tls: Option<Arc<Mutex<Tls>>>,
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
            tls: Some(Arc::new(Mutex::new(Tls::new(session)))),
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
        let Some(tls) = &self.tls else { return Ok(()) };
        while !lock(tls).handshake(self.socket.stream())? {
            let interest = if lock(tls).session().wants_write() {
                PollFlags::OUT
            } else {
                PollFlags::IN
            };
            wait(self.socket.stream(), interest, deadline)?;
        }
        Ok(())
    }

    /// As [`Socket::read`].
    ///
    /// # Errors
    /// As there; `InvalidData` if the peer breaks TLS.
    pub fn read(&self, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return self.socket.read(buf, deadline);
        };
        while Instant::now() < deadline {
            let received = lock(tls).read(self.socket.stream(), buf, RecvFlags::DONTWAIT)?;
            match received {
                Received::End => return Ok(0),
                Received::Bytes { count, .. } if count > 0 => return Ok(count),
                Received::Nothing => wait(self.socket.stream(), PollFlags::IN, deadline)?,
                Received::Bytes { .. } => {}
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// As [`Socket::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, buf: &[u8], deadline: Instant) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return self.socket.write(buf, deadline);
        };
        while Instant::now() < deadline {
            self.flush(deadline)?;
            let taken = lock(tls).write(self.socket.stream(), buf)?;
            // None where a reply to the peer came between.
            if taken > 0 || buf.is_empty() {
                self.flush(deadline)?;
                return Ok(taken);
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Sends encrypted bytes that count as written and have not left.
    ///
    /// # Errors
    /// As [`Socket::write`].
    pub fn flush(&self, deadline: Instant) -> io::Result<()> {
        let Some(tls) = &self.tls else { return Ok(()) };
        while !lock(tls).send(self.socket.stream())? {
            wait(self.socket.stream(), PollFlags::OUT, deadline)?;
        }
        Ok(())
    }

    /// Ends both directions at once; a thread that reads wakes up.
    pub fn shut_down(&self) {
        let _ = self.socket.stream.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    #[cfg(feature = "compiler")]
    use std::thread;

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
    }

    /// Two ends that have shaken hands.
    #[cfg(feature = "compiler")]
    fn secure_pair() -> (Stream, Stream) {
        use rustls::{
            ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
            pki_types::PrivatePkcs8KeyDer,
        };
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["here".to_owned()]).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let server = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key.into())
            .unwrap();
        let client = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = ClientConnection::new(client.into(), "here".try_into().unwrap()).unwrap();
        let server = ServerConnection::new(server.into()).unwrap();
        let (near, far) = pair();
        let near = Stream::tls(near, client.into());
        let far = Stream::tls(far, server.into());
        thread::scope(|scope| {
            let shaking = scope.spawn(|| near.handshake(later()));
            far.handshake(later()).unwrap();
            shaking.join().unwrap().unwrap();
        });
        (near, far)
    }

    #[cfg(feature = "compiler")]
    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[cfg(feature = "compiler")]
    #[test]
    fn one_thread_reads_while_another_writes() {
        const SIZE: usize = 4 << 20;
        let byte = |at: usize| (at / 7) as u8;
        let (near, far) = secure_pair();
        let write = |stream: &Stream| {
            let mut sent = 0;
            while sent < SIZE {
                let part: Vec<_> = (sent..(sent + 50_000).min(SIZE)).map(byte).collect();
                sent += stream.write(&part, later()).unwrap();
            }
        };
        let read = |stream: &Stream| {
            let (mut buf, mut at) = ([0; 10_000], 0);
            while at < SIZE {
                let count = stream.read(&mut buf, later()).unwrap();
                assert!(count > 0, "ended after {at}");
                for read in &buf[..count] {
                    assert_eq!(*read, byte(at), "byte {at}");
                    at += 1;
                }
            }
        };
        thread::scope(|scope| {
            for stream in [&near, &far] {
                scope.spawn(|| write(stream));
                scope.spawn(|| read(stream));
            }
        });
    }

    #[cfg(feature = "compiler")]
    #[test]
    fn over_tls_deadlines_hold_and_nothing_is_lost() {
        let (near, far) = secure_pair();
        let mut buf = [0; 10_000];
        let soon = Instant::now() + Duration::from_millis(30);
        assert_eq!(
            far.read(&mut buf, soon).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        assert!(Instant::now() >= soon, "too early");
        let much = vec![7; 16 << 20];
        let soon = Instant::now() + Duration::from_millis(50);
        let mut taken = 0;
        let error = loop {
            match near.write(&much, soon) {
                Ok(count) => taken += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        thread::scope(|scope| {
            scope.spawn(|| {
                near.flush(later()).unwrap();
                near.shut_down();
            });
            let mut seen = 0;
            loop {
                match far.read(&mut buf, later()).unwrap() {
                    0 => break,
                    count => seen += count,
                }
            }
            // The last record was taken when the deadline passed.
            assert!(seen >= taken, "{seen} of {taken}");
        });
    }
    #[cfg(feature = "compiler")]
    #[test]
    fn a_reset_is_no_orderly_end_where_a_reply_meets_it_first() {
        let (near, far) = secure_pair();
        let much = vec![7; 16 << 20];
        let soon = Instant::now() + Duration::from_millis(50);
        while near.write(&much, soon).is_ok() {}
        far.write(b"x", later()).unwrap();
        // What it has not read makes this a reset.
        drop(far);
        let mut buf = [0; 8];
        assert_eq!(near.read(&mut buf, later()).unwrap(), 1);
        assert_eq!(
            near.read(&mut buf, later()).unwrap_err().kind(),
            io::ErrorKind::ConnectionReset
        );
    }
}
