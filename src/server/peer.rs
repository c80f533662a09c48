//! What others see of a connection, and what they leave for its owner: the
//! acceptor that looks for one to evict, the drain, the operator, and calls
//! whose connection has gone on without them. They never touch the socket.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;

use super::{drain::DrainFlags, outbox::Outbox};
use crate::{
    access::Identity,
    budget::Budget,
    metrics::{Traffic, Usage, Usages, Used, snapshot::ConnectionRow},
    system::{
        self, AtomicU8, AtomicU32, AtomicU64, Mutex,
        Ordering::{Relaxed, SeqCst},
        lock,
    },
    wire::Code,
};

/// What is shared about one connection.
pub(crate) struct Peer {
    number: u64,
    slot: usize,
    /// The other end of the socket, which may be a load balancer.
    from: SocketAddr,
    /// The address that the load balancer names.
    speaks_for: OnceLock<SocketAddr>,
    since: (Instant, SystemTime),
    tls: OnceLock<&'static str>,
    /// What it speaks, as [`Protocol`] has it.
    protocol: AtomicU8,
    /// Requests of HTTP before it spoke WebSocket.
    before_websocket: AtomicU64,
    identity: ArcSwap<Identity>,
    /// What the owner does, as [`Activity`] has it.
    activity: AtomicU8,
    /// Microseconds from `since` to the end of the last request.
    last_request: AtomicU64,
    /// Milliseconds from `since` to the last byte that arrived.
    last_activity: AtomicU64,
    traffic: Traffic,
    /// What of it principals have been charged with.
    charged: Mutex<Usage>,
    /// Why this one is to close, although the server goes on.
    close_request: OnceLock<CloseRequest>,
    drain: Arc<DrainFlags>,
    /// Calls whose connection has gone on without them.
    left: AtomicU32,
    /// What they have answered, for the owner to send.
    late: Mutex<Outbox>,
}

crate::wire::words! {
    /// What an owner does, as `/connections` shows it.
    pub enum Activity {
        Handshake = "handshake",
        Idle = "idle",
        Reading = "reading",
        Calling = "calling",
        Closing = "closing",
    }
}

/// What a peer speaks, as `/connections` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Protocol {
    /// Nothing has arrived.
    Unknown,
    Frames,
    Http,
    WebSocket,
}

impl Protocol {
    const NAMES: [Option<&'static str>; 4] =
        [None, Some("frames"), Some("http"), Some("websocket")];
}

/// The ERROR for a peer whose connection is closed gracefully: its earlier
/// requests are answered, and nothing further is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CloseRequest {
    pub(crate) code: Code,
    pub(crate) message: &'static str,
}

impl CloseRequest {
    pub(crate) const SHUTDOWN: Self = Self {
        code: Code::ShuttingDown,
        message: "the server shuts down",
    };
    pub(crate) const CLOSED: Self = Self {
        code: Code::ShuttingDown,
        message: "the operator closes this connection",
    };
    pub(crate) const PRINCIPAL_CLOSED: Self = Self {
        code: Code::Unauthorized,
        message: "the operator closes the connections of this principal",
    };
    pub(crate) const TOO_OLD: Self = Self {
        code: Code::ShuttingDown,
        message: "this connection is as old as connection_max_age allows",
    };
    pub(crate) const EVICTED: Self = Self {
        code: Code::ServerBusy,
        message: "evicted to free capacity: this unauthenticated connection was idle for longest",
    };
}

