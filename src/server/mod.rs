//! Connections: accepted, admitted, served by one thread at a time, and ended
//! in order. In reading order: [`Server`] (start and drain), `acceptor`,
//! `admission` (slots), `connection` (one of them, as its owner has it), `peer`
//! (as others see it), `poller` (where it waits), `workers` (who serves it),
//! and `system` (what they stand on).

mod acceptor;
pub(crate) mod admission;
pub(crate) mod connection;
mod handshakes;
mod outbox;
pub(crate) mod peer;
pub(crate) mod poller;
pub(crate) mod running;
mod shutdown_event;
pub(crate) mod workers;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

#[allow(unused_imports, reason = "the simulation opens no files")]
pub use admission::raise_open_files;
use admission::{Admission, Shares};
use arc_swap::ArcSwap;
use connection::{Farewell, News};
use handshakes::Handshakes;
use ipnet::IpNet;
use peer::Peer;
use poller::Poller;
use running::RunningCalls;
use rustix::{
    event::{PollFd, Timespec, poll},
    io::Errno,
};
use shutdown_event::ShutdownEvent;
use workers::{RESERVE, Worker, pollers};

use crate::{
    access::{Access, Terms},
    budget::Budget,
    config::{Config, access::Listener, memory::READ_BUFFER},
    dispatch::Handle,
    metrics::{
        Metrics, Traffic,
        snapshot::{CallRow, ConnectionRow, Totals},
    },
    system::{AtomicUsize, LINGER, Linger, Pool},
    transport::{Inherited, ServerTls, listen, listen_all, resolve},
    wire::Code,
};

/// Of `drain_timeout`, the part after calls are stopped, for their peers to be
/// told and to read it; half of it at most.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What the server is started with.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// The settings, within their bounds.
    pub config: Arc<Config>,
    /// Where to listen, and on what terms.
    pub listeners: Vec<Arc<ListenerSettings>>,
    /// Connections at the same time: no more than memory and the system's open
    /// files allow.
    pub max_connections: usize,
    /// Of them, those kept for peers who have shown who they are.
    pub reserved: usize,
    /// Further connections that are ending; one more is closed at once.
    pub max_ending: usize,
    /// Sizes of each connection's buffers.
    pub buffers: Buffers,
    /// Stack of each thread that serves connections, in bytes.
    pub thread_stack: usize,
    /// Bytes for large messages and answers; shared with the sandbox.
    pub memory: Arc<Budget>,
}

/// Sizes of a connection's buffers, in bytes. The tests and the simulation take
/// smaller ones.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// First size of the read buffer.
    pub read: usize,
    /// Answers of this size together leave without waiting for more.
    pub write: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            read: READ_BUFFER.0,
            write: 64 * 1024,
        }
    }
}

/// One listener: where, and on what terms.
#[derive(Debug)]
pub struct ListenerSettings {
    /// Its settings.
    pub config: Listener,
    /// TLS is spoken, with what is there when a connection comes.
    pub tls: Option<Arc<ArcSwap<ServerTls>>>,
    /// What is asked of peers.
    pub terms: Arc<Terms>,
}

impl ListenerSettings {
    fn lets_in(&self, address: IpAddr) -> bool {
        let is_in = |networks: &[IpNet]| contains(networks, address);
        let Listener { allow, deny, .. } = &self.config;
        (allow.is_empty() || is_in(allow)) && !is_in(deny)
    }

    /// Peers may show certificates, which the handshake checks.
    fn takes_certificates(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|tls| tls.load().takes_certificates())
    }

    fn is_proxy(&self, address: IpAddr) -> bool {
        contains(&self.config.proxy_from, address)
    }
}

fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    // IPv4 within IPv6 is IPv4.
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// A listener that is open.
struct Listening {
    listener: TcpListener,
    /// It is another process's too: whoever comes after this server's end
    /// waits there for the next.
    outlives: bool,
    place: Arc<ListenerSettings>,
}

