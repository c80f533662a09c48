//! Takes connections in, whatever happens.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use super::{
    SHUTS_DOWN, Shared,
    admission::Admission,
    connection::{Connection, RETRY_WHEN_BUSY_MS, notice},
    session::Session,
};
use crate::{
    log::Limiter,
    transport::{Socket, half_close},
    wire::Code,
};

/// First and longest pause after an error that a retry at once would only
/// repeat, such as having no file descriptor left.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Errors and successes may come in turns.
static ACCEPT_LINES: Limiter = Limiter::new();

/// Numbers the connections of this process, from 1.
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// Starts the thread that accepts from one listener until the server drains.
pub(super) fn start(
    listener: &Arc<TcpListener>,
    shared: &Arc<Shared>,
    admission: &Arc<Admission>,
) -> io::Result<JoinHandle<()>> {
    listener.set_nonblocking(true)?;
    let acceptor = Acceptor {
        listener: Arc::clone(listener),
        shared: Arc::clone(shared),
        admission: Arc::clone(admission),
        pause: Duration::ZERO,
    };
    thread::Builder::new().name("mb-acceptor".into()).spawn(move || acceptor.run())
}

struct Acceptor {
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    admission: Arc<Admission>,
    /// Zero as long as accepting works.
    pause: Duration,
}

impl Acceptor {
    fn run(mut self) {
        while !self.shared.drain.draining() {
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    self.recovered();
                    self.admit(stream, peer);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(None),
                Err(error) => self.survive(&error),
            }
        }
        self.tell_the_backlog();
    }

    /// Waits for the drain, and for the next connection or a time.
    fn wait(&self, timeout: Option<Duration>) {
        let timespec = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let drain = PollFd::new(&self.shared.drain.wake, PollFlags::IN);
        let mut polled = [drain, PollFd::new(&*self.listener, PollFlags::IN)];
        let polled = if timeout.is_some() { &mut polled[..1] } else { &mut polled[..] };
        let _ = poll(polled, timespec.as_ref());
    }

    /// Connections that the kernel has completed and nobody has accepted
    /// would be reset when the listener closes. They are told instead.
    fn tell_the_backlog(&self) {
        // Bounded, because clients that come back at once would fill it for ever.
        for _ in 0..self.shared.settings.backlog {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    self.shared.metrics.count_error(Some(Code::ShuttingDown));
                    self.refuse(stream, &notice(Code::ShuttingDown, SHUTS_DOWN, None));
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(_) => break,
            }
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr) {
        self.shared.metrics.accepted.add(1);
        let Some(permit) = self.admission.admit() else {
            self.shared.metrics.refused.add(1);
            self.shared.metrics.count_error(Some(Code::ServerBusy));
            let limit = self.shared.settings.max_connections;
            let message = format!("no room for another connection, the limit is {limit}");
            let details = json!({"retryAfterMs": RETRY_WHEN_BUSY_MS});
            self.refuse(stream, &notice(Code::ServerBusy, &message, Some(&details)));
            return;
        };
        // A peer that is gone already is found out by the first read.
        let _ = self.shared.settings.options.apply(&stream);
        let number = NEXT_CONNECTION.fetch_add(1, Relaxed);
        let shared = Arc::clone(&self.shared);
        // The connection is made on the thread that also frees it: what one
        // thread allocates and a thousand others free stays with each of
        // those, in the allocator's caches.
        self.admission.execute(move || {
            let drain = Arc::clone(&shared.drain);
            let connection = Connection::new(number, Socket::new(stream), peer, drain, &shared.settings.memory);
            let connection = Arc::new(connection);
            permit.hold(Arc::clone(&connection));
            Session::new(shared, connection).run();
            drop(permit);
        });
    }

    /// Sends a few bytes without waiting, and leaves the rest to `linger`. A
    /// socket that was just accepted has room for them.
    fn refuse(&self, stream: TcpStream, frame: &[u8]) {
        let socket = Socket::new(stream);
        if socket.try_write(frame).is_ok() {
            half_close(socket.stream());
            self.shared.linger.take(socket);
        }
    }

    fn recovered(&mut self) {
        if !self.pause.is_zero() {
            self.pause = Duration::ZERO;
            if ACCEPT_LINES.allows("accepting connections") {
                tracing::info!("accepting connections again");
            }
        }
    }

    /// No error ends the loop. Those of a single connection are passed over;
    /// for the others it pauses longer and longer, and says so once.
    fn survive(&mut self, error: &io::Error) {
        self.shared.metrics.accept_errors.add(1);
        if is_of_one_connection(error) {
            return;
        }
        if self.pause.is_zero() && ACCEPT_LINES.allows("accepting connections") {
            tracing::error!("can't accept connections, trying on: {error}");
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.wait(Some(self.pause));
    }
}

/// Whether an error of the accept call says nothing about the next one.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}
