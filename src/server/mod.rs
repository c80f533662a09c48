//! Connections: accepted, admitted, served by one thread at a time, and ended
//! in order. In reading order: [`Server`] (start and drain), `acceptor`,
//! `admission` (slots), `connection` (one of them, as its owner has it), `peer`
//! (as others see it), `poller` (where it waits), `workers` (who serves it),
//! and `system` (what they stand on).

mod acceptor;
pub(crate) mod admission;
pub(crate) mod by_address;
pub(crate) mod common;
pub(crate) mod connection;
pub(crate) mod drain;
mod encoding;
mod outbox;
pub(crate) mod peer;
pub(crate) mod poller;
pub(crate) mod running;
pub(crate) mod settings;
mod view;
pub(crate) mod workers;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::SeqCst},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use acceptor::OpenListener;
use admission::{Admission, Shares};
use common::Common;
use drain::DrainFlags;
use poller::{Events, Poller, Queue};
pub use settings::{Buffers, ListenerSettings, ServerSettings};
pub use view::View;
use workers::{RESERVE, Worker, Workers, pollers};

use crate::{
    access::Access,
    dispatch::Handle,
    metrics::Metrics,
    system::{AtomicUsize, LINGER, Linger, Pool},
    transport::{Inherited, listen, listen_all, resolve},
};

/// Of `drain_timeout`, the part after calls are stopped, for their peers to get
/// the closing ERROR and read it; half of it at most.
const CLOSING_TIME: Duration = Duration::from_millis(500);

/// A running server. Dropping it without [`Server::drain`] leaves its threads
/// to the end of the process.
pub struct Server {
    shared: Arc<Workers>,
    admission: Arc<Admission>,
    listeners: Vec<Arc<OpenListener>>,
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
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Something else is missing.
    #[error("the system refuses threads, pipes or epoll, which the server needs: {0}")]
    System(#[from] io::Error),
    /// An address can't be listened on.
    #[error("can't listen on {host} port {port}: {source}{hint}")]
    Address {
        /// Host.
        host: String,
        /// Port.
        port: u16,
        /// Why.
        source: io::Error,
        /// What to do.
        hint: String,
    },
}

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
        for on in &settings.listeners {
            let port = on.config.port.unwrap_or(0);
            for host in on.config.host.as_slice() {
                let error = |source: io::Error, conflict: Option<String>| ListenError::Address {
                    host: host.clone(),
                    port,
                    hint: match source.kind() {
                        io::ErrorKind::AddrInUse => conflict.unwrap_or_else(|| {
                            "; is another server running? --port 0 takes a free one".into()
                        }),
                        io::ErrorKind::PermissionDenied => {
                            "; ports below 1024 need a privilege".into()
                        }
                        _ => String::new(),
                    },
                    source,
                };
                let addresses = resolve(host, port).map_err(|source| error(source, None))?;
                // Port 0 is another one each time.
                let mut none = Vec::new();
                let taken = if port == 0 { &mut none } else { &mut taken };
                let opened = listen_all(&addresses, taken, |address| {
                    let found = inherited.take(address);
                    Ok(OpenListener {
                        outlives: found.is_some(),
                        listener: found.map_or_else(|| listen(address), Ok)?,
                        settings: Arc::clone(on),
                    })
                });
                let opened = opened.map_err(|source| {
                    let conflict = inherited.conflict("host", &addresses);
                    error(source, conflict.map(|conflict| format!("; {conflict}")))
                });
                listeners.extend(opened?.into_iter().map(Arc::new));
            }
        }
        let linger = Linger::start(settings.max_ending)?;
        let admission = Admission::new(Shares {
            connections: settings.max_connections,
            unauthenticated: settings.max_connections - settings.reserved,
            per_address: settings.config.max_connections_per_address,
        });
        let shared = Arc::new(Workers {
            poller: Poller::new(settings.max_connections, pollers())?,
            threads: Pool::new(
                pollers() + RESERVE,
                settings.config.max_threads,
                settings.thread_stack,
            ),
            waiting: AtomicUsize::new(0),
            due: Queue::default(),
            handle,
            common: Arc::new(Common {
                settings: Arc::new(settings),
                metrics,
                access,
                drain: Arc::new(DrainFlags::new()?),
                linger,
                handshakes: Arc::default(),
                running: Arc::default(),
            }),
        });
        let start = |_| Worker::start(&shared);
        if !(0..pollers()).all(start) || !Worker::start_reserve(&shared) {
            return Err(io::Error::other("the system refuses threads").into());
        }
        let mut acceptors = Vec::new();
        for listening in &listeners {
            acceptors.push(acceptor::start(listening, &shared, &admission)?);
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
        let address = |listening: &Arc<OpenListener>| {
            Some((
                listening.listener.local_addr().ok()?,
                listening.settings.tls.is_some(),
            ))
        };
        self.listeners.iter().filter_map(address).collect()
    }

    /// Where it listens and on what policy, as the admin side shows it.
    #[must_use]
    pub fn listeners(&self) -> serde_json::Value {
        let config = &self.shared.common.settings.config;
        let listener = |listening: &Arc<OpenListener>| {
            let ListenerSettings {
                config: own,
                tls,
                policy,
            } = &*listening.settings;
            let address = listening.listener.local_addr().ok()?;
            Some(serde_json::json!({
                "address": address.to_string(),
                "auth": policy.auth,
                "protocols": own.protocols.as_ref().unwrap_or(&config.protocols),
                "tls": tls.is_some(),
            }))
        };
        self.listeners.iter().filter_map(listener).collect()
    }

    /// A handle for the admin side.
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
        let (common, begun) = (&shared.common, Instant::now());
        let connections = admission.peers().count();
        common.drain.begin();
        for acceptor in acceptors {
            let _ = acceptor.join();
        }
        drop(listeners);
        let drain_timeout = common.settings.config.drain_timeout.0;
        let deadline = begun + drain_timeout;
        let stop = deadline - CLOSING_TIME.min(drain_timeout / 2);
        // Peers that were notified at once have their two seconds; only calls
        // may take longer.
        let notified_by = (Instant::now() + LINGER).min(stop);
        let notify_all = || {
            for peer in admission.peers() {
                shared.poller.deliver(peer.slot(), Events::CLOSE);
            }
        };
        notify_all();
        if !admission.wait_until_empty(notified_by) {
            common.drain.cuts_off.store(true, SeqCst);
            notify_all();
        }
        if !admission.wait_until_empty(stop) {
            common.drain.stop_calls.store(true, SeqCst);
            common.running.wake();
            admission.wait_until_empty(deadline);
        }
        common
            .linger
            .wait_until_empty((Instant::now() + LINGER).min(deadline));
        shared.poller.shut_down();
        Drained {
            connections,
            cut_off: admission.peers().count(),
            elapsed: begun.elapsed(),
        }
    }
}
