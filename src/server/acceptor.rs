//! Accepts connections, whatever happens.

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

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use socket2::SockRef;

use super::{
    admission::{Admission, AdmissionError},
    common::Common,
    connection::{Advance, CloseReason, Connection, log_denied},
    peer::{CloseRequest, Peer},
    settings::ListenerSettings,
    workers::Workers,
};
use crate::{
    access::Failure,
    config::Auth,
    log::Limiter,
    system::{self, Channel},
    transport::{self, BACKLOG},
    wire::{Code, message::write_error},
};

/// First and longest pause after an error that a retry at once would only
/// repeat, such as having no file descriptor left.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Errors and successes may alternate.
static ACCEPT_LINES: Limiter = Limiter::new();

/// Numbers the connections of this process, from 1.
static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// A listener that is open.
pub(crate) struct OpenListener {
    pub(crate) listener: TcpListener,
    /// Another process has it too: connections that arrive after the shutdown
    /// wait there for the next server.
    pub(crate) outlives: bool,
    pub(crate) settings: Arc<ListenerSettings>,
}

/// Starts the thread that accepts from one listener until the server drains.
pub(crate) fn start(
    listening: &Arc<OpenListener>,
    shared: &Arc<Workers>,
    admission: &Arc<Admission>,
) -> io::Result<JoinHandle<()>> {
    SockRef::from(&listening.listener).set_nonblocking(true)?;
    let acceptor = Acceptor {
        listening: Arc::clone(listening),
        settings: Arc::clone(&listening.settings),
        shared: Arc::clone(shared),
        admission: Arc::clone(admission),
        pause: Duration::ZERO,
    };
    thread::Builder::new()
        .name("mb-acceptor".into())
        .spawn(move || acceptor.run())
}

struct Acceptor {
    listening: Arc<OpenListener>,
    settings: Arc<ListenerSettings>,
    shared: Arc<Workers>,
    admission: Arc<Admission>,
    /// Zero as long as accepting works.
    pause: Duration,
}

impl Acceptor {
    fn common(&self) -> &Common {
        &self.shared.common
    }