/// What all threads of the server share.
pub(crate) struct Shared {
    pub(crate) settings: Arc<ServerSettings>,
    pub(crate) handle: Arc<dyn Handle>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access: Arc<Access>,
    pub(crate) drain: Arc<DrainFlags>,
    pub(crate) linger: Linger,
    pub(crate) handshakes: Arc<Handshakes>,
    pub(crate) poller: Poller,
    pub(crate) threads: Pool,
    /// Calls that wait until they may begin.
    pub(crate) waiting: AtomicUsize,
    /// Calls that take long.
    pub(crate) running: Arc<RunningCalls>,
}

impl Shared {
    /// Calls that may wait to begin, each with a thread: half of the threads.
    pub(crate) fn most_waiting(&self) -> usize {
        self.settings.config.max_threads / 2
    }
}

/// How far the end of the server has come. Rises only.
#[derive(Debug)]
pub(crate) struct DrainFlags {
    /// Readable from the moment that the server drains, for those who poll.
    pub(crate) wake: ShutdownEvent,
    /// No call is begun any more.
    pub(crate) draining: AtomicBool,
    /// Peers that were told and do not take it are cut off.
    pub(crate) cuts_off: AtomicBool,
    /// Calls that still run are stopped.
    pub(crate) stop_calls: AtomicBool,
}

/// A running server. Dropping it without [`Server::drain`] leaves its threads
/// to the end of the process.
pub struct Server {
    shared: Arc<Shared>,
    admission: Arc<Admission>,
    listeners: Vec<Arc<Listening>>,
    acceptors: Vec<JoinHandle<()>>,
}

/// How a drain went.
#[derive(Debug, Clone, Copy)]
pub struct Drained {
    /// Connections that were open at its beginning.
    pub connections: usize,
    /// Connections that had not ended by themselves at its end.
    pub cut_off: usize,
    /// How long it took.
    pub elapsed: Duration,
}