impl Peer {
    pub(crate) fn new(
        (number, slot): (u64, usize),
        from: SocketAddr,
        identity: Arc<Identity>,
        drain: &Arc<DrainFlags>,
        memory: &Arc<Budget>,
    ) -> Self {
        Self {
            number,
            slot,
            from,
            speaks_for: OnceLock::new(),
            since: (system::now(), SystemTime::now()),
            tls: OnceLock::new(),
            protocol: AtomicU8::new(Protocol::Unknown as u8),
            before_websocket: AtomicU64::new(0),
            identity: ArcSwap::new(identity),
            activity: AtomicU8::new(Activity::Handshake as u8),
            last_request: AtomicU64::new(0),
            last_activity: AtomicU64::new(0),
            traffic: Traffic::default(),
            charged: Mutex::default(),
            close_request: OnceLock::new(),
            drain: Arc::clone(drain),
            left: AtomicU32::new(0),
            late: Mutex::new(Outbox::beside(memory)),
        }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn slot(&self) -> usize {
        self.slot
    }

    /// The peer's address, behind a load balancer once its header was read.
    pub(crate) fn address(&self) -> SocketAddr {
        *self.speaks_for.get().unwrap_or(&self.from)
    }

    /// Sets the address that a load balancer names.
    pub(crate) fn speaks_for(&self, address: SocketAddr) {
        let _ = self.speaks_for.set(address);
    }

    pub(crate) fn set_identity(&self, identity: Arc<Identity>) {
        self.identity.store(identity);
    }

    pub(crate) fn has_tls(&self, version: &'static str) {
        let _ = self.tls.set(version);
    }

    /// Sets what it speaks.
    pub(crate) fn speaks(&self, protocol: Protocol) {
        if protocol == Protocol::WebSocket {
            self.before_websocket
                .store(self.traffic.messages_in.get(), Relaxed);
        }
        self.protocol.store(protocol as u8, SeqCst);
    }

    /// What it speaks, once that has shown.
    fn protocol(&self) -> Option<&'static str> {
        Protocol::NAMES[usize::from(self.protocol.load(SeqCst))]
    }

    /// Its requests by protocol, and whether that is what it speaks now: one
    /// of WebSocket was one of HTTP before.
    pub(crate) fn requests(&self) -> impl Iterator<Item = (&'static str, u64, bool)> {
        let now = self.protocol();
        let all = self.traffic.messages_in.get();
        let is_upgraded = now == Protocol::NAMES[Protocol::WebSocket as usize];
        let before = self.before_websocket.load(Relaxed);
        let http = is_upgraded.then_some(("http", before, false));
        let now = now.map(|name| (name, all.saturating_sub(before), true));
        http.into_iter().chain(now)
    }

    /// When it was accepted.
    pub(crate) fn since(&self) -> Instant {
        self.since.0
    }

    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// A call has used so much.
    #[inline]
    pub(crate) fn used(&self, used: Used) {
        self.traffic.host_calls.add_some(used.host_calls);
        self.traffic.peak_memory.rise_to(used.peak_memory);
    }

    /// Charges the present principal with what was used since the last time.
    pub(crate) fn settle(&self, usages: &Usages) {
        let mut charged = lock(&self.charged);
        let usage = self.traffic.usage();
        let due = usage.since(*charged);
        *charged = usage;
        usages.add(self.identity.load().caller.principal.as_deref(), due);
    }

    /// Whether this principal has authenticated here.
    pub(crate) fn is_of(&self, principal: &str) -> bool {
        self.identity.load().principal.name == principal
    }

    /// How long an unauthenticated peer has sent no request; none while it is
    /// served.
    pub(crate) fn idle_unauthenticated(&self) -> Option<Duration> {
        let activity = self.activity.load(Relaxed);
        let quiet = activity != Activity::Calling as u8 && activity != Activity::Closing as u8;
        let idle = quiet && self.calls_left() == 0 && !self.identity.load().is_authenticated();
        idle.then(|| system::now().saturating_duration_since(self.last_answer()))
    }

    /// When the last request was answered; before that, when it was accepted.
    fn last_answer(&self) -> Instant {
        self.since.0 + Duration::from_micros(self.last_request.load(Relaxed))
    }

    #[inline]
    pub(crate) fn set_activity(&self, activity: Activity) {
        self.activity.store(activity as u8, Relaxed);
    }