    fn run(mut self) {
        while !self.common().drain.draining() {
            match self.listening.listener.accept() {
                Ok((stream, peer)) => {
                    self.recovered();
                    self.admit(stream, peer);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(None),
                Err(error) => self.pause_after(&error),
            }
        }
        if !self.listening.outlives {
            self.refuse_backlog();
        }
    }

    /// Waits for the drain, and for the next connection or a time.
    fn wait(&self, timeout: Option<Duration>) {
        let timespec = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let drain = PollFd::new(&self.common().drain.wake, PollFlags::IN);
        let mut polled = [drain, PollFd::new(&self.listening.listener, PollFlags::IN)];
        let polled = if timeout.is_some() {
            &mut polled[..1]
        } else {
            &mut polled[..]
        };
        wait_for(polled, timespec.as_ref());
    }

    /// Refuses the connections that the kernel has completed and nobody has
    /// accepted: they would be reset when the listener closes.
    fn refuse_backlog(&self) {
        // Bounded, because clients that reconnect at once would fill it for
        // ever.
        for _ in 0..BACKLOG {
            match self.listening.listener.accept() {
                Ok((stream, _)) => {
                    self.refuse(stream, &CloseReason::Requested(CloseRequest::SHUTDOWN));
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(_) => break,
            }
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr) {
        self.common().metrics.accepted.add(1);
        let proxied = self.settings.is_proxy(peer.ip());
        if !proxied && !self.settings.admits(peer.ip()) {
            self.common().metrics.denied.add(1);
            log_denied(peer);
            return;
        }
        let address = (!proxied).then(|| peer.ip());
        // An address that has failed too often is refused here, unless the peer
        // may have a valid certificate.
        let throttled = |address| {
            self.common()
                .access
                .throttled_for(address, Failure::WrongToken)
        };
        if self.settings.policy.auth == Auth::Required
            && !self.settings.takes_certificates()
            && let Some(wait) = address.and_then(throttled)
        {
            self.common().metrics.auth_failures.add("too-many");
            return self.refuse(stream, &CloseReason::Throttled(wait));
        }
        // The first read detects a peer that is gone already.
        let _ = transport::set_options(&stream);
        let permit = self.admission.admit(address, |idle| {
            let evicted = self.shared.evict(idle);
            self.common().metrics.evicted.add(u64::from(evicted));
            evicted
        });
        let permit = match permit {
            Ok(permit) => permit,
            Err(refused) => return self.refuse_newcomer(stream, peer, refused),
        };
        let number = NEXT_CONNECTION.fetch_add(1, Relaxed);
        let listener = Arc::clone(&self.settings);
        let common = Arc::clone(&self.shared.common);
        let new = Connection::new(number, stream, peer, listener, common, permit);
        if let Some(Err(error)) = new.map(|new| self.shared.poller.begin(Box::new(new))) {
            static LINES: Limiter = Limiter::new();
            if LINES.allows("no slot at the poller") {
                tracing::error!(
                    "a connection is closed, the poller can't watch it: {error}; is fs.epoll.max_user_watches too low?"
                );
            }
        }
    }

    fn refuse_newcomer(&self, stream: TcpStream, peer: SocketAddr, refused: AdmissionError) {
        let limits = &self.common().settings;
        let message = match refused {
            AdmissionError::Full => format!(
                "too many connections, the limit is {}",
                limits.max_connections
            ),
            AdmissionError::TooMany => format!(
                "too many connections of {}, the limit is {}",
                peer.ip(),
                limits.config.max_connections_per_address
            ),
        };
        self.common().metrics.refused.add(1);
        self.refuse(stream, &CloseReason::Notice(Code::ServerBusy, message));
    }

    /// Sends an ERROR without waiting, and leaves the closing to `linger`. A
    /// socket that was just accepted takes a few bytes. With TLS, nothing can
    /// be sent yet.
    fn refuse(&self, stream: TcpStream, why: &CloseReason) {
        let Some((code, body)) = why.closing().filter(|_| self.settings.tls.is_none()) else {
            return;
        };
        self.common().metrics.count_error(Some(code));
        let Ok(mut channel) = Channel::new(stream, None) else {
            return;
        };
        let mut frame = Vec::new();
        write_error(&mut frame, None, &body, std::time::SystemTime::now());
        if channel.write(&frame).is_ok() {
            self.common().linger.take(channel);
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

    /// Pauses after an error, longer each time, and logs that once. An error of
    /// a single connection is skipped. No error ends the loop.
    fn pause_after(&mut self, error: &io::Error) {
        self.common().metrics.accept_errors.add(1);
        if is_of_one_connection(error) {
            return;
        }
        if self.pause.is_zero() && ACCEPT_LINES.allows("accepting connections") {
            tracing::error!("can't accept connections, trying again: {error}");
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.wait(Some(self.pause));
    }
}

impl Workers {
    /// Evicts an idle unauthenticated peer for another one. Returns whether it
    /// could.
    fn evict(&self, idle: &Peer) -> bool {
        let may_leave = |connection: &Connection| {
            let peer = connection.peer();
            peer.number() == idle.number() && peer.idle_unauthenticated().is_some()
        };
        let Some(mut connection) = self.poller.take_if(idle.slot(), may_leave) else {
            return false;
        };
        idle.request_close(CloseRequest::EVICTED);
        match connection.advance(system::now()) {
            Advance::Wait if self.poller.park(connection) => self.poller.wake(),
            Advance::Closed(channel) => self.linger(channel),
            Advance::Wait | Advance::Call(_) => {}
        }
        true
    }
}

/// Polls. Where that fails it sleeps for a moment, so that the next try does
/// not keep a processor busy.
fn wait_for(polled: &mut [PollFd<'_>], timeout: Option<&Timespec>) {
    const MOMENT: Duration = Duration::from_millis(10);
    if poll(polled, timeout).is_err_and(|error| error != Errno::INTR) {
        thread::sleep(MOMENT);
    }
}

/// Whether an error of the accept call says nothing about the next one.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted
    )
}