/// Why the server can't listen.
#[derive(Debug)]
pub struct ListenError {
    /// Host and port; none where something else is missing.
    place: Option<(String, u16)>,
    /// Which socket that was handed over is in the way, and what to do.
    conflict: Option<String>,
    source: io::Error,
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            place,
            conflict,
            source,
        } = self;
        let Some((host, port)) = place else {
            return write!(
                f,
                "the system refuses threads, pipes or epoll, which the server needs: {source}"
            );
        };
        write!(f, "can't listen on {host} port {port}: {source}")?;
        match source.kind() {
            io::ErrorKind::AddrInUse => {
                let hint = "is another server running? --port 0 takes a free one";
                write!(f, "; {}", conflict.as_deref().unwrap_or(hint))
            }
            io::ErrorKind::PermissionDenied => f.write_str("; ports below 1024 need a privilege"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for ListenError {}

impl Server {
    /// Listens, where somebody does so already for this process with the
    /// listener of theirs, and accepts from then on.
    ///
    /// # Errors
    /// If one of the addresses can't be listened on.
    pub fn start(
        settings: ServerSettings,
        inherited: &mut Inherited,
        handle: Arc<dyn Handle>,
        metrics: Arc<Metrics>,
        access: Arc<Access>,
    ) -> Result<Self, ListenError> {
        let (mut listeners, mut taken) = (Vec::new(), Vec::new());
        for place in &settings.listeners {
            let port = place.config.port;
            for host in place.config.host.as_slice() {
                let error = |source| ListenError {
                    place: Some((host.clone(), port)),
                    conflict: None,
                    source,
                };
                let addresses = resolve(host, port).map_err(error)?;
                // Port 0 is another one each time.
                let mut none = Vec::new();
                let taken = if port == 0 { &mut none } else { &mut taken };
                let opened =
                    listen_all(&addresses, taken, |address| match inherited.take(address) {
                        Some(listener) => Ok(Listening {
                            listener,
                            outlives: true,
                            place: Arc::clone(place),
                        }),
                        None => {
                            let listener = listen(address, settings.config.backlog)?;
                            Ok(Listening {
                                listener,
                                outlives: false,
                                place: Arc::clone(place),
                            })
                        }
                    });
                let opened = opened.map_err(|source| ListenError {
                    conflict: inherited.conflict("host", &addresses),
                    ..error(source)
                });
                listeners.extend(opened?.into_iter().map(Arc::new));
            }
        }
        let error = |source| ListenError {
            place: None,
            conflict: None,
            source,
        };
        let linger = Linger::start(settings.max_ending).map_err(error)?;
        let admission = Admission::new(Shares {
            connections: settings.max_connections,
            strangers: settings.max_connections - settings.reserved,
            per_address: settings.config.max_connections_per_address,
        });
        let shared = Arc::new(Shared {
            drain: Arc::new(DrainFlags::new().map_err(error)?),
            poller: Poller::new(settings.max_connections, pollers()).map_err(error)?,
            threads: Pool::new(
                pollers() + RESERVE,
                settings.config.max_threads,
                settings.thread_stack,
            ),
            waiting: AtomicUsize::new(0),
            settings: Arc::new(settings),
            handle,
            metrics,
            access,
            linger,
            handshakes: Arc::default(),
            running: Arc::default(),
        });
        let start = |_| Worker::start(&shared);
        if !(0..pollers()).all(start) || !Worker::start_reserve(&shared) {
            return Err(error(io::Error::other("the system refuses threads")));
        }
        let mut acceptors = Vec::new();
        for listening in &listeners {
            acceptors.push(acceptor::start(listening, &shared, &admission).map_err(error)?);
        }
        Ok(Self {
            shared,
            admission,
            listeners,
            acceptors,
        })
    }

    /// Where it listens, and whether with TLS.
    #[must_use]
    pub fn addresses(&self) -> Vec<(SocketAddr, bool)> {
        let address = |listening: &Arc<Listening>| {
            Some((
                listening.listener.local_addr().ok()?,
                listening.place.tls.is_some(),
            ))
        };
        self.listeners.iter().filter_map(address).collect()
    }

    /// A handle for whoever looks.
    #[must_use]
    pub fn view(&self) -> View {
        View {
            shared: Arc::clone(&self.shared),
            admission: Arc::clone(&self.admission),
        }
    }

    /// Ends in order: no new connections, begun requests answered within
    /// `drain_timeout`, every peer told.
    #[must_use]
    pub fn drain(self) -> Drained {
        let Self {
            shared,
            admission,
            listeners,
            acceptors,
        } = self;
        let begun = Instant::now();
        let connections = admission.peers().count();
        shared.drain.begin();
        for acceptor in acceptors {
            let _ = acceptor.join();
        }
        drop(listeners);
        let drain_timeout = shared.settings.config.drain_timeout.0;
        let deadline = begun + drain_timeout;
        let stop = deadline - LAST_WORDS.min(drain_timeout / 2);
        // Peers that were told at once have their two seconds; only calls may
        // take longer.
        let told = (Instant::now() + LINGER).min(stop);
        let tell_all = || {
            for peer in admission.peers() {
                shared.poller.tell(peer.slot(), News::FAREWELL);
            }
        };
        tell_all();
        if !admission.wait_until_empty(told) {
            shared.drain.cuts_off.store(true, SeqCst);
            tell_all();
        }
        if !admission.wait_until_empty(stop) {
            shared.drain.stop_calls.store(true, SeqCst);
            admission.wait_until_empty(deadline);
        }
        shared
            .linger
            .wait_until_empty((Instant::now() + LINGER).min(deadline));
        shared.poller.end();
        Drained {
            connections,
            cut_off: admission.peers().count(),
            elapsed: begun.elapsed(),
        }
    }
}

/// Polls; where that fails, it takes a moment, so that who tries again does
/// not keep a processor busy.
fn wait_for(polled: &mut [PollFd<'_>], timeout: Option<&Timespec>) {
    const MOMENT: Duration = Duration::from_millis(10);
    if poll(polled, timeout).is_err_and(|error| error != Errno::INTR) {
        thread::sleep(MOMENT);
    }
}

/// What can be seen of a server, without a lock.
#[derive(Clone)]
pub struct View {
    shared: Arc<Shared>,
    admission: Arc<Admission>,
}

impl View {
    /// Whether the server takes connections.
    #[must_use]
    pub fn accepting(&self) -> bool {
        !self.shared.drain.draining.load(SeqCst)
    }

    /// Calls that take long, oldest first.
    #[must_use]
    pub fn calls(&self) -> Vec<CallRow> {
        self.shared.running.rows()
    }

    /// Has a call stopped by its next tick; false if there is none of this
    /// number.
    #[must_use]
    pub fn kill(&self, call: u64) -> bool {
        self.shared.running.kill(call)
    }

    /// Closes a connection in order: what was begun is answered, and the peer
    /// is told. False if there is none of this number.
    #[must_use]
    pub fn close(&self, connection: u64) -> bool {
        let found = self
            .admission
            .peers()
            .find(|peer| peer.number() == connection);
        found.is_some_and(|peer| {
            self.dismiss(&peer, Farewell::CLOSED);
            true
        })
    }

    /// Closes all connections of a principal in the same way; says how many.
    #[must_use]
    pub fn close_principal(&self, principal: &str) -> usize {
        let of_it = self.admission.peers().filter(|peer| peer.is_of(principal));
        of_it
            .inspect(|peer| self.dismiss(peer, Farewell::PRINCIPAL_CLOSED))
            .count()
    }

    fn dismiss(&self, peer: &Peer, why: Farewell) {
        peer.retire(why);
        self.shared.poller.tell(peer.slot(), News::FAREWELL);
    }

    /// Open connections, oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionRow> {
        let mut open: Vec<_> = self.admission.peers().collect();
        open.sort_by_key(|peer| peer.number());
        open.iter().map(|peer| peer.row()).collect()
    }

    /// Sums over the whole server.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let metrics = &self.shared.metrics;
        // In this order, and without those that are in it already: a
        // connection that ends meanwhile is missed at worst, never counted
        // twice. What is missed is made up for by what was published before.
        let sum = Traffic::default();
        sum.absorb(&metrics.ended);
        let mut connections = 0;
        for peer in self.admission.peers() {
            peer.traffic().add_unless_ended(&sum);
            connections += 1;
        }
        metrics.published.rise_to(&sum);
        let sum = &metrics.published;
        let name = |code: Option<Code>| code.map_or("SERVICE", Code::as_str);
        Totals {
            uptime_seconds: metrics.uptime().as_secs_f64(),
            connections,
            max_connections: self.shared.settings.max_connections as u64,
            threads: self.shared.threads.threads() as u64,
            memory: self.shared.settings.memory.used() as u64,
            max_memory: self.shared.settings.memory.limit() as u64,
            accepted: metrics.accepted.get(),
            refused: metrics.refused.get(),
            accept_errors: metrics.accept_errors.get(),
            truncated: metrics.truncated.get(),
            write_timeouts: metrics.write_timeouts.get(),
            publish_failures: metrics.publish_failures.get(),
            denied: metrics.denied.get(),
            evicted: metrics.evicted.get(),
            handshake_failures: metrics.handshake_failures.get(),
            auth_failures: metrics.auth_failures.get(),
            bytes_in: sum.bytes_in.get(),
            bytes_out: sum.bytes_out.get(),
            messages_in: sum.messages_in.get(),
            messages_out: sum.messages_out.get(),
            keep_alives: sum.keep_alives.get(),
            errors: metrics
                .errors()
                .map(|(code, count)| (name(code), count))
                .collect(),
        }
    }
}

impl DrainFlags {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = ShutdownEvent::new()?;
        Ok(Self {
            wake,
            draining: AtomicBool::new(false),
            cuts_off: AtomicBool::new(false),
            stop_calls: AtomicBool::new(false),
        })
    }

    pub(crate) fn begin(&self) {
        self.draining.store(true, SeqCst);
        self.wake.set();
    }

    fn draining(&self) -> bool {
        self.draining.load(SeqCst)
    }

    fn is_cutting_off(&self) -> bool {
        self.cuts_off.load(SeqCst)
    }

    fn calls_stopped(&self) -> bool {
        self.stop_calls.load(SeqCst)
    }
}