    /// Whether it closes, maybe after calls in flight.
    #[allow(dead_code, reason = "the simulation asks")]
    pub(crate) fn is_closing(&self) -> bool {
        self.activity.load(Relaxed) == Activity::Closing as u8
    }

    /// Counts bytes that arrived.
    #[inline]
    pub(crate) fn bytes_arrived(&self, count: usize, now: Instant) {
        self.traffic.bytes_in.add(count as u64);
        let millis = now.saturating_duration_since(self.since.0).as_millis();
        self.last_activity.store(as_u64(millis), Relaxed);
    }

    /// Notes that all requests are answered and the answers are about to leave:
    /// the peer's idle time begins before it can have read them.
    #[inline]
    pub(crate) fn answered(&self, now: Instant) {
        let micros = now.saturating_duration_since(self.since.0).as_micros();
        self.last_request.store(as_u64(micros), Relaxed);
    }

    /// Why no further call is begun, once that is so.
    #[inline]
    pub(crate) fn close_request(&self) -> Option<CloseRequest> {
        let own = self.close_request.get().copied();
        own.or_else(|| self.drain.draining().then_some(CloseRequest::SHUTDOWN))
    }

    /// Has the owner close the connection and begin no further call. The first
    /// reason counts.
    pub(crate) fn request_close(&self, why: CloseRequest) {
        let _ = self.close_request.set(why);
    }

    /// Whether a peer that does not take the closing ERROR is cut off.
    pub(crate) fn is_cut_off(&self) -> bool {
        self.drain.is_cutting_off()
    }

    /// Whether the server drains.
    pub(crate) fn is_draining(&self) -> bool {
        self.drain.draining()
    }

    /// The connection goes on while a call runs.
    pub(crate) fn leave_call(&self) {
        self.left.fetch_add(1, SeqCst);
    }

    /// Calls whose connection has gone on, and that have not answered.
    pub(crate) fn calls_left(&self) -> u32 {
        self.left.load(SeqCst)
    }

    /// Stores the answer of such a call. The owner has yet to be notified.
    pub(crate) fn answer_late(&self, put: impl FnOnce(&mut Outbox, &Traffic)) {
        let mut late = lock(&self.late);
        put(&mut late, &self.traffic);
        // Under the lock: whoever sees no call left finds all answers.
        self.left.fetch_sub(1, SeqCst);
    }

    /// Whether such answers wait for the owner.
    pub(crate) fn has_late(&self) -> bool {
        !lock(&self.late).is_empty()
    }

    /// Moves the answers of such calls to the owner's outbox.
    pub(crate) fn collect_late(&self, outbox: &mut Outbox) {
        outbox.append(&mut lock(&self.late));
    }

    /// Returns a copy for the admin side.
    pub(crate) fn row(&self) -> ConnectionRow {
        let traffic = &self.traffic;
        let (activity, left) = (self.activity.load(Relaxed), u64::from(self.calls_left()));
        let calling = activity == Activity::Calling as u8;
        let activity = match left {
            0 => Activity::ALL[usize::from(activity)],
            _ => Activity::Calling,
        };
        let last_activity = self.since.1 + Duration::from_millis(self.last_activity.load(Relaxed));
        let identity = self.identity.load();
        let text = |time| humantime::format_rfc3339_millis(time).to_string();
        ConnectionRow {
            id: identity.caller.connection_id.clone(),
            peer: self.address().to_string(),
            principal: identity.caller.principal.clone(),
            tls: self.tls.get().copied(),
            protocol: self.protocol(),
            state: activity.as_str(),
            since: text(self.since.1),
            last_activity: text(last_activity),
            bytes_in: traffic.bytes_in.get(),
            bytes_out: traffic.bytes_out.get(),
            messages_in: traffic.messages_in.get(),
            messages_out: traffic.messages_out.get(),
            in_flight: left + u64::from(calling),
            errors: traffic.errors.get(),
        }
    }
}

fn as_u64(count: u128) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
