//! What can be seen of a running server, and done to its connections and
//! calls.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use super::{
    admission::Admission,
    peer::{CloseRequest, Peer},
    poller::Events,
    workers::Workers,
};
use crate::{
    metrics::{
        Traffic, Usages,
        snapshot::{CallRow, ConnectionRow, Totals},
    },
    wire::Code,
};

/// What the admin side sees of a server, without a lock.
#[derive(Clone)]
pub struct View {
    pub(super) shared: Arc<Workers>,
    pub(super) admission: Arc<Admission>,
}

impl View {
    /// Whether the server takes connections.
    #[must_use]
    pub fn accepting(&self) -> bool {
        !self.shared.common.drain.draining.load(SeqCst)
    }

    /// Calls that take long, oldest first.
    #[must_use]
    pub fn calls(&self) -> Vec<CallRow> {
        self.shared.common.running.rows()
    }

    /// Stops a call by its next tick. Returns false if there is none of this
    /// number.
    #[must_use]
    pub fn kill(&self, call: u64) -> bool {
        self.shared.common.running.kill(call)
    }

    /// Closes a connection gracefully: what was begun is answered, then the
    /// peer gets an ERROR. Returns false if there is none of this number.
    #[must_use]
    pub fn close(&self, connection: u64) -> bool {
        let found = self
            .admission
            .peers()
            .find(|peer| peer.number() == connection);
        found.is_some_and(|peer| {
            self.request_close(&peer, CloseRequest::CLOSED);
            true
        })
    }

    /// Closes all connections of a principal in the same way. Returns how many.
    #[must_use]
    pub fn close_principal(&self, principal: &str) -> usize {
        let of_it = self.admission.peers().filter(|peer| peer.is_of(principal));
        of_it
            .inspect(|peer| self.request_close(peer, CloseRequest::PRINCIPAL_CLOSED))
            .count()
    }

    fn request_close(&self, peer: &Peer, why: CloseRequest) {
        peer.request_close(why);
        self.shared.poller.deliver(peer.slot(), Events::CLOSE);
    }

    /// Open connections, oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionRow> {
        let mut open: Vec<_> = self.admission.peers().collect();
        open.sort_by_key(|peer| peer.number());
        open.iter().map(|peer| peer.row()).collect()
    }

    /// What principals have used so far.
    #[must_use]
    pub fn usages(&self) -> &Usages {
        let usages = &self.shared.common.metrics.usages;
        self.admission.peers().for_each(|peer| peer.settle(usages));
        usages
    }

    /// Sums over the whole server.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let metrics = &self.shared.common.metrics;
        // In this order, and without those that are in it already: a
        // connection that ends meanwhile is missed at worst, never counted
        // twice. What is missed is made up for by what was published before.
        let sum = Traffic::default();
        sum.absorb(&metrics.closed);
        let mut protocols = metrics.protocols.closed();
        let mut connections = 0;
        for peer in self.admission.peers() {
            if peer.traffic().add_unless_closed(&sum) {
                for (protocol, requests, is_open) in peer.requests() {
                    let used = protocols.entry(protocol).or_default();
                    used.add(is_open, requests);
                }
            }
            connections += 1;
        }
        metrics.published.rise_to(&sum);
        let sum = &metrics.published;
        let name = |code: Option<Code>| code.map_or("SERVICE", Code::as_str);
        Totals {
            uptime_seconds: metrics.uptime().as_secs_f64(),
            connections,
            protocols: metrics.protocols.publish(protocols),
            max_connections: self.shared.common.settings.max_connections as u64,
            threads: self.shared.threads.threads() as u64,
            memory: self.shared.common.settings.memory.used() as u64,
            max_memory: self.shared.common.settings.memory.limit() as u64,
            accepted: metrics.accepted.get(),
            refused: metrics.refused.get(),
            accept_errors: metrics.accept_errors.get(),
            truncated: metrics.truncated.get(),
            write_timeouts: metrics.write_timeouts.get(),
            publish_failures: metrics.publish_failures.get(),
            denied: metrics.denied.get(),
            evicted: metrics.evicted.get(),
            calls_reset: metrics.calls_reset.get(),
            // The admin side fills them in.
            calls_running: 0,
            calls_waiting: 0,
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
